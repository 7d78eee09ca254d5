//! Comparing what is drawn at random: our draws and the reference's are two samples of one distribution.

use dinoxide_testkit::{Check, Tolerance};
use serde_json::Value;

/// Draws of ours behind each statistic.
pub(crate) const DRAWS: usize = 20_000;

/// Standard deviations by which a statistic of two samples may differ: by chance, one in two million does; seeds are fixed.
const SIGMAS: f64 = 5.0;

/// What the reference's statistics are rounded to.
const ROUNDING: f64 = 1e-4;

pub(crate) fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap_or_else(|| panic!("{value} is not a list")).iter().map(number).collect()
}

/// Draws of one quantity.
pub(crate) struct Sample {
    values: Vec<f64>,
    mean: f64,
    variance: f64,
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

impl Sample {
    pub(crate) fn new(values: Vec<f64>) -> Self {
        let average = mean(values.iter().copied());
        let variance = mean(values.iter().map(|v| (v - average).powi(2)));
        Self { values, mean: average, variance }
    }

    fn allowed(&self, deviation: f64, n: f64) -> Tolerance {
        let samples = (1.0 / self.values.len() as f64 + 1.0 / n).sqrt();
        Tolerance { atol: SIGMAS * deviation * samples + 1e-9, rtol_of_max: 0.0 }
    }

    /// Compares with the mean of a reference's `n` draws.
    pub(crate) fn compare_mean(&self, check: &mut Check, name: &str, reference: f64, n: f64) {
        let allowed = self.allowed(self.variance.sqrt(), n);
        check.number(&format!("{name}.mean"), reference, self.mean, allowed);
    }

    /// Compares with the variance of a reference's `n` draws.
    pub(crate) fn compare_variance(&self, check: &mut Check, name: &str, reference: f64, n: f64) {
        let spread = mean(self.values.iter().map(|v| ((v - self.mean).powi(2) - self.variance).powi(2))).sqrt();
        check.number(&format!("{name}.var"), reference, self.variance, self.allowed(spread, n));
    }

    /// The share of the values in each bin between inner `edges`; the outer bins are open.
    pub(crate) fn shares(&self, edges: &[f64]) -> Vec<f64> {
        let mut shares = vec![0.0; edges.len() + 1];
        for value in &self.values {
            shares[edges.partition_point(|edge| edge <= value)] += 1.0 / self.values.len() as f64;
        }
        shares
    }
}

/// Compares frequencies of [`DRAWS`] draws with those of a reference's `n`: the one that is furthest off for its deviation.
pub(crate) fn compare_frequencies(check: &mut Check, name: &str, found: &[f64], reference: &[f64], n: f64) {
    assert_eq!(found.len(), reference.len(), "{name}: how many frequencies");
    let draws = DRAWS as f64;
    let sigmas = found.iter().zip(reference).map(|(found, reference)| {
        let pooled = (found * draws + reference * n) / (draws + n);
        let deviation = (pooled * (1.0 - pooled) * (1.0 / draws + 1.0 / n)).sqrt();
        (found - reference).abs() / (SIGMAS * deviation + ROUNDING)
    });
    check.number(name, 0.0, sigmas.fold(0.0, f64::max), Tolerance { atol: 1.0, rtol_of_max: 0.0 });
}

/// Compares how often each count occurred with a reference's frequencies: half the sum of the differences.
pub(crate) fn compare_counts(check: &mut Check, name: &str, counts: &[usize], reference: &Value) {
    let reference = reference.as_object().expect("frequencies");
    let found = |count: usize| counts.iter().filter(|&&c| c == count).count() as f64 / counts.len() as f64;
    let keys = reference.keys().map(|key| key.parse::<usize>().expect("a count"));
    let all: std::collections::BTreeSet<usize> = keys.chain(counts.iter().copied()).collect();
    let off = |count: usize| (found(count) - reference.get(&count.to_string()).map_or(0.0, number)).abs();
    let variation = 0.5 * all.into_iter().map(off).sum::<f64>();
    check.number(name, 0.0, variation, Tolerance { atol: 0.02, rtol_of_max: 0.0 });
}
