//! Self-attention on packed projections, one (image, head) at a time.
//!
//! A task gathers `q` and `k` of its head (rotated, with `1/√d` folded into `q`), and walks over blocks of query rows whose
//! scores fit in the cache: `P = softmax(q·kᵀ)`, `out = P·v`. No `[B, H, N, N]` tensor exists. The backward pass keeps the
//! packed input only and computes `P` again (the recomputation of Dao et al. 2022, "FlashAttention"); with `g` the gradient
//! of `out`: `dv = Pᵀ·g`, `dS = P∘(g·vᵀ − Σ_keys P∘(g·vᵀ))`, `dq = dS·k/√d`, `dk = dSᵀ·q/√d`, where the last two go back
//! through the inverse rotation.
//!
//! Tasks are images when there are enough of them for every thread, else heads; both give the same bits.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::gemm::{Destination, Matrix, Threads, multiply_into};
use super::operation::Operation;
use super::{contiguous, elements, simd, tensor};

/// Scores that a task holds at a time: 256 KiB.
const SCORES: usize = 64 * 1024;

/// Input `qkv [B, N, 3·D]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    /// Heads, which divide `D`.
    pub(crate) num_heads: usize,
}

/// Inputs `qkv [B, N, 3·D]` and the cosines and sines `[N, d]` of a rotation, which receive no gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RotaryAttention {
    /// Heads, which divide `D`.
    pub(crate) num_heads: usize,
}

impl Operation<1> for Attention {
    fn forward(&self, [qkv]: [FlexTensor; 1]) -> FlexTensor {
        let sizes = Sizes::new(&qkv, self.num_heads);
        let qkv = contiguous(qkv);
        tensor(forward(elements(&qkv), sizes, None), sizes.output())
    }

    fn reads(&self, _: [bool; 1]) -> [bool; 1] {
        [true]
    }

    fn backward(&self, [qkv]: [Option<FlexTensor>; 1], grad: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let qkv = contiguous(qkv.expect("the projections are kept"));
        let sizes = Sizes::new(&qkv, self.num_heads);
        let grad = contiguous(grad);
        [Some(tensor(backward(elements(&qkv), elements(&grad), sizes, None), sizes.input()))]
    }
}

impl Operation<3> for RotaryAttention {
    fn forward(&self, [qkv, cos, sin]: [FlexTensor; 3]) -> FlexTensor {
        let sizes = Sizes::new(&qkv, self.num_heads);
        let (qkv, cos, sin) = (contiguous(qkv), contiguous(cos), contiguous(sin));
        let rotation = Rotation::new(&cos, &sin, sizes);
        tensor(forward(elements(&qkv), sizes, Some(rotation)), sizes.output())
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
        [Some(tensor(backward(elements(&qkv), elements(&grad), sizes, Some(rotation)), sizes.input())), None, None]
    }
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    tokens: usize,
    heads: usize,
    head_dim: usize,
}

impl Sizes {
    fn new(qkv: &FlexTensor, heads: usize) -> Self {
        let [batch, tokens, packed] = qkv.layout().shape().dims();
        assert!(
            heads > 0 && packed % (3 * heads) == 0,
            "self_attention: {packed} packed features are not 3 times {heads} heads of one width"
        );
        Self { batch, tokens, heads, head_dim: packed / (3 * heads) }
    }

    fn width(&self) -> usize {
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

/// The tables of a rotary embedding.
#[derive(Clone, Copy)]
struct Rotation<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
}

impl<'a> Rotation<'a> {
    fn new(cos: &'a FlexTensor, sin: &'a FlexTensor, sizes: Sizes) -> Self {
        let wanted = [sizes.tokens, sizes.head_dim];
        let (cos_dims, sin_dims) = (super::dims2(cos), super::dims2(sin));
        assert!(
            cos_dims == wanted && sin_dims == wanted,
            "self_attention: rope tables {cos_dims:?} and {sin_dims:?}, sequence and head width {wanted:?}"
        );
        assert!(sizes.head_dim % 2 == 0, "self_attention: rope needs an even head width, not {}", sizes.head_dim);
        Self { cos: elements(cos), sin: elements(sin) }
    }

    /// `[a·cos − b·sin, b·cos + a·sin]` on the two halves `a`, `b` of the row of `token`.
    #[inline(always)]
    fn apply(&self, row: &mut [f32], token: usize) {
        let (a, b) = row.split_at_mut(row.len() / 2);
        let ((cos_a, cos_b), (sin_a, sin_b)) = self.halves(token, a.len());
        for i in 0..a.len() {
            (a[i], b[i]) = (a[i] * cos_a[i] - b[i] * sin_a[i], b[i] * cos_b[i] + a[i] * sin_b[i]);
        }
    }

    /// The transposed map, which takes gradients back.
    #[inline(always)]
    fn apply_transposed(&self, row: &mut [f32], token: usize) {
        let (a, b) = row.split_at_mut(row.len() / 2);
        let ((cos_a, cos_b), (sin_a, sin_b)) = self.halves(token, a.len());
        for i in 0..a.len() {
            (a[i], b[i]) = (a[i] * cos_a[i] + b[i] * sin_b[i], b[i] * cos_b[i] - a[i] * sin_a[i]);
        }
    }

    #[inline(always)]
    fn halves(&self, token: usize, half: usize) -> ((&[f32], &[f32]), (&[f32], &[f32])) {
        let range = token * 2 * half..(token + 1) * 2 * half;
        (self.cos[range.clone()].split_at(half), self.sin[range].split_at(half))
    }
}

/// Where the rows of one head lie in a slice: part `p` (of one, or of `q`, `k`, `v`) of a token starts at
/// `token·row + p·part + first`.
#[derive(Clone, Copy)]
struct Place {
    row: usize,
    part: usize,
    first: usize,
}

impl Place {
    /// Head `head` among all of them, in rows of `parts` times the width.
    fn among_heads(sizes: Sizes, parts: usize, head: usize) -> Self {
        Self { row: parts * sizes.width(), part: sizes.width(), first: head * sizes.head_dim }
    }

    /// A head alone.
    fn alone(sizes: Sizes, parts: usize) -> Self {
        Self { row: parts * sizes.head_dim, part: sizes.head_dim, first: 0 }
    }

    #[inline(always)]
    fn start(&self, token: usize, part: usize) -> usize {
        token * self.row + part * self.part + self.first
    }
}

/// Memory of one task, kept from head to head.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    k: Vec<f32>,
    probabilities: Vec<f32>,
    /// The gradients of the probabilities, then of the scores.
    dscores: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    /// One over the sum of each row of the block before it was normalised.
    inverse_sums: Vec<f32>,
}

/// Calls `f(image, head, slice, place, scratch)` for every head, where the head's rows lie at `place` of the slice, and
/// returns the result `[B, N, parts·D]`.
fn for_each_head(
    sizes: Sizes,
    parts: usize,
    f: impl Fn(usize, usize, &mut [f32], Place, &mut Scratch) + Sync + Send,
) -> Vec<f32> {
    let Sizes { batch, tokens, heads, head_dim } = sizes;
    let mut out = vec![0.0; batch * tokens * parts * sizes.width()];
    if out.is_empty() {
        return out;
    }
    let image_len = tokens * parts * sizes.width();
    if heads == 1 || batch >= 4 * rayon::current_num_threads() {
        out.par_chunks_mut(image_len).enumerate().for_each_init(Scratch::default, |scratch, (image, slice)| {
            for head in 0..heads {
                f(image, head, slice, Place::among_heads(sizes, parts, head), scratch);
            }
        });
        return out;
    }
    // Few images: each head into its own memory, and then side by side.
    let mut alone = vec![0.0; out.len()];
    let head_len = tokens * parts * head_dim;
    alone.par_chunks_mut(head_len).enumerate().for_each_init(Scratch::default, |scratch, (i, slice)| {
        f(i / heads, i % heads, slice, Place::alone(sizes, parts), scratch);
    });
    out.par_chunks_mut(image_len).zip(alone.par_chunks(image_len)).for_each(|(image, alone)| {
        for (head, rows) in alone.chunks_exact(head_len).enumerate() {
            let place = Place::among_heads(sizes, parts, head);
            for (i, row) in rows.chunks_exact(head_dim).enumerate() {
                image[place.start(i / parts, i % parts)..][..head_dim].copy_from_slice(row);
            }
        }
    });
    out
}

/// The packed rows of one head of one image.
#[derive(Clone, Copy)]
struct Head<'a> {
    sizes: Sizes,
    packed: &'a [f32],
    place: Place,
    rotation: Option<Rotation<'a>>,
}

impl<'a> Head<'a> {
    fn new(qkv: &'a [f32], sizes: Sizes, image: usize, head: usize, rotation: Option<Rotation<'a>>) -> Self {
        let len = sizes.tokens * 3 * sizes.width();
        Self { sizes, packed: &qkv[image * len..][..len], place: Place::among_heads(sizes, 3, head), rotation }
    }

    /// Copies `q` (scaled) and `k`, rotated.
    fn gather(&self, scratch: &mut Scratch) {
        let Sizes { tokens, head_dim, .. } = self.sizes;
        scratch.q.resize(tokens * head_dim, 0.0);
        scratch.k.resize(tokens * head_dim, 0.0);
        let scale = self.sizes.scale();
        simd::vectorized(
            #[inline(always)]
            || {
                for (part, rows) in [&mut scratch.q, &mut scratch.k].into_iter().enumerate() {
                    for (token, row) in rows.chunks_exact_mut(head_dim).enumerate() {
                        row.copy_from_slice(&self.packed[self.place.start(token, part)..][..head_dim]);
                        if let Some(rotation) = self.rotation {
                            rotation.apply(row, token);
                        }
                        if part == 0 {
                            row.iter_mut().for_each(|v| *v *= scale);
                        }
                    }
                }
            },
        );
    }

    fn v(&self) -> Matrix<'a> {
        let Sizes { tokens, head_dim, .. } = self.sizes;
        Matrix::strided(&self.packed[self.place.start(0, 2)..], tokens, head_dim, self.place.row)
    }

    /// The exponentials of the scores of `count` query rows from `first`, shifted by the largest of each row, and one over
    /// their sums.
    fn exponentials(&self, first: usize, count: usize, scratch: &mut Scratch) {
        let Sizes { tokens, head_dim, .. } = self.sizes;
        let Scratch { q, k, probabilities, inverse_sums, .. } = scratch;
        probabilities.resize(count * tokens, 0.0);
        inverse_sums.resize(count, 0.0);
        let q = Matrix::new(&q[first * head_dim..], count, head_dim);
        let k = Matrix::new(k, tokens, head_dim);
        multiply_into(probabilities, tokens, Destination::Overwrite, 1.0, q, k.t(), Threads::One);
        simd::vectorized(
            #[inline(always)]
            || {
                for (row, inverse) in probabilities.chunks_exact_mut(tokens).zip(inverse_sums) {
                    *inverse = 1.0 / simd::exp_and_sum(row, simd::max(row));
                }
            },
        );
    }

    fn forward(&self, out: &mut [f32], place: Place, scratch: &mut Scratch) {
        let Sizes { tokens, head_dim, .. } = self.sizes;
        self.gather(scratch);
        for first in (0..tokens).step_by(self.sizes.block()) {
            let count = self.sizes.block().min(tokens - first);
            self.exponentials(first, count, scratch);
            let rows = &mut out[place.start(first, 0)..];
            let exponentials = Matrix::new(&scratch.probabilities, count, tokens);
            multiply_into(rows, place.row, Destination::Overwrite, 1.0, exponentials, self.v(), Threads::One);
            // The rows of the result are shorter than those of the probabilities: they are the ones to normalise.
            simd::vectorized(
                #[inline(always)]
                || {
                    for (row, inverse) in rows.chunks_mut(place.row).zip(&scratch.inverse_sums) {
                        row[..head_dim].iter_mut().for_each(|v| *v *= inverse);
                    }
                },
            );
        }
    }

    /// Writes the gradients of `q`, `k`, `v` to `dqkv`, given that of the result in the image's rows `grad`.
    fn backward(&self, grad: &[f32], dqkv: &mut [f32], place: Place, scratch: &mut Scratch) {
        let Sizes { tokens, head_dim, .. } = self.sizes;
        self.gather(scratch);
        scratch.dq.resize(tokens * head_dim, 0.0);
        scratch.dk.resize(tokens * head_dim, 0.0);
        for first in (0..tokens).step_by(self.sizes.block()) {
            let count = self.sizes.block().min(tokens - first);
            let destination = if first == 0 { Destination::Overwrite } else { Destination::Accumulate };
            self.exponentials(first, count, scratch);
            let Scratch { q, k, probabilities, dscores, dq, dk, inverse_sums } = scratch;
            dscores.resize(count * tokens, 0.0);

            let grad_start = first * self.sizes.width() + self.place.first;
            let grad = Matrix::strided(&grad[grad_start..], count, head_dim, self.sizes.width());
            multiply_into(dscores, tokens, Destination::Overwrite, 1.0, grad, self.v().t(), Threads::One);
            simd::vectorized(
                #[inline(always)]
                || {
                    let rows = probabilities.chunks_exact_mut(tokens).zip(dscores.chunks_exact_mut(tokens));
                    for ((p, ds), &inverse) in rows.zip(inverse_sums.iter()) {
                        let mean = simd::dot(p, ds) * inverse;
                        for (p, ds) in p.iter_mut().zip(ds) {
                            *p *= inverse;
                            *ds = *p * (*ds - mean);
                        }
                    }
                },
            );

            let p = Matrix::new(probabilities, count, tokens);
            let dv = &mut dqkv[place.start(0, 2)..];
            multiply_into(dv, place.row, destination, 1.0, p.t(), grad, Threads::One);
            let ds = Matrix::new(dscores, count, tokens);
            let k = Matrix::new(k, tokens, head_dim);
            let dq = &mut dq[first * head_dim..];
            multiply_into(dq, head_dim, Destination::Overwrite, self.sizes.scale(), ds, k, Threads::One);
            // `q` carries the scale already.
            let q = Matrix::new(&q[first * head_dim..], count, head_dim);
            multiply_into(dk, head_dim, destination, 1.0, ds.t(), q, Threads::One);
        }
        simd::vectorized(
            #[inline(always)]
            || {
                for (part, rows) in [&mut scratch.dq, &mut scratch.dk].into_iter().enumerate() {
                    for (token, row) in rows.chunks_exact_mut(head_dim).enumerate() {
                        if let Some(rotation) = self.rotation {
                            rotation.apply_transposed(row, token);
                        }
                        dqkv[place.start(token, part)..][..head_dim].copy_from_slice(row);
                    }
                }
            },
        );
    }
}

fn forward(qkv: &[f32], sizes: Sizes, rotation: Option<Rotation>) -> Vec<f32> {
    for_each_head(sizes, 1, |image, head, out, place, scratch| {
        Head::new(qkv, sizes, image, head, rotation).forward(out, place, scratch);
    })
}

fn backward(qkv: &[f32], grad: &[f32], sizes: Sizes, rotation: Option<Rotation>) -> Vec<f32> {
    let image_len = sizes.tokens * sizes.width();
    for_each_head(sizes, 3, |image, head, dqkv, place, scratch| {
        let grad = &grad[image * image_len..][..image_len];
        Head::new(qkv, sizes, image, head, rotation).backward(grad, dqkv, place, scratch);
    })
}
