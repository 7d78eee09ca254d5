//! Gaussian blur in its two published forms: nine taps (DINOv2, DINOv3) and Pillow's repeated box blur (DINO, iBOT).

use image::RgbImage;
use serde::{Deserialize, Serialize};

/// Which approximation of the Gaussian is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlurKind {
    /// A separable kernel of nine taps, the image mirrored at its edges (without repeating the edge pixel). For
    /// `sigma` above about 1.5 the tails are cut. DINOv2, DINOv3.
    #[default]
    Gaussian9,
    /// Three passes of a box blur of fractional width per axis, the edge pixel repeated, rounding to 8 bits after each
    /// pass (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering"). This is
    /// Pillow's `GaussianBlur`, of radius `sigma`. DINO, iBOT.
    Pil,
}

/// Blurs images, keeping its buffers between calls.
#[derive(Clone, Debug, Default)]
pub struct Blur {
    /// The image before the blur, or between its two axes.
    source: Vec<u8>,
    /// One row with its padding, in 1/128 levels.
    row: Vec<u16>,
    /// One row with its padding, in levels.
    bytes: Vec<u8>,
    /// Sums under the box of one row.
    sums: Vec<u32>,
}

impl Blur {
    /// Blurs the image in place with standard deviation `sigma`, in pixels.
    ///
    /// # Panics
    /// If `sigma` is not positive and finite.
    pub fn apply(&mut self, image: &mut RgbImage, kind: BlurKind, sigma: f64) {
        assert!(sigma > 0.0 && sigma.is_finite(), "blur sigma is {sigma}, must be positive and finite");
        if image.is_empty() {
            return;
        }
        match kind {
            BlurKind::Gaussian9 => self.gaussian9(image, sigma),
            BlurKind::Pil => self.extended_box(image, sigma),
        }
    }

    /// Both axes row by row: nine rows are combined into one row of 16-bit values, that row along itself into bytes.
    fn gaussian9(&mut self, image: &mut RgbImage, sigma: f64) {
        let (width, height) = (image.width() as usize, image.height() as usize);
        let (stride, weights) = (3 * width, gaussian9_weights(sigma));
        // Blocks may reach beyond the last value of a row, into the next one or into these buffers' ends.
        self.source.clear();
        self.source.extend_from_slice(image);
        self.source.resize(stride * height + LANES, 0);
        self.row.resize(stride + 6 * RADIUS + LANES, 0);

        for (y, out) in image.chunks_exact_mut(stride).enumerate() {
            let rows: [&[u8]; TAPS] = std::array::from_fn(|tap| {
                &self.source[mirrored(y as isize + tap as isize - RADIUS as isize, height) * stride..]
            });
            for at in (0..stride).step_by(LANES) {
                let across = weighted_sum(&weights, |tap| lanes(&rows[tap][at..]).map(|v| u16::from(v) << 7));
                self.row[3 * RADIUS + at..][..LANES].copy_from_slice(&across);
            }
            for distance in 1..=RADIUS {
                let left = 3 * (RADIUS + mirrored(-(distance as isize), width));
                self.row.copy_within(left..left + 3, 3 * (RADIUS - distance));
                let right = 3 * (RADIUS + mirrored((width - 1 + distance) as isize, width));
                self.row.copy_within(right..right + 3, 3 * (RADIUS + width - 1 + distance));
            }
            for (block, out) in out.chunks_mut(LANES).enumerate() {
                let along = weighted_sum(&weights, |tap| lanes(&self.row[block * LANES + 3 * tap..]));
                // Each of the ten products of the two axes was cut by half a unit on average.
                let levels = along.map(|v| ((v + 64 + 5) >> 7) as u8);
                out.copy_from_slice(&levels[..out.len()]);
            }
        }
    }

    /// Three passes along the rows, then three along the columns.
    fn extended_box(&mut self, image: &mut RgbImage, sigma: f64) {
        const PASSES: usize = 3;
        let (width, height) = (image.width() as usize, image.height() as usize);
        let stride = 3 * width;
        let filter = ExtendedBox::of_sigma(sigma as f32, PASSES as f32);
        let reach = filter.radius + 1;
        self.sums.resize(stride, 0);

        self.bytes.resize(stride + 6 * reach, 0);
        for row in image.chunks_exact_mut(stride) {
            for _ in 0..PASSES {
                let (before, rest) = self.bytes.split_at_mut(3 * reach);
                let (middle, after) = rest.split_at_mut(stride);
                middle.copy_from_slice(row);
                before.as_chunks_mut().0.fill([row[0], row[1], row[2]]);
                after.as_chunks_mut().0.fill([row[stride - 3], row[stride - 2], row[stride - 1]]);
                let bytes = &self.bytes;
                filter.apply(|offset| &bytes[(3 * reach).wrapping_add_signed(3 * offset)..], &mut self.sums, row);
            }
        }
        for _ in 0..PASSES {
            self.source.clear();
            self.source.extend_from_slice(image);
            let source = &self.source;
            for (y, out) in image.chunks_exact_mut(stride).enumerate() {
                let row = |offset| &source[y.saturating_add_signed(offset).min(height - 1) * stride..];
                filter.apply(row, &mut self.sums, out);
            }
        }
    }
}

/// Taps on either side of the centre.
const RADIUS: usize = 4;
const TAPS: usize = 2 * RADIUS + 1;

/// `wₖ ∝ exp(−k²/2σ²)` for k = 0…4, so that the nine taps sum to one, in units of 2⁻¹⁶. A centre weight of one, which
/// has no 16-bit form, loses one unit.
fn gaussian9_weights(sigma: f64) -> [u16; RADIUS + 1] {
    let density: [f64; RADIUS + 1] = std::array::from_fn(|k| (-0.5 * (k as f64 / sigma).powi(2)).exp());
    let sum = density[0] + 2.0 * density[1..].iter().sum::<f64>();
    density.map(|d| (d / sum * 65536.0).round().min(65535.0) as u16)
}

/// `position` mirrored into `0..len` at the first and the last element, as often as needed.
fn mirrored(position: isize, len: usize) -> usize {
    let last = len as isize - 1;
    if last == 0 {
        return 0;
    }
    let wrapped = position.rem_euclid(2 * last);
    wrapped.min(2 * last - wrapped) as usize
}

/// Values computed at a time: fixed, so that the compiler keeps them in vector registers.
const LANES: usize = 16;

fn lanes<T: Copy>(values: &[T]) -> [T; LANES] {
    *values.first_chunk().expect("buffers are padded by a block")
}

/// Weighted sum of nine taps of values in 1/128 levels, of which two at a time just fit 16 bits. Each product is cut to
/// whole units, which takes one instruction per vector.
fn weighted_sum(weights: &[u16; RADIUS + 1], tap: impl Fn(usize) -> [u16; LANES]) -> [u16; LANES] {
    let times = |value: u16, weight: u16| ((u32::from(value) * u32::from(weight)) >> 16) as u16;
    let mut sum = tap(RADIUS).map(|v| times(v, weights[0]));
    for (k, &weight) in weights.iter().enumerate().skip(1) {
        let (before, after) = (tap(RADIUS - k), tap(RADIUS + k));
        for lane in 0..LANES {
            sum[lane] += times(before[lane] + after[lane], weight);
        }
    }
    sum
}

/// A box of `2·radius + 1` whole pixels and a fraction of the next one on either side.
struct ExtendedBox {
    radius: usize,
    /// Weight of a whole pixel, in units of 2⁻²⁴.
    whole: u32,
    /// Weight of the two outermost pixels, in units of 2⁻²⁴.
    outermost: u32,
}

impl ExtendedBox {
    /// The box that, applied `passes` times, has the variance of a Gaussian of standard deviation `sigma`.
    fn of_sigma(sigma: f32, passes: f32) -> Self {
        let variance = sigma * sigma / passes;
        // The integral part is that of the ideal, unweighted box: (2l + 1)² − 1 ≤ 12·variance.
        let width = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
        let integral = ((f64::from(width) - 1.0) / 2.0).floor() as f32;
        let fraction = (2.0 * integral + 1.0) * (integral * (integral + 1.0) - 3.0 * variance)
            / (6.0 * (variance - (integral + 1.0) * (integral + 1.0)));
        let radius = integral + fraction;

        let unit = 1u32 << 24;
        let whole = (unit as f32 / (radius * 2.0 + 1.0)) as u32;
        let inside = 2 * radius as u32 + 1;
        Self { radius: radius as usize, whole, outermost: (unit - inside * whole) / 2 }
    }

    /// `out[i] = whole·Σ source(j)[i] + outermost·(source(−radius−1)[i] + source(radius+1)[i])`, j from −radius to
    /// radius, rounded; `source(j)` is the line of pixels displaced by `j`.
    fn apply<'a>(&self, source: impl Fn(isize) -> &'a [u8], sums: &mut [u32], out: &mut [u8]) {
        let radius = self.radius as isize;
        let len = out.len();
        sums.fill(0);
        for offset in -radius..=radius {
            for (sum, &v) in sums.iter_mut().zip(&source(offset)[..len]) {
                *sum += u32::from(v);
            }
        }
        let (first, last) = (&source(-radius - 1)[..len], &source(radius + 1)[..len]);
        for (((out, &sum), &first), &last) in out.iter_mut().zip(&*sums).zip(first).zip(last) {
            let outermost = u32::from(first) + u32::from(last);
            *out = ((sum * self.whole + outermost * self.outermost + (1 << 23)) >> 24) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(width: u32, height: u32) -> RgbImage {
        let mut state = 1u32;
        RgbImage::from_fn(width, height, |_, _| {
            image::Rgb([0; 3].map(|_: u8| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            }))
        })
    }

    /// The nine taps on both axes in double precision, pixel by pixel.
    fn naive_gaussian9(image: &RgbImage, sigma: f64) -> Vec<f64> {
        let weight = |k: isize| (-0.5 * (k as f64 / sigma).powi(2)).exp();
        let total: f64 = (-4..=4).map(weight).sum();
        let (width, height) = (image.width() as isize, image.height() as isize);
        let mirror = |mut i: isize, len: isize| {
            while i < 0 || i >= len {
                i = if len == 1 {
                    0
                } else if i < 0 {
                    -i
                } else {
                    2 * (len - 1) - i
                };
            }
            i as u32
        };
        let mut out = Vec::new();
        for y in 0..height {
            for x in 0..width {
                for channel in 0..3 {
                    let mut sum = 0.0;
                    for dy in -4..=4 {
                        for dx in -4..=4 {
                            let pixel = image.get_pixel(mirror(x + dx, width), mirror(y + dy, height));
                            sum += weight(dx) * weight(dy) * f64::from(pixel[channel]);
                        }
                    }
                    out.push(sum / (total * total));
                }
            }
        }
        out
    }

    #[test]
    fn nine_taps_equal_the_naive_sum_on_every_shape() {
        let mut blur = Blur::default();
        for (width, height) in [(13, 7), (4, 11), (1, 9), (9, 1), (1, 1), (2, 3)] {
            for sigma in [0.1, 0.5, 1.3, 2.0, 50.0] {
                let image = noise(width, height);
                let mut blurred = image.clone();
                blur.apply(&mut blurred, BlurKind::Gaussian9, sigma);
                for (&found, expected) in blurred.iter().zip(naive_gaussian9(&image, sigma)) {
                    let error = (f64::from(found) - expected).abs();
                    assert!(error <= 0.55, "{width}x{height}, sigma {sigma}: {found} for {expected}");
                }
            }
        }
    }

    #[test]
    fn a_flat_image_stays_flat() {
        let mut blur = Blur::default();
        for kind in [BlurKind::Gaussian9, BlurKind::Pil] {
            for sigma in [0.1, 0.9, 2.0, 7.0] {
                for level in [0, 1, 100, 254, 255] {
                    let mut image = RgbImage::from_pixel(11, 6, image::Rgb([level; 3]));
                    blur.apply(&mut image, kind, sigma);
                    assert!(image.iter().all(|&v| v == level), "{kind:?}, sigma {sigma}, level {level}");
                }
            }
        }
    }

    /// Variance along x of the response to a vertical line, in squared pixels.
    fn variance_of_response(kind: BlurKind, sigma: f64) -> f64 {
        let mut image = RgbImage::new(41, 5);
        (0..5).for_each(|y| image.put_pixel(20, y, image::Rgb([255; 3])));
        Blur::default().apply(&mut image, kind, sigma);
        let weights: Vec<f64> = (0..41).map(|x| f64::from(image.get_pixel(x, 2)[1])).collect();
        let squares: f64 = weights.iter().enumerate().map(|(x, w)| w * (x as f64 - 20.0).powi(2)).sum();
        squares / weights.iter().sum::<f64>()
    }

    #[test]
    fn the_response_has_the_variance_asked_for() {
        for (kind, sigma) in
            [(BlurKind::Gaussian9, 0.7), (BlurKind::Gaussian9, 1.2), (BlurKind::Pil, 1.0), (BlurKind::Pil, 2.0)]
        {
            let variance = variance_of_response(kind, sigma);
            assert!((variance / (sigma * sigma) - 1.0).abs() < 0.05, "{kind:?}: {variance} for sigma {sigma}");
        }
    }

    #[test]
    fn box_blur_repeats_the_edge_on_images_smaller_than_the_box() {
        let mut blur = Blur::default();
        for (width, height) in [(1, 1), (1, 6), (5, 1), (2, 2)] {
            let mut image = noise(width, height);
            let (low, high) = (*image.iter().min().unwrap(), *image.iter().max().unwrap());
            blur.apply(&mut image, BlurKind::Pil, 6.0);
            assert!(image.iter().all(|v| (low..=high).contains(v)), "{width}x{height}");
        }
        let mut single = noise(1, 1);
        blur.apply(&mut single, BlurKind::Pil, 6.0);
        assert_eq!(single, noise(1, 1));
    }
}
