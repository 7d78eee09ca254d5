//! `dinoxide eval segmentation`: a head on frozen patch tokens, and mIoU.

use std::path::PathBuf;
use std::rc::Rc;

use dinoxide_data::{AnnotatedSource, MapKind};
use dinoxide_evaluation::dense::HeadConfig;
use dinoxide_evaluation::dense::segmentation::{Classes, Ids, SegmentationHead, validate};
use dinoxide_evaluation::{EvaluationError, Method, Protocol, Report};
use serde_json::json;

use super::dense::{DenseCommon, DenseSetup, DenseTask, HeadArg, HeadArgs, PairArgs, stages, warn};
use super::given::Given;
use super::outcome::{Metric, Outcome};
use crate::Usage;
use crate::table::table;

/// What is needed to train a head.
#[derive(clap::Args)]
#[command(mut_arg("val", |val| val.required(true)))]
pub(crate) struct Task {
    #[command(flatten)]
    common: DenseCommon,
    #[command(flatten)]
    pairs: PairArgs,
    #[command(flatten)]
    kind: HeadArg,
    #[command(flatten)]
    head: HeadArgs,
    /// Id of pixels that are neither trained on nor scored
    #[arg(long, value_name = "ID", default_value_t = 255)]
    void: u32,
    /// Number of classes, whose ids are 0 and up; default: what the train masks have
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
    /// Id 0 is no class and classes begin at 1, as in ADE20K
    #[arg(long)]
    reduce_zero_label: bool,
    /// Text file with the classes' names, a line each
    #[arg(long, value_name = "FILE")]
    class_names: Option<PathBuf>,
}

/// A trained head with what it was trained on.
pub(crate) struct Trained {
    pub(crate) setup: DenseSetup,
    pub(crate) head: SegmentationHead,
    pub(crate) config: HeadConfig,
    pub(crate) classes: Classes,
    pub(crate) names: Vec<String>,
    pub(crate) val: AnnotatedSource,
    pub(crate) train_images: usize,
}

impl Task {
    /// Trains the head.
    pub(crate) fn train(&self, given: &Rc<Given>) -> anyhow::Result<Trained> {
        let config =
            self.head.config("segmentation", HeadConfig { kind: self.kind.kind(), ..HeadConfig::default() })?;
        let mut setup = DenseSetup::windowed(given, &self.common, config.kind)?;
        let train = self.pairs.open_train(MapKind::Mask, &mut setup.log)?;
        let val = self.pairs.open_val(MapKind::Mask, &mut setup.log)?;
        let ids = self.ids();
        let count = match self.classes {
            Some(0) => return Err(Usage(anyhow::anyhow!("`--classes` is 0, must be at least 1")).into()),
            Some(count) => count,
            None => Classes::count_in(&train, self.void, ids)?,
        };
        let names = self.names(count)?;
        let classes = Classes { count, void: self.void, ids };
        let mut log = crate::terminal::Log::new(None)?;
        let found = SegmentationHead::train(&setup.encoder()?, &train, classes, &config, &mut stages(&mut log));
        log.clear();
        let (head, rejected) = found.map_err(|error| self.blamed(error, &train))?;
        warn(&mut log, &rejected);
        let train_images = train.len() - rejected.len();
        Ok(Trained { setup, head, config, classes, names, val, train_images })
    }

    fn ids(&self) -> Ids {
        if self.reduce_zero_label { Ids::FromOne } else { Ids::Classes }
    }

    /// The error for a mask with an id that is no class: wrong usage if `--classes` is below what the masks have.
    pub(crate) fn blamed(&self, error: EvaluationError, source: &AnnotatedSource) -> anyhow::Error {
        let too_few = |given: usize| Classes::count_in(source, self.void, self.ids()).is_ok_and(|found| found > given);
        let is_usage = matches!(error, EvaluationError::Annotation { .. }) && self.classes.is_some_and(too_few);
        if is_usage { Usage(error.into()).into() } else { error.into() }
    }

    fn names(&self, count: usize) -> anyhow::Result<Vec<String>> {
        let Some(path) = &self.class_names else { return Ok((0..count).map(|class| class.to_string()).collect()) };
        let text = std::fs::read_to_string(path).map_err(|e| Usage(anyhow::anyhow!("{}: {e}", path.display())))?;
        let names: Vec<String> = text.lines().map(|line| line.trim().to_owned()).filter(|l| !l.is_empty()).collect();
        if names.len() != count {
            let (path, found) = (path.display(), names.len());
            return Err(Usage(anyhow::anyhow!("{path}: {found} names for {count} classes")).into());
        }
        Ok(names)
    }
}

impl DenseTask for Task {
    fn run(&self, given: &Rc<Given>) -> anyhow::Result<Outcome> {
        let mut trained = self.train(given)?;
        let val = &trained.val;
        let mut log = crate::terminal::Log::new(None)?;
        log.bar(val.len() as u64, 0, "{bar:28} scoring {pos}/{len} val images, {eta} left");
        let encoder = trained.setup.encoder()?;
        let mut progress = |done: usize, _: usize| log.set(done as u64, String::new());
        let found = validate(&trained.head, &encoder, val, trained.classes, &mut progress);
        log.clear();
        let found = found.map_err(|error| self.blamed(error, val))?;
        let inference = encoder.description();
        warn(&mut trained.setup.log, &found.rejected);

        let scores = found.confusion.scores()?;
        let areas = found.confusion.areas();
        let pixels: u64 = areas.iter().map(|[_, _, label]| label).sum();
        let share = |class: usize| 100.0 * areas[class][2] as f64 / pixels as f64;
        let most = (0..areas.len()).map(share).fold(0.0, f64::max);
        let seen = (0..areas.len()).filter(|&class| areas[class][2] > 0).count();
        let constant = most / seen as f64;
        let percent = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2} %"));
        let rows: Vec<Vec<String>> = scores
            .classes
            .iter()
            .enumerate()
            .map(|(class, of)| {
                let name = trained.names[class].clone();
                vec![name, percent(of.iou), percent(of.accuracy), percent(Some(share(class)))]
            })
            .collect();
        let text = format!(
            "segmentation: mIoU {:.2} %, mean accuracy {:.2} %, pixel accuracy {:.2} %\n\
         {} val images, head trained on {}; always the most frequent class: mIoU {constant:.2} %, pixel accuracy {most:.2} %\n{}",
            scores.mean_iou,
            scores.mean_accuracy,
            scores.pixel_accuracy,
            found.images,
            trained.train_images,
            table(&["class", "IoU", "accuracy", "share of pixels"], &rows)
        );
        let pairs = &self.pairs;
        let source = trained.setup.source(&pairs.train, pairs.val.as_deref().unwrap_or_default());
        let head = trained.config.description();
        let method = Method::Segmentation { head, ignored: trained.classes.void, inference };
        let images = (trained.train_images, found.images);
        let protocol = Protocol::new(method, vec![source], Some(images.0), images.1, Some(trained.classes.count));
        let report = Report { protocol, scores };
        let data = format!("{} val, {} train images, {} classes", images.1, images.0, trained.classes.count);
        let mut outcome = Outcome::new("segmentation", data, &report)?;
        let of = |name: &str, value: f64| Metric::percent(name, value, None);
        let scores = &report.scores;
        outcome.metrics = vec![
            of("mIoU", scores.mean_iou),
            of("mean accuracy", scores.mean_accuracy),
            of("pixel accuracy", scores.pixel_accuracy),
        ];
        outcome.more = vec![
            ("class_names", json!(trained.names)),
            ("constant", json!({ "mean_iou": constant, "pixel_accuracy": most })),
        ];
        outcome.shown = Some(text);
        Ok(outcome)
    }
}
