//! Patch tokens of images of any size, window by window where they are large.

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_augmentation::{CropBox, Resizer, RgbImage, normalize};
use dinoxide_model::interpolation::{Filter, resize_tokens};
use dinoxide_model::{Architecture, Backbone, weights::host};
use serde::{Deserialize, Serialize};

use crate::EvaluationError;

/// How images become tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenGridConfig {
    /// Length of the shorter image side after resizing, in pixels; images keep their size without it. Both sides are then
    /// rounded to multiples of the patch size.
    pub short_px: Option<usize>,
    /// Images with a longer side go through the backbone in windows of this side, in pixels. A multiple of the patch size.
    pub window_px: usize,
    /// Tokens of this many last blocks, after the final norm, are concatenated; of a ConvNeXt, stages.
    pub last_blocks: usize,
    /// Take so many blocks evenly from all, in the place of the last: of 12, four are 2, 5, 8 and 11.
    pub spread: bool,
    /// Mean of the colour channels.
    pub mean: [f32; 3],
    /// Their standard deviation.
    pub std: [f32; 3],
}

impl TokenGridConfig {
    /// The blocks that are meant, of so many.
    pub fn layers(&self, available: usize) -> Vec<usize> {
        let count = self.last_blocks;
        if self.spread {
            (1..=count).map(|i| (i * available).div_ceil(count) - 1).collect()
        } else {
            (available - count..available).collect()
        }
    }
}

/// The patch tokens of an image or window.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenGrid {
    /// Rows of patches.
    pub rows: usize,
    /// Columns of patches.
    pub columns: usize,
    /// Width of a token.
    pub dim: usize,
    /// `[rows · columns, dim]`, rows of patches first.
    pub values: Vec<f32>,
}

/// A frozen backbone and how images are fed to it.
pub struct Encoder<'a> {
    backbone: &'a Backbone,
    device: Device,
    config: TokenGridConfig,
    layers: Vec<usize>,
    stride: usize,
}

/// Most pixels of the shorter side of a resized image. One that is twice as long has 1.6 gigabytes then.
const LONGEST_SIDE: usize = 1 << 14;

impl<'a> Encoder<'a> {
    /// An encoder.
    ///
    /// # Errors
    /// A window or number of blocks that the backbone does not have, or one that takes other than three channels.
    pub fn new(backbone: &'a Backbone, config: &TokenGridConfig, device: &Device) -> Result<Self, EvaluationError> {
        let architecture = backbone.architecture();
        let (available, stride) = (architecture.layers(), architecture.stride());
        let refused = |message: String| Err(EvaluationError::Extraction { message });
        if config.last_blocks == 0 || config.last_blocks > available {
            return Err(EvaluationError::BlockCount { asked: config.last_blocks, available });
        }
        if config.window_px == 0 || !config.window_px.is_multiple_of(stride) {
            let (window, near) = (config.window_px, (config.window_px / stride).max(1) * stride);
            return refused(format!(
                "a window of {window} px is not a multiple of the patch size {stride}\n\nhint: {near} is one"
            ));
        }
        if let Some(short) = config.short_px.filter(|short| !(1..=LONGEST_SIDE).contains(short)) {
            return refused(format!(
                "images cannot be resized to a shorter side of {short} px: 1 to {LONGEST_SIDE} are possible"
            ));
        }
        let channels = architecture.in_channels();
        if channels != 3 {
            return refused(format!("the backbone takes images of {channels} channels, these have 3"));
        }
        let layers = config.layers(available);
        Ok(Self { backbone, device: device.clone(), config: config.clone(), layers, stride })
    }

    /// How images become tokens.
    pub fn config(&self) -> &TokenGridConfig {
        &self.config
    }

    /// The backbone.
    pub fn backbone(&self) -> &Backbone {
        self.backbone
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Side of a patch, in pixels.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Blocks whose tokens are used, counted from 0.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// Widths of the tokens of each of these blocks, which lie side by side.
    pub fn widths(&self) -> Vec<usize> {
        match self.backbone.architecture() {
            Architecture::Vit(config) => vec![config.embed_dim; self.layers.len()],
            Architecture::ConvNext(config) => self.layers.iter().map(|&stage| config.dims[stage]).collect(),
        }
    }

    /// The width and height in which an image of this width and height is seen.
    pub fn fitted_size(&self, size: (u32, u32)) -> (u32, u32) {
        fitted_size(size, self.config.short_px, self.stride)
    }

    /// The image at the size in which it is seen: proportions kept but for rounding to whole patches.
    pub fn fitted(&self, image: &RgbImage, resizer: &mut Resizer) -> RgbImage {
        let size = self.fitted_size(image.dimensions());
        if size == image.dimensions() { image.clone() } else { resizer.resize(image, size) }
    }

    /// The image as the backbone takes it, `[1, 3, H, W]`.
    pub fn pixels(&self, image: &RgbImage) -> Tensor<4> {
        let (width, height) = image.dimensions();
        let pixels = normalize([image].into_iter(), (width, height), self.config.mean, self.config.std);
        Tensor::from_data(TensorData::new(pixels, [1, 3, height as usize, width as usize]), &self.device)
    }

    /// Tokens of an image whose sides are whole patches.
    ///
    /// # Errors
    /// Tokens that are not finite.
    pub fn tokens(&self, image: &RgbImage) -> Result<TokenGrid, EvaluationError> {
        let found = self.backbone.forward_layers(self.pixels(image), &self.layers, true);
        let (width, height) = (image.width() as usize, image.height() as usize);
        // Without a patch size, stages of a ConvNeXt have grids of their own; all go to the finest.
        let grids: Vec<(usize, usize)> =
            found.iter().map(|layer| grid_of(layer.patches.dims()[1], (height, width))).collect();
        let finest = grids.iter().copied().max().expect("at least one block");
        let parts = found
            .into_iter()
            .zip(grids)
            .map(|(layer, grid)| resize_tokens(layer.patches, grid, finest, Filter::Bilinear, false))
            .collect();
        let tokens = Tensor::cat(parts, 2);
        let dim = tokens.dims()[2];
        let values = host(tokens.reshape([-1]));
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let rows = finest.0 * finest.1;
            let bad = values.chunks(dim).filter(|row| row.iter().any(|value| !value.is_finite())).count();
            let (row, column, value) = (at / dim, at % dim, values[at]);
            return Err(EvaluationError::NonFinite { row, column, value, rows_affected: bad, rows });
        }
        Ok(TokenGrid { rows: finest.0, columns: finest.1, dim, values })
    }

    /// The windows of a fitted image, `step` pixels from one to the next; the last ones reach its border.
    pub fn windows(&self, image: &RgbImage, step: usize) -> Vec<CropBox> {
        let window = self.config.window_px;
        let along = |length: u32| {
            let (length, side) = (length as usize, (length as usize).min(window));
            let count = (length - side).div_ceil(step) + 1;
            (0..count).map(move |i| ((i * step).min(length - side) as u32, side as u32))
        };
        along(image.height())
            .flat_map(|(top, height)| {
                along(image.width()).map(move |(left, width)| CropBox { left, top, width, height })
            })
            .collect()
    }

    /// Pixels from one window to the next where they overlap: two thirds of the side, as in the references.
    pub fn overlapping_step(&self) -> usize {
        (self.config.window_px * 2 / 3).max(1)
    }

    /// Tokens of a window.
    ///
    /// # Errors
    /// Tokens that are not finite.
    pub fn window_tokens(
        &self,
        image: &RgbImage,
        window: CropBox,
        resizer: &mut Resizer,
    ) -> Result<TokenGrid, EvaluationError> {
        if (window.width, window.height) == image.dimensions() {
            return self.tokens(image);
        }
        self.tokens(&resizer.resized_crop(image, window, (window.width, window.height)))
    }

    /// The size of images in words.
    pub fn size_description(&self) -> String {
        let size = match self.config.short_px {
            Some(short) => format!("short side {short}"),
            None => "own size".to_owned(),
        };
        format!("{size} in multiples of {}", self.stride)
    }

    /// Size and windows in words, for a protocol.
    pub fn description(&self) -> String {
        let (window, step) = (self.config.window_px, self.overlapping_step());
        format!("{}, window {window}, stride {step}", self.size_description())
    }
}

/// The size `(width, height)` of an image after resizing: the shorter side is `short`, the longer one in proportion, both
/// rounded to multiples of `stride`, at least one.
pub(crate) fn fitted_size((width, height): (u32, u32), short: Option<usize>, stride: usize) -> (u32, u32) {
    let scale = short.map_or(1.0, |short| short as f64 / f64::from(width.min(height)));
    let fitted = |side: u32| ((f64::from(side) * scale / stride as f64).round().max(1.0) * stride as f64) as u32;
    (fitted(width), fitted(height))
}

/// The grid of `count` tokens of an image of `(height, width)`. Smaller patches are never fewer, so there is one at most.
fn grid_of(count: usize, (height, width): (usize, usize)) -> (usize, usize) {
    let mut side = height.max(width);
    while side > 1 && (height / side) * (width / side) < count {
        side -= 1;
    }
    let grid = (height / side, width / side);
    assert_eq!(grid.0 * grid.1, count, "{count} tokens of {height}x{width} pixels are no grid");
    grid
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use dinoxide_model::{Arch, ConvNextConfig, ModelConfig};
    use dinoxide_random::{Purpose, stream};

    pub(crate) fn config(window_px: usize) -> TokenGridConfig {
        TokenGridConfig { short_px: None, window_px, last_blocks: 1, spread: false, mean: [0.5; 3], std: [0.25; 3] }
    }

    /// A ViT of patch 4, 8 wide, 2 deep.
    pub(crate) fn backbone() -> Backbone {
        let config = ModelConfig {
            arch: Arch::VitTiny,
            patch_size: 4,
            embed_dim: Some(8),
            depth: Some(2),
            num_heads: Some(2),
            ..ModelConfig::default()
        };
        let architecture = config.resolve(16).expect("a model");
        Backbone::new(&architecture, &Device::flex(), &mut stream(1, Purpose::Init, 0, 0))
    }

    pub(crate) fn image(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            image::Rgb([(x * 9 + y) as u8, (x * x + 7 * y) as u8, (31 * x * y) as u8])
        })
    }

    #[test]
    fn sizes_keep_their_proportions_in_whole_patches() {
        let cases = [
            ((360, 270), None, 8, (360, 272)),
            ((360, 270), Some(128), 8, (168, 128)),
            ((100, 300), Some(64), 16, (64, 192)),
            ((5, 3), None, 16, (16, 16)),
            ((428, 240), Some(480), 14, (854, 476)),
        ];
        for (size, short, stride, expected) in cases {
            assert_eq!(fitted_size(size, short, stride), expected, "{size:?} {short:?} {stride}");
        }
        assert_eq!(cases.len(), 5);
    }

    #[test]
    fn blocks_are_the_last_or_spread_evenly() {
        let layers =
            |last_blocks, spread, available| TokenGridConfig { last_blocks, spread, ..config(16) }.layers(available);
        assert_eq!(layers(4, false, 12), [8, 9, 10, 11]);
        assert_eq!(layers(4, true, 12), [2, 5, 8, 11]);
        assert_eq!(layers(4, true, 24), [5, 11, 17, 23]);
        assert_eq!(layers(4, true, 6), [1, 2, 4, 5]);
        assert_eq!(layers(4, true, 4), [0, 1, 2, 3]);
    }

    #[test]
    fn windows_cover_every_pixel_and_stay_inside() {
        let backbone = backbone();
        let encoder = Encoder::new(&backbone, &config(16), &Device::flex()).unwrap();
        let mut seen = 0;
        for (width, height) in [(40, 28), (16, 16), (12, 44), (20, 16)] {
            for step in [encoder.overlapping_step(), 16] {
                let mut covered = vec![0; (width * height) as usize];
                for window in encoder.windows(&image(width, height), step) {
                    assert_eq!((window.width, window.height), (width.min(16), height.min(16)));
                    for y in window.top..window.top + window.height {
                        for x in window.left..window.left + window.width {
                            covered[(y * width + x) as usize] += 1;
                        }
                    }
                    seen += 1;
                }
                assert!(covered.iter().all(|&times| times > 0), "{width}x{height} {step}");
            }
        }
        assert_eq!(seen, 4 * 3 + 3 * 2 + 2 + 4 + 3 + 2 + 2);
    }

    #[test]
    fn tokens_are_those_of_the_backbone_and_of_several_blocks_side_by_side() {
        let (backbone, image) = (backbone(), image(20, 12));
        let device = Device::flex();
        let encoder = Encoder::new(&backbone, &TokenGridConfig { last_blocks: 2, ..config(64) }, &device).unwrap();
        let grid = encoder.tokens(&image).unwrap();
        assert_eq!((grid.rows, grid.columns, grid.dim), (3, 5, 16));
        let expected = host(backbone.forward(encoder.pixels(&image), None).patches.reshape([-1]));
        for (token, expected) in grid.values.chunks(16).zip(expected.chunks(8)) {
            assert_eq!(&token[8..], expected);
        }
        let window = CropBox { left: 8, top: 0, width: 12, height: 8 };
        let part = encoder.window_tokens(&image, window, &mut Resizer::default()).unwrap();
        assert_eq!((part.rows, part.columns), (2, 3));
    }

    #[test]
    fn stages_of_a_convnext_meet_on_the_finest_grid() {
        let architecture = Architecture::ConvNext(ConvNextConfig {
            in_channels: 3,
            dims: [4, 6, 8, 10],
            depths: [1, 1, 1, 1],
            layer_scale_init: Some(0.5),
            norm_eps: 1e-6,
            patch_size: None,
            drop_path_rate: 0.0,
            drop_path: dinoxide_model::config::DropPathKind::PerSample,
        });
        let device = Device::flex();
        let backbone = Backbone::new(&architecture, &device, &mut stream(1, Purpose::Init, 0, 0));
        let encoder = Encoder::new(&backbone, &TokenGridConfig { last_blocks: 2, ..config(64) }, &device).unwrap();
        let grid = encoder.tokens(&image(96, 64)).unwrap();
        assert_eq!((grid.rows, grid.columns, grid.dim), (4, 6, 18));
        assert_eq!(encoder.widths(), [8, 10]);
    }

    #[test]
    fn settings_that_do_not_fit_are_refused() {
        let backbone = backbone();
        let refused = |config: &TokenGridConfig| {
            Encoder::new(&backbone, config, &Device::flex()).err().expect("refused").to_string()
        };
        let message = refused(&config(18));
        assert!(
            message.contains("18 px") && message.contains("patch size 4") && message.contains("hint: 16"),
            "{message}"
        );
        assert!(refused(&TokenGridConfig { last_blocks: 3, ..config(16) }).contains("last 3 blocks"));
        assert!(refused(&TokenGridConfig { short_px: Some(0), ..config(16) }).contains("0 px"));
        assert!(refused(&TokenGridConfig { short_px: Some(100_000), ..config(16) }).contains("100000 px: 1 to 16384"));
    }
}
