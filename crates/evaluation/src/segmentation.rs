//! Semantic segmentation metrics, from one histogram of (true class, predicted class) over all pixels of all images.

use serde::{Deserialize, Serialize};

use crate::error::EvaluationError;

/// Counts of pixels by true and predicted class.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfusionMatrix {
    num_classes: usize,
    ignored: u32,
    /// Row-major, a row per true class.
    counts: Vec<u64>,
}

/// Metrics of one class, in percent; `None` where the quotient is 0/0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassScores {
    /// Intersection over union: `I / (label + predicted − I)`, with `I` the pixels that are both.
    pub iou: Option<f64>,
    /// Share of the class's pixels that are predicted as such, its recall: `I / label`.
    pub accuracy: Option<f64>,
    /// Share of the predicted pixels that are of the class: `I / predicted`.
    pub precision: Option<f64>,
    /// `2·I / (label + predicted)`.
    pub dice: Option<f64>,
    /// Harmonic mean of precision and recall: equal to `dice`, but `None` whenever one of the two is, or both are 0.
    pub f_score: Option<f64>,
}

/// Metrics over all classes, in percent. Means skip the classes for which a metric is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SegmentationScores {
    /// Mean intersection over union (mIoU).
    pub mean_iou: f64,
    /// Mean of the classes' accuracies (mAcc).
    pub mean_accuracy: f64,
    /// Share of all scored pixels that are right (aAcc).
    pub pixel_accuracy: f64,
    /// Mean Dice coefficient.
    pub mean_dice: f64,
    /// Mean F-score. Skips every class without a right pixel, unlike the Dice coefficient: it flatters.
    pub mean_f_score: f64,
    /// Mean precision.
    pub mean_precision: f64,
    /// Mean recall, which is the mean accuracy.
    pub mean_recall: f64,
    /// Each class's metrics.
    pub classes: Vec<ClassScores>,
}

impl ConfusionMatrix {
    /// Without pixels. Pixels labelled `ignored` are not counted.
    pub fn new(num_classes: usize, ignored: u32) -> Self {
        Self { num_classes, ignored, counts: vec![0; num_classes * num_classes] }
    }

    /// Adds an image.
    ///
    /// # Errors
    /// If there is not one prediction per label, or a class is out of range (no pixel is counted then). Predictions at
    /// ignored pixels may be anything.
    pub fn add(&mut self, predictions: &[u32], labels: &[u32]) -> Result<(), EvaluationError> {
        if predictions.len() != labels.len() {
            let (predictions, labels) = (predictions.len(), labels.len());
            return Err(EvaluationError::PredictionCount { task: "segmentation", predictions, labels });
        }
        let scored = || predictions.iter().zip(labels).enumerate().filter(|(_, (_, label))| **label != self.ignored);
        for (pixel, (&predicted, &label)) in scored() {
            for (what, class) in [("label", label), ("prediction", predicted)] {
                if class as usize >= self.num_classes {
                    let (num_classes, ignored) = (self.num_classes, self.ignored);
                    return Err(EvaluationError::PixelClass { pixel, what, class, num_classes, ignored });
                }
            }
        }
        let cells: Vec<usize> = scored().map(|(_, (&p, &l))| l as usize * self.num_classes + p as usize).collect();
        cells.into_iter().for_each(|cell| self.counts[cell] += 1);
        Ok(())
    }

    /// Adds the pixels of another matrix of the same classes.
    ///
    /// # Panics
    /// If the classes or the ignored labels differ.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!((self.num_classes, self.ignored), (other.num_classes, other.ignored), "different classes");
        self.counts.iter_mut().zip(&other.counts).for_each(|(sum, count)| *sum += count);
    }

    /// Pixels of the true class `label` that were predicted as `predicted`.
    pub fn count(&self, label: usize, predicted: usize) -> u64 {
        self.counts[label * self.num_classes + predicted]
    }

    /// Pixels of each class that were predicted as such, that were predicted as it, and that are of it.
    pub fn areas(&self) -> Vec<[u64; 3]> {
        let all = 0..self.num_classes;
        all.clone()
            .map(|class| {
                let predicted = all.clone().map(|label| self.count(label, class)).sum();
                [self.count(class, class), predicted, all.clone().map(|other| self.count(class, other)).sum()]
            })
            .collect()
    }

    /// The metrics of all pixels added.
    ///
    /// # Errors
    /// If no pixel was counted.
    pub fn scores(&self) -> Result<SegmentationScores, EvaluationError> {
        let areas = self.areas();
        let total: u64 = areas.iter().map(|[_, _, label]| label).sum();
        if total == 0 {
            return Err(EvaluationError::NoPixels { task: "segmentation" });
        }
        let classes: Vec<ClassScores> = areas.iter().map(|&areas| class_scores(areas)).collect();
        let mean = |metric: fn(&ClassScores) -> Option<f64>| {
            let values: Vec<f64> = classes.iter().filter_map(metric).collect();
            // Some class has a label, so only the F-score can be undefined for all classes: then nothing was right.
            if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
        };
        let right: u64 = areas.iter().map(|[right, _, _]| right).sum();
        let mean_accuracy = mean(|class| class.accuracy);
        Ok(SegmentationScores {
            mean_iou: mean(|class| class.iou),
            mean_accuracy,
            pixel_accuracy: 100.0 * right as f64 / total as f64,
            mean_dice: mean(|class| class.dice),
            mean_f_score: mean(|class| class.f_score),
            mean_precision: mean(|class| class.precision),
            mean_recall: mean_accuracy,
            classes,
        })
    }
}

fn class_scores([right, predicted, label]: [u64; 3]) -> ClassScores {
    let percent = |part: u64, whole: u64| (whole > 0).then(|| 100.0 * part as f64 / whole as f64);
    let dice = percent(2 * right, predicted + label);
    ClassScores {
        iou: percent(right, predicted + label - right),
        accuracy: percent(right, label),
        precision: percent(right, predicted),
        dice,
        f_score: dice.filter(|_| right > 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_equal_sets_of_pixels_counted_by_hand() {
        // Class 0: 3 pixels, 2 right, 3 predicted. Class 1: 2 pixels, 1 right, 2 predicted. Class 2: predicted once, no
        // pixel. Class 3: neither. The last pixel is ignored.
        let mut matrix = ConfusionMatrix::new(4, 9);
        matrix.add(&[0, 0, 1, 1], &[0, 0, 0, 1]).unwrap();
        matrix.add(&[0, 2, 77], &[1, 0, 9]).unwrap();
        assert_eq!(matrix.areas(), [[2, 3, 4], [1, 2, 2], [0, 1, 0], [0, 0, 0]]);
        assert_eq!((matrix.count(0, 1), matrix.count(1, 0), matrix.count(0, 2)), (1, 1, 1));
        let scores = matrix.scores().unwrap();
        assert_eq!(scores.classes[0].iou, Some(40.0));
        assert_eq!(scores.classes[2].iou, Some(0.0));
        assert_eq!((scores.classes[2].accuracy, scores.classes[2].f_score), (None, None));
        assert_eq!(scores.classes[3].iou, None);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        near(scores.mean_iou, (40.0 + 100.0 / 3.0) / 3.0);
        near(scores.mean_accuracy, 50.0);
        near(scores.pixel_accuracy, 50.0);
        near(scores.mean_precision, (200.0 / 3.0 + 50.0) / 3.0);
        near(scores.mean_dice, (400.0 / 7.0 + 50.0) / 3.0);
        near(scores.mean_f_score, (400.0 / 7.0 + 50.0) / 2.0);
    }

    #[test]
    fn merging_equals_adding() {
        let (mut a, mut b, mut both) =
            (ConfusionMatrix::new(3, 255), ConfusionMatrix::new(3, 255), ConfusionMatrix::new(3, 255));
        a.add(&[0, 1], &[0, 2]).unwrap();
        b.add(&[2, 1, 1], &[2, 255, 1]).unwrap();
        both.add(&[0, 1, 2, 1, 1], &[0, 2, 2, 255, 1]).unwrap();
        a.merge(&b);
        assert_eq!(a, both);
    }

    #[test]
    fn classes_out_of_range_are_refused_and_nothing_is_counted() {
        let mut matrix = ConfusionMatrix::new(2, 255);
        assert!(matrix.add(&[0], &[0, 1]).is_err());
        let error = matrix.add(&[0, 1], &[0, 2]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "segmentation: pixel 1 has label 2, there are 2 classes and the ignored label is 255"
        );
        assert!(matrix.add(&[0, 2], &[0, 1]).unwrap_err().to_string().contains("pixel 1 has prediction 2"));
        assert_eq!(matrix.scores(), Err(EvaluationError::NoPixels { task: "segmentation" }));
        matrix.add(&[1], &[0]).unwrap();
        assert_eq!(matrix.scores().unwrap().mean_f_score, 0.0);
    }
}
