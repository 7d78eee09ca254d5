//! `dinoxide eval logistic`.

use dinoxide_evaluation::{LogisticConfig, Selection, logistic};

use super::frozen::{Frozen, Tokens};
use super::outcome::{Metric, Outcome, between};
use super::sets::{Pair, Sets};
use crate::table::table;

#[derive(clap::Args)]
pub(crate) struct Task {
    #[command(flatten)]
    sets: Sets,
    #[command(flatten)]
    tokens: Tokens,
    /// Weights of the data against the penalty, ascending; default: the references' 45 from 1e-6 to 1e5
    #[arg(long, value_name = "C,C,…", value_delimiter = ',')]
    c: Vec<f64>,
    /// Most iterations of L-BFGS for each C
    #[arg(long, value_name = "N", default_value_t = 1000)]
    max_iterations: usize,
    /// Leave out larger C when N of them in a row have brought no gain; 0: try all, as the references do
    #[arg(long, value_name = "N", default_value_t = 10)]
    patience: usize,
    /// Share of train that C is chosen on
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    held_out: f64,
    /// Choose C on the val images, as the references can; the score is then of images that the choice has seen
    #[arg(long)]
    select_on_val: bool,
    /// Seed of the held-out samples
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl super::measurement::Task for Task {
    const BLOCKS: usize = 1;

    fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        let pair = Pair::open(&self.sets)?;
        let default = LogisticConfig::default();
        let config = LogisticConfig {
            c: if self.c.is_empty() { default.c.clone() } else { self.c.clone() },
            max_iterations: self.max_iterations,
            patience: (self.patience > 0).then_some(self.patience),
            selection: match self.select_on_val {
                true => Selection::Val,
                false => Selection::HeldOut { fraction: self.held_out },
            },
            seed: self.seed,
            ..default
        };
        config.validate()?;
        let tokens = self.tokens.chosen();
        let (train, val) = pair.labeled(frozen, |found| Ok(found.image_features(&tokens)?))?;
        let source = frozen.source(&self.sets.train, &self.sets.val, tokens, 1);
        let log = &mut frozen.log;
        log.bar(config.c.len() as u64 + 1, 0, "{bar:28} logistic regressions {pos}/{len}");
        let report = logistic(&train, &val, &source, &config, &mut |done, _| log.set(done as u64, String::new()));
        log.clear();
        let report = report?;
        let scores = &report.scores;
        let unconverged = scores.candidates.iter().filter(|candidate| !candidate.converged).count();
        if unconverged > 0 {
            let count = scores.candidates.len();
            log.line(&format!("note: {unconverged} of {count} fits ended at {} iterations", self.max_iterations));
        }
        // The grid is long; the candidates around the chosen one say whether it was wide enough.
        let chosen = scores.candidates.iter().position(|candidate| candidate.c == scores.c).unwrap_or(0);
        let around = chosen.saturating_sub(2)..scores.candidates.len().min(chosen + 3);
        let rows: Vec<Vec<String>> = scores.candidates[around]
            .iter()
            .map(|candidate| {
                let name = format!("{:.3e}{}", candidate.c, if candidate.c == scores.c { " *" } else { "" });
                vec![name, format!("{:.2} %", candidate.accuracy.top1), candidate.iterations.to_string()]
            })
            .collect();
        let data = format!("{} val, {} train images, {} classes", val.rows(), train.rows(), pair.classes());
        let mut outcome = Outcome::new("logistic", data, &report)?;
        outcome.metrics = vec![Metric::percent("top-1", scores.accuracy.top1, scores.interval)];
        outcome.metrics.extend(scores.accuracy.top5.map(|top5| Metric::percent("top-5", top5, None)));
        outcome.shown = Some(format!(
            "logistic regression: {:.2} % top-1 ({}) on {} val images, C = {:.3e}\n{}:\n{}",
            scores.accuracy.top1,
            between(scores.interval, "%"),
            val.rows(),
            scores.c,
            scores.selection.note,
            table(&["C", "top-1", "iterations"], &rows)
        ));
        Ok(outcome)
    }
}
