//! `dinoxide viz`: pictures of what a backbone sees, as PNG files.

mod attention;
mod canvas;
mod dense;
mod neighbors;
mod paint;
mod pca;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dinoxide_data::{DecodeLimits, ReadError, Rejected, decode_file, open};
use dinoxide_evaluation::EvaluationError;
use image::RgbImage;

use crate::eval::dense::{DenseSetup, Seen, warn};
use crate::eval::given::Weights;
use crate::eval::{by_flag, depth, segmentation};
use crate::terminal::{self, Log};

/// The pictures.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Principal components of patch tokens as colours
    Pca(pca::Args),
    /// What CLS attends to in the last block, head by head
    Attention(attention::Args),
    /// Norms of patch tokens before the final norm: outliers show
    Norms(attention::Args),
    /// The nearest neighbours of images by their CLS tokens
    Neighbors(neighbors::Args),
    /// Predictions of a segmentation head beside the masks
    Segmentation(dense::Args<segmentation::Task>),
    /// Predictions of a depth head beside the depth maps
    Depth(dense::Args<depth::Task>),
}

/// Where a picture goes and how large it is.
#[derive(clap::Args)]
struct Output {
    /// The picture, a PNG file
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Height of a tile, in pixels
    #[arg(
        long,
        value_name = "PX",
        default_value_t = 176,
        value_parser = clap::value_parser!(u32).range(16..=2048)
    )]
    tile: u32,
}

impl Output {
    fn save(&self, sheet: &canvas::Sheet) -> anyhow::Result<ExitCode> {
        sheet.save(self.tile, &self.output)?;
        terminal::plain(&format!("wrote {}", self.output.display()));
        Ok(ExitCode::SUCCESS)
    }
}

/// Images to look at.
#[derive(clap::Args)]
struct Images {
    #[command(flatten)]
    given: Weights,
    #[command(flatten)]
    seen: Seen,
    /// Images: a folder, one image file, or `synthetic`
    #[arg(long, value_name = "PATH")]
    data: String,
    /// How many of them, evenly spread over the folder
    #[arg(
        long,
        value_name = "N",
        default_value_t = 6,
        value_parser = clap::value_parser!(u64).range(1..=100)
    )]
    count: u64,
}

impl Images {
    /// The images, with their names. Those of a folder that cannot be read are left out with a warning.
    fn read(&self) -> anyhow::Result<Vec<(String, RgbImage)>> {
        let limits = DecodeLimits::default();
        let path = Path::new(&self.data);
        if path.is_file() {
            let image = decode_file(path, &limits).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
            return Ok(vec![(file_name(&self.data), image)]);
        }
        let source = open(&self.data, &limits)?;
        let (mut images, mut rejected) = (Vec::new(), Vec::new());
        for index in spread(source.len(), source.len().min(self.count as usize)) {
            match source.read(index) {
                Ok(image) => images.push((file_name(&source.id(index)), image)),
                Err(error) => rejected.push(unreadable(index, error)),
            }
        }
        leave_out(rejected, images.len())?;
        Ok(images)
    }
}

/// An image that cannot be shown.
fn unreadable(index: usize, error: ReadError) -> Rejected {
    Rejected { index, id: error.id, reason: error.reason.to_string() }
}

/// Lists what cannot be read, beside which there must be something to show.
fn leave_out(rejected: Vec<Rejected>, shown: usize) -> anyhow::Result<()> {
    if shown == 0 {
        return Err(EvaluationError::NothingReadable { rejected }.into());
    }
    warn(&mut Log::new(None)?, &rejected);
    Ok(())
}

/// `count` indices below `len`, evenly spread.
fn spread(len: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |i| (2 * i + 1) * len / (2 * count))
}

/// The last part of a path.
fn file_name(id: &str) -> String {
    id.rsplit('/').next().unwrap_or(id).to_owned()
}

/// What a picture says of its weights.
fn weights_note(setup: &DenseSetup) -> String {
    let architecture = &setup.given.description.architecture;
    let provenance = &setup.given.description.provenance;
    let trained = if provenance.is_known() {
        format!(", {} steps on {}", crate::table::count(provenance.steps), file_name(&provenance.data))
    } else {
        String::new()
    };
    format!("{} ({architecture}{trained})", file_name(&setup.given.weights))
}

pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    let outcome = match command {
        Command::Pca(args) => pca::run(args),
        Command::Attention(args) => attention::run_attention(args),
        Command::Norms(args) => attention::run_norms(args),
        Command::Neighbors(args) => neighbors::run(args),
        Command::Segmentation(args) => dense::run_segmentation(args),
        Command::Depth(args) => dense::run_depth(args),
    };
    outcome.map_err(by_flag)
}
