//! One optimisation step. Start reading at [`train_step`].

use std::collections::BTreeMap;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use dinoxide_kernels::run_on;
use dinoxide_losses::center::Center;
use dinoxide_model::{Architecture, Backbone, CropGroup, HeadConfig, StochasticDraws, weights::host};
use dinoxide_optimizer::accumulate;
use rand::Rng;

use crate::batch::Batch;
use crate::loss::{LossConfig, LossValues};
use crate::network::Network;
use crate::optimizer::{AdamW, Gradients, Norms, OptimConfig, ema};
use crate::schedule::Scheduled;
use crate::targets::{FrozenTeacher, TargetEntropy, TeacherOutputs, center, teacher_outputs, update_centers};
use crate::terms::{Judgement, UnreadLosses, koleo_of_parts, student_losses, total, weighted_sum};

/// Everything that a step changes.
#[derive(Clone, Debug)]
pub struct TrainState {
    /// The network in training, tracked by autodiff.
    pub student: Network,
    /// Its running mean, plain: what gives the targets, unless there is a frozen teacher, and what a run is for.
    pub teacher: Network,
    /// What gives the targets in a distillation. No step changes it.
    pub frozen: Option<FrozenTeacher>,
    /// Whose patch similarities the student's are held to, where that is not the teacher as it is.
    pub gram_teacher: Option<Backbone>,
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
        Self::of(student, optim, loss, device)
    }

    /// The start of a run with this student, whose copy is the teacher.
    pub fn of(student: Network, optim: &OptimConfig, loss: &LossConfig, device: &Device) -> Self {
        let teacher = student.valid();
        let optimizer = AdamW::new(optim, &teacher, device);
        let center = |vectors: Tensor<2>| Center::new(vectors.dims()[0], loss.center_momentum, device);
        Self {
            cls_center: center(teacher.dino_head.last_layer.vectors()),
            patch_center: center(teacher.patch_head().patch_prototypes().vectors()),
            student,
            teacher,
            frozen: None,
            gram_teacher: None,
            optimizer,
            step: 0,
            timings: Timings::default(),
        }
    }
}

/// The draws of a step's forwards: for each micro-batch, those of the global and of the local crops.
pub type StepDraws = Vec<[StochasticDraws; 2]>;

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
    run_on(&batch.global.device(), || take_step(state, batch, draws, config, at))
}

fn take_step(
    state: &mut TrainState,
    batch: &Batch,
    draws: &StepDraws,
    config: &LossConfig,
    at: Scheduled,
) -> Result<StepReport, StepError> {
    let (mut clock, mut timings) = (Stopwatch(Instant::now()), Timings::default());
    let parts = batch.divide(draws.len());

    let mut outputs: Vec<TeacherOutputs> = parts.iter().map(|part| teacher_outputs(state, part, config)).collect();
    timings.teacher = clock.lap();
    let (targets, entropies) = center(state, &mut outputs, config, &at);
    timings.targets = clock.lap();

    // KoLeo's gradient needs the CLS tokens of the whole batch; with several micro-batches they take a forward of their own.
    let sees_all = state.frozen.is_some();
    let spread = (parts.len() > 1 && config.koleo_weight > 0.0)
        .then(|| koleo_of_parts(&state.student, &parts, draws, config, sees_all));

    let mut unread = UnreadLosses::default();
    let mut gradients = Gradients::new();
    for ((i, part), mut targets) in parts.iter().enumerate().zip(targets) {
        let share = part.len() as f64 / batch.len() as f64;
        let judgement = Judgement {
            config,
            guidance: &outputs[i].guidance,
            spread: spread.as_ref().map(|s| &s.gradients[i]),
            whole_batch: batch.len(),
            sees_all,
        };
        // One group of crops after the other: what is kept for the backward pass of the first is gone before the second. But
        // each leaves a gradient of every parameter, and where those are the larger, one backward pass serves both groups.
        let together = gradients_outweigh_activations(&state.student, part);
        let mut objective: Option<Tensor<1>> = None;
        for group in [CropGroup::Global, CropGroup::Local].into_iter().zip(&draws[i]) {
            let terms = student_losses(&state.student, part, group, &mut targets, &judgement);
            unread.add(&terms, share);
            timings.student += clock.lap();
            objective = objective.into_iter().chain(weighted_sum(terms, share, config)).reduce(|a, b| a + b);
            if !together && let Some(objective) = objective.take() {
                accumulate(&mut gradients, &state.student, objective);
            }
            timings.backward += clock.lap();
        }
        if let Some(objective) = objective {
            accumulate(&mut gradients, &state.student, objective);
        }
        timings.backward += clock.lap();
    }
    if let Some(spread) = &spread {
        unread.add_koleo(spread);
    }
    // Reading a number waits until the device has computed it. So nothing is read before this, and here all at once.
    let squares = Norms::squares(&gradients);
    let numbers: Vec<Tensor<1>> = unread.tensors().chain(squares).chain(entropies.clone()).collect();
    let mut numbers = if numbers.is_empty() { Vec::new() } else { host(Tensor::cat(numbers, 0)) }.into_iter();
    let mut losses = unread.read(numbers.by_ref());
    let norms = Norms::read(&gradients, numbers.by_ref());
    let target_entropy = entropies.is_some().then(|| {
        let mut next = || f64::from(numbers.next().expect("two entropies"));
        TargetEntropy { conditional: next(), marginal: next() }
    });
    losses.total = total(&losses, config, batch);
    let gradient_norms = norms.by_submodule();
    require_finite(state, batch, config, &losses, &gradient_norms, &at)?;

    // Each network is handed over while the other holds its place, so that it can be changed in its own memory.
    let student = std::mem::replace(&mut state.student, state.teacher.clone());
    state.student = state.optimizer.step(student, gradients, &norms, &at);
    let teacher = std::mem::replace(&mut state.teacher, state.student.clone());
    state.teacher = ema(teacher, &state.student, at.teacher_momentum);
    update_centers(state, &outputs, &parts, config);
    if at.refresh_gram_teacher {
        state.gram_teacher = Some(state.teacher.backbone.clone());
    }
    timings.update = clock.lap();
    state.timings = timings;
    state.step = at.step + 1;
    Ok(StepReport { losses, gradient_norms, target_entropy, at })
}

/// Whether the gradients of a student are more than what it keeps of these global crops for its backward pass.
fn gradients_outweigh_activations(student: &Network, part: &Batch) -> bool {
    let [groups, crops, _, height, width] = part.global.dims();
    student.num_params() >= student.backbone.kept_for_backward(groups * crops, height, width)
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
    let cls = state.teacher.cls(batch.global.clone(), None, CropGroup::Global, None);
    let mut sums = host(cls.sum_dim(1).reshape([-1]));
    if let Some(local) = config.local_crops(batch) {
        let cls = state.teacher.cls(local, None, CropGroup::Global, None);
        sums.extend(host(cls.sum_dim(1).reshape([-1])));
    }
    let bad = |b: usize| sums.iter().skip(b).step_by(batch.len()).any(|sum| !sum.is_finite());
    let found: Vec<String> = batch.ids.iter().enumerate().filter(|(b, _)| bad(*b)).map(|(_, id)| id.clone()).collect();
    if found.is_empty() { batch.ids.clone() } else { found }
}
