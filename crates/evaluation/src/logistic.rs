//! Logistic regression on frozen features over a grid of regularisation strengths (the protocol of DINOv2 and DINOv3 for
//! few labels and fine-grained classes). What is fitted is in [`crate::logistic_model`].

use serde::{Deserialize, Serialize};

use crate::{
    accuracy::{Accuracy, accuracy_of},
    bootstrap::{Interval, of_hits},
    error::EvaluationError,
    labels::{LabeledFeatures, check_pair},
    logistic_model::{LogisticModel, fit},
    protocol::{FeatureSource, Method, Protocol, Report},
    selection::{Selection, SelectionReport, stratified_split},
};

/// Settings of [`logistic()`]. The defaults are the reference systems', but for the selection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogisticConfig {
    /// Weights `C` of the data to try, ascending; each start from the solution of the one before.
    pub c: Vec<f64>,
    /// Most iterations of L-BFGS for each `C`.
    pub max_iterations: usize,
    /// L-BFGS stops when no component of the gradient of `objective / (C · samples)` exceeds this.
    pub tolerance: f64,
    /// Leave out the rest of the grid when this many `C` in a row have not improved on the best accuracy; `None`: never.
    pub patience: Option<usize>,
    /// What `C` is chosen on.
    pub selection: Selection,
    /// Seed of the held-out samples.
    pub seed: u64,
}

impl Default for LogisticConfig {
    fn default() -> Self {
        let c = (0..45).map(|i| 10f64.powf(-6.0 + 11.0 * f64::from(i) / 44.0)).collect();
        Self { c, max_iterations: 1000, tolerance: 1e-8, patience: None, selection: Selection::default(), seed: 0 }
    }
}

/// A `C` of the grid, as seen by the selection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogisticCandidate {
    /// Weight of the data.
    pub c: f64,
    /// Accuracy on the samples of the selection.
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// Iterations of L-BFGS.
    pub iterations: usize,
    /// Whether the tolerance was reached.
    pub converged: bool,
}

/// Result of [`logistic()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogisticScores {
    /// Accuracy on val.
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// Of top-1.
    pub interval: Interval,
    /// The chosen `C`.
    pub c: f64,
    /// What it was chosen on.
    pub selection: SelectionReport,
    /// The `C` that were tried, in the order of the settings.
    pub candidates: Vec<LogisticCandidate>,
    /// The classifier that was scored. Not part of the JSON result.
    #[serde(skip)]
    pub model: Option<LogisticModel>,
}

/// Fits a logistic regression for every `C`, chooses the best, and scores it on val.
///
/// The best has the highest top-1 accuracy on the samples of the selection, the smallest of those that tie. With
/// [`Selection::HeldOut`] it is fitted again on all of train before it is scored. `progress` is called with the number of
/// fits done and their total.
///
/// # Errors
/// If settings are out of range or the splits do not fit together (see [`crate::knn::knn()`]).
pub fn logistic(
    train: &LabeledFeatures,
    val: &LabeledFeatures,
    source: &FeatureSource,
    config: &LogisticConfig,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Report<LogisticScores>, EvaluationError> {
    config.validate()?;
    check_pair(train, val)?;
    let all: Vec<u32> = (0..train.rows() as u32).collect();
    let val_rows: Vec<u32> = (0..val.rows() as u32).collect();
    let split = match config.selection {
        Selection::HeldOut { fraction } => Some(stratified_split(train.labels(), fraction, config.seed, "logistic")?),
        Selection::Val => None,
    };
    let (fit_rows, scored, scored_rows) = match &split {
        Some(split) => (&split.fit, train, &split.held_out),
        None => (&all, val, &val_rows),
    };
    let total = config.c.len() + usize::from(split.is_some());
    let mut candidates: Vec<LogisticCandidate> = Vec::with_capacity(config.c.len());
    let mut previous: Option<LogisticModel> = None;
    let mut best: Option<(usize, LogisticModel)> = None;
    for (i, &c) in config.c.iter().enumerate() {
        let model = fit(train, fit_rows, c, config, previous.as_ref());
        let accuracy = accuracy_of(&model.ranks(scored, scored_rows), train.num_classes());
        if best.as_ref().is_none_or(|(best, _)| accuracy.top1 > candidates[*best].accuracy.top1) {
            best = Some((i, model.clone()));
        }
        let converged = model.gradient_norm <= config.tolerance;
        candidates.push(LogisticCandidate { c, accuracy, iterations: model.iterations, converged });
        previous = Some(model);
        progress(i + 1, total);
        let without_gain = best.as_ref().map_or(0, |(best, _)| i - best);
        if config.patience.is_some_and(|patience| without_gain >= patience) {
            break;
        }
    }
    let (best, mut model) = best.ok_or_else(|| config.no_candidates())?;
    let c = config.c[best];
    if split.is_some() {
        model = fit(train, &all, c, config, Some(&model));
        progress(total, total);
    }
    let ranks = model.ranks(val, &val_rows);
    let accuracy = accuracy_of(&ranks, val.num_classes());
    let interval = of_hits(ranks.into_iter().map(|rank| rank == Some(0)));
    let selection = SelectionReport::new(config.selection, scored_rows.len());
    let method = Method::Logistic(config.clone());
    let protocol =
        Protocol::new(method, vec![source.clone()], Some(train.rows()), val.rows(), Some(train.num_classes()));
    Ok(Report { protocol, scores: LogisticScores { accuracy, interval, c, selection, candidates, model: Some(model) } })
}

impl LogisticConfig {
    /// Checks the settings, before any feature is extracted.
    ///
    /// # Errors
    /// The first that is out of range.
    pub fn validate(&self) -> Result<(), EvaluationError> {
        let refuse =
            |key, value: String, expected| Err(EvaluationError::Setting { task: "logistic", key, value, expected });
        let usable = self.c.iter().all(|c| *c > 0.0 && c.is_finite()) && self.c.is_sorted();
        if self.c.is_empty() || !usable {
            return Err(self.no_candidates());
        }
        if self.max_iterations == 0 {
            return refuse("max_iterations", self.max_iterations.to_string(), "at least 1");
        }
        if self.patience == Some(0) {
            return refuse("patience", "0".into(), "at least 1");
        }
        if !(self.tolerance >= 0.0 && self.tolerance.is_finite()) {
            return refuse("tolerance", self.tolerance.to_string(), "at least 0 and finite");
        }
        Ok(())
    }

    fn no_candidates(&self) -> EvaluationError {
        let expected = "an ascending list of numbers above 0, at least one";
        EvaluationError::Setting { task: "logistic", key: "c", value: format!("{:?}", self.c), expected }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{accuracy::rank, logistic_model::fit_logistic, protocol::test_source, test_data::clustered};

    #[test]
    fn the_default_grid_has_the_references_ends() {
        let c = LogisticConfig::default().c;
        assert_eq!(c.len(), 45);
        assert!((c[0] - 1e-6).abs() < 1e-18 && (c[44] - 1e5).abs() < 1e-6 && (c[4] - 1e-5).abs() < 1e-17);
    }

    #[test]
    fn the_best_c_is_chosen_on_held_out_samples_and_fitted_again_on_all() {
        let (train, val) = (clustered(5, 120, 6, 1.0, 1), clustered(5, 41, 6, 1.0, 2));
        let config = LogisticConfig { c: vec![1e-6, 0.1, 10.0], ..Default::default() };
        let mut calls = Vec::new();
        let report =
            logistic(&train, &val, &test_source(), &config, &mut |done, total| calls.push((done, total))).unwrap();
        assert_eq!(calls, [(1, 4), (2, 4), (3, 4), (4, 4)]);
        let scores = &report.scores;
        assert_eq!((scores.candidates.len(), scores.selection.on.as_str()), (3, "held_out"));
        let best = scores.candidates.iter().map(|c| c.accuracy.top1).fold(0.0, f64::max);
        assert_eq!(scores.candidates.iter().find(|c| c.accuracy.top1 == best).unwrap().c, scores.c);
        let direct = fit_logistic(&train, scores.c, &config).unwrap();
        let model = scores.model.as_ref().unwrap();
        assert!(model.weight.iter().zip(&direct.weight).all(|(a, b)| (a - b).abs() < 1e-4));
        let probabilities = direct.probabilities(val.features()).unwrap();
        assert_eq!(probabilities.len(), 41 * 5);
        let hits = probabilities.chunks(5).zip(val.labels()).filter(|(p, y)| rank(p, **y as usize) == Some(0)).count();
        assert_eq!(scores.accuracy.top1, 100.0 * hits as f64 / 41.0);
        assert!(scores.accuracy.top1 > 60.0 && scores.accuracy.top1 < 100.0, "{}", scores.accuracy.top1);
    }

    #[test]
    fn patience_ends_the_grid_after_so_many_values_without_a_gain() {
        let (train, val) = (clustered(4, 90, 5, 1.0, 1), clustered(4, 30, 5, 1.0, 2));
        let run = |patience| {
            let c = vec![1e-6, 0.03, 1.0, 10.0, 30.0, 100.0, 300.0, 1000.0];
            let config = LogisticConfig { c, patience, ..Default::default() };
            logistic(&train, &val, &test_source(), &config, &mut |_, _| ()).unwrap().scores
        };
        let (all, some) = (run(None), run(Some(2)));
        assert_eq!(all.candidates.len(), 8);
        let best = some.candidates.iter().position(|candidate| candidate.c == some.c).unwrap();
        assert_eq!(some.candidates.len(), best + 3);
        assert!(some.candidates.len() < 8 && some.candidates[..] == all.candidates[..best + 3]);
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let train = clustered(3, 20, 4, 1.0, 1);
        for (key, config) in [
            ("c", LogisticConfig { c: vec![], ..Default::default() }),
            ("c", LogisticConfig { c: vec![1.0, 0.1], ..Default::default() }),
            ("c", LogisticConfig { c: vec![0.0], ..Default::default() }),
            ("max_iterations", LogisticConfig { max_iterations: 0, ..Default::default() }),
            ("patience", LogisticConfig { patience: Some(0), ..Default::default() }),
            ("tolerance", LogisticConfig { tolerance: f64::NAN, ..Default::default() }),
        ] {
            let error = logistic(&train, &train, &test_source(), &config, &mut |_, _| ()).unwrap_err().to_string();
            assert!(error.starts_with(&format!("logistic: `{key}` is ")), "{error}");
        }
    }
}
