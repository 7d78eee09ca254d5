//! The tensor operations a backbone spends its time in, each behind one function.
//!
//! A function here is the only place where its operation is written down for every backend: the model calls
//! [`self_attention`], and how attention runs (composed from tensor operations, or as one fused pass with a hand-written
//! backward) is decided here. [`composed`] holds the plain versions, which define what the operations compute.
//!
//! On burn's CPU backend `flex`, f32 tensors take the fused versions, on processors that have vector instructions with
//! fused multiply-add (every x86-64 since AVX2, every 64-bit ARM). They equal the composed ones to rounding, give the same
//! bits in every run, and do no work for the gradients of inputs that are not tracked. Everywhere else (other backends and
//! types) norms, attention and branches run as `portable` operations: tensor operations with a hand-written backward that
//! keeps little; the rest is composed.

pub mod composed;
mod flex;
mod portable;
mod precision;
#[cfg(test)]
mod testing;

use burn::backend::{Dispatch, DispatchTensor};
use burn::tensor::{DType, Device, Tensor, activation};

pub use precision::{Precision, product};

use flex::{
    Attention, AttentionBranch, DepthwiseConv, FeedForward, FlexGates, FlexKernels, FlexProducts, FlexPrototypes,
    FlexUpdates, Gelu, LayerNorm, Linear, Residual, RotaryAttention, RotaryAttentionBranch, RotarySelectedAttention,
    SelectedAttention, WithGradients,
};

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

/// Whether tensors of this device lie in the memory of the program, where nothing has to be sent to it.
pub fn in_host_memory(device: &Device) -> bool {
    flex::is_flex(device)
}

/// Runs `work`, many operations on `device`, where they start fastest.
///
/// On the CPU that is a thread of the pool that the operations divide their loops over: from any other, each of the
/// thousands of loops of a training step would put its own thread to sleep and wake two. Other devices run `work` on the
/// calling thread, which is what their queue of operations belongs to.
pub fn run_on<R: Send>(device: &Device, work: impl FnOnce() -> R + Send) -> R {
    if flex::is_flex(device) { rayon::scope(|_| work()) } else { work() }
}

/// `y = x·Wᵀ + b`, with the weight as PyTorch lays it out.
///
/// # Shapes
/// `x [M, in]`, `weight [out, in]`, `bias [out]` → `[M, out]`.
pub fn linear(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>, precision: Precision) -> Tensor<2> {
    if !flex::supports(&x.device(), x.dtype()) {
        return composed::linear(x, weight, bias, precision);
    }
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(match bias {
        Some(bias) => Dispatch::ternary(x, weight, bias.into_dispatch(), Linear { precision }),
        None => Dispatch::binary(x, weight, Linear { precision }),
    })
}

/// Layer normalisation over the last axis: `(x − mean)/√(var + eps)·weight + bias`, with the biased variance.
///
/// # Shapes
/// `x [M, D]`, `weight [D]`, `bias [D]` → `[M, D]`.
pub fn layer_norm(x: Tensor<2>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<2> {
    if !flex::supports(&x.device(), x.dtype()) {
        return portable::layer_norm(x, weight, bias, eps);
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
pub fn self_attention(qkv: Tensor<3>, num_heads: usize, rope: Option<&RopeTable>, precision: Precision) -> Tensor<3> {
    if !flex::supports(&qkv.device(), qkv.dtype()) {
        return portable::self_attention(qkv, num_heads, rope, precision);
    }
    let qkv = qkv.into_dispatch();
    Tensor::from_dispatch(match rope {
        Some(RopeTable { cos, sin }) => {
            let (cos, sin) = (cos.clone().into_dispatch(), sin.clone().into_dispatch());
            Dispatch::ternary(qkv, cos, sin, RotaryAttention { num_heads, precision })
        }
        None => Dispatch::unary(qkv, Attention { num_heads, precision }),
    })
}

/// `a·b` of plain matrices in a precision, as fast as the device does it: [`product`] without automatic differentiation.
///
/// # Shapes
/// `a [M, I]`, `b [I, N]` → `[M, N]`.
pub fn plain_product(a: Tensor<2>, b: Tensor<2>, precision: Precision) -> Tensor<2> {
    if a.dtype() != b.dtype() || !flex::supports_plain(&a.device(), a.dtype()) {
        return product(a, b, precision);
    }
    Tensor::from_dispatch(Dispatch::product(a.into_dispatch(), b.into_dispatch(), precision))
}

/// `a·b` of plain matrices that were rounded where they are to be, of the same type.
pub(crate) fn times(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    let plain_on_flex = flex::supports_plain(&a.device(), DType::F32);
    match (a.dtype(), b.dtype()) {
        (DType::F32, DType::F32) if plain_on_flex => plain_product(a, b, Precision::Fp32),
        (DType::BF16, DType::BF16) if plain_on_flex => {
            Tensor::from_dispatch(Dispatch::product_of_bf16(a.into_dispatch(), b.into_dispatch()))
        }
        _ => a.matmul(b),
    }
}

/// `silu(gate)·value` of plain matrices.
pub(crate) fn gated(gate: Tensor<2>, value: Tensor<2>) -> Tensor<2> {
    if !flex::supports_plain(&gate.device(), gate.dtype()) {
        return activation::silu(gate) * value;
    }
    Tensor::from_dispatch(Dispatch::gated(gate.into_dispatch(), value.into_dispatch()))
}

/// [`gated`] again, and the gradients of gate and value, given that of its result.
pub(crate) fn gated_backward(gate: Tensor<2>, value: Tensor<2>, grad: Tensor<2>) -> [Tensor<2>; 3] {
    if !flex::supports_plain(&gate.device(), gate.dtype()) {
        // With σ the logistic function, the slope of x·σ(x) is σ(x)·(1 + x·(1 − σ(x))).
        let open = activation::sigmoid(gate.clone());
        let opened = gate.clone() * open.clone();
        let slope = open.clone() * (gate * (open.neg() + 1.0) + 1.0);
        return [opened.clone() * value.clone(), grad.clone() * value * slope, grad * opened];
    }
    let (activated, dgate, dvalue) =
        Dispatch::gated_backward(gate.into_dispatch(), value.into_dispatch(), grad.into_dispatch());
    [activated, dgate, dvalue].map(Tensor::from_dispatch)
}

/// The layer norm at the beginning of a residual branch: gain and offset `[D]`, and what is added to the variance.
#[derive(Clone, Debug)]
pub struct Normalization {
    /// Gain.
    pub weight: Tensor<1>,
    /// Offset.
    pub bias: Tensor<1>,
    /// Added to the variance.
    pub eps: f64,
}

/// A linear layer of a residual branch: weight `[out, in]`, bias `[out]`.
#[derive(Clone, Debug)]
pub struct Projection {
    /// As PyTorch lays it out.
    pub weight: Tensor<2>,
    /// None is a bias of zero.
    pub bias: Option<Tensor<1>>,
}

impl Projection {
    fn bias_or_zero(&self) -> Tensor<1> {
        self.bias.clone().unwrap_or_else(|| Tensor::zeros([self.weight.dims()[0]], &self.weight.device()))
    }
}

/// What a residual branch of a transformer block is made of, besides what lies between its two linear layers.
#[derive(Clone, Debug)]
pub struct Branch {
    /// The norm before it.
    pub norm: Normalization,
    /// Its first linear layer.
    pub first: Projection,
    /// Its last linear layer.
    pub last: Projection,
    /// Its layer scale `[D]`; none is a scale of one.
    pub gamma: Option<Tensor<1>>,
    /// Of its products.
    pub precision: Precision,
    /// Whether the backward pass computes what lies between again instead of keeping it: less memory, more work, the same
    /// bits.
    pub recompute: bool,
}

impl Branch {
    /// Its tensors in the order in which the fused operations take them, on rows of `width` features.
    fn into_dispatch(self, width: usize) -> [DispatchTensor; 7] {
        let Self { norm, first, last, gamma, precision: _, recompute: _ } = self;
        let gamma = gamma.unwrap_or_else(|| Tensor::ones([width], &last.weight.device()));
        let (first_bias, last_bias) = (first.bias_or_zero(), last.bias_or_zero());
        [
            norm.weight.into_dispatch(),
            norm.bias.into_dispatch(),
            first.weight.into_dispatch(),
            first_bias.into_dispatch(),
            last.weight.into_dispatch(),
            last_bias.into_dispatch(),
            gamma.into_dispatch(),
        ]
    }
}

/// The attention branch of a pre-norm transformer block, with its residual connection:
/// `x + gamma·last(self_attention(first(layer_norm(x))))`.
///
/// # Shapes
/// `x [B, N, D]`, `first [3·D, D]` packed as in [`self_attention`], `last [D, D]` → `[B, N, D]`.
pub fn attention(x: Tensor<3>, branch: Branch, num_heads: usize, rope: Option<&RopeTable>) -> Tensor<3> {
    if !flex::supports(&x.device(), x.dtype()) {
        let shape = x.dims();
        return portable::attention(x, None, branch, num_heads, rope).reshape(shape);
    }
    let Branch { precision, recompute, .. } = branch;
    let operation = AttentionBranch { num_heads, eps: branch.norm.eps, precision, recompute };
    let [a, b, c, d, e, f, g] = branch.into_dispatch(x.dims()[2]);
    let x = x.into_dispatch();
    Tensor::from_dispatch(match rope {
        Some(RopeTable { cos, sin }) => {
            let (cos, sin) = (cos.clone().into_dispatch(), sin.clone().into_dispatch());
            Dispatch::denary(x, a, b, c, d, e, f, g, cos, sin, RotaryAttentionBranch(operation))
        }
        None => Dispatch::octonary(x, a, b, c, d, e, f, g, operation),
    })
}

/// Some rows of [`attention`]: what it would make of the other tokens is left out, but for their keys and values.
///
/// # Shapes
/// `x [B, N, D]`, `rows` places in its flattened list `[B·N]` of tokens, in ascending order → `[rows, D]`; `branch` as in
/// [`attention`].
pub fn selected_attention(
    x: Tensor<3>,
    rows: &[usize],
    branch: Branch,
    num_heads: usize,
    rope: Option<&RopeTable>,
) -> Tensor<2> {
    if rows.is_empty() {
        return composed::selected_attention(x, rows, branch, num_heads, rope);
    }
    if !flex::supports(&x.device(), x.dtype()) {
        return portable::attention(x, Some(rows), branch, num_heads, rope);
    }
    let Branch { precision, recompute, .. } = branch;
    let operation = SelectedAttention { rows: rows.into(), num_heads, eps: branch.norm.eps, precision, recompute };
    let [a, b, c, d, e, f, g] = branch.into_dispatch(x.dims()[2]);
    let x = x.into_dispatch();
    Tensor::from_dispatch(match rope {
        Some(RopeTable { cos, sin }) => {
            let (cos, sin) = (cos.clone().into_dispatch(), sin.clone().into_dispatch());
            Dispatch::denary(x, a, b, c, d, e, f, g, cos, sin, RotarySelectedAttention(operation))
        }
        None => Dispatch::octonary(x, a, b, c, d, e, f, g, operation),
    })
}

/// The feed-forward branch of a pre-norm transformer block, with its residual connection:
/// `x + gamma·last(gelu(first(layer_norm(x))))`.
///
/// # Shapes
/// `x [M, D]`, `first [F, D]`, `last [D, F]` → `[M, D]`.
pub fn feed_forward(x: Tensor<2>, branch: Branch) -> Tensor<2> {
    if !flex::supports(&x.device(), x.dtype()) {
        return portable::feed_forward(x, branch);
    }
    let operation = FeedForward { eps: branch.norm.eps, precision: branch.precision, recompute: branch.recompute };
    let [a, b, c, d, e, f, g] = branch.into_dispatch(x.dims()[1]);
    Tensor::from_dispatch(Dispatch::octonary(x.into_dispatch(), a, b, c, d, e, f, g, operation))
}

/// The feed-forward branch with a gated hidden layer (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6: SwiGLU), with its
/// residual connection: `x + gamma·last(silu(gate(n))·value(n))` with `n = layer_norm(x)`.
///
/// # Shapes
/// `x [M, D]`, `last [D, F]` → `[M, D]`. `branch.first` is the gate `[F, D]` and `value` `[F, D]`, or without `value` both in one,
/// `[2·F, D]`, the gate first.
pub fn gated_feed_forward(x: Tensor<2>, branch: Branch, value: Option<Projection>) -> Tensor<2> {
    portable::gated_feed_forward(x, branch, value)
}

/// In Sinkhorn–Knopp a prototype or a sample with less mass than this counts as if it had this much: its factor would be
/// infinite in single precision.
pub(crate) const LEAST_MASS: f64 = 1e-30;

/// The cross-entropy of each row of logits against soft targets, and its gradient: with `p = softmax(logits/temperature)`,
/// `weight·(mass·log Σ exp(logits/temperature) − Σ_k target_k·logits_k/temperature)` and
/// `weight·(mass·p − target)/temperature`.
///
/// # Shapes
/// `logits [M, K]`, `targets [M, K]` with rows that sum to `mass`, `weights [M]`, all plain → `[M]`, `[M, K]`.
pub fn soft_cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<2>,
    weights: Tensor<1>,
    mass: f64,
    temperature: f64,
) -> (Tensor<1>, Tensor<2>) {
    if !flex::supports_plain(&logits.device(), logits.dtype()) {
        return composed::soft_cross_entropy(logits, targets, weights, mass, temperature);
    }
    let (logits, targets, weights) = (logits.into_dispatch(), targets.into_dispatch(), weights.into_dispatch());
    let (losses, gradient) = Dispatch::soft_cross_entropy(logits, targets, weights, mass, temperature);
    (Tensor::from_dispatch(losses), Tensor::from_dispatch(gradient))
}

/// A scalar, 0, whose gradients with respect to `x` and `w` are the given ones: how a gradient that was computed by hand
/// enters automatic differentiation.
///
/// # Shapes
/// Each gradient, plain, as what it is the gradient of → `[1]`.
pub fn with_gradients([x, w]: [Tensor<2>; 2], [x_gradient, w_gradient]: [Tensor<2>; 2]) -> Tensor<1> {
    assert_eq!([x.dims(), w.dims()], [x_gradient.dims(), w_gradient.dims()], "gradients: other shapes");
    if !x.device().is_autodiff() || !flex::supports(&x.device(), x.dtype()) {
        return composed::with_gradients([x, w], [x_gradient, w_gradient]);
    }
    let [x_gradient, w_gradient] =
        [x_gradient, w_gradient].map(|gradient| Tensor::from_inner(gradient).into_dispatch());
    Tensor::from_dispatch(Dispatch::quaternary(
        x.into_dispatch(),
        w.into_dispatch(),
        x_gradient,
        w_gradient,
        WithGradients,
    ))
}

/// Sinkhorn–Knopp: `exp(logits/temperature)` scaled so that, alternately, columns have equal mass and rows sum to 1, ending
/// with the rows.
///
/// The scaling is kept as one factor per column and one per row, so that the matrix is not rewritten until the end. Each row
/// is exponentiated relative to its own peak; the peaks enter as initial factors of the rows, which makes this the same
/// iteration as without them, but it cannot overflow.
///
/// # Shapes
/// `logits [M, K]`, plain, with at least one row → `[M, K]`.
pub fn sinkhorn(logits: Tensor<2>, temperature: f64, iterations: usize) -> Tensor<2> {
    if !flex::supports_plain(&logits.device(), logits.dtype()) {
        return composed::sinkhorn(logits, temperature, iterations);
    }
    Tensor::from_dispatch(Dispatch::sinkhorn(logits.into_dispatch(), temperature, iterations))
}

/// The numbers of one step of AdamW (Loshchilov & Hutter 2019, algorithm 2).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Factor of the gradient, from clipping.
    pub gradient_factor: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Learning rate.
    pub lr: f64,
    /// Factor of the weight: one minus learning rate times weight decay.
    pub decay: f64,
    /// `1 − beta1^t` after `t` steps.
    pub correction1: f64,
    /// `1 − beta2^t` after `t` steps.
    pub correction2: f64,
}

/// A step of AdamW: the new weight and both new moments, with `g` the gradient times its factor,
/// `m ← β₁m + (1 − β₁)g`, `v ← β₂v + (1 − β₂)g²`, `w ← decay·w − lr·(m/c₁)/(√(v/c₂) + eps)`.
///
/// In the memory of weight and moments where nothing else sees it.
///
/// # Shapes
/// All `[P]`, plain.
pub fn adamw(weight: Tensor<1>, gradient: Tensor<1>, m: Tensor<1>, v: Tensor<1>, step: AdamW) -> [Tensor<1>; 3] {
    if !flex::supports_plain(&weight.device(), weight.dtype()) {
        return composed::adamw(weight, gradient, m, v, step);
    }
    let [weight, gradient, m, v] = [weight, gradient, m, v].map(Tensor::into_dispatch);
    let (weight, m, v) = Dispatch::adamw(weight, gradient, m, v, step);
    [weight, m, v].map(Tensor::from_dispatch)
}

/// `momentum·mean + (1 − momentum)·value`, in the memory of the mean where nothing else sees it.
///
/// # Shapes
/// All `[P]`, plain.
pub fn running_mean(mean: Tensor<1>, value: Tensor<1>, momentum: f64) -> Tensor<1> {
    if !flex::supports_plain(&mean.device(), mean.dtype()) {
        return composed::running_mean(mean, value, momentum);
    }
    Tensor::from_dispatch(Dispatch::running_mean(mean.into_dispatch(), value.into_dispatch(), momentum))
}

/// `Σ xᵢ²`, `[1]`, of a plain tensor.
pub fn sum_of_squares(x: &Tensor<1>) -> Tensor<1> {
    if !flex::supports_plain(&x.device(), x.dtype()) {
        return composed::sum_of_squares(x);
    }
    Tensor::from_dispatch(Dispatch::sum_of_squares(x.clone().into_dispatch()))
}
