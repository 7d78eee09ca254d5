//! The deterministic crop of evaluations: resize the shorter side, cut out the centre.

use image::RgbImage;

use crate::config::AugmentationError;
use crate::resized_crop::{Resizer, Window};

/// Bicubic resize of the shorter side to `resize` pixels, then the central square of `crop` pixels.
///
/// The longer side becomes `trunc(resize·long/short)`, and the square starts at half the excess, rounded to even.
/// [`Resizer::resize`] is the other usual evaluation transform: all of the image, squeezed into a square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalTransform {
    resize: usize,
    crop: usize,
}

impl EvalTransform {
    /// A transform with both lengths in pixels.
    ///
    /// # Errors
    /// If a length is zero or above 65535, or the crop does not fit into the resized image.
    pub fn new(resize: usize, crop: usize) -> Result<Self, AugmentationError> {
        if crop == 0 || crop > resize || resize > usize::from(u16::MAX) {
            return Err(AugmentationError::EvalSize { resize, crop });
        }
        Ok(Self { resize, crop })
    }

    /// Side of the result, in pixels.
    pub fn crop_size(&self) -> usize {
        self.crop
    }

    /// The `crop × crop` square of the image. Only the pixels that the square needs are computed, so that an extremely
    /// long image costs no more than another.
    ///
    /// # Panics
    /// If the image has no pixels.
    pub fn apply(&self, image: &RgbImage, resizer: &mut Resizer) -> RgbImage {
        let (width, height) = image.dimensions();
        assert!(width > 0 && height > 0, "cannot crop an image of {width}x{height} pixels");
        let short = width.min(height);
        let (left, width) = self.window(width, short);
        let (top, height) = self.window(height, short);
        let crop = self.crop as u32;
        resizer.resized_window(image, Window { left, top, width, height }, (crop, crop))
    }

    /// Where the square begins and how far it reaches along an axis, in pixels of the image.
    fn window(&self, length: u32, short: u32) -> (f64, f64) {
        let (resize, crop) = (self.resize as u64, self.crop as f64);
        let resized = (resize * u64::from(length) / u64::from(short)) as f64;
        let start = ((resized - crop) / 2.0).round_ties_even();
        let length = f64::from(length);
        let left = start * length / resized;
        (left, (crop * length / resized).min(length - left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 9) as u8, (y * 7) as u8, (x * y) as u8]))
    }

    #[test]
    fn equals_resizing_everything_and_cutting_out_the_centre() {
        let mut resizer = Resizer::default();
        let mut cases = 0;
        for (width, height) in [(50, 39), (39, 50), (20, 61), (33, 33), (7, 5), (1, 9)] {
            for (resize, crop) in [(32, 28), (16, 16), (25, 10), (9, 8)] {
                let image = pattern(width, height);
                let short = width.min(height);
                let resized = resizer.resize(&image, (resize * width / short, resize * height / short));
                let start = |length: u32| (f64::from(length - crop) / 2.0).round_ties_even() as u32;
                let (left, top) = (start(resized.width()), start(resized.height()));
                let expected = image::imageops::crop_imm(&resized, left, top, crop, crop).to_image();
                let found = EvalTransform::new(resize as usize, crop as usize).unwrap().apply(&image, &mut resizer);
                let error = found.iter().zip(expected.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
                assert!(error <= 1, "{width}x{height}, {resize} → {crop}: {error} levels");
                cases += 1;
            }
        }
        assert_eq!(cases, 24);
    }

    #[test]
    fn an_image_of_the_resized_size_is_cut_without_resampling() {
        let image = pattern(40, 32);
        let crop = EvalTransform::new(32, 28).unwrap().apply(&image, &mut Resizer::default());
        assert!(crop.enumerate_pixels().all(|(x, y, pixel)| pixel == image.get_pixel(x + 6, y + 2)));
    }

    #[test]
    fn a_very_long_image_is_no_burden() {
        let image = pattern(1, 20_000);
        let crop = EvalTransform::new(256, 224).unwrap().apply(&image, &mut Resizer::default());
        assert_eq!(crop.dimensions(), (224, 224));
    }

    #[test]
    fn a_crop_that_does_not_fit_is_refused() {
        let message = EvalTransform::new(224, 256).unwrap_err().to_string();
        assert!(message.starts_with("evaluation transform: "), "{message}");
        assert!(message.contains("256") && message.contains("224"), "{message}");
        assert!(EvalTransform::new(224, 0).is_err());
        assert!(EvalTransform::new(usize::MAX, 1).is_err());
    }
}
