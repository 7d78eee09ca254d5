//! The losses of self-distillation and the centering of the teacher's targets. Tensors in, scalars out; no randomness.
//!
//! - [`dino`]: cross-entropy between the CLS tokens of different crops (DINO eq. 3; DINOv2 §4, "image-level objective").
//! - [`ibot`]: cross-entropy of masked patch tokens (iBOT eq. 2; DINOv2 §4, "patch-level objective").
//! - [`feature`]: matches the tokens of a teacher without prototypes.
//! - [`gram`]: keeps the similarities between patch tokens (DINOv3 §4, "Gram anchoring").
//! - [`koleo`]: spreads the CLS tokens of a batch (Sablayrolles et al. 2019; DINOv2 §4).
//! - [`sinkhorn`] and [`center`]: two ways of keeping the teacher from collapsing.
//!
//! [`prototypes`] is the cross-entropy against soft targets that `dino` and `ibot` share.

pub mod center;
pub mod dino;
pub mod feature;
pub mod gram;
pub mod ibot;
pub mod koleo;
pub mod prototypes;
pub mod sinkhorn;

#[cfg(test)]
mod testing;

use burn::tensor::Tensor;

/// One loss: its value, and the scalar whose gradient is the loss's.
///
/// For losses with a gradient computed by hand the two differ: only `value` is the loss.
#[derive(Clone, Debug)]
pub struct Loss {
    /// The loss, plain, shape `[1]`, in nats.
    pub value: Tensor<1>,
    /// A scalar with the loss's gradient, shape `[1]`: what goes into `backward`.
    pub graph: Tensor<1>,
}

impl Loss {
    /// A loss whose gradient autodiff computes.
    pub fn from_graph(graph: Tensor<1>) -> Self {
        Self { value: plain(graph.clone()), graph }
    }
}

/// The tensor without its autodiff context; itself where it has none.
pub(crate) fn plain<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if tensor.device().is_autodiff() { tensor.inner() } else { tensor }
}

/// The tensor with vectors of length 1 along its last axis; those shorter than 10⁻¹² are divided by that.
pub(crate) fn unit<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    // Clamped before the root, whose slope at zero is infinite.
    let length = x.clone().powi_scalar(2).sum_dim(D - 1).clamp_min(1e-24).sqrt();
    x / length
}
