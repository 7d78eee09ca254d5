//! The loop around the step: one run, or several students of one teacher on the same batches.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use dinoxide_config::Resolved;
use dinoxide_data::Source;

use crate::cache::Cache;
use crate::directory::prepare_directory;
use crate::error::TrainError;
use crate::event::{Event, Outcome};
use crate::monitor::Monitor;
use crate::pretrained::Pretrained;
use crate::recipe::Recipe;
use crate::running::Run;
use crate::samples::Batches;
use crate::stages::Planned;
use crate::start::initial;

/// What made a run, in its log and its weight files.
pub const SOFTWARE: &str = concat!("dinoxide ", env!("CARGO_PKG_VERSION"));

/// Trains the recipe in `directory`, from the newest whole checkpoint there if there is one.
///
/// `stop` ends the run after the step at hand, with a checkpoint.
///
/// # Errors
/// See [`TrainError`]. Checkpoints written so far stay.
pub fn train(
    recipe: &Resolved<Recipe>,
    directory: &Path,
    device: &Device,
    stop: &AtomicBool,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, TrainError> {
    let runs = [(&recipe.value, recipe, directory)];
    let mut outcomes = train_together(&recipe.value, &runs, device, stop, &mut |_, event| watch(event))?;
    Ok(outcomes.remove(0))
}

/// Trains several students on the same batches, each in a directory of its own. Their frozen teacher sees each batch once.
///
/// Students that were stopped at different steps wait for the one that is furthest behind.
///
/// # Errors
/// As [`train`].
pub fn train_students(
    recipe: &Resolved<Recipe>,
    students: &[Planned],
    device: &Device,
    stop: &AtomicBool,
    watch: &mut dyn FnMut(usize, Event<'_>),
) -> Result<Vec<Outcome>, TrainError> {
    let runs: Vec<_> =
        students.iter().map(|student| (&student.recipe.value, &student.recipe, student.directory.as_path())).collect();
    train_together(&recipe.value, &runs, device, stop, watch)
}

/// `shared` says which images there are and how they are cropped.
fn train_together(
    shared: &Recipe,
    runs: &[(&Recipe, &Resolved<Recipe>, &Path)],
    device: &Device,
    stop: &AtomicBool,
    watch: &mut dyn FnMut(usize, Event<'_>),
) -> Result<Vec<Outcome>, TrainError> {
    let source = shared.data.open()?;
    // One teacher in memory, however many learn from it.
    let teacher = Pretrained::teacher(shared, device)?;
    let mut prepared = Vec::new();
    for (config, _, directory) in runs {
        let plan = config.plan(source.len())?;
        let monitor = Monitor::new(config, &source, &config.data.decode)?;
        prepared.push((initial(config, plan, teacher.as_ref(), directory, device)?, monitor));
    }
    let cache = Cache::open(shared, source.len(), teacher.as_ref(), device)?;
    // With a cache, nothing needs its backbone any more.
    drop(teacher);
    let (mut locks, mut started) = (Vec::new(), Vec::<Run<'_>>::new());
    for (i, ((config, recipe, directory), (initial, monitor))) in runs.iter().zip(prepared).enumerate() {
        locks.push(prepare_directory(recipe, directory)?);
        let watch = &mut |event: Event<'_>| watch(i, event);
        started.push(Run::start(config, initial, source.clone(), monitor, directory, device, watch)?);
    }
    go(shared, &source, cache, &mut started, stop, watch)
}

/// From where the runs stand to their end.
pub(crate) fn go(
    shared: &Recipe,
    source: &Arc<dyn Source>,
    mut cache: Option<Cache>,
    runs: &mut [Run<'_>],
    stop: &AtomicBool,
    watch: &mut dyn FnMut(usize, Event<'_>),
) -> Result<Vec<Outcome>, TrainError> {
    for i in 0..runs.len() {
        timed(runs, i, |run| run.evaluate_first(&mut |event| watch(i, event)))?;
    }
    let mut step = runs.iter().map(|run| run.state.step).min().expect("at least one run");
    let steps = runs[0].plan.steps;
    let locals = runs.iter().map(|run| run.config.local_crops()).max().expect("at least one run");
    let mut batches = Batches::new(shared, locals, source, step)?;
    // Masks are of a grid of patches. Runs that have a use for them have that of their teacher, others may have another.
    let masked = runs.iter().position(|run| run.config.loss.ibot_weight > 0.0).unwrap_or(0);
    runs.iter_mut().for_each(|run| run.start_window(0.0));
    while step < steps && !stop.load(Ordering::Relaxed) {
        let (mut batch, drawn) = batches.next(&runs[masked].plan.backbone, runs[masked].device)?;
        for (i, run) in runs.iter_mut().enumerate().filter(|(_, run)| run.state.step == step) {
            run.record(&drawn, &mut |event| watch(i, event))?;
        }
        if let Some(cache) = &mut cache {
            let size = shared.train.batch_size;
            batch.tokens = Some(cache.tokens(step * size as u64, size)?);
        } else if let Some(frozen) = runs[0].state.frozen.as_ref().filter(|_| runs.len() > 1) {
            batch.tokens = Some(frozen.tokens(&batch, shared.efficiency.micro_batches));
        }
        let waited = batches.waited().as_secs_f64();
        for i in 0..runs.len() {
            if runs[i].state.step == step {
                timed(runs, i, |run| run.take(&batch, waited, &mut |event| watch(i, event)))?;
            }
        }
        step += 1;
    }
    drop(batches);
    (0..runs.len()).map(|i| timed(runs, i, |run| run.finish(&mut |event| watch(i, event)))).collect()
}

/// Lets one of the runs act; to the others, the time is time spent elsewhere.
fn timed<T>(runs: &mut [Run<'_>], i: usize, act: impl FnOnce(&mut Run<'_>) -> T) -> T {
    let since = Instant::now();
    let result = act(&mut runs[i]);
    let seconds = since.elapsed().as_secs_f64();
    runs.iter_mut().enumerate().filter(|(other, _)| *other != i).for_each(|(_, run)| run.clock.elsewhere += seconds);
    result
}
