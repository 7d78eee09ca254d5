//! `dinoxide eval`: evaluations of a weight file, each in a file of its own.

mod clustering;
pub(crate) mod common;
mod compare;
mod copies;
mod correspondence;
pub(crate) mod dense;
pub(crate) mod depth;
mod finetune;
mod foreground;
pub(crate) mod given;
mod knn;
mod linear;
mod logistic;
mod retrieval;
pub(crate) mod segmentation;
mod suite;
mod video;

use std::path::Path;
use std::process::ExitCode;

use dinoxide_model::weights::write_atomically;

use self::common::Measurement;
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
    match command {
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
    }
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

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    write_atomically(path, text.as_bytes()).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}
