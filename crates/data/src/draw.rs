//! Reading that survives bad images: another one is drawn in the place of one that cannot be read, and all of them are
//! counted.

use std::collections::BTreeSet;
use std::sync::Arc;

use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::{DataError, SampleOrder, Source};

/// An image that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rejected {
    /// Its index in the source.
    pub index: usize,
    /// Its name.
    pub id: String,
    /// Why.
    pub reason: String,
}

/// The sample at a position.
#[derive(Clone, Debug)]
pub struct Drawn {
    /// The epoch that the position belongs to.
    pub epoch: u64,
    /// The sample's index in the source.
    pub index: usize,
    /// Its image.
    pub image: RgbImage,
    /// Its class, in a labelled source.
    pub label: Option<u32>,
    /// The images that were to be here but could not be read, in the order of trying.
    pub rejected: Vec<Rejected>,
}

/// Reads the samples of a source in their order.
#[derive(Clone)]
pub struct SampleReader {
    source: Arc<dyn Source>,
    order: SampleOrder,
}

impl SampleReader {
    /// How many samples are drawn for a position before giving up. With nine images of ten damaged, one position in a
    /// thousand gives up.
    const MAX_ATTEMPTS: u64 = 64;

    /// A reader over the order that `seed` gives.
    ///
    /// # Panics
    /// If the source is empty, which one from [`open`](crate::open) never is.
    pub fn new(source: Arc<dyn Source>, seed: u64) -> Self {
        let order = SampleOrder::new(source.len(), seed);
        Self { source, order }
    }

    /// The source.
    pub fn source(&self) -> &Arc<dyn Source> {
        &self.source
    }

    /// The order.
    pub fn order(&self) -> &SampleOrder {
        &self.order
    }

    /// Reads the sample at a position; when it cannot be read, another one, chosen at random as a function of (seed,
    /// position, attempt).
    ///
    /// # Errors
    /// [`DataError::NothingReadable`] when all that were tried cannot be read.
    pub fn draw(&self, position: u64) -> Result<Drawn, DataError> {
        let (epoch, first) = self.order.at(position);
        let mut rejected = Vec::<Rejected>::new();
        for attempt in 0..Self::MAX_ATTEMPTS {
            let index = if attempt == 0 { first } else { self.order.replacement(position, attempt) };
            if rejected.iter().any(|tried| tried.index == index) {
                continue;
            }
            match self.source.read(index) {
                Ok(image) => return Ok(Drawn { epoch, index, image, label: self.source.label(index), rejected }),
                Err(error) => rejected.push(Rejected { index, id: error.id, reason: error.reason.to_string() }),
            }
        }
        Err(DataError::NothingReadable { position, rejected })
    }
}

/// The images that could not be read so far. It is part of a run's state: save it with a checkpoint, so that a resumed run
/// judges as an uninterrupted one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BadImages {
    /// Positions recorded. From the length of the source on, each of its images has been tried.
    positions: u64,
    /// Images tried, counting repeats.
    reads: u64,
    /// Each once, in the order in which they were met.
    list: Vec<Rejected>,
    /// The indices of `list`.
    known: BTreeSet<usize>,
}

impl BadImages {
    /// From this many on, a share is judged before the first epoch is over,
    const ENOUGH: usize = 10;
    /// when there are so many standard deviations more than the share allows.
    const MARGIN: f64 = 4.0;

    /// Takes in what a position came to. Positions are to be recorded in order.
    pub fn record(&mut self, drawn: &Drawn) {
        self.positions += 1;
        self.reads += 1 + drawn.rejected.len() as u64;
        for rejected in &drawn.rejected {
            if self.known.insert(rejected.index) {
                self.list.push(rejected.clone());
            }
        }
    }

    /// The images, each once, in the order in which they were met.
    pub fn list(&self) -> &[Rejected] {
        &self.list
    }

    /// Stops a run whose data is not what its owner thinks it is.
    ///
    /// Once as many positions were recorded as the source has images, each image has been tried: the share is the number
    /// of different bad images over `len`, and is compared as it is. Before that, it is an estimate: the number of
    /// different bad images over the number of reads, which counts an image again when it has stood in for a bad one. It
    /// stops a run when at least ten are bad, and more than `m + 4·√m`, with `m = max_share · reads`, so that bad luck does
    /// not. A single bad image never stops a run, not even one of three.
    ///
    /// # Errors
    /// [`DataError::TooManyBad`] when the share is above `max_share`.
    pub fn check(&self, len: usize, max_share: f64) -> Result<(), DataError> {
        let all_tried = self.positions >= len as u64;
        let seen = if all_tried { len as u64 } else { self.reads.min(len as u64) };
        let allowed = max_share * seen as f64;
        let bad = self.list.len();
        let too_many = if all_tried {
            bad >= 2 && bad as f64 > allowed
        } else {
            bad >= Self::ENOUGH && bad as f64 > allowed + Self::MARGIN * allowed.sqrt()
        };
        if too_many {
            return Err(DataError::TooManyBad { seen, max_share, rejected: self.list.clone() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::picture;
    use crate::{DecodeError, ReadError};

    /// `len` images, of which some cannot be read; width 2 + index.
    struct Damaged {
        len: usize,
        bad: fn(usize) -> bool,
    }

    impl Source for Damaged {
        fn len(&self) -> usize {
            self.len
        }
        fn id(&self, index: usize) -> String {
            format!("{index}.jpg")
        }
        fn read(&self, index: usize) -> Result<RgbImage, ReadError> {
            if (self.bad)(index) {
                return Err(ReadError { id: self.id(index), reason: DecodeError::Empty });
            }
            Ok(picture(2 + index as u32, 2))
        }
        fn label(&self, index: usize) -> Option<u32> {
            Some(index as u32 % 3)
        }
        fn classes(&self) -> &[String] {
            &[]
        }
    }

    fn reader(len: usize, bad: fn(usize) -> bool) -> SampleReader {
        SampleReader::new(Arc::new(Damaged { len, bad }), 4)
    }

    /// Runs until the ledger complains, for at most so many epochs.
    fn run(len: usize, bad: fn(usize) -> bool, epochs: u64, max_share: f64) -> (u64, Result<(), DataError>, BadImages) {
        let reader = reader(len, bad);
        let mut ledger = BadImages::default();
        for position in 0..epochs * len as u64 {
            ledger.record(&reader.draw(position).unwrap());
            if let Err(error) = ledger.check(len, max_share) {
                return (position, Err(error), ledger);
            }
        }
        (epochs * len as u64, Ok(()), ledger)
    }

    #[test]
    fn readable_samples_come_in_the_order_and_bad_ones_are_replaced() {
        let reader = reader(50, |index| index % 10 == 3);
        let mut replaced = 0;
        for position in 0..100 {
            let drawn = reader.draw(position).unwrap();
            let (epoch, index) = reader.order().at(position);
            assert_eq!(drawn.epoch, epoch);
            assert_eq!(drawn.image.width(), 2 + drawn.index as u32);
            assert_eq!(drawn.label, Some(drawn.index as u32 % 3));
            if index % 10 == 3 {
                assert_eq!(
                    drawn.rejected[0],
                    Rejected { index, id: format!("{index}.jpg"), reason: "the file is empty".into() }
                );
                assert!(drawn.index % 10 != 3);
                replaced += 1;
            } else {
                assert!(drawn.index == index && drawn.rejected.is_empty());
            }
            let again = reader.draw(position).unwrap();
            assert_eq!((again.index, again.rejected), (drawn.index, drawn.rejected));
        }
        assert_eq!(replaced, 10);
    }

    #[test]
    fn a_source_without_a_readable_image_ends_with_a_list() {
        for len in [1, 2, 5, 1000] {
            let Err(DataError::NothingReadable { position: 9, rejected }) = reader(len, |_| true).draw(9) else {
                panic!("expected nothing readable");
            };
            let indices: BTreeSet<_> = rejected.iter().map(|one| one.index).collect();
            assert!(indices.len() == rejected.len() && rejected.len() <= len.min(64), "an image is tried once");
        }
        let error = reader(1000, |_| true).draw(0).unwrap_err().to_string();
        assert!(error.contains("image(s) tried can be read\n  `") && error.contains("more\n\nhint"), "{error}");
    }

    #[test]
    fn one_bad_image_never_stops_a_run() {
        for len in [2, 3, 9] {
            let (_, outcome, ledger) = run(len, |index| index == 1, 5, 0.0);
            outcome.unwrap();
            assert_eq!(ledger.list().len(), 1);
            assert_eq!(ledger.list()[0].id, "1.jpg");
        }
    }

    #[test]
    fn a_small_source_is_judged_after_one_epoch() {
        let (position, outcome, _) = run(3, |index| index > 0, 5, 0.1);
        assert!(matches!(outcome, Err(DataError::TooManyBad { seen: 3, .. })), "{outcome:?}");
        assert!(position <= 3);
        // 2 of 30 is below the share.
        let (_, outcome, ledger) = run(30, |index| index < 2, 4, 0.1);
        outcome.unwrap();
        assert_eq!(ledger.list().len(), 2);
    }

    /// With nearly half of them bad, as many reads as there are images are over long before every image was tried.
    #[test]
    fn the_share_is_exact_only_when_every_image_was_tried() {
        let len = 20;
        let (position, outcome, ledger) = run(len, |index| index < 9, 2, 0.4);
        assert!(matches!(outcome, Err(DataError::TooManyBad { seen: 20, .. })), "{outcome:?}");
        assert_eq!((position, ledger.list().len()), (len as u64 - 1, 9));
        let (_, outcome, ledger) = run(len, |index| index < 9, 2, 0.45);
        outcome.unwrap();
        assert_eq!(ledger.list().len(), 9);
    }

    #[test]
    fn a_large_source_is_judged_as_soon_as_ten_are_bad() {
        let (position, outcome, _) = run(5000, |index| index % 2 == 0, 1, 0.1);
        let error = outcome.unwrap_err().to_string();
        assert!((2..40).contains(&position), "stopped at {position}");
        assert!(error.starts_with("data: 1"), "{error}");
        assert!(error.contains("`max_bad_share` allows 10.0 %)\n  `") && error.contains("more\n\nhint:"), "{error}");
        assert_eq!(error.matches("the file is empty").count(), 5, "{error}");
        // Just within the limit: the estimate wavers around it, and nothing comes of that.
        let (_, outcome, ledger) = run(5000, |index| index % 10 == 0, 2, 0.1);
        outcome.unwrap();
        assert_eq!(ledger.list().len(), 500);
        let (_, outcome, _) = run(1000, |index| index % 5 != 0, 1, 1.0);
        outcome.unwrap();
    }

    #[test]
    fn the_ledger_goes_through_a_checkpoint() {
        let reader = reader(40, |index| index % 4 == 0);
        let mut straight = BadImages::default();
        (0..80).for_each(|position| straight.record(&reader.draw(position).unwrap()));
        let mut first = BadImages::default();
        (0..31).for_each(|position| first.record(&reader.draw(position).unwrap()));
        let mut resumed: BadImages = serde_json::from_str(&serde_json::to_string(&first).unwrap()).unwrap();
        (31..80).for_each(|position| resumed.record(&reader.draw(position).unwrap()));
        assert_eq!(resumed, straight);
        assert_eq!(straight.list().len(), 10);
    }
}
