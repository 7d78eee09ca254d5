//! `dinoxide eval linear`.

use dinoxide_evaluation::{Extracted, FeatureSet, Features, LinearConfig, Selection, Token, linear};

use super::common::{Frozen, Metric, Outcome, Pair, Sets, between};
use crate::table::table;

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
    /// Feature sets to try, each with 13 learning rates
    #[arg(long, value_name = "GRID", default_value = "dinov2")]
    grid: Grid,
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

impl super::common::Task for Task {
    const BLOCKS: usize = 4;

    fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        let pair = Pair::open(&self.sets)?;
        let selection = if self.select_on_val { Selection::Val } else { Selection::default() };
        let config = LinearConfig {
            iterations: self.iterations,
            batch_size: self.samples,
            seed: self.seed,
            selection,
            ..LinearConfig::default()
        };
        config.validate()?;
        let sets = self.feature_sets(&pair, frozen)?;
        let log = &mut frozen.log;
        let template = "{bar:28} classifiers {pos}/{len} iterations, {eta} left";
        let mut total = 0;
        let report = linear(&sets, &config, &frozen.device, &mut |progress| {
            if total != progress.total {
                total = progress.total;
                log.bar(total as u64, 0, template);
            }
            log.set(progress.done as u64, String::new());
        });
        log.clear();
        let report = report?;
        let scores = &report.scores;
        let rows: Vec<Vec<String>> = sets
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
        let (train_rows, val_rows) = (sets[0].train.rows(), sets[0].val.rows());
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
    fn feature_sets(&self, pair: &Pair, frozen: &mut Frozen) -> anyhow::Result<Vec<FeatureSet>> {
        let most = frozen.extraction.last_blocks.min(4);
        let chosen: &[(usize, bool)] = match self.grid {
            Grid::Dinov2 if most > 1 => &[(1, false), (1, true), (most, false), (most, true)],
            Grid::Dinov2 => &[(1, false), (1, true)],
            Grid::Dinov3 => &[(1, true)],
        };
        let mut sets = Vec::new();
        for &(blocks, patches) in chosen {
            let (train, val) = pair.labeled(frozen, |found: &Extracted| {
                let cls: Vec<&Features> = found.cls.iter().collect();
                Ok(Features::linear_input(&cls, patches.then_some(&found.patch_mean), blocks)?)
            })?;
            let tokens = if patches { vec![Token::Cls, Token::PatchMean] } else { vec![Token::Cls] };
            let name = format!(
                "cls of {blocks} block{}{}",
                if blocks > 1 { "s" } else { "" },
                if patches { " + patch mean" } else { "" }
            );
            let source = frozen.source(&self.sets.train, &self.sets.val, tokens, blocks);
            sets.push(FeatureSet { name, source, train, val });
        }
        Ok(sets)
    }
}
