//! Counter-based random streams.
//!
//! A draw is a function of what it is for: the run's seed, a [`Purpose`], and two counters (a sample and the epoch and
//! view in which it appears, or a step and a block). No generator is carried from one draw to the next, so batches do not
//! depend on the number of workers, and resuming a run needs no generator state.

use rand::SeedableRng;
pub use rand::rngs::ChaCha8Rng;

/// What a stream of draws is for. Streams of different purposes are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// The order in which an epoch visits the samples. Counters: epoch, 0.
    SampleOrder = 1,
    /// The crops of a sample. Counters: sample, [`epoch_view`].
    Crop = 2,
    /// The block masks of a batch. Counters: step, 0.
    Mask = 3,
    /// Initial weights. Counters: 0, 0.
    Init = 4,
    /// Stochastic depth and RoPE augmentation of a forward. Counters: step, micro-batch and crop group.
    Forward = 5,
    /// Synthetic images. Counters: sample, 0.
    Synthetic = 6,
    /// Sampling inside an evaluation. Counters: chosen by the protocol.
    Evaluation = 7,
    /// Which of several crop sizes a step has. Counters: step, 0.
    CropSizes = 8,
}

/// The stream for one use of randomness: ChaCha8 keyed by `(seed, purpose, a, b)`.
pub fn stream(seed: u64, purpose: Purpose, a: u64, b: u64) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    for (chunk, word) in key.chunks_exact_mut(8).zip([seed, purpose as u64, a, b]) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// Packs an epoch and a view (the crop's index within its sample) into one counter.
///
/// # Panics
/// If `view` does not fit in 16 bits or `epoch` in 48: no recipe comes near either.
pub fn epoch_view(epoch: u64, view: u64) -> u64 {
    assert!(view < 1 << 16 && epoch < 1 << 48, "epoch {epoch} or view {view} out of range");
    epoch << 16 | view
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    #[test]
    fn every_argument_changes_the_stream() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..3 {
            for purpose in [Purpose::Crop, Purpose::Mask] {
                for a in 0..3 {
                    for b in 0..3 {
                        assert!(seen.insert(stream(seed, purpose, a, b).next_u64()));
                    }
                }
            }
        }
        assert_eq!(seen.len(), 3 * 2 * 3 * 3);
    }

    #[test]
    fn the_same_arguments_give_the_same_draws() {
        let draws = |()| {
            (0..5)
                .map({
                    let mut s = stream(7, Purpose::Crop, 11, epoch_view(3, 2));
                    move |_| s.next_u64()
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(draws(()), draws(()));
    }
}
