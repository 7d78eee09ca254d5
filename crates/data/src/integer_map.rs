//! Images whose pixels are numbers and not colours: masks of class or object ids, depth in millimetres.
//!
//! Only PNG has both the depth and the losslessness for it. A gray PNG holds its samples, of 1 to 16 bits; a PNG with a
//! palette holds indices into it (as in VOC and DAVIS), and the indices are what is meant. Nothing is scaled: a mask of one
//! bit has ids 0 and 1.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use crate::{DecodeError, DecodeLimits};

/// One number for each pixel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntegerMap {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Row by row, `height · width` values.
    pub values: Vec<u16>,
}

/// Reads a map from a PNG file.
///
/// # Errors
/// [`DecodeError`]: no PNG, a PNG with several samples per pixel, one outside the limits, or a damaged one.
pub fn read_integer_map(path: &Path, limits: &DecodeLimits) -> Result<IntegerMap, DecodeError> {
    let io = |error: std::io::Error| DecodeError::Io(error.to_string());
    // Opening a pipe would wait for its other end.
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(DecodeError::Io("not a regular file".into()));
    }
    let mut bytes = Vec::new();
    let mut file = BufReader::new(File::open(path).map_err(io)?).take(limits.max_alloc());
    file.read_to_end(&mut bytes).map_err(io)?;
    decode_integer_map(&bytes, limits)
}

/// As [`read_integer_map`], from memory.
///
/// # Errors
/// As [`read_integer_map`].
pub fn decode_integer_map(bytes: &[u8], limits: &DecodeLimits) -> Result<IntegerMap, DecodeError> {
    const FORMAT: &str = "PNG";
    if bytes.is_empty() {
        return Err(DecodeError::Empty);
    }
    if !bytes.starts_with(b"\x89PNG") {
        let detail = "masks and depth maps are read from PNG files only".into();
        return Err(DecodeError::Unsupported { format: "this format", detail });
    }
    let failed = |error: png::DecodingError| match error {
        png::DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            DecodeError::Truncated { format: FORMAT, bytes: bytes.len() as u64 }
        }
        other => DecodeError::Malformed { format: FORMAT, detail: other.to_string() },
    };
    let allowed = png::Limits { bytes: usize::try_from(limits.max_alloc()).unwrap_or(usize::MAX) };
    let mut decoder = png::Decoder::new_with_limits(std::io::Cursor::new(bytes), allowed);
    let info = decoder.read_header_info().map_err(failed)?;
    let (width, height, color, depth) = (info.width, info.height, info.color_type, info.bit_depth as usize);
    limits.check(width, height)?;
    if !matches!(color, png::ColorType::Grayscale | png::ColorType::Indexed) {
        let detail =
            format!("{color:?} samples; a mask or depth map has one number per pixel: gray, or with a palette");
        return Err(DecodeError::Unsupported { format: FORMAT, detail });
    }
    let mut reader = decoder.read_info().map_err(failed)?;
    let row = (width as usize * depth).div_ceil(8);
    let mut raw = vec![0; row * height as usize];
    reader.next_frame(&mut raw).map_err(failed)?;
    let values = raw.chunks_exact(row).flat_map(|row| unpacked(row, depth).take(width as usize)).collect();
    Ok(IntegerMap { width, height, values })
}

/// The samples of a row, `depth` bits each, most significant first.
fn unpacked(row: &[u8], depth: usize) -> impl Iterator<Item = u16> + '_ {
    let count = row.len() * 8 / depth;
    (0..count).map(move |i| match depth {
        16 => u16::from_be_bytes([row[2 * i], row[2 * i + 1]]),
        8 => u16::from(row[i]),
        _ => {
            let (per_byte, mask) = (8 / depth, (1u16 << depth) - 1);
            u16::from(row[i / per_byte]) >> (8 - depth - i % per_byte * depth) & mask
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{encode, picture, png_header};
    use image::ImageFormat;

    fn packed(width: u32, height: u32, color: png::ColorType, depth: png::BitDepth, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(color);
        encoder.set_depth(depth);
        if color == png::ColorType::Indexed {
            encoder.set_palette(vec![7; 3 << (depth as u8).min(8)]);
        }
        encoder.write_header().unwrap().write_image_data(data).unwrap();
        bytes
    }

    fn read(bytes: &[u8]) -> Result<IntegerMap, DecodeError> {
        decode_integer_map(bytes, &DecodeLimits::default())
    }

    #[test]
    fn values_are_those_stored_whatever_the_depth() {
        use png::{BitDepth::*, ColorType::*};
        // Five columns, so that rows of 1, 2 and 4 bits end inside a byte.
        let cases = [
            (One, vec![0b1010_1000, 0b0111_0000], vec![1, 0, 1, 0, 1, 0, 1, 1, 1, 0]),
            (Two, vec![0b0001_1011, 0b1100_0000, 0, 0x40], vec![0, 1, 2, 3, 3, 0, 0, 0, 0, 1]),
            (Four, vec![0x0f, 0x1e, 0x20, 0x55, 0x66, 0x70], vec![0, 15, 1, 14, 2, 5, 5, 6, 6, 7]),
            (Eight, vec![0, 11, 255, 3, 4, 9, 8, 7, 6, 5], vec![0, 11, 255, 3, 4, 9, 8, 7, 6, 5]),
        ];
        let mut seen = 0;
        for (depth, data, expected) in cases {
            for color in [Grayscale, Indexed] {
                let map = read(&packed(5, 2, color, depth, &data)).unwrap();
                assert_eq!((map.width, map.height, &map.values), (5, 2, &expected), "{color:?} {depth:?}");
                seen += 1;
            }
        }
        assert_eq!(seen, 8);
        let deep = packed(2, 2, Grayscale, Sixteen, &[0, 1, 1, 0, 0xff, 0xff, 0x12, 0x34]);
        assert_eq!(read(&deep).unwrap().values, [1, 256, 65_535, 0x1234]);
    }

    #[test]
    fn what_is_no_map_is_refused_and_nothing_panics() {
        let rgb = encode(&picture(5, 3).into(), ImageFormat::Png);
        assert!(
            read(&rgb).unwrap_err().to_string().contains("Rgb samples; a mask or depth map has one number per pixel")
        );
        let jpeg = encode(&picture(5, 3).into(), ImageFormat::Jpeg);
        assert!(read(&jpeg).unwrap_err().to_string().contains("read from PNG files only"));
        assert_eq!(read(b"").unwrap_err(), DecodeError::Empty);
        assert!(matches!(read(&png_header(60_000, 60_000)).unwrap_err(), DecodeError::TooLarge { .. }));
        let whole = packed(5, 2, png::ColorType::Grayscale, png::BitDepth::Eight, &[3; 10]);
        let mut cut = 0;
        for length in 0..whole.len() - 12 {
            // All but the end marker is needed.
            assert!(read(&whole[..length]).is_err(), "{length} bytes");
            cut += 1;
        }
        assert!(cut > 40);
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x55;
            let _ = read(&flipped);
        }
    }
}
