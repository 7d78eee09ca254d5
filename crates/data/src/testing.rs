//! Image files for the tests, made in memory.

use std::io::Cursor;

use image::{DynamicImage, ImageFormat, Rgb, RgbImage};

/// Deterministic colours without any symmetry.
pub(crate) fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([(x * 37 + y * 11) as u8, (x * 5 + y * 53) as u8, (x * y * 3) as u8]))
}

pub(crate) fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// One small file of each kind, with its name.
pub(crate) fn zoo() -> Vec<(&'static str, Vec<u8>)> {
    let rgb = DynamicImage::ImageRgb8(picture(12, 9));
    let mut zoo = vec![
        ("rgb.jpg", encode(&rgb, ImageFormat::Jpeg)),
        ("gray.jpg", encode(&rgb.to_luma8().into(), ImageFormat::Jpeg)),
        ("cmyk.jpg", flat_jpeg(&[200, 100, 50, 180], Some(0))),
        ("rgb.png", encode(&rgb, ImageFormat::Png)),
        ("gray16.png", encode(&rgb.to_luma16().into(), ImageFormat::Png)),
        ("alpha.png", encode(&rgb.to_rgba8().into(), ImageFormat::Png)),
        ("rgb.webp", encode(&rgb, ImageFormat::WebP)),
        ("rgb.bmp", encode(&rgb, ImageFormat::Bmp)),
        ("rgb.tif", encode(&rgb, ImageFormat::Tiff)),
        ("rgb16.tiff", encode(&rgb.to_rgb16().into(), ImageFormat::Tiff)),
        ("palette.gif", encode(&rgb, ImageFormat::Gif)),
    ];
    let rotated = with_exif_orientation(&zoo[0].1, 6);
    zoo.push(("rotated.jpeg", rotated));
    zoo
}

/// A signature and an IHDR chunk, and nothing after them.
pub(crate) fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut chunk = b"IHDR".to_vec();
    chunk.extend(width.to_be_bytes());
    chunk.extend(height.to_be_bytes());
    chunk.extend([8, 2, 0, 0, 0]);
    let crc = !chunk.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
    });
    let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    bytes.extend(chunk);
    bytes.extend(crc.to_be_bytes());
    // The start of the pixel data, so that reading the header comes to its end.
    bytes.extend(b"\0\0\x10\0IDAT");
    bytes
}

/// Puts an EXIF segment with nothing but the orientation tag behind a JPEG's first marker.
pub(crate) fn with_exif_orientation(jpeg: &[u8], orientation: u8) -> Vec<u8> {
    let mut exif = b"Exif\0\0MM\0\x2a\0\0\0\x08".to_vec();
    exif.extend([0, 1]); // one entry
    exif.extend([0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0]); // tag 0x112, short, one value
    exif.extend([0; 4]); // no further directory
    let mut bytes = jpeg[..2].to_vec();
    bytes.extend([0xff, 0xe1]);
    bytes.extend((exif.len() as u16 + 2).to_be_bytes());
    bytes.extend(exif);
    bytes.extend(&jpeg[2..]);
    bytes
}

/// A baseline JPEG of one 8×8 block, each component flat at its value, with an Adobe segment if asked for.
pub(crate) fn flat_jpeg(components: &[u8], adobe_transform: Option<u8>) -> Vec<u8> {
    let mut bytes = vec![0xff, 0xd8];
    let mut segment = |marker: u8, payload: &[u8]| {
        bytes.extend([0xff, marker]);
        bytes.extend((payload.len() as u16 + 2).to_be_bytes());
        bytes.extend(payload);
    };
    if let Some(transform) = adobe_transform {
        segment(0xee, &[b"Adobe\0\x64\0\0\0\0".as_slice(), &[transform]].concat());
    }
    segment(0xdb, &[[0].as_slice(), &[1; 64]].concat()); // quantisation by 1
    let count = components.len() as u8;
    let ids = 1..=count;
    let frame: Vec<u8> = ids.clone().flat_map(|id| [id, 0x11, 0]).collect();
    segment(0xc0, &[[8, 0, 8, 0, 8, count].as_slice(), &frame].concat());
    // DC: the twelve categories as 4-bit codes. AC: end-of-block as the 1-bit code 0.
    let mut lengths = [0; 16];
    lengths[3] = 12;
    segment(0xc4, &[[0x00].as_slice(), &lengths, &(0..12).collect::<Vec<u8>>()].concat());
    lengths = [0; 16];
    lengths[0] = 1;
    segment(0xc4, &[[0x10].as_slice(), &lengths, &[0]].concat());
    let scan: Vec<u8> = ids.flat_map(|id| [id, 0]).collect();
    segment(0xda, &[[count].as_slice(), &scan, &[0, 63, 0]].concat());
    // A flat block of value v has the DC coefficient 8·(v − 128) and no other.
    let mut bits = String::new();
    for &value in components {
        let dc = 8 * (i32::from(value) - 128);
        let category = (32 - dc.unsigned_abs().leading_zeros()) as usize;
        bits += &format!("{category:04b}");
        if category > 0 {
            let code = if dc > 0 { dc } else { dc + (1 << category) - 1 };
            bits += &format!("{code:0category$b}");
        }
        bits += "0";
    }
    while !bits.len().is_multiple_of(8) {
        bits += "1";
    }
    for start in (0..bits.len()).step_by(8) {
        let byte = u8::from_str_radix(&bits[start..start + 8], 2).unwrap();
        bytes.push(byte);
        if byte == 0xff {
            bytes.push(0);
        }
    }
    bytes.extend([0xff, 0xd9]);
    bytes
}
