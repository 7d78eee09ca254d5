//! Draws the built-in images as a sheet, a column per class: `docs/synthetic.png`.
//!
//! Run: `cargo run --release -p dinoxide-data --example contact_sheet -- docs/synthetic.png`

use dinoxide_data::{DecodeLimits, open};
use image::{RgbImage, imageops};

const ROWS: usize = 4;
/// Pixels between images.
const GAP: usize = 4;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: contact_sheet FILE.png")?;
    let source = open("synthetic:split=val", &DecodeLimits::default())?;
    let columns = source.classes().len();
    let side = source.read(0)?.width() as usize;
    let extent = |count: usize| (count * (side + GAP) + GAP) as u32;
    let mut sheet = RgbImage::from_pixel(extent(columns), extent(ROWS), image::Rgb([255; 3]));
    for index in 0..ROWS * columns {
        let place = |at: usize| (at * (side + GAP) + GAP) as i64;
        imageops::replace(&mut sheet, &source.read(index)?, place(index % columns), place(index / columns));
    }
    sheet.save(path)?;
    Ok(())
}
