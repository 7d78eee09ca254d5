//! Strong edits that make copies of an image, each a pure function of image and stream.
//!
//! Their strengths are ours, chosen to be about those of Copydays (Jégou et al. 2008: crops, JPEG of low quality, "strong"
//! combinations by hand) and DISC21 (Douze et al. 2021); scores on them are no scores on those sets.

use std::sync::Arc;

use dinoxide_augmentation::{
    Blur, BlurKind, ColorOp, CropBox, RgbImage, brightness, contrast, horizontal_flip, saturation,
};
use dinoxide_data::{DecodeError, ReadError, Source};
use dinoxide_random::{ChaCha8Rng, Purpose, stream};
use image::codecs::jpeg::JpegEncoder;
use image::{ImageFormat, Rgb};
use rand::RngExt;
use rand::seq::index::sample;
use serde::{Deserialize, Serialize};

use crate::selection::draws;

/// A way to make a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Edit {
    /// A box of 20 to 50 % of the area, as wide to high as 3:4 to 4:3.
    Crop,
    /// Mirrored left to right.
    Flip,
    /// Turned by 10 to 45 degrees either way; what comes in from outside is black.
    Rotation,
    /// Brightness, contrast and saturation times `exp(±0.2…0.7)`, hue moved by 0.05 to 0.25 of the circle either way.
    Color,
    /// Gaussian, with a standard deviation of 1 to 3 % of the shorter side.
    Blur,
    /// JPEG of quality 3 to 15.
    Jpeg,
    /// A rectangle of one colour over 15 to 35 % of the area.
    Overlay,
    /// Three of the others, in their order here.
    Strong,
}

impl Edit {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Crop, Self::Flip, Self::Rotation, Self::Color, Self::Blur, Self::Jpeg, Self::Overlay, Self::Strong];

    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Crop => "crop",
            Self::Flip => "flip",
            Self::Rotation => "rotation",
            Self::Color => "color",
            Self::Blur => "blur",
            Self::Jpeg => "jpeg",
            Self::Overlay => "overlay",
            Self::Strong => "strong",
        }
    }

    /// The edited image. Only a crop changes its size.
    ///
    /// # Panics
    /// If the image has no pixels.
    pub fn apply(self, image: &RgbImage, rng: &mut ChaCha8Rng) -> RgbImage {
        let (width, height) = image.dimensions();
        let mut edited = image.clone();
        match self {
            Self::Crop => {
                let CropBox { left, top, width, height } =
                    CropBox::draw((width, height), [0.2, 0.5], [3.0 / 4.0, 4.0 / 3.0], rng);
                return image::imageops::crop_imm(image, left, top, width, height).to_image();
            }
            Self::Flip => horizontal_flip(&mut edited),
            Self::Rotation => return rotated(image, signed(10.0..45.0, rng).to_radians()),
            Self::Color => {
                let mut factor = || signed(0.2..0.7, rng).exp() as f32;
                let factors = [factor(), factor(), factor()];
                brightness(&mut edited, factors[0]);
                contrast(&mut edited, factors[1]);
                saturation(&mut edited, factors[2]);
                ColorOp::Hue(signed(0.05..0.25, rng)).apply(&mut edited);
            }
            Self::Blur => {
                let sigma = f64::from(width.min(height)) * rng.random_range(0.01..0.03);
                Blur::default().apply(&mut edited, BlurKind::Pil, sigma);
            }
            Self::Jpeg => return recompressed(image, rng.random_range(3..=15)),
            Self::Overlay => {
                let part = CropBox::draw((width, height), [0.15, 0.35], [0.5, 2.0], rng);
                let color = Rgb([rng.random(), rng.random(), rng.random()]);
                for y in part.top..part.top + part.height {
                    (part.left..part.left + part.width).for_each(|x| edited.put_pixel(x, y, color));
                }
            }
            Self::Strong => {
                let simple = &Self::ALL[..7];
                let mut chosen = sample(rng, simple.len(), 3).into_vec();
                chosen.sort_unstable();
                edited = chosen.into_iter().fold(edited, |image, at| simple[at].apply(&image, rng));
            }
        }
        edited
    }
}

/// A draw from a range, negative half of the time.
fn signed(range: std::ops::Range<f64>, rng: &mut ChaCha8Rng) -> f64 {
    let size = rng.random_range(range);
    if rng.random::<bool>() { size } else { -size }
}

/// Turned about the centre, bilinear.
fn rotated(image: &RgbImage, angle: f64) -> RgbImage {
    let (width, height) = image.dimensions();
    let (sin, cos) = angle.sin_cos();
    let center = [f64::from(width - 1) / 2.0, f64::from(height - 1) / 2.0];
    let pixel = |x: f64, y: f64| {
        let inside = x >= 0.0 && y >= 0.0 && x < f64::from(width) && y < f64::from(height);
        if inside { image.get_pixel(x as u32, y as u32).0.map(f64::from) } else { [0.0; 3] }
    };
    RgbImage::from_fn(width, height, |x, y| {
        let (dx, dy) = (f64::from(x) - center[0], f64::from(y) - center[1]);
        let (from_x, from_y) = (center[0] + cos * dx + sin * dy, center[1] - sin * dx + cos * dy);
        let (left, top) = (from_x.floor(), from_y.floor());
        let (right, below) = (from_x - left, from_y - top);
        let corners = [
            (pixel(left, top), (1.0 - right) * (1.0 - below)),
            (pixel(left + 1.0, top), right * (1.0 - below)),
            (pixel(left, top + 1.0), (1.0 - right) * below),
            (pixel(left + 1.0, top + 1.0), right * below),
        ];
        Rgb([0, 1, 2].map(|c| corners.iter().map(|(color, weight)| color[c] * weight).sum::<f64>().round() as u8))
    })
}

/// The largest side of a JPEG.
const JPEG_SIDE: u32 = u16::MAX as u32;

/// Written as JPEG and read again.
fn recompressed(image: &RgbImage, quality: u8) -> RgbImage {
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, quality).encode_image(image).expect("memory takes all");
    image::load_from_memory_with_format(&bytes, ImageFormat::Jpeg).expect("a JPEG that was just written").into_rgb8()
}

/// Copies of the images of a source by one edit. The copy of an image depends on seed, image and edit alone.
pub struct Edited {
    /// The originals.
    pub source: Arc<dyn Source>,
    /// What is done to them.
    pub edit: Edit,
    /// Of all draws.
    pub seed: u64,
}

impl Source for Edited {
    fn len(&self) -> usize {
        self.source.len()
    }

    fn id(&self, index: usize) -> String {
        self.source.id(index)
    }

    fn read(&self, index: usize) -> Result<RgbImage, ReadError> {
        let edits = Edit::ALL.len();
        let edit = Edit::ALL.iter().position(|edit| *edit == self.edit).expect("one of all");
        let counter = (index * edits + edit) as u64;
        let image = self.source.read(index)?;
        let (width, height) = image.dimensions();
        // All edits are refused, so that they are made of the same images.
        if width.max(height) > JPEG_SIDE {
            let detail = format!("of {width} × {height} px, the most is {JPEG_SIDE} px a side");
            return Err(ReadError { id: self.id(index), reason: DecodeError::Unsupported { format: "JPEG", detail } });
        }
        Ok(self.edit.apply(&image, &mut stream(self.seed, Purpose::Evaluation, draws::COPIES, counter)))
    }

    fn label(&self, _: usize) -> Option<u32> {
        None
    }

    fn classes(&self) -> &[String] {
        &[]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dinoxide_data::{DecodeLimits, open};

    fn rng(counter: u64) -> ChaCha8Rng {
        stream(3, Purpose::Evaluation, 2000, counter)
    }

    fn picture(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([(x * 5) as u8, (y * 7) as u8, (x * y % 251) as u8]))
    }

    /// Mean absolute difference of bytes.
    fn distance(a: &RgbImage, b: &RgbImage) -> f64 {
        let sum: f64 = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum();
        sum / a.as_raw().len() as f64
    }

    #[test]
    fn every_edit_changes_the_image_as_its_stream_says_and_only_a_crop_its_size() {
        let image = picture(48, 30);
        let mut seen = 0;
        for edit in Edit::ALL {
            let mut distinct = std::collections::BTreeSet::new();
            for counter in 0..4 {
                let edited = edit.apply(&image, &mut rng(counter));
                assert_eq!(edited, edit.apply(&image, &mut rng(counter)), "{} repeats", edit.name());
                assert_ne!(edited, image, "{}", edit.name());
                if edit == Edit::Crop {
                    let share = f64::from(edited.width() * edited.height()) / (48.0 * 30.0);
                    assert!((0.17..0.53).contains(&share), "{share}");
                } else if edit != Edit::Strong {
                    assert_eq!(edited.dimensions(), (48, 30), "{}", edit.name());
                }
                distinct.insert(edited.into_raw());
                seen += 1;
            }
            assert_eq!(distinct.len() > 1, edit != Edit::Flip, "{} is drawn", edit.name());
        }
        assert_eq!(seen, 32);
    }

    #[test]
    fn edits_of_the_smallest_images_do_not_panic() {
        let mut seen = 0;
        for (width, height) in [(1, 1), (1, 7), (3, 2)] {
            for edit in Edit::ALL {
                let edited = edit.apply(&picture(width, height), &mut rng(u64::from(width)));
                assert!(edited.width() > 0 && edited.height() > 0);
                seen += 1;
            }
        }
        assert_eq!(seen, 24);
    }

    /// One image, longer than a JPEG can be.
    struct Long;

    impl Source for Long {
        fn len(&self) -> usize {
            1
        }

        fn id(&self, _: usize) -> String {
            "long.png".into()
        }

        fn read(&self, _: usize) -> Result<RgbImage, ReadError> {
            Ok(RgbImage::new(JPEG_SIDE + 1, 2))
        }

        fn label(&self, _: usize) -> Option<u32> {
            None
        }

        fn classes(&self) -> &[String] {
            &[]
        }
    }

    #[test]
    fn an_image_that_is_too_large_for_a_jpeg_is_left_out_by_name() {
        for edit in [Edit::Jpeg, Edit::Strong, Edit::Flip] {
            let error = Edited { source: Arc::new(Long), edit, seed: 0 }.read(0).unwrap_err().to_string();
            assert!(error.contains("long.png") && error.contains("65536 × 2 px"), "{error}");
        }
    }

    #[test]
    fn a_quarter_turn_and_no_turn_are_exact() {
        let image = picture(6, 6);
        assert_eq!(rotated(&image, 0.0), image);
        let turned = rotated(&image, std::f64::consts::FRAC_PI_2);
        let expected = RgbImage::from_fn(6, 6, |x, y| *image.get_pixel(y, 5 - x));
        assert!(distance(&turned, &expected) < 0.01 && distance(&turned, &image) > 5.0);
    }

    #[test]
    fn an_overlay_has_one_colour_and_its_share_of_the_area() {
        let image = RgbImage::from_pixel(50, 40, Rgb([1, 2, 3]));
        for counter in 0..5 {
            let edited = Edit::Overlay.apply(&image, &mut rng(counter));
            let covered: Vec<_> = edited.pixels().filter(|pixel| pixel.0 != [1, 2, 3]).collect();
            assert!(covered.windows(2).all(|pair| pair[0] == pair[1]));
            assert!((0.13..0.37).contains(&(covered.len() as f64 / 2000.0)), "{}", covered.len());
        }
    }

    #[test]
    fn a_copy_depends_on_seed_image_and_edit() {
        let source = open("synthetic:images=4,size=24", &DecodeLimits::default()).unwrap();
        let copies = |edit, seed| Edited { source: Arc::clone(&source), edit, seed };
        let (a, b) = (copies(Edit::Crop, 0), copies(Edit::Crop, 1));
        assert_eq!((a.len(), a.id(2)), (4, source.id(2)));
        assert_eq!(a.read(2).unwrap(), a.read(2).unwrap());
        assert_ne!(a.read(2).unwrap(), b.read(2).unwrap());
        // Each edit of each image has draws of its own.
        for (number, edit) in Edit::ALL.into_iter().enumerate() {
            let mut own = stream(1, Purpose::Evaluation, draws::COPIES, (2 * 8 + number) as u64);
            assert_eq!(
                copies(edit, 1).read(2).unwrap(),
                edit.apply(&source.read(2).unwrap(), &mut own),
                "{}",
                edit.name()
            );
        }
        let flipped = copies(Edit::Flip, 0).read(1).unwrap();
        let mut expected = source.read(1).unwrap();
        horizontal_flip(&mut expected);
        assert_eq!(flipped, expected);
    }
}
