//! The attention branch of a transformer block for some of its tokens: the rows of
//! `x + γ∘(attention(LN(x)·Wᵀ + b)·Wₚᵀ + bₚ)` that somebody looks at.
//!
//! All tokens have a key and a value, only the rows have a query. For the backward pass these projections and the heads'
//! results are kept, or not even these where they are to be computed again.

use std::sync::Arc;

use burn::backend::flex::FlexTensor;

use super::attention::{Rotation, Selected, Sizes};
use super::branch::{Norm, Projection, add_bias};
use super::gemm::{Destination, Matrix, Threads, multiply, multiply_into};
use super::linear::column_sums;
use super::operation::Branch;
use super::{ROW_BLOCK, contiguous, dims2, elements, for_each_block, simd, tensor};
use crate::Precision;

/// Inputs as of [`AttentionBranch`](super::AttentionBranch); the result is `[R, D]`.
#[derive(Clone, Debug)]
pub(crate) struct SelectedAttention {
    /// Places in the flattened list `[B·N]` of tokens, in ascending order.
    pub(crate) rows: Arc<[usize]>,
    /// Heads, which divide `D`.
    pub(crate) num_heads: usize,
    /// Added to the variance.
    pub(crate) eps: f64,
    /// Of its products.
    pub(crate) precision: Precision,
    /// Whether the backward pass computes projections and heads again.
    pub(crate) recompute: bool,
}

/// The same with two more inputs, the cosines and sines `[N, d]` of a rotation, which receive no gradient.
#[derive(Clone, Debug)]
pub(crate) struct RotarySelectedAttention(pub(crate) SelectedAttention);

/// What the backward pass reads.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    x: FlexTensor,
    norm: Norm,
    weight: FlexTensor,
    projection: Projection,
    bias: FlexTensor,
    tables: Option<[FlexTensor; 2]>,
    between: Option<Between>,
}

/// What lies between the two linear layers.
#[derive(Clone, Debug)]
struct Between {
    /// `[R, D]`.
    q: Vec<f32>,
    /// `[B, N, 2·D]`.
    kv: Vec<f32>,
    /// `[R, D]`.
    heads: Vec<f32>,
}

impl Branch<8> for SelectedAttention {
    type Kept = Kept;

    fn forward(&self, inputs: [FlexTensor; 8], keep: bool) -> (FlexTensor, Option<Kept>) {
        self.run(inputs, None, keep)
    }

    fn backward(&self, kept: Kept, grad: FlexTensor) -> [FlexTensor; 8] {
        self.gradients(kept, grad)
    }
}

impl Branch<10> for RotarySelectedAttention {
    type Kept = Kept;

    fn forward(&self, [a, b, c, d, e, f, g, h, cos, sin]: [FlexTensor; 10], keep: bool) -> (FlexTensor, Option<Kept>) {
        self.0.run([a, b, c, d, e, f, g, h], Some([contiguous(cos), contiguous(sin)]), keep)
    }

    fn backward(&self, kept: Kept, grad: FlexTensor) -> [FlexTensor; 10] {
        let [cos, sin] = kept.tables.clone().expect("the tables are kept");
        let [a, b, c, d, e, f, g, h] = self.0.gradients(kept, grad);
        // Nothing tracks the tables: whatever stands in the place of their gradients is left there.
        [a, b, c, d, e, f, g, h, cos, sin]
    }
}

impl SelectedAttention {
    fn run(
        &self,
        [x, norm_weight, norm_bias, weight, bias, w_out, b_out, gamma]: [FlexTensor; 8],
        tables: Option<[FlexTensor; 2]>,
        keep: bool,
    ) -> (FlexTensor, Option<Kept>) {
        let [batch, tokens, width]: [usize; 3] = x.layout().shape().dims();
        let [packed, input] = dims2(&weight);
        assert!(
            input == width && packed == 3 * width,
            "attention: x [{batch}, {tokens}, {width}] and packed weight [{packed}, {input}]"
        );
        assert!(
            self.rows.is_sorted_by(|a, b| a < b) && self.rows.last().is_none_or(|&last| last < batch * tokens),
            "attention: rows of x [{batch}, {tokens}, {width}] have to be ascending and within"
        );
        let (x, weight, bias) = (contiguous(x), contiguous(weight), contiguous(bias));
        let norm = Norm::new(norm_weight, norm_bias, self.eps);
        let projection = Projection::new(w_out, b_out, gamma, self.precision);
        let biases = elements(&bias).len();
        assert_eq!(biases, packed, "attention: bias [{biases}] of {packed} packed features");
        let between = self.between(&x, &norm, &weight, &bias, &tables);
        let selected = tensor(gathered(elements(&x), &self.rows, width), [self.rows.len(), width]);
        let y = projection.forward(selected, &between.heads, width);
        let kept = keep.then(|| {
            let between = (!self.recompute).then_some(between);
            Kept { x, norm, weight, projection, bias, tables, between }
        });
        (y, kept)
    }

    fn between(
        &self,
        x: &FlexTensor,
        norm: &Norm,
        weight: &FlexTensor,
        bias: &FlexTensor,
        tables: &Option<[FlexTensor; 2]>,
    ) -> Between {
        let sizes = Sizes::of(x, self.num_heads);
        let width = sizes.width();
        let normalized = norm.forward(elements(x), width);
        let [of_q, of_kv] = split(elements(weight), width * width);
        let [bias_q, bias_kv] = split(elements(bias), width);
        let project = |rows: &[f32], weight: &[f32], bias: &[f32]| {
            let weight = Matrix::new(weight, bias.len(), width);
            let rows = Matrix::new(rows, rows.len() / width.max(1), width);
            let mut projected = multiply(rows, weight.t(), self.precision);
            for_each_block(&mut projected, ROW_BLOCK * bias.len().max(1), &mut [], 0, |_, rows, _| {
                add_bias(rows, bias)
            });
            projected
        };
        let q = project(&gathered(&normalized, &self.rows, width), of_q, bias_q);
        let kv = project(&normalized, of_kv, bias_kv);
        let heads = Selected::new([&q, &kv], &self.rows, sizes, rotation(tables, sizes), self.precision).forward();
        Between { q, kv, heads }
    }

    fn gradients(&self, kept: Kept, grad: FlexTensor) -> [FlexTensor; 8] {
        let Kept { x, norm, weight, projection, bias, tables, between } = kept;
        let Between { q, kv, heads } = between.unwrap_or_else(|| self.between(&x, &norm, &weight, &bias, &tables));
        let sizes = Sizes::of(&x, self.num_heads);
        let shape: [usize; 3] = x.layout().shape().dims();
        let (rows, count, width) = (self.rows.len(), shape[0] * shape[1], shape[2]);
        let grad = contiguous(grad);
        let g = elements(&grad);
        let [dw_out, db_out, dgamma] = projection.backward(g, &heads, width);
        drop(heads);
        let dheads = projection.backward_input(g, width);
        let selected = Selected::new([&q, &kv], &self.rows, sizes, rotation(&tables, sizes), self.precision);
        let [dq, dkv] = selected.backward(&dheads);
        drop(selected);
        drop((dheads, q, kv));

        let x = elements(&x);
        let (dq_rows, dkv_rows) = (Matrix::new(&dq, rows, width), Matrix::new(&dkv, count, 2 * width));
        let normalized = norm.forward(x, width);
        let selected = gathered(&normalized, &self.rows, width);
        let mut dweight = vec![0.0; 3 * width * width];
        let (of_q, of_kv) = dweight.split_at_mut(width * width);
        let into = |out: &mut [f32], a, b| {
            multiply_into(out, width, Destination::Overwrite, [a, b], self.precision, Threads::Pool);
        };
        into(of_q, dq_rows.t(), Matrix::new(&selected, rows, width));
        into(of_kv, dkv_rows.t(), Matrix::new(&normalized, count, width));
        drop((normalized, selected));
        let dbias = [column_sums(&dq, rows, width), column_sums(&dkv, count, 2 * width)].concat();
        let [of_q, of_kv] = split(elements(&weight), width * width);
        let mut dnormalized = multiply(dkv_rows, Matrix::new(of_kv, 2 * width, width), self.precision);
        let through_q = multiply(dq_rows, Matrix::new(of_q, width, width), self.precision);
        add_to_rows(&mut dnormalized, &self.rows, &through_q, width);
        let mut past = vec![0.0; count * width];
        add_to_rows(&mut past, &self.rows, g, width);
        let [dx, dnorm_weight, dnorm_bias] = norm.backward(x, dnormalized, &past, width);
        [
            tensor(dx, shape),
            tensor(dnorm_weight, [width]),
            tensor(dnorm_bias, [width]),
            tensor(dweight, [3 * width, width]),
            tensor(dbias, [3 * width]),
            dw_out,
            db_out,
            dgamma,
        ]
    }
}

fn rotation(tables: &Option<[FlexTensor; 2]>, sizes: Sizes) -> Option<Rotation<'_>> {
    tables.as_ref().map(|[cos, sin]| Rotation::new(cos, sin, sizes))
}

fn split(values: &[f32], at: usize) -> [&[f32]; 2] {
    let (a, b) = values.split_at(at);
    [a, b]
}

/// Some rows of a matrix.
fn gathered(matrix: &[f32], rows: &[usize], width: usize) -> Vec<f32> {
    let mut found = Vec::with_capacity(rows.len() * width);
    rows.iter().for_each(|row| found.extend_from_slice(&matrix[row * width..][..width]));
    found
}

/// Adds rows to some rows of a matrix.
fn add_to_rows(matrix: &mut [f32], rows: &[usize], values: &[f32], width: usize) {
    simd::vectorized(
        #[inline(always)]
        || {
            for (row, values) in rows.iter().zip(values.chunks_exact(width)) {
                simd::add_assign(&mut matrix[row * width..][..width], values);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Int, Tensor};

    use crate::Precision::Fp32;
    use crate::testing::{Inputs, assert_same, attention_case, branch, rope, run};
    use crate::{Branch, RopeTable, attention, composed, selected_attention};

    /// The rows of attention over all tokens, as the fused operation computes it.
    fn of_all(t: &Inputs, rows: &[usize], branch: Branch, heads: usize, rope: Option<&RopeTable>) -> Tensor<2> {
        let y = attention(t.cube(0), branch, heads, rope);
        let [batch, tokens, width] = y.dims();
        let indices: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
        let indices = Tensor::<1, Int>::from_data(indices.as_slice(), &y.device());
        y.reshape([batch * tokens, width]).select(0, indices)
    }

    #[test]
    fn equals_the_rows_of_attention_over_all_tokens_whichever_inputs_are_tracked() {
        let mut cases = 0;
        let all: Vec<usize> = (0..9 * 37).collect();
        // One token; the first of each image; an image that nobody asks, one with all; none that is left out; the last alone.
        let shapes: [(usize, usize, usize, usize, &[usize]); 5] = [
            (1, 1, 1, 2, &[0]),
            (3, 5, 2, 8, &[0, 5, 10]),
            (3, 5, 3, 4, &[1, 3, 10, 11, 12, 13, 14]),
            (9, 37, 2, 12, &all),
            (2, 40, 2, 6, &[79]),
        ];
        for (batch, tokens, heads, head_dim, rows) in shapes {
            for with_rope in [false, true] {
                for alone in 0..10 {
                    // Each input by itself, all, and none.
                    let tracked = std::array::from_fn(|i| alone == 8 || alone == i);
                    let case = attention_case([batch, tokens, heads, head_dim], tracked);
                    let rope = |t: &Inputs| with_rope.then(|| rope(t));
                    let fused = |t: &Inputs| {
                        selected_attention(t.cube(0), rows, branch(t, true, true, Fp32), heads, rope(t).as_ref())
                    };
                    assert_same(&case, fused, |t| {
                        let (branch, rope) = (branch(t, true, true, Fp32), rope(t));
                        composed::selected_attention(t.cube(0), rows, branch, heads, rope.as_ref())
                    });
                    assert_same(&case, fused, |t| {
                        of_all(t, rows, branch(t, true, true, Fp32), heads, rope(t).as_ref())
                    });
                    cases += 2;
                }
            }
        }
        assert_eq!(cases, 5 * 2 * 10 * 2);
    }

    #[test]
    fn without_biases_or_layer_scale_equals_composed() {
        let rows = [0, 2, 7, 8, 20];
        for (bias, gamma) in [(false, true), (true, false), (false, false)] {
            let mut tracked = [true; 8];
            (tracked[4], tracked[6], tracked[7]) = (bias, bias, gamma);
            assert_same(
                &attention_case([3, 7, 2, 6], tracked),
                |t| selected_attention(t.cube(0), &rows, branch(t, bias, gamma, Fp32), 2, Some(&rope(t))),
                |t| composed::selected_attention(t.cube(0), &rows, branch(t, bias, gamma, Fp32), 2, Some(&rope(t))),
            );
        }
    }

    #[test]
    fn no_row_is_an_empty_result() {
        let case = attention_case([2, 3, 1, 4], [false; 8]);
        let y = run(&case, |t| selected_attention(t.cube(0), &[], branch(t, true, true, Fp32), 1, None));
        assert_eq!(y, [Vec::<f32>::new()]);
    }

    #[test]
    #[should_panic(expected = "rows of x [2, 3, 4] have to be ascending and within")]
    fn rows_outside_panic() {
        run(&attention_case([2, 3, 1, 4], [false; 8]), |t| {
            selected_attention(t.cube(0), &[2, 6], branch(t, true, true, Fp32), 1, None)
        });
    }

    #[test]
    fn neither_threads_nor_computing_again_change_the_bits() {
        let case = attention_case([5, 33, 3, 8], [true; 8]);
        let rows: Vec<usize> = (0..5 * 33).filter(|i| i % 33 == 0 || i % 7 == 3).collect();
        let with = |threads: usize, recompute: bool| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let results = pool.install(|| {
                run(&case, |t| {
                    selected_attention(
                        t.cube(0),
                        &rows,
                        Branch { recompute, ..branch(t, true, true, Fp32) },
                        3,
                        Some(&rope(t)),
                    )
                })
            });
            results.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(with(1, false), with(3, false));
        assert_eq!(with(1, false), with(2, true));
    }
}
