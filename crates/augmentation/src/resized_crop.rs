//! Random resized crops: which box of the image to take, and its resampling to a fixed size.
//!
//! Resampling is bicubic (Keys, a = −0.5), antialiased: when shrinking, the kernel is stretched by the shrink factor. It
//! runs along the rows first and then along the columns, rounding to 8 bits in between, and never reads a pixel outside
//! the box. All of this is how Pillow resizes a cropped image; the order of the axes and the rounding matter by up to
//! fourteen levels at sharp edges.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ImageView, ResizeAlg, ResizeOptions};
use image::RgbImage;
use rand::{Rng, RngExt};

use crate::uniform;

/// A rectangle of whole pixels inside an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CropBox {
    /// First column.
    pub left: u32,
    /// First row.
    pub top: u32,
    /// Columns, at least one.
    pub width: u32,
    /// Rows, at least one.
    pub height: u32,
}

impl CropBox {
    /// Draws the box of a random resized crop from an image of `(width, height)` pixels.
    ///
    /// Area `U(scale)` of the image's and log aspect ratio `U(ln ratio)` give a width and a height (rounded, halves to
    /// even); the first of ten such draws that fits is placed uniformly. Failing all ten, the box is the largest
    /// centred one whose aspect ratio lies within `ratio` (at least one pixel either way), whatever its area.
    ///
    /// # Panics
    /// If the image has no pixels.
    pub fn draw((width, height): (u32, u32), scale: [f64; 2], ratio: [f64; 2], rng: &mut impl Rng) -> Self {
        assert!(width > 0 && height > 0, "cannot crop an image of {width}x{height} pixels");
        let area = f64::from(width) * f64::from(height);
        let log_ratio = ratio.map(f64::ln);
        for _ in 0..10 {
            let target = area * uniform(scale, rng);
            let aspect = uniform(log_ratio, rng).exp();
            let w = (target * aspect).sqrt().round_ties_even();
            let h = (target / aspect).sqrt().round_ties_even();
            if (1.0..=f64::from(width)).contains(&w) && (1.0..=f64::from(height)).contains(&h) {
                let (w, h) = (w as u32, h as u32);
                let top = rng.random_range(0..=height - h);
                let left = rng.random_range(0..=width - w);
                return Self { left, top, width: w, height: h };
            }
        }
        let aspect = f64::from(width) / f64::from(height);
        let rounded = |length: f64, limit: u32| (length.round_ties_even() as u32).clamp(1, limit);
        let (w, h) = if aspect < ratio[0] {
            (width, rounded(f64::from(width) / ratio[0], height))
        } else if aspect > ratio[1] {
            (rounded(f64::from(height) * ratio[1], width), height)
        } else {
            (width, height)
        };
        Self { left: (width - w) / 2, top: (height - h) / 2, width: w, height: h }
    }

    /// The whole of an image.
    pub fn whole(image: &RgbImage) -> Self {
        Self { left: 0, top: 0, width: image.width(), height: image.height() }
    }
}

/// A rectangle in the coordinates of a view, possibly of fractional pixels: what the output's corners correspond to.
pub(crate) struct Window {
    pub(crate) left: f64,
    pub(crate) top: f64,
    pub(crate) width: f64,
    pub(crate) height: f64,
}

/// Resamples images, keeping its buffers between calls.
#[derive(Clone, Debug, Default)]
pub struct Resizer {
    resizer: fast_image_resize::Resizer,
    /// The result of the pass along the rows.
    rows: Vec<u8>,
}

impl Resizer {
    /// The box of the image, resampled to `(width, height)`.
    ///
    /// # Panics
    /// If the box is empty or reaches outside the image, or the output size is zero.
    pub fn resized_crop(&mut self, image: &RgbImage, area: CropBox, size: (u32, u32)) -> RgbImage {
        let view = typed(image);
        let cropped = TypedCroppedImage::from_ref(&view, area.left, area.top, area.width, area.height)
            .unwrap_or_else(|e| panic!("{area:?} in an image of {:?} pixels: {e}", image.dimensions()));
        let window = Window { left: 0.0, top: 0.0, width: f64::from(area.width), height: f64::from(area.height) };
        self.resample(&cropped, &window, size)
    }

    /// The whole image resampled to `(width, height)`, without regard to its aspect ratio.
    ///
    /// # Panics
    /// If the image has no pixels or the output size is zero.
    pub fn resize(&mut self, image: &RgbImage, size: (u32, u32)) -> RgbImage {
        self.resized_crop(image, CropBox::whole(image), size)
    }

    /// The window of the image resampled to `(width, height)`; pixels around the window contribute to its edges, and no
    /// rows but those are visited.
    pub(crate) fn resized_window(&mut self, image: &RgbImage, window: Window, size: (u32, u32)) -> RgbImage {
        const SUPPORT: f64 = 2.0;
        let view = typed(image);
        let reach = SUPPORT * (window.height / f64::from(size.1)).max(1.0) + 1.0;
        let first = (window.top - reach).max(0.0) as u32;
        let last = ((window.top + window.height + reach) as u32).min(image.height());
        let rows = TypedCroppedImage::from_ref(&view, 0, first, image.width(), last - first)
            .unwrap_or_else(|e| panic!("rows {first}..{last} of {}: {e}", image.height()));
        self.resample(&rows, &Window { top: window.top - f64::from(first), ..window }, size)
    }

    fn resample(
        &mut self,
        view: &impl ImageView<Pixel = U8x3>,
        window: &Window,
        (width, height): (u32, u32),
    ) -> RgbImage {
        assert!(width > 0 && height > 0, "cannot resize to {width}x{height} pixels");
        // Given both axes at once, the library would do the columns first.
        let bicubic = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
        let along_rows = bicubic.crop(window.left, 0.0, window.width, f64::from(view.height()));
        let along_columns = bicubic.crop(0.0, window.top, f64::from(width), window.height);

        self.rows.resize(3 * width as usize * view.height() as usize, 0);
        let mut rows = TypedImage::<U8x3>::from_buffer(width, view.height(), &mut self.rows).expect("sized above");
        let resized = self.resizer.resize_typed(view, &mut rows, &along_rows);
        resized.unwrap_or_else(|e| panic!("columns {} + {}: {e}", window.left, window.width));

        let mut image = RgbImage::new(width, height);
        let mut out = TypedImage::<U8x3>::from_buffer(width, height, &mut image).expect("sized above");
        let resized = self.resizer.resize_typed(&rows, &mut out, &along_columns);
        resized.unwrap_or_else(|e| panic!("rows {} + {}: {e}", window.top, window.height));
        image
    }
}

fn typed(image: &RgbImage) -> TypedImageRef<'_, U8x3> {
    TypedImageRef::from_buffer(image.width(), image.height(), image).expect("an image's buffer has its size")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::ChaCha8Rng;

    /// Bicubic in double precision, rounded and limited between the two axes, rows first.
    fn naive(image: &RgbImage, area: CropBox, (width, height): (u32, u32)) -> RgbImage {
        let keys = |x: f64| match x.abs() {
            x if x < 1.0 => 1.5 * x.powi(3) - 2.5 * x.powi(2) + 1.0,
            x if x < 2.0 => -0.5 * x.powi(3) + 2.5 * x.powi(2) - 4.0 * x + 2.0,
            _ => 0.0,
        };
        let resampled = |line: &[f64], len: u32| -> Vec<f64> {
            let scale = line.len() as f64 / f64::from(len);
            let stretch = scale.max(1.0);
            (0..len)
                .map(|i| {
                    let center = (f64::from(i) + 0.5) * scale;
                    let weights: Vec<f64> =
                        (0..line.len()).map(|j| keys((j as f64 + 0.5 - center) / stretch)).collect();
                    let sum: f64 = weights.iter().zip(line).map(|(w, v)| w * v).sum();
                    (sum / weights.iter().sum::<f64>()).round().clamp(0.0, 255.0)
                })
                .collect()
        };
        let mut out = RgbImage::new(width, height);
        for channel in 0..3 {
            let rows: Vec<Vec<f64>> = (area.top..area.top + area.height)
                .map(|y| {
                    let line: Vec<f64> = (area.left..area.left + area.width)
                        .map(|x| f64::from(image.get_pixel(x, y)[channel]))
                        .collect();
                    resampled(&line, width)
                })
                .collect();
            for x in 0..width {
                let column: Vec<f64> = rows.iter().map(|row| row[x as usize]).collect();
                for (y, v) in resampled(&column, height).into_iter().enumerate() {
                    out.get_pixel_mut(x, y as u32)[channel] = v as u8;
                }
            }
        }
        out
    }

    fn checkered(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let edge = if (x / 3 + y / 2) % 2 == 0 { 250 } else { 5 };
            image::Rgb([edge, (x * 37 + y * 11) as u8, (x * y) as u8])
        })
    }

    #[test]
    fn resampling_is_within_a_level_of_the_naive_two_passes() {
        let image = checkered(41, 29);
        let mut resizer = Resizer::default();
        let mut worst = 0;
        let boxes = [(0, 0, 41, 29), (5, 3, 17, 24), (40, 28, 1, 1), (7, 0, 1, 29), (0, 9, 41, 1), (11, 6, 16, 9)];
        let sizes = [(16, 16), (9, 23), (50, 11), (1, 1), (16, 9)];
        for (left, top, width, height) in boxes {
            for size in sizes {
                let area = CropBox { left, top, width, height };
                let found = resizer.resized_crop(&image, area, size);
                let expected = naive(&image, area, size);
                assert_eq!(found.dimensions(), size);
                let error = found.iter().zip(expected.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
                assert!(error <= 1, "{area:?} to {size:?}: {error} levels");
                worst = worst.max(error);
            }
        }
        assert!(worst <= 1);
    }

    #[test]
    fn pixels_outside_the_box_do_not_matter() {
        let area = CropBox { left: 6, top: 4, width: 13, height: 9 };
        let image = checkered(30, 20);
        let mut other = image.clone();
        for (x, y, pixel) in other.enumerate_pixels_mut() {
            if !(6..19).contains(&x) || !(4..13).contains(&y) {
                *pixel = image::Rgb([77, 0, 255]);
            }
        }
        let mut resizer = Resizer::default();
        assert_eq!(resizer.resized_crop(&image, area, (8, 5)), resizer.resized_crop(&other, area, (8, 5)));
    }

    #[test]
    fn a_box_of_the_output_size_is_copied() {
        let image = checkered(30, 20);
        let crop = Resizer::default().resized_crop(&image, CropBox { left: 9, top: 2, width: 12, height: 7 }, (12, 7));
        assert!(crop.enumerate_pixels().all(|(x, y, pixel)| pixel == image.get_pixel(x + 9, y + 2)));
    }

    #[test]
    fn when_no_box_fits_the_largest_centred_one_is_taken() {
        let rng = &mut ChaCha8Rng::seed_from_u64(1);
        let ratio = [0.75, 4.0 / 3.0];
        let wide = CropBox::draw((100, 6), [0.9, 1.0], ratio, rng);
        assert_eq!(wide, CropBox { left: 46, top: 0, width: 8, height: 6 });
        let tall = CropBox::draw((6, 101), [0.9, 1.0], ratio, rng);
        assert_eq!(tall, CropBox { left: 0, top: 46, width: 6, height: 8 });
        assert_eq!(CropBox::draw((1, 1), [0.05, 0.05], ratio, rng), CropBox { left: 0, top: 0, width: 1, height: 1 });
    }

    #[test]
    fn boxes_stay_inside() {
        for seed in 0..500 {
            let rng = &mut ChaCha8Rng::seed_from_u64(seed);
            let (width, height) = (rng.random_range(1..300), rng.random_range(1..300));
            let low = rng.random_range(0.01..1.0);
            let area = CropBox::draw((width, height), [low, 1.0], [0.75, 4.0 / 3.0], rng);
            assert!(area.width >= 1 && area.height >= 1, "seed {seed}: {area:?}");
            assert!(
                area.left + area.width <= width && area.top + area.height <= height,
                "seed {seed}: {area:?} of {width}x{height}"
            );
        }
    }
}
