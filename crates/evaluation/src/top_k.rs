//! The `k` largest of a stream of similarities, kept while the stream goes by.
//!
//! A value is first compared with the smallest one that could still enter; almost all are rejected there, sixty-four at a
//! time. Those that pass go to a buffer that is cut back to `k` by selection when full, so an insertion costs constant
//! time on average, unlike in a heap.

/// Values compared with the threshold together, so that the comparison is done in SIMD registers.
const LANES: usize = 64;

/// Keeps the `k` largest values and where they were seen. Of equal values the one with the lower index wins.
///
/// Indices must be offered in ascending order; values must not be NaN.
pub(crate) struct TopK {
    k: usize,
    /// Nothing at or below this can enter: an equal value seen later has a higher index and loses the tie.
    threshold: f32,
    /// Value and index in one integer whose order is theirs, see [`key`].
    buffer: Vec<u64>,
    capacity: usize,
}

impl TopK {
    pub(crate) fn new(k: usize) -> Self {
        let capacity = k + k.max(LANES);
        Self { k, threshold: f32::NEG_INFINITY, buffer: Vec::with_capacity(capacity), capacity }
    }

    /// Offers `values[i]` as index `first_index + i`.
    pub(crate) fn offer(&mut self, first_index: usize, values: &[f32]) {
        for (block, chunk) in values.chunks(LANES).enumerate() {
            let threshold = self.threshold;
            if !chunk.iter().fold(false, |any, &value| any | (value > threshold)) {
                continue;
            }
            if self.buffer.len() + chunk.len() > self.capacity {
                self.cut();
            }
            let first = first_index + block * LANES;
            let threshold = self.threshold;
            let entering = chunk.iter().enumerate().filter(|(_, value)| **value > threshold);
            self.buffer.extend(entering.map(|(i, &value)| key(value, first + i)));
        }
    }

    /// Reduces the buffer to the `k` best and raises the threshold to the worst of them.
    fn cut(&mut self) {
        if self.buffer.len() > self.k {
            self.buffer.select_nth_unstable_by(self.k - 1, |a, b| b.cmp(a));
            self.buffer.truncate(self.k);
            self.threshold = entry(self.buffer[self.k - 1]).0;
        }
    }

    /// The values kept and their indices, largest value first.
    pub(crate) fn into_sorted(mut self) -> Vec<(f32, usize)> {
        self.cut();
        self.buffer.sort_unstable_by(|a, b| b.cmp(a));
        self.buffer.into_iter().map(entry).collect()
    }
}

/// An integer that orders as (value ascending, index descending). Adding zero makes −0 equal to 0.
pub(crate) fn key(value: f32, index: usize) -> u64 {
    let bits = (value + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!(index as u32))
}

/// The value and index of a [`key`].
fn entry(key: u64) -> (f32, usize) {
    let ordered = (key >> 32) as u32;
    let bits = if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered };
    (f32::from_bits(bits), !(key as u32) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dinoxide_random::{Purpose, stream};
    use rand::RngExt;

    /// Sorts everything.
    fn naive(values: &[f32], k: usize) -> Vec<(f32, usize)> {
        let mut all: Vec<_> = values.iter().copied().zip(0..).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        all.truncate(k);
        all
    }

    #[test]
    fn equals_sorting_everything_for_any_order_ties_and_block_sizes() {
        let mut rng = stream(3, Purpose::Evaluation, 0, 0);
        let mut cases = 0;
        for length in [1, 5, 63, 64, 65, 700, 2000] {
            // Few distinct values make many ties.
            for distinct in [2, 40, 1 << 20] {
                let mut values: Vec<f32> =
                    (0..length).map(|_| rng.random_range(0..distinct) as f32 / distinct as f32 - 0.5).collect();
                for order in 0..3 {
                    match order {
                        1 => values.sort_by(f32::total_cmp),
                        2 => values.reverse(),
                        _ => {}
                    }
                    for k in [1, 2, 7, 64, 200, 3000] {
                        for block in [1, 37, 128, 4096] {
                            let mut top = TopK::new(k);
                            for (i, part) in values.chunks(block).enumerate() {
                                top.offer(i * block, part);
                            }
                            assert_eq!(top.into_sorted(), naive(&values, k), "length {length} k {k} block {block}");
                            cases += 1;
                        }
                    }
                }
            }
        }
        assert_eq!(cases, 7 * 3 * 3 * 6 * 4);
    }

    #[test]
    fn keys_order_negative_values_zeros_and_indices() {
        assert!(key(-1.0, 0) < key(-0.5, 0) && key(-0.5, 0) < key(0.0, 0) && key(0.0, 0) < key(0.25, 0));
        assert_eq!(key(-0.0, 4), key(0.0, 4));
        assert!(key(0.5, 3) > key(0.5, 4));
        assert_eq!(entry(key(-0.75, 4_000_000_000)), (-0.75, 4_000_000_000));
    }
}
