//! `dinoxide inspect`: what weights hold, whatever library wrote them.

use std::path::PathBuf;
use std::process::ExitCode;

use burn::tensor::Device;
use dinoxide_exchange::{Loaded, Verdict, load};
use dinoxide_model::weights::reference_tensors;
use serde_json::{Value, json};

use crate::table::{count, table};
use crate::terminal;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A weight file or folder: a run directory, its `teacher.safetensors` or a checkpoint, a `.pth` file, a Hugging Face folder, a
    /// timm file
    #[arg(value_name = "PATH")]
    file: PathBuf,
    /// Print one JSON object on stdout and nothing else there
    #[arg(long)]
    json: bool,
}

/// The parts of a tensor's name, by which blocks are sorted as numbers: 2 before 10.
fn parts(name: &str) -> Vec<(Option<usize>, &str)> {
    name.split('.').map(|part| (part.parse().ok(), part)).collect()
}

/// A protocol as `key value` pairs: a line for each of its parts, and one for what is not in a part.
fn protocol_lines(protocol: &Value) -> Vec<String> {
    let (mut lines, mut rest) = (Vec::new(), Vec::new());
    for (key, value) in protocol.as_object().into_iter().flatten() {
        let mut found = Vec::new();
        pairs(key, value, &mut found);
        match value.is_object() || value.is_array() {
            true => lines.push(format!("{key:<10} {}", found.join(", "))),
            false => rest.extend(found),
        }
    }
    lines.push(format!("{:<10} {}", "measured", rest.join(", ")));
    lines
}

/// The leaves of a value as `key value`. A list of plain values is one, and what is not there none.
fn pairs(key: &str, value: &Value, found: &mut Vec<String>) {
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match value {
        Value::Null => {}
        Value::Object(fields) => fields.iter().for_each(|(key, value)| pairs(key, value, found)),
        Value::Array(items) if items.iter().any(Value::is_object) => {
            items.iter().for_each(|item| pairs(key, item, found));
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(plain).collect();
            found.push(format!("{key} {}", items.join(" ")));
        }
        value => found.push(format!("{key} {}", plain(value))),
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // Loading checks that the tensors cover the backbone exactly, and the fingerprint.
    let Loaded { backbone, description, format, notes, verdict } = load(&args.file, &Device::flex())?;
    let mut tensors: Vec<_> = reference_tensors(&backbone).into_iter().collect();
    tensors.sort_by(|(a, _), (b, _)| parts(a).cmp(&parts(b)));
    let total: usize = tensors.iter().map(|(_, w)| w.values.len()).sum();
    let norm = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let provenance = &description.provenance;
    if args.json {
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, w)| json!({ "name": name, "shape": w.shape, "norm": norm(&w.values) }))
            .collect();
        let result = json!({
            "file": args.file.display().to_string(),
            "format": format,
            "architecture": description.architecture,
            "image_size": description.image_size,
            "mean": description.mean,
            "std": description.std,
            "provenance": provenance.is_known().then_some(provenance),
            "fingerprint": match verdict {
                Verdict::Exact => "exact",
                Verdict::Near => "near",
                Verdict::Absent => "absent",
            },
            "notes": notes,
            "values": total,
            "tensors": tensors,
        });
        terminal::data(&serde_json::to_string_pretty(&result)?);
        return Ok(ExitCode::SUCCESS);
    }
    terminal::data(&format!("backbone     {}", description.architecture));
    terminal::data(&format!("format       {format}"));
    if provenance.is_known() {
        let (steps, images) = (count(provenance.steps), count(provenance.images));
        terminal::data(&format!("trained      {steps} steps, {images} images of {}", provenance.data));
        terminal::data(&format!("recipe       {}", provenance.recipe));
        terminal::data(&format!("written by   {}", provenance.software));
        for score in &provenance.scores {
            terminal::data(&format!(
                "score        {} {:.2} % after {} steps",
                score.name,
                score.value,
                count(score.steps)
            ));
            protocol_lines(&score.protocol).iter().for_each(|line| terminal::data(&format!("  {line}")));
        }
    }
    terminal::data(&format!(
        "images       {} px, mean {:?}, std {:?}",
        description.image_size, description.mean, description.std
    ));
    terminal::data(match verdict {
        Verdict::Exact => "fingerprint  agrees: the same parameters, the same features",
        Verdict::Near => "fingerprint  agrees: the same features, from weights in less than single precision",
        Verdict::Absent => "fingerprint  none",
    });
    terminal::data(&format!("values       {}", count(total as u64)));
    notes.iter().for_each(|note| terminal::data(&format!("note         {note}")));
    let rows: Vec<Vec<String>> = tensors
        .iter()
        .map(|(name, w)| vec![name.clone(), format!("{:?}", w.shape), format!("{:.4}", norm(&w.values))])
        .collect();
    terminal::data(&format!("\n{}", table(&["tensor", "shape", "norm"], &rows)));
    Ok(ExitCode::SUCCESS)
}
