//! Train images of which every iteration sees other random crops: for classifiers in whose training the backbone is run.

use dinoxide_augmentation::{Resizer, RgbImage, TrainTransform};
use dinoxide_data::{Rejected, Source};
use dinoxide_random::{Purpose, stream};
use rayon::prelude::*;

use crate::{error::EvaluationError, linear_probe::Order, selection::draws};

/// Images looked at between two reports of progress.
const BLOCK: usize = 256;

/// Images with their classes, all of which could be read once.
#[derive(Clone, Copy)]
pub struct LabeledImages<'a> {
    /// Where they are.
    pub source: &'a dyn Source,
    /// The index in the source of each sample.
    pub indices: &'a [usize],
    /// The class of each sample.
    pub labels: &'a [u32],
    /// Number of classes that labels may name.
    pub num_classes: usize,
}

/// Reads every image once: the indices of those that can be read, and the others with the reason.
///
/// `progress` is called with the number of images done.
///
/// # Errors
/// If none can be read.
pub fn readable(
    source: &dyn Source,
    progress: &mut dyn FnMut(usize),
) -> Result<(Vec<usize>, Vec<Rejected>), EvaluationError> {
    let all: Vec<usize> = (0..source.len()).collect();
    let (mut indices, mut rejected) = (Vec::with_capacity(all.len()), Vec::new());
    for block in all.chunks(BLOCK) {
        let read: Vec<_> = block.par_iter().map(|&index| source.read(index).map(|_| index)).collect();
        for (&index, outcome) in block.iter().zip(read) {
            match outcome {
                Ok(index) => indices.push(index),
                Err(e) => rejected.push(Rejected { index, id: e.id, reason: e.reason.to_string() }),
            }
        }
        progress(indices.len() + rejected.len());
    }
    if indices.is_empty() { Err(EvaluationError::NothingReadable { rejected }) } else { Ok((indices, rejected)) }
}

/// An endless sequence of samples, in epochs that each have their own order, with a random crop for each place in it.
pub(crate) struct RandomCrops<'a> {
    images: LabeledImages<'a>,
    order: Order<'a>,
    transform: TrainTransform,
    seed: u64,
    taken: u64,
}

/// Consecutive samples of the sequence.
pub(crate) struct Stretch {
    /// Place of the first.
    pub(crate) first: u64,
    /// The samples' rows.
    pub(crate) rows: Vec<u32>,
}

impl Stretch {
    /// The same samples in pieces of at most `count`.
    pub(crate) fn pieces(&self, count: usize) -> impl Iterator<Item = (u64, &[u32])> {
        (self.first..).step_by(count).zip(self.rows.chunks(count))
    }
}

impl<'a> RandomCrops<'a> {
    /// The samples `rows`, in crops of `crop_px` pixels.
    pub(crate) fn new(images: LabeledImages<'a>, rows: &'a [u32], crop_px: usize, seed: u64) -> Self {
        let transform = TrainTransform::new(crop_px);
        Self { images, order: Order::new(rows, seed), transform, seed, taken: 0 }
    }

    /// The next `count` samples.
    pub(crate) fn next(&mut self, count: usize) -> Stretch {
        let first = self.taken;
        self.taken += count as u64;
        Stretch { first, rows: self.order.take(count) }
    }

    /// The crops of samples `rows`, the first of which has place `first`. The crop at a place depends on the seed, the place
    /// and the image alone.
    pub(crate) fn crops(&self, first: u64, rows: &[u32]) -> Result<Vec<RgbImage>, EvaluationError> {
        let crop = |(i, &row): (usize, &u32)| {
            let read = self.images.source.read(self.images.indices[row as usize]);
            let image = read.map_err(|e| EvaluationError::Unreadable { image: e.id, reason: e.reason.to_string() })?;
            let mut rng = stream(self.seed, Purpose::Evaluation, draws::RANDOM_CROP, first + i as u64);
            Ok(self.transform.apply(&image, &mut rng, &mut Resizer::default()))
        };
        rows.par_iter().enumerate().map(crop).collect()
    }
}

#[cfg(test)]
mod tests {
    use dinoxide_data::{DecodeLimits, open};

    use super::*;

    #[test]
    fn crops_depend_on_their_place_and_not_on_how_they_are_asked_for_or_on_threads() {
        let source = open("synthetic:images=12,size=20", &DecodeLimits::default()).unwrap();
        let indices: Vec<usize> = (0..12).collect();
        let images = LabeledImages { source: &*source, indices: &indices, labels: &[0; 12], num_classes: 1 };
        let rows = [1, 4, 5, 9, 11];
        let drawn = |threads: usize, pieces: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut crops = RandomCrops::new(images, &rows, 16, 3);
                let stretches = [crops.next(7), crops.next(8)];
                assert_eq!(stretches.each_ref().map(|stretch| stretch.first), [0, 7]);
                let drawn = stretches.iter().flat_map(|stretch| stretch.pieces(pieces).collect::<Vec<_>>());
                let found: Vec<_> = drawn.flat_map(|(first, rows)| crops.crops(first, rows).unwrap()).collect();
                (stretches.map(|stretch| stretch.rows).concat(), found)
            })
        };
        let (order, first) = drawn(1, 15);
        assert_eq!((order.len(), first.len()), (15, 15));
        for (threads, pieces) in [(1, 2), (3, 3), (4, 1)] {
            assert!((order.clone(), first.clone()) == drawn(threads, pieces), "{threads} threads, pieces of {pieces}");
        }
        // Three epochs of five images: no two crops of one image are alike.
        for row in rows {
            let own: Vec<_> = order.iter().zip(&first).filter(|(r, _)| **r == row).map(|(_, crop)| crop).collect();
            assert_eq!(own.len(), 3);
            assert!(own[0] != own[1] && own[1] != own[2] && own[0] != own[2]);
        }
    }

    #[test]
    fn every_image_is_looked_at_once() {
        let source = open("synthetic:images=300,size=16", &DecodeLimits::default()).unwrap();
        let mut seen = Vec::new();
        let (indices, rejected) = readable(&*source, &mut |done| seen.push(done)).unwrap();
        assert_eq!((indices, rejected.len(), seen), ((0..300).collect(), 0, vec![256, 300]));
    }
}
