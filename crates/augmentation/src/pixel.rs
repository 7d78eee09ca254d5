//! Operations that treat every pixel, or every byte, alike: table look-ups, solarize and the horizontal flip.

use image::RgbImage;

/// The image's pixels as `[r, g, b]`, row after row.
pub(crate) fn pixels_mut(image: &mut RgbImage) -> &mut [[u8; 3]] {
    let bytes: &mut [u8] = image;
    bytes.as_chunks_mut().0
}

/// Replaces each byte `v` by `table[v]`.
pub(crate) fn map_bytes(image: &mut RgbImage, table: &[u8; 256]) {
    for byte in image.iter_mut() {
        *byte = table[usize::from(*byte)];
    }
}

/// Inverts the bytes at or above the threshold: `v → 255 − v` where `v ≥ threshold`.
pub fn solarize(image: &mut RgbImage, threshold: u8) {
    for byte in image.iter_mut() {
        *byte = if *byte >= threshold { 255 - *byte } else { *byte };
    }
}

/// Mirrors the image left to right.
pub fn horizontal_flip(image: &mut RgbImage) {
    let width = image.width() as usize;
    // A zero-width image has no pixels, and `chunks_exact_mut` would not accept its width.
    for row in pixels_mut(image).chunks_exact_mut(width.max(1)) {
        row.reverse();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solarize_inverts_from_the_threshold_on() {
        let mut image = RgbImage::from_raw(2, 1, vec![0, 127, 128, 129, 200, 255]).unwrap();
        solarize(&mut image, 128);
        assert_eq!(image.as_raw(), &[0, 127, 127, 126, 55, 0]);
        solarize(&mut image, 0);
        assert_eq!(image.as_raw(), &[255, 128, 128, 129, 200, 255]);
    }

    #[test]
    fn flip_reverses_each_row_and_keeps_channels_together() {
        let mut image = RgbImage::from_raw(3, 2, (0..18).collect()).unwrap();
        horizontal_flip(&mut image);
        assert_eq!(image.as_raw(), &[6, 7, 8, 3, 4, 5, 0, 1, 2, 15, 16, 17, 12, 13, 14, 9, 10, 11]);
        horizontal_flip(&mut image);
        assert_eq!(image.as_raw(), &(0..18).collect::<Vec<u8>>());
    }

    #[test]
    fn an_image_without_pixels_is_left_alone() {
        let mut image = RgbImage::new(0, 4);
        horizontal_flip(&mut image);
        solarize(&mut image, 128);
        assert_eq!(image.dimensions(), (0, 4));
    }
}
