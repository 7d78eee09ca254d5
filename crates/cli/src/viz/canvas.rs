//! Sheets of pictures with captions.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use ab_glyph::{Font, FontRef, PxScale, ScaleFont};
use anyhow::Context;
use image::{Rgb, RgbImage, imageops};

use crate::Usage;
use crate::eval::check_replaceable;

/// Letters, digits and a few signs of DejaVu Sans; its licence lies beside it.
const FONT: &[u8] = include_bytes!("../../assets/DejaVuSans-subset.ttf");

pub(crate) const INK: Rgb<u8> = Rgb([32, 32, 36]);
pub(crate) const FAINT: Rgb<u8> = Rgb([112, 112, 120]);
const PAPER: Rgb<u8> = Rgb([255, 255, 255]);
const TEXT_PX: f32 = 15.0;
const SMALL_PX: f32 = 13.0;
/// What a picture says of where it comes from, under the keyword `Software`.
const SOFTWARE: &str = "dinoxide viz";
const MARGIN: u32 = 16;
const GAP: u32 = 8;

/// Text on images.
pub(crate) struct Pen(FontRef<'static>);

impl Pen {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self(FontRef::try_from_slice(FONT).context("the built-in font")?))
    }

    /// Width of a line, in pixels.
    pub(crate) fn width(&self, text: &str, px: f32) -> u32 {
        let font = self.0.as_scaled(PxScale::from(px));
        text.chars().map(|c| font.h_advance(font.glyph_id(c))).sum::<f32>().ceil() as u32
    }

    /// Writes a line with its upper left corner at `(x, y)`.
    pub(crate) fn write(&self, image: &mut RgbImage, (x, y): (u32, u32), px: f32, color: Rgb<u8>, text: &str) {
        let font = self.0.as_scaled(PxScale::from(px));
        let mut caret = x as f32;
        for c in text.chars() {
            let id = font.glyph_id(c);
            let glyph = id.with_scale_and_position(px, ab_glyph::point(caret, y as f32 + font.ascent()));
            caret += font.h_advance(id);
            let Some(outline) = self.0.outline_glyph(glyph) else { continue };
            let corner = outline.px_bounds().min;
            outline.draw(|dx, dy, cover| {
                let (x, y) = (corner.x as i64 + i64::from(dx), corner.y as i64 + i64::from(dy));
                let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) else { return };
                if let Some(pixel) = image.get_pixel_mut_checked(x, y) {
                    let mix = |below: u8, ink: u8| {
                        (f32::from(below) + cover.min(1.0) * (f32::from(ink) - f32::from(below))).round() as u8
                    };
                    *pixel = Rgb([0, 1, 2].map(|i| mix(pixel[i], color[i])));
                }
            });
        }
    }

    /// The text, shortened at its end to fit.
    fn fitted(&self, text: &str, px: f32, width: u32) -> String {
        if self.width(text, px) <= width {
            return text.to_owned();
        }
        let mut short: Vec<char> = text.chars().collect();
        while !short.is_empty() {
            short.pop();
            let candidate: String = short.iter().chain(['…'].iter()).collect();
            if self.width(&candidate, px) <= width {
                return candidate;
            }
        }
        String::new()
    }
}

/// A picture with a line below it.
pub(crate) struct Tile {
    pub(crate) image: RgbImage,
    pub(crate) caption: String,
    /// Colour of a frame around it.
    pub(crate) frame: Option<Rgb<u8>>,
}

impl Tile {
    pub(crate) fn new(image: RgbImage, caption: impl Into<String>) -> Self {
        Self { image, caption: caption.into(), frame: None }
    }
}

/// Rows of tiles under a title, with a line of explanation and a legend.
pub(crate) struct Sheet {
    pub(crate) title: String,
    pub(crate) note: String,
    pub(crate) rows: Vec<Vec<Tile>>,
    /// Columns that belong together, with more room between them and the next.
    pub(crate) group: usize,
    /// Colours and what they stand for.
    pub(crate) legend: Vec<(Rgb<u8>, String)>,
}

/// Pairs of tiles in rows, two pairs beside each other where one column would make too tall a sheet.
pub(super) fn rows_of_pairs(pairs: Vec<[Tile; 2]>) -> Vec<Vec<Tile>> {
    let per_row = if pairs.len() > 3 { 2 } else { 1 };
    let mut rows: Vec<Vec<Tile>> = Vec::new();
    for (i, pair) in pairs.into_iter().enumerate() {
        if i % per_row == 0 {
            rows.push(Vec::new());
        }
        rows.last_mut().expect("a row").extend(pair);
    }
    rows
}

impl Sheet {
    /// Draws it, each tile `height` pixels high or less, so that the widest is at most twice as wide as it is high.
    pub(crate) fn draw(&self, height: u32) -> anyhow::Result<RgbImage> {
        let pen = Pen::new()?;
        let line = (TEXT_PX * 1.45) as u32;
        let small = (SMALL_PX * 1.5) as u32;
        let size = |tile: &Tile| scaled_size(tile.image.dimensions(), height);
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<u32> = (0..columns)
            .map(|i| self.rows.iter().filter_map(|row| row.get(i)).map(|tile| size(tile).0).max().unwrap_or(0))
            .collect();
        let heights: Vec<u32> =
            self.rows.iter().map(|row| row.iter().map(|tile| size(tile).1).max().unwrap_or(0) + small + GAP).collect();
        // The room before a column.
        let before = |column: usize| match column {
            0 => 0,
            _ if column.is_multiple_of(self.group) => 3 * GAP,
            _ => GAP,
        };
        let tiles = widths.iter().enumerate().map(|(column, width)| before(column) + width).sum::<u32>();
        let titles = pen.width(&self.title, TEXT_PX * 1.25);
        let inner = tiles.max(titles.min(1600)).max(320);
        let note = wrapped(&pen, &self.note, SMALL_PX, inner);
        let legend = self.legend_rows(&pen, inner);
        let top = MARGIN + (TEXT_PX * 1.9) as u32 + note.len() as u32 * small + GAP;
        let bottom = if legend.is_empty() { 0 } else { legend.len() as u32 * line + GAP };
        let mut sheet =
            RgbImage::from_pixel(inner + 2 * MARGIN, top + heights.iter().sum::<u32>() + bottom + MARGIN - GAP, PAPER);
        let title = pen.fitted(&self.title, TEXT_PX * 1.25, inner);
        pen.write(&mut sheet, (MARGIN, MARGIN - 4), TEXT_PX * 1.25, INK, &title);
        for (i, text) in note.iter().enumerate() {
            let at = (MARGIN, MARGIN + (TEXT_PX * 1.7) as u32 + i as u32 * small);
            pen.write(&mut sheet, at, SMALL_PX, FAINT, text);
        }
        let mut y = top;
        for (row, height_of_row) in self.rows.iter().zip(&heights) {
            let mut x = MARGIN;
            for (column, (tile, width)) in row.iter().zip(&widths).enumerate() {
                x += before(column);
                let (tile_width, tile_height) = size(tile);
                let picture = enlarged(&tile.image, (tile_width, tile_height));
                imageops::replace(&mut sheet, &picture, i64::from(x), i64::from(y));
                if let Some(color) = tile.frame {
                    frame(&mut sheet, (x, y), (tile_width, tile_height), color);
                }
                let caption = pen.fitted(&tile.caption, SMALL_PX, *width);
                pen.write(&mut sheet, (x, y + tile_height + 3), SMALL_PX, FAINT, &caption);
                x += width;
            }
            y += height_of_row;
        }
        for row in legend {
            let mut x = MARGIN;
            for (color, text) in row {
                let side = TEXT_PX as u32 - 2;
                for (dx, dy) in (0..side).flat_map(|dx| (0..side).map(move |dy| (dx, dy))) {
                    sheet.put_pixel(x + dx, y + 3 + dy, *color);
                }
                pen.write(&mut sheet, (x + side + 5, y), SMALL_PX, INK, text);
                x += side + 5 + pen.width(text, SMALL_PX) + 2 * GAP;
            }
            y += line;
        }
        Ok(sheet)
    }

    fn legend_rows(&self, pen: &Pen, width: u32) -> Vec<Vec<&(Rgb<u8>, String)>> {
        let (mut rows, mut used): (Vec<Vec<_>>, u32) = (Vec::new(), 0);
        for entry in &self.legend {
            let own = TEXT_PX as u32 + 3 + pen.width(&entry.1, SMALL_PX) + 2 * GAP;
            if rows.is_empty() || used + own > width {
                rows.push(Vec::new());
                used = 0;
            }
            used += own;
            rows.last_mut().expect("a row").push(entry);
        }
        rows
    }

    /// Draws it into a PNG file, which is there whole or not at all.
    pub(crate) fn save(&self, height: u32, path: &Path) -> anyhow::Result<()> {
        let drawn = self.draw(height)?;
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, drawn.width(), drawn.height());
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_compression(png::Compression::High);
        encoder.add_text_chunk("Software".into(), SOFTWARE.into())?;
        encoder.write_header()?.write_image_data(&drawn)?;
        dinoxide_model::weights::write_atomically(path, &bytes).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
    }
}

/// That a picture can be written to `path`, where no other image is, before anything is computed.
pub(crate) fn check_output(path: &Path) -> anyhow::Result<()> {
    check_replaceable(path, "--output", "a picture of `dinoxide viz`", is_drawn)?;
    if path.extension().is_none_or(|extension| !extension.eq_ignore_ascii_case("png")) {
        let message = format!("{}: pictures are written as PNG\n\nhint: end the name in `.png`", path.display());
        return Err(Usage(anyhow::anyhow!(message)).into());
    }
    Ok(())
}

/// Whether a file is a picture that [`Sheet::save`] wrote.
fn is_drawn(file: File) -> bool {
    png::Decoder::new(BufReader::new(file))
        .read_info()
        .is_ok_and(|reader| reader.info().uncompressed_latin1_text.iter().any(|entry| entry.text == SOFTWARE))
}

fn scaled_size((width, height): (u32, u32), to: u32) -> (u32, u32) {
    let scale = (f64::from(to) / f64::from(height)).min(2.0 * f64::from(to) / f64::from(width));
    let scaled = |side: u32| (f64::from(side) * scale).round().max(1.0) as u32;
    (scaled(width), scaled(height))
}

/// Maps are enlarged in whole patches, whose borders stay sharp; photographs are small beside their tiles or larger.
fn enlarged(image: &RgbImage, size: (u32, u32)) -> RgbImage {
    if image.dimensions() == size {
        return image.clone();
    }
    let filter =
        if size.0 >= 3 * image.width() { imageops::FilterType::Nearest } else { imageops::FilterType::CatmullRom };
    imageops::resize(image, size.0, size.1, filter)
}

fn frame(image: &mut RgbImage, (x, y): (u32, u32), (width, height): (u32, u32), color: Rgb<u8>) {
    const THICK: u32 = 4;
    for (dx, dy) in (0..width).flat_map(|dx| (0..height).map(move |dy| (dx, dy))) {
        if dx < THICK || dy < THICK || dx + THICK >= width || dy + THICK >= height {
            image.put_pixel(x + dx, y + dy, color);
        }
    }
}

fn wrapped(pen: &Pen, text: &str, px: f32, width: u32) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if pen.width(&format!("{line} {word}"), px) <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sheet_has_room_for_all_of_its_tiles_and_words() {
        let tile = |width, height| Tile::new(RgbImage::from_pixel(width, height, Rgb([9, 200, 9])), "a caption");
        let sheet = Sheet {
            title: "Title δ".into(),
            note: "words ".repeat(60),
            rows: vec![vec![tile(30, 20), tile(20, 30)], vec![tile(400, 10)]],
            group: 1,
            legend: (0..9).map(|i| (Rgb([i, 0, 0]), format!("class {i}"))).collect(),
        };
        let drawn = sheet.draw(100).unwrap();
        let green = drawn.pixels().filter(|pixel| **pixel == Rgb([9, 200, 9])).count();
        // 150 x 100, 67 x 100, and 200 x 5, which is twice as wide as the tile is high.
        assert_eq!(green, 150 * 100 + 67 * 100 + 200 * 5);
        let title = (0..40).flat_map(|y| (0..200).map(move |x| (x, y)));
        let dark = title.filter(|&(x, y)| drawn.get_pixel(x, y)[0] < 128).count();
        assert!(dark > 50, "the title has {dark} dark pixels");
    }

    #[test]
    fn long_words_are_shortened_and_wrapped() {
        let pen = Pen::new().unwrap();
        let short = pen.fitted("a very long caption of an image", SMALL_PX, 100);
        assert!(short.ends_with('…') && pen.width(&short, SMALL_PX) <= 100, "{short}");
        let lines = wrapped(&pen, "one two three four five six", SMALL_PX, 60);
        assert!(lines.len() > 2 && lines.iter().all(|line| pen.width(line, SMALL_PX) <= 60), "{lines:?}");
    }

    #[test]
    fn places_where_no_picture_can_be_are_refused_and_images_of_others_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let photo = folder.path().join("photo.png");
        RgbImage::from_pixel(3, 2, Rgb([9, 200, 9])).save(&photo).unwrap();
        let before = std::fs::read(&photo).unwrap();
        for (name, part) in [
            ("", "is a folder"),
            ("a.jpg", "hint: end the name in `.png`"),
            ("b/a.png", "no such folder"),
            ("photo.png", "is there and is not a picture of `dinoxide viz`, so it is not overwritten"),
        ] {
            let message = check_output(&folder.path().join(name)).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        assert_eq!(std::fs::read(&photo).unwrap(), before);
        let drawn = folder.path().join("a.PNG");
        for _ in 0..2 {
            check_output(&drawn).unwrap();
            let image = RgbImage::from_pixel(30, 20, Rgb([9, 200, 9]));
            let sheet = Sheet {
                title: "a picture".into(),
                note: String::new(),
                rows: vec![vec![Tile::new(image, String::new())]],
                group: 1,
                legend: Vec::new(),
            };
            sheet.save(40, &drawn).unwrap();
            assert!(image::open(&drawn).unwrap().width() >= 60);
        }
    }
}
