//! From trials of parts of a recipe to what the whole run will take.
//!
//! All blocks of a backbone are alike, and so are all micro-batches of a step: seconds, memory and bytes are linear in the
//! number of either when the other is fixed. Two trials that differ in one of them give its line; with both, four give the
//! bilinear function. A trial of the whole recipe needs no line.

use serde::Serialize;

use crate::error::TrainError;
use crate::recipe::Recipe;
use crate::trial::{Extent, Trial};

/// What a run will take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// Steps of the run.
    pub steps: u64,
    /// Images of a step.
    pub batch_size: usize,
    /// Seconds of a step, the wait for images included.
    pub step_seconds: f64,
    /// Images per second.
    pub images_per_second: f64,
    /// Share of the time in which a step waits for images.
    pub data_wait: f64,
    /// Highest resident memory of the process, in bytes.
    pub peak_bytes: u64,
    /// Of these, weights of student and teacher, moments and gradients, which no division of the batch makes less.
    pub state_bytes: u64,
    /// Seconds of all steps.
    pub training_seconds: f64,
    /// Evaluations by k-NN.
    pub evaluations: u64,
    /// Images of each.
    pub evaluated: usize,
    /// Seconds of all of them.
    pub evaluation_seconds: f64,
    /// Checkpoints written.
    pub checkpoints: u64,
    /// Of these, kept.
    pub checkpoints_kept: u64,
    /// Seconds of all checkpoints.
    pub checkpoint_seconds: f64,
    /// Bytes of one.
    pub checkpoint_bytes: u64,
    /// Bytes of the teacher's file.
    pub teacher_bytes: u64,
    /// Bytes of the metrics.
    pub metrics_bytes: u64,
    /// Bytes of the run directory at the end.
    pub disk_bytes: u64,
    /// And at most, while a checkpoint is written beside those that are kept.
    pub disk_peak_bytes: u64,
}

/// Steps of a trial, those before the ones that count included.
const TRIAL_STEPS: f64 = 5.0;

/// The smallest part of a recipe that can be measured well.
pub fn first(whole: Extent) -> Extent {
    Extent { blocks: whole.blocks.min(2), parts: whole.parts.min(2) }
}

/// What to try after the [`first`] trial: the whole recipe, where a trial of it takes no more than `seconds` and fits into
/// `available` bytes; else what gives a line. Nothing if the first trial was of the whole recipe.
pub fn further(whole: Extent, first: &Trial, seconds: f64, available: Option<u64>) -> Vec<Extent> {
    let tried = first.extent;
    if tried == whole {
        return Vec::new();
    }
    // What is not proportional to the blocks makes these upper bounds.
    let ratio = |extent: Extent| (extent.blocks * extent.parts) as f64 / (tried.blocks * tried.parts) as f64;
    let takes = |extent: Extent| TRIAL_STEPS * first.step_seconds * ratio(extent);
    let fits = |extent: Extent| available.is_none_or(|bytes| first.peak_bytes as f64 * ratio(extent) <= bytes as f64);
    if takes(whole) <= seconds && fits(whole) {
        return vec![whole];
    }
    let mut blocks = vec![tried.blocks];
    if whole.blocks > tried.blocks {
        // The further apart, the less an error of the measurement matters.
        let deep = |blocks: &usize| {
            let extent = Extent { blocks: *blocks, ..tried };
            takes(extent) <= seconds / 2.0 && fits(extent)
        };
        let least = (2 * tried.blocks).min(whole.blocks);
        let least = if deep(&least) || fits(Extent { blocks: least, ..tried }) { least } else { tried.blocks + 1 };
        blocks.push((least..=whole.blocks).rev().find(deep).unwrap_or(least));
    }
    let mut parts = vec![tried.parts];
    if whole.parts > tried.parts {
        parts.push((2 * tried.parts).min(whole.parts));
    }
    let all = parts.iter().flat_map(|&parts| blocks.iter().map(move |&blocks| Extent { blocks, parts }));
    all.filter(|extent| *extent != tried).collect()
}

/// The value at `whole` of the bilinear function that goes through `of` the trials.
fn at(whole: Extent, trials: &[Trial], of: impl Fn(&Trial) -> f64) -> f64 {
    // Lagrange's polynomial of `x` among the values that were tried, at `to`.
    let weight = |value: fn(&Extent) -> usize, x: usize, to: usize| {
        let mut others: Vec<usize> = trials.iter().map(|trial| value(&trial.extent)).filter(|y| *y != x).collect();
        others.dedup();
        others.first().map_or(1.0, |&y| (to as f64 - y as f64) / (x as f64 - y as f64))
    };
    let term = |trial: &Trial| {
        let blocks = weight(|extent| extent.blocks, trial.extent.blocks, whole.blocks);
        of(trial) * blocks * weight(|extent| extent.parts, trial.extent.parts, whole.parts)
    };
    trials.iter().map(term).sum()
}

/// Seconds of a step, and of these the wait for images. `cores` are those that loader and step share; 0 if the step is
/// computed elsewhere.
///
/// Where a trial hardly waits, what the loader does is part of its steps' time, in the share of the cores that it takes from
/// them, and the line through the trials has it. A trial that waits tells how fast the loader alone is: a step of the whole
/// recipe takes at least that long; otherwise the loader takes its share of the cores for the time that it needs.
fn step_seconds(whole: Extent, trials: &[Trial], batch_size: usize, threads: usize, cores: usize) -> (f64, f64) {
    const HARDLY: f64 = 0.1;
    let share = |trial: &Trial| trial.waited_seconds / trial.step_seconds;
    let line = at(whole, trials, |trial| trial.step_seconds);
    let slowest = trials.iter().max_by(|a, b| share(a).total_cmp(&share(b))).expect("a trial");
    let shares_all = cores > 0 && threads >= cores;
    if trials.len() == 1 || share(slowest) < HARDLY || threads == 0 || shares_all {
        let waits = at(whole, trials, |trial| trial.waited_seconds);
        return (line, waits.clamp(0.0, line));
    }
    let loading = slowest.step_seconds / slowest.batch_size as f64 * batch_size as f64;
    let alone = at(whole, trials, |trial| trial.step_seconds - trial.waited_seconds);
    let taken = if cores > 0 { threads as f64 / cores as f64 } else { 0.0 };
    let step = loading.max((1.0 - taken) * alone + taken * loading);
    (step, (step - alone).max(0.0))
}

/// What the whole recipe takes, from trials of it. `cores` are those that loader and step share; 0 if the step is computed
/// on a device of its own.
///
/// # Errors
/// A recipe that does not fit together.
///
/// # Panics
/// Without trials.
pub fn forecast(recipe: &Recipe, trials: &[Trial], cores: usize) -> Result<Forecast, TrainError> {
    let whole = Extent::of(recipe)?;
    let plan = recipe.plan(trials[0].samples)?;
    let batch_size = recipe.train.batch_size;
    let threads = recipe.efficiency.loader_threads;
    let (step_seconds, waits) = step_seconds(whole, trials, batch_size, threads, cores);
    let bytes = |of: fn(&Trial) -> u64| at(whole, trials, |trial| of(trial) as f64).max(0.0).round() as u64;

    let checkpoint_bytes = bytes(|trial| trial.checkpoint_bytes);
    let teacher_bytes = bytes(|trial| trial.teacher_bytes);
    // A checkpoint has the weights of student and teacher and both moments; gradients are as large as one of them.
    let state_bytes = checkpoint_bytes / 4 * 5;
    let evaluated = trials[0].evaluated;
    // CLS and mean patch tokens of all images, and those in the classifier's order, beside weights and moments.
    let features = (evaluated * plan.backbone.embed_dim() * 4 * 3) as u64;
    let peak_bytes =
        bytes(|trial| trial.step_peak_bytes).max(bytes(|trial| trial.peak_bytes)).max(checkpoint_bytes + features);

    let due = |every: u64| if every == 0 { 0 } else { (plan.steps - 1) / every };
    let checkpoints = due(plan.checkpoint_every) + 1;
    let checkpoints_kept = checkpoints.min(recipe.run.keep_checkpoints as u64);
    let evaluations = if evaluated == 0 { 0 } else { due(plan.eval_every) + 2 };
    let metrics_bytes = (due(plan.log_every) + 2) * trials[0].metrics_bytes;
    let disk_bytes = checkpoints_kept * checkpoint_bytes + teacher_bytes + metrics_bytes;
    let beside = if checkpoints > checkpoints_kept { checkpoint_bytes } else { 0 };
    Ok(Forecast {
        steps: plan.steps,
        batch_size,
        step_seconds,
        images_per_second: batch_size as f64 / step_seconds,
        data_wait: waits / step_seconds,
        peak_bytes,
        state_bytes,
        training_seconds: plan.steps as f64 * step_seconds,
        evaluations,
        evaluated,
        evaluation_seconds: (evaluations as usize * evaluated) as f64
            * at(whole, trials, |trial| trial.evaluation_seconds).max(0.0),
        checkpoints,
        checkpoints_kept,
        checkpoint_seconds: checkpoints as f64 * at(whole, trials, |trial| trial.checkpoint_seconds).max(0.0),
        checkpoint_bytes,
        teacher_bytes,
        metrics_bytes,
        disk_bytes,
        disk_peak_bytes: disk_bytes + beside.max(teacher_bytes),
    })
}
