//! From 8-bit pixels to the values that a backbone sees.

use image::RgbImage;

/// `(value / 255 − mean) / std` per channel, channels first.
///
/// # Shapes
/// Any number of images of `size = (width, height)` → `[n, 3, height, width]`, row-major.
///
/// # Panics
/// If an image is of another size.
pub fn normalize<'a>(
    images: impl Iterator<Item = &'a RgbImage>,
    size: (u32, u32),
    mean: [f32; 3],
    std: [f32; 3],
) -> Vec<f32> {
    let table: [[f32; 256]; 3] =
        std::array::from_fn(|c| std::array::from_fn(|value| (value as f32 / 255.0 - mean[c]) / std[c]));
    let mut flat = Vec::new();
    for image in images {
        assert_eq!(image.dimensions(), size, "images of one tensor have one size");
        let pixels = image.as_raw().as_chunks::<3>().0;
        for (c, table) in table.iter().enumerate() {
            flat.extend(pixels.iter().map(|pixel| table[usize::from(pixel[c])]));
        }
    }
    flat
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn channels_come_first_and_rows_before_columns() {
        let image = RgbImage::from_fn(3, 2, |x, y| Rgb([(10 * y + x) as u8, 100, 255]));
        let flat = normalize([&image, &image].into_iter(), (3, 2), [0.0, 0.0, 0.5], [1.0 / 255.0, 1.0, 0.5]);
        assert_eq!(flat.len(), 2 * 3 * 2 * 3);
        for (i, expected) in [0.0, 1.0, 2.0, 10.0, 11.0, 12.0].into_iter().enumerate() {
            assert!((flat[i] - expected).abs() < 1e-4 && (flat[18 + i] - expected).abs() < 1e-4);
        }
        assert!((flat[6] - 100.0 / 255.0).abs() < 1e-6 && (flat[12] - 1.0).abs() < 1e-6);
    }
}
