//! Self-attention on packed projections, one (image, head) at a time.
//!
//! A task gathers `q` and `k` of its head (rotated), and walks over blocks of query rows whose scores fit in the cache:
//! `P = softmax(q·kᵀ/√d)`, `out = P·v`. No `[B, H, N, N]` tensor exists. The backward pass keeps the
//! packed input only and computes `P` again (the recomputation of Dao et al. 2022, "FlashAttention"); with `g` the gradient
//! of `out`: `dv = Pᵀ·g`, `dS = P∘(g·vᵀ − Σ_keys P∘(g·vᵀ))`, `dq = dS·k/√d`, `dk = dSᵀ·q/√d`, where the last two go back
//! through the inverse rotation.
//!
//! Tasks are images when there are enough of them for every thread, else heads; both give the same bits.

mod head;
mod selected;

use burn::backend::flex::FlexTensor;

pub(super) use self::head::Rotation;
use self::head::{Head, Place, Scratch};
pub(super) use self::selected::Selected;
use super::memory::zeroed;
use super::operation::Operation;
use super::{contiguous, elements, tensor};
use crate::Precision;

/// Scores that a task holds at a time: 256 KiB.
const SCORES: usize = 64 * 1024;

/// Input `qkv [B, N, 3·D]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    /// Heads, which divide `D`.
    pub(crate) num_heads: usize,
    /// Of its products.
    pub(crate) precision: Precision,
}

/// Inputs `qkv [B, N, 3·D]` and the cosines and sines `[N, d]` of a rotation, which receive no gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RotaryAttention {
    /// Heads, which divide `D`.
    pub(crate) num_heads: usize,
    /// Of its products.
    pub(crate) precision: Precision,
}

impl Operation<1> for Attention {
    fn forward(&self, [qkv]: [FlexTensor; 1]) -> FlexTensor {
        let sizes = Sizes::new(&qkv, self.num_heads);
        let qkv = contiguous(qkv);
        tensor(forward(elements(&qkv), sizes, None, self.precision), sizes.output())
    }

    fn reads(&self, _: [bool; 1]) -> [bool; 1] {
        [true]
    }

    fn backward(&self, [qkv]: [Option<FlexTensor>; 1], grad: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let qkv = contiguous(qkv.expect("the projections are kept"));
        let sizes = Sizes::new(&qkv, self.num_heads);
        let grad = contiguous(grad);
        [Some(tensor(backward(elements(&qkv), elements(&grad), sizes, None, self.precision), sizes.input()))]
    }
}

impl Operation<3> for RotaryAttention {
    fn forward(&self, [qkv, cos, sin]: [FlexTensor; 3]) -> FlexTensor {
        let sizes = Sizes::new(&qkv, self.num_heads);
        let (qkv, cos, sin) = (contiguous(qkv), contiguous(cos), contiguous(sin));
        let rotation = Rotation::new(&cos, &sin, sizes);
        tensor(forward(elements(&qkv), sizes, Some(rotation), self.precision), sizes.output())
    }

    fn reads(&self, [qkv, ..]: [bool; 3]) -> [bool; 3] {
        [qkv; 3]
    }

    fn backward(
        &self,
        inputs: [Option<FlexTensor>; 3],
        grad: FlexTensor,
        [for_qkv, ..]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        if !for_qkv {
            return [None, None, None];
        }
        let [qkv, cos, sin] = inputs.map(|input| contiguous(input.expect("the inputs are kept")));
        let sizes = Sizes::new(&qkv, self.num_heads);
        let rotation = Rotation::new(&cos, &sin, sizes);
        let grad = contiguous(grad);
        let dqkv = backward(elements(&qkv), elements(&grad), sizes, Some(rotation), self.precision);
        [Some(tensor(dqkv, sizes.input())), None, None]
    }
}

/// The sizes of packed projections.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    batch: usize,
    tokens: usize,
    heads: usize,
    head_dim: usize,
}

impl Sizes {
    pub(super) fn new(qkv: &FlexTensor, heads: usize) -> Self {
        let [batch, tokens, packed] = qkv.layout().shape().dims();
        assert!(
            heads > 0 && packed.is_multiple_of(3 * heads),
            "self_attention: {packed} packed features are not 3 times {heads} heads of one width"
        );
        Self { batch, tokens, heads, head_dim: packed / (3 * heads) }
    }

    /// Of tokens `[B, N, D]`.
    pub(super) fn of(x: &FlexTensor, heads: usize) -> Self {
        let [batch, tokens, width] = x.layout().shape().dims();
        assert!(heads > 0 && width.is_multiple_of(heads), "attention: width {width} and {heads} heads");
        Self { batch, tokens, heads, head_dim: width / heads }
    }

    pub(super) fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn input(&self) -> [usize; 3] {
        [self.batch, self.tokens, 3 * self.width()]
    }

    fn output(&self) -> [usize; 3] {
        [self.batch, self.tokens, self.width()]
    }

    /// Query rows of one block.
    fn block(&self) -> usize {
        (SCORES / self.tokens).max(64).next_multiple_of(16).min(self.tokens)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Calls `f(image, head, slice, places, scratch)` for every head, where the head's rows of each of the parts lie at their
/// `places` of the slice, and returns the result `[B, N, parts·D]`.
fn for_each_head<const PARTS: usize>(
    sizes: Sizes,
    f: impl Fn(usize, usize, &mut [f32], [Place; PARTS], &mut Scratch) + Sync + Send,
) -> Vec<f32> {
    let Sizes { batch, tokens, heads, head_dim } = sizes;
    let row = PARTS * sizes.width();
    let len = batch * tokens * row;
    if len == 0 {
        return Vec::new();
    }
    let among = |head: usize| std::array::from_fn(|part| Place { first: part * sizes.width() + head * head_dim, row });
    let image_len = tokens * row;
    if heads == 1 || batch >= 4 * rayon::current_num_threads() {
        return zeroed(len, image_len, Scratch::default, |scratch, image, slice| {
            for head in 0..heads {
                f(image, head, slice, among(head), scratch);
            }
        });
    }
    // Few images: each head into its own memory, and then side by side.
    let alone_places = std::array::from_fn(|part| Place { first: part * head_dim, row: PARTS * head_dim });
    let head_len = tokens * PARTS * head_dim;
    let alone = zeroed(len, head_len, Scratch::default, |scratch, i, slice| {
        f(i / heads, i % heads, slice, alone_places, scratch);
    });
    zeroed(
        len,
        image_len,
        || (),
        |_, image, slice| {
            for (head, rows) in alone[image * image_len..][..image_len].chunks_exact(head_len).enumerate() {
                let places: [Place; PARTS] = among(head);
                for (i, row) in rows.chunks_exact(head_dim).enumerate() {
                    slice[places[i % PARTS].start(i / PARTS)..][..head_dim].copy_from_slice(row);
                }
            }
        },
    )
}

/// The heads' results side by side, `[B, N, D]`.
pub(super) fn forward(qkv: &[f32], sizes: Sizes, rotation: Option<Rotation>, precision: Precision) -> Vec<f32> {
    for_each_head(sizes, |image, head, out, [place], scratch| {
        Head::packed(qkv, sizes, image, head, rotation, precision).forward(out, place, scratch);
    })
}

/// The gradient of the projections, given that of the result.
pub(super) fn backward(
    qkv: &[f32],
    grad: &[f32],
    sizes: Sizes,
    rotation: Option<Rotation>,
    precision: Precision,
) -> Vec<f32> {
    let image_len = sizes.tokens * sizes.width();
    for_each_head(sizes, |image, head, dqkv, places, scratch| {
        let grad = (&grad[image * image_len..][..image_len], Place::among_heads(sizes, head));
        Head::packed(qkv, sizes, image, head, rotation, precision).backward(grad, dqkv, places, scratch);
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::SCORES;
    use crate::Precision::Fp32;
    use crate::testing::{Case, assert_same, numbers, run};
    use crate::{RopeTable, composed, self_attention};

    /// A table of rotations whose first `prefix` tokens stay as they are.
    fn table(cos: Tensor<2>, sin: Tensor<2>, prefix: usize) -> RopeTable {
        let [tokens, head_dim] = cos.dims();
        let (device, width) = (cos.device(), 0..head_dim);
        let ones = Tensor::ones([prefix, head_dim], &device);
        let zeros = Tensor::zeros([prefix, head_dim], &device);
        RopeTable {
            cos: Tensor::cat(vec![ones, cos.slice([prefix..tokens, width.start..width.end])], 0),
            sin: Tensor::cat(vec![zeros, sin.slice([prefix..tokens, width.start..width.end])], 0),
        }
    }

    fn compare(batch: usize, tokens: usize, heads: usize, head_dim: usize, rope: bool, tracked: bool) {
        let packed: &[usize] = &[batch, tokens, 3 * heads * head_dim];
        if rope {
            let rows: &[usize] = &[tokens, head_dim];
            let case = Case::new(&[packed, rows, rows], &[tracked, false, false]).scaled(2.0);
            let prefix = tokens.min(3) - 1;
            assert_same(
                &case,
                |t| self_attention(t.cube(0), heads, Some(&table(t.matrix(1), t.matrix(2), prefix)), Fp32),
                |t| composed::self_attention(t.cube(0), heads, Some(&table(t.matrix(1), t.matrix(2), prefix)), Fp32),
            );
        } else {
            let case = Case::new(&[packed], &[tracked]).scaled(2.0);
            assert_same(
                &case,
                |t| self_attention(t.cube(0), heads, None, Fp32),
                |t| composed::self_attention(t.cube(0), heads, None, Fp32),
            );
        }
    }

    #[test]
    fn equals_composed_with_and_without_rotation_and_gradients() {
        let mut cases = 0;
        // One token; few images, which are split into heads; many, which are not; widths that no vector divides.
        for (batch, tokens, heads, head_dim) in
            [(1, 1, 1, 2), (2, 5, 3, 8), (9, 10, 2, 12), (3, 41, 1, 16), (2, 37, 6, 64), (70, 4, 5, 6)]
        {
            for rope in [false, true] {
                for tracked in [false, true] {
                    compare(batch, tokens, heads, head_dim, rope, tracked);
                    cases += 1;
                }
            }
        }
        for (batch, tokens, heads, head_dim) in [(2, 1, 4, 1), (3, 7, 2, 13)] {
            compare(batch, tokens, heads, head_dim, false, true);
            cases += 1;
        }
        assert_eq!(cases, 26);
    }

    #[test]
    fn sequence_of_several_blocks_equals_composed() {
        let tokens = 600;
        assert!(tokens * tokens > 4 * SCORES, "the sequence has to be longer than a block");
        compare(1, tokens, 2, 24, true, true);
        compare(1, tokens, 1, 13, false, true);
    }

    #[test]
    fn transposed_projections_are_read_in_their_own_order() {
        let case = Case::new(&[&[12, 4, 3]], &[true]);
        assert_same(
            &case,
            |t| self_attention(t.cube(0).permute([2, 1, 0]), 2, None, Fp32),
            |t| composed::self_attention(t.cube(0).permute([2, 1, 0]), 2, None, Fp32),
        );
    }

    #[test]
    fn number_of_threads_does_not_change_the_bits() {
        let case = Case::new(&[&[4, 33, 72]], &[true]);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            // One thread takes whole images, four take heads.
            pool.install(|| run(&case, |t| self_attention(t.cube(0), 3, None, Fp32)))
        };
        let bits = |r: Vec<Vec<f32>>| r.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(with(1)), bits(with(4)));
    }

    #[test]
    fn large_scores_do_not_overflow_and_not_a_number_is_not_hidden() {
        let device = burn::tensor::Device::flex();
        let equal = Tensor::<3>::ones([1, 3, 6], &device) * 1e4;
        let y = self_attention(equal, 1, None, Fp32).to_data().try_to_vec::<f32>().expect("f32");
        assert_eq!(y, [1e4; 6]);
        let broken = Tensor::<3>::ones([1, 3, 6], &device) * f32::NAN;
        let y = self_attention(broken, 1, None, Fp32).to_data().try_to_vec::<f32>().expect("f32");
        assert!(y.iter().all(|v| v.is_nan()));
    }

    /// `Σ attention(qkv)·g` in f64: the formulas, one scalar at a time.
    fn objective(
        qkv: &[f64],
        cos: &[f64],
        sin: &[f64],
        g: &[f64],
        tokens: usize,
        heads: usize,
        head_dim: usize,
    ) -> f64 {
        let width = heads * head_dim;
        let half = head_dim / 2;
        let part = |part: usize, token: usize, head: usize, i: usize| {
            qkv[token * 3 * width + part * width + head * head_dim + i]
        };
        let rotated = |p: usize, token: usize, head: usize, i: usize| {
            let turned = if i < half { -part(p, token, head, i + half) } else { part(p, token, head, i - half) };
            part(p, token, head, i) * cos[token * head_dim + i] + turned * sin[token * head_dim + i]
        };
        let mut total = 0.0;
        for head in 0..heads {
            for query in 0..tokens {
                let scores: Vec<f64> = (0..tokens)
                    .map(|key| {
                        let dot: f64 =
                            (0..head_dim).map(|i| rotated(0, query, head, i) * rotated(1, key, head, i)).sum();
                        (dot / (head_dim as f64).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = scores.iter().sum();
                for i in 0..head_dim {
                    let value: f64 = (0..tokens).map(|key| scores[key] / sum * part(2, key, head, i)).sum();
                    total += value * g[query * width + head * head_dim + i];
                }
            }
        }
        total
    }

    #[test]
    fn gradient_agrees_with_finite_differences_in_f64() {
        let (tokens, heads, head_dim) = (5, 2, 6);
        let packed = 3 * heads * head_dim;
        let rows: &[usize] = &[tokens, head_dim];
        let case = Case::new(&[&[1, tokens, packed], rows, rows], &[true, false, false]);
        let results = run(&case, |t| {
            self_attention(t.cube(0), heads, Some(&RopeTable { cos: t.matrix(1), sin: t.matrix(2) }), Fp32)
        });
        let double = |seed: u64, len: usize| numbers(len, seed).into_iter().map(f64::from).collect::<Vec<_>>();
        let mut qkv = double(1, tokens * packed);
        let (cos, sin) = (double(2, tokens * head_dim), double(3, tokens * head_dim));
        let g = double(99, tokens * heads * head_dim);
        for i in 0..qkv.len() {
            let (h, value) = (1e-5, qkv[i]);
            let mut at = |v: f64| {
                qkv[i] = v;
                objective(&qkv, &cos, &sin, &g, tokens, heads, head_dim)
            };
            let slope = (at(value + h) - at(value - h)) / (2.0 * h);
            at(value);
            let actual = f64::from(results[1][i]);
            assert!((actual - slope).abs() < 1e-5, "element {i}: {actual} and {slope}");
        }
        assert_eq!(results[1].len(), 180);
    }
}
