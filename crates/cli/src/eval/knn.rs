//! `dinoxide eval knn`.

use dinoxide_evaluation::{FewShot, KnnConfig, knn, spectrum};
use serde_json::json;

use super::check_distinct;
use super::frozen::{Frozen, Tokens};
use super::outcome::{Metric, Outcome, between};
use super::sets::{Pair, Sets};
use crate::Usage;
use crate::table::table;

#[derive(clap::Args)]
pub(crate) struct Task {
    #[command(flatten)]
    sets: Sets,
    #[command(flatten)]
    tokens: Tokens,
    /// Numbers of neighbours, all scored in one pass
    #[arg(long, value_name = "K,K,…", value_delimiter = ',', default_value = "10,20,100,200")]
    k: Vec<usize>,
    /// Temperature of the neighbours' weights
    #[arg(long, value_name = "T", default_value_t = 0.07)]
    temperature: f64,
    /// Also score with this many train images of each class, drawn several times; with those `k` that are at most N, and N
    #[arg(long, value_name = "N,N,…", value_delimiter = ',')]
    shots: Vec<usize>,
    /// Draws of `--shots`
    #[arg(long, value_name = "N", default_value_t = 5, requires = "shots")]
    draws: usize,
    /// Seed of these draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl super::measurement::Task for Task {
    const BLOCKS: usize = 1;

    fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        let pair = Pair::open(&self.sets)?;
        let few_shot =
            (!self.shots.is_empty()).then(|| FewShot { shots: self.shots.clone(), draws: self.draws, seed: self.seed });
        let config = KnnConfig { k: self.k.clone(), temperature: self.temperature, skip_first: false, few_shot };
        config.validate(pair.train.source.len())?;
        check_distinct("few-shot", "--shots", &self.shots)?;
        self.check_shots(&pair)?;
        let tokens = self.tokens.chosen();
        let (train, val) = pair.labeled(frozen, |found| Ok(found.image_features(&tokens)?))?;
        let source = frozen.source(&self.sets.train, &self.sets.val, tokens, 1);
        let report = knn(&train, &val, &source, &config, &frozen.device)?;
        let rank = spectrum(val.features(), &source, false)?.scores;
        let chance = 100.0 / pair.classes() as f64;
        let scores = &report.scores;
        let rows: Vec<Vec<String>> = scores
            .by_k
            .iter()
            .map(|score| {
                let top5 = score.accuracy.top5.map_or("-".to_owned(), |v| format!("{v:.2} %"));
                let top1 = format!("{:.2} %", score.accuracy.top1);
                vec![score.k.to_string(), top1, between(score.interval, "%"), top5]
            })
            .collect();
        let mut text = format!(
            "k-NN of {} val images among {} train images, chance {chance:.2} %, effective rank {:.1} of {}\n{}",
            val.rows(),
            train.rows(),
            rank.effective_rank,
            rank.dim,
            table(&["k", "top-1", "95 % interval", "top-5"], &rows)
        );
        if !scores.few_shot.is_empty() {
            let rows: Vec<Vec<String>> = scores
                .few_shot
                .iter()
                .map(|score| {
                    let std = score.std.map_or("-".to_owned(), |std| format!("{std:.2}"));
                    vec![score.shots.to_string(), score.k.to_string(), format!("{:.2} %", score.mean), std]
                })
                .collect();
            let table = table(&["images per class", "k", "top-1", "± std"], &rows);
            text = format!("{text}\nwith few train images, mean of {} draws:\n{table}", self.draws);
        }
        let data = format!("{} val, {} train images, {} classes", val.rows(), train.rows(), pair.classes());
        let mut outcome = Outcome::new("knn", data, &report)?;
        outcome.metrics = scores
            .by_k
            .iter()
            .map(|s| Metric::percent(format!("top-1, k = {}", s.k), s.accuracy.top1, s.interval))
            .collect();
        outcome.metrics.extend(
            scores
                .few_shot
                .iter()
                .map(|s| Metric::percent(format!("top-1 with {} per class, k = {}", s.shots, s.k), s.mean, None)),
        );
        outcome.more = vec![("effective_rank", json!(rank.effective_rank)), ("chance", json!(chance))];
        outcome.shown = Some(text);
        Ok(outcome)
    }
}

impl Task {
    /// Refuses more images per class than a class has, before any features are extracted.
    fn check_shots(&self, pair: &Pair) -> anyhow::Result<()> {
        let source = &pair.train.source;
        let mut counts = vec![0; pair.classes()];
        (0..source.len()).filter_map(|index| source.label(index)).for_each(|label| counts[label as usize] += 1);
        let most = self.shots.iter().copied().max().unwrap_or(0);
        match counts.iter().position(|&count| count < most) {
            Some(class) => Err(Usage(anyhow::anyhow!(
                "{}: class `{}` has {} images, `--shots` asks for {most}\n\nhint: ask for at most {}",
                pair.train.name,
                source.classes()[class],
                counts[class],
                counts.iter().min().expect("classes")
            ))
            .into()),
            None => Ok(()),
        }
    }
}
