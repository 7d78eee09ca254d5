//! `dinoxide eval linear`.

use std::process::ExitCode;

use dinoxide_evaluation::{Extracted, FeatureSet, Features, LinearConfig, Selection, Token, linear};
use serde_json::json;

use super::common::{Common, Setup};
use super::deliver;
use crate::table::table;

#[derive(clap::Args)]
pub(crate) struct Args {
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

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
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
