//! `dinoxide bench`: how fast this machine trains a recipe.

use std::process::ExitCode;

use clap::Subcommand;
use dinoxide_trainer::measure::{Measured, measure};
use dinoxide_trainer::step::Timings;

use crate::recipes::StepFlags;
use crate::table::{bytes, count, table};
use crate::train::usage;
use crate::{Usage, allocator, device, terminal};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Take training steps on noise and show images per second, memory, and where the time goes. Nothing is written.
    Step(Args),
}

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    flags: StepFlags,
    /// Steps to measure, after two that are not counted
    #[arg(long, value_name = "N", default_value_t = 7)]
    steps: usize,
    /// Print the measurement as one JSON object
    #[arg(long)]
    json: bool,
}

/// Steps before the measured ones: the first sets memory aside.
const WARMUP: usize = 2;

pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    let Command::Step(args) = command;
    if args.steps == 0 {
        return Err(Usage(anyhow::anyhow!("`--steps 0`: at least one step has to be measured")).into());
    }
    let recipe = args.flags.changes().resolve(&args.flags.config)?;
    allocator::follow(&recipe.value);
    let device = device::parse(&recipe.value.run.device)?;
    for (parts, what) in [(&recipe.value.stages, "stages"), (&recipe.value.students, "students")] {
        if !parts.is_empty() {
            terminal::plain(&format!("note: measured is the recipe itself, without what its `[[{what}]]` set"));
        }
    }
    let mut taken = 0;
    let measured = measure(&recipe.value, &device, WARMUP, args.steps, &mut |seconds| {
        taken += 1;
        let what = if taken <= WARMUP { "warm-up" } else { "step" };
        terminal::plain(&format!("{what} {taken}/{}  {seconds:.3} s", WARMUP + args.steps));
    });
    let measured = measured.map_err(usage)?;
    if args.json {
        terminal::data(&json(&measured).to_string());
    } else {
        terminal::data(&report(&recipe.source, &measured));
    }
    Ok(ExitCode::SUCCESS)
}

type Part = (&'static str, fn(&Timings) -> f64);

/// The parts of a step with their names; what is left is masks, and pixels turned into numbers.
const PARTS: [Part; 5] = [
    ("teacher", |t| t.teacher),
    ("targets", |t| t.targets),
    ("student, losses", |t| t.student),
    ("backward", |t| t.backward),
    ("optimizer, teacher's mean", |t| t.update),
];

/// The median of numbers, of which there is at least one.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}

/// Images per second: median, lowest, highest.
fn rates(measured: &Measured) -> [f64; 3] {
    let rates = || measured.steps.iter().map(|(seconds, _)| measured.batch_size as f64 / seconds);
    [median(rates()), rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max)]
}

/// The seconds of a step of middling length, and of its parts by name.
fn middling(measured: &Measured) -> (f64, [(&'static str, f64); 5]) {
    let mut steps = measured.steps.clone();
    steps.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (seconds, timings) = steps[steps.len() / 2];
    (seconds, PARTS.map(|(name, of)| (name, of(&timings))))
}

fn report(source: &str, measured: &Measured) -> String {
    let [rate, lowest, highest] = rates(measured);
    let (whole, parts) = middling(measured);
    let row = |name: &str, seconds: f64| {
        vec![name.to_owned(), format!("{:.1}", 1e3 * seconds), format!("{:.1} %", 100.0 * seconds / whole)]
    };
    let rest = whole - parts.iter().map(|(_, seconds)| seconds).sum::<f64>();
    let mut rows: Vec<Vec<String>> = parts.iter().map(|(name, seconds)| row(name, *seconds)).collect();
    rows.push(row("masks, pixels", rest));
    rows.push(row("step", whole));
    format!(
        "recipe      {source}\nparameters  {}\nspeed       {rate:.2} images/s ({lowest:.2} to {highest:.2}), median of {} steps of {} \
         images\nmemory      {} at most{}\n\n{}",
        count(measured.parameters as u64),
        measured.steps.len(),
        measured.batch_size,
        bytes(measured.peak_memory_bytes),
        measured.device_memory_bytes.map_or(String::new(), |held| format!(", {} on the device", bytes(held))),
        table(&["", "ms", "share"], &rows)
    )
}

fn json(measured: &Measured) -> serde_json::Value {
    let [rate, lowest, highest] = rates(measured);
    let (_, parts) = middling(measured);
    serde_json::json!({
        "images_per_second": rate,
        "lowest": lowest,
        "highest": highest,
        "peak_bytes": measured.peak_memory_bytes,
        "device_bytes": measured.device_memory_bytes,
        "seconds": parts.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
    })
}
