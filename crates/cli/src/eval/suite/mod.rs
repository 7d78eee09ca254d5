//! `dinoxide eval suite`: several evaluations from a file, of one backbone or of several side by side, in one table.

mod file;
mod summary;

use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

use serde_json::{Value, json};

use self::file::{Evaluation, parse};
use self::summary::{Column, Failure, is_table, letter, markdown};
use super::compare::unlike;
use super::frozen::{Crops, Frozen};
use super::given::Given;
use super::{by_flag, check_replaceable, check_result, write};
use crate::{Usage, is_usage, terminal};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The evaluations, in TOML: a table `[[task]]` for each, with its name as `task` and its flags as keys
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Weights: a run directory, its `teacher.safetensors`, one of its checkpoints, a `.pth` file of the DINO repositories, a
    /// Hugging Face folder, a timm file.
    /// Given several times, each has a column of the table
    #[arg(long, value_name = "PATH", required = true)]
    weights: Vec<PathBuf>,
    /// Where to compute: `cpu`, `cuda:0`, `vulkan:0`, `wgpu:0`, `metal`
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    #[command(flatten)]
    crops: Crops,
    /// Also write all results here as JSON, to be compared with those of another backbone
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Also write the table here as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Print one JSON object on stdout and nothing else there
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let usage = |e: &dyn std::fmt::Display| Usage(anyhow::anyhow!("{}: {e}", args.config.display()));
    let text = std::fs::read_to_string(&args.config).map_err(|e| usage(&e))?;
    let tasks = parse(&text).map_err(|e| usage(&e))?;
    args.output.as_deref().map_or(Ok(()), check_result)?;
    if let Some(path) = &args.markdown {
        check_replaceable(path, "--markdown", "the table of a suite", is_table)?;
    }
    let backbones =
        args.weights.iter().map(|weights| Given::load(weights, &args.device)).collect::<anyhow::Result<Vec<_>>>()?;
    check_side_by_side(&backbones, &args.crops, &tasks)?;
    let columns =
        backbones.iter().map(|given| measure(given, &args.crops, &tasks)).collect::<anyhow::Result<Vec<_>>>()?;
    let failed: Vec<&Failure> =
        columns.iter().flat_map(|column| column.outcomes.iter().flat_map(|o| o.as_ref().err())).collect();
    let all = columns.len() * tasks.len();
    if failed.len() < all {
        deliver(args, &tasks, &columns)?;
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let named: Vec<String> =
        columns.iter().enumerate().flat_map(|(i, column)| column.failures(i, columns.len())).collect();
    let message = anyhow::anyhow!(
        "{}: {} of {all} evaluations failed\n{}",
        args.config.display(),
        failed.len(),
        named.join("\n")
    );
    Err(if failed.iter().all(|failure| failure.usage) { Usage(message).into() } else { message })
}

/// Refuses backbones that would see images of different sizes, before anything is measured.
fn check_side_by_side(backbones: &[Rc<Given>], crops: &Crops, tasks: &[Evaluation]) -> anyhow::Result<()> {
    const MOST: usize = 26;
    if backbones.len() > MOST {
        return Err(Usage(anyhow::anyhow!("{} weights, a table has at most {MOST} columns", backbones.len())).into());
    }
    let (first, others) = backbones.split_first().expect("clap requires one");
    let side = crops.crop_px(first);
    match others.iter().find(|other| crops.crop_px(other) != side) {
        Some(other) if tasks.iter().any(|task| task.blocks().is_some()) => Err(Usage(anyhow::anyhow!(
            "{} was trained at {side} px, {} at {}: side by side they would see different crops\n\nhint: give one size for all with `--crop`",
            first.weights,
            other.weights,
            crops.crop_px(other)
        ))
        .into()),
        _ => Ok(()),
    }
}

/// All evaluations of a backbone. One that fails is named, and the others go on.
fn measure(given: &Rc<Given>, crops: &Crops, tasks: &[Evaluation]) -> anyhow::Result<Column> {
    let blocks = tasks.iter().filter_map(Evaluation::blocks).max().unwrap_or(1);
    let mut frozen = Frozen::of(Rc::clone(given), crops, blocks)?;
    let mut outcomes = Vec::with_capacity(tasks.len());
    for (number, task) in (1..).zip(tasks) {
        let place = format!("{number}/{}  {}", tasks.len(), task.name());
        let outcome = task.run(&mut frozen).map_err(by_flag).map_err(|error| Failure {
            place: format!("task {number}, {}", task.name()),
            message: error.to_string(),
            usage: is_usage(&error),
        });
        frozen.log.clear();
        terminal::plain(&match &outcome {
            Ok(outcome) => format!("{place}: {}", outcome.data),
            Err(failure) => format!("{place} failed: {}", failure.first_line()),
        });
        outcomes.push(outcome);
    }
    Ok(Column { given: Rc::clone(given), outcomes })
}

/// Prints the table or the JSON object, and writes both where asked.
fn deliver(args: &Args, tasks: &[Evaluation], columns: &[Column]) -> anyhow::Result<()> {
    let names: Vec<&str> = tasks.iter().map(Evaluation::name).collect();
    let notes = differences(columns);
    notes.iter().for_each(|note| terminal::plain(&format!("warning: {note}")));
    let mut all = match columns {
        [one] => one.json(),
        several => json!({ "backbones": several.iter().map(Column::json).collect::<Vec<Value>>() }),
    };
    all["task"] = json!("suite");
    if !notes.is_empty() {
        all["not_measured_alike"] = json!(notes);
    }
    let pretty = serde_json::to_string_pretty(&all)?;
    let table = markdown(&names, columns, &notes);
    for (path, contents) in [(&args.output, &pretty), (&args.markdown, &table)] {
        if let Some(path) = path {
            write(path, contents)?;
        }
    }
    terminal::data(if args.json { &pretty } else { table.trim_end() });
    Ok(())
}

/// The fields in which protocols of one task differ from backbone to backbone, such as a window that is not as large in whole
/// patches.
fn differences(columns: &[Column]) -> Vec<String> {
    let (first, others) = columns.split_first().expect("a column");
    let mut notes = Vec::new();
    for (i, other) in (1..).zip(others) {
        for (a, b) in first.outcomes.iter().zip(&other.outcomes) {
            if let (Ok(a), Ok(b)) = (a, b) {
                let fields = unlike(a.task, &a.protocol, &b.protocol, &[]);
                notes
                    .extend(fields.iter().map(|field| format!("A and {} were not measured alike: {field}", letter(i))));
            }
        }
    }
    notes
}
