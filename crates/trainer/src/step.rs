//! One optimisation step. Start reading at [`train_step`].

use std::collections::BTreeMap;
use std::time::Instant;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Device, Int, Tensor, s};
use dinoxide_losses::{Loss, center::Center, dino, ibot, koleo, sinkhorn::sinkhorn_knopp};
use dinoxide_model::{Architecture, CropGroup, HeadConfig, StochasticDraws, parameters, weights::host};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::batch::{Batch, DeviceMasks};
use crate::network::Network;
use crate::optimizer::{AdamW, Gradients, OptimConfig, ema};
use crate::schedule::Scheduled;

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
    /// Further factor of the pairs with local crops; 0 leaves out the local crops.
    pub local_weight: f64,
    /// Leaves out the pairs of a global crop with itself.
    pub ignore_diagonal: bool,
    /// Weight of the iBOT loss; 0 leaves out masking and the patch head's work.
    pub ibot_weight: f64,
    /// Weight of KoLeo, summed over the two global crops; needs at least two images in a batch.
    pub koleo_weight: f64,
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
}

impl LossConfig {
    /// The local crops of a batch, if a loss looks at them.
    fn local_crops(&self, batch: &Batch) -> Option<Tensor<5>> {
        batch.local.clone().filter(|_| self.dino_weight > 0.0 && self.local_weight > 0.0)
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
            student_temp: 0.1,
            centering: Centering::Sinkhorn,
            sinkhorn_iterations: 3,
            center_momentum: 0.9,
            patch_center: CenterOver::Masked,
        }
    }
}

/// Everything that a step changes.
#[derive(Clone, Debug)]
pub struct TrainState {
    /// The network in training, tracked by autodiff.
    pub student: Network,
    /// Its running mean, plain.
    pub teacher: Network,
    /// The optimizer's moments.
    pub optimizer: AdamW,
    /// Running mean of the teacher's CLS logits; used with softmax centering.
    pub cls_center: Center,
    /// Running mean of its patch logits.
    pub patch_center: Center,
    /// Steps taken.
    pub step: u64,
    /// Where the time of the last step went.
    pub timings: Timings,
}

/// Seconds that the parts of a step took. On a device that computes later than it is told to, they are the time it took to
/// tell it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// The teacher's forward, heads included.
    pub teacher: f64,
    /// Centering: from logits to targets.
    pub targets: f64,
    /// The student's forward with heads and losses.
    pub student: f64,
    /// Backward.
    pub backward: f64,
    /// Gradient norms, clipping, AdamW, the teacher's running mean, centers.
    pub update: f64,
}

/// Reads off the time since the last reading.
struct Stopwatch(Instant);

impl Stopwatch {
    fn lap(&mut self) -> f64 {
        std::mem::replace(&mut self.0, Instant::now()).elapsed().as_secs_f64()
    }
}

impl TrainState {
    /// A fresh student and, as its teacher, a copy.
    ///
    /// `device` is a plain device; the student lives on its autodiff twin.
    pub fn new(
        backbone: &Architecture,
        dino_head: &HeadConfig,
        ibot_head: Option<&HeadConfig>,
        optim: &OptimConfig,
        loss: &LossConfig,
        device: &Device,
        rng: &mut impl Rng,
    ) -> Self {
        let student = Network::new(backbone, dino_head, ibot_head, &device.clone().autodiff(), rng);
        let teacher = student.valid();
        let optimizer = AdamW::new(optim, &teacher, device);
        let patch_head = ibot_head.unwrap_or(dino_head);
        let patch_prototypes = patch_head.patch_prototypes.unwrap_or(patch_head.prototypes);
        Self {
            student,
            teacher,
            optimizer,
            cls_center: Center::new(dino_head.prototypes, loss.center_momentum, device),
            patch_center: Center::new(patch_prototypes, loss.center_momentum, device),
            step: 0,
            timings: Timings::default(),
        }
    }
}

/// The draws of a step's forwards: for each micro-batch, those of the global and of the local crops.
pub type StepDraws = Vec<[StochasticDraws; 2]>;

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
    /// What was minimised: the weighted sum.
    pub total: f64,
}

/// What the teacher's targets look like; each has `ln K` as its ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetEntropy {
    /// Mean entropy of a target, in nats: 0 when each names a single prototype, ln K when none says anything.
    pub conditional: f64,
    /// Entropy of the mean target, in nats: 0 when all name the same prototype, ln K when all prototypes are used.
    pub marginal: f64,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// The losses.
    pub losses: LossValues,
    /// Gradient norms before clipping, by submodule.
    pub gradient_norms: BTreeMap<&'static str, f64>,
    /// The teacher's CLS targets; `None` when the recipe has no DINO loss.
    pub target_entropy: Option<TargetEntropy>,
    /// The schedule's values.
    pub at: Scheduled,
}

/// Why a step could not be taken. No weight has changed then.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StepError {
    /// A loss or a gradient norm that is no number.
    #[error(
        "step {step}: {what} is {value}; no weight was changed\nsamples: {}\n\nhint: look at these images; if they are \
         sound, lower `schedule.lr.peak` or `optim.clip_norm`",
        ids.join(", ")
    )]
    NotFinite {
        /// The step.
        step: u64,
        /// Which quantity: "loss `ibot`", "the gradient norm of `backbone`".
        what: String,
        /// Its value.
        value: f64,
        /// The samples whose features are not finite, or all of the batch when none stands out.
        ids: Vec<String>,
    },
}

/// Targets of one micro-batch. Plain.
struct Targets {
    /// `[2, B, K]`, with a DINO loss.
    cls: Option<Tensor<3>>,
    /// `[M, K']`, with an iBOT loss.
    patches: Option<Tensor<2>>,
}

/// One optimisation step on a batch, in as many micro-batches as there are `draws`. On an error nothing has changed.
///
/// Targets, centers and KoLeo's neighbours are those of the whole batch, however it is divided.
///
/// # Errors
/// [`StepError::NotFinite`].
pub fn train_step(
    state: &mut TrainState,
    batch: &Batch,
    draws: &StepDraws,
    config: &LossConfig,
    at: Scheduled,
) -> Result<StepReport, StepError> {
    let (mut clock, mut timings) = (Stopwatch(Instant::now()), Timings::default());
    let parts = divide(batch, draws.len());

    // The teacher sees global crops, unmasked; no gradient reaches it.
    let logits: Vec<TeacherLogits> = parts.iter().map(|part| teacher_logits(&state.teacher, part, config)).collect();
    timings.teacher = clock.lap();
    let (targets, target_entropy) = center(state, &logits, config, &at);
    timings.targets = clock.lap();

    // KoLeo's gradient needs the CLS tokens of the whole batch; with several micro-batches they take a forward of their own.
    let spread =
        (parts.len() > 1 && config.koleo_weight > 0.0).then(|| koleo_of_parts(&state.student, &parts, draws, config));

    let mut losses = LossValues::default();
    let mut gradients = Gradients::new();
    for (i, part) in parts.iter().enumerate() {
        let share = part.len() as f64 / batch.len() as f64;
        let terms = student_losses(
            &state.student,
            part,
            &targets[i],
            &draws[i],
            config,
            batch.len(),
            spread.as_ref().map(|s| &s.gradients[i]),
        );
        losses.add(&terms, share);
        timings.student += clock.lap();
        accumulate(&mut gradients, &state.student, weighted_sum(terms, share, config));
        timings.backward += clock.lap();
    }
    if let Some(spread) = &spread {
        losses.koleo = Some(spread.value);
    }
    losses.total = total(&losses, config, batch);

    let norms = state.optimizer.norms(&gradients);
    require_finite(state, batch, config, &losses, &norms, &at)?;

    // Each network is handed over while the other holds its place, so that it can be changed in its own memory.
    let student = std::mem::replace(&mut state.student, state.teacher.clone());
    state.student = state.optimizer.step(student, gradients, &norms, &at);
    let teacher = std::mem::replace(&mut state.teacher, state.student.clone());
    state.teacher = ema(teacher, &state.student, at.teacher_momentum);
    update_centers(state, &logits, &parts, config);
    timings.update = clock.lap();
    state.timings = timings;
    state.step = at.step + 1;
    Ok(StepReport { losses, gradient_norms: norms, target_entropy, at })
}

/// The batch in consecutive parts of nearly equal size.
fn divide(batch: &Batch, parts: usize) -> Vec<Batch> {
    if parts == 1 {
        return vec![batch.clone()];
    }
    let len = batch.len();
    (0..parts).map(|i| batch.part(i * len / parts..(i + 1) * len / parts)).collect()
}

/// The teacher's logits on one micro-batch. Plain.
struct TeacherLogits {
    /// `[2B, K]`, with a DINO loss.
    cls: Option<Tensor<2>>,
    /// `[M, K']`, masked patches, with an iBOT loss.
    patches: Option<Tensor<2>>,
    /// `[1, K']`, the mean over all patches of the micro-batch, where a center asks for it.
    all_patches_mean: Option<Tensor<2>>,
}

fn teacher_logits(teacher: &Network, part: &Batch, config: &LossConfig) -> TeacherLogits {
    let features = teacher.features(part.global.clone(), None, CropGroup::Global, None);
    let cls = (config.dino_weight > 0.0).then(|| teacher.dino_head.forward(features.cls));
    if config.ibot_weight == 0.0 {
        return TeacherLogits { cls, patches: None, all_patches_mean: None };
    }
    let masks = DeviceMasks::new(&part.masks, &part.global.device());
    let head = teacher.patch_head();
    let all_patches_mean =
        (config.patch_center == CenterOver::All && config.centering == Centering::Softmax).then(|| {
            // Logits are linear in the bottleneck: the mean of the logits is the logits of the mean.
            let bottleneck = head.bottleneck(rows(features.patches.clone()));
            bottleneck.mean_dim(0).matmul(head.patch_prototypes().vectors().transpose())
        });
    let patches = head.forward_patches(gather(features.patches, masks.indices));
    TeacherLogits { cls, patches: Some(patches), all_patches_mean }
}

/// Targets of each micro-batch from the logits of all, with the entropies of the CLS targets.
fn center(
    state: &TrainState,
    logits: &[TeacherLogits],
    config: &LossConfig,
    at: &Scheduled,
) -> (Vec<Targets>, Option<TargetEntropy>) {
    // The targets of all micro-batches as one tensor; `None` when the recipe leaves out the loss that they are for.
    let targets = |logits: Vec<Option<Tensor<2>>>, center: &Center, temperature: f64| {
        let all = logits.into_iter().collect::<Option<Vec<_>>>()?;
        let all = Tensor::cat(all, 0);
        Some(match config.centering {
            Centering::Sinkhorn => sinkhorn_knopp(all, temperature, config.sinkhorn_iterations),
            Centering::Softmax => center.targets(all, temperature),
        })
    };
    let cls = targets(logits.iter().map(|l| l.cls.clone()).collect(), &state.cls_center, at.teacher_temp);
    let patches =
        targets(logits.iter().map(|l| l.patches.clone()).collect(), &state.patch_center, at.teacher_patch_temp);
    let (mut first_cls, mut first_patch) = (0, 0);
    // The rows of a micro-batch among all.
    let own = |all: &Option<Tensor<2>>, first: &mut usize, logits: &Option<Tensor<2>>| {
        let (all, count) = (all.as_ref()?, logits.as_ref()?.dims()[0]);
        *first += count;
        Some(all.clone().slice(s![*first - count..*first, ..]))
    };
    let parts = logits.iter().map(|logits| {
        let cls = own(&cls, &mut first_cls, &logits.cls).map(|targets| {
            let [rows, prototypes] = targets.dims();
            targets.reshape([2, rows / 2, prototypes])
        });
        Targets { cls, patches: own(&patches, &mut first_patch, &logits.patches) }
    });
    let parts = parts.collect();
    (parts, cls.map(target_entropy))
}

fn target_entropy(targets: Tensor<2>) -> TargetEntropy {
    let entropy = |p: Tensor<2>| (p.clone() * p.clamp_min(1e-30).log()).sum().neg();
    let rows = targets.dims()[0] as f64;
    let marginal = entropy(targets.clone().mean_dim(0));
    let both = host(Tensor::cat(vec![entropy(targets) / rows, marginal], 0));
    TargetEntropy { conditional: f64::from(both[0]), marginal: f64::from(both[1]) }
}

/// The terms of one micro-batch; a mean over its own samples, except for iBOT (see [`ibot::masked_patches`]).
#[derive(Default)]
struct Terms {
    dino_global: Option<Loss>,
    dino_local: Option<Loss>,
    ibot: Option<Loss>,
    koleo: Option<Loss>,
    /// A scalar that carries KoLeo's gradient when its value belongs to the whole batch.
    koleo_graph: Option<Tensor<1>>,
    /// Pairs of global crops, and of local with global crops.
    pairs: (f64, f64),
}

fn student_losses(
    student: &Network,
    part: &Batch,
    targets: &Targets,
    draws: &[StochasticDraws; 2],
    config: &LossConfig,
    whole_batch: usize,
    spread: Option<&Tensor<2>>,
) -> Terms {
    let device = part.global.device();
    let masks = (config.ibot_weight > 0.0).then(|| DeviceMasks::new(&part.masks, &device));
    let global = student_global(student, part, masks.as_ref(), &draws[0]);

    let mut terms = Terms { pairs: pairs(part, config), ..Terms::default() };
    if let Some(targets) = &targets.cls {
        let head = &student.dino_head;
        let vectors = head.last_layer.vectors();
        let bottleneck = head.bottleneck(global.cls.clone());
        terms.dino_global = Some(dino::global(
            bottleneck,
            vectors.clone(),
            targets.clone(),
            config.student_temp,
            config.ignore_diagonal,
        ));
        if let Some(crops) = config.local_crops(part) {
            let bottleneck = head.bottleneck(student.local_cls(tracked(crops), &draws[1]));
            terms.dino_local = Some(dino::local(bottleneck, vectors, targets.clone(), config.student_temp));
        }
    }
    if let (Some(masks), Some(targets)) = (masks, &targets.patches) {
        let head = student.patch_head();
        let bottleneck = head.bottleneck(gather(global.patches, Tensor::from_inner(masks.indices)));
        let crops = 2 * whole_batch;
        let loss = ibot::masked_patches(
            bottleneck,
            head.patch_prototypes().vectors(),
            targets.clone(),
            masks.weights,
            crops,
            config.student_temp,
        );
        terms.ibot = Some(loss);
    }
    if config.koleo_weight > 0.0 {
        match spread {
            None => terms.koleo = Some(koleo::koleo_per_crop(global.cls, 2)),
            Some(gradient) => terms.koleo_graph = Some((global.cls * tracked(gradient.clone())).sum()),
        }
    }
    terms
}

fn student_global(
    student: &Network,
    part: &Batch,
    masks: Option<&DeviceMasks>,
    draws: &StochasticDraws,
) -> dinoxide_model::Features {
    let mask = masks.map(|m| Tensor::<2, Bool>::from_inner(m.mask.clone()));
    student.features(tracked(part.global.clone()), mask, CropGroup::Global, Some(draws))
}

/// KoLeo over a batch in several micro-batches.
struct Spread {
    /// A mean over the two global crops.
    value: f64,
    /// Gradient of the sum over crops with respect to the CLS tokens of each micro-batch: `[2B, D]`, plain.
    gradients: Vec<Tensor<2>>,
}

fn koleo_of_parts(student: &Network, parts: &[Batch], draws: &StepDraws, config: &LossConfig) -> Spread {
    let student = student.valid();
    let cls: Vec<Tensor<3>> = parts
        .iter()
        .zip(draws)
        .map(|(part, draws)| {
            let masks = (config.ibot_weight > 0.0).then(|| DeviceMasks::new(&part.masks, &part.global.device()));
            let mask = masks.map(|m| m.mask);
            let cls = student.features(part.global.clone(), mask, CropGroup::Global, Some(&draws[0])).cls;
            let [rows, dim] = cls.dims();
            cls.reshape([2, rows / 2, dim])
        })
        .collect();
    let cls = Tensor::cat(cls, 1);
    let [crops, batch, dim] = cls.dims();
    let cls = Tensor::<2>::from_inner(cls.reshape([crops * batch, dim])).require_grad();
    let loss = koleo::koleo_per_crop(cls.clone(), crops);
    let gradient = cls.grad(&loss.graph.backward()).expect("KoLeo depends on every CLS token");
    let gradient = gradient.reshape([crops, batch, dim]);
    let mut first = 0;
    let gradients = parts.iter().map(|part| {
        let samples = first..first + part.len();
        first = samples.end;
        gradient.clone().slice(s![.., samples, ..]).reshape([crops * part.len(), dim])
    });
    Spread { value: f64::from(host(loss.value)[0]) / crops as f64, gradients: gradients.collect() }
}

/// Pairs of (student crop, teacher crop): global with global, local with global.
fn pairs(batch: &Batch, config: &LossConfig) -> (f64, f64) {
    let global = if config.ignore_diagonal { 2.0 } else { 4.0 };
    (global, batch.local.as_ref().map_or(0.0, |local| 2.0 * local.dims()[0] as f64))
}

/// Weights of the global and local DINO terms: together a mean over all pairs when `local_weight` is 1.
fn dino_weights((global, local): (f64, f64), config: &LossConfig) -> (f64, f64) {
    let all = global + local;
    (config.dino_weight * global / all, config.dino_weight * config.local_weight * local / all)
}

/// The scalar to minimise on one micro-batch. `None` if every term is left out.
fn weighted_sum(terms: Terms, share: f64, config: &LossConfig) -> Option<Tensor<1>> {
    let (global, local) = dino_weights(terms.pairs, config);
    let parts = [
        terms.dino_global.map(|l| l.graph * (global * share)),
        terms.dino_local.map(|l| l.graph * (local * share)),
        terms.ibot.map(|l| l.graph * config.ibot_weight),
        terms.koleo.map(|l| l.graph * config.koleo_weight),
        terms.koleo_graph.map(|graph| graph * config.koleo_weight),
    ];
    parts.into_iter().flatten().reduce(|sum, part| sum + part)
}

impl LossValues {
    /// Adds a micro-batch's terms.
    fn add(&mut self, terms: &Terms, share: f64) {
        let read = |loss: &Option<Loss>| loss.as_ref().map(|l| f64::from(host(l.value.clone())[0]));
        let sum = |into: &mut Option<f64>, value: Option<f64>| {
            if let Some(value) = value {
                *into = Some(into.unwrap_or(0.0) + value);
            }
        };
        sum(&mut self.dino_global, read(&terms.dino_global).map(|v| v * share));
        sum(&mut self.dino_local, read(&terms.dino_local).map(|v| v * share));
        sum(&mut self.ibot, read(&terms.ibot));
        sum(&mut self.koleo, read(&terms.koleo).map(|v| v / 2.0));
    }

    /// The terms by name.
    pub fn named(&self) -> [(&'static str, Option<f64>); 4] {
        [("dino_global", self.dino_global), ("dino_local", self.dino_local), ("ibot", self.ibot), ("koleo", self.koleo)]
    }
}

fn total(losses: &LossValues, config: &LossConfig, batch: &Batch) -> f64 {
    let (global, local) = dino_weights(pairs(batch, config), config);
    global * losses.dino_global.unwrap_or(0.0)
        + local * losses.dino_local.unwrap_or(0.0)
        + config.ibot_weight * losses.ibot.unwrap_or(0.0)
        // The objective sums KoLeo over the two global crops; the value is their mean.
        + config.koleo_weight * 2.0 * losses.koleo.unwrap_or(0.0)
}

/// Runs backward and adds the gradients by name.
fn accumulate(gradients: &mut Gradients, student: &Network, objective: Option<Tensor<1>>) {
    struct Collect<'a> {
        path: parameters::Path,
        grads: &'a burn::tensor::Gradients,
        into: &'a mut Gradients,
    }
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = param.val().grad(self.grads) {
                let gradient = gradient.reshape([-1]);
                let name = self.path.name();
                let gradient = match self.into.remove(&name) {
                    Some(sum) => sum + gradient,
                    None => gradient,
                };
                self.into.insert(name, gradient);
            }
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    if let Some(objective) = objective {
        let grads = objective.backward();
        student.visit(&mut Collect { path: parameters::Path::default(), grads: &grads, into: gradients });
    }
}

fn require_finite(
    state: &TrainState,
    batch: &Batch,
    config: &LossConfig,
    losses: &LossValues,
    norms: &BTreeMap<&'static str, f64>,
    at: &Scheduled,
) -> Result<(), StepError> {
    let losses = losses.named().into_iter().filter_map(|(name, value)| Some((format!("loss `{name}`"), value?)));
    let norms = norms.iter().map(|(name, value)| (format!("the gradient norm of `{name}`"), *value));
    match losses.chain(norms).find(|(_, value)| !value.is_finite()) {
        None => Ok(()),
        Some((what, value)) => {
            Err(StepError::NotFinite { step: at.step, what, value, ids: suspects(state, batch, config) })
        }
    }
}

/// The samples whose own features are not finite; all samples when none stands out.
fn suspects(state: &TrainState, batch: &Batch, config: &LossConfig) -> Vec<String> {
    let cls = state.teacher.features(batch.global.clone(), None, CropGroup::Global, None).cls;
    let mut sums = host(cls.sum_dim(1).reshape([-1]));
    if let Some(local) = config.local_crops(batch) {
        let cls = state.teacher.features(local, None, CropGroup::Global, None).cls;
        sums.extend(host(cls.sum_dim(1).reshape([-1])));
    }
    let bad = |b: usize| sums.iter().skip(b).step_by(batch.len()).any(|sum| !sum.is_finite());
    let found: Vec<String> = batch.ids.iter().enumerate().filter(|(b, _)| bad(*b)).map(|(_, id)| id.clone()).collect();
    if found.is_empty() { batch.ids.clone() } else { found }
}

/// Moves the centers towards this batch's logits; the next step's targets are the first to see it.
fn update_centers(state: &mut TrainState, logits: &[TeacherLogits], parts: &[Batch], config: &LossConfig) {
    if config.centering != Centering::Softmax {
        return;
    }
    let all = |of: fn(&TeacherLogits) -> &Option<Tensor<2>>| {
        let found: Vec<Tensor<2>> = logits.iter().filter_map(|logits| of(logits).clone()).collect();
        (!found.is_empty()).then(|| Tensor::cat(found, 0))
    };
    if let Some(cls) = all(|logits| &logits.cls) {
        state.cls_center.update(cls);
    }
    let patches = match config.patch_center {
        CenterOver::Masked => all(|logits| &logits.patches),
        CenterOver::All => {
            // Micro-batches have the same number of patches per sample, but not of samples.
            let samples: usize = parts.iter().map(Batch::len).sum();
            let shares = logits.iter().zip(parts).filter_map(|(logits, part)| {
                Some(logits.all_patches_mean.clone()? * (part.len() as f64 / samples as f64))
            });
            shares.reduce(|sum, share| sum + share)
        }
    };
    if let Some(patches) = patches {
        state.patch_center.update(patches);
    }
}

/// `[B, N, D]` → `[B·N, D]`.
fn rows(tokens: Tensor<3>) -> Tensor<2> {
    let [batch, count, dim] = tokens.dims();
    tokens.reshape([batch * count, dim])
}

/// The rows of tokens `[B, N, D]` at `indices` into their flattened list.
fn gather(tokens: Tensor<3>, indices: Tensor<1, Int>) -> Tensor<2> {
    rows(tokens).select(0, indices)
}

/// A plain tensor as a constant of the autodiff graph.
fn tracked<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    Tensor::from_inner(tensor)
}
