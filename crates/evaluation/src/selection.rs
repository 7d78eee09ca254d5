//! What a hyper-parameter of a classifier is selected on, and the split of train that is held out for it.

use std::collections::BTreeMap;

use dinoxide_random::{Purpose, stream};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::error::EvaluationError;

/// First counter of the [`Purpose::Evaluation`] streams drawn in this crate.
pub(crate) mod draws {
    /// The held-out samples of a class. Second counter: the class.
    pub(crate) const HELD_OUT: u64 = 1;
    /// Initial weights of linear classifiers. Second counter: the feature set.
    pub(crate) const LINEAR_INIT: u64 = 2;
    /// The order of the samples in an epoch of classifier training. Second counter: the epoch.
    pub(crate) const LINEAR_ORDER: u64 = 3;
    /// The samples of a class in a draw of few. Second counter: the draw, times 2³², and the class.
    pub(crate) const FEW_SHOT: u64 = 4;
    /// Samples drawn again for a confidence interval. Second counter: the resample.
    pub(crate) const BOOTSTRAP: u64 = 5;
    /// First centers of k-means. Second counter: the restart.
    pub(crate) const KMEANS: u64 = 6;
    /// Edits that make a copy. Second counter: the image, times the number of edits, and the edit.
    pub(crate) const COPIES: u64 = 7;
    /// The random crop of a train image. Second counter: its place in the sequence of samples.
    pub(crate) const RANDOM_CROP: u64 = 8;
    /// Stochastic depth in fine-tuning. Second counter: the place of the forward's first image.
    pub(crate) const DROP_PATH: u64 = 9;
    /// Initial weights of a dense head.
    pub(crate) const HEAD_INIT: u64 = 101;
    /// The order of the images in an epoch of a dense head's training. Second counter: the epoch.
    pub(crate) const HEAD_ORDER: u64 = 102;
    /// The channels that a dense head does not see. Second counter: the iteration.
    pub(crate) const HEAD_DROPOUT: u64 = 103;
    /// The objects that are held out from a figure/ground classifier.
    pub(crate) const GROUPS: u64 = 104;
    /// Images that something is carried from. Second counter: the group.
    pub(crate) const PAIRS: u64 = 105;
}

/// The samples on which the best learning rate or regularisation strength is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Selection {
    /// On a part of train, the same fraction of each class, on which the candidates are not trained. The chosen
    /// candidate is then trained again on all of train.
    HeldOut {
        /// Fraction of train, above 0 and below 1.
        fraction: f64,
    },
    /// On the very samples that are scored, as the reference systems do when val is the test set. The score is then the
    /// best of many looks at val, and so is too high.
    Val,
}

impl Default for Selection {
    fn default() -> Self {
        Self::HeldOut { fraction: 0.1 }
    }
}

/// What a selection was based on, as told in results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SelectionReport {
    /// `held_out` or `val`.
    pub on: String,
    /// How many samples that were.
    pub samples: usize,
    /// What a reader of the score has to know.
    pub note: String,
}

impl SelectionReport {
    pub(crate) fn new(selection: Selection, samples: usize) -> Self {
        let (on, note) = match selection {
            Selection::HeldOut { .. } => {
                ("held_out", "selected on held-out train samples; val was used for the final score only")
            }
            Selection::Val => {
                ("val", "selected on the samples that are scored, as the reference systems do: the score is optimistic")
            }
        };
        Self { on: on.to_owned(), samples, note: note.to_owned() }
    }
}

/// Row numbers of train, ascending in each part.
#[derive(Debug, PartialEq)]
pub(crate) struct Split {
    pub(crate) fit: Vec<u32>,
    pub(crate) held_out: Vec<u32>,
}

/// Holds out `round(fraction · n)` samples of every class with `n` samples: at least 1, at most `n − 1`, and none of a
/// class that has a single one.
///
/// Which samples these are depends on the seed, the class and the order of its samples alone.
pub(crate) fn stratified_split(
    labels: &[u32],
    fraction: f64,
    seed: u64,
    task: &'static str,
) -> Result<Split, EvaluationError> {
    if !(fraction > 0.0 && fraction < 1.0) {
        let value = fraction.to_string();
        return Err(EvaluationError::Setting {
            task,
            key: "selection.held_out.fraction",
            value,
            expected: "above 0 and below 1",
        });
    }
    let mut by_class: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (row, &label) in (0..).zip(labels) {
        by_class.entry(label).or_default().push(row);
    }
    let classes = by_class.len();
    let mut split = Split { fit: Vec::new(), held_out: Vec::new() };
    for (class, mut rows) in by_class {
        rows.shuffle(&mut stream(seed, Purpose::Evaluation, draws::HELD_OUT, u64::from(class)));
        let most = rows.len() - 1;
        let count = ((fraction * rows.len() as f64).round() as usize).max(1).min(most);
        split.held_out.extend(&rows[..count]);
        split.fit.extend(&rows[count..]);
    }
    if split.held_out.is_empty() {
        return Err(EvaluationError::NothingToHoldOut { classes });
    }
    split.fit.sort_unstable();
    split.held_out.sort_unstable();
    Ok(split)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(counts: &[usize]) -> Vec<u32> {
        let mut labels: Vec<u32> = Vec::new();
        for round in 0..*counts.iter().max().unwrap() {
            labels.extend((0..).zip(counts).filter(|(_, count)| round < **count).map(|(class, _)| class));
        }
        labels
    }

    #[test]
    fn each_class_gives_its_share_and_keeps_at_least_one_sample() {
        let train = train(&[30, 1, 2, 17, 4]);
        let split = stratified_split(&train, 0.1, 5, "linear").unwrap();
        let mut held = [0; 5];
        split.held_out.iter().for_each(|&row| held[train[row as usize] as usize] += 1);
        assert_eq!(held, [3, 0, 1, 2, 1]);
        let mut all = [split.fit.clone(), split.held_out.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..54).collect::<Vec<_>>());
        let most = stratified_split(&train, 0.99, 5, "linear").unwrap();
        assert_eq!(most.fit.len(), 5, "every class keeps one sample");
    }

    #[test]
    fn the_split_depends_on_the_seed_alone() {
        let train = train(&[30, 25]);
        let split = |seed| stratified_split(&train, 0.3, seed, "linear").unwrap();
        assert_eq!(split(1), split(1));
        assert_ne!(split(1).held_out, split(2).held_out);
    }

    #[test]
    fn bad_fractions_and_single_samples_are_refused() {
        for fraction in [0.0, 1.0, -0.5, f64::NAN] {
            let error = stratified_split(&train(&[3, 3]), fraction, 0, "logistic").unwrap_err();
            assert!(error.to_string().starts_with("logistic: `selection.held_out.fraction` is"), "{error}");
        }
        let error = stratified_split(&train(&[1, 1, 1]), 0.1, 0, "linear").unwrap_err();
        assert_eq!(error, EvaluationError::NothingToHoldOut { classes: 3 });
    }
}
