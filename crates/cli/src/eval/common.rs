//! What evaluations share: the backbone with the features it gave, the sets they are made of, and what comes of them.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;

use dinoxide_data::{DecodeLimits, Rejected, Source, Subset, open};
use dinoxide_evaluation::copies::descriptor::{Described, describe};
use dinoxide_evaluation::{
    Extracted, Extraction, FeatureSource, Features, Interval, LabeledFeatures, Report, Token, extract, readable,
};
use serde::Serialize;
use serde_json::Value;

use super::given::{Given, Weights};
use super::{check_result, write};
use crate::Usage;
use crate::table::table;
use crate::terminal::{self, Log};

/// A backbone, and how whole images get into it.
#[derive(clap::Args)]
pub(crate) struct Network {
    #[command(flatten)]
    pub(crate) given: Weights,
    #[command(flatten)]
    pub(crate) crops: Crops,
}

/// How whole images get into a backbone.
#[derive(clap::Args)]
pub(crate) struct Crops {
    /// Side of the crop that the backbone sees, in pixels; default: the size it was trained at
    #[arg(long, value_name = "PX")]
    pub(crate) crop: Option<usize>,
    /// Length of the shorter image side before cropping, in pixels; default: the crop
    #[arg(long, value_name = "PX")]
    pub(crate) resize: Option<usize>,
    /// Images in one forward. Out of memory: lower
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) batch_size: usize,
}

impl Crops {
    /// Side of the crop that a backbone sees.
    pub(crate) fn crop_px(&self, given: &Given) -> usize {
        self.crop.unwrap_or(given.description.image_size)
    }
}

/// What stands for an image.
#[derive(clap::Args)]
pub(crate) struct Tokens {
    /// What stands for an image; with several, each is divided by its norm and they are put side by side
    #[arg(long, value_name = "TOKENS,TOKENS,…", value_delimiter = ',', default_value = "cls")]
    tokens: Vec<ImageToken>,
}

/// A token that can stand for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum ImageToken {
    /// The CLS token
    Cls,
    /// The mean of the patch tokens
    Mean,
}

impl Tokens {
    /// In one order, each once.
    pub(crate) fn chosen(&self) -> Vec<Token> {
        let mut chosen = self.tokens.clone();
        chosen.sort_unstable();
        chosen.dedup();
        let token = |token| match token {
            ImageToken::Cls => Token::Cls,
            ImageToken::Mean => Token::PatchMean,
        };
        chosen.into_iter().map(token).collect()
    }
}

/// Refuses a list that has a value twice.
pub(super) fn check_distinct<T: Display + PartialEq>(task: &str, flag: &str, values: &[T]) -> anyhow::Result<()> {
    match values.iter().enumerate().find(|(at, value)| values[..*at].contains(value)) {
        Some((_, twice)) => {
            let message = format!("{task}: `{flag}` has {twice} twice, it must be a list of different values");
            Err(Usage(anyhow::anyhow!(message)).into())
        }
        None => Ok(()),
    }
}

/// Where results go.
#[derive(clap::Args)]
pub(crate) struct Output {
    /// Also write the result here as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Print one JSON object on stdout and nothing else there
    #[arg(long)]
    pub(crate) json: bool,
}

impl Output {
    /// That the result can be written, before anything is measured.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.output.as_deref().map_or(Ok(()), check_result)
    }

    /// Prints a result as text or JSON, and writes it where asked.
    pub(crate) fn deliver(&self, result: &Value, text: &str) -> anyhow::Result<ExitCode> {
        let pretty = serde_json::to_string_pretty(result)?;
        if let Some(path) = &self.output {
            write(path, &pretty)?;
        }
        terminal::data(if self.json { &pretty } else { text });
        Ok(ExitCode::SUCCESS)
    }
}

/// One evaluation of one backbone.
#[derive(clap::Args)]
pub(crate) struct Measurement<T: clap::Args> {
    #[command(flatten)]
    network: Network,
    #[command(flatten)]
    task: T,
    #[command(flatten)]
    output: Output,
}

/// An evaluation: its data and settings.
pub(crate) trait Task {
    /// Last blocks whose CLS tokens it needs.
    const BLOCKS: usize;

    /// Measures, taking features from `frozen`.
    fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome>;
}

impl<T: clap::Args + Task> Measurement<T> {
    pub(super) fn run(&self) -> anyhow::Result<ExitCode> {
        self.output.check()?;
        let mut frozen = Frozen::new(&self.network, T::BLOCKS)?;
        let outcome = self.task.run(&mut frozen)?;
        self.output.deliver(&frozen.given.result(&outcome), &outcome.text())
    }
}

/// One figure of a result.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Metric {
    /// What it is: `top-1, k = 20`.
    pub(crate) name: String,
    pub(crate) value: f64,
    /// `%`, `m`, or nothing.
    pub(crate) unit: &'static str,
    /// With 95 % confidence, from resampled val images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) interval: Option<Interval>,
}

impl Metric {
    /// A score in percent.
    pub(crate) fn percent(name: impl Into<String>, value: f64, interval: impl Into<Option<Interval>>) -> Self {
        Self { name: name.into(), value, unit: "%", interval: interval.into() }
    }

    /// A score from 0 to 1.
    pub(crate) fn plain(name: impl Into<String>, value: f64) -> Self {
        Self::of(name, value, "")
    }

    /// A score without an interval, in a unit.
    pub(crate) fn of(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value, unit, interval: None }
    }

    pub(crate) fn shown(&self) -> String {
        show(self.value, self.unit)
    }

    pub(crate) fn interval_shown(&self) -> String {
        self.interval.map_or("-".into(), |interval| between(interval, self.unit))
    }
}

/// A figure with its unit.
pub(crate) fn show(value: f64, unit: &str) -> String {
    match unit {
        "%" => format!("{value:.2} %"),
        "" => format!("{value:.4}"),
        unit => format!("{value:.4} {unit}"),
    }
}

/// The ends of an interval.
pub(crate) fn between(interval: Interval, unit: &str) -> String {
    if unit == "%" {
        format!("{:.1}–{:.1} %", interval.low, interval.high)
    } else {
        format!("{:.3}–{:.3}", interval.low, interval.high)
    }
}

/// What an evaluation found.
pub(crate) struct Outcome {
    pub(crate) task: &'static str,
    /// The images, in a few words: `9 val images, 24 train images`.
    pub(crate) data: String,
    pub(crate) protocol: Value,
    pub(crate) scores: Value,
    /// The figures to compare, most important first.
    pub(crate) metrics: Vec<Metric>,
    /// Further entries of the JSON result.
    pub(crate) more: Vec<(&'static str, Value)>,
    /// A sentence or table in place of the metrics' own table.
    pub(crate) shown: Option<String>,
}

impl Outcome {
    pub(crate) fn new(task: &'static str, data: String, report: &Report<impl Serialize>) -> anyhow::Result<Self> {
        Ok(Self {
            task,
            data,
            protocol: serde_json::to_value(&report.protocol)?,
            scores: serde_json::to_value(&report.scores)?,
            metrics: Vec::new(),
            more: Vec::new(),
            shown: None,
        })
    }

    /// For a terminal.
    pub(crate) fn text(&self) -> String {
        self.shown.clone().unwrap_or_else(|| {
            let rows: Vec<Vec<String>> =
                self.metrics.iter().map(|m| vec![m.name.clone(), m.shown(), m.interval_shown()]).collect();
            format!("{}: {}\n{}", self.task, self.data, table(&["metric", "value", "95 % interval"], &rows))
        })
    }
}

/// A backbone that is not trained, and the features it gave so far.
pub(crate) struct Frozen {
    pub(crate) given: Rc<Given>,
    /// That of `given`.
    pub(crate) device: burn::tensor::Device,
    pub(crate) extraction: Extraction,
    pub(crate) log: Log,
    seen: Vec<(String, Arc<Extracted>)>,
}

/// A set of images that was listed.
pub(crate) struct Set {
    /// As the user gave it, with what is left out.
    pub(crate) name: String,
    pub(crate) source: Arc<dyn Source>,
}

impl Set {
    /// Lists the images of a folder, or of the built-in images, without those that patterns exclude.
    pub(crate) fn open(spec: &str, exclude: &[String]) -> anyhow::Result<Self> {
        let source = open(spec, &DecodeLimits::default())?;
        if exclude.is_empty() {
            return Ok(Self { name: spec.to_owned(), source });
        }
        let source: Arc<dyn Source> = Arc::new(Subset::excluding(source, exclude)?);
        Ok(Self { name: format!("{spec} without {}", exclude.join(", ")), source })
    }

    /// Refuses images without classes.
    pub(crate) fn labelled(self) -> anyhow::Result<Self> {
        if self.source.classes().is_empty() {
            return Err(Usage(anyhow::anyhow!(
                "{}: the images have no classes\n\nhint: put each class into a folder of its own, `{}/<class>/<image>`, at least two of them and no image beside them",
                self.name, self.name
            ))
            .into());
        }
        Ok(self)
    }
}

impl Frozen {
    pub(crate) fn new(network: &Network, last_blocks: usize) -> anyhow::Result<Self> {
        Self::of(network.given.load()?, &network.crops, last_blocks)
    }

    /// Of a backbone that is loaded.
    pub(crate) fn of(given: Rc<Given>, crops: &Crops, last_blocks: usize) -> anyhow::Result<Self> {
        if crops.batch_size == 0 {
            return Err(Usage(anyhow::anyhow!("`--batch-size` is 0, must be at least 1")).into());
        }
        let crop_px = crops.crop_px(&given);
        let description = &given.description;
        let extraction = Extraction {
            resize_px: crops.resize.unwrap_or(crop_px),
            crop_px,
            mean: description.mean,
            std: description.std,
            last_blocks: last_blocks.min(description.architecture.layers()),
            batch: crops.batch_size,
        };
        Ok(Self { device: given.device.clone(), given, extraction, log: Log::new(None)?, seen: Vec::new() })
    }

    /// The features of a set; a set of the same name is not looked at again.
    pub(crate) fn features(&mut self, set: &Set) -> anyhow::Result<Arc<Extracted>> {
        if let Some((_, found)) = self.seen.iter().find(|(name, _)| *name == set.name) {
            return Ok(Arc::clone(found));
        }
        let indices: Vec<usize> = (0..set.source.len()).collect();
        let log = &mut self.log;
        log.bar(indices.len() as u64, 0, "{bar:28} features of {pos}/{len} images, {eta} left");
        let mut progress = |done: usize| log.set(done as u64, String::new());
        let found =
            extract(&self.given.backbone, &*set.source, &indices, &self.extraction, &self.device, &mut progress);
        log.clear();
        let found = Arc::new(found?);
        self.warn(&found.rejected);
        self.seen.push((set.name.clone(), Arc::clone(&found)));
        Ok(found)
    }

    /// Descriptors of the images `indices` of a set.
    pub(crate) fn descriptors(&mut self, set: &Set, indices: &[usize]) -> anyhow::Result<Described> {
        let log = &mut self.log;
        log.bar(indices.len() as u64, 0, "{bar:28} descriptors of {pos}/{len} images, {eta} left");
        let mut progress = |done: usize| log.set(done as u64, String::new());
        let found =
            describe(&self.given.backbone, &*set.source, indices, &self.extraction, &self.device, &mut progress);
        log.clear();
        let found = found?;
        self.warn(&found.rejected);
        Ok(found)
    }

    /// The images of a set that can be read. What cannot be is left out with a warning.
    pub(crate) fn readable(&mut self, set: &Set) -> anyhow::Result<Vec<usize>> {
        let log = &mut self.log;
        log.bar(set.source.len() as u64, 0, "{bar:28} {pos}/{len} images read once, {eta} left");
        let found = readable(&*set.source, &mut |done| log.set(done as u64, String::new()));
        log.clear();
        let (indices, rejected) = found?;
        self.warn(&rejected);
        Ok(indices)
    }

    /// Lists images that could not be read.
    fn warn(&mut self, rejected: &[Rejected]) {
        for rejected in rejected {
            self.log.line(&format!("warning: {}: {}; left out", rejected.id, rejected.reason));
        }
    }

    /// How features of the last `blocks` blocks come to be; `train` is empty where nothing is trained.
    pub(crate) fn source(&self, train: &str, val: &str, tokens: Vec<Token>, blocks: usize) -> FeatureSource {
        let depth = self.given.backbone.architecture().layers();
        FeatureSource {
            backbone: self.given.name(),
            train_data: train.to_owned(),
            val_data: val.to_owned(),
            tokens,
            layers: (depth - blocks..depth).collect(),
            final_norm: true,
            resize_px: self.extraction.resize_px,
            crop_px: self.extraction.crop_px,
            interpolation: "bicubic, antialias".into(),
            augmentation: "none".into(),
        }
    }
}

/// The sets of a classifier.
#[derive(clap::Args)]
pub(crate) struct Sets {
    /// Images of known classes: a folder per class, or `synthetic`
    #[arg(long, value_name = "DIR")]
    pub(crate) train: String,
    /// Images to classify, of the same classes
    #[arg(long, value_name = "DIR")]
    pub(crate) val: String,
}

/// Images that a classifier is made from, and images that it is scored on. Classes are numbered as in train; val may lack
/// some of them.
pub(crate) struct Pair {
    pub(crate) train: Set,
    pub(crate) val: Set,
}

impl Pair {
    pub(crate) fn open(sets: &Sets) -> anyhow::Result<Self> {
        let (train, val) = (Set::open(&sets.train, &[])?.labelled()?, Set::open(&sets.val, &[])?.labelled()?);
        let classes = train.source.classes();
        let unknown: Vec<&str> =
            val.source.classes().iter().filter(|class| !classes.contains(class)).map(String::as_str).collect();
        if !unknown.is_empty() {
            return Err(Usage(anyhow::anyhow!(
                "{}: {} of its {} classes are not in {}: {}\n\nhint: leave them out of val, or add images of them to train",
                val.name,
                unknown.len(),
                val.source.classes().len(),
                train.name,
                unknown[..unknown.len().min(5)].join(", ")
            ))
            .into());
        }
        Ok(Self { train, val })
    }

    /// Number of classes of train.
    pub(crate) fn classes(&self) -> usize {
        self.train.source.classes().len()
    }

    /// What `input` takes from the features of both, with labels.
    pub(crate) fn labeled(
        &self,
        frozen: &mut Frozen,
        input: impl Fn(&Extracted) -> anyhow::Result<Features>,
    ) -> anyhow::Result<(LabeledFeatures, LabeledFeatures)> {
        let mut labeled = |set: &Set| -> anyhow::Result<LabeledFeatures> {
            let found = frozen.features(set)?;
            Ok(LabeledFeatures::new(input(&found)?, self.labels(set, &found.indices), self.classes())?)
        };
        Ok((labeled(&self.train)?, labeled(&self.val)?))
    }

    /// The classes of images of either set.
    pub(crate) fn labels(&self, set: &Set, indices: &[usize]) -> Vec<u32> {
        let classes = self.train.source.classes();
        let number = |class: &String| classes.iter().position(|known| known == class).expect("a class of train");
        let numbers: Vec<u32> = set.source.classes().iter().map(|class| number(class) as u32).collect();
        indices.iter().map(|&index| numbers[set.source.label(index).expect("a labelled set") as usize]).collect()
    }
}
