//! Vision backbones and projection heads, with the references' parameter names.
//!
//! A [`Backbone`] is what its [`Architecture`] says: a [`Vit`], the backbone of DINO, iBOT, DINOv2 and DINOv3 depending on
//! its [`VitConfig`], or a [`ConvNext`], which DINOv3 distils into. A [`ProjectionHead`] maps its tokens to prototypes.
//! Nothing here draws randomness that was not passed in, and nothing but [`weights`] does I/O.

mod arch;
mod backbone;
pub mod config;
mod convnext;
mod draws;
mod fingerprint;
mod head;
mod init;
pub mod interpolation;
mod layers;
pub mod parameters;
mod projector;
mod rope;
mod vit;
pub mod weights;

pub use arch::{Arch, Sizes};
pub use backbone::{Architecture, Backbone, Sides};
pub use config::{ModelConfig, VitConfig};
pub use convnext::{ConvNext, ConvNextBlock, ConvNextConfig, Convolution};
pub use dinoxide_kernels::Precision;
pub use draws::{BranchDraw, StochasticDraws};
pub use fingerprint::{Fingerprint, Mismatch};
pub use head::{HeadConfig, HeadNorm, ProjectionHead, Prototypes};
pub use layers::{Block, Ffn, LayerScale, Linear, Norm, SelfAttention};
pub use projector::Projector;
pub use rope::{Rope, RopeDraw};
pub use vit::{CropGroup, Features, LayerFeatures, SelectedFeatures, Vit};

/// What can be wrong with a model's description.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Numbers that do not fit together.
    #[error("model: {0}")]
    Config(String),
    /// A size that patches do not tile.
    #[error(
        "model: {what} {size} is not a multiple of the patch size {patch}\n\nhint: the nearest sizes are {} and {}",
        size / (*patch).max(1) * patch,
        (size / (*patch).max(1) + 1) * patch
    )]
    NotAMultiple {
        /// Which size.
        what: &'static str,
        /// Its value in pixels.
        size: usize,
        /// The patch size in pixels.
        patch: usize,
    },
}

impl ModelError {
    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::Config(message.into())
    }
}
