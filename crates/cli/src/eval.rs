//! `dinoxide eval`: frozen-feature evaluations of a weight file.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use dinoxide_data::{DecodeLimits, Source, open};
use dinoxide_evaluation::{
    Extracted, Extraction, FeatureSet, FeatureSource, Features, KnnConfig, LinearConfig, Selection, Token, extract,
    knn, linear, spectrum,
};
use dinoxide_exchange::{Loaded, load};
use dinoxide_model::Backbone;
use dinoxide_model::weights::{Description, write_atomically};
use serde::Serialize;
use serde_json::json;

use crate::table::table;
use crate::terminal::{self, Log};
use crate::{Usage, device};

/// The evaluations. Each reads the architecture from the weight file.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Weighted k-nearest neighbours on CLS tokens
    Knn(KnnArgs),
    /// Linear classifiers on CLS and mean patch tokens, for a grid of learning rates and layers at once
    Linear(LinearArgs),
}

#[derive(clap::Args)]
struct Common {
    /// Weights: a run's `teacher.safetensors`, a `.pth` file of the DINO repositories, a Hugging Face folder, a timm file
    #[arg(long, value_name = "PATH")]
    weights: PathBuf,
    /// Images of known classes: a folder per class, or `synthetic`
    #[arg(long, value_name = "DIR")]
    train: String,
    /// Images to classify, of the same classes
    #[arg(long, value_name = "DIR")]
    val: String,
    /// Side of the crop that the backbone sees, in pixels; default: the size it was trained at
    #[arg(long, value_name = "PX")]
    crop: Option<usize>,
    /// Length of the shorter image side before cropping, in pixels; default: the crop
    #[arg(long, value_name = "PX")]
    resize: Option<usize>,
    /// Images in one forward. Out of memory: lower
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch_size: usize,
    /// Where to compute: `cpu`, `cuda:0`, `vulkan:0`, `metal`
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Also write the result here as JSON
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print one JSON object on stdout and nothing else there
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct KnnArgs {
    #[command(flatten)]
    common: Common,
    /// Numbers of neighbours, all scored in one pass
    #[arg(long, value_name = "K", value_delimiter = ',', default_values_t = [10, 20, 100, 200])]
    k: Vec<usize>,
    /// Temperature of the neighbours' weights
    #[arg(long, value_name = "T", default_value_t = 0.07)]
    temperature: f64,
}

#[derive(clap::Args)]
pub(crate) struct LinearArgs {
    #[command(flatten)]
    common: Common,
    /// SGD iterations
    #[arg(long, value_name = "N", default_value_t = 2000)]
    iterations: usize,
    /// Samples per iteration
    #[arg(long, value_name = "N", default_value_t = 1024)]
    samples: usize,
    /// Choose the classifier on the val images, as the references do; the score is then of images that the choice has seen
    #[arg(long)]
    select_on_val: bool,
    /// Seed of initial weights, order of samples and held-out samples
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Knn(args) => run_knn(args),
        Command::Linear(args) => run_linear(args),
    }
}

/// A backbone with the features of both sets.
struct Setup {
    backbone: Backbone,
    description: Description,
    device: burn::tensor::Device,
    train: (Arc<dyn Source>, Extracted),
    val: (Arc<dyn Source>, Extracted),
    extraction: Extraction,
    log: Log,
}

impl Setup {
    fn new(common: &Common, last_blocks: usize) -> anyhow::Result<Self> {
        let device = device::parse(&common.device)?;
        if common.batch_size == 0 {
            return Err(Usage(anyhow::anyhow!("`--batch-size` is 0, must be at least 1")).into());
        }
        let Loaded { backbone, description, notes, .. } = load(&common.weights, &device)?;
        terminal::notes(&common.weights, &notes);
        let crop_px = common.crop.unwrap_or(description.image_size);
        let extraction = Extraction {
            resize_px: common.resize.unwrap_or(crop_px),
            crop_px,
            mean: description.mean,
            std: description.std,
            last_blocks: last_blocks.min(description.architecture.layers()),
            batch: common.batch_size,
        };
        let limits = DecodeLimits::default();
        let sources = [open(&common.train, &limits)?, open(&common.val, &limits)?];
        check_classes(&sources, common)?;
        let mut log = Log::new(None)?;
        let [train, val] = sources.map(|source| -> anyhow::Result<(Arc<dyn Source>, Extracted)> {
            let indices: Vec<usize> = (0..source.len()).collect();
            log.bar(indices.len() as u64, 0, "{bar:28} features of {pos}/{len} images, {eta} left");
            let mut progress = |done: usize| log.set(done as u64, String::new());
            let found = extract(&backbone, &*source, &indices, &extraction, &device, &mut progress)?;
            log.clear();
            for rejected in &found.rejected {
                log.line(&format!("warning: {}: {}; left out", rejected.id, rejected.reason));
            }
            Ok((source, found))
        });
        Ok(Self { backbone, description, device, train: train?, val: val?, extraction, log })
    }

    fn source(&self, common: &Common, tokens: Vec<Token>, blocks: usize) -> FeatureSource {
        let depth = self.backbone.architecture().layers();
        let provenance = &self.description.provenance;
        let backbone = common.weights.display().to_string();
        FeatureSource {
            backbone: if provenance.is_known() {
                format!("{backbone}, after {} steps", provenance.steps)
            } else {
                backbone
            },
            train_data: common.train.clone(),
            val_data: common.val.clone(),
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

fn check_classes(sources: &[Arc<dyn Source>; 2], common: &Common) -> anyhow::Result<()> {
    let [train, val] = sources;
    for (source, spec) in [(train, &common.train), (val, &common.val)] {
        if source.classes().is_empty() {
            anyhow::bail!(
                "{spec}: the images have no classes\n\nhint: put each class into a folder of its own, `{spec}/<class>/<image>`"
            );
        }
    }
    let unknown: Vec<&str> =
        val.classes().iter().filter(|class| !train.classes().contains(class)).map(String::as_str).collect();
    if !unknown.is_empty() {
        anyhow::bail!(
            "{}: {} of its classes are not in {}: {}",
            common.val,
            unknown.len(),
            common.train,
            unknown[..unknown.len().min(5)].join(", ")
        );
    }
    if val.classes() != train.classes() {
        anyhow::bail!(
            "{} has {} classes and {} has {}: labels would not mean the same\n\nhint: give both the same class folders",
            common.val,
            val.classes().len(),
            common.train,
            train.classes().len()
        );
    }
    Ok(())
}

fn run_knn(args: &KnnArgs) -> anyhow::Result<ExitCode> {
    let common = &args.common;
    let setup = Setup::new(common, 1)?;
    let source = setup.source(common, vec![Token::Cls], 1);
    let (train, val) = (&setup.train, &setup.val);
    let train = train.1.labeled(train.1.last_cls(), &*train.0)?;
    let val_features = val.1.last_cls();
    let val = val.1.labeled(val_features, &*val.0)?;
    let config = KnnConfig { k: args.k.clone(), temperature: args.temperature, ..KnnConfig::default() };
    let report = knn(&train, &val, &source, &config, &setup.device)?;
    let rank = spectrum(val_features, &source, false)?.scores;
    let rows: Vec<Vec<String>> = report
        .scores
        .by_k
        .iter()
        .map(|score| {
            let top5 = score.accuracy.top5.map_or("-".to_owned(), |v| format!("{v:.2} %"));
            vec![score.k.to_string(), format!("{:.2} %", score.accuracy.top1), top5]
        })
        .collect();
    let text = format!(
        "k-NN of {} val images among {} train images, chance {:.2} %, effective rank {:.1} of {}\n{}",
        val.rows(),
        train.rows(),
        100.0 / train.num_classes() as f64,
        rank.effective_rank,
        rank.dim,
        table(&["k", "top-1", "top-5"], &rows)
    );
    let result = json!({
        "task": "knn",
        "weights": common.weights.display().to_string(),
        "provenance": setup.description.provenance,
        "protocol": report.protocol,
        "scores": report.scores,
        "effective_rank": rank.effective_rank,
        "chance": 100.0 / train.num_classes() as f64,
    });
    deliver(common, &result, &text)
}

fn run_linear(args: &LinearArgs) -> anyhow::Result<ExitCode> {
    let common = &args.common;
    let mut setup = Setup::new(common, 4)?;
    let sets = feature_sets(common, &setup)?;
    let selection = if args.select_on_val { Selection::Val } else { Selection::default() };
    let config = LinearConfig {
        iterations: args.iterations,
        batch_size: args.samples,
        seed: args.seed,
        selection,
        ..LinearConfig::default()
    };
    setup.log.bar(1, 0, "{bar:28} classifiers {pos}/{len} iterations, {eta} left");
    let mut total = 0;
    let mut log = setup.log;
    let report = linear(&sets, &config, &setup.device, &mut |progress| {
        if total != progress.total {
            total = progress.total;
            log.bar(total as u64, 0, "{bar:28} classifiers {pos}/{len} iterations, {eta} left");
        }
        log.set(progress.done as u64, String::new());
    })?;
    log.clear();
    let scores = &report.scores;
    let mut names: Vec<&str> = scores.candidates.iter().map(|c| c.feature_set.as_str()).collect();
    names.dedup();
    let rows: Vec<Vec<String>> = names
        .iter()
        .map(|name| {
            let best = scores
                .candidates
                .iter()
                .filter(|c| c.feature_set == *name)
                .max_by(|a, b| a.accuracy.top1.total_cmp(&b.accuracy.top1));
            let best = best.expect("each set has candidates");
            vec![(*name).to_owned(), format!("{:e}", best.learning_rate), format!("{:.2} %", best.accuracy.top1)]
        })
        .collect();
    let text = format!(
        "linear probe: {:.2} % top-1 on {} val images ({}, learning rate {:e})\nbest of each feature set on the images of the selection:\n{}",
        scores.accuracy.top1,
        sets[0].val.rows(),
        scores.feature_set,
        scores.learning_rate,
        table(&["features", "learning rate", "top-1"], &rows)
    );
    let result = json!({
        "task": "linear",
        "weights": common.weights.display().to_string(),
        "provenance": setup.description.provenance,
        "protocol": report.protocol,
        "scores": report.scores,
    });
    deliver(common, &result, &text)
}

/// CLS tokens of the last block and of the last four, without and with the mean patch token.
fn feature_sets(common: &Common, setup: &Setup) -> anyhow::Result<Vec<FeatureSet>> {
    let four = setup.extraction.last_blocks;
    let mut sets = Vec::new();
    for blocks in if four > 1 { vec![1, four] } else { vec![1] } {
        for patches in [false, true] {
            let input = |found: &Extracted| -> anyhow::Result<Features> {
                let cls: Vec<&Features> = found.cls.iter().collect();
                Ok(Features::linear_input(&cls, patches.then_some(&found.patch_mean), blocks)?)
            };
            let tokens = if patches { vec![Token::Cls, Token::PatchMean] } else { vec![Token::Cls] };
            let name = format!(
                "cls of {blocks} block{}{}",
                if blocks > 1 { "s" } else { "" },
                if patches { " + patch mean" } else { "" }
            );
            let (train, val) = (&setup.train, &setup.val);
            sets.push(FeatureSet {
                name,
                source: setup.source(common, tokens, blocks),
                train: train.1.labeled(&input(&train.1)?, &*train.0)?,
                val: val.1.labeled(&input(&val.1)?, &*val.0)?,
            });
        }
    }
    Ok(sets)
}

/// Prints a result, and writes it where asked.
fn deliver(common: &Common, result: &impl Serialize, text: &str) -> anyhow::Result<ExitCode> {
    let pretty = serde_json::to_string_pretty(result)?;
    if let Some(path) = &common.output {
        write(path, &pretty)?;
    }
    terminal::data(if common.json { &pretty } else { text });
    Ok(ExitCode::SUCCESS)
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    if path.is_dir() {
        return Err(Usage(anyhow::anyhow!("{}: is a folder, not a file to write", path.display())).into());
    }
    write_atomically(path, text.as_bytes()).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}
