//! Confidence intervals of mean scores, by drawing the scored samples again with replacement (Efron 1979, percentile
//! method). They tell how much a score would move with other val images of the same kind; they know nothing of other seeds
//! of a training.

use dinoxide_random::{Purpose, stream};
use rand::RngExt;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::selection::draws;

/// How often the samples are drawn again.
pub const RESAMPLES: u64 = 1000;
/// Share of the resampled means that lies inside an interval.
pub const LEVEL: f64 = 0.95;
/// The draws are the same for every score of as many samples, so that two reports differ by their scores alone.
const SEED: u64 = 0;

/// The central 95 % of the means of 1,000 resamples, in the unit of the score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The 2.5th percentile.
    pub low: f64,
    /// The 97.5th percentile.
    pub high: f64,
}

/// Intervals of the means of several scores of the same samples, which are drawn together.
///
/// # Shapes
/// `values`: row-major `[samples, scores]`; one interval for each score. Without a sample there is no interval.
pub fn mean_intervals(values: &[f32], scores: usize) -> Vec<Interval> {
    let samples = values.len() / scores.max(1);
    assert_eq!(samples * scores, values.len(), "{} values of {scores} scores", values.len());
    if samples == 0 {
        return Vec::new();
    }
    let means: Vec<Vec<f64>> = (0..RESAMPLES)
        .into_par_iter()
        .map(|resample| {
            let mut rng = stream(SEED, Purpose::Evaluation, draws::BOOTSTRAP, resample);
            let mut sums = vec![0.0; scores];
            for _ in 0..samples {
                let sample = rng.random_range(0..samples as u32) as usize;
                let row = &values[sample * scores..(sample + 1) * scores];
                sums.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
            }
            sums.into_iter().map(|sum| sum / samples as f64).collect()
        })
        .collect();
    let interval = |score: usize| {
        let mut sorted: Vec<f64> = means.iter().map(|means| means[score]).collect();
        sorted.sort_by(f64::total_cmp);
        let tail = (1.0 - LEVEL) / 2.0;
        Interval { low: quantile(&sorted, tail), high: quantile(&sorted, 1.0 - tail) }
    };
    (0..scores).map(interval).collect()
}

/// The interval of an accuracy in percent.
pub(crate) fn of_hits(hits: impl Iterator<Item = bool>) -> Interval {
    let values: Vec<f32> = hits.map(|hit| if hit { 100.0 } else { 0.0 }).collect();
    mean_intervals(&values, 1).first().copied().unwrap_or_default()
}

/// The quantile of ascending values, linear between two of them.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let position = share * (sorted.len() - 1) as f64;
    let (below, above) = (position.floor() as usize, position.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * (position - position.floor())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::gaussian;

    #[test]
    fn the_interval_is_that_of_the_normal_approximation_for_many_samples() {
        // Of 4,000 samples, 30 % are hits: standard error 0.7246 %.
        let hits = (0..4000).map(|i| i % 10 < 3);
        let Interval { low, high } = of_hits(hits);
        let error = 100.0 * (0.3f64 * 0.7 / 4000.0).sqrt();
        assert!((low - (30.0 - 1.96 * error)).abs() < 0.1 * error, "{low}");
        assert!((high - (30.0 + 1.96 * error)).abs() < 0.1 * error, "{high}");
    }

    #[test]
    fn intervals_hold_the_true_mean_about_as_often_as_they_say() {
        let runs = 200;
        let held = (0..runs)
            .filter(|&run| {
                let Interval { low, high } = mean_intervals(gaussian(50, 1, run).values(), 1)[0];
                low <= 0.0 && 0.0 <= high
            })
            .count();
        assert!((180..=197).contains(&held), "{held} of {runs}");
    }

    #[test]
    fn scores_are_drawn_together_and_constants_have_no_width() {
        let values: Vec<f32> = (0..60).flat_map(|i| [i as f32, 2.0 * i as f32, 7.0]).collect();
        let found = mean_intervals(&values, 3);
        assert_eq!(found.len(), 3);
        assert!((found[1].low - 2.0 * found[0].low).abs() < 1e-9 && (found[1].high - 2.0 * found[0].high).abs() < 1e-9);
        assert!(found[0].low < 29.5 && found[0].high > 29.5);
        assert_eq!(found[2], Interval { low: 7.0, high: 7.0 });
        assert_eq!(mean_intervals(&values, 3), found, "seeded");
        assert!(mean_intervals(&[], 2).is_empty());
    }

    #[test]
    fn quantiles_are_linear_between_values() {
        let sorted = [1.0, 2.0, 4.0, 8.0, 16.0];
        assert_eq!([0.0, 0.125, 0.5, 0.9, 1.0].map(|q| quantile(&sorted, q)), [1.0, 1.5, 4.0, 12.8, 16.0]);
    }
}
