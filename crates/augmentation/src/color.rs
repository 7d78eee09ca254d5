//! Brightness, contrast, saturation and grayscale on 8-bit RGB, and the list of operations that colour jitter draws.
//!
//! The first three blend the image with a degenerate image `d`: `v → trunc(d + factor·(v − d))` limited to 0…255, in
//! single precision. `d` is black for brightness, the mean grey for contrast, the pixel's own grey for saturation.
//! Factor 1 is the identity, 0 gives `d`, and above 1 the difference is exaggerated. Truncating instead of rounding is
//! Pillow's arithmetic, kept so that results agree with it byte for byte.

use image::RgbImage;

use crate::hue::hue;
use crate::pixel::{map_bytes, pixels_mut};

/// One step of colour jitter with its drawn strength.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ColorOp {
    /// [`brightness`] by a factor.
    Brightness(f32),
    /// [`contrast`] by a factor.
    Contrast(f32),
    /// [`saturation`] by a factor.
    Saturation(f32),
    /// [`hue`] by a fraction of the colour circle.
    Hue(f64),
}

impl ColorOp {
    /// Applies the step to the image.
    pub fn apply(self, image: &mut RgbImage) {
        match self {
            Self::Brightness(factor) => brightness(image, factor),
            Self::Contrast(factor) => contrast(image, factor),
            Self::Saturation(factor) => saturation(image, factor),
            Self::Hue(shift) => hue(image, shift),
        }
    }
}

/// Blends with black: `v → trunc(factor·v)`.
pub fn brightness(image: &mut RgbImage, factor: f32) {
    blend_with_level(image, 0, factor);
}

/// Blends with the image's mean grey, itself rounded to an integer.
pub fn contrast(image: &mut RgbImage, factor: f32) {
    let pixels = pixels_mut(image);
    if pixels.is_empty() {
        return;
    }
    let sum: u64 = pixels.iter().map(|&pixel| u64::from(luma(pixel))).sum();
    let mean = sum as f64 / pixels.len() as f64;
    blend_with_level(image, (mean + 0.5) as u8, factor);
}

/// Blends each pixel with its own grey.
pub fn saturation(image: &mut RgbImage, factor: f32) {
    for pixel in pixels_mut(image) {
        let grey = f32::from(luma(*pixel));
        *pixel = pixel.map(|v| blend(grey, f32::from(v), factor));
    }
}

/// Replaces the three channels by the pixel's grey, `(0.299 r + 0.587 g + 0.114 b)` rounded.
pub fn grayscale(image: &mut RgbImage) {
    for pixel in pixels_mut(image) {
        *pixel = [luma(*pixel); 3];
    }
}

/// The ITU-R 601 grey of a pixel, in 16-bit fixed point.
fn luma([r, g, b]: [u8; 3]) -> u8 {
    ((19595 * u32::from(r) + 38470 * u32::from(g) + 7471 * u32::from(b) + (1 << 15)) >> 16) as u8
}

/// `trunc(degenerate + factor·(v − degenerate))`, limited to 0…255 by the saturating cast.
fn blend(degenerate: f32, v: f32, factor: f32) -> u8 {
    (degenerate + factor * (v - degenerate)) as u8
}

fn blend_with_level(image: &mut RgbImage, level: u8, factor: f32) {
    let table = std::array::from_fn(|v| blend(f32::from(level), v as f32, factor));
    map_bytes(image, &table);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp() -> RgbImage {
        RgbImage::from_fn(7, 5, |x, y| image::Rgb([(x * 40) as u8, (y * 60) as u8, (255 - x * y * 9) as u8]))
    }

    #[test]
    fn factor_one_is_the_identity() {
        for op in [ColorOp::Brightness(1.0), ColorOp::Contrast(1.0), ColorOp::Saturation(1.0)] {
            let mut image = ramp();
            op.apply(&mut image);
            assert_eq!(image, ramp(), "{op:?}");
        }
    }

    #[test]
    fn factor_zero_gives_the_degenerate_image() {
        let mut black = ramp();
        brightness(&mut black, 0.0);
        assert!(black.iter().all(|&v| v == 0));

        let mut flat = ramp();
        contrast(&mut flat, 0.0);
        let mean = ramp().pixels().map(|p| f64::from(luma(p.0))).sum::<f64>() / 35.0;
        assert!(flat.iter().all(|&v| f64::from(v) == mean.round()), "{} for a mean of {mean}", flat[(0, 0)][0]);

        let (mut unsaturated, mut grey) = (ramp(), ramp());
        saturation(&mut unsaturated, 0.0);
        grayscale(&mut grey);
        assert_eq!(unsaturated, grey);
        assert!(grey.pixels().all(|p| p[0] == p[1] && p[1] == p[2]));
    }

    #[test]
    fn results_saturate_instead_of_wrapping() {
        let mut image = RgbImage::from_raw(2, 1, vec![250, 10, 10, 0, 0, 0]).unwrap();
        brightness(&mut image, 3.0);
        assert_eq!(image.as_raw(), &[255, 30, 30, 0, 0, 0]);
        let mut image = RgbImage::from_raw(1, 1, vec![250, 10, 10]).unwrap();
        saturation(&mut image, 2.0);
        assert_eq!(image.as_raw(), &[255, 0, 0]);
    }

    #[test]
    fn luma_of_white_is_white_and_the_weights_are_those_of_itu_601() {
        assert_eq!([[255; 3], [255, 0, 0], [0, 255, 0], [0, 0, 255]].map(luma), [255, 76, 150, 29]);
    }

    #[test]
    fn an_image_without_pixels_is_left_alone() {
        let mut image = RgbImage::new(3, 0);
        for op in [ColorOp::Contrast(0.5), ColorOp::Saturation(0.5), ColorOp::Hue(0.1)] {
            op.apply(&mut image);
        }
        assert_eq!(image.dimensions(), (3, 0));
    }
}
