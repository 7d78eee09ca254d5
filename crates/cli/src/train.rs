//! `dinoxide train`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use dinoxide_config::Resolved;
use dinoxide_trainer::run::SOFTWARE;
use dinoxide_trainer::stages::{self, Row};
use dinoxide_trainer::{Event, Outcome};
use dinoxide_trainer::{Recipe, TrainError, train, train_students};

use crate::recipes::{Changes, RunFlags, quoted};
use crate::table::{bytes, count, duration};
use crate::terminal::Log;
use crate::{Usage, allocator, device, exit, terminal};

/// Train a recipe; without arguments, the quickstart on built-in images.
///
/// Any folder of images will do: `dinoxide train --config vits16_dinov3 --data photos/`. Subfolders become classes, which
/// are not trained on but used to measure k-NN accuracy before, during and after training.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    flags: RunFlags,
    /// Run directory. An unfinished run of the same configuration goes on where it stopped. Default: `runs/<recipe>`, with
    /// a number when that exists
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Go on with the run in this directory, with its own configuration
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "data", "run", "init", "teacher", "stage"])]
    resume: Option<PathBuf>,
    /// Start from trained weights: a file or folder of any supported format, or a run directory. Replaces `init.from`; the
    /// backbone can be held still while the heads learn: `--set schedule.freeze_backbone="2 epochs"`
    #[arg(long, value_name = "PATH")]
    init: Option<String>,
    /// Train this stage of the recipe alone, from `--init`
    #[arg(long, value_name = "NAME", requires = "init")]
    stage: Option<String>,
    /// Threads that read and augment images. A high "wait" in the progress line: more. Replaces
    /// `efficiency.loader_threads`; batches do not depend on it
    #[arg(long, value_name = "N")]
    loader_threads: Option<i64>,
}

impl Args {
    fn changes(&self) -> Changes {
        let mut changes = self.flags.changes();
        if self.stage.is_none() {
            changes.add("--init", "init.from", self.init.as_deref().map(quoted));
        }
        changes.add("--loader-threads", "efficiency.loader_threads", self.loader_threads.map(|n| n.to_string()));
        changes
    }

    fn recipe(&self, changes: &Changes) -> anyhow::Result<Resolved<Recipe>> {
        match &self.resume {
            None => changes.resolve(&self.flags.step.config),
            Some(directory) => {
                let path = directory.join("config.toml");
                if !path.is_file() {
                    let message = format!(
                        "{}: no `config.toml` here, so no run to resume\n\nhint: start one with `--run {}`",
                        directory.display(),
                        directory.display()
                    );
                    return Err(Usage(anyhow::Error::msg(message)).into());
                }
                changes.resolve(&path.to_string_lossy())
            }
        }
    }

    fn directory(&self) -> PathBuf {
        if let Some(directory) = self.resume.as_ref().or(self.run.as_ref()) {
            return directory.clone();
        }
        let config = Path::new(&self.flags.step.config);
        let stem = config.file_stem().map_or("run".into(), |s| s.to_string_lossy().into_owned());
        let numbered = |n: u32| Path::new("runs").join(if n == 1 { stem.clone() } else { format!("{stem}-{n}") });
        (1..).map(numbered).find(|path| !path.exists()).expect("a free number")
    }
}

/// Refuses a directory that a run would mix its files with those of others in.
fn check_directory(directory: &Path) -> anyhow::Result<()> {
    let refuse = |place: &Path, what: &str| -> anyhow::Result<()> {
        let hint = "hint: give `--run` a folder that does not exist yet";
        Err(Usage(anyhow::anyhow!("{}: {what}\n\n{hint}", place.display())).into())
    };
    if let Some(file) = directory.ancestors().find(|path| path.is_file()) {
        return refuse(file, "a file, and a run is a folder");
    }
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    // A run that was killed at once has left hidden files alone.
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    match names.first() {
        Some(first) if !directory.join("config.toml").is_file() => {
            refuse(directory, &format!("it holds `{first}` and no `config.toml`, so it is no run"))
        }
        _ => Ok(()),
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let changes = args.changes();
    let recipe = args.recipe(&changes)?;
    let device = device::parse(&recipe.value.run.device)?;
    let directory = args.directory();
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_interrupt(&stop, "step")?;

    if let Some(name) = &args.stage {
        let init = args.init.as_deref().expect("clap requires it");
        let stage = stages::alone(&recipe, &directory, name, init).map_err(usage)?;
        check_directory(&stage.directory)?;
        changes.note_overruled(&recipe, "stage", recipe.value.stages.iter().filter(|stage| stage.name == *name));
        let outcome = run_one(&stage.recipe, &stage.directory, &stage.directory, &device, &stop)?;
        announce(&outcome);
        return Ok(exit_code(&outcome));
    }
    check_directory(&directory)?;
    if !recipe.value.students.is_empty() {
        return run_students(&recipe, &changes, &directory, &device, &stop);
    }
    if recipe.value.stages.is_empty() {
        let outcome = run_one(&recipe, &directory, &directory, &device, &stop)?;
        announce(&outcome);
        return Ok(exit_code(&outcome));
    }
    run_stages(&recipe, &changes, &directory, &device, &stop)
}

/// Makes Ctrl-C raise the flag, which is seen after the `part` at hand; the second one ends the process.
pub(crate) fn stop_on_interrupt(stop: &Arc<AtomicBool>, part: &'static str) -> anyhow::Result<()> {
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        // The second signal is for those who will not wait for the part to end.
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(exit::INTERRUPTED));
        }
        terminal::above(&format!("stopping after this {part}; Ctrl-C again ends at once"));
    })
    .map_err(|e| anyhow::anyhow!("cannot listen for Ctrl-C: {e}"))
}

/// A step that is not finite is the run's failure; wrong values are the user's. The teacher that a recipe names is often
/// one that only its author has.
pub(crate) fn usage(error: TrainError) -> anyhow::Error {
    let error = match error {
        TrainError::Pretrained { key, reason }
            if key == "distillation.teacher" && reason.ends_with("there is no such file or folder") =>
        {
            TrainError::Pretrained { key, reason: format!("{reason}\n\nhint: give one with `--teacher`") }
        }
        other => other,
    };
    if error.is_usage() { Usage(error.into()).into() } else { error.into() }
}

fn run_one(
    recipe: &Resolved<Recipe>,
    directory: &Path,
    resume: &Path,
    device: &Device,
    stop: &AtomicBool,
) -> anyhow::Result<Outcome> {
    allocator::follow(&recipe.value);
    let mut screen = Screen::new(recipe, directory)?;
    screen.log.line(&screen.recipe_line());
    let outcome = train(recipe, directory, device, stop, &mut |event| screen.show(event));
    screen.log.clear();
    match outcome {
        Ok(outcome) => {
            screen.finish(&outcome, resume);
            Ok(outcome)
        }
        Err(error) => {
            let error = usage(error);
            screen.log.keep(&format!("error: {error}"));
            Err(error)
        }
    }
}

/// Trains the stages that are not finished, one after the other.
fn run_stages(
    recipe: &Resolved<Recipe>,
    changes: &Changes,
    directory: &Path,
    device: &Device,
    stop: &AtomicBool,
) -> anyhow::Result<ExitCode> {
    let row = Row::open(recipe, directory).map_err(usage)?;
    changes.note_overruled(recipe, "stage", &recipe.value.stages);
    let mut log = Log::new(None)?;
    let mut last = None;
    for (i, stage) in row.stages.iter().enumerate() {
        let title = format!("stage      {} of {}: {}", i + 1, row.stages.len(), stage.name);
        if stage.is_finished()? {
            log.line(&format!("{title}, finished before"));
            continue;
        }
        log.line(&title);
        let outcome = run_one(&stage.recipe, &stage.directory, directory, device, stop)?;
        if outcome.interrupted {
            return Ok(exit_code(&outcome));
        }
        let teacher = row.keep_teacher(&outcome.teacher)?;
        log.line(&format!("backbone   {}", teacher.display()));
        last = Some(outcome);
    }
    last.iter().for_each(announce);
    Ok(ExitCode::SUCCESS)
}

/// Trains the students of one teacher side by side.
fn run_students(
    recipe: &Resolved<Recipe>,
    changes: &Changes,
    directory: &Path,
    device: &Device,
    stop: &AtomicBool,
) -> anyhow::Result<ExitCode> {
    allocator::follow(&recipe.value);
    let row = Row::of_students(recipe, directory).map_err(usage)?;
    changes.note_overruled(recipe, "student", &recipe.value.students);
    let mut screens = Vec::<Screen<'_>>::new();
    for student in &row.stages {
        let mut screen = Screen::new(&student.recipe, &student.directory)?;
        screen.name = Some(&student.name);
        screens.push(screen);
    }
    let outcomes = train_students(recipe, &row.stages, device, stop, &mut |i, event| {
        if matches!(event, Event::Started { .. }) {
            let line = screens[i].recipe_line();
            screens[i].log.line(&line);
        }
        screens[i].show(event);
    });
    screens.iter_mut().for_each(|screen| screen.log.clear());
    let outcomes = outcomes.map_err(usage)?;
    for (screen, outcome) in screens.iter_mut().zip(&outcomes) {
        screen.log.line(&screen.recipe_line());
        screen.finish(outcome, directory);
        if let (Some(name), Some(line)) = (screen.name, change(outcome).filter(|_| !outcome.interrupted)) {
            terminal::data(&format!("{name}: {line}"));
        }
    }
    Ok(outcomes.first().map_or(ExitCode::SUCCESS, exit_code))
}

fn exit_code(outcome: &Outcome) -> ExitCode {
    if outcome.interrupted { ExitCode::from(exit::INTERRUPTED) } else { ExitCode::SUCCESS }
}

/// What the terminal shows of a run.
struct Screen<'a> {
    log: Log,
    /// Of the student, where there are several.
    name: Option<&'a str>,
    recipe: &'a Recipe,
    /// Where the recipe is from.
    source: &'a str,
    directory: &'a Path,
    last_line: Option<Instant>,
    steps: u64,
    evaluating: bool,
}

const TRAINING: &str = "{bar:28} {pos}/{len} {msg}";
const EVALUATING: &str = "{bar:28} k-NN {pos}/{len} images";
/// Seconds between plain lines when there is no bar.
const LINE_EVERY: f64 = 10.0;

impl<'a> Screen<'a> {
    fn new(recipe: &'a Resolved<Recipe>, directory: &'a Path) -> anyhow::Result<Self> {
        Ok(Self {
            log: Log::new(None)?,
            name: None,
            recipe: &recipe.value,
            source: &recipe.source,
            directory,
            last_line: None,
            steps: 0,
            evaluating: false,
        })
    }

    fn recipe_line(&self) -> String {
        let student = self.name.map_or(String::new(), |name| format!(", student {name}"));
        format!("recipe     {}{student}", self.source)
    }

    fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Started { plan, backbone_parameters, head_parameters, classes, resumed, monitored } => {
                if let Ok(log) = Log::new(Some(&self.directory.join("log.txt"))) {
                    self.log = log;
                    // It was shown before there was a run directory.
                    let line = self.recipe_line();
                    self.log.keep(&line);
                }
                let recipe = self.recipe;
                let (batch, crops) = (recipe.train.batch_size, &recipe.augmentation);
                let epochs = plan.steps as f64 * batch as f64 / plan.samples as f64;
                let classes = match classes {
                    0 => "no classes".to_owned(),
                    n => format!("{n} classes"),
                };
                let locals = match recipe.local_crops() {
                    0 => String::new(),
                    n => format!(", {n} × {} px", crops.local_crop_size),
                };
                let mut lines = vec![
                    format!("run        {}", self.directory.display()),
                    format!("software   {SOFTWARE}, device {}, seed {}", recipe.run.device, recipe.train.seed),
                    format!("images     {} in {}, {classes}", count(plan.samples as u64), recipe.data.source),
                    format!(
                        "backbone   {}: {:.1} M parameters, heads {:.1} M",
                        plan.backbone,
                        backbone_parameters as f64 / 1e6,
                        head_parameters as f64 / 1e6
                    ),
                    format!("crops      2 × {} px{locals}", crops.global_crop_size),
                    format!(
                        "length     {} steps of {batch} images = {} images = {epochs:.1} epochs",
                        count(plan.steps),
                        count(plan.steps * batch as u64)
                    ),
                    format!("lr         {:.2e} at its peak (after scaling by the batch size)", plan.schedule.lr.peak),
                ];
                if recipe.loss.dino_weight > 0.0 {
                    let chance = (recipe.dino_head.prototypes as f64).ln();
                    lines.push(format!("loss       at chance about ln K = {chance:.2} for CLS tokens"));
                }
                lines.iter().for_each(|line| self.log.line(line));
                if !monitored {
                    self.log.line(&format!(
                        "k-NN       not measured: it takes two classes, {} images of them, and two more to classify \
                         (see `eval.train`, `eval.k`)",
                        recipe.eval.k
                    ));
                }
                if let Some(step) = resumed {
                    self.log.line(&format!("resumed    after step {}", count(step)));
                }
                self.steps = plan.steps;
                self.log.bar(plan.steps, resumed.unwrap_or(0), TRAINING);
            }
            Event::Note(note) => self.log.line(&format!("note       {note}")),
            Event::DamagedCheckpoint { path, reason } => {
                self.log.line(&format!(
                    "warning: {} is damaged ({reason}); falling back to the one before it",
                    path.display()
                ));
            }
            Event::BadImage(rejected) => {
                self.log.line(&format!("warning: {}: {}; another image takes its place", rejected.id, rejected.reason));
            }
            Event::BadEvalImage(rejected) => {
                self.log.line(&format!("warning: {}: {}; left out of k-NN", rejected.id, rejected.reason));
            }
            Event::Step { report, images_per_second, data_wait, memory_bytes, logged } => {
                let step = report.at.step + 1;
                let steps = self.steps;
                let left = (steps - step) as f64 * self.recipe.train.batch_size as f64 / images_per_second.max(1e-9);
                let terms: Vec<String> = report
                    .losses
                    .named()
                    .into_iter()
                    .filter_map(|(name, v)| Some(format!("{name} {:.3}", v?)))
                    .collect();
                let message = format!(
                    "{}loss {:.4} ({})  {images_per_second:.1} img/s  wait {:.0} %  {}  eta {}",
                    self.name.map_or(String::new(), |name| format!("{name}: ")),
                    report.losses.total,
                    terms.join(", "),
                    100.0 * data_wait,
                    bytes(memory_bytes),
                    duration(left)
                );
                let plain = format!("step {step}/{steps}  {message}");
                self.log.set(step, message);
                if logged {
                    self.log.keep(&plain);
                }
                let due = self.last_line.is_none_or(|at| at.elapsed().as_secs_f64() > LINE_EVERY);
                if !self.log.is_interactive() && due {
                    self.last_line = Some(Instant::now());
                    terminal::plain(&plain);
                }
            }
            Event::Evaluating { done, of } => {
                if !self.evaluating {
                    self.evaluating = true;
                    self.log.bar(of as u64, 0, EVALUATING);
                }
                self.log.set(done as u64, String::new());
            }
            Event::Evaluated { step, finding } => {
                self.evaluating = false;
                self.log.line(&format!(
                    "k-NN       {:.2} % after {} steps (chance {:.2} %), effective rank {:.1} of {}",
                    finding.knn.top1,
                    count(step),
                    finding.knn.chance,
                    finding.effective_rank,
                    finding.embed_dim
                ));
                self.log.bar(self.steps, step, TRAINING);
            }
            Event::EvaluationFailed { step, error } => {
                self.evaluating = false;
                self.log.line(&format!("warning: k-NN could not be measured after {} steps: {error}", count(step)));
                self.log.bar(self.steps, step, TRAINING);
            }
            Event::Checkpoint(path) => self.log.keep(&format!("checkpoint {}", path.display())),
        }
    }

    fn finish(&mut self, outcome: &Outcome, resume: &Path) {
        let state = if outcome.interrupted { "stopped" } else { "finished" };
        self.log.line(&format!(
            "{state}   {} steps, {} images in {}: {:.1} img/s, at most {}",
            count(outcome.steps),
            count(outcome.images),
            duration(outcome.seconds),
            outcome.images as f64 / outcome.seconds.max(1e-9),
            bytes(outcome.peak_memory_bytes)
        ));
        self.log.line(&format!("backbone   {}", outcome.teacher.display()));
        if outcome.interrupted {
            self.log.line(&format!("go on with `dinoxide train --resume {}`", resume.display()));
        } else if let Some(line) = change(outcome) {
            self.log.keep(&line);
        }
    }
}

/// What training did to k-NN accuracy, where it was measured.
fn change(outcome: &Outcome) -> Option<String> {
    let (before, last) = (outcome.first_knn?, outcome.last.as_ref()?);
    Some(format!(
        "k-NN accuracy: {before:.2} % before training, {:.2} % after (chance {:.2} %)",
        last.knn.top1, last.knn.chance
    ))
}

/// The result on stdout: the change of k-NN accuracy.
fn announce(outcome: &Outcome) {
    if let Some(line) = change(outcome).filter(|_| !outcome.interrupted) {
        terminal::data(&line);
    }
}
