//! What a step does to each parameter, one pass over its numbers: the optimizer's update and the running mean.
//!
//! Plain tensors, in their own memory where nothing else sees it. Every element is computed by itself, and a sum of squares
//! is formed from blocks in their order: the number of threads changes nothing.

use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Flex, backend_extension};
use rayon::prelude::*;

use super::{ELEMENT_BLOCK, contiguous, elements, simd, tensor, transform};
use crate::AdamW;

/// The updates, on `flex` without automatic differentiation.
#[backend_extension(Flex)]
pub(crate) trait FlexUpdates: Backend {
    /// The weight and both moments after a step.
    fn adamw(
        weight: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamW,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    /// `momentum·mean + (1 − momentum)·value`.
    fn running_mean(mean: FloatTensor<Self>, value: FloatTensor<Self>, momentum: f64) -> FloatTensor<Self>;
    /// `Σ xᵢ²`, `[1]`.
    fn sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl FlexUpdates for Flex {
    fn adamw(
        weight: FlexTensor,
        gradient: FlexTensor,
        m: FlexTensor,
        v: FlexTensor,
        step: AdamW,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let gradient = contiguous(gradient);
        let (mut weight, mut m, mut v) = (own(weight), own(m), own(v));
        let g = elements(&gradient);
        {
            let [weight, m, v] = [&mut weight, &mut m, &mut v].map(|tensor| tensor.storage_mut::<f32>());
            let lengths = [weight.len(), m.len(), v.len()];
            assert_eq!(lengths, [g.len(); 3], "adamw: weight, moments and a gradient of {}", g.len());
            let [gradient_factor, beta1, rest1, beta2, rest2, root_factor, eps, decay, rate] = [
                step.gradient_factor,
                step.beta1,
                1.0 - step.beta1,
                step.beta2,
                1.0 - step.beta2,
                1.0 / step.correction2.sqrt(),
                step.eps,
                step.decay,
                step.lr / step.correction1,
            ]
            .map(|value| value as f32);
            let moments = m.par_chunks_mut(ELEMENT_BLOCK).zip(v.par_chunks_mut(ELEMENT_BLOCK));
            let blocks = weight.par_chunks_mut(ELEMENT_BLOCK).zip(g.par_chunks(ELEMENT_BLOCK)).zip(moments);
            blocks.for_each(|((weight, g), (m, v))| {
                simd::vectorized(
                    #[inline(always)]
                    || {
                        for (((weight, &g), m), v) in weight.iter_mut().zip(g).zip(m.iter_mut()).zip(v.iter_mut()) {
                            let g = g * gradient_factor;
                            *m = *m * beta1 + g * rest1;
                            *v = *v * beta2 + g * g * rest2;
                            let root = v.sqrt() * root_factor + eps;
                            *weight = *weight * decay - *m / root * rate;
                        }
                    },
                );
            });
        }
        (weight, m, v)
    }

    fn running_mean(mean: FlexTensor, value: FlexTensor, momentum: f64) -> FlexTensor {
        let value = contiguous(value);
        let value = elements(&value);
        let (keep, take) = (momentum as f32, (1.0 - momentum) as f32);
        transform(mean, ELEMENT_BLOCK, |start, block| {
            simd::vectorized(
                #[inline(always)]
                || {
                    for (mean, value) in block.iter_mut().zip(&value[start..]) {
                        *mean = *mean * keep + value * take;
                    }
                },
            );
        })
    }

    fn sum_of_squares(x: FlexTensor) -> FlexTensor {
        let x = contiguous(x);
        let blocks = elements(&x).par_chunks(ELEMENT_BLOCK).map(|block| {
            simd::vectorized(
                #[inline(always)]
                || f64::from(simd::dot(block, block)),
            )
        });
        // In the order of the blocks, whichever thread was first.
        let blocks: Vec<f64> = blocks.collect();
        tensor(vec![blocks.into_iter().sum::<f64>() as f32], [1])
    }
}

/// The tensor with its elements in row-major order from the beginning of memory that nothing else sees.
fn own(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_unique() && tensor.layout().contiguous_offsets().is_some_and(|(from, _)| from == 0) {
        return contiguous(tensor);
    }
    transform(tensor, ELEMENT_BLOCK, |_, _| ())
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, TensorData};

    use crate::testing::numbers;
    use crate::{AdamW, adamw, composed, running_mean, sum_of_squares};

    fn vector(len: usize, seed: u64) -> Tensor<1> {
        Tensor::from_data(TensorData::from(numbers(len, seed).as_slice()), &Device::flex())
    }

    fn read(t: &Tensor<1>) -> Vec<f32> {
        t.to_data().try_to_vec().expect("f32")
    }

    fn assert_near(a: &Tensor<1>, b: &Tensor<1>) {
        let (a, b) = (read(a), read(b));
        assert_eq!(a.len(), b.len());
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            assert!((a - b).abs() <= 2e-6 * b.abs().max(0.1), "element {i}: {a} and {b}");
        }
    }

    const STEP: AdamW = AdamW {
        gradient_factor: 0.6,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-3,
        lr: 0.02,
        decay: 0.997,
        correction1: 0.3,
        correction2: 0.07,
    };

    #[test]
    fn equal_their_composed_definitions_at_every_length() {
        let mut cases = 0;
        // Shorter than a vector, no multiple of one, longer than a block.
        for len in [1, 13, 64, 1001, 40_000] {
            let [weight, gradient, m] = [1, 2, 3].map(|seed| vector(len, seed));
            let v = vector(len, 4).abs();
            let actual = adamw(weight.clone(), gradient.clone(), m.clone(), v.clone(), STEP);
            let expected = composed::adamw(weight.clone(), gradient.clone(), m, v, STEP);
            for (actual, expected) in actual.iter().zip(&expected) {
                assert_near(actual, expected);
                cases += 1;
            }
            assert_near(
                &running_mean(weight.clone(), gradient.clone(), 0.7),
                &composed::running_mean(weight, gradient.clone(), 0.7),
            );
            let (actual, expected) =
                (read(&sum_of_squares(&gradient))[0], read(&composed::sum_of_squares(&gradient))[0]);
            assert!((actual - expected).abs() <= 1e-5 * expected, "{actual} and {expected}");
            cases += 2;
        }
        assert_eq!(cases, 25);
    }

    #[test]
    fn what_others_see_stays_as_it_is() {
        let all = [1, 2, 3].map(|seed| vector(50, seed));
        let before = all.each_ref().map(read);
        let [weight, gradient, m] = all.clone();
        let new = adamw(weight, gradient, m.clone(), m.abs(), STEP);
        assert_ne!(read(&new[0]), before[0]);
        running_mean(all[0].clone(), all[1].clone(), 0.5);
        assert_eq!(all.each_ref().map(read), before);
        // Part of a longer tensor.
        let part = all[0].clone().narrow(0, 10, 10);
        let [half, _, _] = adamw(part, vector(10, 5), vector(10, 6), vector(10, 7).abs(), STEP);
        assert_eq!(half.dims(), [10]);
        assert_eq!(all.each_ref().map(read), before);
    }

    #[test]
    fn number_of_threads_does_not_change_the_bits() {
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| read(&sum_of_squares(&vector(100_000, 8)))[0].to_bits())
        };
        assert_eq!(with(1), with(3));
    }
}
