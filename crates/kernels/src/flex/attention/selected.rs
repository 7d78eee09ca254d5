//! Attention where only some tokens ask: one (image, head) at a time, as everywhere, each into memory of its own.

use rayon::prelude::*;

use super::Sizes;
use super::head::{Head, Place, Queries, Rotation, Scratch};
use crate::Precision;

/// Attention of some tokens to all of their image: queries in rows of their own, image after image.
pub(in super::super) struct Selected<'a> {
    sizes: Sizes,
    /// `[R, D]`.
    q: &'a [f32],
    /// `[B, N, 2·D]`, keys and values.
    kv: &'a [f32],
    /// Of each query the token in its image.
    tokens: Vec<usize>,
    /// The queries of each image, and behind the last the number of all.
    starts: Vec<usize>,
    rotation: Option<Rotation<'a>>,
    precision: Precision,
}

impl<'a> Selected<'a> {
    /// `q [R, D]` and `kv [B, N, 2·D]`; `rows` are the queries' places in the flattened list `[B·N]` of tokens, in ascending order.
    pub(in super::super) fn new(
        [q, kv]: [&'a [f32]; 2],
        rows: &[usize],
        sizes: Sizes,
        rotation: Option<Rotation<'a>>,
        precision: Precision,
    ) -> Self {
        let tokens = rows.iter().map(|row| row % sizes.tokens).collect();
        let starts = (0..=sizes.batch).map(|image| rows.partition_point(|&row| row < image * sizes.tokens)).collect();
        Self { sizes, q, kv, tokens, starts, rotation, precision }
    }

    /// Calls `f(image, head, queries)` for every head of an image that asks; the results in this order.
    fn for_each_head(&self, f: impl Fn(usize, Head, &mut Scratch) -> Vec<f32> + Sync + Send) -> Vec<Vec<f32>> {
        let (width, heads) = (self.sizes.width(), self.sizes.heads);
        let image_len = self.sizes.tokens * 2 * width;
        let tasks = (0..self.sizes.batch * heads).into_par_iter().map_init(Scratch::default, |scratch, i| {
            let (image, head) = (i / heads, i % heads);
            let queries = self.starts[image]..self.starts[image + 1];
            let kv = &self.kv[image * image_len..][..image_len];
            let place = Place::among_heads(self.sizes, head);
            let head = Head {
                sizes: self.sizes,
                data: [&self.q[queries.start * width..queries.end * width], kv, kv],
                places: [
                    place,
                    Place { row: 2 * width, ..place },
                    Place { first: width + place.first, row: 2 * width },
                ],
                queries: Queries::Of(&self.tokens[queries.clone()]),
                rotation: self.rotation,
                precision: self.precision,
            };
            f(queries.start, head, scratch)
        });
        tasks.collect()
    }

    /// The heads' results side by side, `[R, D]`.
    pub(in super::super) fn forward(&self) -> Vec<f32> {
        let head_dim = self.sizes.head_dim;
        let results = self.for_each_head(|_, head, scratch| {
            let mut out = vec![0.0; head.count() * head_dim];
            head.forward(&mut out, Place { first: 0, row: head_dim }, scratch);
            out
        });
        let mut all = vec![0.0; self.q.len()];
        for (i, result) in results.iter().enumerate() {
            let first = self.starts[i / self.sizes.heads];
            let place = Place::among_heads(self.sizes, i % self.sizes.heads);
            for (row, values) in result.chunks_exact(head_dim).enumerate() {
                all[place.start(first + row)..][..head_dim].copy_from_slice(values);
            }
        }
        all
    }

    /// The gradients of queries `[R, D]`, and of keys and values `[B, N, 2·D]`, given that of the result.
    pub(in super::super) fn backward(&self, grad: &[f32]) -> [Vec<f32>; 2] {
        let Sizes { tokens, heads, head_dim, .. } = self.sizes;
        let width = self.sizes.width();
        let results = self.for_each_head(|first, head, scratch| {
            let count = head.count();
            if count == 0 {
                // Nobody asked.
                return vec![0.0; 2 * tokens * head_dim];
            }
            let mut out = vec![0.0; (count + 2 * tokens) * head_dim];
            let behind = count * head_dim;
            let places = [
                Place { first: 0, row: head_dim },
                Place { first: behind, row: 2 * head_dim },
                Place { first: behind + head_dim, row: 2 * head_dim },
            ];
            let grad = (&grad[first * width..][..count * width], head.places[0]);
            head.backward(grad, &mut out, places, scratch);
            out
        });
        let (mut dq, mut dkv) = (vec![0.0; self.q.len()], vec![0.0; self.kv.len()]);
        dkv.par_chunks_mut((tokens * 2 * width).max(1)).enumerate().for_each(|(image, dkv)| {
            for (head, result) in results[image * heads..][..heads].iter().enumerate() {
                let place = Place { row: 2 * width, ..Place::among_heads(self.sizes, head) };
                let (_, result) = result.split_at(result.len() - 2 * tokens * head_dim);
                for (token, row) in result.chunks_exact(2 * head_dim).enumerate() {
                    let (k, v) = row.split_at(head_dim);
                    dkv[place.start(token)..][..head_dim].copy_from_slice(k);
                    dkv[width + place.start(token)..][..head_dim].copy_from_slice(v);
                }
            }
        });
        for (i, result) in results.iter().enumerate() {
            let queries = self.starts[i / heads]..self.starts[i / heads + 1];
            let place = Place::among_heads(self.sizes, i % heads);
            for (query, values) in queries.zip(result.chunks_exact(head_dim)) {
                dq[place.start(query)..][..head_dim].copy_from_slice(values);
            }
        }
        [dq, dkv]
    }
}
