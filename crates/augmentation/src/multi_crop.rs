//! Multi-crop (DINO, arXiv:2104.14294, §3; DINOv2, arXiv:2304.07193): two global crops and several local ones.
//!
//! For each view: box → resize → flip → colour jitter → grayscale → blur → solarize. What is drawn ([`ViewDraws`]) and
//! what is done to pixels are apart, so that a view can be rendered again, or otherwise, from the same draws.

use image::RgbImage;
use rand::Rng;
use rand::seq::SliceRandom;

use crate::blur::Blur;
use crate::color::{ColorOp, grayscale};
use crate::config::{AugmentationConfig, AugmentationError};
use crate::pixel::{horizontal_flip, solarize};
use crate::resized_crop::{CropBox, Resizer};
use crate::{happens, uniform};

/// The crops of one image.
#[derive(Clone, Debug, PartialEq)]
pub struct Crops {
    /// The two global crops, square.
    pub global: [RgbImage; 2],
    /// The local crops, square.
    pub local: Vec<RgbImage>,
    /// The global crops as the Gram teacher sees them, where that is otherwise.
    pub gram: Option<[RgbImage; 2]>,
}

/// Everything that is random about one view.
#[derive(Clone, Debug, PartialEq)]
pub struct ViewDraws {
    /// The part of the image taken.
    pub crop: CropBox,
    /// Whether it is mirrored left to right.
    pub flip: bool,
    /// Colour jitter, in order of application; empty when the view is not jittered.
    pub jitter: Vec<ColorOp>,
    /// Whether it is turned to grayscale.
    pub grayscale: bool,
    /// Standard deviation of the blur in pixels of the crop, if it is blurred.
    pub blur_sigma: Option<f64>,
    /// Whether it is solarized.
    pub solarize: bool,
}

/// Cuts and distorts the crops of an image by a checked [`AugmentationConfig`].
#[derive(Clone, Debug)]
pub struct MultiCrop {
    config: AugmentationConfig,
}

/// Views 0 and 1 are global.
const GLOBAL_VIEWS: usize = 2;

impl MultiCrop {
    /// A recipe with the given config.
    ///
    /// # Errors
    /// If a value of the config is out of range.
    pub fn new(config: &AugmentationConfig) -> Result<Self, AugmentationError> {
        config.validate()?;
        Ok(Self { config: config.clone() })
    }

    /// Views per image: two global ones, then the local ones.
    pub fn views(&self) -> usize {
        GLOBAL_VIEWS + self.config.local_crops
    }

    /// All crops of an image. `stream(view)` gives each view its own random numbers, so that a view's crop does not
    /// depend on the others.
    ///
    /// # Panics
    /// If the image has no pixels.
    pub fn crops<R: Rng>(&self, image: &RgbImage, stream: impl Fn(usize) -> R) -> Crops {
        let mut scratch = Scratch::default();
        let mut crop = |view| {
            let draws = self.draw(view, image.dimensions(), &mut stream(view));
            self.render_with(&mut scratch, view, image, &draws)
        };
        let [(first, first_gram), (second, second_gram)] = [0, 1].map(&mut crop);
        Crops {
            global: [first, second],
            local: (GLOBAL_VIEWS..self.views()).map(|view| crop(view).0).collect(),
            gram: first_gram.zip(second_gram).map(|(first, second)| [first, second]),
        }
    }

    /// Draws what happens to a view of an image of `(width, height)` pixels. Views 0 and 1 are global, others local.
    ///
    /// # Panics
    /// If the image has no pixels.
    pub fn draw(&self, view: usize, size: (u32, u32), rng: &mut impl Rng) -> ViewDraws {
        let config = &self.config;
        let scale = if view < GLOBAL_VIEWS { config.global_crop_scale } else { config.local_crop_scale };
        // Every draw is made whether or not it is used, so that changing one probability leaves other stages as they
        // were. The box, which needs a varying number of draws, comes last.
        let flip = happens(config.horizontal_flip, rng);
        let jitter = self.draw_jitter(rng);
        let grayscale = happens(config.grayscale, rng);
        let blurred = happens(config.blur[view.min(GLOBAL_VIEWS)], rng);
        let sigma = uniform(config.blur_sigma, rng);
        let solarize = happens(config.solarize, rng) && view == 1;
        let crop = CropBox::draw(size, scale, config.crop_ratio, rng);
        ViewDraws { crop, flip, jitter, grayscale, blur_sigma: blurred.then_some(sigma), solarize }
    }

    /// The crop that the draws for a view describe.
    ///
    /// # Panics
    /// If the box reaches outside the image.
    pub fn render(&self, view: usize, image: &RgbImage, draws: &ViewDraws) -> RgbImage {
        self.render_with(&mut Scratch::default(), view, image, draws).0
    }

    fn draw_jitter(&self, rng: &mut impl Rng) -> Vec<ColorOp> {
        let config = &self.config;
        let apply = happens(config.color_jitter, rng);
        let mut factor = |strength: f64| uniform([(1.0 - strength).max(0.0), 1.0 + strength], rng) as f32;
        let mut steps = [
            (config.brightness, ColorOp::Brightness(factor(config.brightness))),
            (config.contrast, ColorOp::Contrast(factor(config.contrast))),
            (config.saturation, ColorOp::Saturation(factor(config.saturation))),
            (config.hue, ColorOp::Hue(uniform([-config.hue, config.hue], rng))),
        ];
        steps.shuffle(rng);
        steps.into_iter().filter(|&(strength, _)| apply && strength > 0.0).map(|(_, op)| op).collect()
    }

    /// The crop and, of a global view, what the Gram teacher sees of it.
    ///
    /// With a Gram crop, both come from one crop of the larger size, as in DINOv3.
    fn render_with(
        &self,
        scratch: &mut Scratch,
        view: usize,
        image: &RgbImage,
        draws: &ViewDraws,
    ) -> (RgbImage, Option<RgbImage>) {
        let config = &self.config;
        let is_global = view < GLOBAL_VIEWS;
        let side = if is_global { config.global_crop_size } else { config.local_crop_size } as u32;
        let gram_side = if is_global { config.gram_crop_size } else { 0 } as u32;
        let base_side = side.max(gram_side);
        let mut crop = scratch.resizer.resized_crop(image, draws.crop, (base_side, base_side));
        if draws.flip {
            horizontal_flip(&mut crop);
        }
        let mut gram = None;
        if gram_side > 0 && !config.gram_crop_distorted {
            gram = Some(scratch.resizer.resize(&crop, (gram_side, gram_side)));
            crop = scratch.resizer.resize(&crop, (side, side));
        }
        self.distort(scratch, &mut crop, draws);
        if gram_side > 0 && config.gram_crop_distorted {
            gram = Some(scratch.resizer.resize(&crop, (gram_side, gram_side)));
            crop = scratch.resizer.resize(&crop, (side, side));
        }
        (crop, gram)
    }

    fn distort(&self, scratch: &mut Scratch, crop: &mut RgbImage, draws: &ViewDraws) {
        for op in &draws.jitter {
            op.apply(crop);
        }
        if draws.grayscale {
            grayscale(crop);
        }
        if let Some(sigma) = draws.blur_sigma {
            scratch.blur.apply(crop, self.config.blur_kind, sigma);
        }
        if draws.solarize {
            solarize(crop, self.config.solarize_threshold);
        }
    }
}

/// Buffers shared by the views of an image.
#[derive(Default)]
struct Scratch {
    resizer: Resizer,
    blur: Blur,
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::ChaCha8Rng;

    fn photo(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 5) as u8, (y * 3) as u8, (x * y / 7) as u8]))
    }

    fn small() -> AugmentationConfig {
        AugmentationConfig { global_crop_size: 28, local_crop_size: 12, local_crops: 3, ..Default::default() }
    }

    fn stream(seed: u64) -> impl Fn(usize) -> ChaCha8Rng {
        move |view| ChaCha8Rng::seed_from_u64(seed * 1000 + view as u64)
    }

    /// A recipe that takes boxes of the image and does nothing else to them.
    fn plain() -> AugmentationConfig {
        AugmentationConfig {
            horizontal_flip: 0.0,
            color_jitter: 0.0,
            grayscale: 0.0,
            blur: [0.0; 3],
            solarize: 0.0,
            ..small()
        }
    }

    #[test]
    fn crops_have_their_sizes_for_images_of_any_shape() {
        let config = AugmentationConfig { blur: [1.0; 3], ..small() };
        for blur_kind in [crate::BlurKind::Gaussian9, crate::BlurKind::Pil] {
            let recipe = MultiCrop::new(&AugmentationConfig { blur_kind, ..config.clone() }).unwrap();
            for (width, height) in [(61, 47), (1, 1), (1, 90), (90, 1), (2, 3), (13, 300)] {
                for seed in 0..4 {
                    let crops = recipe.crops(&photo(width, height), stream(seed));
                    assert!(crops.global.iter().all(|crop| crop.dimensions() == (28, 28)));
                    assert_eq!(crops.local.len(), 3);
                    assert!(crops.local.iter().all(|crop| crop.dimensions() == (12, 12)));
                }
            }
        }
    }

    #[test]
    fn no_local_crops_is_a_valid_recipe() {
        let recipe = MultiCrop::new(&AugmentationConfig { local_crops: 0, ..small() }).unwrap();
        assert_eq!(recipe.views(), 2);
        assert!(recipe.crops(&photo(40, 30), stream(0)).local.is_empty());
    }

    #[test]
    fn the_gram_teacher_sees_the_same_part_of_the_image_at_its_own_size() {
        // Smooth: clipped colours are not the same before and after a resize.
        let image =
            RgbImage::from_fn(120, 90, |x, y| image::Rgb([60 + x as u8, 180 - y as u8, 90 + (x / 4 + y / 2) as u8]));
        let mut cases = 0;
        for size in [16, 28, 42] {
            for distorted in [false, true] {
                let config = AugmentationConfig {
                    gram_crop_size: size,
                    gram_crop_distorted: distorted,
                    color_jitter: 1.0,
                    horizontal_flip: 1.0,
                    ..plain()
                };
                let crops = MultiCrop::new(&config).unwrap().crops(&image, stream(5));
                // The same box without distortion, at the Gram teacher's size.
                let undistorted = AugmentationConfig {
                    global_crop_size: size,
                    gram_crop_size: 0,
                    color_jitter: if distorted { 1.0 } else { 0.0 },
                    ..config
                };
                let expected = MultiCrop::new(&undistorted).unwrap().crops(&image, stream(5));
                for (found, expected) in crops.gram.unwrap().iter().zip(&expected.global) {
                    assert_eq!(found.dimensions(), (size as u32, size as u32));
                    let off = found.as_raw().iter().zip(expected.as_raw()).map(|(a, b)| a.abs_diff(*b));
                    let mean = off.map(f64::from).sum::<f64>() / found.as_raw().len() as f64;
                    assert!(mean < 4.0, "{size} px, distorted {distorted}: off by {mean} levels in the mean");
                }
                assert!(crops.global.iter().all(|crop| crop.dimensions() == (28, 28)));
                cases += 1;
            }
        }
        assert_eq!(cases, 6);
    }

    #[test]
    fn crops_of_one_pixel_are_possible() {
        let config = AugmentationConfig { global_crop_size: 1, local_crop_size: 1, blur: [1.0; 3], ..small() };
        let crops = MultiCrop::new(&config).unwrap().crops(&photo(17, 23), stream(3));
        assert_eq!((crops.global[0].dimensions(), crops.local[2].dimensions()), ((1, 1), (1, 1)));
    }

    #[test]
    fn the_same_streams_give_the_same_crops_and_others_give_others() {
        let recipe = MultiCrop::new(&small()).unwrap();
        let image = photo(61, 47);
        let crops = recipe.crops(&image, stream(1));
        assert_eq!(crops, recipe.crops(&image, stream(1)));
        assert_ne!(crops, recipe.crops(&image, stream(2)));
        assert_ne!(crops.global[0], crops.global[1]);
        assert_ne!(crops.local[0], crops.local[1]);
    }

    #[test]
    fn a_view_depends_on_its_own_stream_alone() {
        let image = photo(61, 47);
        let all = MultiCrop::new(&small()).unwrap().crops(&image, stream(1));
        let recipe = MultiCrop::new(&AugmentationConfig { local_crops: 1, ..small() }).unwrap();
        let changed =
            recipe.crops(&image, |view| ChaCha8Rng::seed_from_u64(if view == 0 { 9 } else { 1000 + view as u64 }));
        assert_ne!(changed.global[0], all.global[0]);
        assert_eq!((&changed.global[1], &changed.local[0]), (&all.global[1], &all.local[0]));
    }

    #[test]
    fn draws_rendered_again_give_the_same_crop() {
        let recipe = MultiCrop::new(&small()).unwrap();
        let image = photo(61, 47);
        let crops = recipe.crops(&image, stream(5));
        for (view, crop) in crops.global.iter().chain(&crops.local).enumerate() {
            let draws = recipe.draw(view, image.dimensions(), &mut stream(5)(view));
            assert_eq!(&recipe.render(view, &image, &draws), crop, "view {view}");
        }
    }

    #[test]
    fn without_distortions_a_full_crop_is_the_image() {
        let full = [1.0, 1.0];
        let config =
            AugmentationConfig { global_crop_scale: full, local_crop_scale: full, crop_ratio: full, ..plain() };
        let image = photo(28, 28);
        assert_eq!(MultiCrop::new(&config).unwrap().crops(&image, stream(0)).global, [image.clone(), image]);
    }

    #[test]
    fn an_operation_of_strength_zero_is_left_out() {
        let config = AugmentationConfig { color_jitter: 1.0, brightness: 0.0, saturation: 0.0, hue: 0.0, ..small() };
        let recipe = MultiCrop::new(&config).unwrap();
        for seed in 0..20 {
            let draws = recipe.draw(0, (40, 30), &mut ChaCha8Rng::seed_from_u64(seed));
            assert!(matches!(draws.jitter[..], [ColorOp::Contrast(_)]), "{:?}", draws.jitter);
        }
    }

    #[test]
    fn switching_a_stage_off_leaves_the_others_as_they_were() {
        let size = (61, 47);
        for seed in 0..50 {
            let draw = |config: &AugmentationConfig| {
                MultiCrop::new(config).unwrap().draw(1, size, &mut ChaCha8Rng::seed_from_u64(seed))
            };
            let all = draw(&small());
            let without =
                draw(&AugmentationConfig { horizontal_flip: 0.0, color_jitter: 0.0, blur: [0.0; 3], ..small() });
            assert_eq!((without.crop, without.grayscale, without.solarize), (all.crop, all.grayscale, all.solarize));
        }
    }

    #[test]
    fn stages_occur_with_their_probabilities_in_every_order() {
        const DRAWS: usize = 4000;
        let config = small();
        let recipe = MultiCrop::new(&config).unwrap();
        // Five standard deviations of a frequency over that many draws.
        let near = |count: usize, p: f64| {
            (count as f64 / DRAWS as f64 - p).abs() <= 5.0 * (p * (1.0 - p) / DRAWS as f64).sqrt()
        };
        for (view, blur, solarize) in [(0, 0.0, 0.0), (1, 0.9, 0.2), (2, 0.5, 0.0), (4, 0.5, 0.0)] {
            let rng = &mut ChaCha8Rng::seed_from_u64(view as u64);
            let draws: Vec<ViewDraws> = (0..DRAWS).map(|_| recipe.draw(view, (80, 60), rng)).collect();
            let count = |holds: fn(&ViewDraws) -> bool| draws.iter().filter(|d| holds(d)).count();
            assert!(near(count(|d| d.flip), 0.5));
            assert!(near(count(|d| d.grayscale), 0.2));
            assert!(near(count(|d| !d.jitter.is_empty()), 0.8));
            assert!(near(count(|d| d.blur_sigma.is_some()), blur), "view {view}");
            assert!(near(count(|d| d.solarize), solarize), "view {view}");
            assert!(near(count(|d| matches!(d.jitter[..], [ColorOp::Hue(_), _, ColorOp::Contrast(_), _])), 0.8 / 12.0));
            for draws in &draws {
                assert!(draws.jitter.iter().all(|op| match *op {
                    ColorOp::Brightness(f) | ColorOp::Contrast(f) => (0.6..=1.4).contains(&f),
                    ColorOp::Saturation(f) => (0.8..=1.2).contains(&f),
                    ColorOp::Hue(shift) => (-0.1..=0.1).contains(&shift),
                }));
                assert!(draws.blur_sigma.is_none_or(|sigma| (0.1..2.0).contains(&sigma)));
            }
        }
    }

    #[test]
    fn an_invalid_config_is_refused() {
        assert!(MultiCrop::new(&AugmentationConfig { hue: 0.7, ..small() }).is_err());
    }
}
