//! Exact nearest neighbours by cosine similarity, for sets too large for one similarity matrix.
//!
//! Both sides are cut into blocks; one block of similarities exists at a time, the product computed on the device, and a
//! running top-k per query reads it on the host while it is in the cache. Memory beyond the features is a few tens of
//! megabytes, however many rows there are.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};
use rayon::prelude::*;

use crate::{error::EvaluationError, features::Features, top_k::TopK};

/// Most train rows in a block of similarities.
const TRAIN_BLOCK: usize = 2048;
/// Most val rows in a block of similarities.
const QUERY_BLOCK: usize = 256;
/// Val rows that are searched for together: each reads the train features once.
const QUERY_WAVE: usize = 8192;
/// Similarities of [`similarity_rows`] that exist at a time, in bytes.
const ROWS_BYTES: usize = 64 << 20;
/// Blocks are padded to a multiple of this, see [`Blocks`].
const BLOCK_MULTIPLE: usize = 16;

/// Dimensions transposed together: a cache line of a row.
const STRIP: usize = 16;

/// A train sample near a val sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbor {
    /// Row of the train sample.
    pub row: usize,
    /// Cosine similarity.
    pub similarity: f32,
}

/// The `k` train rows most similar to each query row by cosine, most similar first, ties in row order.
///
/// # Errors
/// If the widths differ, or `k` is 0 or more than there are train rows.
pub fn nearest_neighbors(
    train: &Features,
    queries: &Features,
    k: usize,
    device: &Device,
) -> Result<Vec<Vec<Neighbor>>, EvaluationError> {
    if train.dim() != queries.dim() {
        return Err(EvaluationError::DimMismatch { train: train.dim(), val: queries.dim() });
    }
    if k == 0 {
        let value = k.to_string();
        return Err(EvaluationError::Setting { task: "knn", key: "k", value, expected: "at least 1" });
    }
    if k > train.rows() {
        return Err(EvaluationError::TooFewNeighbors { k, available: train.rows() });
    }
    search(train, queries, k, device, |_, neighbors| neighbors.to_vec())
}

/// Equal row ranges of at most `most` rows. All blocks have the same padded length, so that each similarity is computed
/// by the same sequence of operations: identical train rows then have identical similarities, and their tie is seen.
#[derive(Clone, Copy)]
struct Blocks {
    rows: usize,
    length: usize,
}

impl Blocks {
    fn new(rows: usize, most: usize) -> Self {
        let count = rows.div_ceil(most);
        Self { rows, length: rows.div_ceil(count).next_multiple_of(BLOCK_MULTIPLE) }
    }

    fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.rows).step_by(self.length).map(move |start| start..self.rows.min(start + self.length))
    }

    /// The rows of a range, normalised and followed by zero rows up to the block length, on the device: `[length, D]`.
    fn load(self, features: &Features, scales: &[f32], range: Range<usize>, device: &Device) -> Tensor<2> {
        let dim = features.dim();
        let mut values = vec![0.0; self.length * dim];
        values.par_chunks_mut(dim).zip(range).for_each(|(out, row)| {
            out.iter_mut().zip(features.row(row)).for_each(|(out, value)| *out = value * scales[row]);
        });
        Tensor::from_data(TensorData::new(values, [self.length, dim]), (device, DType::F32))
    }

    /// The same, transposed: `[D, length]`. Laid out like that once, it is cheaper to multiply with many times.
    fn load_transposed(self, features: &Features, scales: &[f32], range: Range<usize>, device: &Device) -> Tensor<2> {
        let dim = features.dim();
        let mut values = vec![0.0; dim * self.length];
        values.par_chunks_mut(STRIP * self.length).enumerate().for_each(|(strip, out)| {
            let dims = strip * STRIP..dim.min((strip + 1) * STRIP);
            for (column, row) in range.clone().enumerate() {
                let strip = &features.row(row)[dims.clone()];
                strip.iter().enumerate().for_each(|(d, value)| out[d * self.length + column] = value * scales[row]);
            }
        });
        Tensor::from_data(TensorData::new(values, [dim, self.length]), (device, DType::F32))
    }
}

/// Calls `visit` with each query row and its `k` nearest train rows, and collects what it returns.
pub(crate) fn search<T: Send>(
    train: &Features,
    queries: &Features,
    k: usize,
    device: &Device,
    visit: impl Fn(usize, &[Neighbor]) -> T + Sync,
) -> Result<Vec<T>, EvaluationError> {
    let (train_scales, query_scales) = (train.inverse_norms(), queries.inverse_norms());
    let train_blocks = Blocks::new(train.rows(), TRAIN_BLOCK);
    let query_blocks = Blocks::new(queries.rows(), QUERY_BLOCK);
    let query_ranges: Vec<_> = query_blocks.ranges().collect();
    let mut results = Vec::with_capacity(queries.rows());
    for wave in query_ranges.chunks(QUERY_WAVE / QUERY_BLOCK) {
        let loaded: Vec<Tensor<2>> =
            wave.iter().map(|range| query_blocks.load(queries, &query_scales, range.clone(), device)).collect();
        let mut best: Vec<Vec<TopK>> = wave.iter().map(|range| range.clone().map(|_| TopK::new(k)).collect()).collect();
        for train_range in train_blocks.ranges() {
            let keys = train_blocks.load_transposed(train, &train_scales, train_range.clone(), device);
            let advance = |(query, best): (&Tensor<2>, &mut Vec<TopK>)| {
                let similarities = read(query.clone().matmul(keys.clone()))?;
                best.par_iter_mut().zip(floats(&similarities)?.par_chunks(train_blocks.length)).for_each(
                    |(best, row)| {
                        best.offer(train_range.start, &row[..train_range.len()]);
                    },
                );
                Ok(())
            };
            // On the host a thread takes a block from the product to the ranking; other devices are fed by one thread.
            if *device == Device::flex() {
                loaded.par_iter().zip(&mut best).try_for_each(advance)?;
            } else {
                loaded.iter().zip(&mut best).try_for_each(advance)?;
            }
        }
        let first = results.len();
        let tops: Vec<TopK> = best.into_iter().flatten().collect();
        results.par_extend(tops.into_par_iter().enumerate().map(|(i, top)| {
            let sorted = top.into_sorted().into_iter();
            let neighbors: Vec<Neighbor> = sorted.map(|(similarity, row)| Neighbor { row, similarity }).collect();
            visit(first + i, &neighbors)
        }));
    }
    Ok(results)
}

/// Calls `visit` with each query row and its similarities to all gallery rows, and collects what it returns. Some tens of
/// megabytes of similarities exist at a time, or those of a few queries where one alone has more.
pub(crate) fn similarity_rows<T: Send>(
    gallery: &Features,
    queries: &Features,
    device: &Device,
    visit: impl Fn(usize, &[f32]) -> T + Sync,
) -> Result<Vec<T>, EvaluationError> {
    if gallery.dim() != queries.dim() {
        return Err(EvaluationError::DimMismatch { train: gallery.dim(), val: queries.dim() });
    }
    let (gallery_scales, query_scales) = (gallery.inverse_norms(), queries.inverse_norms());
    let gallery_blocks = Blocks::new(gallery.rows(), TRAIN_BLOCK);
    let most = (ROWS_BYTES / (gallery.rows() * size_of::<f32>())).clamp(BLOCK_MULTIPLE, QUERY_BLOCK);
    let query_blocks = Blocks::new(queries.rows(), most);
    let mut results = Vec::with_capacity(queries.rows());
    for range in query_blocks.ranges() {
        let query = query_blocks.load(queries, &query_scales, range.clone(), device);
        let mut rows = vec![0.0; range.len() * gallery.rows()];
        for columns in gallery_blocks.ranges() {
            let keys = gallery_blocks.load_transposed(gallery, &gallery_scales, columns.clone(), device);
            let similarities = read(query.clone().matmul(keys))?;
            let found = floats(&similarities)?.par_chunks(gallery_blocks.length);
            rows.par_chunks_mut(gallery.rows()).zip(found).for_each(|(row, found)| {
                row[columns.clone()].copy_from_slice(&found[..columns.len()]);
            });
        }
        let rows = rows.par_chunks(gallery.rows()).enumerate();
        results.par_extend(rows.map(|(i, row)| visit(range.start + i, row)));
    }
    Ok(results)
}

/// Reads a matrix back from the device.
pub(crate) fn read(tensor: Tensor<2>) -> Result<TensorData, EvaluationError> {
    tensor.try_into_data().map_err(device_error)
}

/// The numbers of a matrix that was read back.
pub(crate) fn floats(data: &TensorData) -> Result<&[f32], EvaluationError> {
    data.as_slice::<f32>().map_err(device_error)
}

fn device_error(error: impl std::fmt::Display) -> EvaluationError {
    EvaluationError::Device { message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::gaussian;

    fn naive(train: &Features, query: &[f32], k: usize) -> Vec<(f64, usize)> {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let cosine = |row: &[f32]| dot(row, query) / (dot(row, row) * dot(query, query)).sqrt();
        let mut all: Vec<_> = (0..train.rows()).map(|row| (cosine(train.row(row)), row)).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        all.truncate(k);
        all
    }

    #[test]
    fn finds_what_a_full_sort_finds_across_block_boundaries() {
        let device = Device::flex();
        let mut cases = 0;
        // One block and several, exact and ragged, on both sides; several waves of queries.
        for (train_rows, query_rows, dim, k) in [
            (1, 1, 1, 1),
            (17, 3, 5, 17),
            (TRAIN_BLOCK + 1, 5, 7, 9),
            (2 * TRAIN_BLOCK + 33, QUERY_BLOCK + 1, 3, 4),
            (40, QUERY_WAVE + 3, 2, 6),
        ] {
            let (train, queries) = (gaussian(train_rows, dim, 1), gaussian(query_rows, dim, 2));
            let found = nearest_neighbors(&train, &queries, k, &device).unwrap();
            assert_eq!(found.len(), query_rows);
            for row in (0..query_rows).step_by(1 + query_rows / 40).chain([query_rows - 1]) {
                let expected = naive(&train, queries.row(row), k);
                assert_eq!(found[row].len(), k);
                for (ours, (similarity, train_row)) in found[row].iter().zip(&expected) {
                    let difference = (f64::from(ours.similarity) - similarity).abs();
                    assert!(difference < 1e-6, "query {row}: {ours:?}, expected {similarity} of {train_row}");
                    // Neighbours closer to each other than rounding may change places.
                    let exact =
                        naive(&train, queries.row(row), train_rows).into_iter().find(|(_, row)| *row == ours.row);
                    assert!(ours.row == *train_row || (exact.unwrap().0 - similarity).abs() < 1e-6);
                }
                cases += 1;
            }
        }
        assert!(cases > 80, "{cases}");
    }

    #[test]
    fn identical_rows_tie_and_the_earlier_ones_come_first_whatever_block_they_are_in() {
        let mut values = gaussian(TRAIN_BLOCK + 500, 24, 3).values().to_vec();
        let copies = [7, 100, TRAIN_BLOCK / 2 + 1, TRAIN_BLOCK - 1, TRAIN_BLOCK, TRAIN_BLOCK + 499];
        let pattern: Vec<f32> = values[..24].to_vec();
        copies.iter().for_each(|&row| values[row * 24..(row + 1) * 24].copy_from_slice(&pattern));
        let train = Features::new(TRAIN_BLOCK + 500, 24, values).unwrap();
        let queries = Features::new(1, 24, pattern).unwrap();
        let found = &nearest_neighbors(&train, &queries, 5, &Device::flex()).unwrap()[0];
        let rows: Vec<usize> = found.iter().map(|neighbor| neighbor.row).collect();
        assert_eq!(rows, [0, 7, 100, TRAIN_BLOCK / 2 + 1, TRAIN_BLOCK - 1]);
    }

    #[test]
    fn whole_rows_hold_every_similarity_in_its_place() {
        let (gallery, queries) = (gaussian(TRAIN_BLOCK + 77, 5, 1), gaussian(QUERY_BLOCK + 9, 5, 2));
        let rows = similarity_rows(&gallery, &queries, &Device::flex(), |row, found| (row, found.to_vec())).unwrap();
        assert_eq!(rows.len(), QUERY_BLOCK + 9);
        for (i, (row, found)) in rows.iter().enumerate().step_by(13) {
            assert_eq!((*row, found.len()), (i, TRAIN_BLOCK + 77));
            for (similarity, other) in naive(&gallery, queries.row(i), gallery.rows()) {
                assert!((f64::from(found[other]) - similarity).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn impossible_requests_are_refused() {
        let (train, queries) = (gaussian(4, 3, 1), gaussian(2, 3, 2));
        let device = Device::flex();
        assert!(matches!(nearest_neighbors(&train, &queries, 0, &device), Err(EvaluationError::Setting { .. })));
        let error = nearest_neighbors(&train, &queries, 5, &device).unwrap_err();
        assert_eq!(error, EvaluationError::TooFewNeighbors { k: 5, available: 4 });
        let error = nearest_neighbors(&train, &gaussian(2, 4, 2), 1, &device).unwrap_err();
        assert_eq!(error, EvaluationError::DimMismatch { train: 3, val: 4 });
    }
}
