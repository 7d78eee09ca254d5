//! k-NN with a few labelled samples of each class, drawn several times (protocol of DINOv2 and DINOv3).

use burn::tensor::Device;
use dinoxide_random::{Purpose, stream};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::{
    error::EvaluationError,
    features::Features,
    knn::{KnnConfig, outcomes},
    labels::LabeledFeatures,
    selection::draws,
};

/// How many samples of each class are drawn, and how often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FewShot {
    /// Numbers of train samples of each class; each is scored.
    pub shots: Vec<usize>,
    /// Draws of the samples. The samples of a smaller number are among those of a larger one in the same draw.
    pub draws: usize,
    /// Seed of the draws.
    pub seed: u64,
}

/// Accuracy with `shots` train samples of each class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FewShotScore {
    /// Train samples of each class.
    pub shots: usize,
    /// Number of neighbours.
    pub k: usize,
    /// Mean top-1 accuracy over the draws, in percent.
    pub mean: f64,
    /// Their standard deviation (divisor: draws less one); `None` with a single draw.
    pub std: Option<f64>,
    /// Top-1 accuracy in each draw.
    pub by_draw: Vec<f64>,
}

/// Scores val with `n` train samples of each class, for every `n` of the settings. The numbers of neighbours are those of
/// the settings that are at most `n`, and `n`.
pub(crate) fn few_shot(
    train: &LabeledFeatures,
    val: &LabeledFeatures,
    few_shot: &FewShot,
    config: &KnnConfig,
    device: &Device,
) -> Result<Vec<FewShotScore>, EvaluationError> {
    let mut scores = Vec::new();
    for &shots in &few_shot.shots {
        let k = neighbors_of(shots, &config.k);
        let config = KnnConfig { k: k.clone(), few_shot: None, ..config.clone() };
        let mut by_draw = vec![Vec::with_capacity(few_shot.draws); k.len()];
        for draw in 0..few_shot.draws {
            let drawn = sample(train, shots, few_shot.seed, draw)?;
            let hits = outcomes(&drawn, val, &config, device)?;
            for (i, by_draw) in by_draw.iter_mut().enumerate() {
                let right = hits.iter().filter(|of_sample| of_sample[i].1 == Some(0)).count();
                by_draw.push(100.0 * right as f64 / val.rows() as f64);
            }
        }
        scores.extend(k.into_iter().zip(by_draw).map(|(k, by_draw)| {
            let (mean, std) = mean_and_std(&by_draw);
            FewShotScore { shots, k, mean, std, by_draw }
        }));
    }
    Ok(scores)
}

impl FewShot {
    pub(crate) fn check(&self) -> Result<(), EvaluationError> {
        let refuse =
            |key, value: String, expected| Err(EvaluationError::Setting { task: "few-shot", key, value, expected });
        if self.shots.is_empty() || self.shots.contains(&0) {
            return refuse("shots", format!("{:?}", self.shots), "a list of numbers, each at least 1");
        }
        if self.draws == 0 {
            return refuse("draws", "0".into(), "at least 1");
        }
        Ok(())
    }
}

/// Numbers of neighbours for `shots` samples of each class, ascending.
fn neighbors_of(shots: usize, k: &[usize]) -> Vec<usize> {
    let mut k: Vec<usize> = k.iter().copied().filter(|&k| k < shots).chain([shots]).collect();
    k.sort_unstable();
    k
}

/// `shots` samples of each class that train has.
fn sample(train: &LabeledFeatures, shots: usize, seed: u64, draw: usize) -> Result<LabeledFeatures, EvaluationError> {
    let mut by_class = vec![Vec::new(); train.num_classes()];
    train.labels().iter().enumerate().for_each(|(row, &label)| by_class[label as usize].push(row));
    let mut chosen = Vec::new();
    for (class, mut rows) in by_class.into_iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
        if rows.len() < shots {
            return Err(EvaluationError::TooFewShots { class: class as u32, available: rows.len(), shots });
        }
        let counter = (draw as u64) << 32 | class as u64;
        rows.shuffle(&mut stream(seed, Purpose::Evaluation, draws::FEW_SHOT, counter));
        chosen.extend_from_slice(&rows[..shots]);
    }
    let values: Vec<f32> = chosen.iter().flat_map(|&row| train.features().row(row)).copied().collect();
    let features = Features::new(chosen.len(), train.dim(), values)?;
    let labels = chosen.iter().map(|&row| train.labels()[row]).collect();
    LabeledFeatures::new(features, labels, train.num_classes())
}

fn mean_and_std(values: &[f64]) -> (f64, Option<f64>) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{knn::knn, protocol::test_source, test_data::clustered};

    fn settings(shots: Vec<usize>, draws: usize) -> KnnConfig {
        KnnConfig { k: vec![2, 5], few_shot: Some(FewShot { shots, draws, seed: 3 }), ..Default::default() }
    }

    fn run(train: &LabeledFeatures, val: &LabeledFeatures, config: &KnnConfig) -> Vec<FewShotScore> {
        knn(train, val, &test_source(), config, &Device::flex()).unwrap().scores.few_shot
    }

    #[test]
    fn each_draw_is_a_knn_among_samples_of_every_class() {
        let (train, val) = (clustered(4, 200, 6, 1.2, 1), clustered(4, 53, 6, 1.2, 2));
        let scores = run(&train, &val, &settings(vec![1, 4, 7], 3));
        let of: Vec<(usize, usize)> = scores.iter().map(|score| (score.shots, score.k)).collect();
        assert_eq!(of, [(1, 1), (4, 2), (4, 4), (7, 2), (7, 5), (7, 7)]);
        for score in &scores {
            assert_eq!(score.by_draw.len(), 3);
            for (draw, &found) in score.by_draw.iter().enumerate() {
                let drawn = sample(&train, score.shots, 3, draw).unwrap();
                assert_eq!(drawn.class_counts(), [score.shots; 4]);
                let config = KnnConfig { k: vec![score.k], ..Default::default() };
                let direct = knn(&drawn, &val, &test_source(), &config, &Device::flex()).unwrap();
                assert_eq!(found, direct.scores.by_k[0].accuracy.top1);
            }
            let mean = score.by_draw.iter().sum::<f64>() / 3.0;
            assert!((score.mean - mean).abs() < 1e-9);
        }
        assert!(scores.iter().any(|score| score.std.unwrap() > 0.0), "draws differ");
        assert!(scores[5].mean > scores[0].mean, "more samples help");
        assert_eq!(run(&train, &val, &settings(vec![4], 1))[0].std, None);
    }

    #[test]
    fn smaller_draws_are_part_of_larger_ones_and_draws_differ() {
        let train = clustered(3, 60, 5, 1.0, 1);
        let rows = |shots, draw| sample(&train, shots, 0, draw).unwrap().features().values().to_vec();
        let (few, many) = (rows(2, 0), rows(3, 0));
        for class in 0..3 {
            assert_eq!(few[class * 10..][..10], many[class * 15..][..10]);
        }
        assert_ne!(few, rows(2, 1));
    }

    #[test]
    fn classes_with_too_few_samples_and_settings_out_of_range_are_refused() {
        let (train, val) = (clustered(3, 30, 5, 1.0, 1), clustered(3, 9, 5, 1.0, 2));
        let error = |config: KnnConfig| knn(&train, &val, &test_source(), &config, &Device::flex()).unwrap_err();
        let smallest = *train.class_counts().iter().min().unwrap();
        let found = error(settings(vec![1, smallest + 1], 2));
        assert!(
            matches!(found, EvaluationError::TooFewShots { available, shots, .. } if available == smallest && shots == smallest + 1)
        );
        for (key, config) in
            [("shots", settings(vec![], 2)), ("shots", settings(vec![0], 2)), ("draws", settings(vec![1], 0))]
        {
            assert!(error(config).to_string().starts_with(&format!("few-shot: `{key}` is ")));
        }
    }

    #[test]
    fn mean_and_deviation_by_hand() {
        assert_eq!(mean_and_std(&[1.0, 3.0, 5.0]), (3.0, Some(2.0)));
        assert_eq!(mean_and_std(&[4.0]), (4.0, None));
    }
}
