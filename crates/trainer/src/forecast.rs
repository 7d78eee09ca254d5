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
    /// Seconds of processor time of a step, loader included, over all cores; 0 where the system does not tell.
    pub processor_seconds: f64,
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

/// [`at`] of a time: the whole takes at least as long as each of its parts did, whatever line the trials of a moment when
/// the machine was busy may lie on.
fn seconds_at(whole: Extent, trials: &[Trial], of: impl Fn(&Trial) -> f64) -> f64 {
    trials.iter().map(&of).fold(at(whole, trials, &of), f64::max)
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
    let line = seconds_at(whole, trials, |trial| trial.step_seconds);
    let slowest = trials.iter().max_by(|a, b| share(a).total_cmp(&share(b))).expect("a trial");
    let shares_all = cores > 0 && threads >= cores;
    if trials.len() == 1 || share(slowest) < HARDLY || threads == 0 || shares_all {
        let waits = at(whole, trials, |trial| trial.waited_seconds);
        return (line, waits.clamp(0.0, line));
    }
    let loading = slowest.step_seconds / slowest.batch_size as f64 * batch_size as f64;
    let alone = seconds_at(whole, trials, |trial| trial.step_seconds - trial.waited_seconds);
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

    let due = |every: u64| (plan.steps - 1).checked_div(every).unwrap_or(0);
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
        processor_seconds: at(whole, trials, |trial| trial.processor_seconds).max(0.0),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(blocks: usize, parts: usize) -> Trial {
        let (b, p) = (blocks as f64, parts as f64);
        Trial {
            extent: Extent { blocks, parts },
            batch_size: 3 * parts,
            steps: 3,
            // A step's own work, and that of a micro-batch, each with a part for every block.
            step_seconds: 0.3 + 0.2 * b + p * (0.5 + 0.7 * b),
            waited_seconds: 0.0,
            processor_seconds: 0.4 * b,
            step_peak_bytes: 1000 + 200 * blocks as u64 + parts as u64 * (30 + 7 * blocks as u64),
            peak_bytes: 4000,
            checkpoint_seconds: 0.5 * b,
            checkpoint_bytes: 400 * blocks as u64,
            teacher_bytes: 90 * blocks as u64,
            metrics_bytes: 11,
            samples: 500,
            evaluated: 40,
            evaluation_seconds: 0.01 * b,
        }
    }

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9 * b.abs().max(1.0), "{a} is not {b}");
    }

    #[test]
    fn two_or_four_trials_give_what_all_would_have_taken() {
        let whole = Extent { blocks: 24, parts: 16 };
        let of = |extents: &[(usize, usize)]| -> Vec<Trial> { extents.iter().map(|&(b, p)| trial(b, p)).collect() };
        let seconds = |trials: &[Trial], whole| at(whole, trials, |trial| trial.step_seconds);
        near(seconds(&of(&[(2, 2), (7, 2), (2, 4), (7, 4)]), whole), trial(24, 16).step_seconds);
        near(seconds(&of(&[(2, 16), (5, 16)]), whole), trial(24, 16).step_seconds);
        near(seconds(&of(&[(24, 2), (24, 3)]), whole), trial(24, 16).step_seconds);
        near(seconds(&of(&[(24, 16)]), whole), trial(24, 16).step_seconds);
    }

    #[test]
    fn the_whole_is_tried_where_it_can_be_and_else_what_lies_far_apart() {
        let extent = |blocks, parts| Extent { blocks, parts };
        let (whole, mut tried) = (extent(12, 1), trial(2, 1));
        assert_eq!((first(whole), first(extent(1, 8))), (extent(2, 1), extent(1, 2)));
        tried.step_seconds = 0.5;
        // Twelve blocks take at most 3 s a step, 15 s a trial.
        assert_eq!(further(whole, &tried, 15.0, None), [whole]);
        assert_eq!(further(whole, &tried, 14.9, None), [extent(5, 1)]);
        assert_eq!(further(whole, &tried, 0.0, None), [extent(4, 1)]);
        tried.peak_bytes = 1000;
        assert_eq!(further(whole, &tried, 60.0, Some(5999)), [extent(11, 1)]);
        assert_eq!(further(whole, &tried, 60.0, Some(1500)), [extent(3, 1)]);
        assert_eq!(further(extent(12, 16), &trial(2, 2), 0.0, None), [extent(4, 2), extent(2, 4), extent(4, 4)]);
        assert_eq!(further(extent(2, 16), &trial(2, 2), 0.0, None), [extent(2, 4)]);
        assert!(further(extent(2, 2), &trial(2, 2), 0.0, None).is_empty());
    }

    #[test]
    fn a_trial_that_was_held_up_does_not_make_the_whole_faster_than_itself() {
        let whole = Extent { blocks: 24, parts: 1 };
        for waited in [0.0, 30.0] {
            let mut held_up = trial(2, 1);
            (held_up.step_seconds, held_up.waited_seconds) = (60.0, waited);
            let (step, waits) = step_seconds(whole, &[held_up, trial(4, 1)], 3, 1, 2);
            assert!(step >= 60.0 && (0.0..=step).contains(&waits), "{step} s, of these {waits}");
        }
    }

    #[test]
    fn a_loader_that_is_too_slow_sets_the_pace_until_the_step_is_slower() {
        // The loader alone takes 1 s for each batch of 3; the step of its own 0.1 s for each block.
        let waiting = |blocks: usize| {
            let own = 0.1 * blocks as f64;
            Trial { step_seconds: own.max(1.0), waited_seconds: (1.0 - own).max(0.0), ..trial(blocks, 1) }
        };
        let trials = [waiting(2), waiting(4)];
        let step = |blocks, threads, cores| step_seconds(Extent { blocks, parts: 1 }, &trials, 3, threads, cores);
        // On a device of its own the slower of both.
        near(step(8, 2, 0).0, 1.0);
        near(step(8, 2, 0).1, 0.2);
        near(step(30, 2, 0).0, 3.0);
        near(step(30, 2, 0).1, 0.0);
        // Two of eight cores were the loader's all the time, and are now for one second.
        near(step(30, 2, 8).0, 0.75 * 3.0 + 0.25);
        // On all cores, or without threads, the work of both adds up.
        let adding = [0.2, 0.4].map(|own| Trial {
            step_seconds: 1.0 + own,
            waited_seconds: 0.9,
            ..trial((10.0 * own) as usize, 1)
        });
        for (threads, cores) in [(2, 2), (0, 8)] {
            near(step_seconds(Extent { blocks: 30, parts: 1 }, &adding, 3, threads, cores).0, 4.0);
        }
    }

    #[test]
    fn time_and_disk_by_hand() {
        let text = "train = { length = \"100 steps\", batch_size = 6 }\nefficiency.micro_batches = 2\n\
                    run = { checkpoint_every = \"30 steps\", log_every = \"10 steps\", keep_checkpoints = 3 }\n\
                    eval.every = \"50 steps\"\nmodel.depth = 10\n\
                    schedule = { freeze_last_layer = \"0 steps\", lr.warmup = \"9 steps\", teacher_temp.warmup = \"9 steps\" }";
        let recipe = dinoxide_config::Resolved::<Recipe>::from_text("test", text).expect("a recipe").value;
        let found = forecast(&recipe, &[trial(2, 2), trial(5, 2)], 2).expect("a forecast");
        let step = trial(10, 2).step_seconds;
        near(found.step_seconds, step);
        near(found.images_per_second, 6.0 / step);
        near(found.training_seconds, 100.0 * step);
        near(found.processor_seconds, 4.0);
        // After steps 0, 50 and 100; checkpoints after 30, 60, 90 and 100.
        assert_eq!((found.evaluations, found.checkpoints, found.checkpoints_kept), (3, 4, 3));
        near(found.evaluation_seconds, 3.0 * 40.0 * 0.1);
        near(found.checkpoint_seconds, 4.0 * 5.0);
        assert_eq!((found.checkpoint_bytes, found.teacher_bytes, found.state_bytes), (4000, 900, 5000));
        // Lines after steps 1, 10, 20, …, 100.
        assert_eq!(found.metrics_bytes, 11 * 11);
        assert_eq!((found.disk_bytes, found.disk_peak_bytes), (12_000 + 900 + 121, 16_000 + 900 + 121));
        // Of k-NN: 40 images' features of width 384 three times, beside what a checkpoint holds.
        assert_eq!(found.peak_bytes, 4000 + 40 * 384 * 4 * 3);
    }
}
