//! One head of one image: gathering and rotating its rows, its scores, its result and its gradients.

use burn::backend::flex::FlexTensor;

use super::super::gemm::{Destination, Matrix, Threads, multiply_into};
use super::super::{dims2, elements, simd};
use super::Sizes;

/// The packed rows of one head of one image.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    sizes: Sizes,
    packed: &'a [f32],
    place: Place,
    rotation: Option<Rotation<'a>>,
}

impl<'a> Head<'a> {
    pub(super) fn new(qkv: &'a [f32], sizes: Sizes, image: usize, head: usize, rotation: Option<Rotation<'a>>) -> Self {
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
                            simd::scale(row, scale);
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
                for (row, inverse) in probabilities.chunks_exact_mut(tokens).zip(inverse_sums.iter_mut()) {
                    *inverse = 1.0 / simd::exp_and_sum(row, simd::max(row));
                }
            },
        );
    }

    pub(super) fn forward(&self, out: &mut [f32], place: Place, scratch: &mut Scratch) {
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
                        simd::scale(&mut row[..head_dim], *inverse);
                    }
                },
            );
        }
    }

    /// Writes the gradients of `q`, `k`, `v` to `dqkv`, given that of the result in the image's rows `grad`.
    pub(super) fn backward(&self, grad: &[f32], dqkv: &mut [f32], place: Place, scratch: &mut Scratch) {
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

/// The tables of a rotary embedding.
#[derive(Clone, Copy)]
pub(in super::super) struct Rotation<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
}

impl<'a> Rotation<'a> {
    pub(in super::super) fn new(cos: &'a FlexTensor, sin: &'a FlexTensor, sizes: Sizes) -> Self {
        let wanted = [sizes.tokens, sizes.head_dim];
        let (cos_dims, sin_dims) = (dims2(cos), dims2(sin));
        assert!(
            cos_dims == wanted && sin_dims == wanted,
            "self_attention: rope tables {cos_dims:?} and {sin_dims:?}, sequence and head width {wanted:?}"
        );
        assert!(
            sizes.head_dim.is_multiple_of(2),
            "self_attention: rope needs an even head width, not {}",
            sizes.head_dim
        );
        Self { cos: elements(cos), sin: elements(sin) }
    }

    /// `[a·cos − b·sin, b·cos + a·sin]` on the two halves `a`, `b` of the row of `token`.
    #[inline(always)]
    fn apply(&self, row: &mut [f32], token: usize) {
        let (a, b) = row.split_at_mut(row.len() / 2);
        let ([cos_a, cos_b], [sin_a, sin_b]) = (halves(self.cos, token, a.len()), halves(self.sin, token, a.len()));
        for i in 0..a.len() {
            (a[i], b[i]) = (a[i] * cos_a[i] - b[i] * sin_a[i], b[i] * cos_b[i] + a[i] * sin_b[i]);
        }
    }

    /// The transposed map, which takes gradients back.
    #[inline(always)]
    fn apply_transposed(&self, row: &mut [f32], token: usize) {
        let (a, b) = row.split_at_mut(row.len() / 2);
        let ([cos_a, cos_b], [sin_a, sin_b]) = (halves(self.cos, token, a.len()), halves(self.sin, token, a.len()));
        for i in 0..a.len() {
            (a[i], b[i]) = (a[i] * cos_a[i] + b[i] * sin_b[i], b[i] * cos_b[i] - a[i] * sin_a[i]);
        }
    }
}

/// The two halves of a table's row.
#[inline(always)]
fn halves(table: &[f32], token: usize, half: usize) -> [&[f32]; 2] {
    let (a, b) = table[token * 2 * half..][..2 * half].split_at(half);
    [a, b]
}

/// Where the rows of one head lie in a slice: part `p` (of one, or of `q`, `k`, `v`) of a token starts at
/// `token·row + p·part + first`.
#[derive(Clone, Copy)]
pub(super) struct Place {
    row: usize,
    part: usize,
    first: usize,
}

impl Place {
    /// Head `head` among all of them, in rows of `parts` times the width.
    pub(super) fn among_heads(sizes: Sizes, parts: usize, head: usize) -> Self {
        Self { row: parts * sizes.width(), part: sizes.width(), first: head * sizes.head_dim }
    }

    /// A head alone.
    pub(super) fn alone(sizes: Sizes, parts: usize) -> Self {
        Self { row: parts * sizes.head_dim, part: sizes.head_dim, first: 0 }
    }

    #[inline(always)]
    pub(super) fn start(&self, token: usize, part: usize) -> usize {
        token * self.row + part * self.part + self.first
    }
}

/// Memory of one task, kept from head to head.
#[derive(Default)]
pub(super) struct Scratch {
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
