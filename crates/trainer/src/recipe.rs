//! The recipe: everything that a run is made from.
//!
//! Tables say what they may change. `[run]` never changes results; `[efficiency]` changes speed and memory, and results
//! only by rounding and, where stochastic depth or RoPE augmentation is on, by what they draw per micro-batch; all others
//! change what is computed. Each part's table lives with the part.

use dinoxide_augmentation::{AugmentationConfig, MaskConfig, MaskStyle};
use dinoxide_data::DataConfig;
use dinoxide_model::{Architecture, HeadConfig, ModelConfig, Precision};
use serde::{Deserialize, Serialize};

use crate::duration::Duration;
use crate::error::TrainError;
use crate::loss::{EMA, GramTokens, LossConfig, SNAPSHOT};
use crate::optimizer::OptimConfig;
use crate::pretrained::{DistillationConfig, InitConfig, Take};
use crate::schedule::{Form, Schedule, ScheduleConfig};
use crate::stages::Stage;

/// The `[run]` table: what is shown and kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Where tensors live: `cpu`, `cuda:0`, `vulkan:0`, `wgpu:0`, `metal`.
    pub device: String,
    /// A line in `metrics.jsonl` every so often, and for the first and the last step.
    pub log_every: Duration,
    /// A checkpoint every so often, and at the end.
    pub checkpoint_every: Duration,
    /// Checkpoints kept, newest first.
    pub keep_checkpoints: usize,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            device: "cpu".into(),
            log_every: Duration::Steps(10),
            checkpoint_every: Duration::Epochs(1.0),
            keep_checkpoints: 3,
        }
    }
}

/// The `[train]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// How long: `"100 epochs"`, `"5000 steps"` or `"2M images"`; the other two are derived and printed. `"0 steps"` writes
    /// the backbone as it is before training.
    pub length: Duration,
    /// Images per step, over all micro-batches.
    pub batch_size: usize,
    /// Seed of every random draw.
    pub seed: u64,
    /// In what matrix products are computed, in student and teachers: `"fp32"`, or `"bf16"`, which rounds their operands
    /// and results to bfloat16; weights, sums, losses and the optimizer stay in single precision. Slow or out of memory on
    /// a GPU, or a CPU with matrix units (AMX: Intel's Xeon from 2023 on): `"bf16"`. On other CPUs it is no
    /// faster, takes less memory, and shows what it does to a run. It is no part of `[efficiency]` because it changes results by more than the
    /// order of sums.
    pub precision: Precision,
    /// A head of their own for patch tokens (DINOv3, long recipes of DINOv2), configured by `[ibot_head]`.
    pub separate_ibot_head: bool,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            length: Duration::Epochs(100.0),
            batch_size: 64,
            seed: 0,
            precision: Precision::Fp32,
            separate_ibot_head: true,
        }
    }
}

/// The `[efficiency]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EfficiencyConfig {
    /// Threads that read and augment images. A high share of waiting in the progress line: more.
    pub loader_threads: usize,
    /// Batches read ahead.
    pub prefetch: usize,
    /// Forward and backward in this many parts: less memory, same losses. Stochastic depth picks its samples per part.
    pub micro_batches: usize,
    /// Whether the backward pass computes the inside of a transformer block again instead of keeping it: about a quarter
    /// more work, a fraction of the memory, the same values. For transformers with layer norm.
    pub recompute: bool,
}

impl Default for EfficiencyConfig {
    fn default() -> Self {
        Self { loader_threads: 2, prefetch: 3, micro_batches: 1, recompute: false }
    }
}

/// The `[eval]` table: k-NN on labelled images before, during and after training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// How often, besides before the first step and after the last.
    pub every: Duration,
    /// Images whose classes are known to the classifier; empty: those trained on, if they have classes.
    pub train: String,
    /// Images to classify; empty: every tenth of each class of `train`, which the classifier then does not know.
    pub val: String,
    /// So many images of `train`, evenly spread, and one of each class that they miss; 0: all.
    pub max_train: usize,
    /// Neighbours.
    pub k: usize,
    /// Temperature of their weights.
    pub temperature: f64,
    /// Size of the images in pixels; 0: that of the global crops.
    pub image_size: usize,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self {
            every: Duration::Epochs(10.0),
            train: String::new(),
            val: String::new(),
            max_train: 0,
            k: 20,
            temperature: 0.07,
            image_size: 0,
        }
    }
}

/// A recipe.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// What is shown and kept; never changes results.
    pub run: RunConfig,
    /// Length, batch and seed.
    pub train: TrainConfig,
    /// The images.
    pub data: DataConfig,
    /// The crops.
    pub augmentation: AugmentationConfig,
    /// The masks.
    pub mask: MaskConfig,
    /// The backbone.
    pub model: ModelConfig,
    /// The head of CLS tokens.
    pub dino_head: HeadConfig,
    /// The head of patch tokens, when separate.
    pub ibot_head: HeadConfig,
    /// What the run starts from.
    pub init: InitConfig,
    /// What it learns from, if not from its own running mean.
    pub distillation: DistillationConfig,
    /// The losses.
    pub loss: LossConfig,
    /// The optimizer.
    pub optim: OptimConfig,
    /// Learning rate, weight decay, momentum, temperature.
    pub schedule: ScheduleConfig,
    /// k-NN during training.
    pub eval: EvalConfig,
    /// Speed and memory.
    pub efficiency: EfficiencyConfig,
    /// Runs in a row, each with some of these values changed; none: one run of the recipe as it is.
    pub stages: Vec<Stage>,
    /// Students of one frozen teacher, trained on the same batches, each with some of these values changed; none: one.
    pub students: Vec<Stage>,
}

/// A recipe's lengths in steps, and the backbone in numbers.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The backbone.
    pub backbone: Architecture,
    /// Every schedule.
    pub schedule: Schedule,
    /// Images in the data.
    pub samples: usize,
    /// Steps of the run.
    pub steps: u64,
    /// Steps between lines of metrics.
    pub log_every: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Steps between evaluations; 0: only before and after.
    pub eval_every: u64,
}

impl Recipe {
    /// Local crops that a loss looks at.
    pub fn local_crops(&self) -> usize {
        if self.loss.sees_local_crops() { self.augmentation.local_crops } else { 0 }
    }

    /// Checks what the types do not, and works out every length for `samples` images.
    ///
    /// # Errors
    /// The first thing that does not fit, with the values.
    pub fn plan(&self, samples: usize) -> Result<Plan, TrainError> {
        let invalid = |message: String| TrainError::Recipe(message);
        self.augmentation.validate().map_err(|e| invalid(e.to_string()))?;
        self.mask.validate().map_err(|e| invalid(e.to_string()))?;
        let backbone = self.model.resolve(self.augmentation.global_crop_size).map_err(|e| invalid(e.to_string()))?;
        self.check_crops(&backbone)?;
        let batch = self.train.batch_size;
        self.check_sizes(&backbone)?;
        if let Architecture::ConvNext(_) = backbone {
            self.check_convnext()?;
        }
        self.check_recompute(&backbone)?;
        self.check_losses()?;
        self.check_gram()?;
        self.check_distillation()?;
        let steps = self.train.length.steps(batch, samples);
        // No step at all, asked for in these words, is the backbone as it is before training.
        if steps == 0 && self.train.length != Duration::ZERO {
            return Err(invalid(format!(
                "`train.length` \"{}\" is not a single step of {batch} images",
                self.train.length
            )));
        }
        if self.init.from.is_empty() && self.init.take == Take::State {
            return Err(invalid(
                "`init.take` is \"state\" and `init.from` empty: there is no run to go on from".into(),
            ));
        }
        let schedule = Schedule::new(&self.schedule, &self.loss.gram, steps, batch, samples).map_err(invalid)?;
        let refresh = &schedule.gram_refresh;
        if refresh.snapshot && refresh.from >= steps && steps > 0 {
            return Err(invalid(format!(
                "`loss.gram.refresh_from` is \"{}\", which is step {}, and the run has {steps}: no step would have a Gram \
                 teacher\n\nhint: lower it, or set `loss.gram.weight = 0`",
                self.loss.gram.refresh_from, refresh.from
            )));
        }
        let every = |key: &str, duration: Duration| match duration.steps(batch, samples) {
            0 => Err(invalid(format!("`{key}` \"{duration}\" is not a single step of {batch} images"))),
            steps => Ok(steps),
        };
        Ok(Plan {
            backbone,
            schedule,
            samples,
            steps,
            log_every: every("run.log_every", self.run.log_every)?,
            checkpoint_every: every("run.checkpoint_every", self.run.checkpoint_every)?,
            eval_every: self.eval.every.steps(batch, samples),
        })
    }

    fn check_crops(&self, backbone: &Architecture) -> Result<(), TrainError> {
        let prefix = if self.augmentation.sizes.is_empty() { "augmentation." } else { "augmentation.sizes: " };
        for choice in self.augmentation.choices() {
            let mut sizes = vec![("global_crop_size", choice.global_crop_size)];
            if choice.local_crops > 0 {
                sizes.push(("local_crop_size", choice.local_crop_size));
            }
            // A Gram teacher from a file has a patch size of its own, which is known when it is read.
            if choice.gram_crop_size > 0 && self.loss.gram.teacher == SNAPSHOT {
                sizes.push(("gram_crop_size", choice.gram_crop_size));
            }
            for (key, size) in sizes {
                backbone.grid(size, size).map_err(|e| TrainError::Recipe(format!("`{prefix}{key}`: {e}")))?;
            }
        }
        let gram = &self.loss.gram;
        let wanted = self.augmentation.choices().iter().any(|choice| choice.gram_crop_size > 0);
        if wanted && (gram.weight == 0.0 || gram.teacher == EMA) {
            return Err(TrainError::Recipe(format!(
                "`augmentation.gram_crop_size` is set, `loss.gram.weight` is {} and `loss.gram.teacher` \"{}\": only a \
                 Gram teacher of its own sees crops of its own\n\nhint: set `augmentation.gram_crop_size = 0`, or \
                 `loss.gram.teacher` to \"snapshot\" or a file",
                gram.weight, gram.teacher
            )));
        }
        Ok(())
    }

    fn check_recompute(&self, backbone: &Architecture) -> Result<(), TrainError> {
        if !self.efficiency.recompute || backbone.can_recompute() {
            return Ok(());
        }
        Err(TrainError::Recipe(
            "`efficiency.recompute` is true: only blocks of a vision transformer with layer norm compute their inside again, not \
             those of a ConvNeXt or with RMS norm\n\nhint: set `efficiency.recompute = false`, and raise \
             `efficiency.micro_batches` for less memory"
                .into(),
        ))
    }

    fn check_gram(&self) -> Result<(), TrainError> {
        let invalid = |message: String| Err(TrainError::Recipe(message));
        let gram = &self.loss.gram;
        if gram.weight == 0.0 {
            return Ok(());
        }
        if gram.per_image && gram.tokens != GramTokens::All {
            return invalid(
                "`loss.gram.tokens` selects some of the patches and `loss.gram.per_image` is true: images have different \
                 numbers of masked patches\n\nhint: set `loss.gram.per_image = false`, or `loss.gram.tokens = \"all\"`"
                    .into(),
            );
        }
        if gram.tokens != GramTokens::All && self.loss.ibot_weight == 0.0 {
            return invalid(
                "`loss.gram.tokens` asks for masked or unmasked patches and `loss.ibot_weight` is 0: nothing is \
                 masked\n\nhint: set `loss.gram.tokens = \"all\"`"
                    .into(),
            );
        }
        if !gram.per_image && self.efficiency.micro_batches > 1 {
            return invalid(format!(
                "`loss.gram.per_image` is false and `efficiency.micro_batches` {}: the similarities between all patches of \
                 a batch need it whole\n\nhint: set `loss.gram.per_image = true`, or `efficiency.micro_batches = 1`",
                self.efficiency.micro_batches
            ));
        }
        let replaced = gram.refresh_every != Duration::ZERO || gram.refresh_from != Duration::ZERO;
        if gram.teacher == EMA && (replaced || gram.max_refreshes > 0) {
            return invalid(
                "`loss.gram.teacher` is \"ema\", which changes with every step, and `loss.gram.refresh_from`, \
                 `refresh_every` or `max_refreshes` is set\n\nhint: set `loss.gram.teacher = \"snapshot\"`, or leave \
                 those out"
                    .into(),
            );
        }
        let from_file = gram.teacher != EMA && gram.teacher != SNAPSHOT;
        if from_file && gram.refresh_from != Duration::ZERO && gram.refresh_every == Duration::ZERO {
            return invalid(format!(
                "`loss.gram.refresh_from` is \"{}\" and `loss.gram.refresh_every` 0: the weights of {} are never \
                 replaced\n\nhint: set `loss.gram.refresh_every`, or `loss.gram.refresh_from = \"0 steps\"`",
                gram.refresh_from, gram.teacher
            ));
        }
        if gram.max_refreshes > 0 && gram.refresh_every == Duration::ZERO {
            return invalid(format!(
                "`loss.gram.max_refreshes` is {} and `loss.gram.refresh_every` 0: the copy is never replaced\n\nhint: set \
                 `loss.gram.refresh_every`, or `loss.gram.max_refreshes = 0`",
                gram.max_refreshes
            ));
        }
        Ok(())
    }

    fn check_distillation(&self) -> Result<(), TrainError> {
        let invalid = |message: &str| Err(TrainError::Recipe(message.to_owned()));
        let features = &self.loss.features;
        if !self.is_distilled() && !self.distillation.cache.is_empty() {
            return invalid(
                "`distillation.cache` is set and `distillation.teacher` empty: the teacher's heads, and the check that the cache \
                 is of it, need both",
            );
        }
        if !self.is_distilled() {
            return match features.is_used() {
                true => invalid(
                    "`[loss.features]` has weights and `distillation.teacher` is empty: there are no features to \
                     match\n\nhint: set `distillation.teacher`",
                ),
                false => Ok(()),
            };
        }
        if self.loss.gram.weight > 0.0 && self.loss.gram.teacher == EMA {
            return invalid(
                "`loss.gram.teacher` is \"ema\" and `distillation.teacher` is set: the targets' teacher and the running mean \
                 are two networks, and DINOv3 leaves open which of them is meant\n\nhint: set `loss.gram.teacher` to \
                 \"snapshot\" (the student's own past) or to the teacher's file",
            );
        }
        if features.relation_weight > 0.0 && self.efficiency.micro_batches > 1 {
            return invalid(
                "`loss.features.relation_weight` compares all images of a batch, which `efficiency.micro_batches` \
                 divides\n\nhint: set `efficiency.micro_batches = 1`",
            );
        }
        Ok(())
    }

    /// Whether a frozen teacher gives the targets.
    pub fn is_distilled(&self) -> bool {
        !self.distillation.teacher.is_empty()
    }

    fn check_sizes(&self, backbone: &Architecture) -> Result<(), TrainError> {
        let invalid = |message: String| Err(TrainError::Recipe(message));
        if self.model.in_channels != 3 {
            return invalid(format!(
                "`model.in_channels` is {}: images are read as RGB, which is 3",
                self.model.in_channels
            ));
        }
        let positive = [
            ("train.batch_size", self.train.batch_size),
            ("efficiency.prefetch", self.efficiency.prefetch),
            ("efficiency.micro_batches", self.efficiency.micro_batches),
            ("run.keep_checkpoints", self.run.keep_checkpoints),
            ("dino_head.prototypes", self.dino_head.prototypes),
            ("dino_head.layers", self.dino_head.layers),
            ("dino_head.hidden_dim", self.dino_head.hidden_dim),
            ("dino_head.bottleneck_dim", self.dino_head.bottleneck_dim),
            ("ibot_head.prototypes", self.ibot_head.prototypes),
            ("ibot_head.layers", self.ibot_head.layers),
            ("ibot_head.hidden_dim", self.ibot_head.hidden_dim),
            ("ibot_head.bottleneck_dim", self.ibot_head.bottleneck_dim),
            ("loss.sinkhorn_iterations", self.loss.sinkhorn_iterations),
            ("eval.k", self.eval.k),
        ];
        if let Some((key, _)) = positive.into_iter().find(|(_, value)| *value == 0) {
            return invalid(format!("`{key}` is 0, must be at least 1"));
        }
        const LARGEST: usize = 1 << 24;
        if let Some((key, value)) = positive.into_iter().find(|(_, value)| *value > LARGEST) {
            return invalid(format!("`{key}` is {value}, more than any machine can hold"));
        }
        if self.augmentation.local_crops > 1 << 10 {
            return invalid(format!(
                "`augmentation.local_crops` is {}, at most 1024 are possible",
                self.augmentation.local_crops
            ));
        }
        for (table, head) in [("dino_head", &self.dino_head), ("ibot_head", &self.ibot_head)] {
            let used = table == "dino_head" && !self.train.separate_ibot_head;
            if let Some(count) = head.patch_prototypes
                && (!used || count == 0 || count > LARGEST)
            {
                return invalid(format!(
                    "`{table}.patch_prototypes` is {count}: it needs a number from 1 on, in `[dino_head]`, and \
                     `train.separate_ibot_head = false`"
                ));
            }
        }
        if self.efficiency.micro_batches > self.train.batch_size {
            let (parts, batch) = (self.efficiency.micro_batches, self.train.batch_size);
            return invalid(format!("`efficiency.micro_batches` is {parts}, more than `train.batch_size` {batch}"));
        }
        let image_size = self.eval_size();
        backbone.grid(image_size, image_size).map_err(|e| TrainError::Recipe(format!("`eval.image_size`: {e}")))?;
        Ok(())
    }

    fn check_losses(&self) -> Result<(), TrainError> {
        let invalid = |message: String| Err(TrainError::Recipe(message));
        let (loss, batch) = (&self.loss, self.train.batch_size);
        if loss.koleo_weight > 0.0 && batch < 2 {
            return invalid(format!(
                "`loss.koleo_weight` is {} and `train.batch_size` is {batch}: KoLeo needs the nearest neighbour of each image \
                 in its batch\n\nhint: set `train.batch_size` to at least 2, or `loss.koleo_weight = 0`",
                loss.koleo_weight
            ));
        }
        let group = if loss.koleo_group == 0 { batch } else { loss.koleo_group };
        let fits = batch.is_multiple_of(group) && (1..group).contains(&loss.koleo_neighbours);
        if loss.koleo_weight > 0.0 && !fits {
            return invalid(format!(
                "`loss.koleo_neighbours` is {}, `loss.koleo_group` {} and `train.batch_size` {batch}: groups divide the batch, \
                 and have more images than each has neighbours\n\nhint: set `loss.koleo_group = 0` and \
                 `loss.koleo_neighbours = 1`",
                loss.koleo_neighbours, loss.koleo_group
            ));
        }
        let masked = match self.mask.style {
            MaskStyle::PerImage => self.mask.probability,
            MaskStyle::Exact | MaskStyle::AtMost => (2.0 * batch as f64 * self.mask.probability).floor(),
        };
        if loss.ibot_weight > 0.0 && (masked == 0.0 || self.mask.ratio[1] == 0.0) {
            return invalid(format!(
                "`loss.ibot_weight` is {} and `mask.probability` {} with `mask.ratio` up to {} masks nothing in a batch of \
                 {batch}\n\nhint: raise them, or set `loss.ibot_weight = 0`",
                loss.ibot_weight, self.mask.probability, self.mask.ratio[1]
            ));
        }
        // Under a frozen teacher, nothing is masked for the student.
        if loss.ibot_weight > 0.0 && !self.model.mask_token && !self.is_distilled() {
            return invalid(format!(
                "`loss.ibot_weight` is {} and `model.mask_token` is false: masked patches need a mask token",
                loss.ibot_weight
            ));
        }
        let least = [
            ("loss.dino_weight", loss.dino_weight),
            ("loss.local_weight", loss.local_weight),
            ("loss.ibot_weight", loss.ibot_weight),
            ("loss.koleo_weight", loss.koleo_weight),
            ("loss.gram.weight", loss.gram.weight),
            ("loss.features.cls_weight", loss.features.cls_weight),
            ("loss.features.patch_weight", loss.features.patch_weight),
            ("loss.features.relation_weight", loss.features.relation_weight),
            ("optim.clip_norm", self.optim.clip_norm),
            ("optim.layerwise_decay", self.optim.layerwise_decay),
            ("optim.patch_embed_lr_mult", self.optim.patch_embed_lr_mult),
            ("schedule.trunc_extra", self.schedule.trunc_extra),
            ("schedule.lr.start", self.schedule.lr.start),
            ("schedule.lr.peak", self.schedule.lr.peak),
            ("schedule.lr.end", self.schedule.lr.end),
            ("schedule.weight_decay.start", self.schedule.weight_decay.start),
            ("schedule.weight_decay.peak", self.schedule.weight_decay.peak),
            ("schedule.weight_decay.end", self.schedule.weight_decay.end),
        ];
        if let Some((key, value)) = least.into_iter().find(|(_, value)| !(value.is_finite() && *value >= 0.0)) {
            return invalid(format!("`{key}` is {value}, must be a number from 0 on"));
        }
        for (name, curve) in self.schedule.loss.named() {
            let values = [("start", curve.start), ("peak", curve.peak), ("end", curve.end)];
            if let Some((part, value)) = values.into_iter().find(|(_, value)| !(value.is_finite() && *value >= 0.0)) {
                return invalid(format!("`schedule.loss.{name}.{part}` is {value}, must be a number from 0 on"));
            }
        }
        if loss.dino_weight == 0.0 && loss.ibot_weight == 0.0 && !loss.features.is_used() {
            return invalid("`loss.dino_weight` and `loss.ibot_weight` are both 0, and so are the weights in `[loss.features]`: nothing would be learned".into());
        }
        if self.schedule.teacher_patch_temp.is_some() && loss.ibot_weight == 0.0 {
            return invalid(
                "`schedule.teacher_patch_temp` is set and `loss.ibot_weight` is 0: there are no targets for patches\n\nhint: \
                 leave it out"
                    .into(),
            );
        }
        let temps = &self.schedule.teacher_temp;
        let patch_temps = self.schedule.teacher_patch_temp.as_ref().unwrap_or(temps);
        let temps = [
            ("schedule.teacher_temp.start", temps.start),
            ("schedule.teacher_temp.peak", temps.peak),
            ("schedule.teacher_temp.end", temps.end),
            ("schedule.teacher_patch_temp.start", patch_temps.start),
            ("schedule.teacher_patch_temp.peak", patch_temps.peak),
            ("schedule.teacher_patch_temp.end", patch_temps.end),
        ];
        let temps = temps.into_iter().chain([
            ("loss.student_temp", loss.student_temp),
            ("eval.temperature", self.eval.temperature),
            ("optim.eps", self.optim.eps),
        ]);
        if let Some((key, value)) = temps.into_iter().find(|(_, value)| !(value.is_finite() && *value > 0.0)) {
            return invalid(format!("`{key}` is {value}, must be above 0"));
        }
        let below_one = [("optim.beta1", self.optim.beta1), ("optim.beta2", self.optim.beta2)];
        if let Some((key, value)) = below_one.into_iter().find(|(_, value)| !(0.0..1.0).contains(value)) {
            return invalid(format!("`{key}` is {value}, must be at least 0 and below 1"));
        }
        if self.schedule.trunc_extra > 0.0 && self.schedule.form == Form::Blocks {
            return invalid("`schedule.trunc_extra` needs `schedule.form = \"cosine\"`".into());
        }
        let shares = [
            ("loss.center_momentum", loss.center_momentum),
            ("schedule.teacher_momentum.start", self.schedule.teacher_momentum.start),
            ("schedule.teacher_momentum.peak", self.schedule.teacher_momentum.peak),
            ("schedule.teacher_momentum.end", self.schedule.teacher_momentum.end),
        ];
        if let Some((key, value)) = shares.into_iter().find(|(_, value)| !(0.0..=1.0).contains(value)) {
            return invalid(format!("`{key}` is {value}, must lie between 0 and 1"));
        }
        Ok(())
    }

    /// What a ConvNeXt cannot do is an error, not left out.
    fn check_convnext(&self) -> Result<(), TrainError> {
        let masked = if self.is_distilled() { 0.0 } else { self.loss.ibot_weight };
        let values = [
            ("loss.ibot_weight", masked, 0.0, "has no mask token, so it would see the patches it is asked for"),
            ("optim.layerwise_decay", self.optim.layerwise_decay, 1.0, "has the same learning rate in every block"),
            ("optim.patch_embed_lr_mult", self.optim.patch_embed_lr_mult, 1.0, "has no patch embedding"),
        ];
        match values.into_iter().find(|(_, value, needed, _)| value != needed) {
            None => Ok(()),
            Some((key, value, needed, why)) => Err(TrainError::Recipe(format!(
                "`{key}` is {value} and `model.arch` a ConvNeXt, which {why}\n\nhint: set `{key} = {needed:?}`"
            ))),
        }
    }

    /// Size of the images in evaluations, in pixels.
    pub fn eval_size(&self) -> usize {
        if self.eval.image_size > 0 { self.eval.image_size } else { self.augmentation.global_crop_size }
    }

    /// The head of patch tokens, when there is work for it and it is separate.
    pub fn patch_head(&self) -> Option<&HeadConfig> {
        (self.train.separate_ibot_head && self.loss.ibot_weight > 0.0).then_some(&self.ibot_head)
    }
}
