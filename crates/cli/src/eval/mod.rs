//! `dinoxide eval`: evaluations of a weight file, each in a file of its own.

mod clustering;
mod compare;
mod copies;
mod correspondence;
pub(crate) mod dense;
pub(crate) mod depth;
mod finetune;
mod foreground;
pub(crate) mod frozen;
pub(crate) mod given;
mod knn;
mod linear;
mod logistic;
mod measurement;
mod outcome;
mod retrieval;
pub(crate) mod segmentation;
pub(crate) mod sets;
mod suite;
mod video;

use std::fmt::Display;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::process::ExitCode;

use dinoxide_evaluation::EvaluationError;
use dinoxide_model::weights::write_atomically;
use serde_json::Value;

use self::measurement::Measurement;
use crate::Usage;

/// The evaluations. Each reads the architecture from the weight file.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Weighted k-nearest neighbours on CLS tokens; also with a few train images of each class
    Knn(Measurement<knn::Task>),
    /// Linear classifiers on CLS and mean patch tokens, for a grid of learning rates and layers at once
    Linear(Measurement<linear::Task>),
    /// The whole backbone trained with a linear classifier, with a learning rate for each layer
    Finetune(Measurement<finetune::Task>),
    /// Logistic regression on CLS tokens, to convergence, for a grid of penalties
    Logistic(Measurement<logistic::Task>),
    /// Images of the same class or instance found by similarity: mAP, recall; landmarks of revisited Oxford and Paris
    Retrieval(Measurement<retrieval::Task>),
    /// k-means on CLS tokens, compared with the classes
    Clustering(Measurement<clustering::Task>),
    /// Originals of edited copies found by similarity: micro-AP, mAP; copies from a folder, or made
    Copies(Measurement<copies::Task>),
    /// Several evaluations from a file, with one pass for the features, in one table
    Suite(suite::Args),
    /// Two results side by side, if they were measured alike
    Compare(compare::Args),
    /// Semantic segmentation by a linear or DPT head on patch tokens: mIoU on folders of images and masks
    Segmentation(dense::Scored<segmentation::Task>),
    /// Depth by a linear or DPT head on patch tokens: RMSE, AbsRel and δ on folders of images and depth maps
    Depth(dense::Scored<depth::Task>),
    /// Masks of a first frame carried through videos by patch tokens: J, F and J&F
    Video(dense::Scored<video::Task>),
    /// Silhouettes or keypoints carried from image to image by similar patch tokens: IoU, PCK
    Correspondence(dense::Scored<correspondence::Task>),
    /// Figure and ground by a linear classifier, by attention and by the first principal component
    Foreground(dense::Scored<foreground::Task>),
}

pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    let outcome = match command {
        Command::Knn(measurement) => measurement.run(),
        Command::Linear(measurement) => measurement.run(),
        Command::Finetune(measurement) => measurement.run(),
        Command::Logistic(measurement) => measurement.run(),
        Command::Retrieval(measurement) => measurement.run(),
        Command::Clustering(measurement) => measurement.run(),
        Command::Copies(measurement) => measurement.run(),
        Command::Suite(args) => suite::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Segmentation(scored) => scored.run(),
        Command::Depth(scored) => scored.run(),
        Command::Video(scored) => scored.run(),
        Command::Correspondence(scored) => scored.run(),
        Command::Foreground(scored) => scored.run(),
    };
    outcome.map_err(by_flag)
}

/// An error about a setting names the flag that gives it, which may be called otherwise. Other errors stay as they are.
pub(crate) fn by_flag(error: anyhow::Error) -> anyhow::Error {
    let inner = error.downcast_ref::<Usage>().map_or(&error, |usage| &usage.0);
    let Some(EvaluationError::Setting { task, key, value, expected }) = inner.downcast_ref::<EvaluationError>() else {
        return error;
    };
    let flag = match (*task, *key) {
        (_, "batch_size") => "samples".to_owned(),
        ("finetune", "learning_rate") | (_, "learning_rates") => "lr".to_owned(),
        (_, "selection.held_out.fraction") => "held-out".to_owned(),
        ("depth", "range") => "min-depth` to `--max-depth".to_owned(),
        ("depth", "scale") => "depth-scale".to_owned(),
        (_, key) => key.replace('_', "-"),
    };
    Usage(anyhow::anyhow!("{task}: `--{flag}` is {value}, it must be {expected}")).into()
}

/// Refuses a path at which no file can be written, before anything is measured.
pub(crate) fn check_writable(path: &Path) -> anyhow::Result<()> {
    let refuse = |path: &Path, why: &str| Err(Usage(anyhow::anyhow!("{}: {why}", path.display())).into());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if path.is_dir() {
        return refuse(path, "is a folder, not a file to write");
    }
    if folder.is_dir() { Ok(()) } else { refuse(folder, "no such folder to write to") }
}

/// Refuses a path at which no result can be written, or at which something else is, before anything is measured.
pub(crate) fn check_result(path: &Path) -> anyhow::Result<()> {
    check_replaceable(path, "--output", "a result of `dinoxide eval`", |file| {
        serde_json::from_reader::<_, Value>(BufReader::new(file)).is_ok_and(|value| compare::is_written(&value))
    })
}

/// Refuses a list that has a value twice.
fn check_distinct<T: Display + PartialEq>(task: &str, flag: &str, values: &[T]) -> anyhow::Result<()> {
    match values.iter().enumerate().find(|(at, value)| values[..*at].contains(value)) {
        Some((_, twice)) => {
            let message = format!("{task}: `{flag}` has {twice} twice, it must be a list of different values");
            Err(Usage(anyhow::anyhow!(message)).into())
        }
        None => Ok(()),
    }
}

/// Refuses to write over a file unless `is_ours` says that the same command wrote it: a name given by mistake would cost
/// the weights, a list or an image.
pub(crate) fn check_replaceable(
    path: &Path,
    flag: &str,
    what: &str,
    is_ours: impl FnOnce(File) -> bool,
) -> anyhow::Result<()> {
    check_writable(path)?;
    if !path.exists() || path.is_file() && File::open(path).is_ok_and(is_ours) {
        return Ok(());
    }
    let path = path.display();
    Err(Usage(anyhow::anyhow!(
        "{path}: is there and is not {what}, so it is not overwritten\n\nhint: choose another name for `{flag}`"
    ))
    .into())
}

/// What the header of a safetensors file has under `key` of its metadata, where that is JSON. No tensor is read.
pub(crate) fn header_entry(mut file: File, key: &str) -> Option<Value> {
    let available = file.metadata().ok()?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let length = u64::from_le_bytes(length);
    if length > available {
        return None;
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).ok()?;
    let header: Value = serde_json::from_slice(&header).ok()?;
    serde_json::from_str(header["__metadata__"][key].as_str()?).ok()
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    write_atomically(path, text.as_bytes()).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}
