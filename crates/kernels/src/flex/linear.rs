//! `y = x·Wᵀ + b` by matrix products on the layout that the weight has.
//!
//! With `g` the gradient of `y`: `dx = g·W`, `dW = gᵀ·x` (as `[out, in]`, without a transposed copy), `db = Σ_rows g`.

use burn::backend::flex::FlexTensor;

use super::branch::add_bias;
use super::gemm::{Matrix, multiply};
use super::operation::Operation;
use super::{ROW_BLOCK, contiguous, dims2, elements, for_each_block, simd, sum_over_rows, tensor};
use crate::Precision;

/// Inputs `x [M, in]`, `weight [out, in]` and, with `N = 3`, `bias [out]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    /// Of its products.
    pub(crate) precision: Precision,
}

impl Operation<2> for Linear {
    fn forward(&self, [x, weight]: [FlexTensor; 2]) -> FlexTensor {
        self.value(x, weight, None)
    }

    fn reads(&self, [x, weight]: [bool; 2]) -> [bool; 2] {
        [weight, x]
    }

    fn backward(
        &self,
        [x, weight]: [Option<FlexTensor>; 2],
        grad: FlexTensor,
        [for_x, for_weight]: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [dx, dw, _] = self.gradients(x, weight, grad, [for_x, for_weight, false]);
        [dx, dw]
    }
}

impl Operation<3> for Linear {
    fn forward(&self, [x, weight, bias]: [FlexTensor; 3]) -> FlexTensor {
        self.value(x, weight, Some(bias))
    }

    fn reads(&self, [x, weight, _]: [bool; 3]) -> [bool; 3] {
        [weight, x, false]
    }

    fn backward(
        &self,
        [x, weight, _]: [Option<FlexTensor>; 3],
        grad: FlexTensor,
        tracked: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        self.gradients(x, weight, grad, tracked)
    }
}

impl Linear {
    fn value(&self, x: FlexTensor, weight: FlexTensor, bias: Option<FlexTensor>) -> FlexTensor {
        let ([rows, inner], [out, weight_inner]) = (dims2(&x), dims2(&weight));
        assert_eq!(inner, weight_inner, "linear: x [{rows}, {inner}] and weight [{out}, {weight_inner}]");
        let (x, weight) = (contiguous(x), contiguous(weight));
        let rows_of_x = Matrix::new(elements(&x), rows, inner);
        let mut y = multiply(rows_of_x, Matrix::new(elements(&weight), out, inner).t(), self.precision);
        if let Some(bias) = bias {
            let bias = contiguous(bias);
            let bias = elements(&bias);
            assert_eq!(bias.len(), out, "linear: bias [{}] and {out} outputs", bias.len());
            for_each_block(&mut y, ROW_BLOCK * out.max(1), &mut [], 0, |_, rows, _| add_bias(rows, bias));
        }
        tensor(y, [rows, out])
    }

    fn gradients(
        &self,
        x: Option<FlexTensor>,
        weight: Option<FlexTensor>,
        grad: FlexTensor,
        [for_x, for_weight, for_bias]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [rows, out] = dims2(&grad);
        let grad = contiguous(grad);
        let g = Matrix::new(elements(&grad), rows, out);
        let dx = weight.filter(|_| for_x).map(|weight| {
            let [_, inner] = dims2(&weight);
            let weight = contiguous(weight);
            tensor(multiply(g, Matrix::new(elements(&weight), out, inner), self.precision), [rows, inner])
        });
        let dw = x.filter(|_| for_weight).map(|x| {
            let [_, inner] = dims2(&x);
            let x = contiguous(x);
            tensor(multiply(g.t(), Matrix::new(elements(&x), rows, inner), self.precision), [out, inner])
        });
        let db = for_bias.then(|| tensor(column_sums(elements(&grad), rows, out), [out]));
        [dx, dw, db]
    }
}

/// Sums of the columns of a `[rows, out]` matrix.
pub(super) fn column_sums(g: &[f32], rows: usize, out: usize) -> Vec<f32> {
    sum_over_rows(rows, out, |block, sum| {
        simd::vectorized(
            #[inline(always)]
            || {
                for row in block.clone() {
                    simd::add_assign(sum, &g[row * out..][..out]);
                }
            },
        );
    })
}

#[cfg(test)]
mod tests {
    use crate::Precision::Fp32;
    use crate::testing::{Case, assert_same};
    use crate::{composed, linear};

    #[test]
    fn equals_composed_with_every_combination_of_tracked_inputs() {
        let mut cases = 0;
        // The last has more rows than a block of the bias gradient.
        for [rows, inner, out] in [[1, 1, 1], [1, 13, 24], [5, 24, 13], [17, 3, 40], [300, 16, 7]] {
            for tracked in 0..8 {
                let tracked = [tracked & 1 > 0, tracked & 2 > 0, tracked & 4 > 0];
                let case = Case::new(&[&[rows, inner], &[out, inner], &[out]], &tracked);
                assert_same(
                    &case,
                    |t| linear(t.matrix(0), t.matrix(1), Some(t.vector(2)), Fp32),
                    |t| composed::linear(t.matrix(0), t.matrix(1), Some(t.vector(2)), Fp32),
                );
                cases += 1;
            }
            for tracked in [[true, true], [true, false], [false, true], [false, false]] {
                let case = Case::new(&[&[rows, inner], &[out, inner]], &tracked);
                assert_same(
                    &case,
                    |t| linear(t.matrix(0), t.matrix(1), None, Fp32),
                    |t| composed::linear(t.matrix(0), t.matrix(1), None, Fp32),
                );
                cases += 1;
            }
        }
        assert_eq!(cases, 5 * 12);
    }

    #[test]
    fn transposed_and_sliced_inputs_are_read_in_their_own_order() {
        let case = Case::new(&[&[6, 9], &[6, 11], &[12]], &[true; 3]);
        assert_same(
            &case,
            |t| linear(t.matrix(0).transpose(), t.matrix(1).transpose(), Some(t.vector(2).narrow(0, 1, 11)), Fp32),
            |t| {
                composed::linear(
                    t.matrix(0).transpose(),
                    t.matrix(1).transpose(),
                    Some(t.vector(2).narrow(0, 1, 11)),
                    Fp32,
                )
            },
        );
    }
}
