//! `dinoxide inspect`: what a weight file holds.

use std::path::PathBuf;
use std::process::ExitCode;

use burn::tensor::Device;
use dinoxide_model::weights::{WeightFile, load_backbone};
use serde_json::json;

use crate::table::{count, table};
use crate::terminal;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A weight file
    file: PathBuf,
    /// Print one JSON object on stdout and nothing else there
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // Loading checks that the tensors cover the backbone exactly.
    let (_, description) = load_backbone(&args.file, &Device::flex())?;
    let file = WeightFile::read(&args.file)?;
    let total: usize = file.tensors.values().map(|w| w.values.len()).sum();
    let norm = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    if args.json {
        let tensors: Vec<_> = file
            .tensors
            .iter()
            .map(|(name, w)| json!({ "name": name, "shape": w.shape, "norm": norm(&w.values) }))
            .collect();
        let result = json!({
            "file": args.file.display().to_string(),
            "architecture": description.architecture,
            "image_size": description.image_size,
            "mean": description.mean,
            "std": description.std,
            "provenance": description.provenance,
            "values": total,
            "tensors": tensors,
        });
        terminal::data(&serde_json::to_string_pretty(&result)?);
        return Ok(ExitCode::SUCCESS);
    }
    let p = &description.provenance;
    terminal::data(&format!("backbone   {}", description.architecture));
    terminal::data(&format!("trained    {} steps, {} images of {}", count(p.steps), count(p.images), p.data));
    terminal::data(&format!(
        "images     {} px, mean {:?}, std {:?}",
        description.image_size, description.mean, description.std
    ));
    terminal::data(&format!("written by {}", p.software));
    terminal::data(&format!("values     {}\n", count(total as u64)));
    let rows: Vec<Vec<String>> = file
        .tensors
        .iter()
        .map(|(name, w)| vec![name.clone(), format!("{:?}", w.shape), format!("{:.4}", norm(&w.values))])
        .collect();
    terminal::data(&table(&["tensor", "shape", "norm"], &rows));
    Ok(ExitCode::SUCCESS)
}
