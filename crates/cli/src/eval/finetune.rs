//! `dinoxide eval finetune`.

use std::path::{Path, PathBuf};

use dinoxide_evaluation::{
    EpochScore, FinetuneConfig, FinetuneImages, FinetuneProgress, FinetuneScores, LabeledImages, Report, Token,
    finetune,
};
use dinoxide_model::weights::{DESCRIPTION_KEY, Description, Provenance, Score, backbone_file};
use dinoxide_model::{Architecture, Backbone};

use super::frozen::Frozen;
use super::outcome::{Metric, Outcome, between};
use super::sets::{Pair, Sets};
use super::{check_replaceable, header_entry};
use crate::Usage;
use crate::table::table;

/// What the recipe of a fine-tuned backbone begins with.
const TUNED: &str = "fine-tuned from ";

#[derive(clap::Args)]
pub(crate) struct Task {
    #[command(flatten)]
    sets: Sets,
    /// Passes over the train images
    #[arg(long, value_name = "N", default_value_t = 20)]
    epochs: usize,
    /// Images per iteration
    #[arg(long, value_name = "N", default_value_t = 128)]
    samples: usize,
    /// Highest learning rate, stated for 256 images per iteration. Unstable: lower
    #[arg(long, value_name = "RATE", default_value_t = 1e-3)]
    lr: f64,
    /// Factor of the learning rate per block, from the last down to the patch embedding; default: 0.75, for a ConvNeXt 1
    #[arg(long, value_name = "FACTOR")]
    layer_decay: Option<f64>,
    /// Weight decay
    #[arg(long, value_name = "DECAY", default_value_t = 0.05)]
    weight_decay: f64,
    /// Share of the iterations in which the learning rate rises
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    warmup: f64,
    /// Share of each target that is spread over all classes
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    label_smoothing: f64,
    /// Rate of stochastic depth; default: that of the weights' recipe
    #[arg(long, value_name = "RATE")]
    drop_path: Option<f64>,
    /// Let the classifier see the mean patch token beside CLS
    #[arg(long)]
    patches: bool,
    /// Share of train that the epoch is chosen on
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    held_out: f64,
    /// Seed of the classifier's weights, order and crops of images, stochastic depth and held-out images
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Write the backbone of the chosen epoch here, without the classifier
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
}

impl super::measurement::Task for Task {
    const BLOCKS: usize = 1;

    fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        self.save.as_deref().map_or(Ok(()), |path| check_save(path, Path::new(&frozen.given.weights)))?;
        let pair = Pair::open(&self.sets)?;
        let config = self.config(&frozen.given.backbone.architecture());
        config.validate(&frozen.given.backbone.architecture())?;
        let (train, val) = (frozen.readable(&pair.train)?, frozen.readable(&pair.val)?);
        let (train_labels, val_labels) = (pair.labels(&pair.train, &train), pair.labels(&pair.val, &val));
        let num_classes = pair.classes();
        let tokens = if self.patches { vec![Token::Cls, Token::PatchMean] } else { vec![Token::Cls] };
        let source = frozen.source(&self.sets.train, &self.sets.val, tokens, 1);
        let Frozen { given, extraction, device, log, .. } = frozen;
        let on = FinetuneImages {
            train: LabeledImages { source: &*pair.train.source, indices: &train, labels: &train_labels, num_classes },
            val: LabeledImages { source: &*pair.val.source, indices: &val, labels: &val_labels, num_classes },
            how: extraction,
            source: &source,
        };
        let mut shown = 0;
        let found = finetune(&given.backbone, on, &config, device, &mut |progress| match progress {
            FinetuneProgress::Iteration { done, total } => {
                if shown != total {
                    shown = total;
                    log.bar(total as u64, 0, "{bar:28} {pos}/{len} iterations, {eta} left");
                }
                log.set(done as u64, String::new());
            }
            FinetuneProgress::Epoch(score) => log.line(&format!(
                "epoch {}/{}: loss {:.4}; held out: {:.2} % top-1",
                score.epoch, config.epochs, score.train_loss, score.accuracy.top1
            )),
        });
        log.clear();
        let (report, tuned) = found?;
        if let Some(path) = &self.save {
            self.save(path, &tuned, &report, frozen)?;
        }
        outcome(&report, pair.classes())
    }
}

impl Task {
    fn config(&self, architecture: &Architecture) -> FinetuneConfig {
        let (layer_decay, drop_path) = match architecture {
            Architecture::Vit(vit) => (FinetuneConfig::default().layer_decay, vit.drop_path_rate),
            Architecture::ConvNext(convnext) => (1.0, convnext.drop_path_rate),
        };
        FinetuneConfig {
            epochs: self.epochs,
            batch_size: self.samples,
            learning_rate: self.lr,
            layer_decay: self.layer_decay.unwrap_or(layer_decay),
            weight_decay: self.weight_decay,
            warmup: self.warmup,
            label_smoothing: self.label_smoothing,
            drop_path: self.drop_path.unwrap_or(drop_path),
            patches: self.patches,
            held_out: self.held_out,
            seed: self.seed,
        }
    }

    /// Writes the fine-tuned backbone, with where it comes from and what it scored.
    fn save(
        &self,
        path: &Path,
        tuned: &Backbone,
        report: &Report<FinetuneScores>,
        frozen: &Frozen,
    ) -> anyhow::Result<()> {
        let scores = &report.scores;
        let top1 = scores.accuracy.top1;
        let protocol = serde_json::to_value(&report.protocol)?;
        let held_out = scores.selection.samples;
        let fit = report.protocol.train_samples.expect("train images") - held_out;
        let steps = (scores.epoch * fit.div_ceil(self.samples)) as u64;
        let description = Description {
            image_size: frozen.extraction.crop_px,
            provenance: Provenance {
                recipe: format!("{TUNED}{}", frozen.given.name()),
                steps,
                images: steps * self.samples as u64,
                data: self.sets.train.clone(),
                software: report.protocol.software.clone(),
                scores: vec![Score { name: "fine-tuned top-1".into(), value: top1, steps, protocol }],
            },
            ..frozen.given.description.clone()
        };
        let written = backbone_file(tuned, &description).write(path);
        written.map_err(|e| anyhow::anyhow!("{}: {e}; the score was {top1:.2} % top-1", path.display()))
    }
}

/// Refuses a path at which the fine-tuned backbone cannot be written, or would replace anything but an earlier one.
fn check_save(path: &Path, weights: &Path) -> anyhow::Result<()> {
    // Weights may be a folder.
    if let (Ok(to), Ok(from)) = (path.canonicalize(), weights.canonicalize())
        && to.starts_with(from)
    {
        let path = path.display();
        return Err(Usage(anyhow::anyhow!(
            "{path}: is read as `--weights`, so it is not overwritten\n\nhint: choose another name for `--save`"
        ))
        .into());
    }
    check_replaceable(path, "--save", "a backbone that `eval finetune` wrote", |file| {
        let description = header_entry(file, DESCRIPTION_KEY).unwrap_or_default();
        description["provenance"]["recipe"].as_str().is_some_and(|recipe| recipe.starts_with(TUNED))
    })
}

fn outcome(report: &Report<FinetuneScores>, classes: usize) -> anyhow::Result<Outcome> {
    let (scores, protocol) = (&report.scores, &report.protocol);
    let (train_images, val_images) = (protocol.train_samples.expect("train images"), protocol.val_samples);
    let data = format!("{val_images} val, {train_images} train images, {classes} classes");
    let mut outcome = Outcome::new("finetune", data, report)?;
    outcome.metrics = vec![Metric::percent("top-1", scores.accuracy.top1, scores.interval)];
    outcome.metrics.extend(scores.accuracy.top5.map(|top5| Metric::percent("top-5", top5, None)));
    let cells = |score: &EpochScore| {
        let (loss, top1) = (score.train_loss, score.accuracy.top1);
        vec![score.epoch.to_string(), format!("{loss:.4}"), format!("{top1:.2} %")]
    };
    let rows: Vec<Vec<String>> = scores.epochs.iter().map(cells).collect();
    outcome.shown = Some(format!(
        "fine-tuning: {:.2} % top-1 ({}) on {val_images} val images, after epoch {} of {}\n{}:\n{}",
        scores.accuracy.top1,
        between(scores.interval, "%"),
        scores.epoch,
        scores.epochs.len(),
        scores.selection.note,
        table(&["epoch", "loss", "held-out top-1"], &rows)
    ));
    Ok(outcome)
}
