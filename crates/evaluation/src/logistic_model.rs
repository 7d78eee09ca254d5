//! Multinomial logistic regression, solved to convergence by L-BFGS in `f64`.
//!
//! Class `c` has a weight vector `w_c` and a bias `b_c`, also when there are two classes, and the objective is
//! `½ Σ_c ‖w_c‖² + C·Σ_i −ln softmax(W x_i + b)_{y_i}`, the bias not penalised. It has one minimum once `Σ_c b_c = 0`,
//! which a start from zero maintains. Features are used as they are, neither normalised nor standardised.

use nalgebra::{DMatrix, DMatrixView, DMatrixViewMut};
use rayon::prelude::*;

use crate::{
    accuracy::rank, error::EvaluationError, features::Features, labels::LabeledFeatures, lbfgs::minimize,
    logistic::LogisticConfig,
};

/// Parts of the samples whose gradients are accumulated side by side and then added in order: the sum does not depend on
/// the number of threads.
const PARTS: usize = 16;
/// Samples whose logits exist at the same time in a part.
const BLOCK: usize = 512;

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

/// Fits one logistic regression to all samples.
///
/// # Errors
/// If `c` is not above 0 or a setting is out of range.
pub fn fit_logistic(
    train: &LabeledFeatures,
    c: f64,
    config: &LogisticConfig,
) -> Result<LogisticModel, EvaluationError> {
    LogisticConfig { c: vec![c], ..config.clone() }.validate()?;
    let rows: Vec<u32> = (0..train.rows() as u32).collect();
    Ok(fit(train, &rows, c, config, None))
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

    /// The rank of the true class of each of the rows.
    pub(crate) fn ranks(&self, data: &LabeledFeatures, rows: &[u32]) -> Vec<Option<usize>> {
        let parameters = Parameters::new(&self.weight, &self.bias);
        let blocks: Vec<Vec<Option<usize>>> = rows
            .par_chunks(BLOCK)
            .map(|rows| {
                let scores = parameters.scores(&gather(data.features(), rows), rows.len());
                let rows = scores.chunks(self.bias.len()).zip(rows);
                rows.map(|(scores, &row)| rank(scores, data.labels()[row as usize] as usize)).collect()
            })
            .collect();
        blocks.concat()
    }
}

/// Weights and biases in the layout of the products.
///
/// Matrices are contiguous and column-major throughout: small products of nalgebra 0.35 step past the end of strided views,
/// whose span in memory they take for their length.
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

/// Fits to some rows, from another solution if given.
pub(crate) fn fit(
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
    use crate::test_data::{clustered, gaussian};

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
    fn features_of_another_width_are_refused() {
        let train = clustered(3, 20, 4, 1.0, 1);
        let model = fit_logistic(&train, 1.0, &LogisticConfig::default()).unwrap();
        let error = model.probabilities(&gaussian(2, 5, 1)).unwrap_err();
        assert_eq!(error, EvaluationError::DimMismatch { train: 4, val: 5 });
    }
}
