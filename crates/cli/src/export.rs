//! `dinoxide export`: a backbone in the format of another library.

use std::path::PathBuf;
use std::process::ExitCode;

use burn::tensor::Device;
use dinoxide_exchange::{export, load};

use crate::terminal;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Weights of any kind that `inspect` shows: a run's `teacher.safetensors`, a `.pth` file, a Hugging Face folder
    #[arg(long, value_name = "PATH")]
    weights: PathBuf,
    /// What to write
    #[arg(long, value_name = "FORMAT")]
    format: Format,
    /// The file, or with `hf` the folder, to write
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    /// A safetensors file with the names of the DINO repositories, as training writes it
    Safetensors,
    /// A folder for Hugging Face transformers, read with `AutoModel.from_pretrained`
    Hf,
    /// A `.pth` file with the names of the DINO repositories, read with `torch.load`
    Meta,
    /// A safetensors file with timm's names
    Timm,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let format = match args.format {
        Format::Safetensors => dinoxide_exchange::Format::Safetensors,
        Format::Hf => dinoxide_exchange::Format::HuggingFace,
        Format::Meta => dinoxide_exchange::Format::Meta,
        Format::Timm => dinoxide_exchange::Format::Timm,
    };
    let loaded = load(&args.weights, &Device::flex())?;
    terminal::notes(&args.weights, &loaded.notes);
    let notes = export(&loaded.backbone, &loaded.description, format, &args.output)?;
    terminal::notes(&args.output, &notes);
    terminal::plain(&format!("wrote {}, read back and compared", args.output.display()));
    Ok(ExitCode::SUCCESS)
}
