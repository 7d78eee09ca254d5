//! The attention branch of a transformer block, `x + γ∘(attention(LN(x)·Wᵀ + b)·Wₚᵀ + bₚ)`, as one operation.
//!
//! Of what lies between input and result the packed projections and the heads' results are kept for the backward pass, or
//! not even these where they are to be computed again.

use burn::backend::flex::FlexTensor;

use super::attention::{Rotation, Sizes, backward, forward};
use super::branch::{Norm, Projection, add_bias};
use super::gemm::{Matrix, multiply};
use super::linear::column_sums;
use super::memory::{Stored, halved, widened};
use super::operation::Branch;
use super::{ROW_BLOCK, contiguous, dims2, elements, for_each_block, tensor};
use crate::Precision;

/// Inputs `x [B, N, D]`; the norm's `weight [D]`, `bias [D]`; the packed projection's `W [3·D, D]`, `b [3·D]`; the last
/// one's `Wₚ [D, D]`, `bₚ [D]`; `γ [D]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionBranch {
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
#[derive(Clone, Copy, Debug)]
pub(crate) struct RotaryAttentionBranch(pub(crate) AttentionBranch);

/// What the backward pass reads.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    x: FlexTensor,
    norm: Norm,
    weight: FlexTensor,
    projection: Projection,
    bias: FlexTensor,
    tables: Option<[FlexTensor; 2]>,
    /// The packed projections `[B, N, 3·D]`, of bfloat16 before their bias, where nothing is lost, and the heads' results
    /// `[B·N, D]`; `None` when they are computed again.
    between: Option<[Stored; 2]>,
}

impl Branch<8> for AttentionBranch {
    type Kept = Kept;

    fn forward(&self, inputs: [FlexTensor; 8], keep: bool) -> (FlexTensor, Option<Kept>) {
        self.run(inputs, None, keep)
    }

    fn backward(&self, kept: Kept, grad: FlexTensor) -> [FlexTensor; 8] {
        self.gradients(kept, grad)
    }
}

impl Branch<10> for RotaryAttentionBranch {
    type Kept = Kept;

    fn forward(&self, [a, b, c, d, e, f, g, h, cos, sin]: [FlexTensor; 10], keep: bool) -> (FlexTensor, Option<Kept>) {
        self.0.run([a, b, c, d, e, f, g, h], Some([contiguous(cos), contiguous(sin)]), keep)
    }

    fn backward(&self, kept: Kept, grad: FlexTensor) -> [FlexTensor; 10] {
        let tables = kept.tables.clone().expect("the tables are kept");
        let [a, b, c, d, e, f, g, h] = self.0.gradients(kept, grad);
        // Nothing tracks the tables: whatever stands in the place of their gradients is left there.
        let [cos, sin] = tables;
        [a, b, c, d, e, f, g, h, cos, sin]
    }
}

impl AttentionBranch {
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
        let (x, weight, bias) = (contiguous(x), contiguous(weight), contiguous(bias));
        let norm = Norm::new(norm_weight, norm_bias, self.eps);
        let projection = Projection::new(w_out, b_out, gamma, self.precision);
        let biases = elements(&bias).len();
        assert_eq!(biases, packed, "attention: bias [{biases}] of {packed} packed features");
        let keeps = keep && !self.recompute;
        let (heads, packed) = {
            let unbiased = self.unbiased(&x, &norm, &weight);
            let half = (keeps && self.precision == Precision::Bf16).then(|| halved(&unbiased));
            let qkv = self.with_bias(unbiased, &bias);
            let heads = self.heads(&qkv, &x, &tables);
            (heads, half.map(Stored::Half).or_else(|| keeps.then_some(Stored::Single(qkv))))
        };
        if !keep {
            return (projection.forward(x, &heads, width), None);
        }
        let y = projection.forward(x.clone(), &heads, width);
        let between = packed.map(|packed| [packed, Stored::new(heads, self.precision)]);
        (y, Some(Kept { x, norm, weight, projection, bias, tables, between }))
    }

    /// The packed projections `[B, N, 3·D]` before their bias.
    fn unbiased(&self, x: &FlexTensor, norm: &Norm, weight: &FlexTensor) -> Vec<f32> {
        let [packed, width] = dims2(weight);
        let normalized = norm.forward(elements(x), width);
        let rows = Matrix::new(&normalized, normalized.len() / width.max(1), width);
        multiply(rows, Matrix::new(elements(weight), packed, width).t(), self.precision)
    }

    fn with_bias(&self, mut qkv: Vec<f32>, bias: &FlexTensor) -> Vec<f32> {
        let bias = elements(bias);
        for_each_block(&mut qkv, ROW_BLOCK * bias.len().max(1), &mut [], 0, |_, rows, _| add_bias(rows, bias));
        qkv
    }

    /// The heads' results `[B·N, D]`.
    fn heads(&self, qkv: &[f32], x: &FlexTensor, tables: &Option<[FlexTensor; 2]>) -> Vec<f32> {
        let sizes = Sizes::of(x, self.num_heads);
        forward(qkv, sizes, rotation(tables, sizes), self.precision)
    }

    fn gradients(&self, kept: Kept, grad: FlexTensor) -> [FlexTensor; 8] {
        let Kept { x, norm, weight, projection, bias, tables, between } = kept;
        let (qkv, heads) = match between {
            Some([Stored::Half(unbiased), heads]) => (self.with_bias(widened(&unbiased), &bias), heads.into_single()),
            Some([Stored::Single(qkv), heads]) => (qkv, heads.into_single()),
            None => {
                let qkv = self.with_bias(self.unbiased(&x, &norm, &weight), &bias);
                let heads = self.heads(&qkv, &x, &tables);
                (qkv, heads)
            }
        };
        let sizes = Sizes::of(&x, self.num_heads);
        let [packed, width] = dims2(&weight);
        let grad = contiguous(grad);
        let g = elements(&grad);
        let rows = g.len() / width.max(1);
        let [dw_out, db_out, dgamma] = projection.backward(g, &heads, width);
        drop(heads);
        let dheads = projection.backward_input(g, width);
        let dqkv = backward(&qkv, &dheads, sizes, rotation(&tables, sizes), self.precision);
        drop((dheads, qkv));

        let shape: [usize; 3] = x.layout().shape().dims();
        let x = elements(&x);
        let dq = Matrix::new(&dqkv, rows, packed);
        let normalized = norm.forward(x, width);
        let dweight = multiply(dq.t(), Matrix::new(&normalized, rows, width), self.precision);
        drop(normalized);
        let dbias = column_sums(&dqkv, rows, packed);
        let dnormalized = multiply(dq, Matrix::new(elements(&weight), packed, width), self.precision);
        drop(dqkv);
        let [dx, dnorm_weight, dnorm_bias] = norm.backward(x, dnormalized, g, width);
        [
            tensor(dx, shape),
            tensor(dnorm_weight, [width]),
            tensor(dnorm_bias, [width]),
            tensor(dweight, [packed, width]),
            tensor(dbias, [packed]),
            dw_out,
            db_out,
            dgamma,
        ]
    }
}

fn rotation(tables: &Option<[FlexTensor; 2]>, sizes: Sizes) -> Option<Rotation<'_>> {
    tables.as_ref().map(|[cos, sin]| Rotation::new(cos, sin, sizes))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use crate::Precision::Fp32;
    use crate::testing::{Inputs, assert_same, attention_case, branch, rope, run};
    use crate::{Branch, RopeTable, attention, composed};

    type Function = fn(Tensor<3>, Branch, usize, Option<&RopeTable>) -> Tensor<3>;

    #[derive(Clone, Copy)]
    struct Parts {
        rope: bool,
        bias: bool,
        gamma: bool,
        recompute: bool,
    }

    const ALL: Parts = Parts { rope: true, bias: true, gamma: true, recompute: false };

    fn apply(f: Function, t: &Inputs, heads: usize, parts: Parts) -> Tensor<3> {
        let branch = Branch { recompute: parts.recompute, ..branch(t, parts.bias, parts.gamma, Fp32) };
        let rope = rope(t);
        f(t.cube(0), branch, heads, parts.rope.then_some(&rope))
    }

    #[test]
    fn equals_composed_whichever_inputs_are_tracked() {
        let mut cases = 0;
        // Few images and many, more rows than a block of the sums.
        for (batch, tokens, heads, head_dim) in [(1, 1, 1, 2), (2, 5, 3, 8), (9, 37, 2, 12)] {
            for rope in [false, true] {
                for alone in 0..10 {
                    // Each input by itself, all, and none.
                    let tracked = std::array::from_fn(|i| alone == 8 || alone == i);
                    let parts = Parts { rope, ..ALL };
                    assert_same(
                        &attention_case([batch, tokens, heads, head_dim], tracked),
                        |t| apply(attention, t, heads, parts),
                        |t| apply(composed::attention, t, heads, parts),
                    );
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, 60);
    }

    #[test]
    fn without_biases_or_layer_scale_equals_composed() {
        for (bias, gamma) in [(false, true), (true, false), (false, false)] {
            let mut tracked = [true; 8];
            (tracked[4], tracked[6], tracked[7]) = (bias, bias, gamma);
            let parts = Parts { bias, gamma, ..ALL };
            assert_same(
                &attention_case([3, 7, 2, 6], tracked),
                |t| apply(attention, t, 2, parts),
                |t| apply(composed::attention, t, 2, parts),
            );
        }
    }

    #[test]
    fn computing_again_does_not_change_the_bits() {
        let case = attention_case([3, 17, 2, 8], [true; 8]);
        let with = |recompute| {
            let results = run(&case, |t| apply(attention, t, 2, Parts { recompute, ..ALL }));
            results.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(with(true), with(false));
    }

    #[test]
    fn number_of_threads_does_not_change_the_bits() {
        let case = attention_case([5, 33, 3, 8], [true; 8]);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| run(&case, |t| apply(attention, t, 3, ALL)))
        };
        let bits = |r: Vec<Vec<f32>>| r.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(with(1)), bits(with(3)));
    }
}
