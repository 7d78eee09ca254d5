//! In what precision matrix products are computed. All casts of the workspace's tensors are in this file; the CPU's fused
//! operations round inside their products.

use burn::tensor::{DType, FloatDType, Tensor};
use serde::{Deserialize, Serialize};

/// What matrix products are computed in. Every operation that contains products takes one; this is where to read what it
/// does.
///
/// Weights, gradients of weights, activations between operations, losses, optimizer and running mean are in single
/// precision under each. Under [`Bf16`](Self::Bf16) the two operands of a product are rounded to bfloat16 (8 bits of
/// mantissa, the exponents of single precision) as they enter it, and its result as it leaves it, whereupon it is single
/// precision again. So are the two products of its gradient, with the gradient of the result as an operand (in the last layer
/// of a block's branch, that of the weight takes the gradient before it is multiplied by the layer scale). Sums of products
/// are formed in single precision: in the accumulators of a GPU's matrix units, or of the CPU's where it has one (AMX), else
/// where rounded operands are multiplied as single-precision numbers. They differ by the order of the sums.
///
/// These are the products:
/// * of linear layers: packed projections and output projection of attention, feed-forward layers, pointwise layers of a
///   ConvNeXt, the layers of projection heads and projectors. The bias is added to the result, in single precision;
/// * of the patch embedding and of a ConvNeXt's stem and downsampling, which are linear layers;
/// * of attention: `q·kᵀ`, and probabilities times values;
/// * of the prototypes: logits, and in the losses the two products of their gradient.
///
/// Everything else is single precision from beginning to end: norms, softmax, GELU and SiLU, rotary positions, layer scale
/// and residual sums, depthwise convolution, interpolation of positions, the normalisation of bottleneck and prototypes,
/// the losses from the logits on, KoLeo, Gram and feature losses, centering, clipping, AdamW, the teacher's running mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Single precision. On a CPU with matrix units (AMX) large products are sums of six of bfloat16, whose operands are cut into
    /// three parts without a rest: at least as exact as fused multiply-adds, but for infinite operands, which give no number, and
    /// for numbers below 1.2e-38, which count as zero.
    #[default]
    Fp32,
    /// Operands and results rounded to bfloat16.
    Bf16,
}

/// The matrix product `a·b` in a precision.
///
/// # Shapes
/// `a [.., M, I]`, `b [.., I, N]` → `[.., M, N]`.
///
/// # Panics
/// If the operands are of two types, or not of single precision where they are to be rounded: some backends would read one
/// as the other.
pub fn product<const D: usize>(a: Tensor<D>, b: Tensor<D>, precision: Precision) -> Tensor<D> {
    assert_eq!(a.dtype(), b.dtype(), "a product of two types");
    let rounds = precision == Precision::Bf16;
    assert!(!rounds || a.dtype() == DType::F32, "what is rounded here has to be of single precision");
    // A cast's gradient is a cast back, so gradients are rounded where values are and arrive in single precision.
    widened(precision.operand(a).matmul(precision.operand(b)))
}

impl Precision {
    /// `x` as products of this precision take it; rounded once where it enters several, or comes from one.
    pub(crate) fn operand<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Bf16 if x.dtype() != DType::BF16 => x.cast(FloatDType::BF16),
            _ => x,
        }
    }
}

/// The result of a product, of the type of its operands, in single precision again if it was rounded.
pub(crate) fn widened<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.dtype() == DType::BF16 { x.cast(FloatDType::F32) } else { x }
}
