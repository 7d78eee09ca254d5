//! `dinoxide eval knn`.

use std::process::ExitCode;

use dinoxide_evaluation::{KnnConfig, Token, knn, spectrum};
use serde_json::json;

use super::common::{Common, Setup};
use super::deliver;
use crate::table::table;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Numbers of neighbours, all scored in one pass
    #[arg(long, value_name = "K", value_delimiter = ',', default_values_t = [10, 20, 100, 200])]
    k: Vec<usize>,
    /// Temperature of the neighbours' weights
    #[arg(long, value_name = "T", default_value_t = 0.07)]
    temperature: f64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
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
