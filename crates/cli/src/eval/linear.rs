//! `dinoxide eval linear`.

use dinoxide_evaluation::{
    Augmented, FeatureChoice, FeatureSet, LabeledFeatures, LabeledImages, LinearConfig, LinearProgress, LinearScores,
    Report, Selection, Token, linear, linear_augmented,
};

use super::frozen::Frozen;
use super::outcome::{Metric, Outcome, between};
use super::sets::{Pair, Sets};
use crate::table::table;
use crate::terminal::Log;

/// Default of the iterations on features that are computed once.
const CACHED_ITERATIONS: usize = 2000;

/// Whose feature sets are tried.
#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum Grid {
    /// CLS of the last block and of the last four, without and with the mean patch token: 52 classifiers
    Dinov2,
    /// CLS of the last block with the mean patch token: 13 classifiers
    Dinov3,
}

#[derive(clap::Args)]
pub(crate) struct Task {
    #[command(flatten)]
    sets: Sets,
    /// Feature sets to try, each with all learning rates
    #[arg(long, value_name = "GRID", default_value = "dinov2")]
    grid: Grid,
    /// Learning rates to try, stated for 256 samples per iteration; default: the references' 13 from 1e-5 to 0.1
    #[arg(long, value_name = "RATE,RATE,…", value_delimiter = ',')]
    lr: Vec<f64>,
    /// Train on new random crops and flips in every iteration, as the references do: the backbone is run on each of them,
    /// once for all classifiers
    #[arg(long)]
    augment: bool,
    /// SGD iterations; default: 2,000, with `--augment` the references' 12,500
    #[arg(long, value_name = "N")]
    iterations: Option<usize>,
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

impl super::measurement::Task for Task {
    const BLOCKS: usize = 4;

    fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        let pair = Pair::open(&self.sets)?;
        let selection = if self.select_on_val { Selection::Val } else { Selection::default() };
        let default = LinearConfig::default();
        let config = LinearConfig {
            learning_rates: if self.lr.is_empty() { default.learning_rates } else { self.lr.clone() },
            iterations: self.iterations.unwrap_or(if self.augment { default.iterations } else { CACHED_ITERATIONS }),
            batch_size: self.samples,
            seed: self.seed,
            selection,
            ..LinearConfig::default()
        };
        config.validate()?;
        let choices = self.choices(frozen);
        let report = if self.augment {
            augmented(&pair, frozen, &choices, &config)
        } else {
            cached(&pair, frozen, &choices, &config)
        };
        frozen.log.clear();
        let report = report?;
        let scores = &report.scores;
        let rows: Vec<Vec<String>> = choices
            .iter()
            .map(|set| {
                let best = scores
                    .candidates
                    .iter()
                    .filter(|candidate| candidate.feature_set == set.name)
                    .max_by(|a, b| a.accuracy.top1.total_cmp(&b.accuracy.top1))
                    .expect("each set has candidates");
                vec![set.name.clone(), format!("{:e}", best.learning_rate), format!("{:.2} %", best.accuracy.top1)]
            })
            .collect();
        let protocol = &report.protocol;
        let (train_rows, val_rows) = (protocol.train_samples.expect("train images"), protocol.val_samples);
        let data = format!("{val_rows} val, {train_rows} train images, {} classes", pair.classes());
        let mut outcome = Outcome::new("linear", data, &report)?;
        outcome.metrics = vec![Metric::percent("top-1", scores.accuracy.top1, scores.interval)];
        outcome.metrics.extend(scores.accuracy.top5.map(|top5| Metric::percent("top-5", top5, None)));
        outcome.shown = Some(format!(
            "linear probe: {:.2} % top-1 ({}) on {val_rows} val images ({}, learning rate {:e}; {} classifiers)\n{}; best of each feature set there:\n{}",
            scores.accuracy.top1,
            between(scores.interval, "%"),
            scores.feature_set,
            scores.learning_rate,
            scores.candidates.len(),
            scores.selection.note,
            table(&["features", "learning rate", "top-1"], &rows)
        ));
        Ok(outcome)
    }
}

impl Task {
    fn choices(&self, frozen: &Frozen) -> Vec<FeatureChoice> {
        let most = frozen.extraction.last_blocks.min(4);
        let chosen: &[(usize, bool)] = match self.grid {
            Grid::Dinov2 if most > 1 => &[(1, false), (1, true), (most, false), (most, true)],
            Grid::Dinov2 => &[(1, false), (1, true)],
            Grid::Dinov3 => &[(1, true)],
        };
        let choice = |&(blocks, patches): &(usize, bool)| {
            let tokens = if patches { vec![Token::Cls, Token::PatchMean] } else { vec![Token::Cls] };
            let name = format!(
                "cls of {blocks} block{}{}",
                if blocks > 1 { "s" } else { "" },
                if patches { " + patch mean" } else { "" }
            );
            let source = frozen.source(&self.sets.train, &self.sets.val, tokens, blocks);
            FeatureChoice { name, source, blocks, patches }
        };
        chosen.iter().map(choice).collect()
    }
}

/// Shows how far the classifiers are.
fn bar(log: &mut Log) -> impl FnMut(LinearProgress) {
    let mut total = 0;
    move |progress| {
        if total != progress.total {
            total = progress.total;
            log.bar(total as u64, 0, "{bar:28} classifiers {pos}/{len} iterations, {eta} left");
        }
        log.set(progress.done as u64, String::new());
    }
}

/// On features of central crops, computed once.
fn cached(
    pair: &Pair,
    frozen: &mut Frozen,
    choices: &[FeatureChoice],
    config: &LinearConfig,
) -> anyhow::Result<Report<LinearScores>> {
    let mut sets = Vec::with_capacity(choices.len());
    for choice in choices {
        let (train, val) = pair.labeled(frozen, |found| Ok(choice.of(found)?))?;
        sets.push(FeatureSet { name: choice.name.clone(), source: choice.source.clone(), train, val });
    }
    Ok(linear(&sets, config, &frozen.device, &mut bar(&mut frozen.log))?)
}

/// On features of random crops, computed anew in every iteration.
fn augmented(
    pair: &Pair,
    frozen: &mut Frozen,
    choices: &[FeatureChoice],
    config: &LinearConfig,
) -> anyhow::Result<Report<LinearScores>> {
    let found = frozen.features(&pair.val)?;
    let labels = pair.labels(&pair.val, &found.indices);
    let val = |choice: &FeatureChoice| LabeledFeatures::new(choice.of(&found)?, labels.clone(), pair.classes());
    let val = choices.iter().map(val).collect::<Result<Vec<_>, _>>()?;
    let indices = frozen.readable(&pair.train)?;
    let labels = pair.labels(&pair.train, &indices);
    let source = &*pair.train.source;
    let train = LabeledImages { source, indices: &indices, labels: &labels, num_classes: pair.classes() };
    let Frozen { given, extraction, device, log, .. } = frozen;
    let on = Augmented { backbone: &given.backbone, train, choices, val: &val, how: extraction, device };
    Ok(linear_augmented(on, config, &mut bar(log))?)
}
