//! ConvNeXt (Liu et al. 2022, arXiv:2201.03545), with the interface of a ViT that DINOv3 gives it (arXiv:2508.10104, §5.2).
//!
//! Four stages of blocks at strides 4, 8, 16 and 32. The mean of the last feature map is the CLS token, its places are the
//! patch tokens, and one final norm is applied to both. There is no mask token and no position embedding.
//!
//! Feature maps are held channels last, `[B, h, w, D]`: then norms and pointwise layers work on rows, a convolution whose
//! stride is its kernel is a linear layer, and the depthwise one reads neighbouring channels.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, s};
use dinoxide_kernels as kernels;
use dinoxide_kernels::Precision;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::{
    ModelError, Sides,
    config::{DropPathKind, NormKind},
    draws::{BranchDraw, StochasticDraws},
    init::Init,
    interpolation::{self, Filter},
    layers::{Linear, Norm, branch, residual},
    vit::{Features, LayerFeatures},
};

/// Pixels between neighbouring patch tokens.
pub(crate) const STRIDE: usize = 32;

/// Side of the stem's convolution and its stride.
const STEM: usize = 4;

/// Side of a depthwise convolution.
const KERNEL: usize = 7;

/// The complete description of a ConvNeXt; nothing in it is implied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConvNextConfig {
    /// Colour channels.
    pub in_channels: usize,
    /// Channels of the four stages; those of the last are the width of the tokens.
    pub dims: [usize; 4],
    /// Blocks of the four stages.
    pub depths: [usize; 4],
    /// Initial value of the layer scale; `None`: no layer scale.
    pub layer_scale_init: Option<f64>,
    /// Epsilon of every norm.
    pub norm_eps: f64,
    /// [`forward_layers`](ConvNext::forward_layers) resizes the feature maps to the grid of patches of this side in pixels;
    /// `None` leaves them as they are.
    pub patch_size: Option<usize>,
    /// Stochastic depth of the student.
    pub drop_path_rate: f64,
    /// Its form.
    pub drop_path: DropPathKind,
}

impl ConvNextConfig {
    /// The grid of patch tokens `(rows, columns)` of an image of `height × width` pixels. What a stride of 2 leaves over at
    /// the right and at the bottom is cut off, as a convolution does.
    ///
    /// # Errors
    /// A side that is no multiple of 4 or less than 32.
    pub fn grid(&self, height: usize, width: usize) -> Result<(usize, usize), ModelError> {
        for (what, size) in [("image height", height), ("image width", width)] {
            if size < STRIDE || !size.is_multiple_of(STEM) {
                let near = (size / STEM * STEM).max(STRIDE);
                return Err(ModelError::config(format!(
                    "{what} {size}: a ConvNeXt takes multiples of {STEM} from {STRIDE} on\n\nhint: {near} is one"
                )));
            }
        }
        Ok((height / STRIDE, width / STRIDE))
    }

    /// The sides that [`grid`](Self::grid) accepts.
    pub(crate) fn sides(&self) -> Sides {
        Sides { step: STEM, least: STRIDE }
    }

    /// Checks that the numbers fit together. A configuration read from a file must pass before anything is built.
    ///
    /// # Errors
    /// The first that is not usable.
    pub fn check(&self) -> Result<(), ModelError> {
        let sizes = self.dims.map(|dim| ("dims", dim)).into_iter().chain(self.depths.map(|depth| ("depths", depth)));
        for (name, value) in sizes.chain([("in_channels", self.in_channels)]) {
            if value == 0 || value > 1 << 20 {
                return Err(ModelError::config(format!("`model.{name}` has {value}, not a usable size")));
            }
        }
        if let Some(patch) = self.patch_size.filter(|patch| !(1..=STRIDE).contains(patch)) {
            return Err(ModelError::config(format!(
                "`model.patch_size` is {patch}: the last feature map of a ConvNeXt has a place for every {STRIDE} px, and its \
                 tokens can be brought to a grid as fine or finer\n\nhint: from 1 to {STRIDE}, or 0 for the map as it is"
            )));
        }
        if !(0.0..1.0).contains(&self.drop_path_rate) {
            let rate = self.drop_path_rate;
            return Err(ModelError::config(format!("`model.drop_path_rate` is {rate}, outside [0, 1)")));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(ModelError::config(format!("`model.norm_eps` is {}, outside (0, 1)", self.norm_eps)));
        }
        Ok(())
    }
}

/// Parameters of a convolution.
#[derive(Module, Debug)]
pub struct Convolution {
    /// `[D, C, k, k]`; `[D, 1, k, k]` where it is depthwise.
    pub weight: Param<Tensor<4>>,
    /// `[D]`.
    pub bias: Param<Tensor<1>>,
    /// Of its product; a depthwise one is no product.
    #[module(skip)]
    precision: Precision,
}

impl Convolution {
    fn new(shape: [usize; 4], init: &mut Init<impl Rng>) -> Self {
        let (weight, bias) = (init.normal(shape, 0.02), init.constant([shape[0]], 0.0));
        Self { weight, bias, precision: Precision::Fp32 }
    }

    /// With a stride equal to its kernel: `[B, H, W, C]` → `[B, H/k, W/k, D]`, rounded down.
    fn forward_patches(&self, x: Tensor<4>) -> Tensor<4> {
        let weight = self.weight.val();
        let [dim, channels, side, _] = weight.dims();
        let [batch, height, width, _] = x.dims();
        let (rows, columns) = (height / side, width / side);
        let unfolded = x
            .slice(s![.., ..rows * side, ..columns * side, ..])
            .reshape([batch, rows, side, columns, side, channels])
            .permute([0, 1, 3, 2, 4, 5])
            .reshape([batch * rows * columns, side * side * channels]);
        let weight = weight.permute([0, 2, 3, 1]).reshape([dim, side * side * channels]);
        let places = kernels::linear(unfolded, weight, Some(self.bias.val()), self.precision);
        places.reshape([batch, rows, columns, dim])
    }
}

/// `[B, h, w, D]`, each place normalised.
fn normalize(norm: &Norm, x: Tensor<4>) -> Tensor<4> {
    let [batch, height, width, dim] = x.dims();
    norm.forward(x.reshape([batch * height * width, dim])).reshape([batch, height, width, dim])
}

/// A block: depthwise convolution, norm, and a feed-forward layer on each place, as one residual branch.
#[derive(Module, Debug)]
pub struct ConvNextBlock {
    /// Depthwise, 7×7.
    pub dwconv: Convolution,
    /// After the convolution.
    pub norm: Norm,
    /// `D → 4·D`.
    pub pwconv1: Linear,
    /// `4·D → D`.
    pub pwconv2: Linear,
    /// Layer scale, `[D]`.
    pub gamma: Option<Param<Tensor<1>>>,
}

impl ConvNextBlock {
    fn new(config: &ConvNextConfig, dim: usize, init: &mut Init<impl Rng>) -> Self {
        Self {
            dwconv: Convolution::new([dim, 1, KERNEL, KERNEL], init),
            norm: Norm::new(dim, NormKind::LayerNorm, config.norm_eps, init),
            pwconv1: Linear::new(dim, 4 * dim, true, init),
            pwconv2: Linear::new(4 * dim, dim, true, init),
            gamma: config.layer_scale_init.map(|value| init.constant([dim], value)),
        }
    }

    /// `x [B, h, w, D]` → `[B, h, w, D]`.
    pub fn forward(&self, x: Tensor<4>, draw: &BranchDraw) -> Tensor<4> {
        let shape @ [batch, height, width, dim] = x.dims();
        let tokens = x.reshape([batch, height * width, dim]);
        let y = branch(tokens, draw, self.gamma.as_ref().map(Param::val), |tokens, gamma| {
            let [batch, places, _] = tokens.dims();
            let x = tokens.clone().reshape([batch, height, width, dim]);
            let x = kernels::depthwise_conv(x, self.dwconv.weight.val(), self.dwconv.bias.val());
            let x = self.norm.forward(x.reshape([batch * places, dim]));
            let x = self.pwconv2.forward(kernels::gelu(self.pwconv1.forward(x)));
            residual(tokens, x.reshape([batch, places, dim]), gamma)
        });
        y.reshape(shape)
    }
}

/// Norm and convolution, which halves the sides.
type Downsample = (Norm, Convolution);

/// The backbone. Its fields have the reference's names, `downsample_layers.0` being the stem.
#[derive(Module, Debug)]
pub struct ConvNext {
    /// The stem, convolution and norm, and what leads from each stage to the next.
    pub downsample_layers: ((Convolution, Norm), Downsample, Downsample, Downsample),
    /// The blocks of each stage.
    pub stages: Vec<Vec<ConvNextBlock>>,
    /// Final norm.
    pub norm: Norm,
    #[module(skip)]
    config: ConvNextConfig,
}

impl ConvNext {
    /// A backbone with fresh weights: 0.02 for every kernel and matrix.
    ///
    /// `config` must have passed [`ConvNextConfig::check`].
    pub fn new(config: &ConvNextConfig, device: &Device, rng: &mut impl Rng) -> Self {
        let mut init = Init { rng, device };
        let dims = config.dims;
        let norm = |dim: usize, init: &mut Init<_>| Norm::new(dim, NormKind::LayerNorm, config.norm_eps, init);
        let stem = Convolution::new([dims[0], config.in_channels, STEM, STEM], &mut init);
        let downsample = |stage: usize, init: &mut Init<_>| {
            (norm(dims[stage - 1], init), Convolution::new([dims[stage], dims[stage - 1], 2, 2], init))
        };
        Self {
            downsample_layers: (
                (stem, norm(dims[0], &mut init)),
                downsample(1, &mut init),
                downsample(2, &mut init),
                downsample(3, &mut init),
            ),
            stages: dims
                .into_iter()
                .zip(config.depths)
                .map(|(dim, depth)| (0..depth).map(|_| ConvNextBlock::new(config, dim, &mut init)).collect())
                .collect(),
            norm: norm(dims[3], &mut init),
            config: config.clone(),
        }
    }

    pub(crate) fn set_precision(&mut self, precision: Precision) {
        let ((stem, _), second, third, fourth) = &mut self.downsample_layers;
        let downsamples = [second, third, fourth].map(|(_, convolution)| convolution);
        [stem].into_iter().chain(downsamples).for_each(|convolution| convolution.precision = precision);
        for block in self.stages.iter_mut().flatten() {
            block.pwconv1.precision = precision;
            block.pwconv2.precision = precision;
        }
    }

    /// What this backbone is.
    pub fn config(&self) -> &ConvNextConfig {
        &self.config
    }

    /// Features of `images`, as the teacher and every evaluation compute them.
    ///
    /// # Shapes
    /// `images [B, C, H, W]`, sides that [`ConvNextConfig::grid`] accepts.
    pub fn forward(&self, images: Tensor<4>) -> Features {
        self.forward_with(images, None)
    }

    /// The student's forward: under given draws of stochastic depth, made for this batch size.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward).
    pub fn forward_train(&self, images: Tensor<4>, draws: &StochasticDraws) -> Features {
        self.forward_with(images, Some(draws))
    }

    fn forward_with(&self, images: Tensor<4>, draws: Option<&StochasticDraws>) -> Features {
        let mut last = None;
        self.run_stages(images, draws, |_, x| last = Some(x.clone()));
        let (cls, prenorm, _) = tokens(last.expect("a ConvNeXt has four stages"));
        let patches = self.norm.forward_tokens(prenorm.clone());
        Features { cls: self.norm.forward(cls), registers: None, patches, prenorm }
    }

    /// Tokens after the given stages (indices from 0), in ascending order, each of its stage's width: the mean of the
    /// feature map, and its places on the grid that [`ConvNextConfig::patch_size`] asks for (bilinear, antialiased). With
    /// `norm`, those of the last stage are after the final norm; the others have none.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward).
    pub fn forward_layers(&self, images: Tensor<4>, layers: &[usize], norm: bool) -> Vec<LayerFeatures> {
        let [_, _, height, width] = images.dims();
        let mut found = Vec::with_capacity(layers.len());
        self.run_stages(images, None, |stage, x| {
            if !layers.contains(&stage) {
                return;
            }
            let (mut cls, patches, grid) = tokens(x.clone());
            let mut patches = self.on_grid(patches, grid, (height, width));
            if norm && stage + 1 == self.stages.len() {
                (cls, patches) = (self.norm.forward(cls), self.norm.forward_tokens(patches));
            }
            found.push(LayerFeatures { cls, registers: None, patches });
        });
        found
    }

    /// The patches of the last stage that [`forward_layers`](Self::forward_layers) gives, from the features of a forward on
    /// images of this height and width.
    pub(crate) fn last_layer_patches(&self, features: &Features, (height, width): (usize, usize)) -> Tensor<3> {
        let grid = self.config.grid(height, width).expect("a forward took these images");
        self.norm.forward_tokens(self.on_grid(features.prenorm.clone(), grid, (height, width)))
    }

    /// The places of a feature map on the grid that [`ConvNextConfig::patch_size`] asks for.
    fn on_grid(&self, patches: Tensor<3>, grid: (usize, usize), (height, width): (usize, usize)) -> Tensor<3> {
        match self.config.patch_size {
            None => patches,
            Some(patch) => {
                let to = (height / patch, width / patch);
                interpolation::resize_tokens(patches, grid, to, Filter::Bilinear, true)
            }
        }
    }

    /// Runs the stages, showing each one's output `[B, h, w, D]`.
    fn run_stages(&self, images: Tensor<4>, draws: Option<&StochasticDraws>, mut after: impl FnMut(usize, &Tensor<4>)) {
        let [_, _, height, width] = images.dims();
        if let Err(error) = self.config.grid(height, width) {
            panic!("{error}");
        }
        let ((stem, stem_norm), second, third, fourth) = &self.downsample_layers;
        let mut x = normalize(stem_norm, stem.forward_patches(images.permute([0, 2, 3, 1])));
        let mut draws = draws.map(|draws| draws.branches.iter());
        for (stage, blocks) in self.stages.iter().enumerate() {
            if stage > 0 {
                let (norm, convolution) = [second, third, fourth][stage - 1];
                x = convolution.forward_patches(normalize(norm, x));
            }
            for block in blocks {
                let draw = draws.as_mut().map(|draws| draws.next().expect("a draw for each block"));
                x = block.forward(x, draw.unwrap_or(&BranchDraw::Keep));
            }
            after(stage, &x);
        }
    }
}

/// The mean `[B, D]` and the places `[B, h·w, D]` of a feature map `[B, h, w, D]`, with its grid `(h, w)`.
fn tokens(x: Tensor<4>) -> (Tensor<2>, Tensor<3>, (usize, usize)) {
    let [batch, height, width, dim] = x.dims();
    let places = x.reshape([batch, height * width, dim]);
    (places.clone().mean_dim(1).reshape([batch, dim]), places, (height, width))
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::{Arch, Architecture, Backbone, ModelConfig, parameters};

    fn config() -> ConvNextConfig {
        ConvNextConfig {
            in_channels: 3,
            dims: [4, 6, 8, 10],
            depths: [1, 1, 2, 1],
            layer_scale_init: Some(0.5),
            norm_eps: 1e-6,
            patch_size: None,
            drop_path_rate: 0.0,
            drop_path: DropPathKind::PerSample,
        }
    }

    fn stream(key: u64) -> impl Rng {
        dinoxide_random::stream(key, dinoxide_random::Purpose::Init, 0, 0)
    }

    fn images(shape: [usize; 4]) -> Tensor<4> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i as f32 * 0.37).sin()).collect();
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().expect("single precision")
    }

    #[test]
    fn a_convolution_whose_stride_is_its_kernel_equals_the_loop_and_leaves_the_rest_out() {
        let device = Device::flex();
        let [batch, height, width, channels, dim, side] = [2, 5, 7, 3, 4, 2];
        let layer = Convolution::new([dim, channels, side, side], &mut Init { rng: &mut stream(1), device: &device });
        let x = images([batch, height, width, channels]);
        let found = layer.forward_patches(x.clone());
        assert_eq!(found.dims(), [batch, 2, 3, dim]);
        let (x, weight, found) = (values(x), values(layer.weight.val()), values(found));
        for (i, found) in found.iter().enumerate() {
            let (d, column, row, b) = (i % dim, i / dim % 3, i / dim / 3 % 2, i / dim / 6);
            let mut sum = 0.0;
            for c in 0..channels {
                for p in 0..side {
                    for q in 0..side {
                        let at = ((b * height + row * side + p) * width + column * side + q) * channels + c;
                        sum += x[at] * weight[((d * channels + c) * side + p) * side + q];
                    }
                }
            }
            assert!((found - sum).abs() < 1e-6, "{i}: {found} and {sum}");
        }
    }

    #[test]
    fn grids_round_down_and_images_that_are_too_small_or_uneven_are_refused() {
        let config = config();
        for (size, grid) in [((32, 64), (1, 2)), ((36, 100), (1, 3)), ((112, 124), (3, 3))] {
            assert_eq!(config.grid(size.0, size.1).expect("a grid"), grid);
        }
        for (size, part) in [((28, 64), "hint: 32 "), ((64, 70), "hint: 68 ")] {
            let error = config.grid(size.0, size.1).expect_err("refused").to_string();
            assert!(error.contains(part), "{error}");
        }
        for patch in [0, 33, 1 << 20] {
            let error = ConvNextConfig { patch_size: Some(patch), ..config.clone() }.check().expect_err("refused");
            assert!(error.to_string().contains(&format!("`model.patch_size` is {patch}")), "{error}");
        }
        ConvNextConfig { patch_size: Some(32), ..config }.check().expect("as coarse as the map");
    }

    #[test]
    fn the_sides_of_a_backbone_are_those_that_have_a_grid() {
        let convnext = |patch_size| Architecture::ConvNext(ConvNextConfig { patch_size, ..config() });
        let vit = ModelConfig { patch_size: 14, ..ModelConfig::default() }.resolve(28).expect("a configuration");
        let cases = [
            (convnext(None), "multiples of 4 from 32 on"),
            (convnext(Some(16)), "multiples of 4 from 32 on"),
            (vit, "multiples of 14"),
        ];
        for (architecture, text) in cases {
            let sides = architecture.sides();
            assert_eq!(sides.to_string(), text);
            for side in 0..120 {
                let fits = side >= sides.least && side.is_multiple_of(sides.step);
                assert_eq!(architecture.grid(side, 56).is_ok(), fits, "{text}: {side}");
            }
        }
    }

    #[test]
    fn the_patches_of_the_last_layer_are_those_of_a_forward_on_the_grid_that_is_asked_for() {
        let mut cases = 0;
        for (patch_size, count) in [(None, 2), (Some(16), 8), (Some(32), 2)] {
            let config = ConvNextConfig { patch_size, ..config() };
            let backbone = crate::Backbone::new(&Architecture::ConvNext(config), &Device::flex(), &mut stream(2));
            let x = images([3, 3, 72, 36]);
            let found = backbone.last_layer_patches(&backbone.forward(x.clone(), None), (72, 36));
            let expected = backbone.forward_layers(x, &[3], true).remove(0).patches;
            assert_eq!(found.dims(), [3, count, 10]);
            assert_eq!(values(found), values(expected), "{patch_size:?}");
            cases += 1;
        }
        assert_eq!(cases, 3);
    }

    #[test]
    fn tokens_of_uneven_images_have_the_grid_and_are_on_it() {
        let backbone = ConvNext::new(&config(), &Device::flex(), &mut stream(2));
        let features = backbone.forward(images([2, 3, 76, 44]));
        assert_eq!(features.patches.dims(), [2, 2, 10]);
        // Rows of the images are rows of the tokens: a change at the bottom moves the lower token more than the upper one.
        let changed = images([2, 3, 76, 44]).slice_assign(s![.., .., 60..64, ..], images([2, 3, 4, 44]) * 5.0);
        let moved = values((backbone.forward(changed).prenorm - features.prenorm).abs().sum_dim(2));
        assert!(moved[1] > moved[0] && moved[3] > moved[2], "{moved:?}");
    }

    #[test]
    fn a_branch_that_is_dropped_for_a_sample_is_as_if_it_had_no_scale_for_it() {
        let device = Device::flex();
        let backbone = ConvNext::new(&config(), &device, &mut stream(3));
        let x = images([2, 3, 32, 36]);
        let names =
            ["stages.0.0.gamma", "stages.1.0.gamma", "stages.2.0.gamma", "stages.2.1.gamma", "stages.3.0.gamma"];
        let plain = values(backbone.forward(x.clone()).cls);
        for (block, name) in names.into_iter().enumerate() {
            let mut branches = vec![BranchDraw::Keep; 5];
            branches[block] = BranchDraw::Scale(vec![1.0, 0.0]);
            let draws = StochasticDraws { branches, rope: Vec::new() };
            let found = values(backbone.forward_train(x.clone(), &draws).cls);
            let without = parameters::replace(backbone.clone(), |n, v| if n == name { v * 0.0 } else { v });
            let without = values(without.forward(x.clone()).cls);
            let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(close(&found[..10], &plain[..10]) && close(&found[10..], &without[10..]), "{name}");
            assert!(!close(&found[10..], &plain[10..]), "{name} changes nothing");
        }
    }

    #[test]
    fn drop_rates_rise_over_all_blocks_or_are_one_for_all() {
        let draw = |kind| {
            let config = ConvNextConfig { drop_path_rate: 0.8, drop_path: kind, ..config() };
            StochasticDraws::draw_convnext(&config, 2000, &mut stream(4)).branches
        };
        let rates: Vec<f64> = draw(DropPathKind::PerSample)
            .iter()
            .map(|draw| match draw {
                BranchDraw::Keep => 0.0,
                BranchDraw::Scale(factors) => factors.iter().filter(|f| **f == 0.0).count() as f64 / 2000.0,
                BranchDraw::Subset(_) => panic!("a scale per sample"),
            })
            .collect();
        assert_eq!(rates.len(), 5);
        for (rate, expected) in rates.iter().zip([0.0, 0.2, 0.4, 0.6, 0.8]) {
            assert!((rate - expected).abs() < 0.05, "{rates:?}");
        }
        let kept = draw(DropPathKind::Subset);
        assert!(kept.iter().all(|draw| matches!(draw, BranchDraw::Subset(kept) if kept.len() == 400)));
    }

    #[test]
    fn named_sizes_have_the_published_numbers_of_parameters() {
        for (arch, count) in [(Arch::ConvNextTiny, 27_820_128), (Arch::ConvNextSmall, 49_454_688)] {
            let architecture = ModelConfig { arch, ..ModelConfig::default() }.resolve(224).expect("a configuration");
            let backbone = Backbone::new(&architecture, &Device::flex(), &mut stream(5));
            let shapes = parameters::shapes(&backbone);
            assert_eq!(shapes.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>(), count);
        }
    }

    #[test]
    fn a_description_names_its_family_and_survives_being_written() {
        let convnext = Architecture::ConvNext(config());
        let vit = ModelConfig::default().resolve(32).expect("a configuration");
        for (architecture, family) in [(convnext, "convnext"), (vit, "vit")] {
            let json = serde_json::to_string(&architecture).expect("plain data");
            assert!(json.contains(&format!("\"family\":\"{family}\"")), "{json}");
            assert_eq!(serde_json::from_str::<Architecture>(&json).expect("an architecture"), architecture);
            let other = json.replacen('{', "{\"colour\":1,", 1);
            let error = serde_json::from_str::<Architecture>(&other).expect_err("an unknown key").to_string();
            assert!(error.contains("colour"), "{error}");
        }
    }
}
