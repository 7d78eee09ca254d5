//! The random crop of images that a classifier is trained on: a random resized crop and a flip, nothing else.

use image::RgbImage;
use rand::Rng;

use crate::happens;
use crate::pixel::horizontal_flip;
use crate::resized_crop::{CropBox, Resizer};

/// Share of the image's area that a crop has.
const SCALE: [f64; 2] = [0.08, 1.0];
/// Its aspect ratio, width over height.
const RATIO: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
/// Probability of a flip.
const FLIP: f64 = 0.5;

/// A box of 8 to 100 % of the image's area with an aspect ratio from 3/4 to 4/3, resized (bicubic, antialiased) to a square,
/// and mirrored left to right half of the time: what DINOv2 and DINOv3 train linear classifiers on
/// (DINO: the same with bilinear resizing).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainTransform {
    crop: usize,
}

impl TrainTransform {
    /// What it does, for a protocol.
    pub const DESCRIPTION: &str =
        "random resized crop, area 0.08 to 1, aspect 3/4 to 4/3, bicubic; horizontal flip, probability 0.5";

    /// Crops of `crop × crop` pixels.
    ///
    /// # Panics
    /// If `crop` is 0 or above 65535.
    pub fn new(crop: usize) -> Self {
        assert!((1..=usize::from(u16::MAX)).contains(&crop), "a crop of {crop} pixels");
        Self { crop }
    }

    /// A crop of the image. The draws are those of `rng` alone: whether to flip, then the box.
    ///
    /// # Panics
    /// If the image has no pixels.
    pub fn apply(&self, image: &RgbImage, rng: &mut impl Rng, resizer: &mut Resizer) -> RgbImage {
        let flip = happens(FLIP, rng);
        let area = CropBox::draw(image.dimensions(), SCALE, RATIO, rng);
        let side = self.crop as u32;
        let mut crop = resizer.resized_crop(image, area, (side, side));
        if flip {
            horizontal_flip(&mut crop);
        }
        crop
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::ChaCha8Rng;

    /// Red is the column, green the row.
    fn coordinates(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, 7]))
    }

    #[test]
    fn crops_are_boxes_of_the_image_of_all_areas_and_half_of_them_are_mirrored() {
        let image = coordinates(120, 90);
        let transform = TrainTransform::new(24);
        let (mut mirrored, mut shares) = (0, Vec::new());
        for seed in 0..400 {
            let crop = transform.apply(&image, &mut ChaCha8Rng::seed_from_u64(seed), &mut Resizer::default());
            assert_eq!(crop.dimensions(), (24, 24));
            // The middle of the first and last pixel, half a pixel's width from the ends of the box.
            let (first, last) = (crop.get_pixel(0, 0), crop.get_pixel(23, 23));
            let span = |a: u8, b: u8| (f64::from(b) - f64::from(a)) * 24.0 / 23.0;
            let (width, height) = (span(first[0], last[0]), span(first[1], last[1]));
            assert!(height > 0.0, "rows are never mirrored");
            mirrored += usize::from(width < 0.0);
            shares.push(width.abs() * height / (120.0 * 90.0));
            let aspect = width.abs() / height;
            assert!((0.65..1.5).contains(&aspect), "aspect {aspect}");
        }
        assert!((160..=240).contains(&mirrored), "{mirrored} of 400");
        let (low, high) = shares.iter().fold((1.0f64, 0.0f64), |(low, high), &s| (low.min(s), high.max(s)));
        assert!((0.05..0.12).contains(&low) && (0.85..1.05).contains(&high), "areas from {low} to {high}");
        // Uniform over what fits; draws that do not fit, which are the large ones, are drawn again.
        let mean = shares.iter().sum::<f64>() / 400.0;
        assert!((0.38..0.58).contains(&mean), "mean area {mean}");
    }

    #[test]
    fn a_crop_depends_on_its_stream_alone() {
        let image = coordinates(33, 40);
        let mut resizer = Resizer::default();
        let mut crop = |seed| TrainTransform::new(9).apply(&image, &mut ChaCha8Rng::seed_from_u64(seed), &mut resizer);
        let first = crop(1);
        assert_ne!(first, crop(2));
        assert_eq!(first, crop(1));
    }
}
