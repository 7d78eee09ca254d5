//! Resizing inside the graph, as multiplication by a matrix computed on the host.
//!
//! burn derives the scale from the sizes, has no antialiasing and differentiates only nearest-neighbour resizing on GPUs.
//! A matrix is differentiable everywhere and leaves every weight to us: PyTorch's two bicubic filters and its treatment of
//! an explicit scale factor, which changes where samples are taken (see [`bicubic`]).

use burn::tensor::{Device, Tensor, TensorData};

/// Weights `[out, in]` (row-major) of a one-dimensional bicubic resize with half-pixel centres.
///
/// Output `i` samples the input at `(i + 0.5)·step − 0.5`. `step` is `in / out` when a size is asked for; when PyTorch is
/// given a scale factor `s` it is `1 / s`, even where `in·s` is not whole.
///
/// Without `antialias`: Keys' cubic with a = −0.75 and clamped borders. With it: a = −0.5, the support grows with the step
/// when shrinking, and weights that fall outside are left out and the rest renormalised, as Pillow does.
pub fn bicubic(input: usize, output: usize, step: f64, antialias: bool) -> Vec<f32> {
    let mut weights = vec![0f32; output * input];
    for (i, row) in weights.chunks_exact_mut(input).enumerate() {
        let at = (i as f64 + 0.5) * step;
        if antialias {
            let stretch = step.max(1.0);
            let support = 2.0 * stretch;
            let first = ((at - support + 0.5).floor().max(0.0)) as usize;
            let last = ((at + support + 0.5).floor().min(input as f64)) as usize;
            let taps: Vec<f64> = (first..last).map(|j| cubic((j as f64 - at + 0.5) / stretch, -0.5)).collect();
            let total: f64 = taps.iter().sum();
            for (j, tap) in (first..last).zip(taps) {
                row[j] = (tap / total) as f32;
            }
        } else {
            let at = at - 0.5;
            let base = at.floor();
            for tap in -1..=2 {
                let j = (base as isize + tap).clamp(0, input as isize - 1) as usize;
                row[j] += cubic(at - base - tap as f64, -0.75) as f32;
            }
        }
    }
    weights
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

/// Applies one matrix along rows and another along columns of a grid of vectors.
///
/// # Shapes
/// `grid [h, w, D]`, `rows [h', h]`, `columns [w', w]` (row-major) → `[h', w', D]`.
pub fn resize(grid: Tensor<3>, rows: Vec<f32>, columns: Vec<f32>, device: &Device) -> Tensor<3> {
    let [h, w, dim] = grid.dims();
    let (out_h, out_w) = (rows.len() / h, columns.len() / w);
    let rows = Tensor::<2>::from_data(TensorData::new(rows, [out_h, h]), device);
    let columns = Tensor::<2>::from_data(TensorData::new(columns, [out_w, w]), device);
    let tall = rows.matmul(grid.reshape([h, w * dim])).reshape([out_h, w, dim]);
    columns.unsqueeze::<3>().matmul(tall)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_sizes_leave_the_values_alone() {
        for antialias in [false, true] {
            let weights = bicubic(5, 5, 1.0, antialias);
            for (i, row) in weights.chunks_exact(5).enumerate() {
                for (j, &w) in row.iter().enumerate() {
                    assert!((w - f32::from(u8::from(i == j))).abs() < 1e-7, "antialias {antialias}, [{i}, {j}] = {w}");
                }
            }
        }
    }

    #[test]
    fn every_row_sums_to_one() {
        let mut rows = 0;
        for (input, output) in [(7, 3), (3, 7), (16, 1), (1, 4), (4, 5)] {
            for antialias in [false, true] {
                for offset in [0.0, 0.1] {
                    for row in bicubic(input, output, input as f64 / (output as f64 + offset), antialias).chunks_exact(input) {
                        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
                        rows += 1;
                    }
                }
            }
        }
        assert_eq!(rows, (3 + 7 + 1 + 4 + 5) * 4);
    }
}
