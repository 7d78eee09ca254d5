//! The attention branch of a transformer block, `x + γ∘(attention(LN(x)·Wᵀ + b)·Wₚᵀ + bₚ)`, as one operation.
//!
//! Of what lies between input and result the packed projections and the heads' results are kept for the backward pass.

use burn::backend::flex::FlexTensor;

use super::attention::{Rotation, Sizes, backward, forward};
use super::branch::{Norm, Projection, add_bias};
use super::gemm::{Matrix, multiply};
use super::linear::column_sums;
use super::operation::Branch;
use super::{ROW_BLOCK, contiguous, dims2, elements, for_each_block, tensor};

/// Inputs `x [B, N, D]`; the norm's `weight [D]`, `bias [D]`; the packed projection's `W [3·D, D]`, `b [3·D]`; the last
/// one's `Wₚ [D, D]`, `bₚ [D]`; `γ [D]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionBranch {
    /// Heads, which divide `D`.
    pub(crate) num_heads: usize,
    /// Added to the variance.
    pub(crate) eps: f64,
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
    tables: Option<[FlexTensor; 2]>,
    /// `[B, N, 3·D]`.
    qkv: FlexTensor,
    /// `[B·N, D]`.
    heads: FlexTensor,
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
        let ([packed, input], rows) = (dims2(&weight), batch * tokens);
        assert!(
            input == width && packed == 3 * width,
            "attention: x [{batch}, {tokens}, {width}] and packed weight [{packed}, {input}]"
        );
        let (x, weight, bias) = (contiguous(x), contiguous(weight), contiguous(bias));
        let norm = Norm::new(norm_weight, norm_bias, self.eps);
        let projection = Projection::new(w_out, b_out, gamma);
        let normalized = norm.forward(elements(&x), width);
        let weights = Matrix::new(elements(&weight), packed, width);
        let mut qkv = multiply(Matrix::new(&normalized, rows, width), weights.t());
        drop(normalized);
        let offset = elements(&bias);
        assert_eq!(offset.len(), packed, "attention: bias [{}] of {packed} packed features", offset.len());
        for_each_block(&mut qkv, ROW_BLOCK * packed.max(1), &mut [], 0, |_, rows, _| add_bias(rows, offset));
        let qkv = tensor(qkv, [batch, tokens, packed]);
        let sizes = Sizes::new(&qkv, self.num_heads);
        let heads = forward(elements(&qkv), sizes, rotation(&tables, sizes));
        if !keep {
            drop(qkv);
            return (projection.forward(x, &heads, width), None);
        }
        let y = projection.forward(x.clone(), &heads, width);
        let heads = tensor(heads, [rows, width]);
        (y, Some(Kept { x, norm, weight, projection, tables, qkv, heads }))
    }

    fn gradients(&self, kept: Kept, grad: FlexTensor) -> [FlexTensor; 8] {
        let Kept { x, norm, weight, projection, tables, qkv, heads } = kept;
        let sizes = Sizes::new(&qkv, self.num_heads);
        let [packed, width] = dims2(&weight);
        let grad = contiguous(grad);
        let g = elements(&grad);
        let rows = g.len() / width.max(1);
        let [dw_out, db_out, dgamma] = projection.backward(g, elements(&heads), width);
        drop(heads);
        let dheads = projection.backward_input(g, width);
        let dqkv = backward(elements(&qkv), &dheads, sizes, rotation(&tables, sizes));
        drop((dheads, qkv));

        let shape: [usize; 3] = x.layout().shape().dims();
        let x = elements(&x);
        let dq = Matrix::new(&dqkv, rows, packed);
        let normalized = norm.forward(x, width);
        let dweight = multiply(dq.t(), Matrix::new(&normalized, rows, width));
        drop(normalized);
        let dbias = column_sums(&dqkv, rows, packed);
        let dnormalized = multiply(dq, Matrix::new(elements(&weight), packed, width));
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

    use crate::flex::testing::{Case, Inputs, assert_same, run};
    use crate::{Normalization, Projection, RopeTable, attention, composed};

    type Function =
        fn(Tensor<3>, Normalization, Projection, usize, Option<&RopeTable>, Projection, Option<Tensor<1>>) -> Tensor<3>;

    #[derive(Clone, Copy)]
    struct Parts {
        rope: bool,
        bias: bool,
        gamma: bool,
    }

    const ALL: Parts = Parts { rope: true, bias: true, gamma: true };

    fn apply(f: Function, t: &Inputs, heads: usize, parts: Parts) -> Tensor<3> {
        let norm = Normalization { weight: t.vector(1), bias: t.vector(2), eps: 1e-5 };
        let qkv = Projection { weight: t.matrix(3), bias: parts.bias.then(|| t.vector(4)) };
        let out = Projection { weight: t.matrix(5), bias: parts.bias.then(|| t.vector(6)) };
        let rope = RopeTable { cos: t.matrix(8), sin: t.matrix(9) };
        f(t.cube(0), norm, qkv, heads, parts.rope.then_some(&rope), out, parts.gamma.then(|| t.vector(7)))
    }

    fn case(batch: usize, tokens: usize, heads: usize, head_dim: usize, tracked: &[bool; 8]) -> Case {
        let width = heads * head_dim;
        let tracked: Vec<bool> = tracked.iter().copied().chain([false; 2]).collect();
        Case::new(
            &[
                &[batch, tokens, width],
                &[width],
                &[width],
                &[3 * width, width],
                &[3 * width],
                &[width, width],
                &[width],
                &[width],
                &[tokens, head_dim],
                &[tokens, head_dim],
            ],
            &tracked,
        )
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
                        &case(batch, tokens, heads, head_dim, &tracked),
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
            let parts = Parts { rope: true, bias, gamma };
            assert_same(
                &case(3, 7, 2, 6, &tracked),
                |t| apply(attention, t, 2, parts),
                |t| apply(composed::attention, t, 2, parts),
            );
        }
    }

    #[test]
    fn number_of_threads_does_not_change_the_bits() {
        let case = case(5, 33, 3, 8, &[true; 8]);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| run(&case, |t| apply(attention, t, 3, ALL)))
        };
        let bits = |r: Vec<Vec<f32>>| r.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(with(1)), bits(with(3)));
    }
}
