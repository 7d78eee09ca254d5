//! Rotation of the hue, by way of 8-bit HSV as Pillow converts it.
//!
//! RGB → HSV → RGB with hue and saturation held in 8 bits is lossy by a few levels even for a shift of zero. The
//! published recipes were trained with that loss, so it is reproduced, including how the intermediate values round. The
//! hue of a pixel depends on the order of its channels and on two numbers below 256, so it is tabulated once.

use std::sync::LazyLock;

use image::RgbImage;

use crate::pixel::pixels_mut;

/// Adds `shift` turns of the colour circle to the hue: `H → (H + trunc(255·shift)) mod 256` with `H` the 8-bit hue.
/// Grey pixels do not change.
pub fn hue(image: &mut RgbImage, shift: f64) {
    let steps = ((shift * 255.0) as i32).rem_euclid(256) as u8;
    let tables = &*TABLES;
    for pixel in pixels_mut(image) {
        *pixel = tables.rotate(*pixel, steps);
    }
}

static TABLES: LazyLock<Tables> = LazyLock::new(Tables::new);

/// Entries of a table over `0 ≤ column ≤ row ≤ 255`.
const TRIANGLE: usize = 256 * 257 / 2;

/// Where a table over `column ≤ row` has its entry.
fn triangle(row: u8, column: u8) -> usize {
    let row = usize::from(row);
    row * (row + 1) / 2 + usize::from(column)
}

struct Tables {
    /// 8-bit hue by order of the channels (see [`order`]) and by [`triangle`] of `max − min` and `max − mid`.
    hue: Vec<[u8; TRIANGLE]>,
    /// Fraction `max − min` of `max`, in 8 bits and back, by [`triangle`] of the two.
    saturation: Vec<f32>,
    /// By 8-bit hue: where on the circle it lies.
    circle: [Circle; 256],
}

/// A position on the colour circle: the channels' order in this sixth, and how far into it.
#[derive(Clone, Copy)]
struct Circle {
    /// For r, g, b: the index into `[max, min, falling, rising]`.
    channels: [u8; 3],
    /// Fraction of the sixth passed, in `[0, 1)`.
    passed: f32,
}

impl Tables {
    fn new() -> Self {
        let mut hue = vec![[0; TRIANGLE]; 6];
        let mut saturation = vec![0.0; TRIANGLE];
        for row in 1..=255u8 {
            for column in 0..=row {
                let ratio = f32::from(column) / f32::from(row);
                let at = triangle(row, column);
                hue.iter_mut().enumerate().for_each(|(order, table)| table[at] = hue_of(order, ratio));
                saturation[at] = (f64::from((f64::from(ratio) * 255.0) as u8) / 255.0) as f32;
            }
        }
        Self { hue, saturation, circle: std::array::from_fn(|hue| Circle::at(hue as u8)) }
    }

    fn rotate(&self, pixel: [u8; 3], steps: u8) -> [u8; 3] {
        let [r, g, b] = pixel;
        let (max, min) = (r.max(g).max(b), r.min(g).min(b));
        let chroma = max - min;
        if chroma == 0 {
            return pixel;
        }
        let saturation = self.saturation[triangle(max, chroma)];
        let mid = (u16::from(r) + u16::from(g) + u16::from(b) - u16::from(max) - u16::from(min)) as u8;
        let hue = self.hue[order(pixel, max, min)][triangle(chroma, max - mid)];

        let Circle { channels, passed } = self.circle[usize::from(hue.wrapping_add(steps))];
        let value = f64::from(max);
        // Rounds half up: next to 2²⁰ the upper word of a double ends at the units.
        let level = |lost: f64| ((value * (1.0 - lost) + (f64::from(1 << 20) + 0.5)).to_bits() >> 32) as u8;
        let levels = [
            max,
            level(f64::from(saturation)),
            level(f64::from(saturation * passed)),
            level(f64::from(saturation) * (1.0 - f64::from(passed))),
        ];
        channels.map(|channel| levels[usize::from(channel)])
    }
}

/// Which of the six orders of its channels a pixel has: by the largest (r, else g, else b), then by the smallest.
fn order([r, g, b]: [u8; 3], max: u8, min: u8) -> usize {
    if r == max {
        usize::from(b != min)
    } else if g == max {
        2 + usize::from(b != min)
    } else {
        4 + usize::from(r != min)
    }
}

/// The 8-bit hue for an [`order`] of channels and `t = (max − mid)/(max − min)` in `[0, 1]`.
fn hue_of(order: usize, t: f32) -> u8 {
    // Sixths of the circle, from −1 (between magenta and red) to 5.
    let sixths = match order {
        0 => 1.0 - t,
        1 => t - 1.0,
        2 => 1.0 + t,
        3 => 3.0 - t,
        4 => 3.0 + t,
        _ => 5.0 - t,
    };
    let turns = ((f64::from(sixths) / 6.0 + 1.0) % 1.0) as f32;
    (f64::from(turns) * 255.0) as u8
}

impl Circle {
    fn at(hue: u8) -> Self {
        const MAX: u8 = 0;
        const MIN: u8 = 1;
        const FALLING: u8 = 2;
        const RISING: u8 = 3;
        let sixths = f64::from(hue) * 6.0 / 255.0;
        let channels = match sixths.floor() as u8 % 6 {
            0 => [MAX, RISING, MIN],
            1 => [FALLING, MAX, MIN],
            2 => [MIN, MAX, RISING],
            3 => [MIN, FALLING, MAX],
            4 => [RISING, MIN, MAX],
            _ => [MAX, MIN, FALLING],
        };
        Self { channels, passed: (sixths - sixths.floor()) as f32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotated(pixel: [u8; 3], shift: f64) -> [u8; 3] {
        let mut image = RgbImage::from_raw(1, 1, pixel.to_vec()).unwrap();
        hue(&mut image, shift);
        image[(0, 0)].0
    }

    #[test]
    fn thirds_of_the_circle_exchange_the_primaries() {
        assert_eq!(rotated([255, 0, 0], 1.0 / 3.0), [0, 255, 0]);
        assert_eq!(rotated([255, 0, 0], -1.0 / 3.0), [6, 0, 255], "trunc(−85) + 256 is 171, one step past blue");
        assert_eq!(rotated([0, 255, 0], 1.0 / 3.0), [0, 0, 255]);
    }

    #[test]
    fn grey_and_black_stay() {
        for level in [0, 1, 127, 255] {
            assert_eq!(rotated([level; 3], 0.37), [level; 3]);
        }
    }

    /// The textbook conversion in double precision, hue in sixths of the circle.
    fn sixths_of([r, g, b]: [u8; 3]) -> f64 {
        let [r, g, b] = [r, g, b].map(f64::from);
        let (max, min) = (r.max(g).max(b), r.min(g).min(b));
        let sixths = if max == r {
            (g - b) / (max - min)
        } else if max == g {
            2.0 + (b - r) / (max - min)
        } else {
            4.0 + (r - g) / (max - min)
        };
        sixths.rem_euclid(6.0)
    }

    #[test]
    fn the_hue_table_is_the_textbook_hue_rounded_down() {
        let mut seen = [0; 6];
        for r in (0..=255).step_by(5) {
            for g in (0..=255).step_by(3) {
                for b in (0..=255).step_by(7) {
                    let pixel = [r, g, b];
                    let (max, min) = (r.max(g).max(b), r.min(g).min(b));
                    if max == min {
                        continue;
                    }
                    let mid = (i32::from(r) + i32::from(g) + i32::from(b) - i32::from(max) - i32::from(min)) as u8;
                    let order = order(pixel, max, min);
                    let found = TABLES.hue[order][triangle(max - min, max - mid)];
                    let exact = sixths_of(pixel) * 42.5;
                    // At an exact integer single precision may fall on either side of it.
                    let below = exact - f64::from(found);
                    assert!((-1e-4..1.0001).contains(&below), "{pixel:?}: {found} for {exact}");
                    seen[order] += 1;
                }
            }
        }
        assert!(seen.iter().all(|&count| count > 1000), "{seen:?}");
    }

    #[test]
    fn a_shift_and_its_inverse_return_close_to_the_start() {
        for pixel in [[200, 30, 90], [12, 240, 77], [90, 91, 250], [180, 179, 20]] {
            let back = rotated(rotated(pixel, 0.1), -0.1);
            let worst = back.iter().zip(pixel).map(|(&a, b)| a.abs_diff(b)).max().unwrap();
            assert!(worst <= 8, "{pixel:?} came back as {back:?}");
        }
    }
}
