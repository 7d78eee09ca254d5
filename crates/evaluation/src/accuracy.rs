//! Top-1 and top-5 accuracy.

use serde::{Deserialize, Serialize};

/// Accuracy over samples (not over classes), in percent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Samples whose class has the highest score.
    pub top1: f64,
    /// Samples whose class is among the five highest scores; `None` with fewer than five classes, where it says nothing.
    pub top5: Option<f64>,
}

/// Counts of samples by the rank of their true class.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RankCounter {
    samples: usize,
    first: usize,
    first_five: usize,
}

impl RankCounter {
    /// Adds a sample; `rank` is that of its true class, 0 the best, `None` if the class got no score.
    pub(crate) fn add(&mut self, rank: Option<usize>) {
        self.samples += 1;
        self.first += usize::from(rank.is_some_and(|rank| rank == 0));
        self.first_five += usize::from(rank.is_some_and(|rank| rank < 5));
    }

    /// The accuracy over the samples added.
    pub(crate) fn accuracy(&self, num_classes: usize) -> Accuracy {
        let percent = |hits: usize| 100.0 * hits as f64 / self.samples.max(1) as f64;
        Accuracy { top1: percent(self.first), top5: (num_classes >= 5).then(|| percent(self.first_five)) }
    }
}

/// The accuracy of samples whose true classes have these ranks.
pub(crate) fn accuracy_of(ranks: &[Option<usize>], num_classes: usize) -> Accuracy {
    let mut counter = RankCounter::default();
    ranks.iter().for_each(|&rank| counter.add(rank));
    counter.accuracy(num_classes)
}

/// How many classes are ahead of `class`: those with a higher score, and of equal ones those with a lower number.
/// `None` if the score is NaN.
pub(crate) fn rank<T: PartialOrd + Copy>(scores: &[T], class: usize) -> Option<usize> {
    let own = scores[class];
    own.partial_cmp(&own)?;
    let ahead = scores[..class].iter().filter(|&&score| score >= own).count();
    Some(ahead + scores[class + 1..].iter().filter(|&&score| score > own).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_follow_scores_and_break_ties_by_class_number() {
        let scores = [0.1, 0.5, 0.5, 0.9, f32::NAN];
        let ranks: Vec<_> = (0..5).map(|class| rank(&scores, class)).collect();
        assert_eq!(ranks, [Some(3), Some(1), Some(2), Some(0), None]);
    }

    #[test]
    fn accuracy_is_in_percent_and_top5_needs_five_classes() {
        let mut counter = RankCounter::default();
        [Some(0), Some(4), Some(5), None].into_iter().for_each(|rank| counter.add(rank));
        assert_eq!(counter.accuracy(9), Accuracy { top1: 25.0, top5: Some(50.0) });
        assert_eq!(counter.accuracy(4).top5, None);
    }
}
