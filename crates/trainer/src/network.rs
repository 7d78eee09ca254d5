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

    /// The CLS tokens of crops `[V, B, C, H, W]` under a mask `[V·B, P]`, `[V·B, D]`: the student's with draws, the teacher's
    /// without.
    pub fn cls(
        &self,
        crops: Tensor<5>,
        mask: Option<Tensor<2, Bool>>,
        group: CropGroup,
        draws: Option<&StochasticDraws>,
    ) -> Tensor<2> {
        self.backbone.forward_selected(flat(crops), mask, group, draws, &[]).cls
    }
}

/// The tokens of the global crops that somebody looks at.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// `[2B, D]`.
    pub(crate) cls: Tensor<2>,
    /// Those of the masked patches, `[M, D]`; what iBOT compares.
    pub(crate) masked: Tensor<2>,
    /// `[2B, P, D]`, where a loss looks at all patches.
    pub(crate) patches: Option<Tensor<3>>,
}

impl Seen {
    /// What `backbone` says of global crops `[2, B, C, H, W]`: the student with draws, the teacher without. Of the patches
    /// those at `masked`, places in the list of all, and where they are `wanted`, all.
    pub(crate) fn new(
        backbone: &Backbone,
        crops: Tensor<5>,
        mask: Option<Tensor<2, Bool>>,
        draws: Option<&StochasticDraws>,
        masked: &[usize],
        wanted: bool,
    ) -> Self {
        let images = flat(crops);
        if !wanted {
            let found = backbone.forward_selected(images, mask, CropGroup::Global, draws, masked);
            return Self { cls: found.cls, masked: found.patches, patches: None };
        }
        let Features { cls, patches, .. } = match draws {
            Some(draws) => backbone.forward_train(images, mask, CropGroup::Global, draws),
            None => backbone.forward(images, mask),
        };
        Self::of_all(cls, patches, masked)
    }

    /// Of tokens that are all there, `[2B, D]` and `[2B, P, D]`.
    pub(crate) fn of_all(cls: Tensor<2>, patches: Tensor<3>, masked: &[usize]) -> Self {
        Self { cls, masked: gather(patches.clone(), masked), patches: Some(patches) }
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

/// The rows of tokens `[B, N, D]` at `places` in their flattened list.
pub(crate) fn gather(tokens: Tensor<3>, places: &[usize]) -> Tensor<2> {
    let places: Vec<i32> = places.iter().map(|&place| place as i32).collect();
    let indices = Tensor::<1, Int>::from_data(places.as_slice(), &tokens.device());
    rows(tokens).select(0, indices)
}
