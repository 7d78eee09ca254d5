//! `dinoxide export`: a backbone in the format of another library.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use burn::tensor::Device;
use dinoxide_exchange::{Loaded, check_output, export, load};
use dinoxide_model::Fingerprint;
use dinoxide_onnx::{ImageSize, Input, Options};

use crate::{Usage, terminal};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Weights of any kind that `inspect` shows: a run directory, its `teacher.safetensors` or a checkpoint, a `.pth` file, a Hugging
    /// Face folder
    #[arg(long, value_name = "PATH")]
    weights: PathBuf,
    /// What to write
    #[arg(long, value_name = "FORMAT")]
    format: Format,
    /// The file, or with `hf` the folder, to write
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
    /// With `onnx`, the images that the file takes: `224`, `224x448` (height first) or `dynamic` for every size that the
    /// backbone takes. Unless given, those of the size that the backbone was trained on
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    image_size: Option<ImageSize>,
    /// With `onnx`, the file takes normalised images. Unless given, it takes RGB on [0, 1] and normalises it itself
    #[arg(long)]
    normalized_input: bool,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Format {
    /// A safetensors file with the names of the DINO repositories, as training writes it
    Safetensors,
    /// A folder for Hugging Face transformers, read with `AutoModel.from_pretrained`
    Hf,
    /// A `.pth` file with the names of the DINO repositories, read with `torch.load`
    Meta,
    /// A safetensors file with timm's names
    Timm,
    /// An ONNX file of the backbone's features, for runtimes without PyTorch
    Onnx,
}

fn parse_size(text: &str) -> Result<ImageSize, String> {
    if text == "dynamic" {
        return Ok(ImageSize::Dynamic);
    }
    let (height, width) = text.split_once('x').unwrap_or((text, text));
    match (height.parse(), width.parse()) {
        (Ok(height), Ok(width)) if height > 0 && width > 0 => Ok(ImageSize::Fixed { height, width }),
        _ => Err("expected `224`, `224x448` (height first) or `dynamic`".to_owned()),
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let format = match args.format {
        Format::Safetensors => Some(dinoxide_exchange::Format::Safetensors),
        Format::Hf => Some(dinoxide_exchange::Format::HuggingFace),
        Format::Meta => Some(dinoxide_exchange::Format::Meta),
        Format::Timm => Some(dinoxide_exchange::Format::Timm),
        Format::Onnx => None,
    };
    if format.is_some() && (args.image_size.is_some() || args.normalized_input) {
        bail!(Usage(anyhow::anyhow!(
            "`--image-size` and `--normalized-input` are for `--format onnx`: other formats hold weights, not a graph"
        )));
    }
    // ONNX is a file, as safetensors is.
    check_output(format.unwrap_or(dinoxide_exchange::Format::Safetensors), &args.output)?;
    let same = |path: &std::path::Path| path.canonicalize().ok();
    if args.output.exists() && same(&args.output) == same(&args.weights) {
        bail!(Usage(anyhow::anyhow!(
            "`--output {}` is what `--weights` names: it would be overwritten\n\nhint: give another `--output`",
            args.output.display()
        )));
    }
    let loaded = load(&args.weights, &Device::flex())?;
    terminal::notes(&args.weights, &loaded.notes);
    let Some(format) = format else { return onnx(args, loaded) };
    let notes = export(&loaded.backbone, &loaded.description, format, &args.output)?;
    terminal::notes(&args.output, &notes);
    terminal::plain(&format!("wrote {}, read back and compared", args.output.display()));
    Ok(ExitCode::SUCCESS)
}

fn onnx(args: &Args, Loaded { backbone, mut description, .. }: Loaded) -> anyhow::Result<ExitCode> {
    description.fingerprint = Fingerprint::of(&backbone);
    let side = description.image_size;
    let size = args.image_size.unwrap_or(ImageSize::Fixed { height: side, width: side });
    let input = if args.normalized_input { Input::Normalized } else { Input::Rgb };
    let report = dinoxide_onnx::export(&backbone, &description, &Options { size, input }, &args.output)?;
    terminal::plain(&format!(
        "wrote {}, run in another runtime and compared: largest deviation {:.1e} of {:.0e} allowed",
        args.output.display(),
        report.max_deviation(),
        dinoxide_onnx::TOLERANCE
    ));
    Ok(ExitCode::SUCCESS)
}
