//! How many dimensions a backbone's features use, without labels: the effective rank, and other signs of collapse.
//!
//! The effective rank is RankMe (Garrido et al. 2023, eq. 1, after Roy & Vetterli 2007): with the singular values `σ_k` of
//! the `[N, D]` feature matrix and `p_k = σ_k / Σ σ`, `exp(−Σ p_k ln p_k)`. It lies between 1, when all features are
//! multiples of one vector, and `min(N, D)`. The paper does not subtract the mean feature; doing so is a choice here, since
//! a large mean hides how few directions the features vary in. Its `ε = 1e-7`, added to every `p_k` against the logarithm
//! of zero, is left out: `0·ln 0` is taken as 0.

use nalgebra::{DMatrix, SymmetricEigen};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    error::EvaluationError,
    features::Features,
    protocol::{FeatureSource, Method, Protocol, Report},
};

/// Rows multiplied together in `f64`.
const BLOCK: usize = 256;
/// Most partial sums held at the same time, and the memory they may take together.
const PARTS: usize = 16;
const PART_BYTES: usize = 512 << 20;
/// Sweeps of the eigenvalue iteration, far more than the few per eigenvalue that it takes.
const MAX_SWEEPS: usize = 100_000;

/// Result of [`spectrum()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpectrumScores {
    /// RankMe: between 1 and `min(rows, dim)`; 0 if every feature is zero (or, when centred, equal).
    pub effective_rank: f64,
    /// Width of the features, what the effective rank is to be compared with.
    pub dim: usize,
    /// Mean cosine similarity of two different samples: near 1, all samples have the same feature. Never centred.
    pub mean_cosine: f64,
    /// `√D` times the mean, over dimensions, of the standard deviation of the L2-normalised features: 1 if they are spread
    /// evenly over the sphere, 0 if they are all the same.
    pub normalized_std: f64,
    /// Standard deviation of every dimension over the samples.
    pub std: Vec<f64>,
    /// Singular values of the feature matrix, largest first. Those below the resolution of the computation (`√(D·ε)` of the
    /// largest, about 3e-7 for `D = 384`) are 0.
    pub singular_values: Vec<f64>,
}

/// Measures the spread of the features, in `f64`.
///
/// Singular values are the square roots of the eigenvalues of the smaller of the two Gram matrices, `D×D` or `N×N`.
///
/// # Errors
/// If there are fewer than two rows, or the eigenvalues do not converge.
pub fn spectrum(
    features: &Features,
    source: &FeatureSource,
    centered: bool,
) -> Result<Report<SpectrumScores>, EvaluationError> {
    let (rows, dim) = (features.rows(), features.dim());
    if rows < 2 {
        return Err(EvaluationError::TooFewRows { rows });
    }
    let (mean, std) = moments(features);
    let offset = if centered { mean } else { vec![0.0; dim] };
    let singular_values = singular_values(features, &offset)?;
    let normalized = features.l2_normalized();
    let (unit_mean, unit_std) = moments(&normalized);
    let scores = SpectrumScores {
        effective_rank: effective_rank(&singular_values),
        dim,
        mean_cosine: mean_cosine(&normalized, &unit_mean),
        normalized_std: unit_std.iter().sum::<f64>() / (dim as f64).sqrt(),
        std,
        singular_values,
    };
    let protocol = Protocol::new(Method::Spectrum { centered }, vec![source.clone()], None, rows, None);
    Ok(Report { protocol, scores })
}

/// `exp(−Σ p ln p)` with `p` the values divided by their sum; 0 if all are 0.
///
/// # Panics
/// If a value is negative.
pub fn effective_rank(singular_values: &[f64]) -> f64 {
    assert!(singular_values.iter().all(|&value| value >= 0.0), "singular values are not negative");
    let sum: f64 = singular_values.iter().sum();
    if sum == 0.0 {
        return 0.0;
    }
    let shares = singular_values.iter().map(|value| value / sum).filter(|&share| share > 0.0);
    (-shares.map(|share| share * share.ln()).sum::<f64>()).exp()
}

/// Mean and standard deviation of every column.
fn moments(features: &Features) -> (Vec<f64>, Vec<f64>) {
    let (rows, dim) = (features.rows(), features.dim());
    let column_sums = |term: &(dyn Fn(usize, f64) -> f64 + Sync)| -> Vec<f64> {
        let part = rows.div_ceil(PARTS) * dim;
        let parts: Vec<Vec<f64>> = features
            .values()
            .par_chunks(part)
            .map(|part| {
                let mut sums = vec![0.0; dim];
                for row in part.chunks(dim) {
                    sums.iter_mut().zip(row).enumerate().for_each(|(d, (sum, &v))| *sum += term(d, f64::from(v)));
                }
                sums
            })
            .collect();
        (0..dim).map(|d| parts.iter().map(|part| part[d]).sum::<f64>() / rows as f64).collect()
    };
    let mean = column_sums(&|_, value| value);
    let variance = column_sums(&|d, value| (value - mean[d]).powi(2));
    (mean, variance.into_iter().map(f64::sqrt).collect())
}

/// Mean of `u_i·u_j` over `i ≠ j`, from `‖Σ u‖² = Σ ‖u‖² + Σ_{i≠j} u_i·u_j`.
fn mean_cosine(normalized: &Features, mean: &[f64]) -> f64 {
    let rows = normalized.rows() as f64;
    let sum_squared = mean.iter().map(|m| (m * rows).powi(2)).sum::<f64>();
    let squares: f64 = normalized.values().par_chunks(1 << 16).map(sum_of_squares).collect::<Vec<f64>>().iter().sum();
    (sum_squared - squares) / (rows * (rows - 1.0))
}

fn sum_of_squares(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value).powi(2)).sum()
}

fn singular_values(features: &Features, offset: &[f64]) -> Result<Vec<f64>, EvaluationError> {
    let gram = if features.dim() <= features.rows() {
        gram_of_columns(features, offset)
    } else {
        gram_of_rows(features, offset)
    };
    let size = gram.nrows();
    let eigen = SymmetricEigen::try_new(gram, f64::EPSILON, MAX_SWEEPS).ok_or(EvaluationError::Eigenvalues { size })?;
    let mut eigenvalues: Vec<f64> = eigen.eigenvalues.iter().copied().collect();
    eigenvalues.sort_by(|a, b| b.total_cmp(a));
    let resolution = eigenvalues.first().copied().unwrap_or(0.0) * size as f64 * f64::EPSILON;
    Ok(eigenvalues.into_iter().map(|value| if value > resolution { value.sqrt() } else { 0.0 }).collect())
}

/// `Σ_i (x_i − o)(x_i − o)ᵀ`, `[D, D]`, in parts that are added in order.
fn gram_of_columns(features: &Features, offset: &[f64]) -> DMatrix<f64> {
    let dim = features.dim();
    let parts = (PART_BYTES / (dim * dim * size_of::<f64>())).clamp(1, PARTS);
    let partial: Vec<DMatrix<f64>> = features
        .values()
        .par_chunks(features.rows().div_ceil(parts) * dim)
        .map(|part| {
            let mut sum = DMatrix::zeros(dim, dim);
            for block in part.chunks(BLOCK * dim) {
                let centered = samples_in_columns(block, offset);
                sum.gemm(1.0, &centered, &centered.transpose(), 1.0);
            }
            sum
        })
        .collect();
    partial.into_iter().fold(DMatrix::zeros(dim, dim), |sum, part| sum + part)
}

/// `(x_i − o)·(x_j − o)`, `[N, N]`.
fn gram_of_rows(features: &Features, offset: &[f64]) -> DMatrix<f64> {
    let centered = samples_in_columns(features.values(), offset);
    centered.transpose() * centered
}

/// Row-major `[n, D]` values less the offset, as the `D×n` matrix of samples in columns.
fn samples_in_columns(values: &[f32], offset: &[f64]) -> DMatrix<f64> {
    let dim = offset.len();
    let centered = values.chunks(dim).flat_map(|row| row.iter().zip(offset).map(|(&v, o)| f64::from(v) - o));
    DMatrix::from_iterator(dim, values.len() / dim, centered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{protocol::test_source, test_data::gaussian};

    fn scores(features: &Features, centered: bool) -> SpectrumScores {
        spectrum(features, &test_source(), centered).unwrap().scores
    }

    fn features(rows: usize, dim: usize, value: impl Fn(usize, usize) -> f32) -> Features {
        Features::new(rows, dim, (0..rows * dim).map(|i| value(i / dim, i % dim)).collect()).unwrap()
    }

    #[test]
    fn singular_values_equal_a_direct_decomposition_on_either_side() {
        for (rows, dim) in [(700, 9), (7, 13), (5, 5), (2, 1)] {
            let random = gaussian(rows, dim, 1);
            for centered in [false, true] {
                let matrix = DMatrix::from_fn(rows, dim, |i, j| f64::from(random.row(i)[j]));
                let mean = matrix.row_mean();
                let matrix = DMatrix::from_fn(rows, dim, |i, j| matrix[(i, j)] - if centered { mean[j] } else { 0.0 });
                let norm = matrix.norm();
                let mut expected: Vec<f64> = matrix.svd(false, false).singular_values.iter().copied().collect();
                expected.sort_by(|a, b| b.total_cmp(a));
                let ours = scores(&random, centered).singular_values;
                assert_eq!(ours.len(), rows.min(dim));
                for (ours, expected) in ours.iter().zip(&expected) {
                    assert!((ours - expected).abs() < 1e-6 * norm, "{rows}x{dim}: {ours} {expected}");
                }
            }
        }
    }

    #[test]
    fn effective_rank_is_one_for_one_direction_and_the_dimension_for_equal_directions() {
        let line = features(40, 6, |i, j| (i as f32 + 1.0) * (j as f32 - 2.5));
        assert!((scores(&line, false).effective_rank - 1.0).abs() < 1e-4);
        let axes = features(30, 5, |i, j| if i % 5 == j { 2.0 } else { 0.0 });
        assert!((scores(&axes, false).effective_rank - 5.0).abs() < 1e-9);
        // Three of four directions, of strengths 2, 1, 1.
        let values = [2.0, 1.0, 1.0, 0.0];
        let strengths = features(8, 4, |i, j| if i == j { values[j] } else { 0.0 });
        let expected = (0.5 * 2f64.ln() + 0.5 * 4f64.ln()).exp();
        assert!((scores(&strengths, false).effective_rank - expected).abs() < 1e-9);
    }

    #[test]
    fn a_common_offset_hides_the_rank_unless_it_is_subtracted() {
        let around = |offset: f32| {
            let random = gaussian(400, 8, 2);
            features(400, 8, |i, j| random.row(i)[j] + offset)
        };
        assert!(scores(&around(0.0), false).effective_rank > 7.9);
        assert!(scores(&around(100.0), false).effective_rank < 1.5);
        assert!(scores(&around(100.0), true).effective_rank > 7.9);
        let constant = features(5, 3, |_, _| 0.7);
        assert_eq!(scores(&constant, true).effective_rank, 0.0);
        assert_eq!(scores(&features(5, 3, |_, _| 0.0), false).effective_rank, 0.0);
    }

    #[test]
    fn collapse_indicators_equal_loops_over_pairs_and_columns() {
        let random = gaussian(23, 6, 5);
        let data = features(23, 6, |i, j| random.row(i)[j] * (j as f32 + 0.5) + 0.3);
        let ours = scores(&data, false);
        let unit = data.l2_normalized();
        let mut cosines = Vec::new();
        for i in 0..23 {
            for j in (0..23).filter(|&j| j != i) {
                cosines
                    .push(unit.row(i).iter().zip(unit.row(j)).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>());
            }
        }
        let mean_cosine = cosines.iter().sum::<f64>() / cosines.len() as f64;
        assert!((ours.mean_cosine - mean_cosine).abs() < 1e-9);
        let std = |data: &Features, j: usize| {
            let mean = (0..23).map(|i| f64::from(data.row(i)[j])).sum::<f64>() / 23.0;
            ((0..23).map(|i| (f64::from(data.row(i)[j]) - mean).powi(2)).sum::<f64>() / 23.0).sqrt()
        };
        for j in 0..6 {
            assert!((ours.std[j] - std(&data, j)).abs() < 1e-9);
        }
        let normalized = (0..6).map(|j| std(&unit, j)).sum::<f64>() / 6.0 * 6f64.sqrt();
        assert!((ours.normalized_std - normalized).abs() < 1e-9);
    }

    #[test]
    fn isotropic_and_collapsed_features_are_told_apart() {
        let spread = scores(&gaussian(2000, 16, 3), false);
        assert!(spread.mean_cosine.abs() < 0.01 && (spread.normalized_std - 1.0).abs() < 0.02, "{spread:?}");
        let collapsed = scores(&features(50, 16, |_, j| j as f32 - 3.0), false);
        assert!((collapsed.mean_cosine - 1.0).abs() < 1e-6 && collapsed.normalized_std < 1e-6);
        assert_eq!(spectrum(&gaussian(1, 4, 1), &test_source(), false), Err(EvaluationError::TooFewRows { rows: 1 }));
    }
}
