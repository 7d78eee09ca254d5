//! Bilinear resizing of small grids of scores to the pixels of an image, and its gradient, a row at a time.
//!
//! Pixels are sampled at their centres and places outside have the value of the border, as in PyTorch's `interpolate` with
//! `align_corners=False` and without antialiasing. The scores of all pixels are never held at once.

use rayon::prelude::*;

/// Between which inputs an output lies, and the weight of the second.
struct Taps(Vec<(usize, usize, f32)>);

impl Taps {
    fn new(input: usize, output: usize) -> Self {
        let step = input as f64 / output as f64;
        let taps = (0..output).map(|i| {
            let at = ((i as f64 + 0.5) * step - 0.5).clamp(0.0, (input - 1) as f64);
            let first = at.floor() as usize;
            (first, (first + 1).min(input - 1), (at - first as f64) as f32)
        });
        Self(taps.collect())
    }
}

/// A resize from `from = (rows, columns)` to `to = (height, width)` of `channels` values for each place.
pub(crate) struct Bilinear {
    rows: Taps,
    columns: Taps,
    from: (usize, usize),
    pub(crate) to: (usize, usize),
    channels: usize,
}

impl Bilinear {
    pub(crate) fn new(from: (usize, usize), to: (usize, usize), channels: usize) -> Self {
        Self { rows: Taps::new(from.0, to.0), columns: Taps::new(from.1, to.1), from, to, channels }
    }

    /// The values `[columns, channels]` of a row of pixels, before they are resized along the row.
    fn row(&self, values: &[f32], y: usize, row: &mut [f32]) {
        let width = self.from.1 * self.channels;
        let (first, second, weight) = self.rows.0[y];
        let (first, second) = (&values[first * width..][..width], &values[second * width..][..width]);
        for (out, (a, b)) in row.iter_mut().zip(first.iter().zip(second)) {
            *out = a + weight * (b - a);
        }
    }

    fn pixel(&self, row: &[f32], x: usize, pixel: &mut [f32]) {
        let c = self.channels;
        let (first, second, weight) = self.columns.0[x];
        let (first, second) = (&row[first * c..][..c], &row[second * c..][..c]);
        for (out, (a, b)) in pixel.iter_mut().zip(first.iter().zip(second)) {
            *out = a + weight * (b - a);
        }
    }

    /// What `f` makes of each pixel's values, row by row: `values [rows, columns, channels]` → `[height · width]`.
    pub(crate) fn map<T: Send + Clone + Default>(&self, values: &[f32], f: impl Fn(&[f32]) -> T + Sync) -> Vec<T> {
        let mut out = vec![T::default(); self.to.0 * self.to.1];
        out.par_chunks_mut(self.to.1).enumerate().for_each(|(y, out)| {
            let mut row = vec![0.0; self.from.1 * self.channels];
            let mut pixel = vec![0.0; self.channels];
            self.row(values, y, &mut row);
            for (x, out) in out.iter_mut().enumerate() {
                self.pixel(&row, x, &mut pixel);
                *out = f(&pixel);
            }
        });
        out
    }

    /// Adds the resized values to an image of `stride` pixels a row, from `at = (top, left)` on.
    pub(crate) fn add_to(&self, values: &[f32], sum: &mut [f32], stride: usize, at: (usize, usize)) {
        let c = self.channels;
        sum.par_chunks_mut(stride * c).skip(at.0).take(self.to.0).enumerate().for_each(|(y, sum)| {
            let mut row = vec![0.0; self.from.1 * c];
            let mut pixel = vec![0.0; c];
            self.row(values, y, &mut row);
            for (x, sum) in sum[at.1 * c..].chunks_exact_mut(c).take(self.to.1).enumerate() {
                self.pixel(&row, x, &mut pixel);
                sum.iter_mut().zip(&pixel).for_each(|(sum, value)| *sum += value);
            }
        });
    }

    /// The gradient with respect to `values`, where `f` is given a pixel's number and values and writes the gradient with
    /// respect to those. `[rows, columns, channels]` → the same.
    pub(crate) fn gradient(&self, values: &[f32], mut f: impl FnMut(usize, &[f32], &mut [f32])) -> Vec<f32> {
        let c = self.channels;
        let width = self.from.1 * c;
        let mut gradient = vec![0.0; values.len()];
        let (mut row, mut row_gradient) = (vec![0.0; width], vec![0.0; width]);
        let (mut pixel, mut pixel_gradient) = (vec![0.0; c], vec![0.0; c]);
        for y in 0..self.to.0 {
            self.row(values, y, &mut row);
            row_gradient.fill(0.0);
            for x in 0..self.to.1 {
                self.pixel(&row, x, &mut pixel);
                f(y * self.to.1 + x, &pixel, &mut pixel_gradient);
                let (first, second, weight) = self.columns.0[x];
                for (i, g) in pixel_gradient.iter().enumerate() {
                    row_gradient[first * c + i] += (1.0 - weight) * g;
                    row_gradient[second * c + i] += weight * g;
                }
            }
            let (first, second, weight) = self.rows.0[y];
            for (i, g) in row_gradient.iter().enumerate() {
                gradient[first * width + i] += (1.0 - weight) * g;
                gradient[second * width + i] += weight * g;
            }
        }
        gradient
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Tensor, TensorData};
    use dinoxide_model::interpolation::{Filter, resize_tokens};
    use dinoxide_model::weights::host;

    const CASES: [((usize, usize), (usize, usize)); 5] =
        [((3, 4), (7, 9)), ((5, 2), (3, 6)), ((1, 1), (4, 3)), ((4, 3), (4, 3)), ((2, 6), (16, 5))];

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * i) as f32 * 0.37).sin()).collect()
    }

    #[test]
    fn equals_the_models_resizing_with_a_matrix() {
        for (from, to) in CASES {
            let values = values(from.0 * from.1 * 3);
            let tokens = Tensor::from_data(TensorData::new(values.clone(), [1, from.0 * from.1, 3]), &Device::flex());
            let expected = host(resize_tokens(tokens, from, to, Filter::Bilinear, false).reshape([-1]));
            let bilinear = Bilinear::new(from, to, 3);
            let found: Vec<f32> = bilinear.map(&values, <[f32]>::to_vec).concat();
            let mut sum = vec![1.0; (to.0 + 2) * (to.1 + 3) * 3];
            bilinear.add_to(&values, &mut sum, to.1 + 3, (1, 2));
            for (i, expected) in expected.iter().enumerate() {
                assert!((found[i] - expected).abs() < 1e-6, "{from:?} {to:?}");
                let (y, x, c) = (i / 3 / to.1, i / 3 % to.1, i % 3);
                let at = ((y + 1) * (to.1 + 3) + x + 2) * 3 + c;
                assert!((sum[at] - 1.0 - expected).abs() < 1e-6);
                sum[at] = 1.0;
            }
            assert!(sum.iter().all(|&rest| rest == 1.0), "pixels outside are left alone");
        }
    }

    #[test]
    fn the_gradient_is_the_transpose() {
        // ⟨resize(v), g⟩ = ⟨v, gradient(g)⟩ for every v.
        for (from, to) in CASES {
            let bilinear = Bilinear::new(from, to, 2);
            let upstream = values(to.0 * to.1 * 2 + 5)[5..].to_vec();
            let v = values(from.0 * from.1 * 2);
            let found = bilinear.gradient(&v, |pixel, _, gradient| {
                gradient.copy_from_slice(&upstream[2 * pixel..][..2]);
            });
            let resized: Vec<f32> = bilinear.map(&v, <[f32]>::to_vec).concat();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            assert!((dot(&resized, &upstream) - dot(&v, &found)).abs() < 1e-4, "{from:?} {to:?}");
        }
    }
}
