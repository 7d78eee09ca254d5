//! The operations made of tensor operations, with a hand-written backward: what GPUs run, and the CPU wherever `flex` has no
//! fused version.
//!
//! Left to automatic differentiation, the [`composed`](crate::composed) definitions keep the result of almost every one of
//! their steps until the backward pass, the maps of attention `[B, heads, N, N]` three times over. Here each operation keeps
//! what matrix products made, and computes norms, maps and activations again from that:
//!
//! | | kept, in numbers per token |
//! |---|---|
//! | attention | input `D`; turned queries and keys, values `3·D`; results of the heads `D` |
//! | feed-forward | input `D`; hidden layer before its bias `F` |
//!
//! What a product rounded to bfloat16 is kept in that type, which loses nothing. Maps of attention exist for [`SLAB`] numbers
//! at a time, in the forward as in the backward pass.
//!
//! Everything is written on plain [`Tensor`](burn::tensor::Tensor)s, so a backend's own fusion of elementwise operations and
//! its tuned matrix products apply, and one source serves all of them. [`operation`] connects it to burn's automatic
//! differentiation.

mod attention;
mod branches;
mod layer_norm;
mod operation;
mod projections;

pub(crate) use attention::self_attention;
pub(crate) use branches::{attention, feed_forward, gated_feed_forward};
pub(crate) use layer_norm::layer_norm;

/// Elements of attention maps that exist at a time: 64 MB in single precision, about the second level of cache of the GPUs
/// that train backbones, and no less than the maps of a hundred crops of 197 tokens and four heads, so that common batches
/// take few launches.
const SLAB: usize = 1 << 24;
