//! Layer normalisation, one pass over the rows in each direction.
//!
//! With `r = 1/√(var + eps)`, `x̂ = (x − mean)·r`, `g` the gradient of the result and `a = g·weight`:
//! `dx = r·(a − mean(a) − x̂·mean(a·x̂))`, `dweight = Σ_rows g·x̂`, `dbias = Σ_rows g`. The statistics of a row are computed
//! again in the backward pass: the row has to be read there anyway, and is in the first level of cache.

use burn::backend::flex::FlexTensor;

use super::operation::Operation;
use super::{ROW_BLOCK, contiguous, dims2, elements, in_order, simd, tensor, transform, transform_with};

/// Inputs `x [M, D]`, `weight [D]`, `bias [D]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerNorm {
    /// Added to the variance.
    pub(crate) eps: f64,
}

impl Operation<3> for LayerNorm {
    fn forward(&self, [x, weight, bias]: [FlexTensor; 3]) -> FlexTensor {
        let [rows, width] = dims2(&x);
        let (weight, bias) = (contiguous(weight), contiguous(bias));
        let (weight, bias) = (elements(&weight), elements(&bias));
        assert!(
            weight.len() == width && bias.len() == width,
            "layer_norm: x [{rows}, {width}], weight [{}] and bias [{}]",
            weight.len(),
            bias.len()
        );
        let eps = self.eps as f32;
        transform(x, ROW_BLOCK * width.max(1), |_, block| {
            simd::vectorized(
                #[inline(always)]
                || {
                    for row in block.chunks_exact_mut(width) {
                        normalize(row, weight, bias, eps);
                    }
                },
            );
        })
    }

    fn reads(&self, _: [bool; 3]) -> [bool; 3] {
        [true, true, false]
    }

    fn backward(
        &self,
        [x, weight, _]: [Option<FlexTensor>; 3],
        grad: FlexTensor,
        [for_x, for_weight, for_bias]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let (x, weight) = (contiguous(x.expect("x is kept")), contiguous(weight.expect("the weight is kept")));
        let (x, weight) = (elements(&x), elements(&weight));
        let [rows, width] = dims2(&grad);
        let eps = self.eps as f32;
        // The sums of a block for the weight and, behind them, for the bias.
        let mut partial = vec![0.0; rows.div_ceil(ROW_BLOCK) * 2 * width];
        let dx = transform_with(grad, ROW_BLOCK * width.max(1), &mut partial, 2 * width, |start, block, sums| {
            let (dweight, dbias) = sums.split_at_mut(width);
            simd::vectorized(
                #[inline(always)]
                || {
                    for (x, g) in x[start..].chunks_exact(width).zip(block.chunks_exact_mut(width)) {
                        row_backward(x, g, weight, dweight, dbias, eps);
                    }
                },
            );
        });
        let mut dweight = in_order(&partial, 2 * width);
        let dbias = dweight.split_off(width);
        [for_x.then_some(dx), for_weight.then(|| tensor(dweight, [width])), for_bias.then(|| tensor(dbias, [width]))]
    }
}

/// Mean and `1/√(var + eps)` of a row.
#[inline(always)]
fn statistics(row: &[f32], eps: f32) -> (f32, f32) {
    let mean = simd::sum(row) / row.len() as f32;
    let variance = simd::squared_distance(row, mean) / row.len() as f32;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// Normalises a row in its place.
#[inline(always)]
pub(super) fn normalize(row: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let (mean, inv_std) = statistics(row, eps);
    for ((x, w), b) in row.iter_mut().zip(weight).zip(bias) {
        *x = ((*x - mean) * inv_std).mul_add(*w, *b);
    }
}

/// Replaces the gradient `g` of a row of the result by that of the row `x`, and adds to the sums.
#[inline(always)]
pub(super) fn row_backward(x: &[f32], g: &mut [f32], weight: &[f32], dweight: &mut [f32], dbias: &mut [f32], eps: f32) {
    let width = x.len();
    let (g, weight, dweight, dbias) = (&mut g[..width], &weight[..width], &mut dweight[..width], &mut dbias[..width]);
    let (mean, inv_std) = statistics(x, eps);
    let (mean_a, mean_ax) = {
        let sum = simd::dot(g, weight);
        let sum_x = simd::sum_of(
            [g, weight, x],
            #[inline(always)]
            |[g, w, x]| g * w * ((x - mean) * inv_std),
        );
        (sum / width as f32, sum_x / width as f32)
    };
    for i in 0..width {
        let normalized = (x[i] - mean) * inv_std;
        dweight[i] += g[i] * normalized;
        dbias[i] += g[i];
        g[i] = inv_std * (g[i] * weight[i] - mean_a - normalized * mean_ax);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use crate::testing::{Case, assert_same, numbers, run};
    use crate::{composed, layer_norm};

    #[test]
    fn equals_composed_with_every_combination_of_tracked_inputs() {
        let mut cases = 0;
        // Narrower than a vector, neither multiple nor divisor of one, and more rows than a block.
        for [rows, width] in [[1, 13], [3, 24], [7, 192], [5, 77], [300, 40]] {
            for tracked in 0..8 {
                let tracked = [tracked & 1 > 0, tracked & 2 > 0, tracked & 4 > 0];
                let case = Case::new(&[&[rows, width], &[width], &[width]], &tracked);
                assert_same(
                    &case,
                    |t| layer_norm(t.matrix(0), t.vector(1), t.vector(2), 1e-5),
                    |t| composed::layer_norm(t.matrix(0), t.vector(1), t.vector(2), 1e-5),
                );
                cases += 1;
            }
        }
        assert_eq!(cases, 40);
    }

    #[test]
    fn row_of_one_element_gives_the_bias() {
        let device = Device::flex();
        let vector = |v: f32| Tensor::<1>::from_floats([v], &device);
        let y = layer_norm(Tensor::from_floats([[7.0], [-3.0]], &device), vector(5.0), vector(0.25), 1e-6);
        assert_eq!(y.to_data().try_to_vec::<f32>().unwrap(), [0.25, 0.25]);
    }

    #[test]
    fn input_that_others_see_is_left_as_it_is() {
        let device = Device::flex();
        let x = Tensor::<2>::from_floats([[1.0, 2.0, 4.0]], &device);
        let (ones, zeros) = (Tensor::ones([3], &device), Tensor::zeros([3], &device));
        let shared = layer_norm(x.clone(), ones.clone(), zeros.clone(), 1e-6).to_data();
        assert_eq!(x.to_data().try_to_vec::<f32>().unwrap(), [1.0, 2.0, 4.0]);
        assert_eq!(layer_norm(x, ones, zeros, 1e-6).to_data(), shared, "in place");
    }

    /// `Σ y·g` in f64, written from the formula.
    fn objective(x: &[f64], weight: &[f64], bias: &[f64], g: &[f64], eps: f64) -> f64 {
        let width = weight.len();
        let mut total = 0.0;
        for (x, g) in x.chunks(width).zip(g.chunks(width)) {
            let mean = x.iter().sum::<f64>() / width as f64;
            let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
            for i in 0..width {
                total += g[i] * ((x[i] - mean) / (var + eps).sqrt() * weight[i] + bias[i]);
            }
        }
        total
    }

    #[test]
    fn gradients_agree_with_finite_differences_in_f64() {
        let (rows, width, eps) = (3, 13, 1e-3);
        let case = Case::new(&[&[rows, width], &[width], &[width]], &[true; 3]);
        let results = run(&case, |t| layer_norm(t.matrix(0), t.vector(1), t.vector(2), eps));
        let double = |seed: u64, len: usize| numbers(len, seed).into_iter().map(f64::from).collect::<Vec<_>>();
        let g = double(99, rows * width);
        let mut inputs = [double(1, rows * width), double(2, width), double(3, width)];
        let mut compared = 0;
        for input in 0..3 {
            for i in 0..inputs[input].len() {
                let h = 1e-5;
                let value = inputs[input][i];
                let mut at = |v: f64| {
                    inputs[input][i] = v;
                    objective(&inputs[0], &inputs[1], &inputs[2], &g, eps)
                };
                let slope = (at(value + h) - at(value - h)) / (2.0 * h);
                at(value);
                let actual = f64::from(results[1 + input][i]);
                assert!((actual - slope).abs() < 2e-5, "input {input} element {i}: {actual} and {slope}");
                compared += 1;
            }
        }
        assert_eq!(compared, rows * width + 2 * width);
    }
}
