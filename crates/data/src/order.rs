//! The order in which an endless run visits the samples: every epoch a fresh permutation, in closed form.
//!
//! The permutation is the swap-or-not shuffle (Hoang, Morris & Rogaway, CRYPTO 2012): for rounds `i = 1…r` with a random
//! `Kᵢ` in `0..n` and a random bit function `Fᵢ`, let `x' = (Kᵢ − x) mod n`, and replace `x` by `x'` when
//! `Fᵢ(max(x, x')) = 1`. Each round either swaps a pair or leaves it, so it is a bijection of `0..n` for any `n`; nothing
//! of the size of the data set is kept, and a resumed run needs only its position.

use dinoxide_random::{Purpose, stream};
use rand::Rng;

/// The sample order of a data set of fixed length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleOrder {
    len: u64,
    seed: u64,
    rounds: u32,
}

impl SampleOrder {
    /// The order of `len` samples under a seed.
    ///
    /// # Panics
    /// If `len` is zero: there is nothing to visit.
    pub fn new(len: usize, seed: u64) -> Self {
        assert!(len > 0, "a sample order needs at least one sample");
        let len = len as u64;
        // Mixing needs a number of rounds proportional to log n; 4·log₂ n + 24 leaves no trace that statistics of the
        // size of an epoch can find, at about a microsecond for a draw.
        let rounds = 24 + 4 * len.ilog2();
        Self { len, seed, rounds }
    }

    /// The number of samples.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Never: see [`new`](Self::new).
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The epoch and the sample at a position: `epoch = position / len`, and within an epoch each sample once.
    pub fn at(&self, position: u64) -> (u64, usize) {
        let epoch = position / self.len;
        let mut keys = stream(self.seed, Purpose::SampleOrder, epoch, 0);
        let mut x = position % self.len;
        for _ in 0..self.rounds {
            let pivot = scale(keys.next_u64(), self.len);
            let key = keys.next_u64();
            let partner = if x <= pivot { pivot - x } else { pivot + (self.len - x) };
            if mix(key ^ x.max(partner)) >> 63 == 1 {
                x = partner;
            }
        }
        (epoch, x as usize)
    }

    /// Another sample for a position whose own cannot be read: `attempt` counts from 1.
    pub(crate) fn replacement(&self, position: u64, attempt: u64) -> usize {
        debug_assert!(attempt > 0, "counter 0 is the epoch's permutation");
        scale(stream(self.seed, Purpose::SampleOrder, position, attempt).next_u64(), self.len) as usize
    }
}

/// `⌊word · n / 2⁶⁴⌋`: a uniform word to a number below `n`; the bias, below `n / 2⁶⁴`, is of no account.
fn scale(word: u64, n: u64) -> u64 {
    ((u128::from(word) * u128::from(n)) >> 64) as u64
}

/// The finaliser of SplitMix64: every input bit reaches every output bit.
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn epoch(order: &SampleOrder, epoch: u64) -> Vec<usize> {
        let len = order.len() as u64;
        (epoch * len..(epoch + 1) * len)
            .map(|position| {
                let (at, index) = order.at(position);
                assert_eq!(at, epoch);
                index
            })
            .collect()
    }

    #[test]
    fn every_epoch_visits_every_sample_once() {
        let mut cases = 0;
        for len in [1, 2, 3, 5, 100, 1000, 4097] {
            for seed in [0, 1, u64::MAX] {
                for e in [0, 1, 7] {
                    let mut indices = epoch(&SampleOrder::new(len, seed), e);
                    indices.sort_unstable();
                    assert_eq!(indices, (0..len).collect::<Vec<_>>(), "len {len} seed {seed} epoch {e}");
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, 7 * 3 * 3);
    }

    #[test]
    fn a_large_set_needs_no_memory_and_stays_in_range() {
        let order = SampleOrder::new(1 << 40, 3);
        for position in [0, 1, (1 << 40) - 1, 1 << 40, u64::MAX] {
            let (e, index) = order.at(position);
            assert_eq!(e, position >> 40);
            assert!(index < 1 << 40);
        }
    }

    #[test]
    fn all_orders_of_three_samples_occur_equally_often() {
        let order = SampleOrder::new(3, 11);
        let mut counts = BTreeMap::new();
        for e in 0..6000 {
            *counts.entry(epoch(&order, e)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        // Binomial: 1000 expected, standard deviation 29.
        assert!(counts.values().all(|&count| (850..1150).contains(&count)), "{counts:?}");
    }

    #[test]
    fn neighbours_and_epochs_and_seeds_are_uncorrelated() {
        let len = 4097;
        let correlation = |a: &[usize], b: &[usize]| {
            let mean = (len - 1) as f64 / 2.0;
            let product: f64 = a.iter().zip(b).map(|(&a, &b)| (a as f64 - mean) * (b as f64 - mean)).sum();
            let variance: f64 = a.iter().map(|&a| (a as f64 - mean).powi(2)).sum();
            product / variance
        };
        // The correlation of independent permutations has a standard deviation of 1/√len = 0.016.
        let identity: Vec<usize> = (0..len).collect();
        let (first, second) = (epoch(&SampleOrder::new(len, 5), 0), epoch(&SampleOrder::new(len, 5), 1));
        let other = epoch(&SampleOrder::new(len, 6), 0);
        for (name, a, b) in [
            ("identity", &first, &identity),
            ("epochs", &first, &second),
            ("seeds", &first, &other),
            ("lag 1", &first[1..].to_vec(), &first[..len - 1].to_vec()),
            ("lag 2", &first[2..].to_vec(), &first[..len - 2].to_vec()),
        ] {
            let r = correlation(a, b);
            assert!(r.abs() < 0.07, "{name}: {r}");
        }
        let fixed = first.iter().zip(&second).filter(|(a, b)| a == b).count();
        assert!(fixed < 8, "{fixed} samples kept their place; 1 is expected");
        let steps: f64 = first.windows(2).map(|w| w[0].abs_diff(w[1]) as f64).sum::<f64>() / len as f64;
        assert!((steps / len as f64 - 1.0 / 3.0).abs() < 0.02, "mean step {steps}, a third of the length is expected");
    }

    #[test]
    fn replacements_depend_on_position_and_attempt_and_reach_every_sample() {
        let order = SampleOrder::new(7, 1);
        let mut seen = [0; 7];
        for position in 0..50 {
            for attempt in 1..=4 {
                seen[order.replacement(position, attempt)] += 1;
            }
        }
        assert!(seen.iter().all(|&count| (10..50).contains(&count)), "{seen:?}");
        assert_eq!(order.replacement(9, 2), order.replacement(9, 2));
    }
}
