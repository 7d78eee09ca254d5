//! The projection head: tokens to prototype logits (DINO §3.2, "projection head").
//!
//! An MLP, L2 normalisation of its output, and a layer of prototypes. The prototypes are kept apart from the MLP here:
//! `[tokens, K]` logits are by far the largest tensors of a training step, and the losses decide when and how many of them
//! exist at a time.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use dinoxide_kernels as kernels;
use dinoxide_kernels::Precision;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::{init::Init, layers::Linear};

/// How prototype vectors are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadNorm {
    /// Not at all: a plain linear layer (DINOv3).
    None,
    /// Weight normalisation with trainable magnitudes (DINOv2; DINO and iBOT with `norm_last_layer` off).
    Weight,
    /// Weight normalisation with magnitudes fixed at 1 (DINO and iBOT by default).
    WeightFixed,
}

/// A head: the `[dino_head]` and `[ibot_head]` tables.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HeadConfig {
    /// Prototypes (K).
    pub prototypes: usize,
    /// Width of the normalised bottleneck.
    pub bottleneck_dim: usize,
    /// Width of the MLP's hidden layers.
    pub hidden_dim: usize,
    /// Linear layers before the prototypes, at least 1.
    pub layers: usize,
    /// Whether these linear layers have biases.
    pub mlp_bias: bool,
    /// Normalisation of the prototypes.
    pub norm: HeadNorm,
    /// Number of prototypes of patch tokens, where they are others than those of CLS on the same MLP (iBOT without a shared
    /// head).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch_prototypes: Option<usize>,
}

impl Default for HeadConfig {
    fn default() -> Self {
        Self {
            prototypes: 65536,
            bottleneck_dim: 256,
            hidden_dim: 2048,
            layers: 3,
            mlp_bias: true,
            norm: HeadNorm::None,
            patch_prototypes: None,
        }
    }
}

/// The prototypes; which parameters they have depends on their normalisation.
#[derive(Module, Debug)]
pub struct Prototypes {
    /// `[K, bottleneck]`, without weight normalisation.
    pub weight: Option<Param<Tensor<2>>>,
    /// Magnitudes `[K, 1]`, with weight normalisation.
    pub weight_g: Option<Param<Tensor<2>>>,
    /// Directions `[K, bottleneck]`, with weight normalisation.
    pub weight_v: Option<Param<Tensor<2>>>,
    #[module(skip)]
    fixed: bool,
}

impl Prototypes {
    fn new(prototypes: usize, config: &HeadConfig, init: &mut Init<impl Rng>) -> Self {
        let shape = [prototypes, config.bottleneck_dim];
        match config.norm {
            HeadNorm::None => {
                Self { weight: Some(init.normal(shape, 0.02)), weight_g: None, weight_v: None, fixed: false }
            }
            norm => Self {
                weight: None,
                weight_g: Some(init.constant([prototypes, 1], 1.0)),
                // PyTorch's default for a linear layer: the references create this layer after their own initialisation.
                weight_v: Some(init.uniform(shape, 1.0 / (config.bottleneck_dim as f64).sqrt())),
                fixed: norm == HeadNorm::WeightFixed,
            },
        }
    }

    /// The effective prototype vectors `[K, bottleneck]`: `g_k·v_k/‖v_k‖` under weight normalisation.
    pub fn vectors(&self) -> Tensor<2> {
        match (&self.weight, &self.weight_g, &self.weight_v) {
            (Some(weight), None, None) => weight.val(),
            (None, Some(g), Some(v)) => {
                let g = if self.fixed { g.val().detach() } else { g.val() };
                let v = v.val();
                let length = v.clone().powi_scalar(2).sum_dim(1).sqrt();
                v * (g / length)
            }
            _ => panic!("prototypes have either a weight or a magnitude and a direction"),
        }
    }
}

/// A projection head.
#[derive(Module, Debug)]
pub struct ProjectionHead {
    /// Linear layers at the even places, nothing (the GELU of the references' sequence) at the odd ones.
    pub mlp: Vec<Option<Linear>>,
    /// The prototypes.
    pub last_layer: Prototypes,
    /// iBOT's prototypes of patch tokens, where they are not those of CLS but the MLP is shared.
    pub last_layer2: Option<Prototypes>,
    #[module(skip)]
    precision: Precision,
}

impl ProjectionHead {
    /// A head with fresh weights on tokens of width `embed_dim`.
    ///
    /// # Panics
    /// If `config.layers` is 0.
    pub fn new(embed_dim: usize, config: &HeadConfig, device: &Device, rng: &mut impl Rng) -> Self {
        assert!(config.layers > 0, "a projection head has at least one linear layer");
        let mut init = Init { rng, device };
        let mut mlp = Vec::new();
        for layer in 0..config.layers {
            let input = if layer == 0 { embed_dim } else { config.hidden_dim };
            let last = layer + 1 == config.layers;
            let output = if last { config.bottleneck_dim } else { config.hidden_dim };
            mlp.push(Some(Linear::new(input, output, config.mlp_bias, &mut init)));
            if !last {
                mlp.push(None);
            }
        }
        Self {
            mlp,
            last_layer: Prototypes::new(config.prototypes, config, &mut init),
            last_layer2: config.patch_prototypes.map(|count| Prototypes::new(count, config, &mut init)),
            precision: Precision::Fp32,
        }
    }

    /// The same with its products in this precision. A new head has single precision.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.mlp.iter_mut().flatten().for_each(|linear| linear.precision = precision);
        self.precision = precision;
        self
    }

    /// In which precision bottlenecks are multiplied with prototypes.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The normalised bottleneck of tokens: `x [M, D]` → `[M, bottleneck]`, rows of length 1.
    pub fn bottleneck(&self, x: Tensor<2>) -> Tensor<2> {
        let mut y = x;
        for layer in &self.mlp {
            y = match layer {
                Some(linear) => linear.forward(y),
                None => kernels::gelu(y),
            };
        }
        // Clamped before the root, whose slope at zero is infinite.
        let length = y.clone().powi_scalar(2).sum_dim(1).clamp_min(1e-24).sqrt();
        y / length
    }

    /// The prototypes that patch tokens are assigned to: their own where the head has such, else those of CLS.
    pub fn patch_prototypes(&self) -> &Prototypes {
        self.last_layer2.as_ref().unwrap_or(&self.last_layer)
    }

    /// Logits of tokens: `x [M, D]` → `[M, K]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        kernels::linear(self.bottleneck(x), self.last_layer.vectors(), None, self.precision)
    }

    /// Logits of patch tokens: `x [M, D]` → `[M, K']`, with the [`patch_prototypes`](Self::patch_prototypes).
    pub fn forward_patches(&self, x: Tensor<2>) -> Tensor<2> {
        kernels::linear(self.bottleneck(x), self.patch_prototypes().vectors(), None, self.precision)
    }
}
