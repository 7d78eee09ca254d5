//! The layers of a transformer block, named as the references name them.

use burn::module::{Module, Param};
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData, activation};
use dinoxide_kernels as kernels;
use dinoxide_kernels::{Normalization, Precision, Projection, RopeTable};
use rand::Rng;

use crate::{
    config::{FfnKind, NormKind, VitConfig},
    draws::BranchDraw,
    init::Init,
};

/// `y = x·Wᵀ + b`, the weight `[out, in]` as in PyTorch.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param<Tensor<2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// Of its product.
    #[module(skip)]
    pub(crate) precision: Precision,
}

impl Linear {
    pub(crate) fn new(input: usize, output: usize, bias: bool, init: &mut Init<impl Rng>) -> Self {
        let (weight, bias) = (init.normal([output, input], 0.02), bias.then(|| init.constant([output], 0.0)));
        Self { weight, bias, precision: Precision::Fp32 }
    }

    /// `x [M, in]` → `[M, out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        kernels::linear(x, self.weight.val(), self.bias.as_ref().map(Param::val), self.precision)
    }

    fn projection(&self) -> Projection {
        Projection { weight: self.weight.val(), bias: self.bias.as_ref().map(Param::val) }
    }
}

/// Layer or RMS normalisation over the last axis.
#[derive(Module, Debug)]
pub struct Norm {
    /// `[D]`.
    pub weight: Param<Tensor<1>>,
    /// `[D]`; RMS normalisation has none.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    eps: f64,
}

impl Norm {
    pub(crate) fn new(dim: usize, kind: NormKind, eps: f64, init: &mut Init<impl Rng>) -> Self {
        let bias = (kind == NormKind::LayerNorm).then(|| init.constant([dim], 0.0));
        Self { weight: init.constant([dim], 1.0), bias, eps }
    }

    /// `x [M, D]` → `[M, D]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.bias {
            Some(bias) => kernels::layer_norm(x, self.weight.val(), bias.val(), self.eps),
            None => {
                let mean_square = x.clone().powi_scalar(2).mean_dim(1);
                x / (mean_square + self.eps).sqrt() * self.weight.val().unsqueeze()
            }
        }
    }

    pub(crate) fn forward_tokens(&self, x: Tensor<3>) -> Tensor<3> {
        on_rows(x, |rows| self.forward(rows))
    }

    /// Its values, if it is a layer norm.
    fn normalization(&self) -> Option<Normalization> {
        let bias = self.bias.as_ref()?.val();
        Some(Normalization { weight: self.weight.val(), bias, eps: self.eps })
    }
}

/// Applies a row-wise layer to tokens `[B, N, D]`.
pub(crate) fn on_rows(x: Tensor<3>, layer: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<3> {
    let [batch, tokens, dim] = x.dims();
    let y = layer(x.reshape([batch * tokens, dim]));
    let dim = y.dims()[1];
    y.reshape([batch, tokens, dim])
}

/// Some rows of a matrix.
pub(crate) fn select_rows(x: Tensor<2>, rows: &[usize]) -> Tensor<2> {
    if rows.is_empty() {
        return Tensor::zeros([0, x.dims()[1]], &x.device());
    }
    let rows: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
    let rows = Tensor::<1, Int>::from_data(TensorData::from(rows.as_slice()), &x.device());
    x.select(0, rows)
}

/// A learned factor per channel on a residual branch (Touvron et al. 2021, eq. 3).
#[derive(Module, Debug)]
pub struct LayerScale {
    /// `[D]`.
    pub gamma: Param<Tensor<1>>,
}

/// Multi-head self-attention with packed query, key and value projections.
#[derive(Module, Debug)]
pub struct SelfAttention {
    /// `D → 3·D`.
    pub qkv: Linear,
    /// `D → D`.
    pub proj: Linear,
    #[module(skip)]
    num_heads: usize,
    #[module(skip)]
    mask_k_bias: bool,
}

impl SelfAttention {
    fn new(config: &VitConfig, init: &mut Init<impl Rng>) -> Self {
        let dim = config.embed_dim;
        Self {
            qkv: Linear::new(dim, 3 * dim, config.qkv_bias, init),
            proj: Linear::new(dim, dim, config.proj_bias, init),
            num_heads: config.num_heads,
            mask_k_bias: config.mask_k_bias,
        }
    }

    /// `x [B, N, D]` → `[B, N, D]`.
    pub fn forward(&self, x: Tensor<3>, rope: Option<&RopeTable>) -> Tensor<3> {
        let qkv = self.packed(x);
        let heads = kernels::self_attention(qkv, self.num_heads, rope, self.qkv.precision);
        on_rows(heads, |rows| self.proj.forward(rows))
    }

    /// What the first token attends to, `x [B, N, D]` → `[B, heads, N]`.
    fn first_token_attention(&self, x: Tensor<3>, rope: Option<&RopeTable>) -> Tensor<3> {
        kernels::composed::first_token_attention(self.packed(x), self.num_heads, rope, self.qkv.precision)
    }

    /// `[B, N, 3·D]`.
    fn packed(&self, x: Tensor<3>) -> Tensor<3> {
        on_rows(x, |rows| kernels::linear(rows, self.qkv.weight.val(), self.qkv_bias(), self.qkv.precision))
    }

    /// The bias with its key third held at zero where the model asks for it; that third then has no gradient either.
    fn qkv_bias(&self) -> Option<Tensor<1>> {
        let bias = self.qkv.bias.as_ref()?.val();
        Some(match self.bias_mask() {
            Some(mask) => {
                let mask = Tensor::from_data(TensorData::from(mask.as_slice()), &bias.device());
                bias * mask
            }
            None => bias,
        })
    }

    /// What the qkv bias is multiplied with, `[3·D]`: DINOv3's buffer `bias_mask`. `None` where no key bias is held at zero.
    pub fn bias_mask(&self) -> Option<Vec<f32>> {
        let bias = self.qkv.bias.as_ref().filter(|_| self.mask_k_bias)?;
        Some(bias_mask(bias.dims()[0] / 3))
    }
}

/// DINOv3's `bias_mask`: ones for queries and values, zeros for keys.
pub(crate) fn bias_mask(dim: usize) -> Vec<f32> {
    (0..3 * dim).map(|i| if (dim..2 * dim).contains(&i) { 0.0 } else { 1.0 }).collect()
}

/// The feed-forward layer; which linear layers it has depends on its kind, under the references' names.
#[derive(Module, Debug)]
pub struct Ffn {
    /// MLP, first layer.
    pub fc1: Option<Linear>,
    /// MLP, second layer.
    pub fc2: Option<Linear>,
    /// Packed SwiGLU: gate and value.
    pub w12: Option<Linear>,
    /// SwiGLU: gate.
    pub w1: Option<Linear>,
    /// SwiGLU: value.
    pub w2: Option<Linear>,
    /// SwiGLU: output.
    pub w3: Option<Linear>,
}

impl Ffn {
    fn new(config: &VitConfig, init: &mut Init<impl Rng>) -> Self {
        let (dim, hidden, bias) = (config.embed_dim, config.ffn_hidden, config.ffn_bias);
        let mut ffn = Self { fc1: None, fc2: None, w12: None, w1: None, w2: None, w3: None };
        match config.ffn {
            FfnKind::Mlp => {
                ffn.fc1 = Some(Linear::new(dim, hidden, bias, init));
                ffn.fc2 = Some(Linear::new(hidden, dim, bias, init));
            }
            FfnKind::SwigluFused => {
                ffn.w12 = Some(Linear::new(dim, 2 * hidden, bias, init));
                ffn.w3 = Some(Linear::new(hidden, dim, bias, init));
            }
            FfnKind::Swiglu | FfnKind::Swiglu32 | FfnKind::Swiglu64 | FfnKind::Swiglu128 => {
                ffn.w1 = Some(Linear::new(dim, hidden, bias, init));
                ffn.w2 = Some(Linear::new(dim, hidden, bias, init));
                ffn.w3 = Some(Linear::new(hidden, dim, bias, init));
            }
        }
        ffn
    }

    /// `x [M, D]` → `[M, D]`.
    ///
    /// # Panics
    /// If the layers do not make up one of the three kinds; the constructor makes them.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match (&self.fc1, &self.fc2, &self.w12, &self.w1, &self.w2, &self.w3) {
            (Some(fc1), Some(fc2), None, None, None, None) => fc2.forward(kernels::gelu(fc1.forward(x))),
            (None, None, Some(w12), None, None, Some(w3)) => {
                let both = w12.forward(x);
                let half = both.dims()[1] / 2;
                let mut halves = both.split(half, 1).into_iter();
                let (gate, value) = (halves.next().expect("gate"), halves.next().expect("value"));
                w3.forward(activation::silu(gate) * value)
            }
            (None, None, None, Some(w1), Some(w2), Some(w3)) => {
                w3.forward(activation::silu(w1.forward(x.clone())) * w2.forward(x))
            }
            _ => panic!("a feed-forward layer is an MLP, a packed SwiGLU or a SwiGLU"),
        }
    }
}

/// A pre-norm transformer block: attention and feed-forward, each a residual branch.
#[derive(Module, Debug)]
pub struct Block {
    /// Before attention.
    pub norm1: Norm,
    /// Attention.
    pub attn: SelfAttention,
    /// Scale of the attention branch.
    pub ls1: Option<LayerScale>,
    /// Before the feed-forward layer.
    pub norm2: Norm,
    /// Feed-forward layer.
    pub mlp: Ffn,
    /// Scale of the feed-forward branch.
    pub ls2: Option<LayerScale>,
    /// See [`Backbone::recomputing`](crate::Backbone::recomputing).
    #[module(skip)]
    pub(crate) recompute: bool,
}

impl Block {
    pub(crate) fn new(config: &VitConfig, init: &mut Init<impl Rng>) -> Self {
        let dim = config.embed_dim;
        let scale = |init: &mut Init<_>| config.layer_scale_init.map(|v| LayerScale { gamma: init.constant([dim], v) });
        Self {
            norm1: Norm::new(dim, config.norm, config.norm_eps, init),
            attn: SelfAttention::new(config, init),
            ls1: scale(init),
            norm2: Norm::new(dim, config.norm, config.norm_eps, init),
            mlp: Ffn::new(config, init),
            ls2: scale(init),
            recompute: false,
        }
    }

    /// Its linear layers, by which its attention goes too.
    pub(crate) fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        let Ffn { fc1, fc2, w12, w1, w2, w3 } = &mut self.mlp;
        let ffn = [fc1, fc2, w12, w1, w2, w3].into_iter().flatten();
        [&mut self.attn.qkv, &mut self.attn.proj].into_iter().chain(ffn)
    }

    /// What the first token of `x [B, N, D]` attends to in this block, `[B, heads, N]`.
    pub(crate) fn first_token_attention(&self, x: Tensor<3>, rope: Option<&RopeTable>) -> Tensor<3> {
        self.attn.first_token_attention(self.norm1.forward_tokens(x), rope)
    }

    /// `x [B, N, D]` → `[B, N, D]`; `draws` are those of the attention and feed-forward branches.
    ///
    /// # Panics
    /// If there are not two draws.
    pub fn forward(&self, x: Tensor<3>, rope: Option<&RopeTable>, draws: &[BranchDraw]) -> Tensor<3> {
        let [attention, feed_forward] = draws else { panic!("{} draws for the two branches of a block", draws.len()) };
        let x = self.attention(x, rope, attention);
        self.feed_forward(x, feed_forward)
    }

    /// What [`forward`](Self::forward) makes of the tokens at `rows`, ascending places in the flattened list `[B·N]`, alone:
    /// `x [B, N, D]` → `[rows, 1, D]`.
    ///
    /// # Panics
    /// If there are not two draws.
    pub(crate) fn forward_rows(
        &self,
        x: Tensor<3>,
        rope: Option<&RopeTable>,
        draws: &[BranchDraw],
        rows: &[usize],
    ) -> Tensor<3> {
        let [attention, feed_forward] = draws else { panic!("{} draws for the two branches of a block", draws.len()) };
        let [batch, tokens, dim] = x.dims();
        let x = match (attention, self.attention_branch()) {
            (BranchDraw::Keep, Some(branch)) => kernels::selected_attention(x, rows, branch, self.attn.num_heads, rope),
            _ => select_rows(self.attention(x, rope, attention).reshape([batch * tokens, dim]), rows),
        };
        let draw = feed_forward.of_tokens(rows.iter().map(|row| row / tokens), batch);
        self.feed_forward(x.reshape([rows.len(), 1, dim]), &draw)
    }

    /// The first branch.
    fn attention(&self, x: Tensor<3>, rope: Option<&RopeTable>, draw: &BranchDraw) -> Tensor<3> {
        let attn = &self.attn;
        let gamma = self.ls1.as_ref().map(|scale| scale.gamma.val());
        branch(x, draw, gamma, |x, gamma| match self.attention_branch() {
            Some(branch) => kernels::attention(x, kernels::Branch { gamma, ..branch }, attn.num_heads, rope),
            None => residual(x.clone(), attn.forward(self.norm1.forward_tokens(x), rope), gamma),
        })
    }

    /// What the first branch is made of, where it has a layer norm.
    fn attention_branch(&self) -> Option<kernels::Branch> {
        let attn = &self.attn;
        Some(kernels::Branch {
            norm: self.norm1.normalization()?,
            first: Projection { weight: attn.qkv.weight.val(), bias: attn.qkv_bias() },
            last: attn.proj.projection(),
            gamma: self.ls1.as_ref().map(|scale| scale.gamma.val()),
            precision: attn.qkv.precision,
            recompute: self.recompute,
        })
    }

    /// The second branch.
    fn feed_forward(&self, x: Tensor<3>, draw: &BranchDraw) -> Tensor<3> {
        let gamma = self.ls2.as_ref().map(|scale| scale.gamma.val());
        let Ffn { fc1, fc2, w12, w1, w2, w3 } = &self.mlp;
        let first = fc1.as_ref().or(w12.as_ref()).or(w1.as_ref());
        let last = fc2.as_ref().or(w3.as_ref());
        branch(x, draw, gamma, |x, gamma| match (self.norm2.normalization(), first, last) {
            (Some(norm), Some(first), Some(last)) => {
                let precision = first.precision;
                let (first, last) = (first.projection(), last.projection());
                let branch = kernels::Branch { norm, first, last, gamma, precision, recompute: self.recompute };
                on_rows(x, |rows| match fc1 {
                    Some(_) => kernels::feed_forward(rows, branch),
                    None => kernels::gated_feed_forward(rows, branch, w2.as_ref().map(Linear::projection)),
                })
            }
            _ => {
                let y = on_rows(x.clone(), |rows| self.mlp.forward(self.norm2.forward(rows)));
                residual(x, y, gamma)
            }
        })
    }
}

/// `x + gamma·y`; no scale is a scale of one.
pub(crate) fn residual(x: Tensor<3>, y: Tensor<3>, gamma: Option<Tensor<1>>) -> Tensor<3> {
    let [batch, tokens, dim] = x.dims();
    let rows = [batch * tokens, dim];
    kernels::residual(x.reshape(rows), y.reshape(rows), gamma).reshape([batch, tokens, dim])
}

/// A residual branch `f(x, gamma) = x + gamma·g(x)` under a draw of stochastic depth: it runs on the samples that are kept,
/// with a gamma that is larger by the draw's factor, and the others stay as they are.
pub(crate) fn branch(
    x: Tensor<3>,
    draw: &BranchDraw,
    gamma: Option<Tensor<1>>,
    f: impl FnOnce(Tensor<3>, Option<Tensor<1>>) -> Tensor<3>,
) -> Tensor<3> {
    let [batch, _, dim] = x.dims();
    let Some((kept, factor)) = draw.kept(batch) else { return f(x, gamma) };
    if kept.is_empty() {
        return x;
    }
    let device = x.device();
    let gamma = Some(match gamma {
        Some(gamma) => gamma * factor,
        None => Tensor::full([dim], factor, &device),
    });
    if kept.len() == batch {
        return f(x, gamma);
    }
    let samples: Vec<i32> = kept.iter().map(|&sample| sample as i32).collect();
    let samples = Tensor::<1, Int>::from_data(samples.as_slice(), &device);
    let y = f(x.clone().select(0, samples.clone()), gamma);
    x.select_assign(0, samples, y, IndexingUpdateOp::Assign)
}
