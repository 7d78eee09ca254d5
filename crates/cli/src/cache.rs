//! `dinoxide cache`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use dinoxide_trainer::cache::write;
use serde_json::json;

use crate::table::{bytes, count};
use crate::terminal::{self, Log};
use crate::{device, exit, recipes, train};

/// Write a frozen teacher's tokens once, for students that then need no teacher.
///
/// Crops depend on the seed, the image and the epoch alone, so what a teacher says of them can be kept:
/// `dinoxide cache --config R --teacher T --data D --output tokens/`, then
/// `dinoxide train --config R --teacher T --data D --set distillation.cache=tokens/`. A second call goes on where the first
/// was stopped.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Recipe of the students: a file, or the name of a built-in one
    #[arg(long, value_name = "RECIPE")]
    config: String,
    /// Images that the students will see. Replaces `data.source`
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// The teacher: a run directory, or weights of any supported format. Replaces `distillation.teacher`
    #[arg(long, value_name = "PATH")]
    teacher: Option<String>,
    /// Folder for the tokens; half a megabyte an image for a ViT-B/16 at 224 px
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Override any value of the recipe; the students' must be the same
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object on stdout and nothing else there
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let text = |value: &str| serde_json::Value::from(value).to_string();
    let mut overrides = Vec::new();
    let mut push =
        |key: &str, value: Option<&str>| overrides.extend(value.map(|value| format!("{key}={}", text(value))));
    push("data.source", args.data.as_deref());
    push("distillation.teacher", args.teacher.as_deref());
    overrides.extend(args.set.iter().cloned());
    let recipe = recipes::resolve(&args.config, &overrides)?;
    let device = device::parse(&recipe.value.run.device)?;
    let stop = Arc::new(AtomicBool::new(false));
    train::stop_on_interrupt(&stop)?;
    let mut log = Log::new(None)?;
    let mut total = 0;
    let written = write(&recipe, &args.output, &device, &stop, &mut |done, of| {
        if total != of {
            total = of;
            log.bar(of, done, "{bar:28} tokens of {pos}/{len} images, {eta} left");
        }
        log.set(done, String::new());
    });
    log.clear();
    let written = written.map_err(train::usage)?;
    let result = json!({
        "images": written.positions,
        "bytes": written.bytes,
        "interrupted": written.interrupted,
        "output": args.output.display().to_string(),
    });
    if args.json {
        terminal::data(&result.to_string());
    } else {
        let state = if written.interrupted { "stopped after" } else { "wrote" };
        let (images, size) = (count(written.positions), bytes(written.bytes));
        terminal::data(&format!("{state} the tokens of {images} images, {size}, in {}", args.output.display()));
    }
    Ok(if written.interrupted { ExitCode::from(exit::INTERRUPTED) } else { ExitCode::SUCCESS })
}
