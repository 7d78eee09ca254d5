//! The operations composed from tensor primitives: what they compute, on every backend, with gradients by autodiff.

use burn::tensor::{Int, Tensor, activation, module, ops::ConvOptions};

use crate::{AdamW, Branch, LEAST_MASS, Precision, Projection, RopeTable, product};

/// See [`crate::linear`].
pub fn linear(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>, precision: Precision) -> Tensor<2> {
    let y = product(x, weight.transpose(), precision);
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

/// See [`crate::layer_norm`].
pub fn layer_norm(x: Tensor<2>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<2> {
    let centered = x.clone() - x.mean_dim(1);
    let variance = centered.clone().powi_scalar(2).mean_dim(1);
    centered / (variance + eps).sqrt() * weight.unsqueeze() + bias.unsqueeze()
}

/// See [`crate::gelu`].
pub fn gelu(x: Tensor<2>) -> Tensor<2> {
    activation::gelu(x)
}

/// See [`crate::residual`].
pub fn residual(x: Tensor<2>, branch: Tensor<2>, gamma: Option<Tensor<1>>) -> Tensor<2> {
    match gamma {
        Some(gamma) => x + branch * gamma.unsqueeze(),
        None => x + branch,
    }
}

/// See [`crate::depthwise_conv`].
pub fn depthwise_conv(x: Tensor<4>, weight: Tensor<4>, bias: Tensor<1>) -> Tensor<4> {
    let [channels, _, kernel, _] = weight.dims();
    let padding = kernel / 2;
    let options = ConvOptions::new([1, 1], [padding, padding], [1, 1], channels);
    module::conv2d(x.permute([0, 3, 1, 2]), weight, Some(bias), options).permute([0, 2, 3, 1])
}

/// See [`crate::self_attention`].
pub fn self_attention(qkv: Tensor<3>, num_heads: usize, rope: Option<&RopeTable>, precision: Precision) -> Tensor<3> {
    let [batch, tokens, packed] = qkv.dims();
    let (q, k, v) = heads(qkv, num_heads, rope);
    let out = product(probabilities(q, k, precision), v, precision);
    out.permute([0, 2, 1, 3]).reshape([batch, tokens, packed / 3])
}

/// What the first token attends to in self-attention: its row of `softmax(q·kᵀ/√d)`, which [`crate::self_attention`]
/// multiplies with the values.
///
/// # Shapes
/// `qkv [B, N, 3·D]` and `rope` as there → `[B, heads, N]`, rows sum to 1.
pub fn first_token_attention(
    qkv: Tensor<3>,
    num_heads: usize,
    rope: Option<&RopeTable>,
    precision: Precision,
) -> Tensor<3> {
    let [batch, tokens, _] = qkv.dims();
    let (q, k, _) = heads(qkv, num_heads, rope);
    probabilities(q.narrow(2, 0, 1), k, precision).reshape([batch, num_heads, tokens])
}

/// Queries, keys and values of each head, `[B, heads, N, d]`, the first two turned.
pub(crate) fn heads(qkv: Tensor<3>, num_heads: usize, rope: Option<&RopeTable>) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
    let [batch, tokens, packed] = qkv.dims();
    let head_dim = packed / 3 / num_heads;
    // [B, N, 3, H, d] -> [3, B, H, N, d]
    let parts = qkv.reshape([batch, tokens, 3, num_heads, head_dim]).permute([2, 0, 3, 1, 4]);
    let part = |i: usize| parts.clone().narrow(0, i, 1).reshape([batch, num_heads, tokens, head_dim]);
    let (q, k, v) = (part(0), part(1), part(2));
    match rope {
        Some(table) => (rotate(q, table), rotate(k, table), v),
        None => (q, k, v),
    }
}

fn probabilities(q: Tensor<4>, k: Tensor<4>, precision: Precision) -> Tensor<4> {
    let head_dim = q.dims()[3];
    activation::softmax(product(q, k.transpose(), precision) / (head_dim as f64).sqrt(), 3)
}

/// See [`crate::attention`].
pub fn attention(x: Tensor<3>, branch: Branch, num_heads: usize, rope: Option<&RopeTable>) -> Tensor<3> {
    let Branch { norm, first, last, gamma, precision, recompute: _ } = branch;
    let [batch, tokens, width] = x.dims();
    let x = x.reshape([batch * tokens, width]);
    let normalized = layer_norm(x.clone(), norm.weight, norm.bias, norm.eps);
    let qkv = linear(normalized, first.weight, first.bias, precision).reshape([batch, tokens, 3 * width]);
    let heads = self_attention(qkv, num_heads, rope, precision).reshape([batch * tokens, width]);
    residual(x, linear(heads, last.weight, last.bias, precision), gamma).reshape([batch, tokens, width])
}

/// See [`crate::selected_attention`].
pub fn selected_attention(
    x: Tensor<3>,
    rows: &[usize],
    branch: Branch,
    num_heads: usize,
    rope: Option<&RopeTable>,
) -> Tensor<2> {
    let [batch, tokens, width] = x.dims();
    let indices: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
    let indices = Tensor::<1, Int>::from_data(indices.as_slice(), &x.device());
    attention(x, branch, num_heads, rope).reshape([batch * tokens, width]).select(0, indices)
}

/// See [`crate::feed_forward`].
pub fn feed_forward(x: Tensor<2>, branch: Branch) -> Tensor<2> {
    let Branch { norm, first, last, gamma, precision, recompute: _ } = branch;
    let normalized = layer_norm(x.clone(), norm.weight, norm.bias, norm.eps);
    let activated = gelu(linear(normalized, first.weight, first.bias, precision));
    residual(x, linear(activated, last.weight, last.bias, precision), gamma)
}

/// See [`crate::gated_feed_forward`].
pub fn gated_feed_forward(x: Tensor<2>, branch: Branch, value: Option<Projection>) -> Tensor<2> {
    let Branch { norm, first, last, gamma, precision, recompute: _ } = branch;
    let normalized = layer_norm(x.clone(), norm.weight, norm.bias, norm.eps);
    let made = linear(normalized.clone(), first.weight, first.bias, precision);
    let (gate, value) = match value {
        Some(value) => (made, linear(normalized, value.weight, value.bias, precision)),
        None => {
            let half = made.dims()[1] / 2;
            (made.clone().narrow(1, 0, half), made.narrow(1, half, half))
        }
    };
    residual(x, linear(activation::silu(gate) * value, last.weight, last.bias, precision), gamma)
}

/// `x·cos + rotate_half(x)·sin`, where `rotate_half([a, b]) = [−b, a]` on the two halves of a head.
fn rotate(x: Tensor<4>, table: &RopeTable) -> Tensor<4> {
    let half = x.dims()[3] / 2;
    let mut halves = x.clone().split(half, 3).into_iter();
    let (a, b) = (halves.next().expect("two halves"), halves.next().expect("two halves"));
    x * table.cos.clone().unsqueeze() + Tensor::cat(vec![b.neg(), a], 3) * table.sin.clone().unsqueeze()
}

/// See [`crate::soft_cross_entropy`].
pub fn soft_cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<2>,
    weights: Tensor<1>,
    mass: f64,
    temperature: f64,
) -> (Tensor<1>, Tensor<2>) {
    let [rows, _] = logits.dims();
    let weights = weights.reshape([rows, 1]);
    let logits = logits / temperature;
    let expected = (logits.clone() * targets.clone()).sum_dim(1);
    let peak = logits.clone().max_dim(1);
    let exponentials = (logits - peak.clone()).exp();
    let total = exponentials.clone().sum_dim(1);
    let losses = ((peak + total.clone().log()) * mass - expected) * weights.clone();
    let gradient = exponentials * (weights.clone() * mass / total / temperature) - targets * (weights / temperature);
    (losses.reshape([rows]), gradient)
}

/// See [`crate::with_gradients`].
pub fn with_gradients([x, w]: [Tensor<2>; 2], [x_gradient, w_gradient]: [Tensor<2>; 2]) -> Tensor<1> {
    let constant = |gradient: Tensor<2>| if x.device().is_autodiff() { Tensor::from_inner(gradient) } else { gradient };
    let sum = (x.clone() * constant(x_gradient)).sum() + (w * constant(w_gradient)).sum();
    sum.clone() - sum.detach()
}

/// See [`crate::sinkhorn`].
pub fn sinkhorn(logits: Tensor<2>, temperature: f64, iterations: usize) -> Tensor<2> {
    let [samples, prototypes] = logits.dims();
    let scaled = logits / temperature;
    let peaks = scaled.clone().max_dim(1);
    let q = (scaled - peaks.clone()).exp();
    let mut per_sample = (peaks.clone() - peaks.max_dim(0)).exp();
    let mut per_prototype = Tensor::<2>::ones([prototypes, 1], &q.device());
    for _ in 0..iterations {
        let mass = q.clone().transpose().matmul(per_sample).clamp_min(LEAST_MASS);
        per_prototype = (mass * prototypes as f64).recip();
        let mass = q.clone().matmul(per_prototype.clone()).clamp_min(LEAST_MASS);
        per_sample = (mass * samples as f64).recip();
    }
    q * per_prototype.transpose() * (per_sample * samples as f64)
}

/// See [`crate::adamw`].
pub fn adamw(weight: Tensor<1>, gradient: Tensor<1>, m: Tensor<1>, v: Tensor<1>, step: AdamW) -> [Tensor<1>; 3] {
    let gradient = gradient * step.gradient_factor;
    let m = m * step.beta1 + gradient.clone() * (1.0 - step.beta1);
    let v = v * step.beta2 + gradient.powi_scalar(2) * (1.0 - step.beta2);
    let root = v.clone().sqrt() / step.correction2.sqrt() + step.eps;
    let weight = weight * step.decay - m.clone() / root * (step.lr / step.correction1);
    [weight, m, v]
}

/// See [`crate::running_mean`].
pub fn running_mean(mean: Tensor<1>, value: Tensor<1>, momentum: f64) -> Tensor<1> {
    mean * momentum + value * (1.0 - momentum)
}

/// See [`crate::sum_of_squares`].
pub fn sum_of_squares(x: &Tensor<1>) -> Tensor<1> {
    x.clone().powi_scalar(2).sum()
}
