//! `dinoxide cache`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use dinoxide_trainer::cache::write;
use serde_json::json;

use crate::recipes::{Changes, quoted};
use crate::table::{bytes, count};
use crate::terminal::{self, Log};
use crate::{device, exit, train};

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
    let mut changes = Changes::of(&args.set);
    changes.add("--data", "data.source", args.data.as_deref().map(quoted));
    changes.add("--teacher", "distillation.teacher", args.teacher.as_deref().map(quoted));
    let recipe = changes.resolve(&args.config)?;
    let device = device::parse(&recipe.value.run.device)?;
    let stop = Arc::new(AtomicBool::new(false));
    train::stop_on_interrupt(&stop, "file")?;
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
        "images_there_before": written.kept,
        "bytes": written.bytes,
        "interrupted": written.interrupted,
        "output": args.output.display().to_string(),
    });
    if args.json {
        terminal::data(&result.to_string());
    } else {
        let state = if written.interrupted { "stopped after" } else { "wrote" };
        let before = match written.kept {
            0 => String::new(),
            kept => format!(" ({} were there)", count(kept)),
        };
        let (images, size) = (count(written.positions - written.kept), bytes(written.bytes));
        terminal::data(&format!(
            "{state} the tokens of {images} images{before}, {size} in all, in {}",
            args.output.display()
        ));
    }
    Ok(if written.interrupted { ExitCode::from(exit::INTERRUPTED) } else { ExitCode::SUCCESS })
}
