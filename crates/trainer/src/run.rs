//! The loop around the step, and the run directory that it keeps.
//!
//! ```text
//! runs/<name>/
//!   config.toml          the recipe with every value and its origin
//!   metrics.jsonl        see crate::metrics
//!   checkpoints/         see crate::checkpoint
//!   teacher.safetensors  the newest teacher backbone, with what is needed to evaluate it
//! ```

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use dinoxide_config::{Resolved, difference};
use dinoxide_data::{Drawn, Rejected, Source};
use dinoxide_evaluation::EvaluationError;
use dinoxide_model::Precision;
use dinoxide_model::weights::{Description, Provenance, Score, backbone_file, write_atomically};

use crate::batch::Batch;
use crate::cache::Cache;
use crate::checkpoint::{self, Progress};
use crate::error::TrainError;
use crate::metrics::{Line, MetricsFile, ScheduleLine};
use crate::monitor::{Finding, Monitor};
use crate::pretrained::Pretrained;
use crate::recipe::{Plan, Recipe};
use crate::samples::{Batches, step_draws};
use crate::stages::Planned;
use crate::start::{Initial, initial};
use crate::step::{StepReport, TrainState, train_step};

/// What made a run, in its log and its weight files.
pub const SOFTWARE: &str = concat!("dinoxide ", env!("CARGO_PKG_VERSION"));

/// What a run tells whoever watches it.
pub enum Event<'a> {
    /// Everything is set up; the first step is next.
    Started {
        /// Lengths in steps.
        plan: &'a Plan,
        /// Parameters of the backbone.
        backbone_parameters: usize,
        /// Parameters of the heads.
        head_parameters: usize,
        /// Classes of the data; 0 when it has none.
        classes: usize,
        /// The step that the run goes on from, when it is resumed.
        resumed: Option<u64>,
        /// Whether k-NN is measured.
        monitored: bool,
    },
    /// Something about the weights that the run starts or learns from.
    Note(&'a str),
    /// A damaged checkpoint was passed over.
    DamagedCheckpoint {
        /// Where.
        path: &'a Path,
        /// What is wrong with it.
        reason: &'a str,
    },
    /// An image could not be read and was replaced by another.
    BadImage(&'a Rejected),
    /// An image could not be read and was left out of an evaluation; each is shown once.
    BadEvalImage(&'a Rejected),
    /// A step was taken.
    Step {
        /// What it did.
        report: &'a StepReport,
        /// Images per second since the last line of metrics.
        images_per_second: f64,
        /// Share of that time spent waiting for images.
        data_wait: f64,
        /// Resident memory in bytes.
        memory_bytes: u64,
        /// Whether a line of metrics was written.
        logged: bool,
    },
    /// An evaluation is at this image of so many.
    Evaluating {
        /// Images done.
        done: usize,
        /// All images.
        of: usize,
    },
    /// An evaluation is done.
    Evaluated {
        /// Steps taken.
        step: u64,
        /// What it found.
        finding: &'a Finding,
    },
    /// An evaluation after the first step failed; the run goes on.
    EvaluationFailed {
        /// Steps taken.
        step: u64,
        /// Why.
        error: &'a EvaluationError,
    },
    /// A checkpoint was written.
    Checkpoint(&'a Path),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Whether it was asked to stop before its end.
    pub interrupted: bool,
    /// Steps taken.
    pub steps: u64,
    /// Images seen.
    pub images: u64,
    /// Seconds spent training, over all sessions.
    pub seconds: f64,
    /// k-NN accuracy before training, in percent.
    pub first_knn: Option<f64>,
    /// The evaluation after the last step; `None` if it failed.
    pub last: Option<Finding>,
    /// The exported teacher.
    pub teacher: PathBuf,
    /// Highest resident memory of the process, in bytes.
    pub peak_memory_bytes: u64,
}

/// Trains the recipe in `directory`, from the newest whole checkpoint there if there is one.
///
/// `stop` ends the run after the step at hand, with a checkpoint.
///
/// # Errors
/// See [`TrainError`]. Checkpoints written so far stay.
pub fn train(
    recipe: &Resolved<Recipe>,
    directory: &Path,
    device: &Device,
    stop: &AtomicBool,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, TrainError> {
    let runs = [(&recipe.value, recipe, directory)];
    let mut outcomes = train_together(&recipe.value, &runs, device, stop, &mut |_, event| watch(event))?;
    Ok(outcomes.remove(0))
}

/// Trains several students on the same batches, each in a directory of its own. Their frozen teacher sees each batch once.
///
/// Students that were stopped at different steps wait for the one that is furthest behind.
///
/// # Errors
/// As [`train`].
pub fn train_students(
    recipe: &Resolved<Recipe>,
    students: &[Planned],
    device: &Device,
    stop: &AtomicBool,
    watch: &mut dyn FnMut(usize, Event<'_>),
) -> Result<Vec<Outcome>, TrainError> {
    let runs: Vec<_> =
        students.iter().map(|student| (&student.recipe.value, &student.recipe, student.directory.as_path())).collect();
    train_together(&recipe.value, &runs, device, stop, watch)
}

/// `shared` says which images there are and how they are cropped.
fn train_together(
    shared: &Recipe,
    runs: &[(&Recipe, &Resolved<Recipe>, &Path)],
    device: &Device,
    stop: &AtomicBool,
    watch: &mut dyn FnMut(usize, Event<'_>),
) -> Result<Vec<Outcome>, TrainError> {
    let source = shared.data.open()?;
    // One teacher in memory, however many learn from it.
    let teacher = Pretrained::teacher(shared, device)?;
    let mut prepared = Vec::new();
    for (config, _, directory) in runs {
        let plan = config.plan(source.len())?;
        let monitor = Monitor::new(config, &source, &config.data.decode)?;
        prepared.push((initial(config, plan, teacher.as_ref(), directory, device)?, monitor));
    }
    let cache = Cache::open(shared, source.len(), teacher.as_ref(), device)?;
    // With a cache, nothing needs its backbone any more.
    drop(teacher);
    let (mut locks, mut started) = (Vec::new(), Vec::<Run<'_>>::new());
    for (i, ((config, recipe, directory), (initial, monitor))) in runs.iter().zip(prepared).enumerate() {
        locks.push(prepare_directory(recipe, directory)?);
        let watch = &mut |event: Event<'_>| watch(i, event);
        started.push(Run::start(config, initial, source.clone(), monitor, directory, device, watch)?);
    }
    go(shared, &source, cache, &mut started, stop, watch)
}

/// From where the runs stand to their end.
pub(crate) fn go(
    shared: &Recipe,
    source: &Arc<dyn Source>,
    mut cache: Option<Cache>,
    runs: &mut [Run<'_>],
    stop: &AtomicBool,
    watch: &mut dyn FnMut(usize, Event<'_>),
) -> Result<Vec<Outcome>, TrainError> {
    for i in 0..runs.len() {
        timed(runs, i, |run| run.evaluate_first(&mut |event| watch(i, event)))?;
    }
    let mut step = runs.iter().map(|run| run.state.step).min().expect("at least one run");
    let steps = runs[0].plan.steps;
    let locals = runs.iter().map(|run| run.local_crops()).max().expect("at least one run");
    let mut batches = Batches::new(shared, locals, source, step)?;
    runs.iter_mut().for_each(|run| run.clock.window_start = Instant::now());
    while step < steps && !stop.load(Ordering::Relaxed) {
        let (mut batch, drawn) = batches.next(&runs[0].plan.backbone, runs[0].device)?;
        for (i, run) in runs.iter_mut().enumerate().filter(|(_, run)| run.state.step == step) {
            run.record(&drawn, &mut |event| watch(i, event))?;
        }
        if let Some(cache) = &mut cache {
            let size = shared.train.batch_size;
            batch.tokens = Some(cache.tokens(step * size as u64, size)?);
        } else if let Some(frozen) = runs[0].state.frozen.as_ref().filter(|_| runs.len() > 1) {
            batch.tokens = Some(frozen.tokens(&batch, shared.efficiency.micro_batches));
        }
        let waited = batches.waited().as_secs_f64();
        for i in 0..runs.len() {
            if runs[i].state.step == step {
                timed(runs, i, |run| run.take(&batch, waited, &mut |event| watch(i, event)))?;
            }
        }
        step += 1;
    }
    drop(batches);
    (0..runs.len()).map(|i| timed(runs, i, |run| run.finish(&mut |event| watch(i, event)))).collect()
}

/// Lets one of the runs act; to the others, the time is time spent elsewhere.
fn timed<T>(runs: &mut [Run<'_>], i: usize, act: impl FnOnce(&mut Run<'_>) -> T) -> T {
    let since = Instant::now();
    let result = act(&mut runs[i]);
    let seconds = since.elapsed().as_secs_f64();
    runs.iter_mut().enumerate().filter(|(other, _)| *other != i).for_each(|(_, run)| run.clock.elsewhere += seconds);
    result
}

/// Creates the run directory, or checks that it is of the same configuration.
///
/// The file returned is locked, so that no other process trains here for as long as it is open.
pub(crate) fn prepare_directory(recipe: &Resolved<Recipe>, directory: &Path) -> Result<File, TrainError> {
    std::fs::create_dir_all(directory).map_err(TrainError::io(directory))?;
    let lock_path = directory.join(".lock");
    let lock = File::create(&lock_path).map_err(TrainError::io(&lock_path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let reason = "another process is training in this directory".to_owned();
            return Err(TrainError::NotResumable { path: directory.to_owned(), reason });
        }
        Err(TryLockError::Error(error)) => return Err(TrainError::io(&lock_path)(error)),
    }
    let path = directory.join("config.toml");
    if path.exists() {
        let text = std::fs::read_to_string(&path).map_err(TrainError::io(&path))?;
        let known = Resolved::<Recipe>::from_text(&path.display().to_string(), &text)
            .map_err(|e| TrainError::NotResumable { path: directory.to_owned(), reason: e.to_string() })?;
        // `[run]` and `[efficiency]` do not change results: a run may go on with other values of them.
        let mut known = known.value;
        known.run = recipe.value.run.clone();
        known.efficiency = recipe.value.efficiency.clone();
        // Where a finished run or a file lies may change; what was taken from it is in the checkpoints.
        known.init.from = recipe.value.init.from.clone();
        let differences = difference(&known, &recipe.value);
        if !differences.is_empty() {
            let differences: Vec<String> = differences.iter().map(|d| format!("  {d}")).collect();
            return Err(TrainError::OtherConfig { path: directory.to_owned(), differences: differences.join("\n") });
        }
    }
    checkpoint::remove_unfinished(directory)?;
    checkpoint::remove_unfinished(&directory.join("checkpoints"))?;
    write_atomically(&path, recipe.to_annotated_toml().as_bytes()).map_err(TrainError::io(&path))?;
    Ok(lock)
}

/// A run that has begun.
pub(crate) struct Run<'a> {
    config: &'a Recipe,
    plan: Plan,
    monitor: Option<Monitor>,
    directory: &'a Path,
    device: &'a Device,
    state: TrainState,
    progress: Progress,
    metrics: MetricsFile,
    clock: Clock,
    last: Option<Finding>,
    /// The step that it is of.
    evaluated: Option<u64>,
    /// The step of the checkpoint that was loaded or written last.
    saved: Option<u64>,
}

/// Time and memory.
struct Clock {
    /// Seconds of earlier sessions.
    before: f64,
    /// Seconds of this session spent on evaluations, and on other students.
    elsewhere: f64,
    start: Instant,
    window_start: Instant,
    window_images: u64,
    window_waited: f64,
    peak_memory: u64,
}

impl Clock {
    fn seconds(&self) -> f64 {
        self.before + self.start.elapsed().as_secs_f64() - self.elsewhere
    }
}

fn resident_bytes() -> u64 {
    memory_stats::memory_stats().map_or(0, |stats| stats.physical_mem as u64)
}

/// The highest resident memory of this process so far, where the system tells; else that of this moment.
pub(crate) fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    peak.map_or_else(resident_bytes, |kibibytes: u64| 1024 * kibibytes)
}

impl<'a> Run<'a> {
    /// Sets the run up, or goes on from its newest checkpoint.
    pub(crate) fn start(
        config: &'a Recipe,
        initial: Initial,
        source: Arc<dyn Source>,
        monitor: Option<Monitor>,
        directory: &'a Path,
        device: &'a Device,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<Self, TrainError> {
        let Initial { mut state, plan, notes } = initial;
        let mut progress = Progress { samples: source.len(), ..Progress::default() };
        let loaded = checkpoint::load_newest(&directory.join("checkpoints"), &mut state, device)?;
        let mut damaged = Vec::new();
        let mut saved = None;
        if let Some(loaded) = loaded {
            progress = loaded.progress;
            if progress.samples != source.len() {
                let (then, now) = (progress.samples, source.len());
                let reason = format!(
                    "it was trained on {then} images, and `{}` now has {now}: their order would change\n\nhint: bring the \
                     images back, or start a new run",
                    config.data.source
                );
                return Err(TrainError::NotResumable { path: directory.to_owned(), reason });
            }
            damaged = loaded.damaged;
            saved = Some(progress.step);
        }
        // The evaluations before the first step and after the last belong to no checkpoint: they are made again.
        let evaluates_again = progress.step == 0 || progress.step == plan.steps;
        let metrics = MetricsFile::open(&directory.join("metrics.jsonl"), progress.step, evaluates_again)?;
        let shapes = dinoxide_model::parameters::shapes(&state.teacher);
        let count = |of: fn(&str) -> bool| -> usize {
            shapes.iter().filter(|(name, _)| of(name)).map(|(_, shape)| shape.iter().product::<usize>()).sum()
        };
        watch(Event::Started {
            plan: &plan,
            backbone_parameters: count(|name| name.starts_with("backbone.")),
            head_parameters: count(|name| !name.starts_with("backbone.")),
            classes: source.classes().len(),
            resumed: saved,
            monitored: monitor.is_some(),
        });
        notes.iter().for_each(|note| watch(Event::Note(note)));
        for (path, reason) in &damaged {
            watch(Event::DamagedCheckpoint { path, reason });
        }
        let now = Instant::now();
        let clock = Clock {
            before: progress.seconds,
            elsewhere: 0.0,
            start: now,
            window_start: now,
            window_images: 0,
            window_waited: 0.0,
            peak_memory: peak_bytes(),
        };
        Ok(Self {
            config,
            plan,
            monitor,
            directory,
            device,
            state,
            progress,
            metrics,
            clock,
            last: None,
            evaluated: None,
            saved,
        })
    }

    /// What is due before the first step.
    fn evaluate_first(&mut self, watch: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        if self.state.step == 0 {
            self.export()?;
            if let Some(finding) = self.evaluate(watch)? {
                self.progress.first_knn = Some(finding.knn.top1);
            }
        }
        Ok(())
    }

    /// Notes which images of a batch could not be read.
    fn record(&mut self, drawn: &[Drawn], watch: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        for drawn in drawn {
            let known = self.progress.bad_images.list().len();
            self.progress.bad_images.record(drawn);
            self.progress.bad_images.list()[known..].iter().for_each(|rejected| watch(Event::BadImage(rejected)));
        }
        Ok(self.progress.bad_images.check(self.plan.samples, self.config.data.max_bad_share)?)
    }

    /// Local crops that a loss looks at.
    fn local_crops(&self) -> usize {
        let used = self.config.loss.dino_weight > 0.0 && self.config.loss.local_weight > 0.0;
        if used { self.config.augmentation.local_crops } else { 0 }
    }

    /// One step.
    fn take(&mut self, batch: &Batch, waited: f64, watch: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        let batch = batch.with_locals(self.local_crops());
        let at = self.plan.schedule.at(self.state.step);
        let draws = step_draws(self.config, &self.plan.backbone, at.step);
        let losses = self.plan.schedule.losses_at(&self.config.loss, at.step);
        let report = train_step(&mut self.state, &batch, &draws, &losses, at)?;
        self.progress.step = self.state.step;
        self.progress.images += batch.len() as u64;
        self.after_step(&report, waited, watch)
    }

    /// Logging, evaluation and checkpoints, each at its own period.
    fn after_step(
        &mut self,
        report: &StepReport,
        waited: f64,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), TrainError> {
        let step = self.state.step;
        let memory = resident_bytes();
        self.clock.peak_memory = self.clock.peak_memory.max(peak_bytes());
        let elapsed = self.clock.window_start.elapsed().as_secs_f64().max(1e-9);
        let images = self.progress.images - self.clock.window_images;
        let (rate, wait) = (images as f64 / elapsed, (waited - self.clock.window_waited) / elapsed);
        let logged = step.is_multiple_of(self.plan.log_every) || step == self.plan.steps || step == 1;
        if logged {
            self.log(report, rate, wait, memory)?;
            self.start_window(waited);
        }
        watch(Event::Step { report, images_per_second: rate, data_wait: wait, memory_bytes: memory, logged });
        if step == self.plan.steps {
            return Ok(());
        }
        if self.plan.eval_every > 0 && step.is_multiple_of(self.plan.eval_every) {
            self.evaluate(watch)?;
            self.start_window(waited);
        }
        if step.is_multiple_of(self.plan.checkpoint_every) {
            self.save(watch)?;
            self.start_window(waited);
        }
        Ok(())
    }

    fn start_window(&mut self, waited: f64) {
        self.clock.window_start = Instant::now();
        self.clock.window_images = self.progress.images;
        self.clock.window_waited = waited;
    }

    fn log(&mut self, report: &StepReport, rate: f64, wait: f64, memory: u64) -> Result<(), TrainError> {
        let Progress { step, images, .. } = self.progress;
        let (losses, at) = (&report.losses, &report.at);
        self.metrics.write(&Line::Step {
            step,
            images,
            epoch: images as f64 / self.plan.samples as f64,
            seconds: self.clock.seconds(),
            images_per_second: rate,
            data_wait: wait,
            losses: losses.clone(),
            gradient_norms: report.gradient_norms.iter().map(|(name, norm)| ((*name).to_owned(), *norm)).collect(),
            schedule: ScheduleLine {
                lr: at.lr,
                weight_decay: at.weight_decay,
                teacher_momentum: at.teacher_momentum,
                teacher_temp: at.teacher_temp,
            },
            memory_bytes: memory,
        })?;
        self.metrics.write(&Line::Health {
            step,
            images,
            target_entropy: report.target_entropy,
            ln_prototypes: self.ln_prototypes(),
            bad_images: self.progress.bad_images.list().len(),
            bad_eval_images: self.progress.bad_eval_images.len(),
            evaluation_error: None,
        })
    }

    fn ln_prototypes(&self) -> f64 {
        (self.config.dino_head.prototypes as f64).ln()
    }

    /// Evaluates the teacher. `None` if nothing is to be evaluated, or if that failed after the first step: hours of
    /// training are not given up for a folder that has vanished meanwhile. Before the first step it is an error.
    pub(crate) fn evaluate(&mut self, watch: &mut dyn FnMut(Event<'_>)) -> Result<Option<Finding>, TrainError> {
        let Some(monitor) = &self.monitor else { return Ok(None) };
        let of = monitor.images();
        let mut progress = |done| watch(Event::Evaluating { done, of });
        let since = Instant::now();
        let mut rejected = Vec::new();
        // In single precision, as whoever loads the weights computes: the score is that of the file.
        let backbone = self.state.teacher.backbone.clone().with_precision(Precision::Fp32);
        let outcome = monitor.run(&backbone, self.device, &mut progress, &mut rejected);
        self.clock.elsewhere += since.elapsed().as_secs_f64();
        for image in &rejected {
            if self.progress.bad_eval_images.insert(image.id.clone()) {
                watch(Event::BadEvalImage(image));
            }
        }
        // What an earlier evaluation found is not what this one would have.
        self.last = None;
        let finding = match outcome {
            Ok(finding) => finding,
            Err(error) if self.progress.step == 0 => return Err(error.into()),
            Err(error) => {
                let step = self.progress.step;
                self.metrics.write(&Line::Health {
                    step,
                    images: self.progress.images,
                    target_entropy: None,
                    ln_prototypes: self.ln_prototypes(),
                    bad_images: self.progress.bad_images.list().len(),
                    bad_eval_images: self.progress.bad_eval_images.len(),
                    evaluation_error: Some(error.to_string()),
                })?;
                watch(Event::EvaluationFailed { step, error: &error });
                return Ok(None);
            }
        };
        self.metrics.write(&Line::Eval {
            step: self.progress.step,
            images: self.progress.images,
            seconds: self.clock.seconds(),
            knn: finding.knn.clone(),
            effective_rank: finding.effective_rank,
            embed_dim: finding.embed_dim,
        })?;
        watch(Event::Evaluated { step: self.progress.step, finding: &finding });
        self.last = Some(finding.clone());
        self.evaluated = Some(self.progress.step);
        Ok(Some(finding))
    }

    fn save(&mut self, watch: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        self.progress.seconds = self.clock.seconds();
        let folder = self.directory.join("checkpoints");
        let path = checkpoint::save(&folder, &self.state, &self.progress, self.config.run.keep_checkpoints)?;
        self.saved = Some(self.state.step);
        self.export()?;
        watch(Event::Checkpoint(&path));
        Ok(())
    }

    /// What the newest evaluation found, if these weights are the ones that it saw.
    fn scores(&self) -> Vec<Score> {
        let of = |finding: &Finding| Score {
            name: "k-NN top-1".into(),
            value: finding.knn.top1,
            steps: self.progress.step,
            protocol: serde_json::to_value(&finding.protocol).expect("plain data"),
        };
        self.last.iter().filter(|_| self.evaluated == Some(self.progress.step)).map(of).collect()
    }

    /// Writes the teacher's backbone.
    fn export(&self) -> Result<PathBuf, TrainError> {
        let config = self.config;
        let description = Description {
            architecture: self.plan.backbone.clone(),
            image_size: config.augmentation.global_crop_size,
            mean: config.augmentation.mean,
            std: config.augmentation.std,
            provenance: Provenance {
                recipe: "config.toml".into(),
                steps: self.progress.step,
                images: self.progress.images,
                data: config.data.source.clone(),
                software: SOFTWARE.into(),
                scores: self.scores(),
            },
            fingerprint: None,
        };
        let path = self.directory.join("teacher.safetensors");
        backbone_file(&self.state.teacher.backbone, &description).write(&path).map_err(TrainError::io(&path))?;
        Ok(path)
    }

    fn finish(&mut self, watch: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, TrainError> {
        let interrupted = self.state.step < self.plan.steps;
        let trained = self.clock.seconds();
        if self.saved != Some(self.state.step) {
            self.save(watch)?;
        }
        if !interrupted {
            if self.evaluated != Some(self.state.step) {
                self.evaluate(watch)?;
            }
            self.metrics.write(&Line::End {
                step: self.progress.step,
                images: self.progress.images,
                seconds: trained,
                images_per_second: self.progress.images as f64 / trained.max(1e-9),
                peak_memory_bytes: self.clock.peak_memory,
            })?;
        }
        Ok(Outcome {
            interrupted,
            steps: self.progress.step,
            images: self.progress.images,
            seconds: trained,
            first_knn: self.progress.first_knn,
            last: self.last.clone(),
            teacher: self.export()?,
            peak_memory_bytes: self.clock.peak_memory,
        })
    }
}
