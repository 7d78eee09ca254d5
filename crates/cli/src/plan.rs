//! `dinoxide plan`: what a run will take, before it starts.
//!
//! Each trial is a process of its own, this program again: the highest memory of a process never falls, and a trial that
//! would take all memory can be ended without ending the plan.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use dinoxide_config::Resolved;
use dinoxide_trainer::forecast::{self, Forecast, forecast};
use dinoxide_trainer::trial::{Extent, Trial, least_bytes, reduced, trial};
use dinoxide_trainer::{Recipe, stages};
use serde_json::{Value, json};

use crate::recipes::RunFlags;
use crate::table::{bytes, count, duration};
use crate::train::usage;
use crate::{Usage, allocator, device, memory, terminal};

/// Tell memory, images per second, hours and disk of a run before it starts, by taking a few of its steps.
///
/// What is measured is the recipe itself, on its own images: all of it where that takes no more than `--seconds`, else fewer
/// blocks and micro-batches, from which the rest follows. Nothing is kept.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    flags: RunFlags,
    /// Seconds that the measurement of a run may take, roughly: with more, more of the recipe is measured and less is worked
    /// out from it
    #[arg(long, value_name = "N", default_value_t = 60.0)]
    seconds: f64,
    /// Print the plan as one JSON object
    #[arg(long)]
    json: bool,
    /// One trial, for the process that plans: `stage,blocks,parts`
    #[arg(long, hide = true)]
    trial: Option<String>,
}

/// One run of a plan.
struct Planned {
    name: Option<String>,
    forecast: Forecast,
    trials: Vec<Trial>,
    whole: Extent,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if !(args.seconds.is_finite() && args.seconds >= 0.0) {
        return Err(Usage(anyhow::anyhow!("`--seconds {}`: a number from 0 on is needed", args.seconds)).into());
    }
    let changes = args.flags.changes();
    let recipe = changes.resolve(&args.flags.step.config)?;
    let runs = runs(&recipe)?;
    if let Some(which) = &args.trial {
        return one_trial(&runs, which, args.seconds);
    }
    changes.note_overruled(&recipe, "stage", &recipe.value.stages);
    let on_cpu = recipe.value.run.device == "cpu";
    device::parse(&recipe.value.run.device)?;
    let free = memory::available();
    let mut planned = Vec::new();
    for (i, (name, recipe)) in runs.iter().enumerate() {
        if let Some(name) = name {
            terminal::plain(&format!("stage      {} of {}: {name}", i + 1, runs.len()));
        }
        planned.push(plan(args, i, name.clone(), recipe, on_cpu, free)?);
    }
    if args.json {
        terminal::data(&as_json(&recipe, &planned, free).to_string());
    } else {
        terminal::data(&report(&recipe, &runs, &planned, free));
    }
    Ok(ExitCode::SUCCESS)
}

type Named = (Option<String>, Resolved<Recipe>);

/// The runs of a recipe: its stages, or itself.
fn runs(recipe: &Resolved<Recipe>) -> anyhow::Result<Vec<Named>> {
    if !recipe.value.students.is_empty() {
        return Err(Usage(anyhow::anyhow!(
            "recipe: `[[students]]` train beside each other, and what that takes is not worked out\n\nhint: plan each by \
             itself: `--set students=[]` and its values"
        ))
        .into());
    }
    let stages = stages::plan(recipe, Path::new("")).map_err(usage)?;
    match stages.is_empty() {
        true => Ok(vec![(None, recipe.clone())]),
        false => Ok(stages.into_iter().map(|stage| (Some(stage.name), stage.recipe)).collect()),
    }
}

/// What the process of a trial does: measure, and print the measurement.
fn one_trial(runs: &[Named], which: &str, seconds: f64) -> anyhow::Result<ExitCode> {
    let numbers: Option<Vec<usize>> = which.split(',').map(|number| number.parse().ok()).collect();
    let [stage, blocks, parts] = numbers.as_deref().unwrap_or_default() else {
        return Err(Usage(anyhow::anyhow!("`--trial {which}`: three numbers are needed")).into());
    };
    let Some((_, recipe)) = runs.get(*stage) else {
        return Err(Usage(anyhow::anyhow!("`--trial {which}`: the recipe has {} runs", runs.len())).into());
    };
    allocator::follow(&recipe.value);
    let device = device::parse(&recipe.value.run.device)?;
    let extent = Extent { blocks: *blocks, parts: *parts };
    let found = trial(recipe, extent, seconds, &device).map_err(usage)?;
    terminal::data(&serde_json::to_string(&found)?);
    Ok(ExitCode::SUCCESS)
}

/// Measures one run and works out what the whole of it takes.
fn plan(
    args: &Args,
    index: usize,
    name: Option<String>,
    recipe: &Resolved<Recipe>,
    on_cpu: bool,
    free: Option<u64>,
) -> anyhow::Result<Planned> {
    // What is measured has no warm-up and no learning rate: what is wrong with those is said before.
    let source = recipe.value.data.open().map_err(|e| usage(e.into()))?;
    recipe.value.plan(source.len()).map_err(usage)?;
    let whole = Extent::of(&recipe.value).map_err(usage)?;
    let mut first = forecast::first(whole);
    loop {
        let needed = least_bytes(&reduced(recipe, first).map_err(usage)?.value).map_err(usage)?;
        match free.filter(|free| needed > *free) {
            None => break,
            Some(_) if first.blocks > 1 => first.blocks = 1,
            Some(free) => {
                let all = least_bytes(&recipe.value).map_err(usage)?;
                anyhow::bail!(
                    "recipe: weights, moments and gradients alone take {} with one block of the backbone, {} with all {}, and \
                     {} are free: nothing can be measured here\n\nhint: set a smaller `model.arch` or fewer \
                     `dino_head.prototypes`, or plan on a machine with more memory",
                    bytes(needed),
                    bytes(all),
                    whole.blocks,
                    bytes(free)
                )
            }
        }
    }
    let try_it = |extent: Extent| {
        terminal::plain(&format!("measuring  {}", part(extent, whole)));
        in_a_process(args, index, extent)
    };
    let mut trials = vec![try_it(first)?];
    let further = forecast::further(whole, &trials[0], args.seconds, free);
    if further == [whole] {
        // Nothing that is worked out is better than the thing itself.
        trials = vec![try_it(whole)?];
    } else {
        for extent in further {
            trials.push(try_it(extent)?);
        }
    }
    let cores = if on_cpu { std::thread::available_parallelism()?.get() } else { 0 };
    let forecast = forecast(&recipe.value, &trials, cores).map_err(usage)?;
    Ok(Planned { name, forecast, trials, whole })
}

/// Free memory below which a trial is ended, as a share of what was free before it.
const LEAST_FREE: f64 = 0.03;

/// Runs a trial in a process of its own, and ends it before the machine is out of memory.
fn in_a_process(args: &Args, index: usize, extent: Extent) -> anyhow::Result<Trial> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["plan", "--config", &args.flags.step.config]);
    args.flags.changes().overrides().iter().for_each(|text| {
        command.args(["--set", text]);
    });
    let Extent { blocks, parts } = extent;
    // A sixth each: warming up, setting up and k-NN take their time too.
    let seconds = (args.seconds / 6.0).to_string();
    command.args(["--seconds", &seconds, "--trial", &format!("{index},{blocks},{parts}")]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let before = memory::available();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if let (Some(before), Some(now)) = (before, memory::available())
            && (now as f64) < LEAST_FREE * before as f64
        {
            child.kill()?;
            child.wait()?;
            anyhow::bail!(
                "recipe: {blocks} blocks and {parts} micro-batches take more than the {} that were free, and the measurement \
                 was ended\n\nhint: raise `efficiency.micro_batches`, set `efficiency.recompute = true` (transformers), or \
                 lower `train.batch_size`",
                bytes(before)
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let (output, errors) = said(&mut child)?;
    if status.success() {
        return Ok(serde_json::from_str(&output)?);
    }
    let message = errors.split_once("error: ").map_or(errors.trim(), |(_, message)| message.trim());
    let error = match message {
        "" => anyhow::anyhow!("the measurement of {blocks} blocks ended without a word: {status}"),
        message => anyhow::Error::msg(message.to_owned()),
    };
    Err(if status.code() == Some(2) { Usage(error).into() } else { error })
}

/// What a process that has ended wrote. Both are short: neither fills its pipe.
fn said(child: &mut Child) -> anyhow::Result<(String, String)> {
    let (mut output, mut errors) = (String::new(), String::new());
    child.stdout.take().expect("piped").read_to_string(&mut output)?;
    child.stderr.take().expect("piped").read_to_string(&mut errors)?;
    Ok((output, errors))
}

/// "2 of 12 blocks, 2 of 16 micro-batches".
fn part(extent: Extent, whole: Extent) -> String {
    let of = |some: usize, all: usize, what: &str| match some == all {
        true => format!("all {all} {what}"),
        false => format!("{some} of {all} {what}"),
    };
    if extent == whole {
        return "the whole recipe".to_owned();
    }
    let blocks = of(extent.blocks, whole.blocks, "blocks");
    if whole.parts == 1 { blocks } else { format!("{blocks}, {}", of(extent.parts, whole.parts, "micro-batches")) }
}

/// What can be set so that a run fits into `free` bytes.
fn remedies(recipe: &Recipe, forecast: &Forecast, free: u64) -> String {
    let (state, rest) = (forecast.state_bytes, forecast.peak_bytes.saturating_sub(forecast.state_bytes));
    if state >= free {
        return format!(
            "weights, moments and gradients alone take {}: set a smaller `model.arch` or fewer `dino_head.prototypes`",
            bytes(state)
        );
    }
    let (batch, parts) = (recipe.train.batch_size, recipe.efficiency.micro_batches);
    let factor = rest.div_ceil(free - state) as usize;
    let mut all = Vec::new();
    let backbone = recipe.model.resolve(recipe.augmentation.global_crop_size);
    if !recipe.efficiency.recompute && backbone.is_ok_and(|backbone| backbone.can_recompute()) {
        all.push("`efficiency.recompute = true`".to_owned());
    }
    if parts * factor <= batch {
        all.push(format!("`efficiency.micro_batches = {}`", parts * factor));
    }
    if batch / factor > 1 {
        all.push(format!("`train.batch_size = {}`", batch / factor));
    }
    match all.is_empty() {
        true => "set smaller crops or fewer `augmentation.local_crops`".to_owned(),
        false => format!("try {}", all.join(", or ")),
    }
}

fn report(recipe: &Resolved<Recipe>, runs: &[Named], planned: &[Planned], free: Option<u64>) -> String {
    let mut lines = vec![format!("recipe      {}, device {}", recipe.source, recipe.value.run.device)];
    for (run, (_, recipe)) in planned.iter().zip(runs) {
        let forecast = &run.forecast;
        let measured: Vec<String> = run.trials.iter().map(|trial| part(trial.extent, run.whole)).collect();
        if let Some(name) = &run.name {
            lines.push(format!("\nstage       {name}"));
        }
        lines.extend([
            format!("measured    {}", measured.join("; ")),
            format!(
                "length      {} steps of {} images of {}",
                count(forecast.steps),
                forecast.batch_size,
                count(run.trials[0].samples as u64)
            ),
            format!(
                "speed       {:.2} images/s: {:.3} s a step, {:.0} % of it waiting for images; {:.1} of {} cores busy",
                forecast.images_per_second,
                forecast.step_seconds,
                100.0 * forecast.data_wait,
                busy_cores(&run.trials),
                std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
            ),
            format!(
                "memory      {} at most: {} in weights, moments and gradients, the rest in activations and images",
                bytes(forecast.peak_bytes),
                bytes(forecast.state_bytes)
            ),
            format!(
                "time        {}: training {}, {} times k-NN of {} images {}, {} checkpoints {}",
                duration(seconds(forecast)),
                duration(forecast.training_seconds),
                forecast.evaluations,
                count(forecast.evaluated as u64),
                duration(forecast.evaluation_seconds),
                count(forecast.checkpoints),
                duration(forecast.checkpoint_seconds)
            ),
            format!(
                "disk        {} at the end, {} at most: {} checkpoints of {}, the teacher {}, metrics {}",
                bytes(forecast.disk_bytes),
                bytes(forecast.disk_peak_bytes),
                forecast.checkpoints_kept,
                bytes(forecast.checkpoint_bytes),
                bytes(forecast.teacher_bytes),
                bytes(forecast.metrics_bytes)
            ),
        ]);
        if let Some(free) = free.filter(|free| forecast.peak_bytes > *free) {
            lines.push(format!("warning: {} are free: {}", bytes(free), remedies(&recipe.value, forecast, free)));
        }
    }
    if planned.len() > 1 {
        let all = planned.iter().map(|run| seconds(&run.forecast)).sum();
        let disk = planned.iter().map(|run| run.forecast.disk_bytes).sum();
        lines.push(format!("\nall stages  {}, {} on disk", duration(all), bytes(disk)));
    }
    lines.join("\n")
}

/// Cores that the steps of the last trial kept busy. Fewer than there are, others were at work, or the steps waited.
fn busy_cores(trials: &[Trial]) -> f64 {
    trials.last().map_or(0.0, |trial| trial.processor_seconds / trial.step_seconds)
}

/// Seconds from the start of a run to its end.
fn seconds(forecast: &Forecast) -> f64 {
    forecast.training_seconds + forecast.evaluation_seconds + forecast.checkpoint_seconds
}

fn as_json(recipe: &Resolved<Recipe>, planned: &[Planned], free: Option<u64>) -> Value {
    let runs: Vec<Value> = planned
        .iter()
        .map(|run| json!({ "stage": run.name, "forecast": run.forecast, "trials": run.trials }))
        .collect();
    let sum = |of: fn(&Forecast) -> f64| planned.iter().map(|run| of(&run.forecast)).sum::<f64>();
    let peak = planned.iter().map(|run| run.forecast.peak_bytes).max();
    json!({
        "recipe": recipe.source,
        "device": recipe.value.run.device,
        "hours": sum(seconds) / 3600.0,
        "peak_bytes": peak,
        "free_bytes": free,
        "fits": free.zip(peak).map(|(free, peak)| peak <= free),
        "disk_bytes": planned.iter().map(|run| run.forecast.disk_bytes).sum::<u64>(),
        "runs": runs,
    })
}
