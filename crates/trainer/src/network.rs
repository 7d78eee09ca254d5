//! A backbone with its heads: what the student and the teacher each are.

use burn::module::Module;
use burn::tensor::{Bool, Device, Int, Tensor};
use dinoxide_model::{
    Architecture, Backbone, CropGroup, Features, HeadConfig, Precision, ProjectionHead, Projector, StochasticDraws,
};
use rand::Rng;

/// Backbone and projection heads.
#[derive(Module, Debug)]
pub struct Network {
    /// The backbone.
    pub backbone: Backbone,
    /// The head of CLS tokens, and of patch tokens where there is no head of their own.
    pub dino_head: ProjectionHead,
    /// The head of patch tokens.
    pub ibot_head: Option<ProjectionHead>,
    /// From this backbone's tokens to a frozen teacher's.
    pub projector: Option<Projector>,
}

/// The parts of a network whose gradients are clipped by a norm of their own.
pub const SUBMODULES: [&str; 4] = ["backbone", "dino_head", "ibot_head", "projector"];

impl Network {
    /// A network with fresh weights. `ibot_head` is `None` when patch tokens share the head of CLS tokens.
    pub fn new(
        backbone: &Architecture,
        dino_head: &HeadConfig,
        ibot_head: Option<&HeadConfig>,
        device: &Device,
        rng: &mut impl Rng,
    ) -> Self {
        let dim = backbone.embed_dim();
        Self {
            backbone: Backbone::new(backbone, device, rng),
            dino_head: ProjectionHead::new(dim, dino_head, device, rng),
            ibot_head: ibot_head.map(|head| ProjectionHead::new(dim, head, device, rng)),
            projector: None,
        }
    }

    /// The same with all its products in this precision.
    pub fn with_precision(self, precision: Precision) -> Self {
        let Self { backbone, dino_head, ibot_head, projector } = self;
        Self {
            backbone: backbone.with_precision(precision),
            dino_head: dino_head.with_precision(precision),
            ibot_head: ibot_head.map(|head| head.with_precision(precision)),
            projector: projector.map(|projector| projector.with_precision(precision)),
        }
    }

    /// The head of patch tokens.
    pub fn patch_head(&self) -> &ProjectionHead {
        self.ibot_head.as_ref().unwrap_or(&self.dino_head)
    }

    /// Features of crops stacked along the batch: the student's with draws, the teacher's without.
    ///
    /// # Shapes
    /// `crops [V, B, C, H, W]`, `mask [V·B, P]`.
    pub fn features(
        &self,
        crops: Tensor<5>,
        mask: Option<Tensor<2, Bool>>,
        group: CropGroup,
        draws: Option<&StochasticDraws>,
    ) -> Features {
        let images = flat(crops);
        match draws {
            Some(draws) => self.backbone.forward_train(images, mask, group, draws),
            None => self.backbone.forward(images, mask),
        }
    }

    /// The student's CLS tokens of local crops `[L, B, C, h, w]`, `[L·B, D]`.
    pub fn local_cls(&self, crops: Tensor<5>, draws: &StochasticDraws) -> Tensor<2> {
        self.backbone.cls_train(flat(crops), CropGroup::Local, draws)
    }
}

/// Crops stacked along the batch: `[V, B, C, H, W]` → `[V·B, C, H, W]`.
pub(crate) fn flat(crops: Tensor<5>) -> Tensor<4> {
    let [views, batch, channels, height, width] = crops.dims();
    crops.reshape([views * batch, channels, height, width])
}

/// `[B, N, D]` → `[B·N, D]`.
pub(crate) fn rows(tokens: Tensor<3>) -> Tensor<2> {
    let [batch, count, dim] = tokens.dims();
    tokens.reshape([batch * count, dim])
}

/// The rows of tokens `[B, N, D]` at `indices` into their flattened list.
pub(crate) fn gather(tokens: Tensor<3>, indices: Tensor<1, Int>) -> Tensor<2> {
    rows(tokens).select(0, indices)
}
