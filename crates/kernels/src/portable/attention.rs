//! Self-attention on packed projections. Its maps exist a slab at a time and are computed again in the backward pass.

use burn::backend::DispatchTensor;
use burn::tensor::{Tensor, activation, s};

use super::SLAB;
use super::operation::{Operation, unary};
use crate::composed::heads;
use crate::precision::widened;
use crate::{Precision, RopeTable};

/// See [`crate::self_attention`].
pub(crate) fn self_attention(
    qkv: Tensor<3>,
    num_heads: usize,
    rope: Option<&RopeTable>,
    precision: Precision,
) -> Tensor<3> {
    Tensor::from_dispatch(unary(qkv.into_dispatch(), SelfAttention::new(num_heads, rope, precision)))
}

/// Input `qkv [B, N, 3·D]`.
#[derive(Clone, Debug)]
pub(super) struct SelfAttention {
    num_heads: usize,
    rope: Option<RopeTable>,
    precision: Precision,
    /// Elements of maps that exist at a time.
    slab: usize,
}

/// Turned queries and keys, and values, `[B·heads, N, d]` each, as operands of products. Plain.
#[derive(Clone, Debug)]
pub(super) struct Heads {
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
}

impl Operation<1> for SelfAttention {
    type Kept = (Heads, usize);

    fn forward(&self, [qkv]: [DispatchTensor; 1], keep: bool) -> (DispatchTensor, Option<Self::Kept>) {
        let qkv = Tensor::<3>::from_dispatch(qkv);
        let [batch, tokens, packed] = qkv.dims();
        let heads = self.heads(qkv);
        let y = widened(self.values(&heads, batch)).reshape([batch, tokens, packed / 3]);
        (y.into_dispatch(), keep.then_some((heads, batch)))
    }

    fn backward(&self, (heads, batch): Self::Kept, grad: DispatchTensor) -> [DispatchTensor; 1] {
        let grad = Tensor::<3>::from_dispatch(grad);
        let [_, tokens, width] = grad.dims();
        [self.gradient(&heads, grad.reshape([batch * tokens, width]), batch).into_dispatch()]
    }
}

impl SelfAttention {
    pub(super) fn new(num_heads: usize, rope: Option<&RopeTable>, precision: Precision) -> Self {
        let plain =
            |table: &Tensor<2>| if table.device().is_autodiff() { table.clone().inner() } else { table.clone() };
        let rope = rope.map(|RopeTable { cos, sin }| RopeTable { cos: plain(cos), sin: plain(sin) });
        Self { num_heads, rope, precision, slab: SLAB }
    }

    /// Of packed projections `[B, N, 3·D]`.
    pub(super) fn heads(&self, qkv: Tensor<3>) -> Heads {
        let (q, k, v) = heads(qkv, self.num_heads, self.rope.as_ref());
        let operand = |part: Tensor<4>| {
            let [batch, heads, tokens, width] = part.dims();
            self.precision.operand(part.reshape([batch * heads, tokens, width]))
        };
        Heads { q: operand(q), k: operand(k), v: operand(v) }
    }

    /// The results of the heads `[B·N, D]`, as the products leave them.
    pub(super) fn values(&self, heads: &Heads, batch: usize) -> Tensor<2> {
        let [parts] = self.in_slabs(heads, [], |[q, k, v], []| {
            let probabilities = self.precision.operand(probabilities(q, k));
            [probabilities.matmul(v)]
        });
        let [_, tokens, width] = parts.dims();
        let y = parts.reshape([batch, self.num_heads, tokens, width]).permute([0, 2, 1, 3]);
        y.reshape([batch * tokens, self.num_heads * width])
    }

    /// The gradient of the packed projections `[B, N, 3·D]`, given that of the heads' results `[B·N, D]`.
    pub(super) fn gradient(&self, heads: &Heads, grad: Tensor<2>, batch: usize) -> Tensor<3> {
        let [_, tokens, width] = heads.q.dims();
        let grad = grad.reshape([batch, tokens, self.num_heads, width]).permute([0, 2, 1, 3]);
        let grad = self.precision.operand(grad.reshape([batch * self.num_heads, tokens, width]));
        let [dq, dk, dv] = self.in_slabs(heads, [grad], |[q, k, v], [grad]| {
            let probabilities = probabilities(q.clone(), k.clone());
            let dv = widened(self.precision.operand(probabilities.clone()).transpose().matmul(grad.clone()));
            let along = widened(grad.matmul(v.transpose()));
            let mean = (along.clone() * probabilities.clone()).sum_dim(2);
            let dscores = (along - mean) * probabilities / (width as f64).sqrt();
            let dscores = self.precision.operand(dscores);
            let dq = widened(dscores.clone().matmul(k));
            let dk = widened(dscores.transpose().matmul(q));
            [dq, dk, dv]
        });
        let part = |part: Tensor<3>| part.reshape([batch, self.num_heads, tokens, width]);
        let (mut dq, mut dk) = (part(dq), part(dk));
        if let Some(table) = &self.rope {
            (dq, dk) = (rotate_gradient(dq, table), rotate_gradient(dk, table));
        }
        let packed = Tensor::stack::<5>(vec![dq, dk, part(dv)], 0);
        packed.permute([1, 3, 0, 2, 4]).reshape([batch, tokens, 3 * self.num_heads * width])
    }

    /// Applies `f` to as many heads at a time as have maps of `slab` elements, and at least one; joins what it makes of them.
    fn in_slabs<const G: usize, const R: usize>(
        &self,
        Heads { q, k, v }: &Heads,
        others: [Tensor<3>; G],
        f: impl Fn([Tensor<3>; 3], [Tensor<3>; G]) -> [Tensor<3>; R],
    ) -> [Tensor<3>; R] {
        let [count, tokens, _] = q.dims();
        let size = (self.slab / (tokens * tokens).max(1)).max(1);
        if size >= count {
            return f([q.clone(), k.clone(), v.clone()], others);
        }
        let mut results = [const { Vec::new() }; R];
        for first in (0..count).step_by(size) {
            let part = |x: &Tensor<3>| x.clone().slice(s![first..count.min(first + size), .., ..]);
            for (all, one) in results.iter_mut().zip(f([q, k, v].map(part), others.each_ref().map(part))) {
                all.push(one);
            }
        }
        results.map(|parts| Tensor::cat(parts, 0))
    }
}

/// `softmax(q·kᵀ/√d)`, `[heads, N, N]`, in single precision.
fn probabilities(q: Tensor<3>, k: Tensor<3>) -> Tensor<3> {
    let width = q.dims()[2];
    activation::softmax(widened(q.matmul(k.transpose())) / (width as f64).sqrt(), 2)
}

/// The gradient of what [`heads`] turned, given that of its result: turned back where the table's two halves are equal, as
/// those of a rotation are; right for any table.
fn rotate_gradient(grad: Tensor<4>, table: &RopeTable) -> Tensor<4> {
    let RopeTable { cos, sin } = table;
    let half = grad.dims()[3] / 2;
    let mut halves = (grad.clone() * sin.clone().unsqueeze()).split(half, 3).into_iter();
    let (a, b) = (halves.next().expect("two halves"), halves.next().expect("two halves"));
    grad * cos.clone().unsqueeze() + Tensor::cat(vec![b, a.neg()], 3)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::{SelfAttention, self_attention, unary};
    use crate::Precision::Fp32;
    use crate::testing::{Case, Inputs, assert_same};
    use crate::{RopeTable, composed};

    fn table(t: &Inputs) -> RopeTable {
        RopeTable { cos: t.matrix(1), sin: t.matrix(2) }
    }

    fn case(batch: usize, tokens: usize, heads: usize, width: usize, tracked: bool) -> Case {
        let table: &[usize] = &[tokens, width];
        Case::new(&[&[batch, tokens, 3 * heads * width], table, table], &[tracked, false, false])
    }

    #[test]
    fn equals_composed_with_and_without_rotation_and_gradients() {
        let mut cases = 0;
        for (batch, tokens, heads, width) in [(1, 1, 1, 2), (2, 5, 3, 8), (3, 41, 1, 16), (2, 37, 6, 10)] {
            for rope in [false, true] {
                for tracked in [false, true] {
                    let rope = |t: &Inputs| rope.then(|| table(t));
                    assert_same(
                        &case(batch, tokens, heads, width, tracked),
                        |t| self_attention(t.cube(0), heads, rope(t).as_ref(), Fp32),
                        |t| composed::self_attention(t.cube(0), heads, rope(t).as_ref(), Fp32),
                    );
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, 16);
    }

    #[test]
    fn slabs_cover_every_head_once() {
        let (batch, tokens, heads) = (3, 7, 5);
        let maps = batch * heads;
        let mut cases = 0;
        // Less than a map; one; some, with a rest; all but one; all.
        for slab in [1, 49, 4 * 49, (maps - 1) * 49, maps * 49] {
            assert_same(
                &case(batch, tokens, heads, 4, true),
                |t| {
                    let operation = SelfAttention { slab, ..SelfAttention::new(heads, Some(&table(t)), Fp32) };
                    Tensor::from_dispatch(unary(t.cube(0).into_dispatch(), operation))
                },
                |t| composed::self_attention(t.cube(0), heads, Some(&table(t)), Fp32),
            );
            cases += 1;
        }
        assert_eq!(cases, 5);
    }
}
