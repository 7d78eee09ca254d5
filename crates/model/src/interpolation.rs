//! Resizing inside the graph, as multiplication by a matrix computed on the host.
//!
//! burn derives the scale from the sizes, has no antialiasing and differentiates only nearest-neighbour resizing on GPUs.
//! A matrix is differentiable everywhere and leaves every weight to us: PyTorch's filters with and without antialiasing, and
//! its treatment of an explicit scale factor, which changes where samples are taken (see [`weights`]).

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

/// How values between samples are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// A straight line between the two neighbours.
    Bilinear,
    /// Keys' cubic through the four neighbours (Keys 1981): a = −0.75 without antialiasing, −0.5 with it.
    Bicubic,
}

impl Filter {
    /// Inputs within this distance have a weight.
    fn support(self) -> usize {
        match self {
            Filter::Bilinear => 1,
            Filter::Bicubic => 2,
        }
    }

    /// The weight of an input at distance `x` from the sampled place.
    fn weight(self, x: f64, antialias: bool) -> f64 {
        match self {
            Filter::Bilinear => (1.0 - x.abs()).max(0.0),
            Filter::Bicubic => cubic(x, if antialias { -0.5 } else { -0.75 }),
        }
    }
}

/// Keys' cubic convolution kernel with parameter `a` (Keys 1981, eq. 15).
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

/// Weights `[out, in]` (row-major) of a one-dimensional resize with half-pixel centres.
///
/// Output `i` samples the input at `(i + 0.5)·step − 0.5`. `step` is `in / out` when a size is asked for; when PyTorch is
/// given a scale factor `s` it is `1 / s`, even where `in·s` is not whole.
///
/// Without `antialias`, places outside the input have the value of its border. With it, the support grows with the step when
/// shrinking, and weights that fall outside are left out and the rest renormalised, as Pillow does.
pub fn weights(filter: Filter, input: usize, output: usize, step: f64, antialias: bool) -> Vec<f32> {
    let mut weights = vec![0f32; output * input];
    for (i, row) in weights.chunks_exact_mut(input).enumerate() {
        let at = (i as f64 + 0.5) * step;
        if antialias {
            let stretch = step.max(1.0);
            let support = filter.support() as f64 * stretch;
            let first = ((at - support + 0.5).floor().max(0.0)) as usize;
            let last = ((at + support + 0.5).floor().min(input as f64)) as usize;
            let taps: Vec<f64> = (first..last).map(|j| filter.weight((j as f64 - at + 0.5) / stretch, true)).collect();
            let total: f64 = taps.iter().sum();
            for (j, tap) in (first..last).zip(taps) {
                row[j] = (tap / total) as f32;
            }
        } else {
            let at = at - 0.5;
            let base = at.floor();
            let support = filter.support() as isize;
            for tap in 1 - support..=support {
                let j = (base as isize + tap).clamp(0, input as isize - 1) as usize;
                row[j] += filter.weight(at - base - tap as f64, false) as f32;
            }
        }
    }
    weights
}

/// Applies one matrix along rows and another along columns of grids of vectors.
///
/// # Shapes
/// `grids [B, h, w, D]`, `rows [h', h]`, `columns [w', w]` (row-major) → `[B, h', w', D]`.
pub fn resize(grids: Tensor<4>, rows: Vec<f32>, columns: Vec<f32>) -> Tensor<4> {
    let [batch, h, w, dim] = grids.dims();
    let (out_h, out_w) = (rows.len() / h, columns.len() / w);
    let device = grids.device();
    let rows = Tensor::<3>::from_data(TensorData::new(rows, [1, out_h, h]), &device);
    let columns = Tensor::<3>::from_data(TensorData::new(columns, [1, out_w, w]), &device);
    let tall = rows.matmul(grids.reshape([batch, h, w * dim])).reshape([batch * out_h, w, dim]);
    columns.matmul(tall).reshape([batch, out_h, out_w, dim])
}

/// Patch tokens on another grid, both grids `(rows, columns)`.
///
/// # Shapes
/// `[B, h·w, D]` → `[B, h'·w', D]`, rows of patches first.
pub fn resize_tokens(
    tokens: Tensor<3>,
    from: (usize, usize),
    to: (usize, usize),
    filter: Filter,
    antialias: bool,
) -> Tensor<3> {
    if from == to {
        return tokens;
    }
    let [batch, _, dim] = tokens.dims();
    let matrix = |from: usize, to: usize| weights(filter, from, to, from as f64 / to as f64, antialias);
    let grids = tokens.reshape([batch, from.0, from.1, dim]);
    resize(grids, matrix(from.0, to.0), matrix(from.1, to.1)).reshape([batch, to.0 * to.1, dim])
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    const FILTERS: [Filter; 2] = [Filter::Bilinear, Filter::Bicubic];

    #[test]
    fn equal_sizes_leave_the_values_alone() {
        for filter in FILTERS {
            for antialias in [false, true] {
                let weights = weights(filter, 5, 5, 1.0, antialias);
                for (i, row) in weights.chunks_exact(5).enumerate() {
                    for (j, &w) in row.iter().enumerate() {
                        assert!(
                            (w - f32::from(u8::from(i == j))).abs() < 1e-7,
                            "{filter:?} {antialias}, [{i}, {j}] = {w}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_row_sums_to_one() {
        let mut rows = 0;
        for (input, output) in [(7, 3), (3, 7), (16, 1), (1, 4), (4, 5)] {
            for (filter, antialias) in FILTERS.into_iter().flat_map(|f| [(f, false), (f, true)]) {
                for offset in [0.0, 0.1] {
                    let step = input as f64 / (output as f64 + offset);
                    for row in weights(filter, input, output, step, antialias).chunks_exact(input) {
                        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
                        rows += 1;
                    }
                }
            }
        }
        assert_eq!(rows, (3 + 7 + 1 + 4 + 5) * 8);
    }

    #[test]
    fn bilinear_weights_by_hand() {
        assert_eq!(weights(Filter::Bilinear, 2, 4, 0.5, false), [1.0, 0.0, 0.75, 0.25, 0.25, 0.75, 0.0, 1.0]);
        // Without antialiasing a value between the second and the third; with it, all four in a triangle of twice the width.
        assert_eq!(weights(Filter::Bilinear, 4, 1, 4.0, false), [0.0, 0.5, 0.5, 0.0]);
        assert_eq!(weights(Filter::Bilinear, 4, 1, 4.0, true), [5.0 / 24.0, 7.0 / 24.0, 7.0 / 24.0, 5.0 / 24.0]);
    }

    #[test]
    fn tokens_keep_their_rows_columns_and_images_apart() {
        // Image b holds 100·b + 10·row + column, which bilinear resizing keeps linear away from the borders.
        let value = |b: usize, r: f32, c: f32| 100.0 * b as f32 + 10.0 * r + c;
        let tokens: Vec<f32> =
            (0..2).flat_map(|b| (0..3 * 2).map(move |i| value(b, (i / 2) as f32, (i % 2) as f32))).collect();
        let tokens = Tensor::from_data(TensorData::new(tokens, [2, 6, 1]), &Device::flex());
        let found = resize_tokens(tokens, (3, 2), (6, 4), Filter::Bilinear, false);
        assert_eq!(found.dims(), [2, 24, 1]);
        let found: Vec<f32> = found.into_data().try_to_vec().expect("f32");
        // Row 3 samples at 1.25, column 2 at 0.75.
        assert!((found[24 + 3 * 4 + 2] - value(1, 1.25, 0.75)).abs() < 1e-4);
        assert!((found[2 * 4 + 1] - value(0, 0.75, 0.25)).abs() < 1e-4);
    }
}
