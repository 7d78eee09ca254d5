//! Features with one class label per row, and the checks that a train and a val split fit together.

use crate::{error::EvaluationError, features::Features};

/// Features of a labelled split. Every label is below `num_classes`.
#[derive(Clone, Debug, PartialEq)]
pub struct LabeledFeatures {
    features: Features,
    labels: Vec<u32>,
    num_classes: usize,
}

impl LabeledFeatures {
    /// Joins features with their labels.
    ///
    /// # Errors
    /// If there is not one label per row, or a label is not below `num_classes`.
    pub fn new(features: Features, labels: Vec<u32>, num_classes: usize) -> Result<Self, EvaluationError> {
        if labels.len() != features.rows() {
            return Err(EvaluationError::LabelCount { labels: labels.len(), rows: features.rows() });
        }
        if let Some(sample) = labels.iter().position(|&label| label as usize >= num_classes) {
            return Err(EvaluationError::LabelOutOfRange { sample, label: labels[sample], num_classes });
        }
        Ok(Self { features, labels, num_classes })
    }

    /// The features, one row per sample.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// The class of every sample.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// Number of classes that labels may name.
    pub fn num_classes(&self) -> usize {
        self.num_classes
    }

    /// Number of samples.
    pub fn rows(&self) -> usize {
        self.features.rows()
    }

    /// Length of a feature row.
    pub fn dim(&self) -> usize {
        self.features.dim()
    }

    /// How many samples each class has.
    pub fn class_counts(&self) -> Vec<usize> {
        counts(&self.labels, self.num_classes)
    }
}

fn counts(labels: &[u32], num_classes: usize) -> Vec<usize> {
    let mut counts = vec![0; num_classes];
    labels.iter().for_each(|&label| counts[label as usize] += 1);
    counts
}

/// Checks that a classifier made from `train` can be scored on `val`.
///
/// # Errors
/// If widths or numbers of classes differ, train has a single class, or val has a class that train lacks.
pub(crate) fn check_pair(train: &LabeledFeatures, val: &LabeledFeatures) -> Result<(), EvaluationError> {
    if train.dim() != val.dim() {
        return Err(EvaluationError::DimMismatch { train: train.dim(), val: val.dim() });
    }
    if train.num_classes() != val.num_classes() {
        return Err(EvaluationError::ClassCountMismatch { train: train.num_classes(), val: val.num_classes() });
    }
    check_classes(train.labels(), val.labels(), train.num_classes())
}

/// Checks that a classifier of train samples can be scored on val samples, by their classes.
///
/// # Errors
/// If train has a single class, or val has a class that train lacks.
pub(crate) fn check_classes(train: &[u32], val: &[u32], num_classes: usize) -> Result<(), EvaluationError> {
    let train_counts = counts(train, num_classes);
    if train_counts.iter().filter(|&&count| count > 0).count() == 1 {
        return Err(EvaluationError::SingleClass { class: train[0], samples: train.len() });
    }
    let unseen = train_counts.iter().zip(counts(val, num_classes)).enumerate();
    let classes: Vec<u32> = unseen
        .filter(|(_, (in_train, in_val))| **in_train == 0 && *in_val > 0)
        .map(|(class, _)| class as u32)
        .collect();
    if classes.is_empty() { Ok(()) } else { Err(EvaluationError::UnseenClasses { classes }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labeled(dim: usize, labels: &[u32], num_classes: usize) -> LabeledFeatures {
        let features = Features::new(labels.len(), dim, vec![1.0; labels.len() * dim]).unwrap();
        LabeledFeatures::new(features, labels.to_vec(), num_classes).unwrap()
    }

    #[test]
    fn labels_must_match_rows_and_classes() {
        let features = Features::new(3, 1, vec![0.0; 3]).unwrap();
        assert_eq!(
            LabeledFeatures::new(features.clone(), vec![0, 1], 2),
            Err(EvaluationError::LabelCount { labels: 2, rows: 3 })
        );
        assert_eq!(
            LabeledFeatures::new(features, vec![0, 1, 2], 2),
            Err(EvaluationError::LabelOutOfRange { sample: 2, label: 2, num_classes: 2 })
        );
    }

    #[test]
    fn splits_that_do_not_fit_are_refused() {
        let train = labeled(2, &[0, 1, 1, 3], 5);
        assert_eq!(check_pair(&train, &labeled(2, &[3, 0], 5)), Ok(()));
        assert_eq!(check_pair(&train, &labeled(3, &[0], 5)), Err(EvaluationError::DimMismatch { train: 2, val: 3 }));
        assert_eq!(
            check_pair(&train, &labeled(2, &[0], 4)),
            Err(EvaluationError::ClassCountMismatch { train: 5, val: 4 })
        );
        assert_eq!(
            check_pair(&train, &labeled(2, &[4, 0, 2, 2], 5)),
            Err(EvaluationError::UnseenClasses { classes: vec![2, 4] })
        );
        assert_eq!(
            check_pair(&labeled(2, &[3, 3], 5), &labeled(2, &[3], 5)),
            Err(EvaluationError::SingleClass { class: 3, samples: 2 })
        );
    }
}
