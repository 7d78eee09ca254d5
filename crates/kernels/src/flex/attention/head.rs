//! One head of one image: gathering and rotating its rows, its scores, its result and its gradients.

use burn::backend::flex::FlexTensor;

use super::super::gemm::{Destination, Matrix, Threads, multiply_into};
use super::super::{dims2, elements, simd};
use super::Sizes;
use crate::Precision;

/// The queries of one head of one image, and the keys and values that they meet: three matrices of `head_dim` columns, one
/// row for each query or token.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    pub(super) sizes: Sizes,
    /// The memory of the image's queries, keys and values, which may be the same.
    pub(super) data: [&'a [f32]; 3],
    /// Where the head's rows lie in each.
    pub(super) places: [Place; 3],
    pub(super) queries: Queries<'a>,
    pub(super) rotation: Option<Rotation<'a>>,
    /// Of the products.
    pub(super) precision: Precision,
}

/// The tokens that ask.
#[derive(Clone, Copy)]
pub(super) enum Queries<'a> {
    /// All of the image.
    All,
    /// These of it.
    Of(&'a [usize]),
}

impl<'a> Head<'a> {
    /// A head of packed projections, whose rows hold the query, key and value of a token one after the other.
    pub(super) fn packed(
        qkv: &'a [f32],
        sizes: Sizes,
        image: usize,
        head: usize,
        rotation: Option<Rotation<'a>>,
        precision: Precision,
    ) -> Self {
        let len = sizes.tokens * 3 * sizes.width();
        let image = &qkv[image * len..][..len];
        Self { sizes, data: [image; 3], places: Place::packed(sizes, head), queries: Queries::All, rotation, precision }
    }

    /// Queries of this head.
    pub(super) fn count(&self) -> usize {
        match self.queries {
            Queries::All => self.sizes.tokens,
            Queries::Of(tokens) => tokens.len(),
        }
    }

    /// The token of a query.
    #[inline(always)]
    fn token(&self, query: usize) -> usize {
        match self.queries {
            Queries::All => query,
            Queries::Of(tokens) => tokens[query],
        }
    }

    /// Copies `q` and `k`, rotated.
    fn gather(&self, scratch: &mut Scratch) {
        let Sizes { tokens, head_dim, .. } = self.sizes;
        scratch.q.resize(self.count() * head_dim, 0.0);
        scratch.k.resize(tokens * head_dim, 0.0);
        simd::vectorized(
            #[inline(always)]
            || {
                for (i, row) in scratch.q.chunks_exact_mut(head_dim).enumerate() {
                    row.copy_from_slice(&self.data[0][self.places[0].start(i)..][..head_dim]);
                    if let Some(rotation) = self.rotation {
                        rotation.apply(row, self.token(i));
                    }
                }
                for (token, row) in scratch.k.chunks_exact_mut(head_dim).enumerate() {
                    row.copy_from_slice(&self.data[1][self.places[1].start(token)..][..head_dim]);
                    if let Some(rotation) = self.rotation {
                        rotation.apply(row, token);
                    }
                }
            },
        );
    }

    fn v(&self) -> Matrix<'a> {
        let Sizes { tokens, head_dim, .. } = self.sizes;
        Matrix::strided(&self.data[2][self.places[2].first..], tokens, head_dim, self.places[2].row)
    }

    fn multiply(&self, out: &mut [f32], row_stride: usize, destination: Destination, factors: [Matrix; 2]) {
        multiply_into(out, row_stride, destination, factors, self.precision, Threads::One);
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
        self.multiply(probabilities, tokens, Destination::Overwrite, [q, k.t()]);
        let scale = self.sizes.scale();
        simd::vectorized(
            #[inline(always)]
            || {
                for (row, inverse) in probabilities.chunks_exact_mut(tokens).zip(inverse_sums.iter_mut()) {
                    *inverse = 1.0 / simd::exp_and_sum(row, simd::max(row), scale);
                }
            },
        );
    }

    /// Writes the result of each query to its row in `out`.
    pub(super) fn forward(&self, out: &mut [f32], place: Place, scratch: &mut Scratch) {
        let Sizes { tokens, head_dim, .. } = self.sizes;
        self.gather(scratch);
        for first in (0..self.count()).step_by(self.sizes.block()) {
            let count = self.sizes.block().min(self.count() - first);
            self.exponentials(first, count, scratch);
            let rows = &mut out[place.start(first)..];
            let Scratch { probabilities, inverse_sums, .. } = &mut *scratch;
            let normalize = |rows: &mut [f32], stride: usize, len: usize| {
                simd::vectorized(
                    #[inline(always)]
                    || {
                        for (row, inverse) in rows.chunks_mut(stride).zip(inverse_sums.iter()) {
                            simd::scale(&mut row[..len], *inverse);
                        }
                    },
                );
            };
            // The rows of the result are shorter than those of the probabilities, but these are what is rounded.
            let rounds = self.precision == Precision::Bf16;
            if rounds {
                normalize(probabilities, tokens, tokens);
            }
            let p = Matrix::new(probabilities, count, tokens);
            self.multiply(rows, place.row, Destination::Overwrite, [p, self.v()]);
            if !rounds {
                normalize(rows, place.row, head_dim);
            }
        }
    }

    /// Writes the gradients of queries, keys and values to their `places` in `out`, given that of the result in the rows
    /// `place` of `grad`.
    pub(super) fn backward(
        &self,
        (grad, place): (&[f32], Place),
        out: &mut [f32],
        places: [Place; 3],
        scratch: &mut Scratch,
    ) {
        let Sizes { tokens, head_dim, .. } = self.sizes;
        self.gather(scratch);
        scratch.dq.resize(self.count() * head_dim, 0.0);
        scratch.dk.resize(tokens * head_dim, 0.0);
        for first in (0..self.count()).step_by(self.sizes.block()) {
            let count = self.sizes.block().min(self.count() - first);
            // In bfloat16 what the first block makes of keys and values is rounded, and what the others add to it is not.
            let destination = if first == 0 { Destination::Overwrite } else { Destination::Accumulate };
            self.exponentials(first, count, scratch);
            let Scratch { q, k, probabilities, dscores, dq, dk, inverse_sums } = scratch;
            dscores.resize(count * tokens, 0.0);

            let grad = Matrix::strided(&grad[place.start(first)..], count, head_dim, place.row);
            self.multiply(dscores, tokens, Destination::Overwrite, [grad, self.v().t()]);
            let scale = self.sizes.scale();
            simd::vectorized(
                #[inline(always)]
                || {
                    let rows = probabilities.chunks_exact_mut(tokens).zip(dscores.chunks_exact_mut(tokens));
                    for ((p, ds), &inverse) in rows.zip(inverse_sums.iter()) {
                        let mean = simd::dot(p, ds) * inverse;
                        for (p, ds) in p.iter_mut().zip(ds) {
                            *p *= inverse;
                            *ds = *p * (*ds - mean) * scale;
                        }
                    }
                },
            );

            let p = Matrix::new(probabilities, count, tokens);
            let dv = &mut out[places[2].first..];
            self.multiply(dv, places[2].row, destination, [p.t(), grad]);
            let ds = Matrix::new(dscores, count, tokens);
            let k = Matrix::new(k, tokens, head_dim);
            let dq = &mut dq[first * head_dim..];
            self.multiply(dq, head_dim, Destination::Overwrite, [ds, k]);
            let q = Matrix::new(&q[first * head_dim..], count, head_dim);
            self.multiply(dk, head_dim, destination, [ds.t(), q]);
        }
        simd::vectorized(
            #[inline(always)]
            || {
                for (i, row) in scratch.dq.chunks_exact_mut(head_dim).enumerate() {
                    if let Some(rotation) = self.rotation {
                        rotation.apply_transposed(row, self.token(i));
                    }
                    out[places[0].start(i)..][..head_dim].copy_from_slice(row);
                }
                for (token, row) in scratch.dk.chunks_exact_mut(head_dim).enumerate() {
                    if let Some(rotation) = self.rotation {
                        rotation.apply_transposed(row, token);
                    }
                    out[places[1].start(token)..][..head_dim].copy_from_slice(row);
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

/// Where the rows of one head lie in a slice: row `i` starts at `first + i·row`.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) first: usize,
    pub(super) row: usize,
}

impl Place {
    /// Queries, keys and values of a head in packed rows.
    pub(super) fn packed(sizes: Sizes, head: usize) -> [Self; 3] {
        let (width, first) = (sizes.width(), head * sizes.head_dim);
        [0, 1, 2].map(|part| Self { first: part * width + first, row: 3 * width })
    }

    /// A head among the others, side by side.
    pub(super) fn among_heads(sizes: Sizes, head: usize) -> Self {
        Self { first: head * sizes.head_dim, row: sizes.width() }
    }

    #[inline(always)]
    pub(super) fn start(&self, row: usize) -> usize {
        self.first + row * self.row
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
