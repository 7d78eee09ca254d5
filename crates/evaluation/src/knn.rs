//! Weighted k-nearest-neighbour classification on frozen features, the evaluation that needs no training
//! (Wu et al. 2018, §3.4; protocol of DINO, DINOv2 and DINOv3).
//!
//! The similarity of a val sample `q` and a train sample `x_j` is their cosine `s_j`. With the `K` most similar train
//! samples, `K` the largest of the asked `k`, neighbour `j` has the weight `w_j = exp(s_j/T) / Σ_{i≤K} exp(s_i/T)`, and
//! class `c` the score `Σ_{j≤k, y_j = c} w_j`. The weights are computed once and truncated to the first `k`, so the scores
//! of a sample sum to less than 1 when `k < K`; the ranking of classes is unaffected.
//! The search for them is exact, see [`crate::neighbors`].

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::{
    accuracy::{Accuracy, RankCounter, rank},
    bootstrap::{Interval, mean_intervals},
    error::EvaluationError,
    few_shot::{FewShot, FewShotScore, few_shot},
    labels::{LabeledFeatures, check_pair},
    neighbors::{Neighbor, search},
    protocol::{FeatureSource, Method, Protocol, Report},
};

/// Settings of [`knn()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KnnConfig {
    /// Numbers of neighbours, each scored; results are in this order.
    pub k: Vec<usize>,
    /// Temperature `T` of the neighbours' weights.
    pub temperature: f64,
    /// Leave out the nearest neighbour of each val sample. For val sets that are part of train, where it is the sample itself.
    pub skip_first: bool,
    /// Also score with a few train samples of each class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot: Option<FewShot>,
}

impl Default for KnnConfig {
    fn default() -> Self {
        Self { k: vec![10, 20, 100, 200], temperature: 0.07, skip_first: false, few_shot: None }
    }
}

/// Accuracy with one number of neighbours.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KnnScore {
    /// Number of neighbours.
    pub k: usize,
    /// Accuracy on val. A class without a neighbour among the `k` never counts as predicted, so top-5 is at most the share
    /// of samples that have their class among their neighbours.
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// Of top-1.
    pub interval: Interval,
}

/// Result of [`knn()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KnnScores {
    /// One score for each `k`, in the order of the settings.
    pub by_k: Vec<KnnScore>,
    /// Scores with a few train samples of each class, where asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub few_shot: Vec<FewShotScore>,
    /// For each `k` the predicted class of every val sample. Not part of the JSON result.
    #[serde(skip)]
    pub predictions: Vec<Vec<u32>>,
}

/// Scores `val` by its nearest neighbours in `train`, for every `k` of the settings in one pass.
///
/// Of equally similar train samples the earlier row is nearer; of equal class scores the lower class is predicted.
///
/// # Errors
/// If the settings are out of range, a `k` exceeds the number of train samples, or the splits do not fit together:
/// different widths or numbers of classes, a single train class, or val classes that train lacks.
pub fn knn(
    train: &LabeledFeatures,
    val: &LabeledFeatures,
    source: &FeatureSource,
    config: &KnnConfig,
    device: &Device,
) -> Result<Report<KnnScores>, EvaluationError> {
    check(train, val, config)?;
    let num_classes = train.num_classes();
    let outcomes = outcomes(train, val, config, device)?;
    let hits: Vec<f32> =
        outcomes.iter().flatten().map(|(_, rank)| if *rank == Some(0) { 100.0 } else { 0.0 }).collect();
    let intervals = mean_intervals(&hits, config.k.len());
    let mut by_k = Vec::with_capacity(config.k.len());
    let mut predictions = Vec::with_capacity(config.k.len());
    for (i, (&k, interval)) in config.k.iter().zip(intervals).enumerate() {
        let mut counter = RankCounter::default();
        outcomes.iter().for_each(|outcome| counter.add(outcome[i].1));
        by_k.push(KnnScore { k, accuracy: counter.accuracy(num_classes), interval });
        predictions.push(outcomes.iter().map(|outcome| outcome[i].0).collect());
    }
    let few_shot = match &config.few_shot {
        Some(settings) => few_shot(train, val, settings, config, device)?,
        None => Vec::new(),
    };
    let method = Method::Knn(config.clone());
    let protocol = Protocol::new(method, vec![source.clone()], Some(train.rows()), val.rows(), Some(num_classes));
    Ok(Report { protocol, scores: KnnScores { by_k, few_shot, predictions } })
}

/// The predicted class, and the rank of the true one unless it has no vote.
pub(crate) type Judgment = (u32, Option<usize>);

/// The judgment of every val sample for each `k`. The settings have been checked.
pub(crate) fn outcomes(
    train: &LabeledFeatures,
    val: &LabeledFeatures,
    config: &KnnConfig,
    device: &Device,
) -> Result<Vec<Vec<Judgment>>, EvaluationError> {
    search(train.features(), val.features(), config.searched(), device, |row, neighbors| {
        let label = val.labels()[row] as usize;
        let mut outcome = Vec::with_capacity(config.k.len());
        for_each_k(neighbors, train, config, |scores| outcome.push(judge(scores, label)));
        outcome
    })
}

/// The class scores that [`knn()`] ranks: for each `k` a row-major matrix.
///
/// # Shapes
/// `[val rows, num_classes]` for each `k`, `f32`; rows sum to 1 for the largest `k` and to less for the others.
///
/// # Errors
/// As [`knn()`].
pub fn class_scores(
    train: &LabeledFeatures,
    val: &LabeledFeatures,
    config: &KnnConfig,
    device: &Device,
) -> Result<Vec<Vec<f32>>, EvaluationError> {
    check(train, val, config)?;
    let rows = search(train.features(), val.features(), config.searched(), device, |_, neighbors| {
        let mut by_k: Vec<Vec<f32>> = Vec::with_capacity(config.k.len());
        for_each_k(neighbors, train, config, |scores| by_k.push(scores.iter().map(|&score| score as f32).collect()));
        by_k
    })?;
    Ok((0..config.k.len()).map(|i| rows.iter().flat_map(|by_k| &by_k[i]).copied().collect()).collect())
}

impl KnnConfig {
    /// Checks the settings for a train set of `train_rows` samples, before any feature is extracted.
    ///
    /// # Errors
    /// Settings out of range, or a `k` above the number of samples to choose from.
    pub fn validate(&self, train_rows: usize) -> Result<(), EvaluationError> {
        let mut distinct = self.k.clone();
        distinct.sort_unstable();
        distinct.dedup();
        if self.k.is_empty() || distinct.len() != self.k.len() || distinct.first() == Some(&0) {
            return Err(setting("k", &self.k, "a list of different numbers, each at least 1"));
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(setting("temperature", self.temperature, "above 0 and finite"));
        }
        self.few_shot.as_ref().map_or(Ok(()), FewShot::check)?;
        // Of a few samples of each class, a sample's nearest need not be itself.
        if self.few_shot.is_some() && self.skip_first {
            return Err(setting("skip_first", true, "false with few shots"));
        }
        let available = train_rows - usize::from(self.skip_first);
        match distinct.last() {
            Some(&k) if k > available => Err(EvaluationError::TooFewNeighbors { k, available }),
            _ => Ok(()),
        }
    }

    /// Neighbours to search for. The settings have been checked, so there is a `k`.
    fn searched(&self) -> usize {
        self.k.iter().copied().max().unwrap_or(0) + usize::from(self.skip_first)
    }
}

fn setting(key: &'static str, value: impl std::fmt::Debug, expected: &'static str) -> EvaluationError {
    EvaluationError::Setting { task: "knn", key, value: format!("{value:?}"), expected }
}

fn check(train: &LabeledFeatures, val: &LabeledFeatures, config: &KnnConfig) -> Result<(), EvaluationError> {
    config.validate(train.rows())?;
    check_pair(train, val)
}

/// Calls `visit` with the class scores for each `k`, in the order of the settings.
fn for_each_k(neighbors: &[Neighbor], train: &LabeledFeatures, config: &KnnConfig, mut visit: impl FnMut(&[f64])) {
    let neighbors = &neighbors[usize::from(config.skip_first)..];
    let nearest = f64::from(neighbors[0].similarity);
    let weights = neighbors.iter().map(|n| ((f64::from(n.similarity) - nearest) / config.temperature).exp());
    let weights: Vec<f64> = weights.collect();
    let total: f64 = weights.iter().sum();
    let mut scores = vec![0.0; train.num_classes()];
    for &k in &config.k {
        scores.fill(0.0);
        for (neighbor, weight) in neighbors.iter().zip(&weights).take(k) {
            scores[train.labels()[neighbor.row] as usize] += weight / total;
        }
        visit(&scores);
    }
}

fn judge(scores: &[f64], label: usize) -> Judgment {
    let best = (1..scores.len()).fold(0, |best, class| if scores[class] > scores[best] { class } else { best });
    let voted = scores[label] > 0.0;
    (best as u32, voted.then(|| rank(scores, label)).flatten())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{features::Features, protocol::test_source, test_data::clustered};

    /// Straight from the definition, one sample at a time, in `f64`.
    fn naive_scores(train: &LabeledFeatures, query: &[f32], k: usize, largest_k: usize, temperature: f64) -> Vec<f64> {
        let unit = |row: &[f32]| -> Vec<f64> {
            let norm = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
            row.iter().map(|&v| f64::from(v) / norm).collect()
        };
        let query = unit(query);
        let mut all: Vec<(f64, usize)> = (0..train.rows())
            .map(|row| (unit(train.features().row(row)).iter().zip(&query).map(|(a, b)| a * b).sum(), row))
            .collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let total: f64 = all[..largest_k].iter().map(|(s, _)| (s / temperature).exp()).sum();
        let mut scores = vec![0.0; train.num_classes()];
        for (similarity, row) in &all[..k] {
            scores[train.labels()[*row] as usize] += (similarity / temperature).exp() / total;
        }
        scores
    }

    #[test]
    fn equals_the_definition_computed_one_sample_at_a_time() {
        let (train, val) = (clustered(7, 130, 11, 0.9, 1), clustered(7, 37, 11, 0.9, 2));
        let config = KnnConfig { k: vec![20, 3, 1, 50], ..Default::default() };
        let device = Device::flex();
        let report = knn(&train, &val, &test_source(), &config, &device).unwrap();
        let scores = class_scores(&train, &val, &config, &device).unwrap();
        let mut cases = 0;
        for (i, &k) in config.k.iter().enumerate() {
            let (mut first, mut five) = (0, 0);
            for row in 0..val.rows() {
                let naive = naive_scores(&train, val.features().row(row), k, 50, 0.07);
                let ours = &scores[i][row * 7..(row + 1) * 7];
                assert!(naive.iter().zip(ours).all(|(a, b)| (a - f64::from(*b)).abs() < 1e-5), "{naive:?} {ours:?}");
                let label = val.labels()[row] as usize;
                let mut order: Vec<usize> = (0..7).filter(|&class| naive[class] > 0.0).collect();
                order.sort_by(|&a, &b| naive[b].total_cmp(&naive[a]).then(a.cmp(&b)));
                first += usize::from(order[0] == label);
                five += usize::from(order.iter().take(5).any(|&class| class == label));
                assert_eq!(report.scores.predictions[i][row] as usize, order[0]);
                cases += 1;
            }
            let expected = Accuracy { top1: 100.0 * first as f64 / 37.0, top5: Some(100.0 * five as f64 / 37.0) };
            let score = &report.scores.by_k[i];
            assert_eq!((score.k, score.accuracy), (k, expected));
            assert!(score.interval.low < expected.top1 && expected.top1 < score.interval.high);
            assert!(expected.top1 > 20.0 && expected.top1 < 100.0, "the data should be neither trivial nor hopeless");
        }
        assert_eq!(cases, 4 * 37);
    }

    #[test]
    fn skipping_the_first_neighbour_scores_a_train_set_on_itself_fairly() {
        let train = clustered(3, 40, 6, 1.5, 4);
        let config = |skip_first| KnnConfig { k: vec![1], skip_first, ..Default::default() };
        let top1 = |skip| {
            let report = knn(&train, &train, &test_source(), &config(skip), &Device::flex()).unwrap();
            report.scores.by_k[0].accuracy.top1
        };
        assert_eq!(top1(false), 100.0);
        assert!(top1(true) < 100.0);
    }

    #[test]
    fn a_class_without_a_neighbour_is_no_hit_and_ties_go_to_the_lower_class() {
        // Two equally similar neighbours, of classes 4 and 2.
        let train = Features::new(3, 2, vec![1.0, 0.0, 2.0, 0.0, 0.0, 1.0]).unwrap();
        let train = LabeledFeatures::new(train, vec![4, 2, 0], 6).unwrap();
        let val = LabeledFeatures::new(Features::new(2, 2, vec![1.0, 0.0, 1.0, 0.0]).unwrap(), vec![0, 4], 6).unwrap();
        let config = KnnConfig { k: vec![2], ..Default::default() };
        let scores = knn(&train, &val, &test_source(), &config, &Device::flex()).unwrap().scores;
        assert_eq!(scores.predictions, [[2, 2]]);
        assert_eq!(scores.by_k[0].accuracy, Accuracy { top1: 0.0, top5: Some(50.0) });
    }

    #[test]
    fn settings_and_splits_out_of_range_are_refused() {
        let (train, val) = (clustered(3, 12, 4, 1.0, 1), clustered(3, 5, 4, 1.0, 2));
        let run = |config: KnnConfig| knn(&train, &val, &test_source(), &config, &Device::flex()).unwrap_err();
        for k in [vec![], vec![0, 3], vec![3, 3]] {
            let error = run(KnnConfig { k, ..Default::default() });
            assert!(error.to_string().starts_with("knn: `k` is ["), "{error}");
        }
        for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = run(KnnConfig { k: vec![1], temperature, ..Default::default() });
            assert!(error.to_string().starts_with("knn: `temperature` is"), "{error}");
        }
        assert_eq!(run(KnnConfig::default()), EvaluationError::TooFewNeighbors { k: 200, available: 12 });
        let skipping = KnnConfig { k: vec![12], skip_first: true, ..Default::default() };
        assert_eq!(run(skipping), EvaluationError::TooFewNeighbors { k: 12, available: 11 });
        let few_shot = Some(FewShot { shots: vec![2], draws: 3, seed: 0 });
        let error = run(KnnConfig { k: vec![2], skip_first: true, few_shot, ..Default::default() });
        assert!(error.to_string().starts_with("knn: `skip_first` is true"), "{error}");
        let wider = clustered(3, 5, 6, 1.0, 2);
        let config = KnnConfig { k: vec![2], ..Default::default() };
        let error = knn(&train, &wider, &test_source(), &config, &Device::flex()).unwrap_err();
        assert_eq!(error, EvaluationError::DimMismatch { train: 4, val: 6 });
    }
}
