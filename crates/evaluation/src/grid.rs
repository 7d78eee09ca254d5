//! A grid of linear classifiers, feature sets by learning rates: which is chosen, and what it scores.

use crate::{
    bootstrap::of_hits,
    error::EvaluationError,
    linear::{LinearCandidate, LinearConfig, LinearProgress, LinearScores, scaled},
    linear_probe::{Outcome, Probes},
    protocol::{FeatureSource, Method, Protocol, Report},
    selection::{Selection, SelectionReport, stratified_split},
};

/// What the classifiers of a grid are trained and scored on. Rows are those of train.
pub(crate) trait Ground {
    /// Name and origin of each feature set.
    fn sets(&self) -> Vec<(&str, FeatureSource)>;

    /// The classes of the train samples.
    fn train_labels(&self) -> &[u32];

    /// Number of classes.
    fn num_classes(&self) -> usize;

    /// Number of val samples.
    fn val_samples(&self) -> usize;

    /// Feature sets that are trained at once, by number.
    fn groups(&self) -> Vec<Vec<usize>>;

    /// Trains a classifier for each of the learning rates in use on each of the feature sets, on the samples `rows`. `tick`
    /// is called after each iteration.
    fn train(
        &self,
        sets: &[usize],
        rows: &[u32],
        rates: &[f64],
        tick: &mut dyn FnMut(),
    ) -> Result<Vec<Probes>, EvaluationError>;

    /// Scores the classifiers of each of the feature sets, on the train samples `rows`, or on val.
    fn score(
        &self,
        sets: &[usize],
        probes: &[Probes],
        rows: Option<&[u32]>,
    ) -> Result<Vec<Vec<Outcome>>, EvaluationError>;
}

/// Trains and scores all candidates, chooses the best, and scores it on val.
pub(crate) fn search(
    ground: &dyn Ground,
    config: &LinearConfig,
    progress: &mut dyn FnMut(LinearProgress),
) -> Result<Report<LinearScores>, EvaluationError> {
    let (labels, sets, groups) = (ground.train_labels(), ground.sets(), ground.groups());
    let all: Vec<u32> = (0..labels.len() as u32).collect();
    let split = match config.selection {
        Selection::HeldOut { fraction } => Some(stratified_split(labels, fraction, config.seed, "linear")?),
        Selection::Val => None,
    };
    let fit_rows = split.as_ref().map_or(&all, |split| &split.fit);
    let held_out = split.as_ref().map(|split| split.held_out.as_slice());
    let total = config.iterations * (groups.len() + usize::from(split.is_some()));
    let mut done = 0;
    let mut tick = |is_final: bool| {
        done += 1;
        progress(LinearProgress { is_final, done, total });
    };

    let rates: Vec<f64> = config.learning_rates.iter().map(|&rate| scaled(rate, config.batch_size)).collect();
    let mut candidates = Vec::new();
    let mut hits = Vec::new();
    for group in &groups {
        let probes = ground.train(group, fit_rows, &rates, &mut || tick(false))?;
        for (&set, outcomes) in group.iter().zip(ground.score(group, &probes, held_out)?) {
            for (&learning_rate, outcome) in config.learning_rates.iter().zip(outcomes) {
                let Outcome { accuracy, loss, hits: own } = outcome;
                candidates.push(LinearCandidate { feature_set: sets[set].0.to_owned(), learning_rate, accuracy, loss });
                hits.push((set, own));
            }
        }
    }

    let smallest = config.learning_rates.iter().copied().fold(f64::INFINITY, f64::min);
    let diverged = EvaluationError::Diverged { classifiers: candidates.len(), smallest };
    let best = best_candidate(&candidates).ok_or(diverged)?;
    let chosen = candidates[best].clone();
    let (set, hits) = hits.swap_remove(best);
    let (mut accuracy, mut loss, mut hits) = (chosen.accuracy, chosen.loss, hits);
    if split.is_some() {
        let rates = [scaled(chosen.learning_rate, config.batch_size)];
        let probes = ground.train(&[set], &all, &rates, &mut || tick(true))?;
        let outcome = ground.score(&[set], &probes, None)?.remove(0).remove(0);
        (accuracy, loss, hits) = (outcome.accuracy, outcome.loss, outcome.hits);
    }

    let val_samples = ground.val_samples();
    let selection = SelectionReport::new(config.selection, held_out.map_or(val_samples, <[u32]>::len));
    let sources = sets.into_iter().map(|(_, source)| source).collect();
    let method = Method::Linear(config.clone());
    let protocol = Protocol::new(method, sources, Some(labels.len()), val_samples, Some(ground.num_classes()));
    let LinearCandidate { feature_set, learning_rate, .. } = chosen;
    let interval = of_hits(hits.into_iter());
    Ok(Report {
        protocol,
        scores: LinearScores { accuracy, interval, loss, feature_set, learning_rate, selection, candidates },
    })
}

/// Index of the best candidate that did not diverge.
fn best_candidate(candidates: &[LinearCandidate]) -> Option<usize> {
    let finite =
        candidates.iter().enumerate().filter_map(|(i, candidate)| Some((i, candidate.accuracy.top1, candidate.loss?)));
    let better = |best: (usize, f64, f64), next: (usize, f64, f64)| {
        if next.1 > best.1 || (next.1 == best.1 && next.2 < best.2) { next } else { best }
    };
    finite.reduce(better).map(|(i, ..)| i)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::accuracy::Accuracy;

    #[test]
    fn equal_accuracy_goes_to_the_lower_loss_then_to_the_earlier_candidate() {
        let candidate = |top1, loss| LinearCandidate {
            feature_set: String::new(),
            learning_rate: 1.0,
            accuracy: Accuracy { top1, top5: None },
            loss,
        };
        let table =
            [candidate(90.0, None), candidate(70.0, Some(0.5)), candidate(70.0, Some(0.4)), candidate(70.0, Some(0.4))];
        assert_eq!(best_candidate(&table), Some(2));
        assert_eq!(best_candidate(&table[..1]), None);
    }
}
