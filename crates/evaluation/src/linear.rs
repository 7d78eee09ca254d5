//! Linear probe: linear classifiers trained by SGD on frozen features, over a grid of learning rates and feature choices
//! (protocol of DINOv2 and DINOv3).
//!
//! The reference systems draw a new random crop of every image at every epoch, which is
//! [`linear_augmented`](mod@crate::linear_augmented); here the features are computed once and cached, without augmentation,
//! which makes the probe some hundred times cheaper and its scores slightly different. The protocol of the result says which
//! it was in its `augmentation`.

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::{
    accuracy::Accuracy,
    bootstrap::Interval,
    error::EvaluationError,
    grid::{Ground, search},
    labels::{LabeledFeatures, check_pair},
    linear_probe::{Outcome, Probes, Samples, Schedule},
    protocol::{FeatureSource, Report},
    selection::{Selection, SelectionReport},
};

/// Batch size for which learning rates are stated.
const REFERENCE_BATCH: f64 = 256.0;

/// Most samples of an iteration: their features are side by side in memory.
const LARGEST_BATCH: usize = 1 << 16;

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
pub struct LinearProgress {
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
    progress: &mut dyn FnMut(LinearProgress),
) -> Result<Report<LinearScores>, EvaluationError> {
    config.validate()?;
    check_feature_sets(feature_sets)?;
    search(&Cached { sets: feature_sets, config, device }, config, progress)
}

/// Features that are known, of at least one set.
struct Cached<'a> {
    sets: &'a [FeatureSet],
    config: &'a LinearConfig,
    device: &'a Device,
}

impl Ground for Cached<'_> {
    fn sets(&self) -> Vec<(&str, FeatureSource)> {
        self.sets.iter().map(|set| (set.name.as_str(), set.source.clone())).collect()
    }

    fn train_labels(&self) -> &[u32] {
        self.sets[0].train.labels()
    }

    fn num_classes(&self) -> usize {
        self.sets[0].train.num_classes()
    }

    fn val_samples(&self) -> usize {
        self.sets[0].val.rows()
    }

    /// One after another: they have nothing to share, and need less memory.
    fn groups(&self) -> Vec<Vec<usize>> {
        (0..self.sets.len()).map(|set| vec![set]).collect()
    }

    fn train(
        &self,
        sets: &[usize],
        rows: &[u32],
        rates: &[f64],
        tick: &mut dyn FnMut(),
    ) -> Result<Vec<Probes>, EvaluationError> {
        let train = |&set: &usize| {
            let samples = Samples { of: &self.sets[set].train, rows };
            Probes::train(samples, &self.config.schedule(rates, set as u64), self.device, |_| tick())
        };
        Ok(sets.iter().map(train).collect())
    }

    fn score(
        &self,
        sets: &[usize],
        probes: &[Probes],
        rows: Option<&[u32]>,
    ) -> Result<Vec<Vec<Outcome>>, EvaluationError> {
        let val_rows: Vec<u32> = (0..self.val_samples() as u32).collect();
        let score = |(&set, probes): (&usize, &Probes)| match rows {
            Some(rows) => probes.score(Samples { of: &self.sets[set].train, rows }, self.device),
            None => probes.score(Samples { of: &self.sets[set].val, rows: &val_rows }, self.device),
        };
        sets.iter().zip(probes).map(score).collect()
    }
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
        if !(1..=LARGEST_BATCH).contains(&self.batch_size) {
            return refuse("batch_size", self.batch_size.to_string(), "from 1 to 65536");
        }
        if !(0.0..1.0).contains(&self.momentum) {
            return refuse("momentum", self.momentum.to_string(), "at least 0 and below 1");
        }
        Ok(())
    }

    pub(crate) fn schedule<'a>(&self, rates: &'a [f64], feature_set: u64) -> Schedule<'a> {
        let Self { iterations, batch_size, momentum, seed, .. } = *self;
        Schedule { rates, iterations, batch_size, momentum, seed, feature_set }
    }
}

/// The rate in use for one that is stated for batches of 256 samples.
pub(crate) fn scaled(rate: f64, batch_size: usize) -> f64 {
    rate * batch_size as f64 / REFERENCE_BATCH
}

/// Checks that there is a set, and that all describe the same samples.
fn check_feature_sets(sets: &[FeatureSet]) -> Result<(), EvaluationError> {
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
    Ok(())
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
    fn settings_and_feature_sets_out_of_range_are_refused() {
        let sets = [set("a", 7, 0.5)];
        for (key, config) in [
            ("learning_rates", LinearConfig { learning_rates: vec![], ..config() }),
            ("learning_rates", LinearConfig { learning_rates: vec![0.1, f64::NAN], ..config() }),
            ("iterations", LinearConfig { iterations: 0, ..config() }),
            ("batch_size", LinearConfig { batch_size: 0, ..config() }),
            ("batch_size", LinearConfig { batch_size: 100_000_000, ..config() }),
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
