//! `dinoxide eval`: frozen-feature evaluations of a weight file, each in a file of its own.

mod common;
pub(crate) mod dense;
pub(crate) mod depth;
mod foreground;
mod knn;
mod linear;
pub(crate) mod segmentation;
mod video;

use std::path::Path;
use std::process::ExitCode;

use dinoxide_model::weights::write_atomically;
use serde::Serialize;

use self::common::Common;
use crate::{Usage, terminal};

/// The evaluations. Each reads the architecture from the weight file.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Weighted k-nearest neighbours on CLS tokens
    Knn(knn::Args),
    /// Linear classifiers on CLS and mean patch tokens, for a grid of learning rates and layers at once
    Linear(linear::Args),
    /// Semantic segmentation by a linear head on patch tokens: mIoU on folders of images and masks
    Segmentation(segmentation::Args),
    /// Depth by a linear head on patch tokens: RMSE, AbsRel and δ on folders of images and depth maps
    Depth(depth::Args),
    /// Masks of a first frame carried through videos by patch tokens: J, F and J&F
    Video(video::Args),
    /// Figure and ground by a linear classifier, by attention and by the first principal component
    Foreground(foreground::Args),
}

pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Knn(args) => knn::run(args),
        Command::Linear(args) => linear::run(args),
        Command::Segmentation(args) => segmentation::run(args),
        Command::Depth(args) => depth::run(args),
        Command::Video(args) => video::run(args),
        Command::Foreground(args) => foreground::run(args),
    }
}

/// Prints a result, and writes it where asked.
fn deliver(common: &Common, result: &impl Serialize, text: &str) -> anyhow::Result<ExitCode> {
    deliver_to(common.output.as_deref(), common.json, result, text)
}

/// Prints a result as text or JSON, and writes it to `output`, if given.
fn deliver_to(output: Option<&Path>, json: bool, result: &impl Serialize, text: &str) -> anyhow::Result<ExitCode> {
    let pretty = serde_json::to_string_pretty(result)?;
    if let Some(path) = output {
        write(path, &pretty)?;
    }
    terminal::data(if json { &pretty } else { text });
    Ok(ExitCode::SUCCESS)
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    if path.is_dir() {
        return Err(Usage(anyhow::anyhow!("{}: is a folder, not a file to write", path.display())).into());
    }
    write_atomically(path, text.as_bytes()).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}
