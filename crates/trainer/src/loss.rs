//! The losses as a recipe asks for them, and what a step found them to be.

use dinoxide_losses::{feature::Distance, gram::Negatives};
use dinoxide_model::interpolation::Filter;
use serde::{Deserialize, Serialize};

use crate::batch::Batch;
use crate::duration::Duration;

/// How the teacher's targets are kept from collapsing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Centering {
    /// Sinkhorn–Knopp over the batch (DINOv2, DINOv3).
    Sinkhorn,
    /// Softmax after subtracting a running mean (DINO, iBOT, DINOv2).
    Softmax,
}

/// Which patch tokens the running mean of patch logits is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CenterOver {
    /// Masked ones (DINOv2).
    Masked,
    /// All of them (iBOT).
    All,
}

/// The `[loss]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossConfig {
    /// Weight of the DINO loss; within it every (student crop, teacher crop) pair counts the same. 0 leaves out the CLS
    /// tokens' heads and targets, and the local crops.
    pub dino_weight: f64,
    /// Further factor of the pairs with local crops; 0 leaves out the local crops, as `augmentation.local_crops = 0` does:
    /// the pairs of global crops are then all there are, and share the whole of `dino_weight`.
    pub local_weight: f64,
    /// Leaves out the pairs of a global crop with itself.
    pub ignore_diagonal: bool,
    /// Weight of the iBOT loss; 0 leaves out masking and the patch head's work.
    pub ibot_weight: f64,
    /// Weight of KoLeo, summed over the two global crops; needs at least two images in a batch.
    pub koleo_weight: f64,
    /// Neighbours of each image in KoLeo.
    pub koleo_neighbours: usize,
    /// Images among which KoLeo looks for them, consecutive ones of the batch; 0: all of it.
    pub koleo_group: usize,
    /// Temperature of the student.
    pub student_temp: f64,
    /// Centering of the targets.
    pub centering: Centering,
    /// Rounds of Sinkhorn–Knopp.
    pub sinkhorn_iterations: usize,
    /// Share of the old mean that an update of the softmax center keeps.
    pub center_momentum: f64,
    /// What the center of patch logits is the mean of.
    pub patch_center: CenterOver,
    /// Gram anchoring.
    pub gram: GramConfig,
    /// Matching the features of a frozen teacher.
    pub features: FeatureConfig,
}

/// Which patch tokens are compared with each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GramTokens {
    /// All of them.
    #[default]
    All,
    /// Those that are masked for the student; needs `per_image = false`.
    Masked,
    /// The others; needs `per_image = false`.
    Unmasked,
}

/// A [`GramConfig::teacher`]: the run's own teacher as it is.
pub const EMA: &str = "ema";
/// A [`GramConfig::teacher`]: a copy of the run's own teacher.
pub const SNAPSHOT: &str = "snapshot";

/// The `[loss.gram]` table: the similarities between the student's patch tokens are held to those of an earlier teacher
/// (DINOv3 §4).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GramConfig {
    /// Weight of the loss; 0 leaves it out.
    pub weight: f64,
    /// Whose similarities: `ema`, the run's own teacher as it is; `snapshot`, a copy of it that is kept from `refresh_from`
    /// on; else weights of any supported format, or a run directory.
    pub teacher: String,
    /// From this step on, a snapshot is kept, or the weights from a file may be replaced.
    pub refresh_from: Duration,
    /// Period at which the copy is replaced by the run's own teacher; 0 never does.
    pub refresh_every: Duration,
    /// At most so many replacements; 0 sets no limit.
    pub max_refreshes: u64,
    /// Whether tokens are scaled to length 1 first.
    pub normalize: bool,
    /// Similarities within each image; `false` takes those between all patches of the batch.
    pub per_image: bool,
    /// What happens to negative similarities.
    pub negatives: Negatives,
    /// Which tokens are compared.
    pub tokens: GramTokens,
    /// How a teacher's tokens are brought to the student's grid: here, and in `[loss.features]`.
    pub resize: Filter,
    /// Whether that is antialiased.
    pub antialias: bool,
}

impl Default for GramConfig {
    fn default() -> Self {
        Self {
            weight: 0.0,
            teacher: EMA.into(),
            refresh_from: Duration::ZERO,
            refresh_every: Duration::ZERO,
            max_refreshes: 0,
            normalize: true,
            per_image: true,
            negatives: Negatives::Keep,
            tokens: GramTokens::All,
            resize: Filter::Bicubic,
            antialias: false,
        }
    }
}

/// The `[loss.features]` table: the student's tokens are matched with those of `distillation.teacher`, which then needs no
/// heads. Grids of another size are brought to the student's, as `loss.gram.resize` says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FeatureConfig {
    /// Weight of the CLS tokens' distance, through a linear projector; 0 leaves it out.
    pub cls_weight: f64,
    /// Weight of the patch tokens' distance, through another.
    pub patch_weight: f64,
    /// Weight of the difference of similarities, between the patches of an image and between the CLS tokens of a batch; it
    /// needs no projector.
    pub relation_weight: f64,
    /// What a distance is.
    pub distance: Distance,
}

impl FeatureConfig {
    /// Whether any of its losses is asked for.
    pub fn is_used(&self) -> bool {
        self.cls_weight > 0.0 || self.patch_weight > 0.0 || self.relation_weight > 0.0
    }

    /// Whether one of them needs a projector.
    pub fn projects(&self) -> bool {
        self.cls_weight > 0.0 || self.patch_weight > 0.0
    }
}

impl LossConfig {
    /// Whether a loss looks at local crops.
    pub(crate) fn sees_local_crops(&self) -> bool {
        self.dino_weight > 0.0 && self.local_weight > 0.0
    }

    /// The local crops of a batch, if a loss looks at them.
    pub(crate) fn local_crops(&self, batch: &Batch) -> Option<burn::tensor::Tensor<5>> {
        batch.local.clone().filter(|_| self.sees_local_crops())
    }
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            dino_weight: 1.0,
            local_weight: 1.0,
            ignore_diagonal: true,
            ibot_weight: 1.0,
            koleo_weight: 0.1,
            koleo_neighbours: 1,
            koleo_group: 0,
            student_temp: 0.1,
            centering: Centering::Sinkhorn,
            sinkhorn_iterations: 3,
            center_momentum: 0.9,
            patch_center: CenterOver::Masked,
            gram: GramConfig::default(),
            features: FeatureConfig::default(),
        }
    }
}

/// Each term before weighting, in nats; a term that the recipe leaves out is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LossValues {
    /// Global crops against the other global crop, a mean over pairs.
    pub dino_global: Option<f64>,
    /// Local crops against global crops, a mean over pairs.
    pub dino_local: Option<f64>,
    /// Masked patches.
    pub ibot: Option<f64>,
    /// A mean over the two global crops.
    pub koleo: Option<f64>,
    /// Similarities of patches, against the Gram teacher's.
    pub gram: Option<f64>,
    /// Distance of CLS tokens from the frozen teacher's.
    pub feature_cls: Option<f64>,
    /// Distance of patch tokens from the frozen teacher's.
    pub feature_patch: Option<f64>,
    /// Similarities of patches and of CLS tokens, against the frozen teacher's.
    pub relation: Option<f64>,
    /// What was minimised: the weighted sum.
    pub total: f64,
}

impl LossValues {
    /// The terms by name.
    pub fn named(&self) -> [(&'static str, Option<f64>); 8] {
        [
            ("dino_global", self.dino_global),
            ("dino_local", self.dino_local),
            ("ibot", self.ibot),
            ("koleo", self.koleo),
            ("gram", self.gram),
            ("feature_cls", self.feature_cls),
            ("feature_patch", self.feature_patch),
            ("relation", self.relation),
        ]
    }
}
