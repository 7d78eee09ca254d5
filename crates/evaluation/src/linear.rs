//! Linear probe: linear classifiers trained by SGD on frozen features, over a grid of learning rates and feature choices
//! (protocol of DINOv2 and DINOv3).
//!
//! The reference systems draw a new random crop of every image at every epoch; here the features are computed once and
//! cached, without augmentation, which makes the probe some hundred times cheaper and its scores slightly different. The
//! protocol of the result says so in its `augmentation`.

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::{
    accuracy::Accuracy,
    bootstrap::{Interval, of_hits},
    error::EvaluationError,
    labels::{LabeledFeatures, check_pair},
    linear_probe::{Probes, Samples, Schedule},
    protocol::{FeatureSource, Method, Protocol, Report},
    selection::{Selection, SelectionReport, stratified_split},
};

/// Batch size for which learning rates are stated.
const REFERENCE_BATCH: f64 = 256.0;

/// Settings of [`linear()`]. The defaults are the reference systems', but for the selection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LinearConfig {
    /// Learning rates to try, stated for batches of 256 samples: the rate in use is `rate · batch_size / 256`.
    pub learning_rates: Vec<f64>,
    /// SGD iterations; the learning rate falls to 0 over them along a cosine.
    pub iterations: usize,
    /// Samples per iteration.
    pub batch_size: usize,
    /// Momentum of SGD.
    pub momentum: f64,
    /// What the learning rate and the feature set are chosen on.
    pub selection: Selection,
    /// Seed of initial weights, order of samples, and held-out samples.
    pub seed: u64,
}

impl Default for LinearConfig {
    fn default() -> Self {
        let learning_rates = vec![1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1];
        let selection = Selection::default();
        Self { learning_rates, iterations: 12_500, batch_size: 1024, momentum: 0.9, selection, seed: 0 }
    }
}

/// One choice of features for the same samples, for example the CLS token of the last block, or that of the last four
/// blocks and the mean patch token.
#[derive(Clone, Debug)]
pub struct FeatureSet {
    /// Name in the result.
    pub name: String,
    /// How the features were extracted.
    pub source: FeatureSource,
    /// Train samples.
    pub train: LabeledFeatures,
    /// Val samples.
    pub val: LabeledFeatures,
}

/// How far [`linear()`] is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinearProgress<'a> {
    /// The feature set in training.
    pub feature_set: &'a str,
    /// Whether the chosen classifier is trained, on all of train, after the candidates.
    pub is_final: bool,
    /// Iterations done, of all trainings together.
    pub done: usize,
    /// Iterations there will have been at the end.
    pub total: usize,
}

/// A classifier of the grid, as seen by the selection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinearCandidate {
    /// Name of its feature set.
    pub feature_set: String,
    /// Its learning rate, for batches of 256 samples.
    pub learning_rate: f64,
    /// Accuracy on the samples of the selection.
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// Mean cross-entropy on them in nats; `None` if it is not finite: the classifier diverged and cannot be chosen.
    pub loss: Option<f64>,
}

/// Result of [`linear()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinearScores {
    /// Accuracy of the chosen classifier on val.
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// Of top-1.
    pub interval: Interval,
    /// Its mean cross-entropy on val in nats; `None` if it is not finite.
    pub loss: Option<f64>,
    /// Its feature set.
    pub feature_set: String,
    /// Its learning rate, for batches of 256 samples.
    pub learning_rate: f64,
    /// What it was chosen on.
    pub selection: SelectionReport,
    /// All classifiers, feature set by feature set, in the order of the learning rates.
    pub candidates: Vec<LinearCandidate>,
}

/// Trains a linear classifier for every feature set and learning rate, chooses the best, and scores it on val.
///
/// The best has the highest top-1 accuracy on the samples of the selection; ties go to the lower cross-entropy, then to
/// the earlier candidate. With [`Selection::HeldOut`] the chosen one is trained again on all of train before it is scored.
///
/// # Errors
/// If settings are out of range, a feature set does not describe the same samples and labels as the first, its splits do
/// not fit together (see [`crate::knn::knn()`]), or every classifier diverges.
pub fn linear(
    feature_sets: &[FeatureSet],
    config: &LinearConfig,
    device: &Device,
    progress: &mut dyn FnMut(LinearProgress<'_>),
) -> Result<Report<LinearScores>, EvaluationError> {
    config.validate()?;
    let first = check_feature_sets(feature_sets)?;
    let all: Vec<u32> = (0..first.train.rows() as u32).collect();
    let val_rows: Vec<u32> = (0..first.val.rows() as u32).collect();
    let split = match config.selection {
        Selection::HeldOut { fraction } => Some(stratified_split(&first.train, fraction, config.seed, "linear")?),
        Selection::Val => None,
    };
    let (fit_rows, selection_rows) = split.as_ref().map_or((&all, &val_rows), |split| (&split.fit, &split.held_out));
    let total = config.iterations * (feature_sets.len() + usize::from(split.is_some()));
    let mut finished = 0;

    let rates: Vec<f64> = config.learning_rates.iter().map(|&rate| config.scaled(rate)).collect();
    let mut candidates = Vec::new();
    let mut hits = Vec::new();
    for (number, set) in (0..).zip(feature_sets) {
        let samples = Samples { of: &set.train, rows: fit_rows };
        let probes = Probes::train(samples, &config.schedule(&rates, number), device, |iteration| {
            progress(LinearProgress { feature_set: &set.name, is_final: false, done: finished + iteration, total });
        });
        finished += config.iterations;
        let scored = if split.is_some() { &set.train } else { &set.val };
        let outcomes = probes.score(Samples { of: scored, rows: selection_rows }, device)?;
        candidates.extend(config.learning_rates.iter().zip(outcomes).map(|(&learning_rate, outcome)| {
            hits.push(outcome.hits);
            LinearCandidate {
                feature_set: set.name.clone(),
                learning_rate,
                accuracy: outcome.accuracy,
                loss: outcome.loss,
            }
        }));
    }

    let smallest = config.learning_rates.iter().copied().fold(f64::INFINITY, f64::min);
    let diverged = EvaluationError::Diverged { classifiers: candidates.len(), smallest };
    let best = best_candidate(&candidates).ok_or(diverged)?;
    let chosen = candidates[best].clone();
    let (mut accuracy, mut loss, mut hits) = (chosen.accuracy, chosen.loss, hits.swap_remove(best));
    if split.is_some() {
        let number = best / config.learning_rates.len();
        let set = &feature_sets[number];
        let rates = [config.scaled(chosen.learning_rate)];
        let samples = Samples { of: &set.train, rows: &all };
        let probes = Probes::train(samples, &config.schedule(&rates, number as u64), device, |iteration| {
            progress(LinearProgress { feature_set: &set.name, is_final: true, done: finished + iteration, total });
        });
        let outcome = probes.score(Samples { of: &set.val, rows: &val_rows }, device)?.remove(0);
        (accuracy, loss, hits) = (outcome.accuracy, outcome.loss, outcome.hits);
    }

    let sources = feature_sets.iter().map(|set| set.source.clone()).collect();
    let (train_samples, val_samples) = (Some(first.train.rows()), first.val.rows());
    let method = Method::Linear(config.clone());
    let protocol = Protocol::new(method, sources, train_samples, val_samples, Some(first.train.num_classes()));
    let selection = SelectionReport::new(config.selection, selection_rows.len());
    let LinearCandidate { feature_set, learning_rate, .. } = chosen;
    let interval = of_hits(hits.into_iter());
    Ok(Report {
        protocol,
        scores: LinearScores { accuracy, interval, loss, feature_set, learning_rate, selection, candidates },
    })
}

impl LinearConfig {
    /// Checks the settings, before any feature is extracted.
    ///
    /// # Errors
    /// The first that is out of range.
    pub fn validate(&self) -> Result<(), EvaluationError> {
        let refuse =
            |key, value: String, expected| Err(EvaluationError::Setting { task: "linear", key, value, expected });
        let positive = |rate: &f64| *rate > 0.0 && rate.is_finite();
        if self.learning_rates.is_empty() || !self.learning_rates.iter().all(positive) {
            let expected = "a list of numbers above 0, at least one";
            return refuse("learning_rates", format!("{:?}", self.learning_rates), expected);
        }
        if self.iterations == 0 {
            return refuse("iterations", self.iterations.to_string(), "at least 1");
        }
        if self.batch_size == 0 {
            return refuse("batch_size", self.batch_size.to_string(), "at least 1");
        }
        if !(0.0..1.0).contains(&self.momentum) {
            return refuse("momentum", self.momentum.to_string(), "at least 0 and below 1");
        }
        Ok(())
    }

    /// The rate in use for one that is stated for batches of 256 samples.
    fn scaled(&self, rate: f64) -> f64 {
        rate * self.batch_size as f64 / REFERENCE_BATCH
    }

    fn schedule<'a>(&self, rates: &'a [f64], feature_set: u64) -> Schedule<'a> {
        let Self { iterations, batch_size, momentum, seed, .. } = *self;
        Schedule { rates, iterations, batch_size, momentum, seed, feature_set }
    }
}

/// Checks that all sets describe the same samples, and returns the first.
fn check_feature_sets(sets: &[FeatureSet]) -> Result<&FeatureSet, EvaluationError> {
    let Some(first) = sets.first() else {
        let value = "empty".to_owned();
        return Err(EvaluationError::Setting { task: "linear", key: "feature_sets", value, expected: "at least one" });
    };
    for set in sets {
        for (split, own, expected) in [("train", &set.train, &first.train), ("val", &set.val, &first.val)] {
            let names = || (set.name.clone(), first.name.clone());
            if own.rows() != expected.rows() {
                let ((name, first), rows, expected) = (names(), own.rows(), expected.rows());
                return Err(EvaluationError::FeatureSetRows { name, split, rows, first, expected });
            }
            if let Some(sample) = own.labels().iter().zip(expected.labels()).position(|(a, b)| a != b) {
                let (name, first) = names();
                return Err(EvaluationError::FeatureSetLabels { name, split, first, sample });
            }
        }
        check_pair(&set.train, &set.val)?;
    }
    Ok(first)
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
    use crate::{features::Features, protocol::test_source, test_data::clustered};

    fn set(name: &str, dim: usize, spread: f32) -> FeatureSet {
        let (train, val) = (clustered(6, 90, dim, spread, 1), clustered(6, 35, dim, spread, 2));
        FeatureSet { name: name.to_owned(), source: test_source(), train, val }
    }

    fn config() -> LinearConfig {
        LinearConfig { learning_rates: vec![1e-6, 0.3, 1.0], iterations: 60, batch_size: 32, ..Default::default() }
    }

    fn run(sets: &[FeatureSet], config: &LinearConfig) -> Result<Report<LinearScores>, EvaluationError> {
        linear(sets, config, &Device::flex(), &mut |_| ())
    }

    #[test]
    fn a_good_rate_and_the_better_features_are_chosen_and_nothing_is_random() {
        let sets = [set("noisy", 9, 4.0), set("clean", 7, 0.5)];
        let mut progress = Vec::new();
        let report =
            linear(&sets, &config(), &Device::flex(), &mut |p| progress.push((p.done, p.total, p.is_final))).unwrap();
        let scores = &report.scores;
        assert_eq!(scores.feature_set, "clean");
        assert!(scores.learning_rate > 1e-6);
        assert!(scores.accuracy.top1 > 90.0, "{scores:?}");
        assert_eq!(scores.candidates.len(), 6);
        assert!(scores.candidates[3].accuracy.top1 < scores.accuracy.top1, "a rate of 1e-6 learns nothing");
        assert_eq!((scores.selection.on.as_str(), scores.selection.samples < 15), ("held_out", true));
        assert_eq!(progress.len(), 3 * 60);
        assert_eq!((progress[0], progress[179]), ((1, 180, false), (180, 180, true)));
        assert_eq!(report.protocol.features.len(), 2);
        assert_eq!(run(&sets, &config()).unwrap(), report);

        // The same classifier trained directly, on all of train, at the rate that batches of 32 samples call for.
        let rates = [scores.learning_rate * 32.0 / 256.0];
        let schedule =
            Schedule { rates: &rates, iterations: 60, batch_size: 32, momentum: 0.9, seed: 0, feature_set: 1 };
        let (all, val): (Vec<u32>, Vec<u32>) = ((0..90).collect(), (0..35).collect());
        let probes = Probes::train(Samples { of: &sets[1].train, rows: &all }, &schedule, &Device::flex(), |_| ());
        let direct = probes.score(Samples { of: &sets[1].val, rows: &val }, &Device::flex()).unwrap().remove(0);
        assert!(scores.interval.low < direct.accuracy.top1 && scores.interval.high >= direct.accuracy.top1);
        assert_eq!((scores.accuracy, scores.loss), (direct.accuracy, direct.loss));
    }

    #[test]
    fn selection_on_val_reports_the_best_of_the_table_and_says_that_it_is_optimistic() {
        let config = LinearConfig { selection: Selection::Val, ..config() };
        let scores = run(&[set("a", 7, 1.5)], &config).unwrap().scores;
        let best = scores.candidates.iter().map(|c| c.accuracy.top1).fold(0.0, f64::max);
        assert_eq!(scores.accuracy.top1, best);
        assert_eq!((scores.selection.on.as_str(), scores.selection.samples), ("val", 35));
        assert!(scores.selection.note.contains("optimistic"));
    }

    #[test]
    fn candidates_that_diverge_are_not_chosen_and_if_all_do_that_is_an_error() {
        // Features this large overflow the logits after the first step at such a rate.
        let scale = |data: &LabeledFeatures| {
            let values = data.features().values().iter().map(|v| v * 1e18).collect();
            let features = Features::new(data.rows(), data.dim(), values).unwrap();
            LabeledFeatures::new(features, data.labels().to_vec(), data.num_classes()).unwrap()
        };
        let mut sets = [set("huge", 7, 0.5)];
        sets[0] = FeatureSet { train: scale(&sets[0].train), val: scale(&sets[0].val), ..sets[0].clone() };
        let rates = LinearConfig { learning_rates: vec![1e6, 1e-36], ..config() };
        let scores = run(&sets, &rates).unwrap().scores;
        assert_eq!((scores.learning_rate, scores.candidates[0].loss), (1e-36, None));
        let error = run(&sets, &LinearConfig { learning_rates: vec![1e6], ..config() }).unwrap_err();
        assert_eq!(error, EvaluationError::Diverged { classifiers: 1, smallest: 1e6 });
    }

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

    #[test]
    fn settings_and_feature_sets_out_of_range_are_refused() {
        let sets = [set("a", 7, 0.5)];
        for (key, config) in [
            ("learning_rates", LinearConfig { learning_rates: vec![], ..config() }),
            ("learning_rates", LinearConfig { learning_rates: vec![0.1, f64::NAN], ..config() }),
            ("iterations", LinearConfig { iterations: 0, ..config() }),
            ("batch_size", LinearConfig { batch_size: 0, ..config() }),
            ("momentum", LinearConfig { momentum: 1.0, ..config() }),
        ] {
            let error = run(&sets, &config).unwrap_err().to_string();
            assert!(error.starts_with(&format!("linear: `{key}` is ")), "{error}");
        }
        assert!(run(&[], &config()).is_err());
        let short = FeatureSet { name: "b".into(), train: clustered(6, 80, 4, 1.0, 1), ..sets[0].clone() };
        let error = run(&[sets[0].clone(), short], &config()).unwrap_err();
        assert!(matches!(error, EvaluationError::FeatureSetRows { rows: 80, expected: 90, split: "train", .. }));
        let relabeled = FeatureSet { val: clustered(6, 35, 7, 1.0, 9), ..sets[0].clone() };
        let error = run(&[sets[0].clone(), relabeled], &config()).unwrap_err();
        assert!(matches!(error, EvaluationError::FeatureSetLabels { split: "val", .. }));
    }
}
