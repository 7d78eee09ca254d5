//! Principal components of tokens.

use nalgebra::{DMatrix, SymmetricEigen};

use crate::EvaluationError;

/// Sums over tokens from which their principal components follow; the tokens themselves are not kept.
pub struct Moments {
    dim: usize,
    count: f64,
    sum: Vec<f64>,
    /// `[dim, dim]`, symmetric.
    products: DMatrix<f64>,
}

/// The mean and the leading directions of tokens.
#[derive(Clone, Debug)]
pub struct Components {
    mean: Vec<f64>,
    /// Unit vectors, the one of the largest variance first. Their largest entry by absolute value is positive.
    directions: Vec<Vec<f64>>,
    /// Shares of the variance.
    pub shares: Vec<f64>,
    /// Variances along the directions.
    pub variances: Vec<f64>,
}

impl Moments {
    /// Of no token of width `dim`.
    pub fn new(dim: usize) -> Self {
        Self { dim, count: 0.0, sum: vec![0.0; dim], products: DMatrix::zeros(dim, dim) }
    }

    /// Adds tokens, `[n, dim]`.
    pub fn add(&mut self, tokens: &[f32]) {
        let rows = tokens.len() / self.dim;
        // Column j of the transposed matrix is token j, as it lies in memory.
        let x = DMatrix::from_iterator(self.dim, rows, tokens.iter().map(|&v| f64::from(v)));
        self.products.gemm(1.0, &x, &x.transpose(), 1.0);
        for column in x.column_iter() {
            self.sum.iter_mut().zip(column.iter()).for_each(|(sum, value)| *sum += value);
        }
        self.count += rows as f64;
    }

    /// The `k` leading components.
    ///
    /// # Errors
    /// If there are fewer than two tokens or fewer than `k` dimensions, or the eigenvalues do not converge.
    pub fn components(&self, k: usize) -> Result<Components, EvaluationError> {
        if self.count < 2.0 {
            return Err(EvaluationError::TooFewRows { rows: self.count as usize });
        }
        if k > self.dim {
            let expected = "at most the width of the tokens";
            return Err(EvaluationError::Setting { task: "pca", key: "components", value: k.to_string(), expected });
        }
        let mean: Vec<f64> = self.sum.iter().map(|sum| sum / self.count).collect();
        let covariance =
            DMatrix::from_fn(self.dim, self.dim, |i, j| self.products[(i, j)] / self.count - mean[i] * mean[j]);
        let total = covariance.trace();
        let size = self.dim;
        let eigen =
            SymmetricEigen::try_new(covariance, f64::EPSILON, 0).ok_or(EvaluationError::Eigenvalues { size })?;
        let mut order: Vec<usize> = (0..self.dim).collect();
        order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
        let (mut directions, mut shares, mut variances) = (Vec::new(), Vec::new(), Vec::new());
        for &i in &order[..k] {
            let column = eigen.eigenvectors.column(i);
            // The sign of an eigenvector is nobody's; fixed, results repeat.
            let sign = column[column.iamax()].signum();
            directions.push(column.iter().map(|v| sign * v).collect());
            variances.push(eigen.eigenvalues[i].max(0.0));
            shares.push(if total > 0.0 { eigen.eigenvalues[i].max(0.0) / total } else { 0.0 });
        }
        Ok(Components { mean, directions, shares, variances })
    }
}

impl Components {
    /// Forgets the components from the first on whose share of the variance is not wanted.
    pub fn keep(&mut self, wanted: impl Fn(f64) -> bool) {
        let count = self.shares.iter().take_while(|share| wanted(**share)).count();
        self.directions.truncate(count);
        self.shares.truncate(count);
        self.variances.truncate(count);
    }

    /// The coordinates of tokens `[n, dim]` along the components: `[n, k]`.
    pub fn project(&self, tokens: &[f32]) -> Vec<f32> {
        let dim = self.mean.len();
        tokens
            .chunks_exact(dim)
            .flat_map(|token| {
                self.directions.iter().map(|direction| {
                    let along = token.iter().zip(&self.mean).zip(direction);
                    along.map(|((&v, mean), d)| (f64::from(v) - mean) * d).sum::<f64>() as f32
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens along (3, 4)/5 and, less, across.
    fn tokens() -> Vec<f32> {
        (0..40)
            .flat_map(|i| {
                let (along, across) = ((i as f32 * 0.7).sin() * 5.0, (i as f32 * 1.9).cos());
                [1.0 + 0.6 * along - 0.8 * across, 2.0 + 0.8 * along + 0.6 * across]
            })
            .collect()
    }

    #[test]
    fn directions_are_found_whatever_the_parts_in_which_tokens_come() {
        let tokens = tokens();
        let mut whole = Moments::new(2);
        whole.add(&tokens);
        let mut parts = Moments::new(2);
        for part in tokens.chunks(6) {
            parts.add(part);
        }
        let (whole, parts) = (whole.components(2).unwrap(), parts.components(2).unwrap());
        assert!((whole.directions[0][0] - 0.6).abs() < 0.02 && (whole.directions[0][1] - 0.8).abs() < 0.02);
        assert!(whole.shares[0] > 0.9 && (whole.shares.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        for (a, b) in whole.project(&tokens).iter().zip(parts.project(&tokens)) {
            assert!((a - b).abs() < 1e-4);
        }
        // Coordinates are uncorrelated, with mean 0.
        let projected = whole.project(&tokens);
        let sums = projected.chunks(2).fold([0.0; 3], |[a, b, ab], p| [a + p[0], b + p[1], ab + p[0] * p[1]]);
        assert!(sums.iter().all(|sum| sum.abs() < 1e-3), "{sums:?}");
    }

    #[test]
    fn too_little_is_refused() {
        let mut moments = Moments::new(3);
        moments.add(&[1.0, 2.0, 3.0]);
        assert!(moments.components(1).is_err());
        moments.add(&[2.0, 2.0, 3.0]);
        assert!(moments.components(4).is_err());
        assert!((moments.components(3).unwrap().shares[0] - 1.0).abs() < 1e-12);
    }
}
