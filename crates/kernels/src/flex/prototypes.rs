//! What the losses do with the logits of prototypes, `[M, K]`: a few passes over each row while it is in the cache.
//!
//! Plain tensors, in the memory of the logits where nothing else sees it. Sums across rows are formed from blocks in their
//! order: the number of threads changes nothing.

use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Flex, backend_extension};

use super::{contiguous, dims2, elements, for_each_block, simd, sum_over_rows, tensor, transform, transform_with};
use crate::LEAST_MASS;

/// The operations, on `flex` without automatic differentiation.
#[backend_extension(Flex)]
pub(crate) trait FlexPrototypes: Backend {
    /// The weighted cross-entropy of each row, `[M]`, and its gradient with respect to the logits, `[M, K]`.
    fn soft_cross_entropy(
        logits: FloatTensor<Self>,
        targets: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        mass: f64,
        temperature: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// Sinkhorn–Knopp, `[M, K]`.
    fn sinkhorn(logits: FloatTensor<Self>, temperature: f64, iterations: usize) -> FloatTensor<Self>;
}

impl FlexPrototypes for Flex {
    fn soft_cross_entropy(
        logits: FlexTensor,
        targets: FlexTensor,
        weights: FlexTensor,
        mass: f64,
        temperature: f64,
    ) -> (FlexTensor, FlexTensor) {
        let [rows, prototypes] = dims2(&logits);
        let (targets, weights) = (contiguous(targets), contiguous(weights));
        let (targets, weights) = (elements(&targets), elements(&weights));
        assert!(
            targets.len() == rows * prototypes && weights.len() == rows,
            "cross-entropy: logits [{rows}, {prototypes}], {} targets and {} weights",
            targets.len(),
            weights.len()
        );
        let (mass, inverse) = (mass as f32, (1.0 / temperature) as f32);
        let mut losses = vec![0.0; rows];
        let gradient = transform_with(logits, prototypes.max(1), &mut losses, 1, |start, row, loss| {
            let (target, weight) = (&targets[start..][..row.len()], weights[start / prototypes]);
            simd::vectorized(
                #[inline(always)]
                || {
                    let expected = simd::dot(row, target) * inverse;
                    let peak = simd::max(row);
                    let total = simd::exp_and_sum(row, peak, inverse);
                    loss[0] = ((peak * inverse + total.ln()) * mass - expected) * weight;
                    let (of_student, of_target) = (weight * mass * inverse / total, weight * inverse);
                    for (value, target) in row.iter_mut().zip(target) {
                        *value = *value * of_student - target * of_target;
                    }
                },
            );
        });
        (tensor(losses, [rows]), gradient)
    }

    fn sinkhorn(logits: FlexTensor, temperature: f64, iterations: usize) -> FlexTensor {
        let [samples, prototypes] = dims2(&logits);
        let inverse = (1.0 / temperature) as f32;
        let mut peaks = vec![0.0; samples];
        let q = transform_with(logits, prototypes.max(1), &mut peaks, 1, |_, row, peak| {
            simd::vectorized(
                #[inline(always)]
                || {
                    let highest = simd::max(row);
                    simd::exp_and_sum(row, highest, inverse);
                    peak[0] = highest * inverse;
                },
            );
        });
        let highest = peaks.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut per_sample: Vec<f32> = peaks.iter().map(|peak| (peak - highest).exp()).collect();
        let mut per_prototype = vec![1.0; prototypes];
        let least = LEAST_MASS as f32;
        let values = elements(&q);
        for _ in 0..iterations {
            per_prototype = sum_over_rows(samples, prototypes, |rows, sum| {
                simd::vectorized(
                    #[inline(always)]
                    || {
                        for i in rows.clone() {
                            let (row, factor) = (&values[i * prototypes..][..prototypes], per_sample[i]);
                            for (sum, value) in sum.iter_mut().zip(row) {
                                *sum = value.mul_add(factor, *sum);
                            }
                        }
                    },
                );
            });
            per_prototype.iter_mut().for_each(|mass| *mass = 1.0 / (mass.max(least) * prototypes as f32));
            // The masses of the samples, a task for each.
            for_each_block(&mut per_sample, 1, &mut [], 0, |i, factor, _| {
                simd::vectorized(
                    #[inline(always)]
                    || {
                        let mass = simd::dot(&values[i * prototypes..][..prototypes], &per_prototype);
                        factor[0] = 1.0 / (mass.max(least) * samples as f32);
                    },
                );
            });
        }
        transform(q, prototypes.max(1), |start, row| {
            let factor = per_sample[start / prototypes] * samples as f32;
            simd::vectorized(
                #[inline(always)]
                || {
                    for (value, per_prototype) in row.iter_mut().zip(&per_prototype) {
                        *value = *value * per_prototype * factor;
                    }
                },
            );
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, TensorData};

    use crate::testing::numbers;
    use crate::{composed, sinkhorn, soft_cross_entropy};

    fn matrix(rows: usize, columns: usize, seed: u64) -> Tensor<2> {
        let data = TensorData::new(numbers(rows * columns, seed), [rows, columns]);
        Tensor::from_data(data, &Device::flex())
    }

    fn assert_near<const D: usize>(actual: Tensor<D>, expected: Tensor<D>) {
        assert_eq!(actual.dims(), expected.dims());
        let largest: f32 = expected.clone().abs().max().into_scalar();
        let off: f32 = (actual - expected).abs().max().into_scalar();
        assert!(off <= 1e-5 * largest, "off by {off} with values up to {largest}");
    }

    /// The last has more rows than a block of the sums.
    const SHAPES: [[usize; 2]; 4] = [[1, 2], [3, 7], [8, 1001], [300, 65]];

    #[test]
    fn cross_entropy_and_gradient_equal_the_composed_ones() {
        for [rows, prototypes] in SHAPES {
            let targets = matrix(rows, prototypes, 2).abs();
            let weights = matrix(rows, 1, 3).abs().reshape([rows]);
            let logits = matrix(rows, prototypes, 1) * 3.0;
            let run = |f: fn(Tensor<2>, Tensor<2>, Tensor<1>, f64, f64) -> (Tensor<1>, Tensor<2>)| {
                f(logits.clone(), targets.clone(), weights.clone(), 1.7, 0.1)
            };
            let (actual, expected) = (run(soft_cross_entropy), run(composed::soft_cross_entropy));
            assert_near(actual.0, expected.0);
            assert_near(actual.1, expected.1);
        }
    }

    #[test]
    fn sinkhorn_equals_the_composed_one() {
        for [samples, prototypes] in SHAPES {
            for iterations in [0, 1, 3] {
                let logits = matrix(samples, prototypes, 4);
                let expected = composed::sinkhorn(logits.clone(), 0.07, iterations);
                assert_near(sinkhorn(logits, 0.07, iterations), expected);
            }
        }
    }

    #[test]
    fn number_of_threads_does_not_change_the_bits() {
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let bits = pool.install(|| sinkhorn(matrix(300, 65, 5), 0.1, 3)).into_data().try_to_vec::<f32>();
            bits.expect("f32").into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(with(1), with(3));
    }
}
