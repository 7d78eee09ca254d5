//! Feature matrices on the host: one row per image, as a frozen backbone produced them.

use rayon::prelude::*;

use crate::error::EvaluationError;

/// Norms below this are taken as this when a row is divided by its norm, so that a zero row stays zero.
pub const NORM_EPS: f64 = 1e-12;

/// A row-major `f32` matrix of finite values, one row per sample.
///
/// # Shapes
/// `[rows, dim]`, both at least 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    rows: usize,
    dim: usize,
    values: Vec<f32>,
}

impl Features {
    /// Takes a row-major matrix.
    ///
    /// # Errors
    /// If the matrix is empty, its sizes do not match the number of values, or a value is NaN or infinite (the error
    /// names the first such row).
    pub fn new(rows: usize, dim: usize, values: Vec<f32>) -> Result<Self, EvaluationError> {
        if rows == 0 || dim == 0 {
            return Err(EvaluationError::EmptyFeatures { rows, dim });
        }
        if u32::try_from(rows).is_err() {
            return Err(EvaluationError::TooManyRows { rows });
        }
        if rows.checked_mul(dim) != Some(values.len()) {
            return Err(EvaluationError::FeatureShape { rows, dim, values: values.len() });
        }
        let bad_rows: Vec<usize> = values
            .par_chunks(dim)
            .enumerate()
            .filter(|(_, row)| row.iter().any(|value| !value.is_finite()))
            .map(|(row, _)| row)
            .collect();
        if let Some(&row) = bad_rows.first() {
            let start = row * dim;
            let column = values[start..start + dim].iter().position(|value| !value.is_finite()).unwrap_or(0);
            let value = values[start + column];
            return Err(EvaluationError::NonFinite { row, column, value, rows_affected: bad_rows.len(), rows });
        }
        Ok(Self { rows, dim, values })
    }

    /// Number of samples.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of a row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// All values, row by row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The features of one sample.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.dim..(row + 1) * self.dim]
    }

    /// Every row divided by its Euclidean norm: `x / max(‖x‖, 1e-12)`, the norm accumulated in `f64`.
    pub fn l2_normalized(&self) -> Self {
        let scales = self.inverse_norms();
        let mut values = self.values.clone();
        values.par_chunks_mut(self.dim).zip(&scales).for_each(|(row, scale)| row.iter_mut().for_each(|v| *v *= scale));
        Self { values, ..*self }
    }

    /// `1 / max(‖x‖, 1e-12)` of every row.
    pub(crate) fn inverse_norms(&self) -> Vec<f32> {
        self.values
            .par_chunks(self.dim)
            .map(|row| {
                let squared: f64 = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
                (1.0 / squared.sqrt().max(NORM_EPS)) as f32
            })
            .collect()
    }

    /// The parts side by side: row `i` is row `i` of each part in turn.
    ///
    /// # Errors
    /// If there is no part, or the parts have different numbers of rows.
    pub fn concat(parts: &[&Features]) -> Result<Self, EvaluationError> {
        let Some(first) = parts.first() else {
            return Err(EvaluationError::EmptyFeatures { rows: 0, dim: 0 });
        };
        if let Some((part, other)) = parts.iter().enumerate().find(|(_, other)| other.rows != first.rows) {
            return Err(EvaluationError::ConcatRows { part, rows: other.rows, expected: first.rows });
        }
        let dim = parts.iter().map(|part| part.dim).sum();
        let mut values = Vec::with_capacity(first.rows * dim);
        for row in 0..first.rows {
            parts.iter().for_each(|part| values.extend_from_slice(part.row(row)));
        }
        Ok(Self { rows: first.rows, dim, values })
    }

    /// The input of a linear classifier in DINOv2 and DINOv3: the CLS tokens of the last `n_blocks` blocks, oldest first,
    /// then, if given, the mean patch token of the last block.
    ///
    /// # Shapes
    /// `cls_by_block`: one `[rows, D]` per block, oldest first; `patch_mean`: `[rows, D]`; result `[rows, n_blocks·D (+ D)]`.
    ///
    /// # Errors
    /// If `n_blocks` is 0 or more than there are blocks, or the numbers of rows differ.
    pub fn linear_input(
        cls_by_block: &[&Features],
        patch_mean: Option<&Features>,
        n_blocks: usize,
    ) -> Result<Self, EvaluationError> {
        if n_blocks == 0 || n_blocks > cls_by_block.len() {
            return Err(EvaluationError::BlockCount { asked: n_blocks, available: cls_by_block.len() });
        }
        let mut parts = cls_by_block[cls_by_block.len() - n_blocks..].to_vec();
        parts.extend(patch_mean);
        Self::concat(&parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_must_describe_the_values() {
        assert_eq!(
            Features::new(2, 3, vec![0.0; 5]),
            Err(EvaluationError::FeatureShape { rows: 2, dim: 3, values: 5 })
        );
        assert_eq!(Features::new(0, 3, vec![]), Err(EvaluationError::EmptyFeatures { rows: 0, dim: 3 }));
        assert_eq!(Features::new(3, 0, vec![]), Err(EvaluationError::EmptyFeatures { rows: 3, dim: 0 }));
        assert!(Features::new(1, 1, vec![0.0]).is_ok());
    }

    #[test]
    fn the_first_row_that_is_not_finite_is_named() {
        let mut values = vec![0.5; 12];
        values[7] = f32::INFINITY;
        values[10] = f32::NAN;
        let error = Features::new(4, 3, values).unwrap_err();
        assert_eq!(
            error,
            EvaluationError::NonFinite { row: 2, column: 1, value: f32::INFINITY, rows_affected: 2, rows: 4 }
        );
        assert!(error.to_string().starts_with("features: row 2, column 1 is inf (2 of 4 rows"), "{error}");
    }

    #[test]
    fn normalised_rows_have_length_one_and_zero_rows_stay_zero() {
        let features = Features::new(3, 2, vec![3.0, 4.0, 0.0, 0.0, -5e20, 0.0]).unwrap();
        assert_eq!(features.l2_normalized().values(), &[0.6, 0.8, 0.0, 0.0, -1.0, 0.0]);
    }

    #[test]
    fn linear_input_takes_the_last_blocks_oldest_first_then_the_patch_mean() {
        let of = |v: f32| Features::new(2, 1, vec![v, v + 0.5]).unwrap();
        let (a, b, c, mean) = (of(1.0), of(2.0), of(3.0), Features::new(2, 2, vec![9.0, 8.0, 7.0, 6.0]).unwrap());
        let input = Features::linear_input(&[&a, &b, &c], Some(&mean), 2).unwrap();
        assert_eq!((input.rows(), input.dim()), (2, 4));
        assert_eq!(input.values(), &[2.0, 3.0, 9.0, 8.0, 2.5, 3.5, 7.0, 6.0]);
        assert_eq!(Features::linear_input(&[&a, &b, &c], None, 1).unwrap(), c);
        for asked in [0, 4] {
            let error = Features::linear_input(&[&a, &b, &c], None, asked).unwrap_err();
            assert_eq!(error, EvaluationError::BlockCount { asked, available: 3 });
        }
        let short = Features::new(1, 1, vec![0.0]).unwrap();
        assert_eq!(Features::concat(&[&a, &short]), Err(EvaluationError::ConcatRows { part: 1, rows: 1, expected: 2 }));
    }
}
