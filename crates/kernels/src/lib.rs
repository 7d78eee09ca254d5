//! The tensor operations a backbone spends its time in, each behind one function.
//!
//! A function here is the only place where its operation is written down for every backend: the model calls
//! [`self_attention`], and how attention runs (composed from tensor operations, or as one fused pass with a hand-written
//! backward) is decided here. [`composed`] holds the plain versions, which define what the operations compute.
//!
//! On burn's CPU backend `flex`, f32 tensors take the fused versions, on processors that have vector instructions with
//! fused multiply-add (every x86-64 since AVX2, every 64-bit ARM). They equal the composed ones to rounding, give the same
//! bits in every run, and do no work for the gradients of inputs that are not tracked. Everything else is composed.

pub mod composed;
mod flex;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use flex::{Attention, DepthwiseConv, FlexKernels, Gelu, LayerNorm, Linear, Residual, RotaryAttention};

/// Cosine and sine tables of a rotary position embedding, one row per token.
///
/// # Shapes
/// Both `[N, d]`: `N` tokens of the sequence (prefix tokens have cosine 1 and sine 0, which leaves them as they are), `d`
/// the width of one head. Plain tensors: no gradient flows into a table.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// Cosines.
    pub cos: Tensor<2>,
    /// Sines.
    pub sin: Tensor<2>,
}

/// `y = x·Wᵀ + b`, with the weight as PyTorch lays it out.
///
/// # Shapes
/// `x [M, in]`, `weight [out, in]`, `bias [out]` → `[M, out]`.
pub fn linear(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    if !flex::supports(&x.device(), x.dtype()) {
        return composed::linear(x, weight, bias);
    }
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(match bias {
        Some(bias) => Dispatch::ternary(x, weight, bias.into_dispatch(), Linear),
        None => Dispatch::binary(x, weight, Linear),
    })
}

/// Layer normalisation over the last axis: `(x − mean)/√(var + eps)·weight + bias`, with the biased variance.
///
/// # Shapes
/// `x [M, D]`, `weight [D]`, `bias [D]` → `[M, D]`.
pub fn layer_norm(x: Tensor<2>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<2> {
    if !flex::supports(&x.device(), x.dtype()) {
        return composed::layer_norm(x, weight, bias, eps);
    }
    let (x, weight, bias) = (x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch());
    Tensor::from_dispatch(Dispatch::ternary(x, weight, bias, LayerNorm { eps }))
}

/// The exact Gaussian error linear unit, `x·Φ(x)` with `Φ` through `erf`.
pub fn gelu(x: Tensor<2>) -> Tensor<2> {
    if !flex::supports(&x.device(), x.dtype()) {
        return composed::gelu(x);
    }
    Tensor::from_dispatch(Dispatch::unary(x.into_dispatch(), Gelu))
}

/// `x + branch·gamma`: the residual connection with an optional layer scale (Touvron et al. 2021, "Going deeper with Image
/// Transformers", eq. 3).
///
/// # Shapes
/// `x [M, D]`, `branch [M, D]`, `gamma [D]` → `[M, D]`.
pub fn residual(x: Tensor<2>, branch: Tensor<2>, gamma: Option<Tensor<1>>) -> Tensor<2> {
    if !flex::supports(&x.device(), x.dtype()) {
        return composed::residual(x, branch, gamma);
    }
    let (x, branch) = (x.into_dispatch(), branch.into_dispatch());
    Tensor::from_dispatch(match gamma {
        Some(gamma) => Dispatch::ternary(x, branch, gamma.into_dispatch(), Residual),
        None => Dispatch::binary(x, branch, Residual),
    })
}

/// Depthwise convolution: each channel with a kernel of its own, stride 1, zeros around the image.
///
/// # Shapes
/// `x [B, H, W, C]`, channels last; `weight [C, 1, k, k]` with an odd `k`, as PyTorch lays it out; `bias [C]` →
/// `[B, H, W, C]`.
pub fn depthwise_conv(x: Tensor<4>, weight: Tensor<4>, bias: Tensor<1>) -> Tensor<4> {
    if !flex::supports(&x.device(), x.dtype()) {
        return composed::depthwise_conv(x, weight, bias);
    }
    let kernel = weight.dims()[3];
    let (x, weight, bias) = (x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch());
    Tensor::from_dispatch(Dispatch::ternary(x, weight, bias, DepthwiseConv { kernel }))
}

/// Multi-head self-attention `softmax(q·kᵀ/√d)·v` on a packed projection, with rotary positions applied to `q` and `k`.
///
/// # Shapes
/// `qkv [B, N, 3·D]`, where the last axis is `q`, `k`, `v` in this order and head-major inside each → `[B, N, D]`, with
/// `d = D / num_heads`. `rope` tables are `[N, d]`.
pub fn self_attention(qkv: Tensor<3>, num_heads: usize, rope: Option<&RopeTable>) -> Tensor<3> {
    if !flex::supports(&qkv.device(), qkv.dtype()) {
        return composed::self_attention(qkv, num_heads, rope);
    }
    let qkv = qkv.into_dispatch();
    Tensor::from_dispatch(match rope {
        Some(RopeTable { cos, sin }) => {
            let (cos, sin) = (cos.clone().into_dispatch(), sin.clone().into_dispatch());
            Dispatch::ternary(qkv, cos, sin, RotaryAttention { num_heads })
        }
        None => Dispatch::unary(qkv, Attention { num_heads }),
    })
}
