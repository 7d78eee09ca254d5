//! Cross-entropy of a student's prototype logits against soft targets, a block of rows at a time.
//!
//! The logits `[M, K]` of a step are its largest tensors: composed from tensor operations, autodiff would keep the logits,
//! their softmax and a gradient of the same size for every row at once. Here a block of rows is projected, reduced to its
//! loss, turned into its gradient and multiplied into the two small gradients that leave the function, and then forgotten.
//! Besides the targets, no more than one block of at most [`BLOCK_ELEMENTS`] logits exists at a time.

use std::ops::Range;

use burn::tensor::{Tensor, s};
use dinoxide_kernels as kernels;
use dinoxide_kernels::Precision;

use crate::{Loss, plain};

/// Logits held at once: 64 MB in single precision.
pub const BLOCK_ELEMENTS: usize = 1 << 24;

/// Targets of consecutive rows of a student's tokens.
#[derive(Clone, Debug)]
pub struct Targets {
    /// Non-negative, plain, `[m, K]`.
    pub probabilities: Tensor<2>,
    /// What each row of them sums to: 1 for a distribution, 2 for the sum of two.
    pub mass: f64,
    /// Factor of each row's cross-entropy in the loss, plain, `[m]`.
    pub weights: Tensor<1>,
}

/// `Σ_i weight_i · −Σ_k target_ik · log softmax(x_i·Wᵀ / temperature)_k`.
///
/// # Shapes
/// `bottleneck [M, b]`, `vectors [K, b]`; the rows of `targets` in order are the rows of `bottleneck`. `precision` is that
/// of the logits and of the two products of their gradient.
///
/// # Panics
/// If the targets do not cover the rows exactly.
pub fn cross_entropy(
    bottleneck: Tensor<2>,
    vectors: Tensor<2>,
    targets: &[Targets],
    temperature: f64,
    precision: Precision,
) -> Loss {
    cross_entropy_in_blocks(bottleneck, vectors, targets, temperature, precision, BLOCK_ELEMENTS)
}

fn cross_entropy_in_blocks(
    bottleneck: Tensor<2>,
    vectors: Tensor<2>,
    targets: &[Targets],
    temperature: f64,
    precision: Precision,
    block_elements: usize,
) -> Loss {
    let [rows, _] = bottleneck.dims();
    let [prototypes, _] = vectors.dims();
    let covered: usize = targets.iter().map(|t| t.probabilities.dims()[0]).sum();
    assert_eq!(rows, covered, "{rows} rows of student tokens, targets for {covered}");
    let tracked = bottleneck.device().is_autodiff();
    let (x, w) = (plain(bottleneck.clone()), plain(vectors.clone()));

    let counts: Vec<usize> = targets.iter().map(|t| t.probabilities.dims()[0]).collect();
    let mut value = Tensor::<1>::zeros([1], &x.device());
    let mut x_gradients = Vec::new();
    let mut w_gradient: Option<Tensor<2>> = None;
    let mut first = 0;
    for pieces in blocks(&counts, (block_elements / prototypes).max(1)) {
        let count: usize = pieces.iter().map(|(_, rows)| rows.len()).sum();
        let x_block = x.clone().slice(s![first..first + count, ..]);
        first += count;
        let mut logits = vec![kernels::linear(x_block.clone(), w.clone(), None, precision)];
        if pieces.len() > 1 {
            let sizes = pieces.iter().map(|(_, rows)| rows.len()).collect();
            logits = logits.remove(0).split_with_sizes(sizes, 0);
        }
        let mut gradients = Vec::with_capacity(pieces.len());
        for ((group, rows), logits) in pieces.into_iter().zip(logits) {
            let Targets { probabilities, mass, weights } = &targets[group];
            let target = probabilities.clone().slice(s![rows.clone(), ..]);
            let weights = weights.clone().slice(s![rows]);
            let (losses, gradient) = kernels::soft_cross_entropy(logits, target, weights, *mass, temperature);
            value = value + losses.sum();
            gradients.push(gradient);
        }
        if tracked {
            let gradient = if gradients.len() == 1 { gradients.remove(0) } else { Tensor::cat(gradients, 0) };
            x_gradients.push(kernels::plain_product(gradient.clone(), w.clone(), precision));
            let partial = kernels::plain_product(gradient.transpose(), x_block, precision);
            w_gradient = Some(match w_gradient {
                Some(sum) => sum + partial,
                None => partial,
            });
        }
    }
    let graph = match w_gradient {
        Some(w_gradient) => {
            let x_gradient = if x_gradients.len() == 1 { x_gradients.remove(0) } else { Tensor::cat(x_gradients, 0) };
            kernels::with_gradients([bottleneck, vectors], [x_gradient, w_gradient])
        }
        None if tracked => (bottleneck.sum() + vectors.sum()) * 0.0,
        None => value.clone(),
    };
    Loss { value, graph }
}

/// The rows of groups of so many rows each, in order, in blocks of at most `limit`: pieces of consecutive groups. Each block
/// meets all prototypes, which takes as long for a few rows as for many.
fn blocks(counts: &[usize], limit: usize) -> Vec<Vec<(usize, Range<usize>)>> {
    let mut blocks: Vec<Vec<_>> = Vec::new();
    let mut room = 0;
    for (group, &count) in counts.iter().enumerate() {
        let mut start = 0;
        while start < count {
            if room == 0 {
                blocks.push(Vec::new());
                room = limit;
            }
            let end = (start + room).min(count);
            blocks.last_mut().expect("a block with room").push((group, start..end));
            room -= end - start;
            start = end;
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;
    use burn::tensor::{Device, activation};

    fn doubles<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
        let values = tensor.clone().into_data().try_to_vec::<f32>().expect("f32");
        values.into_iter().map(f64::from).collect()
    }

    /// The loss and its gradients by `x` and `w`, from the definition, in double precision; operands and results of products
    /// go through `round`.
    fn slow(
        [m, k, b]: [usize; 3],
        [x, w, target, weights]: [&[f64]; 4],
        temperature: f64,
        round: fn(f64) -> f64,
    ) -> (f64, Vec<f64>, Vec<f64>) {
        let sum = |count: usize, operands: &dyn Fn(usize) -> (f64, f64)| {
            round((0..count).map(operands).map(|(a, b)| round(a) * round(b)).sum())
        };
        let (mut value, mut gradient) = (0.0, vec![0.0; m * k]);
        for i in 0..m {
            let logit = |j: usize| sum(b, &|c| (x[i * b + c], w[j * b + c])) / temperature;
            let total: f64 = (0..k).map(|j| logit(j).exp()).sum();
            let mass: f64 = (0..k).map(|j| target[i * k + j]).sum();
            for j in 0..k {
                value -= weights[i] * target[i * k + j] * (logit(j) - total.ln());
                gradient[i * k + j] = weights[i] * (mass * logit(j).exp() / total - target[i * k + j]) / temperature;
            }
        }
        let gx = (0..m * b).map(|at| sum(k, &|j| (gradient[at / b * k + j], w[j * b + at % b]))).collect();
        let gw = (0..k * b).map(|at| sum(m, &|i| (gradient[i * k + at / b], x[i * b + at % b]))).collect();
        (value, gx, gw)
    }

    #[test]
    fn blocks_cover_every_row_in_order() {
        let found = blocks(&[3, 0, 2, 4], 4);
        assert_eq!(found, [vec![(0, 0..3), (2, 0..1)], vec![(2, 1..2), (3, 0..3)], vec![(3, 3..4)]]);
        assert!(blocks(&[0], 4).is_empty());
    }

    #[test]
    fn equals_the_definition_and_its_gradients_whatever_the_block() {
        let device = Device::flex().autodiff();
        let plain_device = Device::flex();
        let (m, k, b) = (7, 11, 5);
        let mut cases = 0;
        for seed in 0..20 {
            let x: Tensor<2> = noise([m, b], 4 * seed, &device).require_grad();
            let w: Tensor<2> = noise([k, b], 4 * seed + 1, &device).require_grad();
            let target = activation::softmax(noise::<2>([m, k], 4 * seed + 2, &plain_device) * 3.0, 1) * 2.0;
            let weights: Tensor<1> = noise([m], 4 * seed + 3, &plain_device) + 1.0;
            let inputs = [&doubles(&x)[..], &doubles(&w), &doubles(&target), &doubles(&weights)];
            let (expected, gx, gw) = slow([m, k, b], inputs, 0.1, |v| v);

            let halves = [0..3, 3..m].map(|rows| Targets {
                probabilities: target.clone().slice(s![rows.clone(), ..]),
                mass: 2.0,
                weights: weights.clone().slice(s![rows]),
            });
            // A row; pieces of one and of both groups; all.
            for block_elements in [1, 2 * k, 5 * k, 1000] {
                let loss = cross_entropy_in_blocks(x.clone(), w.clone(), &halves, 0.1, Precision::Fp32, block_elements);
                let value = doubles(&loss.value)[0];
                assert!((value - expected).abs() < 2e-6 * expected.abs(), "{value} is not {expected}");
                let grads = loss.graph.backward();
                for (ours, theirs) in [(x.grad(&grads), &gx), (w.grad(&grads), &gw)] {
                    // Single precision can be no closer than a part of the largest, whatever the temperature makes of it.
                    let largest = theirs.iter().fold(0.0f64, |most, v| most.max(v.abs()));
                    let ours = doubles(&ours.expect("gradient"));
                    assert_eq!(ours.len(), theirs.len());
                    for (a, e) in ours.iter().zip(theirs) {
                        assert!((a - e).abs() < 2e-6 * largest, "seed {seed}: {a} is not {e}, of up to {largest}");
                        cases += 1;
                    }
                }
            }
        }
        assert_eq!(cases, 20 * 4 * (m + k) * b);
    }

    /// To bfloat16, to the nearest and of two as near to the even one, by its bits.
    fn rounded(x: f64) -> f64 {
        let bits = (x as f32).to_bits();
        f64::from(f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000))
    }

    #[test]
    fn in_bfloat16_it_equals_the_definition_with_rounded_products() {
        let (device, plain_device) = (Device::flex().autodiff(), Device::flex());
        let (m, k, b) = (19, 31, 12);
        let x: Tensor<2> = noise([m, b], 1, &device).require_grad();
        let w: Tensor<2> = noise([k, b], 2, &device).require_grad();
        let target = activation::softmax(noise::<2>([m, k], 3, &plain_device) * 3.0, 1) * 2.0;
        let weights: Tensor<1> = noise([m], 4, &plain_device) + 1.0;
        let inputs = [&doubles(&x)[..], &doubles(&w), &doubles(&target), &doubles(&weights)];
        let targets = [Targets { probabilities: target, mass: 2.0, weights }];
        let of = |precision| {
            let loss = cross_entropy(x.clone(), w.clone(), &targets, 0.5, precision);
            let grads = loss.graph.backward();
            let [gx, gw] = [&x, &w].map(|input| doubles(&input.grad(&grads).expect("gradient")));
            (doubles(&loss.value)[0], gx, gw)
        };
        let ((value, gx, gw), single) = (of(Precision::Bf16), of(Precision::Fp32));
        let (expected, slow_gx, slow_gw) = slow([m, k, b], inputs, 0.5, rounded);
        assert!((value - expected).abs() < 2e-6 * expected.abs(), "{value} is not {expected}");
        for (ours, single, theirs) in [(gx, single.1, slow_gx), (gw, single.2, slow_gw)] {
            let largest = theirs.iter().fold(0.0f64, |most, v| most.max(v.abs()));
            let off =
                |found: &[f64]| found.iter().zip(&theirs).map(|(a, e)| (a - e).abs() / largest).collect::<Vec<_>>();
            let many = |found: &[f64]| off(found).iter().filter(|off| **off > 1e-5).count();
            // A sum in another order may fall on the other side between two numbers of bfloat16.
            assert!(off(&ours).iter().all(|off| *off < 1.0 / 128.0), "{:?}", off(&ours));
            assert!(20 * many(&ours) < ours.len(), "{} of {} are not equal", many(&ours), ours.len());
            assert!(2 * many(&single) > single.len(), "{} of {} are not rounded", many(&single), single.len());
        }
    }
}
