//! Multi-crop augmentation and block masks, as pure functions.
//!
//! An image, a random stream per view and a config give the crops of one sample ([`MultiCrop`]); a stream and a config
//! give the block masks of a batch ([`batch_masks`]). Nothing here reads files, keeps state between calls, or draws
//! from a generator that was not passed in. Pixel operations work on 8-bit RGB with the arithmetic of the Pillow
//! library, which the published recipes were trained with; [`normalize`] turns them into what a backbone sees.

mod blur;
mod color;
mod config;
mod evaluation_crop;
mod hue;
mod masks;
mod multi_crop;
mod normalize;
mod pixel;
mod resized_crop;
mod train_crop;

pub use blur::{Blur, BlurKind};
pub use color::{ColorOp, brightness, contrast, grayscale, saturation};
pub use config::{AugmentationConfig, AugmentationError, CropSizes};
pub use evaluation_crop::EvalTransform;
pub use hue::hue;
pub use image::RgbImage;
pub use masks::{BlockMask, BlockMasks, MaskConfig, MaskStyle, Masks, batch_masks};
pub use multi_crop::{Crops, MultiCrop, ViewDraws};
pub use normalize::normalize;
pub use pixel::{horizontal_flip, solarize};
pub use resized_crop::{CropBox, Resizer};
pub use train_crop::TrainTransform;

use rand::{Rng, RngExt};

/// A draw from the uniform distribution over `[low, high)`; `low` itself when the bounds coincide.
fn uniform([low, high]: [f64; 2], rng: &mut impl Rng) -> f64 {
    low + (high - low) * rng.random::<f64>()
}

/// True with the given probability: never at 0, always at 1.
fn happens(probability: f64, rng: &mut impl Rng) -> bool {
    rng.random::<f64>() < probability
}
