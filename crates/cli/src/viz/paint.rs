//! Colours for numbers and classes.

use image::{Rgb, RgbImage};

/// Numbers of a grid as colours from dark to bright, the least and the greatest at the ends.
pub(crate) fn heat(values: &[f32], (rows, columns): (usize, usize), range: (f32, f32)) -> RgbImage {
    let span = (range.1 - range.0).max(f32::MIN_POSITIVE);
    RgbImage::from_fn(columns as u32, rows as u32, |x, y| {
        let value = values[y as usize * columns + x as usize];
        gradient(colorous::INFERNO, (value - range.0) / span)
    })
}

/// Depth as colours, near ones warm; where it is not known (0), gray.
pub(crate) fn distance(depth: &[f32], width: u32, range: (f32, f32)) -> RgbImage {
    let span = (range.1 - range.0).max(f32::MIN_POSITIVE);
    RgbImage::from_fn(width, depth.len() as u32 / width, |x, y| {
        let value = depth[(y * width + x) as usize];
        if value > 0.0 { gradient(colorous::TURBO, 1.0 - (value - range.0) / span) } else { Rgb([70, 70, 70]) }
    })
}

fn gradient(gradient: colorous::Gradient, at: f32) -> Rgb<u8> {
    let color = gradient.eval_continuous(f64::from(at.clamp(0.0, 1.0)));
    Rgb([color.r, color.g, color.b])
}

/// The least and the greatest of finite numbers.
pub(crate) fn range(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(least, most), &v| (least.min(v), most.max(v)))
}

/// A colour for a class, unlike those of the classes before it.
pub(crate) fn class_color(class: usize) -> Rgb<u8> {
    const FIRST: [[u8; 3]; 12] = [
        [78, 121, 167],
        [242, 142, 43],
        [89, 161, 79],
        [225, 87, 89],
        [176, 122, 161],
        [237, 201, 72],
        [118, 183, 178],
        [255, 157, 167],
        [156, 117, 95],
        [60, 200, 235],
        [200, 230, 90],
        [130, 90, 240],
    ];
    match FIRST.get(class) {
        Some(&color) => Rgb(color),
        // Around the circle of hues by the golden angle, in three degrees of brightness.
        None => {
            let color = colorous::SINEBOW.eval_continuous((class as f64 * 0.618_034).fract());
            let shade = |v: u8| (f64::from(v) * [1.0, 0.75, 0.55][class % 3]) as u8;
            Rgb([shade(color.r), shade(color.g), shade(color.b)])
        }
    }
}

/// Classes laid over an image; pixels of the class `void` stay as they are, but darker.
pub(crate) fn overlay(image: &RgbImage, classes: &[u32], void: u32) -> RgbImage {
    let mut out = image.clone();
    for (pixel, &class) in out.pixels_mut().zip(classes) {
        let gray = pixel.0.iter().map(|&v| f32::from(v)).sum::<f32>() / 3.0;
        *pixel = if class == void {
            Rgb([(gray * 0.35) as u8; 3])
        } else {
            let color = class_color(class as usize);
            Rgb([0, 1, 2].map(|i| (0.35 * gray + 0.65 * f32::from(color[i])) as u8))
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_hundred_classes_have_colours_of_their_own() {
        let colors: std::collections::BTreeSet<[u8; 3]> = (0..100).map(|class| class_color(class).0).collect();
        assert_eq!(colors.len(), 100);
    }

    #[test]
    fn ends_of_a_range_are_ends_of_the_gradient() {
        let map = heat(&[1.0, 3.0, 2.0, 1.0, 1.0, 1.0], (2, 3), range(&[1.0, 3.0]));
        assert_eq!(map.dimensions(), (3, 2));
        let brightness = |x| map.get_pixel(x, 0).0.iter().map(|&v| u32::from(v)).sum::<u32>();
        assert!(brightness(0) < 20 && brightness(1) > brightness(2) && brightness(2) > 100);
        assert_eq!(distance(&[0.0, 1.0], 2, (0.5, 2.0)).get_pixel(0, 0), &Rgb([70; 3]));
    }
}
