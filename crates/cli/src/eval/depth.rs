//! `dinoxide eval depth`: a head on frozen patch tokens, and its distance from measured depth.

use std::rc::Rc;

use dinoxide_data::{AnnotatedSource, MapKind};
use dinoxide_evaluation::dense::depth::{DepthHead, DepthImages, DepthOutput, DepthRange, validate};
use dinoxide_evaluation::dense::{HeadConfig, HeadKind};
use dinoxide_evaluation::{Method, Protocol, Report};
use serde_json::json;

use super::dense::{DenseCommon, DenseSetup, DenseTask, HeadArg, HeadArgs, PairArgs, stages, warn};
use super::given::Given;
use super::outcome::{Metric, Outcome};
use crate::Usage;
use crate::table::table;

/// What the head gives for a place.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum HeadOutput {
    /// Weights of 256 evenly spaced depths
    Bins,
    /// The depth itself
    Regression,
}

/// What is needed to train a head.
#[derive(clap::Args)]
pub(crate) struct Task {
    #[command(flatten)]
    common: DenseCommon,
    #[command(flatten)]
    pairs: PairArgs,
    #[command(flatten)]
    kind: HeadArg,
    #[command(flatten)]
    head: HeadArgs,
    /// Metres for a value of 1 in a depth map; 0 is read as missing
    #[arg(long, value_name = "METRES", default_value_t = 0.001)]
    depth_scale: f32,
    /// Depths up to this one are not known, in metres
    #[arg(long, value_name = "METRES", default_value_t = 0.001)]
    min_depth: f32,
    /// Depths from this one on are neither trained on nor scored, in metres; 10 for rooms, 80 for streets
    #[arg(long, value_name = "METRES", default_value_t = 10.0)]
    max_depth: f32,
    /// What the head gives for a place
    #[arg(long, value_enum, default_value = "bins")]
    head_output: HeadOutput,
    /// Instead of `--val`: score the last images of `--train`, in the order of their names, and train on this share
    #[arg(long, value_name = "SHARE")]
    split_by_time: Option<f64>,
    /// Images between the two parts of `--split-by-time` that are in neither
    #[arg(long, value_name = "N", default_value_t = 0, requires = "split_by_time")]
    gap: usize,
}

/// A trained head with what it was trained on.
pub(crate) struct Trained {
    pub(crate) setup: DenseSetup,
    pub(crate) head: DepthHead,
    pub(crate) range: DepthRange,
    pub(crate) scale: f32,
    pub(crate) val: AnnotatedSource,
    config: HeadConfig,
    output: DepthOutput,
    mean: f32,
    pub(crate) train_images: usize,
}

impl Task {
    /// Trains the head.
    pub(crate) fn train(&self, given: &Rc<Given>) -> anyhow::Result<Trained> {
        let kind = self.kind.kind();
        let defaults = HeadConfig { kind, weight_decay: 1e-4, betas: (0.9, 0.99), ..HeadConfig::default() };
        let config = self.head.config("depth", defaults)?;
        let output = match self.head_output {
            HeadOutput::Bins => DepthOutput::Bins(256),
            HeadOutput::Regression => DepthOutput::Regression,
        };
        let range = DepthRange { min: self.min_depth, max: self.max_depth };
        dinoxide_evaluation::dense::depth::check(output, range, self.depth_scale).map_err(|e| Usage(e.into()))?;
        let mut setup = DenseSetup::windowed(given, &self.common, config.kind)?;
        let train = self.pairs.open_train(MapKind::Depth, &mut setup.log)?;
        let (train, val) = match (&self.pairs.val, self.split_by_time) {
            (Some(_), Some(_)) => {
                return Err(Usage(anyhow::anyhow!("`--val` and `--split-by-time` are two ways to say the same")).into());
            }
            (None, None) => {
                return Err(Usage(anyhow::anyhow!(
                    "`--val` is missing: images to score, with their depth maps\n\n\
                     hint: `--split-by-time 0.7 --gap 10` divides the images of one recording"
                ))
                .into());
            }
            (Some(_), None) => {
                let val = self.pairs.open_val(MapKind::Depth, &mut setup.log)?;
                (train, val)
            }
            (None, Some(share)) => {
                let first = (train.len() as f64 * share).round();
                let second = first + self.gap as f64;
                if !(share > 0.0 && share < 1.0) || first < 1.0 || second >= train.len() as f64 {
                    let (all, gap) = (train.len(), self.gap);
                    return Err(Usage(anyhow::anyhow!(
                        "`--split-by-time {share}` with `--gap {gap}` leaves {first} of {all} images to train on and \
                         none to score, or none to train on"
                    ))
                    .into());
                }
                let part = |from: f64, to: usize| train.select(&(from as usize..to).collect::<Vec<_>>());
                (part(0.0, first as usize), part(second, train.len()))
            }
        };
        let mut log = crate::terminal::Log::new(None)?;
        let images = DepthImages { source: &train, scale: self.depth_scale };
        let (head, mean, rejected) =
            DepthHead::train(&setup.encoder()?, images, (output, range), &config, &mut stages(&mut log))?;
        log.clear();
        warn(&mut log, &rejected);
        let (scale, train_images) = (self.depth_scale, train.len() - rejected.len());
        Ok(Trained { setup, head, range, scale, val, config, output, mean, train_images })
    }
}

impl DenseTask for Task {
    fn run(&self, given: &Rc<Given>) -> anyhow::Result<Outcome> {
        let mut trained = self.train(given)?;
        let mut log = crate::terminal::Log::new(None)?;
        let images = DepthImages { source: &trained.val, scale: trained.scale };
        log.bar(images.source.len() as u64, 0, "{bar:28} scoring {pos}/{len} val images, {eta} left");
        let encoder = trained.setup.encoder()?;
        let mut progress = |done: usize, _: usize| log.set(done as u64, String::new());
        let found = validate(&trained.head, &encoder, images, trained.mean, &mut progress)?;
        log.clear();
        let inference = encoder.description();
        warn(&mut trained.setup.log, &found.rejected);
        if found.mean.skipped() > 0 {
            let (skipped, all) = (found.mean.skipped(), found.images);
            trained.setup.log.line(&format!(
                "warning: {skipped} of {all} val depth maps have no depth within the range; not scored"
            ));
        }

        let (scores, constant) = (found.mean.scores()?, found.constant.scores()?);
        let head_name = match trained.config.kind {
            HeadKind::Linear => "linear head",
            HeadKind::Dpt => "DPT head",
        };
        let row = |name: &str, of: &dinoxide_evaluation::depth::DepthScores| {
            let metres = |value: f64| format!("{value:.3}");
            let percent = |value: f64| format!("{:.1} %", 100.0 * value);
            let cells = [metres(of.rmse), metres(of.abs_rel), percent(of.a1), percent(of.a2), percent(of.a3)];
            [vec![name.to_owned()], cells.to_vec()].concat()
        };
        let text = format!(
            "depth: RMSE {:.3} m, AbsRel {:.3} on {} val images, head trained on {}\n{}",
            scores.rmse,
            scores.abs_rel,
            found.images - found.mean.skipped(),
            trained.train_images,
            table(
                &["", "RMSE", "AbsRel", "δ < 1.25", "δ < 1.25²", "δ < 1.25³"],
                &[row(head_name, &scores), row("mean of the train depths", &constant)]
            )
        );
        let pairs = &self.pairs;
        let val = match (&pairs.val, self.split_by_time) {
            (None, Some(share)) => format!("{}, after the first {share} and a gap of {}", pairs.train, self.gap),
            (val, _) => val.clone().unwrap_or_default(),
        };
        let source = trained.setup.source(&pairs.train, &val);
        let output = match trained.output {
            DepthOutput::Bins(count) => format!("{count} bins"),
            DepthOutput::Regression => "regression".to_owned(),
        };
        let head = format!("{output}, {}", trained.config.description());
        let method = Method::Depth { head, range: (trained.range.min, trained.range.max), inference };
        let protocol = Protocol::new(method, vec![source], Some(trained.train_images), found.images, None);
        let report = Report { protocol, scores };
        let data = format!("{} val, {} train images", found.images - found.mean.skipped(), trained.train_images);
        let mut outcome = Outcome::new("depth", data, &report)?;
        let scores = &report.scores;
        outcome.metrics = vec![
            Metric::of("RMSE", scores.rmse, "m"),
            Metric::plain("AbsRel", scores.abs_rel),
            Metric::percent("δ < 1.25", 100.0 * scores.a1, None),
        ];
        outcome.more = vec![("constant", json!(constant))];
        outcome.shown = Some(text);
        Ok(outcome)
    }
}
