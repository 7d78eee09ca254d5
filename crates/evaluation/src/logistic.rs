//! Multinomial logistic regression on frozen features, solved to convergence by L-BFGS in `f64` (the low-shot protocol of
//! DINO, DINOv2 and DINOv3).
//!
//! Class `c` has a weight vector `w_c` and a bias `b_c`, also when there are two classes, and the objective is
//! `½ Σ_c ‖w_c‖² + C·Σ_i −ln softmax(W x_i + b)_{y_i}`, the bias not penalised. It has one minimum once `Σ_c b_c = 0`,
//! which a start from zero maintains. Features are used as they are, neither normalised nor standardised.

use nalgebra::{DMatrix, DMatrixView, DMatrixViewMut};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    accuracy::{Accuracy, RankCounter, rank},
    error::EvaluationError,
    features::Features,
    labels::{LabeledFeatures, check_pair},
    lbfgs::minimize,
    protocol::{FeatureSource, Method, Protocol, Report},
    selection::{Selection, SelectionReport, stratified_split},
};

/// Parts of the samples whose gradients are accumulated side by side and then added in order: the sum does not depend on
/// the number of threads.
const PARTS: usize = 16;
/// Samples whose logits exist at the same time in a part.
const BLOCK: usize = 256;

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
    /// What `C` is chosen on.
    pub selection: Selection,
    /// Seed of the held-out samples.
    pub seed: u64,
}

impl Default for LogisticConfig {
    fn default() -> Self {
        let c = (0..45).map(|i| 10f64.powf(-6.0 + 11.0 * f64::from(i) / 44.0)).collect();
        Self { c, max_iterations: 1000, tolerance: 1e-8, selection: Selection::default(), seed: 0 }
    }
}

/// A fitted classifier.
#[derive(Clone, Debug, PartialEq)]
pub struct LogisticModel {
    /// `[num_classes, dim]`, row-major.
    pub weight: Vec<f64>,
    /// `[num_classes]`.
    pub bias: Vec<f64>,
    /// Value of the objective.
    pub objective: f64,
    /// Largest absolute component of the gradient of `objective / (C · samples)`.
    pub gradient_norm: f64,
    /// Iterations taken.
    pub iterations: usize,
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
    /// The chosen `C`.
    pub c: f64,
    /// What it was chosen on.
    pub selection: SelectionReport,
    /// All `C`, in the order of the settings.
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
    config.check()?;
    check_pair(train, val)?;
    let all: Vec<u32> = (0..train.rows() as u32).collect();
    let val_rows: Vec<u32> = (0..val.rows() as u32).collect();
    let split = match config.selection {
        Selection::HeldOut { fraction } => Some(stratified_split(train, fraction, config.seed, "logistic")?),
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
        let accuracy = model.accuracy(scored, scored_rows);
        if best.as_ref().is_none_or(|(best, _)| accuracy.top1 > candidates[*best].accuracy.top1) {
            best = Some((i, model.clone()));
        }
        let converged = model.gradient_norm <= config.tolerance;
        candidates.push(LogisticCandidate { c, accuracy, iterations: model.iterations, converged });
        previous = Some(model);
        progress(i + 1, total);
    }
    let (best, mut model) = best.ok_or_else(|| config.no_candidates())?;
    let c = config.c[best];
    if split.is_some() {
        model = fit(train, &all, c, config, Some(&model));
        progress(total, total);
    }
    let accuracy = model.accuracy(val, &val_rows);
    let selection = SelectionReport::new(config.selection, scored_rows.len());
    let method = Method::Logistic(config.clone());
    let protocol =
        Protocol::new(method, vec![source.clone()], Some(train.rows()), val.rows(), Some(train.num_classes()));
    Ok(Report { protocol, scores: LogisticScores { accuracy, c, selection, candidates, model: Some(model) } })
}

/// Fits one logistic regression to all samples.
///
/// # Errors
/// If `c` is not above 0 or a setting is out of range.
pub fn fit_logistic(
    train: &LabeledFeatures,
    c: f64,
    config: &LogisticConfig,
) -> Result<LogisticModel, EvaluationError> {
    LogisticConfig { c: vec![c], ..config.clone() }.check()?;
    let rows: Vec<u32> = (0..train.rows() as u32).collect();
    Ok(fit(train, &rows, c, config, None))
}

impl LogisticConfig {
    fn check(&self) -> Result<(), EvaluationError> {
        let refuse =
            |key, value: String, expected| Err(EvaluationError::Setting { task: "logistic", key, value, expected });
        let usable = self.c.iter().all(|c| *c > 0.0 && c.is_finite()) && self.c.is_sorted();
        if self.c.is_empty() || !usable {
            return Err(self.no_candidates());
        }
        if self.max_iterations == 0 {
            return refuse("max_iterations", self.max_iterations.to_string(), "at least 1");
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

impl LogisticModel {
    /// Class probabilities of every row: `softmax(W x + b)`, `[rows, num_classes]`, row-major.
    ///
    /// # Errors
    /// If the features are not as wide as those the model was fitted to.
    pub fn probabilities(&self, features: &Features) -> Result<Vec<f64>, EvaluationError> {
        let dim = self.weight.len() / self.bias.len();
        if features.dim() != dim {
            return Err(EvaluationError::DimMismatch { train: dim, val: features.dim() });
        }
        let parameters = Parameters::new(&self.weight, &self.bias);
        let rows: Vec<u32> = (0..features.rows() as u32).collect();
        let mut probabilities = Vec::with_capacity(rows.len() * self.bias.len());
        for rows in rows.chunks(BLOCK) {
            let mut scores = parameters.scores(&gather(features, rows), rows.len());
            scores.chunks_mut(self.bias.len()).for_each(|row| {
                softmax_in_place(row);
            });
            probabilities.extend(scores);
        }
        Ok(probabilities)
    }

    fn accuracy(&self, data: &LabeledFeatures, rows: &[u32]) -> Accuracy {
        let parameters = Parameters::new(&self.weight, &self.bias);
        let mut counter = RankCounter::default();
        let blocks: Vec<Vec<Option<usize>>> = rows
            .par_chunks(BLOCK)
            .map(|rows| {
                let scores = parameters.scores(&gather(data.features(), rows), rows.len());
                let rows = scores.chunks(self.bias.len()).zip(rows);
                rows.map(|(scores, &row)| rank(scores, data.labels()[row as usize] as usize)).collect()
            })
            .collect();
        blocks.into_iter().flatten().for_each(|rank| counter.add(rank));
        counter.accuracy(self.bias.len())
    }
}

/// Weights and biases in the layout of the products.
///
/// Matrices are contiguous and column-major throughout: nalgebra 0.35 reads past the end of small strided views.
struct Parameters<'a> {
    /// `C×D`.
    weight: DMatrix<f64>,
    bias: &'a [f64],
}

impl<'a> Parameters<'a> {
    /// From row-major weights.
    fn new(weight: &[f64], bias: &'a [f64]) -> Self {
        Self { weight: DMatrix::from_row_slice(bias.len(), weight.len() / bias.len(), weight), bias }
    }

    /// `W x + b` of `[rows, D]` inputs: `[rows, C]`, both row-major, which is column-major with samples in columns.
    fn scores(&self, inputs: &[f64], rows: usize) -> Vec<f64> {
        let (classes, dim) = self.weight.shape();
        let mut scores: Vec<f64> = std::iter::repeat_n(self.bias, rows).flatten().copied().collect();
        let inputs = DMatrixView::from_slice(inputs, dim, rows);
        DMatrixViewMut::from_slice(&mut scores, classes, rows).gemm(1.0, &self.weight, &inputs, 1.0);
        scores
    }
}

fn gather(features: &Features, rows: &[u32]) -> Vec<f64> {
    rows.iter().flat_map(|&row| features.row(row as usize)).map(|&value| f64::from(value)).collect()
}

/// Replaces scores by their softmax and returns the logarithm of the sum of their exponentials.
fn softmax_in_place(scores: &mut [f64]) -> f64 {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - largest).exp();
        sum += *score;
    }
    scores.iter_mut().for_each(|score| *score /= sum);
    sum.ln() + largest
}

fn fit(
    data: &LabeledFeatures,
    rows: &[u32],
    c: f64,
    config: &LogisticConfig,
    start: Option<&LogisticModel>,
) -> LogisticModel {
    let (classes, dim) = (data.num_classes(), data.dim());
    let weights = classes * dim;
    let start =
        start.map_or_else(|| vec![0.0; weights + classes], |model| [&model.weight[..], &model.bias[..]].concat());
    // Divided by C·n the objective is the mean loss and a penalty, of like scale for every C and number of samples.
    let scale = c * rows.len() as f64;
    let function = |point: &[f64], gradient: &mut [f64]| {
        let (weight, bias) = point.split_at(weights);
        let loss = mean_loss(data, rows, &Parameters::new(weight, bias), gradient);
        gradient.iter_mut().zip(weight).for_each(|(g, w)| *g += w / scale);
        loss + 0.5 * weight.iter().map(|w| w * w).sum::<f64>() / scale
    };
    let minimum = minimize(function, start, config.tolerance, config.max_iterations);
    let (weight, bias) = minimum.point.split_at(weights);
    LogisticModel {
        weight: weight.to_vec(),
        bias: bias.to_vec(),
        objective: minimum.value * scale,
        gradient_norm: minimum.gradient_norm,
        iterations: minimum.iterations,
    }
}

/// The mean cross-entropy, its gradient written to `gradient`.
fn mean_loss(data: &LabeledFeatures, rows: &[u32], parameters: &Parameters<'_>, gradient: &mut [f64]) -> f64 {
    let parts: Vec<(f64, Vec<f64>)> =
        rows.par_chunks(rows.len().div_ceil(PARTS)).map(|rows| loss_of_part(data, rows, parameters)).collect();
    let count = rows.len() as f64;
    gradient.fill(0.0);
    let mut loss = 0.0;
    for (part_loss, part_gradient) in &parts {
        loss += part_loss;
        gradient.iter_mut().zip(part_gradient).for_each(|(sum, part)| *sum += part);
    }
    gradient.iter_mut().for_each(|sum| *sum /= count);
    loss / count
}

/// The summed cross-entropy of some samples and its gradient: `Σ (softmax − onehot) xᵀ` and `Σ (softmax − onehot)`.
fn loss_of_part(data: &LabeledFeatures, rows: &[u32], parameters: &Parameters<'_>) -> (f64, Vec<f64>) {
    let (classes, dim) = (data.num_classes(), data.dim());
    let mut gradient = vec![0.0; classes * dim + classes];
    let mut loss = 0.0;
    let (weight_gradient, bias_gradient) = gradient.split_at_mut(classes * dim);
    for rows in rows.chunks(BLOCK) {
        let inputs = gather(data.features(), rows);
        let mut residuals = parameters.scores(&inputs, rows.len());
        for (scores, &row) in residuals.chunks_mut(classes).zip(rows) {
            let label = data.labels()[row as usize] as usize;
            let own = scores[label];
            loss += softmax_in_place(scores) - own;
            scores[label] -= 1.0;
            bias_gradient.iter_mut().zip(&*scores).for_each(|(sum, residual)| *sum += residual);
        }
        let inputs = DMatrixView::from_slice(&inputs, dim, rows.len());
        let residuals = DMatrix::from_row_slice(rows.len(), classes, &residuals);
        DMatrixViewMut::from_slice(&mut *weight_gradient, dim, classes).gemm(1.0, &inputs, &residuals, 1.0);
    }
    (loss, gradient)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{protocol::test_source, test_data::clustered};

    /// The objective by loops.
    fn naive_objective(data: &LabeledFeatures, model: &LogisticModel, c: f64) -> f64 {
        let dim = data.dim();
        let penalty = 0.5 * model.weight.iter().map(|w| w * w).sum::<f64>();
        let loss: f64 = (0..data.rows())
            .map(|row| {
                let x = data.features().row(row);
                let z = |class: usize| {
                    model.bias[class] + (0..dim).map(|d| model.weight[class * dim + d] * f64::from(x[d])).sum::<f64>()
                };
                (0..data.num_classes()).map(|class| z(class).exp()).sum::<f64>().ln() - z(data.labels()[row] as usize)
            })
            .sum();
        penalty + c * loss
    }

    #[test]
    fn the_solution_is_a_minimum_of_the_objective_written_as_loops() {
        let train = clustered(4, 53, 6, 1.2, 1);
        let config = LogisticConfig { tolerance: 1e-9, ..Default::default() };
        let mut cases = 0;
        for c in [1e-4, 0.3, 50.0] {
            let model = fit_logistic(&train, c, &config).unwrap();
            let at_minimum = naive_objective(&train, &model, c);
            assert!((at_minimum - model.objective).abs() < 1e-9 * at_minimum, "{at_minimum} {}", model.objective);
            assert!(model.bias.iter().sum::<f64>().abs() < 1e-9);
            for i in 0..model.weight.len() + model.bias.len() {
                for by in [1e-3, -1e-3] {
                    let mut moved = model.clone();
                    match i.checked_sub(moved.weight.len()) {
                        Some(i) => moved.bias[i] += by,
                        None => moved.weight[i] += by,
                    }
                    assert!(naive_objective(&train, &moved, c) > at_minimum, "parameter {i}, C {c}");
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, 3 * (24 + 4) * 2);
    }

    #[test]
    fn many_samples_in_parts_and_blocks_have_the_gradient_of_finite_differences() {
        let train = clustered(3, PARTS * BLOCK + 77, 2, 1.0, 1);
        let rows: Vec<u32> = (0..train.rows() as u32).collect();
        let point = [0.3, -0.2, 0.5, 0.1, -0.4, 0.2, 0.05, -0.1, 0.2];
        let mean = |point: &[f64]| {
            let mut gradient = vec![0.0; 9];
            let (weight, bias) = point.split_at(6);
            (mean_loss(&train, &rows, &Parameters::new(weight, bias), &mut gradient), gradient)
        };
        let (_, gradient) = mean(&point);
        for i in 0..9 {
            let (mut up, mut down) = (point, point);
            up[i] += 1e-5;
            down[i] -= 1e-5;
            let numeric = (mean(&up).0 - mean(&down).0) / 2e-5;
            assert!((numeric - gradient[i]).abs() < 1e-8, "{i}: {numeric} {}", gradient[i]);
        }
    }

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
    fn settings_out_of_range_are_refused() {
        let train = clustered(3, 20, 4, 1.0, 1);
        for (key, config) in [
            ("c", LogisticConfig { c: vec![], ..Default::default() }),
            ("c", LogisticConfig { c: vec![1.0, 0.1], ..Default::default() }),
            ("c", LogisticConfig { c: vec![0.0], ..Default::default() }),
            ("max_iterations", LogisticConfig { max_iterations: 0, ..Default::default() }),
            ("tolerance", LogisticConfig { tolerance: f64::NAN, ..Default::default() }),
        ] {
            let error = logistic(&train, &train, &test_source(), &config, &mut |_, _| ()).unwrap_err().to_string();
            assert!(error.starts_with(&format!("logistic: `{key}` is ")), "{error}");
        }
        let model = fit_logistic(&train, 1.0, &LogisticConfig::default()).unwrap();
        let error = model.probabilities(&crate::test_data::gaussian(2, 5, 1)).unwrap_err();
        assert_eq!(error, EvaluationError::DimMismatch { train: 4, val: 5 });
    }
}
