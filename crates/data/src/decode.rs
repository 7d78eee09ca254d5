//! From the bytes of an image file to upright 8-bit RGB.
//!
//! The format is told by content, never by name. What the formats leave open is settled as PIL's `convert("RGB")` settles
//! it, since published recipes read their images so:
//!
//! - grayscale is repeated over the three channels; palettes are expanded;
//! - alpha is dropped, not blended: a transparent pixel has the colour that is stored for it;
//! - CMYK and YCCK JPEGs hold inverted inks, as Adobe writes them: `R = C·K / 255` of the stored values;
//! - an animation is its first frame, a multi-page TIFF its first page;
//! - colour profiles are not applied.
//!
//! Two things are done that PIL leaves to its caller: the EXIF orientation is applied, and 16-bit samples are scaled to 8
//! bits with rounding, `round(v · 255 / 65535)`, for grayscale too.

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read, Seek};
use std::path::Path;

use image::error::LimitErrorKind;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage};
use serde::{Deserialize, Serialize};

use crate::DataError;

/// What an image file may be. Checked from the header, before memory is set aside for the pixels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DecodeLimits {
    /// The most pixels, width times height. The default is where PIL warns of a decompression bomb.
    pub max_pixels: u64,
    /// The least width and height in pixels. The default leaves out single pixels and lines, which hold nothing to learn.
    pub min_side: u32,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self { max_pixels: 89_478_485, min_side: 2 }
    }
}

impl DecodeLimits {
    /// Checks that an image can pass.
    ///
    /// # Errors
    /// [`DataError::Config`] when no image can.
    pub fn validate(&self) -> Result<(), DataError> {
        if self.min_side == 0 {
            return Err(DataError::Config { key: "decode.min_side", value: "0".into(), expected: "at least 1" });
        }
        if self.max_pixels < u64::from(self.min_side).pow(2) {
            return Err(DataError::Config {
                key: "decode.max_pixels",
                value: self.max_pixels.to_string(),
                expected: "at least the square of `decode.min_side`",
            });
        }
        Ok(())
    }

    pub(crate) fn check(&self, width: u32, height: u32) -> Result<(), DecodeError> {
        if width.min(height) < self.min_side {
            return Err(DecodeError::TooSmall { width, height, min_side: self.min_side });
        }
        if u64::from(width) * u64::from(height) > self.max_pixels {
            return Err(DecodeError::TooLarge { width, height, max_pixels: self.max_pixels });
        }
        Ok(())
    }

    /// What a decoder may set aside: 16-bit RGBA pixels and as much again for its work.
    pub(crate) fn max_alloc(&self) -> u64 {
        self.max_pixels.saturating_mul(16).max(64 << 20)
    }
}

/// Why an image cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The file system failed.
    #[error("{0}")]
    Io(String),
    /// A file of no bytes.
    #[error("the file is empty")]
    Empty,
    /// The first bytes are those of no format that is read here.
    #[error("not a JPEG, PNG, WebP, BMP, TIFF or GIF (first bytes {first_bytes})")]
    UnknownFormat {
        /// The first bytes, in hexadecimal.
        first_bytes: String,
    },
    /// The file stops before its image does.
    #[error("{format} ends early, after {bytes} bytes")]
    Truncated {
        /// The format.
        format: &'static str,
        /// The file's length.
        bytes: u64,
    },
    /// The header claims more than [`DecodeLimits::max_pixels`].
    #[error("{width}x{height} is more than `max_pixels` {max_pixels}")]
    TooLarge {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
        /// The limit.
        max_pixels: u64,
    },
    /// A side is below [`DecodeLimits::min_side`].
    #[error("{width}x{height} has a side below `min_side` {min_side}")]
    TooSmall {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
        /// The limit.
        min_side: u32,
    },
    /// A variant of the format that is not read here.
    #[error("{format}: not supported: {detail}")]
    Unsupported {
        /// The format.
        format: &'static str,
        /// What it is.
        detail: String,
    },
    /// The content contradicts the format.
    #[error("{format}: damaged: {detail}")]
    Malformed {
        /// The format.
        format: &'static str,
        /// What the decoder says.
        detail: String,
    },
}

/// Decodes an image from memory.
///
/// # Errors
/// [`DecodeError`]; damaged bytes never panic.
pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, DecodeError> {
    decode_from(Cursor::new(bytes), limits)
}

/// Decodes an image file.
///
/// # Errors
/// [`DecodeError`], also when the file cannot be opened or is no regular file.
pub fn decode_file(path: &Path, limits: &DecodeLimits) -> Result<RgbImage, DecodeError> {
    let io = |error: std::io::Error| DecodeError::Io(error.to_string());
    // Opening a pipe would wait for its other end.
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(DecodeError::Io("not a regular file".into()));
    }
    decode_from(BufReader::with_capacity(64 << 10, File::open(path).map_err(io)?), limits)
}

fn decode_from<R: BufRead + Seek>(mut reader: R, limits: &DecodeLimits) -> Result<RgbImage, DecodeError> {
    let head = reader.fill_buf().map_err(|error| DecodeError::Io(error.to_string()))?;
    let head = &head[..head.len().min(16)];
    if head.is_empty() {
        return Err(DecodeError::Empty);
    }
    let format = image::guess_format(head).ok().and_then(|format| Some((format, name(format)?)));
    let Some((format, name)) = format else {
        let first_bytes: Vec<_> = head.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        return Err(DecodeError::UnknownFormat { first_bytes: first_bytes.join(" ") });
    };
    if format != ImageFormat::Jpeg {
        return decode_as(reader, format, name, limits);
    }
    // The JPEG decoder fills what is missing from a file with gray and reports success, so its end is looked for first.
    let mut bytes = Vec::new();
    let longest = limits.max_alloc();
    reader.take(longest).read_to_end(&mut bytes).map_err(|error| DecodeError::Io(error.to_string()))?;
    if !jpeg_is_complete(&bytes) {
        return Err(DecodeError::Truncated { format: name, bytes: bytes.len() as u64 });
    }
    decode_as(Cursor::new(bytes), format, name, limits)
}

fn decode_as<R: BufRead + Seek>(
    reader: R,
    format: ImageFormat,
    name: &'static str,
    limits: &DecodeLimits,
) -> Result<RgbImage, DecodeError> {
    let failed = |error| describe(error, name);
    let mut reader = ImageReader::with_format(reader, format);
    let mut allowed = Limits::no_limits();
    allowed.max_alloc = Some(limits.max_alloc());
    reader.limits(allowed);
    let mut decoder = reader.into_decoder().map_err(failed)?;
    let (width, height) = decoder.dimensions();
    limits.check(width, height)?;
    let color = decoder.color_type();
    if color.bytes_per_pixel() / color.channel_count() > 2 {
        // The range of float samples is not known, so there is no right way to bring them to 8 bits.
        return Err(DecodeError::Unsupported { format: name, detail: "floating-point samples".into() });
    }
    let orientation = decoder.orientation().map_err(failed)?;
    let mut image = DynamicImage::ImageRgb8(DynamicImage::from_decoder(decoder).map_err(failed)?.into_rgb8());
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

/// The formats that are read here, by the name that messages use.
fn name(format: ImageFormat) -> Option<&'static str> {
    match format {
        ImageFormat::Jpeg => Some("JPEG"),
        ImageFormat::Png => Some("PNG"),
        ImageFormat::WebP => Some("WebP"),
        ImageFormat::Bmp => Some("BMP"),
        ImageFormat::Tiff => Some("TIFF"),
        ImageFormat::Gif => Some("GIF"),
        _ => None,
    }
}

fn describe(error: ImageError, format: &'static str) -> DecodeError {
    // Only the innermost cause says something that the format's name does not.
    let mut cause: &dyn std::error::Error = &error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let detail = cause.to_string().lines().next().unwrap_or_default().to_owned();
    match error {
        ImageError::Unsupported(_) => DecodeError::Unsupported { format, detail },
        ImageError::Limits(limit) => match limit.kind() {
            LimitErrorKind::InsufficientMemory => {
                DecodeError::Unsupported { format, detail: "more memory than `max_pixels` allows for".into() }
            }
            _ => DecodeError::Unsupported { format, detail },
        },
        _ => DecodeError::Malformed { format, detail },
    }
}

/// Whether the segments of a JPEG lead to its end-of-image marker. Thumbnails inside a segment do not count.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    const END: u8 = 0xd9;
    let mut at = 2;
    while let Some(skipped) = bytes.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == 0xff)) {
        at += skipped;
        // A marker may be preceded by any number of fill bytes.
        while bytes.get(at) == Some(&0xff) {
            at += 1;
        }
        match bytes.get(at) {
            None => return false,
            Some(&END) => return true,
            // A stuffed zero of the entropy-coded data, restart markers, TEM: no payload.
            Some(0x00 | 0x01 | 0xd0..=0xd8) => at += 1,
            Some(_) => {
                let Some(&[high, low]) = bytes.get(at + 1..at + 3) else { return false };
                at += 1 + usize::from(u16::from_be_bytes([high, low]));
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, encode, flat_jpeg, picture, with_exif_orientation};
    use image::metadata::Orientation;
    use image::{GrayAlphaImage, ImageBuffer, Luma, LumaA, Rgb, Rgba};

    fn read(bytes: &[u8]) -> Result<RgbImage, DecodeError> {
        decode(bytes, &DecodeLimits::default())
    }

    const LOSSLESS: [ImageFormat; 4] = [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Tiff];

    #[test]
    fn lossless_formats_return_the_pixels() {
        let expected = picture(13, 9);
        for format in LOSSLESS {
            assert_eq!(read(&encode(&expected.clone().into(), format)).unwrap(), expected, "{format:?}");
        }
    }

    #[test]
    fn jpeg_returns_nearly_the_pixels() {
        let smooth = RgbImage::from_fn(24, 17, |x, y| Rgb([4 * x as u8, 9 * y as u8, 90]));
        let got = read(&encode(&smooth.clone().into(), ImageFormat::Jpeg)).unwrap();
        assert_eq!(got.dimensions(), (24, 17));
        let error: u32 = got.iter().zip(smooth.iter()).map(|(&a, &b)| u32::from(a.abs_diff(b))).sum();
        assert!(error < 6 * got.len() as u32, "mean error {}", f64::from(error) / got.len() as f64);
    }

    #[test]
    fn gif_gives_its_first_frame() {
        let mut bytes = Vec::new();
        let mut encoder = image::codecs::gif::GifEncoder::new(&mut bytes);
        for color in [[200, 10, 20, 255], [0, 200, 0, 255]] {
            let frame = image::RgbaImage::from_pixel(11, 7, Rgba(color));
            encoder.encode_frame(image::Frame::new(frame)).unwrap();
        }
        drop(encoder);
        let got = read(&bytes).unwrap();
        assert_eq!(got.dimensions(), (11, 7));
        assert!(got.pixels().all(|pixel| *pixel == Rgb([200, 10, 20])));
    }

    #[test]
    fn sixteen_bit_samples_are_rounded() {
        let mut cases = 0;
        for value in [0u16, 1, 128, 129, 256, 32_767, 32_768, 65_406, 65_407, 65_535] {
            let expected = (f64::from(value) * 255.0 / 65_535.0).round() as u8;
            let gray: ImageBuffer<Luma<u16>, _> = ImageBuffer::from_pixel(3, 2, Luma([value]));
            let rgb: ImageBuffer<Rgb<u16>, _> = ImageBuffer::from_pixel(3, 2, Rgb([value, 0, 65_535]));
            for format in [ImageFormat::Png, ImageFormat::Tiff] {
                assert_eq!(read(&encode(&gray.clone().into(), format)).unwrap()[(2, 1)], Rgb([expected; 3]));
                assert_eq!(read(&encode(&rgb.clone().into(), format)).unwrap()[(2, 1)], Rgb([expected, 0, 255]));
                cases += 2;
            }
        }
        assert_eq!(cases, 40);
    }

    #[test]
    fn gray_is_repeated_and_alpha_is_dropped_not_blended() {
        let gray = image::GrayImage::from_fn(5, 3, |x, y| Luma([(50 * x + y) as u8]));
        let with_alpha = GrayAlphaImage::from_fn(5, 3, |x, y| LumaA([gray[(x, y)].0[0], (x * 60) as u8]));
        let expected = RgbImage::from_fn(5, 3, |x, y| Rgb([gray[(x, y)].0[0]; 3]));
        assert_eq!(read(&encode(&gray.into(), ImageFormat::Png)).unwrap(), expected);
        assert_eq!(read(&encode(&with_alpha.into(), ImageFormat::Png)).unwrap(), expected);

        let color = picture(6, 4);
        let clear = image::RgbaImage::from_fn(6, 4, |x, y| {
            let Rgb([r, g, b]) = color[(x, y)];
            Rgba([r, g, b, if x < 3 { 0 } else { 128 }])
        });
        for format in LOSSLESS {
            assert_eq!(read(&encode(&clear.clone().into(), format)).unwrap(), color, "{format:?}");
        }
    }

    #[test]
    fn cmyk_and_ycck_jpegs_are_read_as_adobe_writes_them() {
        // Flat blocks are exact in JPEG: what comes out is the colour conversion alone.
        let inks = [200, 100, 50, 180];
        let expected = [0, 1, 2].map(|i| (f64::from(inks[i]) * f64::from(inks[3]) / 255.0).round() as u8);
        for adobe_transform in [None, Some(0)] {
            let got = read(&flat_jpeg(&inks, adobe_transform)).unwrap();
            assert_eq!(got.dimensions(), (8, 8));
            assert!(got.pixels().all(|pixel| pixel.0 == expected), "{adobe_transform:?}: {:?}", got[(0, 0)]);
        }
        // YCCK: libjpeg turns YCC to RGB and stores its complement as CMY; here Y 90 and neutral chroma, so C = 165.
        let got = read(&flat_jpeg(&[90, 128, 128, 180], Some(2))).unwrap();
        let expected = (165.0f64 * 180.0 / 255.0).round() as u8;
        assert!(got[(0, 0)].0.iter().all(|value| value.abs_diff(expected) <= 1), "{:?} not {expected}", got[(0, 0)]);
        // Three components marked as untransformed are RGB.
        assert_eq!(read(&flat_jpeg(&[10, 20, 30], Some(0))).unwrap()[(3, 3)], Rgb([10, 20, 30]));
    }

    #[test]
    fn exif_orientation_turns_the_image_upright() {
        // Left half dark, right half bright: large areas survive JPEG compression.
        let image = RgbImage::from_fn(32, 16, |x, _| Rgb([if x < 16 { 20 } else { 230 }; 3]));
        let jpeg = encode(&image.clone().into(), ImageFormat::Jpeg);
        for exif in 1..=8 {
            let got = read(&with_exif_orientation(&jpeg, exif)).unwrap();
            let mut expected = DynamicImage::ImageRgb8(image.clone());
            expected.apply_orientation(Orientation::from_exif(exif).unwrap());
            let expected = expected.into_rgb8();
            assert_eq!(got.dimensions(), expected.dimensions(), "orientation {exif}");
            let wrong = got.iter().zip(expected.iter()).filter(|(a, b)| a.abs_diff(**b) > 60).count();
            assert_eq!(wrong, 0, "orientation {exif}");
        }
        // Stated apart from the library: 6 is "turn clockwise", so the dark left half becomes the top.
        let turned = read(&with_exif_orientation(&jpeg, 6)).unwrap();
        assert_eq!(turned.dimensions(), (16, 32));
        assert!(turned[(8, 4)].0[0] < 60 && turned[(8, 28)].0[0] > 190);
    }

    #[test]
    fn limits_hold_before_pixels_are_allocated() {
        // A header alone: no decoder could get further than its size.
        let bomb = testing::png_header(10_000, 10_000);
        assert_eq!(
            read(&bomb).unwrap_err(),
            DecodeError::TooLarge { width: 10_000, height: 10_000, max_pixels: 89_478_485 }
        );
        assert!(matches!(read(&testing::png_header(9_000, 9_000)), Err(DecodeError::Malformed { .. })));
        let dot = encode(&picture(1, 1).into(), ImageFormat::Png);
        assert_eq!(read(&dot).unwrap_err(), DecodeError::TooSmall { width: 1, height: 1, min_side: 2 });
        let line = encode(&picture(40, 1).into(), ImageFormat::Bmp);
        assert_eq!(read(&line).unwrap_err(), DecodeError::TooSmall { width: 40, height: 1, min_side: 2 });
        let tight = DecodeLimits { max_pixels: 39, min_side: 1 };
        assert!(matches!(decode(&line, &tight), Err(DecodeError::TooLarge { width: 40, height: 1, .. })));
        assert_eq!(decode(&line, &DecodeLimits { max_pixels: 40, ..tight }).unwrap().dimensions(), (40, 1));
    }

    #[test]
    fn nothing_garbage_and_other_formats_are_named() {
        assert_eq!(read(b"").unwrap_err(), DecodeError::Empty);
        let error = read(b"hello world").unwrap_err().to_string();
        assert!(error.contains("first bytes 68 65 6c 6c 6f 20 77 6f"), "{error}");
        // A format that the library knows and this build leaves out.
        assert!(matches!(read(b"qoif\0\0\0\0"), Err(DecodeError::UnknownFormat { .. })));
        let float = image::Rgb32FImage::from_pixel(4, 3, Rgb([0.5, 2.0, -1.0]));
        let error = read(&encode(&float.into(), ImageFormat::Tiff)).unwrap_err().to_string();
        assert_eq!(error, "TIFF: not supported: floating-point samples");
        let missing = decode_file(Path::new("no/such/file.png"), &DecodeLimits::default()).unwrap_err();
        assert!(matches!(missing, DecodeError::Io(_)), "{missing}");
        let folder = decode_file(Path::new("."), &DecodeLimits::default()).unwrap_err();
        assert_eq!(folder.to_string(), "not a regular file");
    }

    #[test]
    fn a_jpeg_thumbnail_is_not_the_end_of_the_image() {
        let jpeg = encode(&picture(16, 16).into(), ImageFormat::Jpeg);
        // A whole JPEG inside an application segment, then a cut through the scan.
        let mut with_thumbnail = jpeg[..2].to_vec();
        with_thumbnail.extend([0xff, 0xe1]);
        with_thumbnail.extend((jpeg.len() as u16 + 2).to_be_bytes());
        with_thumbnail.extend(&jpeg);
        with_thumbnail.extend(&jpeg[2..]);
        assert_eq!(read(&with_thumbnail).unwrap(), read(&jpeg).unwrap());
        let cut = with_thumbnail.len() - 20;
        let error = read(&with_thumbnail[..cut]).unwrap_err();
        assert_eq!(error, DecodeError::Truncated { format: "JPEG", bytes: cut as u64 });
        // Bytes after the end do no harm.
        with_thumbnail.extend([0; 30]);
        read(&with_thumbnail).unwrap();
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error_or_still_whole() {
        let mut cuts = 0;
        for (name, bytes) in testing::zoo() {
            let whole = read(&bytes).unwrap();
            let mut refused = 0;
            for end in 0..bytes.len() {
                match read(&bytes[..end]) {
                    Err(_) => refused += 1,
                    Ok(image) => assert_eq!(image, whole, "{name} cut to {end} of {} bytes", bytes.len()),
                }
                cuts += 1;
            }
            assert!(refused * 10 > bytes.len() * 8, "{name}: only {refused} of {} cuts were refused", bytes.len());
        }
        assert!(cuts > 3000, "{cuts}");
    }

    #[test]
    fn flipped_bytes_never_panic() {
        use rand::RngExt;
        let mut rng = dinoxide_random::stream(1, dinoxide_random::Purpose::Evaluation, 0, 0);
        let limits = DecodeLimits { max_pixels: 1 << 16, min_side: 1 };
        for (_, bytes) in testing::zoo() {
            for _ in 0..2000 {
                let mut damaged = bytes.clone();
                for _ in 0..rng.random_range(1..4) {
                    let at = rng.random_range(0..damaged.len());
                    damaged[at] = rng.random();
                }
                let _outcome = decode(&damaged, &limits);
            }
        }
    }
}
