//! What the two residual branches of a transformer block share: the norm before them and the scaled projection behind.
//!
//! A branch is `y = x + γ∘(a·Wᵀ + b)`, where `a` is made from `LN(x)`. The layer scale goes into the projection's weight, so
//! that neither the branch nor its scaled copy exists: the product is added to `x + γ∘b`. With `g` the gradient of `y` and
//! `G = gᵀ·a`: `da = g·(γ∘W)`, `dW = γ∘G`, `db = γ∘Σg`, `dγ = Σ_in W∘G + b∘Σg`, all with the `γ` of an output feature.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::gemm::{Destination, Matrix, Threads, multiply, multiply_into};
use super::layer_norm::{normalize, row_backward};
use super::linear::column_sums;
use super::memory::copied;
use super::{ROW_BLOCK, contiguous, elements, in_order, simd, tensor, transform};
use crate::Precision;

/// A layer norm: gain and offset `[D]`.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    pub(super) weight: FlexTensor,
    pub(super) bias: FlexTensor,
    pub(super) eps: f32,
}

impl Norm {
    pub(super) fn new(weight: FlexTensor, bias: FlexTensor, eps: f64) -> Self {
        Self { weight: contiguous(weight), bias: contiguous(bias), eps: eps as f32 }
    }

    /// `LN(x)`, in new memory.
    pub(super) fn forward(&self, x: &[f32], width: usize) -> Vec<f32> {
        let (weight, bias) = (elements(&self.weight), elements(&self.bias));
        assert!(
            weight.len() == width && bias.len() == width,
            "a norm of {} and {} values on rows of {width}",
            weight.len(),
            bias.len()
        );
        copied(x, ROW_BLOCK * width.max(1), |_, block| {
            simd::vectorized(
                #[inline(always)]
                || {
                    for row in block.chunks_exact_mut(width) {
                        normalize(row, weight, bias, self.eps);
                    }
                },
            );
        })
    }

    /// Turns the gradient of `LN(x)` into that of `x` along both ways, through the norm and past the branch, where it is
    /// `past`; and the gradients of gain and offset.
    pub(super) fn backward(&self, x: &[f32], mut grad: Vec<f32>, past: &[f32], width: usize) -> [Vec<f32>; 3] {
        let weight = elements(&self.weight);
        let mut partial = vec![0.0; (x.len() / width.max(1)).div_ceil(ROW_BLOCK) * 2 * width];
        let block = ROW_BLOCK * width.max(1);
        let blocks = grad.par_chunks_mut(block).zip(x.par_chunks(block)).zip(past.par_chunks(block));
        blocks.zip(partial.par_chunks_mut((2 * width).max(1))).for_each(|(((g, x), past), sums)| {
            let (dweight, dbias) = sums.split_at_mut(width);
            simd::vectorized(
                #[inline(always)]
                || {
                    let rows = g.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(past.chunks_exact(width));
                    for ((g, x), past) in rows {
                        row_backward(x, g, weight, dweight, dbias, self.eps);
                        simd::add_assign(g, past);
                    }
                },
            );
        });
        let mut dweight = in_order(&partial, 2 * width);
        let dbias = dweight.split_off(width);
        [grad, dweight, dbias]
    }
}

/// Output features whose weights one task goes through.
const FEATURES: usize = 16;

/// The projection at the end of a branch with its layer scale: weight `[D, in]`, bias and scale `[D]`.
#[derive(Clone, Debug)]
pub(super) struct Projection {
    pub(super) weight: FlexTensor,
    pub(super) bias: FlexTensor,
    pub(super) gamma: FlexTensor,
    pub(super) precision: Precision,
}

impl Projection {
    pub(super) fn new(weight: FlexTensor, bias: FlexTensor, gamma: FlexTensor, precision: Precision) -> Self {
        Self { weight: contiguous(weight), bias: contiguous(bias), gamma: contiguous(gamma), precision }
    }

    /// `x + γ∘(a·Wᵀ + b)`, in the memory of `x` if nothing else sees it.
    pub(super) fn forward(&self, x: FlexTensor, a: &[f32], inner: usize) -> FlexTensor {
        let (weight, bias, gamma) = (elements(&self.weight), elements(&self.bias), elements(&self.gamma));
        let width = gamma.len();
        assert!(
            weight.len() == width * inner && bias.len() == width,
            "a projection of {inner} to {width}: {} weights, {} biases",
            weight.len(),
            bias.len()
        );
        if self.precision == Precision::Bf16 {
            return self.forward_of_rounded(x, a, inner);
        }
        let offset: Vec<f32> = bias.iter().zip(gamma).map(|(b, gamma)| b * gamma).collect();
        let mut y = transform(x, ROW_BLOCK * width.max(1), |_, rows| add_bias(rows, &offset));
        let scaled = scaled_and_transposed(weight, gamma, inner);
        let (from, to) = y.layout().contiguous_offsets().expect("a contiguous tensor");
        let out = &mut y.storage_mut::<f32>()[from..to];
        let a = Matrix::new(a, out.len() / width.max(1), inner);
        let factors = [a, Matrix::new(&scaled, inner, width)];
        multiply_into(out, width, Destination::Accumulate, factors, self.precision, Threads::Pool);
        y
    }

    /// The same with the weight itself as an operand, which is what is rounded.
    fn forward_of_rounded(&self, x: FlexTensor, a: &[f32], inner: usize) -> FlexTensor {
        let (weight, bias, gamma) = (elements(&self.weight), elements(&self.bias), elements(&self.gamma));
        let width = gamma.len();
        let a = Matrix::new(a, a.len() / inner.max(1), inner);
        let branch = multiply(a, Matrix::new(weight, width, inner).t(), self.precision);
        transform(x, ROW_BLOCK * width.max(1), |start, rows| {
            let branch = &branch[start..][..rows.len()];
            simd::vectorized(
                #[inline(always)]
                || {
                    for (row, branch) in rows.chunks_exact_mut(width).zip(branch.chunks_exact(width)) {
                        for (((y, branch), bias), gamma) in row.iter_mut().zip(branch).zip(bias).zip(gamma) {
                            *y += (branch + bias) * gamma;
                        }
                    }
                },
            );
        })
    }

    /// The gradient of `a`, given that of the result.
    pub(super) fn backward_input(&self, grad: &[f32], inner: usize) -> Vec<f32> {
        let (weight, gamma) = (elements(&self.weight), elements(&self.gamma));
        let width = gamma.len();
        let rows = grad.len() / width.max(1);
        if self.precision == Precision::Bf16 {
            let scaled = copied(grad, ROW_BLOCK * width.max(1), |_, rows| scale_columns(rows, gamma));
            return multiply(Matrix::new(&scaled, rows, width), Matrix::new(weight, width, inner), self.precision);
        }
        let scaled = copied(weight, FEATURES * inner.max(1), |start, rows| {
            scale_rows(rows, &gamma[start / inner..], inner);
        });
        multiply(Matrix::new(grad, rows, width), Matrix::new(&scaled, width, inner), self.precision)
    }

    /// The gradients of weight, bias and scale.
    pub(super) fn backward(&self, grad: &[f32], a: &[f32], inner: usize) -> [FlexTensor; 3] {
        let (weight, bias, gamma) = (elements(&self.weight), elements(&self.bias), elements(&self.gamma));
        let width = gamma.len();
        let rows = grad.len() / width.max(1);
        let mut dweight = multiply(Matrix::new(grad, rows, width).t(), Matrix::new(a, rows, inner), self.precision);
        let sums = column_sums(grad, rows, width);
        let mut dgamma: Vec<f32> = sums.iter().zip(bias).map(|(sum, b)| sum * b).collect();
        let block = FEATURES * inner.max(1);
        let features = dgamma.par_chunks_mut(FEATURES).zip(gamma.par_chunks(FEATURES));
        dweight.par_chunks_mut(block).zip(weight.par_chunks(block)).zip(features).for_each(
            |((g, w), (dgamma, gamma))| {
                simd::vectorized(
                    #[inline(always)]
                    || {
                        let products = g.chunks_exact(inner).zip(w.chunks_exact(inner));
                        for (dgamma, (g, w)) in dgamma.iter_mut().zip(products) {
                            *dgamma += simd::dot(g, w);
                        }
                    },
                );
                scale_rows(g, gamma, inner);
            },
        );
        let dbias = sums.iter().zip(gamma).map(|(sum, gamma)| sum * gamma).collect();
        [tensor(dweight, [width, inner]), tensor(dbias, [width]), tensor(dgamma, [width])]
    }
}

/// Adds a bias to every row.
pub(super) fn add_bias(rows: &mut [f32], bias: &[f32]) {
    if bias.is_empty() {
        return;
    }
    simd::vectorized(
        #[inline(always)]
        || {
            for row in rows.chunks_exact_mut(bias.len()) {
                simd::add_assign(row, bias);
            }
        },
    );
}

/// Multiplies each row of a `[rows, width]` matrix with its factor.
fn scale_rows(matrix: &mut [f32], factors: &[f32], width: usize) {
    simd::vectorized(
        #[inline(always)]
        || {
            for (row, factor) in matrix.chunks_exact_mut(width).zip(factors) {
                simd::scale(row, *factor);
            }
        },
    );
}

/// Multiplies each column of a matrix with its factor.
fn scale_columns(matrix: &mut [f32], factors: &[f32]) {
    simd::vectorized(
        #[inline(always)]
        || {
            for row in matrix.chunks_exact_mut(factors.len()) {
                for (value, factor) in row.iter_mut().zip(factors) {
                    *value *= factor;
                }
            }
        },
    );
}

/// `[out, inner]` with each row multiplied by its factor, as `[inner, out]`: the layout that a product from the left reads
/// without packing it.
fn scaled_and_transposed(weight: &[f32], factors: &[f32], inner: usize) -> Vec<f32> {
    /// Rows whose elements are read together: a cache line of the result.
    const LINE: usize = 16;
    let out = factors.len();
    let mut transposed = vec![0.0; weight.len()];
    transposed.par_chunks_mut((64 * out).max(1)).enumerate().for_each(|(block, columns)| {
        for first in (0..out).step_by(LINE) {
            let last = (first + LINE).min(out);
            for (k, column) in columns.chunks_exact_mut(out).enumerate() {
                for (i, value) in (first..last).zip(&mut column[first..last]) {
                    *value = weight[i * inner + block * 64 + k] * factors[i];
                }
            }
        }
    });
    transposed
}
