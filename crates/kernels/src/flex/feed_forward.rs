//! The feed-forward branch of a transformer block, `x + γ∘(gelu(LN(x)·W₁ᵀ + b₁)·W₂ᵀ + b₂)`, as one operation.
//!
//! Of what lies between input and result only the hidden layer before its bias is kept for the backward pass, or not even
//! that where it is to be computed again. The norm's result always is, and so is the GELU's: its derivative needs the same
//! function values.

use burn::backend::flex::FlexTensor;

use rayon::prelude::*;

use super::branch::{Norm, Projection, add_bias};
use super::gemm::{Matrix, multiply};
use super::memory::{Stored, copied, halved};
use super::operation::Branch;
use super::{ROW_BLOCK, contiguous, dims2, elements, for_each_block, in_order, simd, tensor};
use crate::Precision;

/// Inputs `x [M, D]`; the norm's `weight [D]`, `bias [D]`; `W₁ [F, D]`, `b₁ [F]`, `W₂ [D, F]`, `b₂ [D]`, `γ [D]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FeedForward {
    /// Added to the variance.
    pub(crate) eps: f64,
    /// Of its products.
    pub(crate) precision: Precision,
    /// Whether the backward pass computes the hidden layer again.
    pub(crate) recompute: bool,
}

/// What the backward pass reads.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    x: FlexTensor,
    norm: Norm,
    weight: FlexTensor,
    bias: FlexTensor,
    projection: Projection,
    /// `[M, F]`, without the bias; `None` when it is computed again.
    hidden: Option<Stored>,
}

impl Branch<8> for FeedForward {
    type Kept = Kept;

    fn forward(
        &self,
        [x, norm_weight, norm_bias, w1, b1, w2, b2, gamma]: [FlexTensor; 8],
        keep: bool,
    ) -> (FlexTensor, Option<Kept>) {
        let ([rows, width], [inner, input]) = (dims2(&x), dims2(&w1));
        assert_eq!(width, input, "feed_forward: x [{rows}, {width}] and a weight [{inner}, {input}]");
        let (x, weight, bias) = (contiguous(x), contiguous(w1), contiguous(b1));
        let biases = elements(&bias).len();
        assert_eq!(biases, inner, "feed_forward: bias [{biases}] of {inner} hidden features");
        let norm = Norm::new(norm_weight, norm_bias, self.eps);
        let projection = Projection::new(w2, b2, gamma, self.precision);
        let hidden = unbiased(elements(&x), &norm, elements(&weight), rows, width, self.precision);
        let activate = |rows: &mut [f32]| {
            add_bias(rows, elements(&bias));
            gelu(rows);
        };
        let block = ROW_BLOCK * inner.max(1);
        // What is kept is the hidden layer itself, and its GELU a copy of it; or a copy of half the size, lossless since the
        // product rounded it, and the GELU takes its memory.
        let (activated, hidden) = match self.precision {
            Precision::Fp32 if keep && !self.recompute => {
                (copied(&hidden, block, |_, rows| activate(rows)), Some(Stored::Single(hidden)))
            }
            _ => {
                let stored = (keep && !self.recompute).then(|| Stored::Half(halved(&hidden)));
                let mut activated = hidden;
                for_each_block(&mut activated, block, &mut [], 0, |_, rows, _| activate(rows));
                (activated, stored)
            }
        };
        if !keep {
            return (projection.forward(x, &activated, inner), None);
        }
        let y = projection.forward(x.clone(), &activated, inner);
        (y, Some(Kept { x, norm, weight, bias, projection, hidden }))
    }

    fn backward(&self, kept: Kept, grad: FlexTensor) -> [FlexTensor; 8] {
        let Kept { x, norm, weight, bias, projection, hidden } = kept;
        let ([rows, width], [inner, _]) = (dims2(&x), dims2(&weight));
        let mut hidden = match hidden {
            Some(stored) => stored.into_single(),
            None => unbiased(elements(&x), &norm, elements(&weight), rows, width, self.precision),
        };
        let grad = contiguous(grad);
        let g = elements(&grad);
        let mut dhidden = projection.backward_input(g, inner);
        // The hidden layer becomes its GELU.
        let db1 = gelu_backward(&mut hidden, elements(&bias), &mut dhidden, inner);
        let [dw2, db2, dgamma] = projection.backward(g, &hidden, inner);
        drop(hidden);

        let x = elements(&x);
        let dh = Matrix::new(&dhidden, rows, inner);
        let normalized = norm.forward(x, width);
        let dw1 = multiply(dh.t(), Matrix::new(&normalized, rows, width), self.precision);
        drop(normalized);
        let dnormalized = multiply(dh, Matrix::new(elements(&weight), inner, width), self.precision);
        let [dx, dnorm_weight, dnorm_bias] = norm.backward(x, dnormalized, g, width);
        [
            tensor(dx, [rows, width]),
            tensor(dnorm_weight, [width]),
            tensor(dnorm_bias, [width]),
            tensor(dw1, [inner, width]),
            tensor(db1, [inner]),
            dw2,
            db2,
            dgamma,
        ]
    }
}

/// `LN(x)·Wᵀ`: the hidden layer without its bias.
fn unbiased(x: &[f32], norm: &Norm, weight: &[f32], rows: usize, width: usize, precision: Precision) -> Vec<f32> {
    let normalized = norm.forward(x, width);
    let weight = Matrix::new(weight, weight.len() / width.max(1), width);
    multiply(Matrix::new(&normalized, rows, width), weight.t(), precision)
}

fn gelu(values: &mut [f32]) {
    simd::vectorized(
        #[inline(always)]
        || {
            for x in values.iter_mut() {
                *x *= simd::normal_cdf(*x);
            }
        },
    );
}

/// Replaces `hidden`, which lacks its bias, by its GELU and the gradient of that by the gradient of `hidden`, whose sum over the
/// rows it returns.
fn gelu_backward(hidden: &mut [f32], bias: &[f32], grad: &mut [f32], inner: usize) -> Vec<f32> {
    let block = ROW_BLOCK * inner.max(1);
    let mut partial = vec![0.0; hidden.len().div_ceil(block) * inner];
    let blocks = hidden.par_chunks_mut(block).zip(grad.par_chunks_mut(block)).zip(partial.par_chunks_mut(inner.max(1)));
    blocks.for_each(|((hidden, grad), sum)| {
        simd::vectorized(
            #[inline(always)]
            || {
                for (hidden, grad) in hidden.chunks_exact_mut(inner).zip(grad.chunks_exact_mut(inner)) {
                    for (((hidden, bias), g), sum) in hidden.iter_mut().zip(bias).zip(grad).zip(sum.iter_mut()) {
                        let x = *hidden + bias;
                        let cdf = simd::normal_cdf(x);
                        *g *= x.mul_add(simd::normal_density(x), cdf);
                        *hidden = x * cdf;
                        *sum += *g;
                    }
                }
            },
        );
    });
    in_order(&partial, inner)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use crate::Precision::Fp32;
    use crate::testing::{Inputs, assert_same, branch, feed_forward_case, run};
    use crate::{Branch, composed, feed_forward};

    type Function = fn(Tensor<2>, Branch) -> Tensor<2>;

    fn apply(f: Function, t: &Inputs, bias: bool, gamma: bool) -> Tensor<2> {
        f(t.matrix(0), branch(t, bias, gamma, Fp32))
    }

    #[test]
    fn equals_composed_whichever_inputs_are_tracked() {
        let mut cases = 0;
        // The last has more rows than a block of the sums.
        for (rows, width, inner) in [(1, 1, 2), (5, 24, 13), (7, 13, 40), (300, 16, 33)] {
            for alone in 0..10 {
                // Each input by itself, all, and none.
                let tracked = std::array::from_fn(|i| alone == 8 || alone == i);
                assert_same(
                    &feed_forward_case([rows, width, inner], tracked),
                    |t| apply(feed_forward, t, true, true),
                    |t| apply(composed::feed_forward, t, true, true),
                );
                cases += 1;
            }
        }
        assert_eq!(cases, 40);
    }

    #[test]
    fn without_biases_or_layer_scale_equals_composed() {
        for (bias, gamma) in [(false, true), (true, false), (false, false)] {
            let mut tracked = [true; 8];
            (tracked[4], tracked[6], tracked[7]) = (bias, bias, gamma);
            assert_same(
                &feed_forward_case([6, 24, 10], tracked),
                |t| apply(feed_forward, t, bias, gamma),
                |t| apply(composed::feed_forward, t, bias, gamma),
            );
        }
    }

    #[test]
    fn computing_the_hidden_layer_again_does_not_change_the_bits() {
        let case = feed_forward_case([300, 24, 50], [true; 8]);
        let with = |recompute| {
            let results =
                run(&case, |t| feed_forward(t.matrix(0), Branch { recompute, ..branch(t, true, true, Fp32) }));
            results.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(with(true), with(false));
    }

    #[test]
    fn number_of_threads_does_not_change_the_bits() {
        let case = feed_forward_case([300, 48, 96], [true; 8]);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| run(&case, |t| apply(feed_forward, t, true, true)))
        };
        let bits = |r: Vec<Vec<f32>>| r.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(with(1)), bits(with(3)));
    }
}
