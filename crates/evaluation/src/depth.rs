//! Metrics of monocular depth estimation (Eigen et al. 2014, §3.2, and later additions).

use serde::{Deserialize, Serialize};

use crate::error::EvaluationError;

/// Metrics over a set of pixels, with predicted depth `p` and true depth `t`. Depths and `rmse`, `mae`, `sq_rel` share a
/// unit, usually metres.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DepthScores {
    /// Share of pixels with `max(p/t, t/p) < 1.25`.
    pub a1: f64,
    /// Share of pixels with `max(p/t, t/p) < 1.25²`.
    pub a2: f64,
    /// Share of pixels with `max(p/t, t/p) < 1.25³`.
    pub a3: f64,
    /// Mean `|p − t| / t`.
    pub abs_rel: f64,
    /// `√ mean (p − t)²`.
    pub rmse: f64,
    /// Mean `|log₁₀ p − log₁₀ t|`.
    pub log10: f64,
    /// `√ mean d²`, `d = ln p − ln t`.
    pub rmse_log: f64,
    /// Scale-invariant error: `100·√(mean d² − (mean d)²)`.
    pub silog: f64,
    /// Mean `(p − t)² / t`.
    pub sq_rel: f64,
    /// Mean `|p − t|`.
    pub mae: f64,
}

/// Mean of images' metrics: each image weighs the same, however many valid pixels it has.
#[derive(Clone, Debug, Default)]
pub struct DepthMean {
    sum: DepthScores,
    images: usize,
    skipped: usize,
}

/// The metrics over all pixels that are `valid` and have a true depth above 0, in `f64`.
///
/// # Errors
/// If the lengths differ, there is no such pixel, or at one of them the prediction is not positive and finite or the true
/// depth not finite.
pub fn depth_scores(predictions: &[f32], depths: &[f32], valid: &[bool]) -> Result<DepthScores, EvaluationError> {
    for other in [depths.len(), valid.len()] {
        if predictions.len() != other {
            let predictions = predictions.len();
            return Err(EvaluationError::PredictionCount { task: "depth", predictions, labels: other });
        }
    }
    let mut scores = DepthScores::default();
    let (mut count, mut log_ratio) = (0usize, 0.0);
    for (pixel, (&predicted, &depth)) in predictions.iter().zip(depths).enumerate() {
        // A true depth that is NaN is no missing value but a fault, so it is not skipped like one of 0.
        if !valid[pixel] || depth <= 0.0 {
            continue;
        }
        if !depth.is_finite() {
            return Err(EvaluationError::DepthLabel { pixel, value: depth });
        }
        if !(predicted > 0.0 && predicted.is_finite()) {
            return Err(EvaluationError::DepthPrediction { pixel, value: predicted });
        }
        let (p, t) = (f64::from(predicted), f64::from(depth));
        let (ratio, difference, log) = ((p / t).max(t / p), p - t, p.ln() - t.ln());
        count += 1;
        log_ratio += log;
        scores.a1 += f64::from(u8::from(ratio < 1.25));
        scores.a2 += f64::from(u8::from(ratio < 1.25 * 1.25));
        scores.a3 += f64::from(u8::from(ratio < 1.25 * 1.25 * 1.25));
        scores.abs_rel += difference.abs() / t;
        scores.rmse += difference * difference;
        scores.log10 += (p.log10() - t.log10()).abs();
        scores.rmse_log += log * log;
        scores.sq_rel += difference * difference / t;
        scores.mae += difference.abs();
    }
    if count == 0 {
        return Err(EvaluationError::NoPixels { task: "depth" });
    }
    let count = count as f64;
    let mut scores = scores.map(|sum| sum / count);
    let variance = scores.rmse_log - (log_ratio / count).powi(2);
    // Rounding may leave a variance of nothing slightly negative.
    scores.silog = 100.0 * variance.max(0.0).sqrt();
    scores.rmse = scores.rmse.sqrt();
    scores.rmse_log = scores.rmse_log.sqrt();
    Ok(scores)
}

impl DepthScores {
    fn map(self, f: impl Fn(f64) -> f64) -> Self {
        self.zip(&self, |own, _| f(own))
    }

    fn zip(self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            a1: f(self.a1, other.a1),
            a2: f(self.a2, other.a2),
            a3: f(self.a3, other.a3),
            abs_rel: f(self.abs_rel, other.abs_rel),
            rmse: f(self.rmse, other.rmse),
            log10: f(self.log10, other.log10),
            rmse_log: f(self.rmse_log, other.rmse_log),
            silog: f(self.silog, other.silog),
            sq_rel: f(self.sq_rel, other.sq_rel),
            mae: f(self.mae, other.mae),
        }
    }
}

impl DepthMean {
    /// Adds an image. One without a valid pixel is counted as skipped.
    ///
    /// # Errors
    /// As [`depth_scores`], but for images without a valid pixel.
    pub fn add(&mut self, predictions: &[f32], depths: &[f32], valid: &[bool]) -> Result<(), EvaluationError> {
        match depth_scores(predictions, depths, valid) {
            Ok(scores) => {
                self.sum = self.sum.zip(&scores, |sum, score| sum + score);
                self.images += 1;
                Ok(())
            }
            Err(EvaluationError::NoPixels { .. }) => {
                self.skipped += 1;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Images without a valid pixel.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// The mean over the images that have a valid pixel.
    ///
    /// # Errors
    /// If there is none.
    pub fn scores(&self) -> Result<DepthScores, EvaluationError> {
        if self.images == 0 {
            return Err(EvaluationError::NoPixels { task: "depth" });
        }
        Ok(self.sum.map(|sum| sum / self.images as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_of_two_pixels_by_hand() {
        // p/t = 2 and 1/1.2; the other pixels are not scored.
        let scores = depth_scores(&[4.0, 5.0, 1.0, -3.0], &[2.0, 6.0, 0.0, 2.0], &[true, true, true, false]).unwrap();
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
        let (d1, d2) = (2f64.ln(), -(1.2f64.ln()));
        near(scores.a1, 0.5);
        near(scores.a2, 0.5);
        near(scores.a3, 0.5);
        near(scores.abs_rel, (1.0 + 1.0 / 6.0) / 2.0);
        near(scores.rmse, 2.5f64.sqrt());
        near(scores.log10, (2f64.log10() + 1.2f64.log10()) / 2.0);
        near(scores.rmse_log, ((d1 * d1 + d2 * d2) / 2.0).sqrt());
        near(scores.silog, 50.0 * (d1 - d2));
        near(scores.sq_rel, (2.0 + 1.0 / 6.0) / 2.0);
        near(scores.mae, 1.5);
    }

    #[test]
    fn thresholds_are_strict_and_scaling_leaves_silog_alone() {
        let scores = depth_scores(&[1.25, 1.5625, 1.953_125], &[1.0; 3], &[true; 3]).unwrap();
        assert_eq!((scores.a1, scores.a2, scores.a3), (0.0, 1.0 / 3.0, 2.0 / 3.0));
        let exact = depth_scores(&[3.0, 6.0, 0.75], &[1.0, 2.0, 0.25], &[true; 3]).unwrap();
        assert!(exact.silog < 1e-5 && exact.abs_rel == 2.0);
    }

    #[test]
    fn faults_are_refused_with_their_pixel() {
        let score = |p: f32, t: f32| depth_scores(&[1.0, p], &[1.0, t], &[true; 2]);
        for p in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(matches!(score(p, 2.0), Err(EvaluationError::DepthPrediction { pixel: 1, .. })));
        }
        for t in [f32::NAN, f32::INFINITY] {
            assert!(matches!(score(1.0, t), Err(EvaluationError::DepthLabel { pixel: 1, .. })));
        }
        assert!(matches!(depth_scores(&[1.0], &[1.0, 2.0], &[true]), Err(EvaluationError::PredictionCount { .. })));
        assert!(matches!(depth_scores(&[1.0], &[1.0], &[]), Err(EvaluationError::PredictionCount { .. })));
        assert_eq!(depth_scores(&[1.0], &[1.0], &[false]), Err(EvaluationError::NoPixels { task: "depth" }));
    }

    #[test]
    fn images_weigh_the_same_and_empty_ones_are_counted() {
        let mut mean = DepthMean::default();
        assert!(mean.scores().is_err());
        mean.add(&[2.0], &[1.0], &[true]).unwrap();
        mean.add(&[1.0; 3], &[1.0; 3], &[true; 3]).unwrap();
        mean.add(&[1.0], &[0.0], &[true]).unwrap();
        assert!(mean.add(&[-1.0], &[1.0], &[true]).is_err());
        assert_eq!((mean.scores().unwrap().abs_rel, mean.skipped()), (0.5, 1));
    }
}
