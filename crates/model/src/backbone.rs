//! One type for every backbone, and for what describes it: what training, evaluation and weight files speak to.

use std::fmt::{self, Display, Formatter};

use burn::module::Module;
use burn::tensor::{Bool, Device, Tensor};
use dinoxide_kernels::Precision;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::config::NormKind;
use crate::{
    ConvNext, ConvNextConfig, CropGroup, Features, LayerFeatures, ModelError, SelectedFeatures, StochasticDraws, Vit,
    VitConfig, convnext, layers::select_rows,
};

/// The complete description of a backbone; nothing in it is implied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "lowercase")]
pub enum Architecture {
    /// A vision transformer.
    Vit(VitConfig),
    /// A ConvNeXt.
    ConvNext(ConvNextConfig),
}

/// Sides of the images that a backbone takes, in pixels: the multiples of a number, from some size on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sides {
    /// Every side is a multiple of it.
    pub step: usize,
    /// The smallest, a multiple of [`step`](Self::step).
    pub least: usize,
}

impl Display for Sides {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { step, least } = self;
        write!(f, "multiples of {step}")?;
        if least == step { Ok(()) } else { write!(f, " from {least} on") }
    }
}

impl Architecture {
    /// Width of the tokens after the last layer.
    pub fn embed_dim(&self) -> usize {
        match self {
            Self::Vit(config) => config.embed_dim,
            Self::ConvNext(config) => config.dims[3],
        }
    }

    /// Colour channels of the images.
    pub fn in_channels(&self) -> usize {
        match self {
            Self::Vit(config) => config.in_channels,
            Self::ConvNext(config) => config.in_channels,
        }
    }

    /// Layers whose tokens [`Backbone::forward_layers`] gives: the blocks of a ViT, the four stages of a ConvNeXt.
    pub fn layers(&self) -> usize {
        match self {
            Self::Vit(config) => config.depth,
            Self::ConvNext(config) => config.dims.len(),
        }
    }

    /// Whether its blocks can compute their inside again in the backward pass: [`Backbone::recomputing`].
    pub fn can_recompute(&self) -> bool {
        matches!(self, Self::Vit(config) if config.norm == NormKind::LayerNorm)
    }

    /// Side of the square of pixels that a patch token stands for.
    pub fn stride(&self) -> usize {
        match self {
            Self::Vit(config) => config.patch_size,
            Self::ConvNext(_) => convnext::STRIDE,
        }
    }

    /// The sides that [`grid`](Self::grid) accepts.
    pub fn sides(&self) -> Sides {
        match self {
            Self::Vit(config) => Sides { step: config.patch_size, least: config.patch_size },
            Self::ConvNext(config) => config.sides(),
        }
    }

    /// The grid of patch tokens `(rows, columns)` of an image of `height × width` pixels.
    ///
    /// # Errors
    /// A side that the backbone cannot take.
    pub fn grid(&self, height: usize, width: usize) -> Result<(usize, usize), ModelError> {
        match self {
            Self::Vit(config) => config.grid(height, width),
            Self::ConvNext(config) => config.grid(height, width),
        }
    }

    /// Checks that the numbers fit together. An architecture read from a file must pass before anything is built.
    ///
    /// # Errors
    /// The first relation that does not hold, with both values.
    pub fn check(&self) -> Result<(), ModelError> {
        match self {
            Self::Vit(config) => config.check(),
            Self::ConvNext(config) => config.check(),
        }
    }

    /// The random draws of a training forward on `batch` crops.
    pub fn draw(&self, batch: usize, rng: &mut impl Rng) -> StochasticDraws {
        match self {
            Self::Vit(config) => StochasticDraws::draw(config, batch, rng),
            Self::ConvNext(config) => StochasticDraws::draw_convnext(config, batch, rng),
        }
    }
}

impl From<VitConfig> for Architecture {
    fn from(config: VitConfig) -> Self {
        Self::Vit(config)
    }
}

impl From<ConvNextConfig> for Architecture {
    fn from(config: ConvNextConfig) -> Self {
        Self::ConvNext(config)
    }
}

impl Display for Architecture {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vit(config) => {
                let VitConfig { embed_dim, depth, num_heads, patch_size, .. } = config;
                let position = if config.rope.is_some() { "RoPE" } else { "learned positions" };
                write!(f, "ViT {embed_dim} wide, {depth} deep, {num_heads} heads, patch {patch_size}, {position}")?;
                match config.register_tokens {
                    0 => Ok(()),
                    count => write!(f, ", {count} registers"),
                }
            }
            Self::ConvNext(config) => {
                let list = |values: [usize; 4]| values.map(|value| value.to_string()).join("-");
                write!(f, "ConvNeXt {} wide, {} deep", list(config.dims), list(config.depths))
            }
        }
    }
}

/// A backbone: images in, a CLS token and patch tokens out.
///
/// Its parameters are named as in the reference of its family; see [`parameters`](crate::parameters).
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a run has a handful of backbones, and their tensors are elsewhere")]
pub enum Backbone {
    /// A vision transformer.
    Vit(Vit),
    /// A ConvNeXt.
    ConvNext(ConvNext),
}

impl Backbone {
    /// A backbone with fresh weights. `architecture` must have passed [`Architecture::check`].
    pub fn new(architecture: &Architecture, device: &Device, rng: &mut impl Rng) -> Self {
        match architecture {
            Architecture::Vit(config) => Self::Vit(Vit::new(config, device, rng)),
            Architecture::ConvNext(config) => Self::ConvNext(ConvNext::new(config, device, rng)),
        }
    }

    /// The same, with blocks whose backward pass computes again what lies between their linear layers instead of keeping it:
    /// less memory, more work, the same values. Blocks with RMS norm keep theirs, as does a ConvNeXt.
    pub fn recomputing(mut self, recompute: bool) -> Self {
        if let Self::Vit(vit) = &mut self {
            vit.blocks.iter_mut().for_each(|block| block.recompute = recompute);
        }
        self
    }

    /// Numbers that the blocks keep of a forward pass over so many crops for the backward pass: about ten for each number of
    /// a token (queries, keys, values, the heads' results, the hidden layer, the inputs of both branches), or two with
    /// [`recomputing`](Self::recomputing).
    pub fn kept_for_backward(&self, crops: usize, height: usize, width: usize) -> usize {
        const OF_A_BLOCK: usize = 10;
        const OF_A_BLOCK_THAT_RECOMPUTES: usize = 2;
        let of_one = match self {
            Self::Vit(vit) => {
                let VitConfig { patch_size, embed_dim, .. } = vit.config();
                let tokens = 1 + height.div_ceil(*patch_size) * width.div_ceil(*patch_size);
                let kept = |recompute| if recompute { OF_A_BLOCK_THAT_RECOMPUTES } else { OF_A_BLOCK };
                tokens * embed_dim * vit.blocks.iter().map(|block| kept(block.recompute)).sum::<usize>()
            }
            Self::ConvNext(net) => {
                let ConvNextConfig { dims, depths, .. } = net.config();
                let of_stage = |(stage, (dim, depth)): (usize, (&usize, &usize))| {
                    let stride = 4 << stage;
                    height.div_ceil(stride) * width.div_ceil(stride) * dim * depth * OF_A_BLOCK
                };
                dims.iter().zip(depths).enumerate().map(of_stage).sum()
            }
        };
        crops * of_one
    }

    /// The same with its products in this precision. A new or loaded backbone has single precision.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        match &mut self {
            Self::Vit(vit) => vit.set_precision(precision),
            Self::ConvNext(convnext) => convnext.set_precision(precision),
        }
        self
    }

    /// What this backbone is.
    pub fn architecture(&self) -> Architecture {
        match self {
            Self::Vit(vit) => Architecture::Vit(vit.config().clone()),
            Self::ConvNext(convnext) => Architecture::ConvNext(convnext.config().clone()),
        }
    }

    /// Features of `images`, as the teacher and every evaluation compute them. A ConvNeXt ignores the mask, as in DINOv3.
    ///
    /// # Shapes
    /// `images [B, C, H, W]`, sides that [`Architecture::grid`] accepts; `mask [B, P]`, true = masked.
    pub fn forward(&self, images: Tensor<4>, mask: Option<Tensor<2, Bool>>) -> Features {
        match self {
            Self::Vit(vit) => vit.forward(images, mask),
            Self::ConvNext(convnext) => convnext.forward(images),
        }
    }

    /// The student's forward: under given draws, made for this batch size. A ConvNeXt ignores the mask, as in DINOv3.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward).
    pub fn forward_train(
        &self,
        images: Tensor<4>,
        mask: Option<Tensor<2, Bool>>,
        group: CropGroup,
        draws: &StochasticDraws,
    ) -> Features {
        match self {
            Self::Vit(vit) => vit.forward_train(images, mask, group, draws),
            Self::ConvNext(convnext) => convnext.forward_train(images, draws),
        }
    }

    /// CLS and some patch tokens of [`forward`](Self::forward), or with draws of [`forward_train`](Self::forward_train),
    /// without what only the others need.
    ///
    /// # Shapes
    /// `images` and `mask` as there; `patches` are places in the flattened list `[B·P]`, in ascending order.
    pub fn forward_selected(
        &self,
        images: Tensor<4>,
        mask: Option<Tensor<2, Bool>>,
        group: CropGroup,
        draws: Option<&StochasticDraws>,
        patches: &[usize],
    ) -> SelectedFeatures {
        match self {
            Self::Vit(vit) => vit.forward_selected(images, mask, group, draws, patches),
            Self::ConvNext(convnext) => {
                let Features { cls, patches: all, .. } = match draws {
                    Some(draws) => convnext.forward_train(images, draws),
                    None => convnext.forward(images),
                };
                let [batch, count, dim] = all.dims();
                SelectedFeatures { cls, patches: select_rows(all.reshape([batch * count, dim]), patches) }
            }
        }
    }

    /// Tokens after the given layers (indices from 0), in ascending order; with `norm`, after the final norm, which in a
    /// ConvNeXt is that of the last stage alone.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward).
    pub fn forward_layers(&self, images: Tensor<4>, layers: &[usize], norm: bool) -> Vec<LayerFeatures> {
        match self {
            Self::Vit(vit) => vit.forward_layers(images, layers, norm),
            Self::ConvNext(convnext) => convnext.forward_layers(images, layers, norm),
        }
    }

    /// The patches of the last layer that [`forward_layers`](Self::forward_layers) gives after its norm, from the features of a
    /// forward on images of `(height, width)`: of a ConvNeXt they lie on the grid of its `patch_size`, those of
    /// [`Features::patches`] on that of its last feature map.
    pub fn last_layer_patches(&self, features: &Features, size: (usize, usize)) -> Tensor<3> {
        match self {
            Self::Vit(_) => features.patches.clone(),
            Self::ConvNext(convnext) => convnext.last_layer_patches(features, size),
        }
    }
}
