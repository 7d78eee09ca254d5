//! One run that has begun: its steps, and what is logged, evaluated and saved between them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use dinoxide_data::{Drawn, Source};
use dinoxide_model::Precision;
use dinoxide_model::weights::{Description, Provenance, Score, WeightFile, reference_tensors};

use crate::batch::Batch;
use crate::checkpoint::{self, Progress};
use crate::clock::{Clock, peak_bytes, resident_bytes};
use crate::error::TrainError;
use crate::event::{Event, Outcome};
use crate::metrics::{Line, MetricsFile, ScheduleLine};
use crate::monitor::{Finding, Monitor};
use crate::recipe::{Plan, Recipe};
use crate::run::SOFTWARE;
use crate::samples::step_draws;
use crate::start::Initial;
use crate::step::{StepReport, TrainState, train_step};

/// A run that has begun.
pub(crate) struct Run<'a> {
    pub(crate) config: &'a Recipe,
    pub(crate) plan: Plan,
    monitor: Option<Monitor>,
    directory: &'a Path,
    pub(crate) device: &'a Device,
    pub(crate) state: TrainState,
    progress: Progress,
    metrics: MetricsFile,
    pub(crate) clock: Clock,
    last: Option<Finding>,
    /// The step that it is of.
    evaluated: Option<u64>,
    /// The step of the checkpoint that was loaded or written last.
    saved: Option<u64>,
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
    pub(crate) fn evaluate_first(&mut self, watch: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        if self.state.step == 0 {
            self.export(&self.description())?;
            if let Some(finding) = self.evaluate(watch)? {
                self.progress.first_knn = Some(finding.knn.top1);
            }
        }
        Ok(())
    }

    /// Notes which images of a batch could not be read.
    pub(crate) fn record(&mut self, drawn: &[Drawn], watch: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        for drawn in drawn {
            let known = self.progress.bad_images.list().len();
            self.progress.bad_images.record(drawn);
            self.progress.bad_images.list()[known..].iter().for_each(|rejected| watch(Event::BadImage(rejected)));
        }
        Ok(self.progress.bad_images.check(self.plan.samples, self.config.data.max_bad_share)?)
    }

    /// One step.
    pub(crate) fn take(
        &mut self,
        batch: &Batch,
        waited: f64,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), TrainError> {
        let batch = batch.with_locals(self.config.local_crops());
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

    pub(crate) fn start_window(&mut self, waited: f64) {
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
        let teacher = self.description();
        let path = checkpoint::save(&folder, &self.state, &teacher, &self.progress, self.config.run.keep_checkpoints)?;
        self.saved = Some(self.state.step);
        self.export(&teacher)?;
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

    /// What weight files say of the teacher's backbone, with its fingerprint.
    fn description(&self) -> Description {
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
        description.of(&self.state.teacher.backbone)
    }

    /// Writes the teacher's backbone.
    fn export(&self, description: &Description) -> Result<PathBuf, TrainError> {
        let path = self.directory.join("teacher.safetensors");
        let tensors = reference_tensors(&self.state.teacher.backbone);
        let file = WeightFile { tensors, metadata: description.metadata() };
        file.write(&path).map_err(TrainError::io(&path))?;
        Ok(path)
    }

    pub(crate) fn finish(&mut self, watch: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, TrainError> {
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
            teacher: self.export(&self.description())?,
            peak_memory_bytes: self.clock.peak_memory,
        })
    }
}
