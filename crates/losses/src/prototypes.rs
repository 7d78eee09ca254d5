//! Cross-entropy of a student's prototype logits against soft targets, a block of rows at a time.
//!
//! The logits `[M, K]` of a step are its largest tensors: composed from tensor operations, autodiff would keep the logits,
//! their softmax and a gradient of the same size for every row at once. Here a block of rows is projected, reduced to its
//! loss, turned into its gradient and multiplied into the two small gradients that leave the function, and then forgotten.
//! Besides the targets, no more than one block of at most [`BLOCK_ELEMENTS`] logits exists at a time.

use burn::tensor::{Tensor, s};
use dinoxide_kernels as kernels;

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
/// `bottleneck [M, b]`, `vectors [K, b]`; the rows of `targets` in order are the rows of `bottleneck`.
///
/// # Panics
/// If the targets do not cover the rows exactly.
pub fn cross_entropy(bottleneck: Tensor<2>, vectors: Tensor<2>, targets: &[Targets], temperature: f64) -> Loss {
    cross_entropy_in_blocks(bottleneck, vectors, targets, temperature, BLOCK_ELEMENTS)
}

fn cross_entropy_in_blocks(
    bottleneck: Tensor<2>,
    vectors: Tensor<2>,
    targets: &[Targets],
    temperature: f64,
    block_elements: usize,
) -> Loss {
    let [rows, _] = bottleneck.dims();
    let [prototypes, _] = vectors.dims();
    let covered: usize = targets.iter().map(|t| t.probabilities.dims()[0]).sum();
    assert_eq!(rows, covered, "{rows} rows of student tokens, targets for {covered}");
    let tracked = bottleneck.device().is_autodiff();
    let (x, w) = (plain(bottleneck.clone()), plain(vectors.clone()));

    let block = (block_elements / prototypes).max(1);
    let mut value = Tensor::<1>::zeros([1], &x.device());
    let mut x_gradients = Vec::new();
    let mut w_gradient: Option<Tensor<2>> = None;
    let mut first = 0;
    for group in targets {
        let count = group.probabilities.dims()[0];
        for start in (0..count).step_by(block) {
            let end = (start + block).min(count);
            let x_block = x.clone().slice(s![first + start..first + end, ..]);
            let target = group.probabilities.clone().slice(s![start..end, ..]);
            let weights = group.weights.clone().slice(s![start..end]);

            let logits = kernels::linear(x_block.clone(), w.clone(), None);
            let (losses, gradient) = kernels::soft_cross_entropy(logits, target, weights, group.mass, temperature);
            value = value + losses.sum();
            if tracked {
                x_gradients.push(gradient.clone().matmul(w.clone()));
                let partial = gradient.transpose().matmul(x_block);
                w_gradient = Some(match w_gradient {
                    Some(sum) => sum + partial,
                    None => partial,
                });
            }
        }
        first += count;
    }
    let graph = match w_gradient {
        // The gradients are constants of this scalar, so its own gradient is them.
        Some(w_gradient) => {
            (bottleneck * Tensor::from_inner(Tensor::cat(x_gradients, 0))).sum()
                + (vectors * Tensor::from_inner(w_gradient)).sum()
        }
        None if tracked => (bottleneck.sum() + vectors.sum()) * 0.0,
        None => value.clone(),
    };
    Loss { value, graph }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution, activation};

    #[test]
    fn equals_the_composed_loss_and_its_gradients_whatever_the_block() {
        let device = Device::flex().autodiff();
        let plain_device = Device::flex();
        let (m, k, b) = (7, 11, 5);
        let x = Tensor::<2>::random([m, b], Distribution::Default, &device).require_grad();
        let w = Tensor::<2>::random([k, b], Distribution::Default, &device).require_grad();
        let target = activation::softmax(Tensor::<2>::random([m, k], Distribution::Default, &plain_device), 1) * 2.0;
        let weights = Tensor::<1>::random([m], Distribution::Default, &plain_device);
        let log_p = activation::log_softmax(x.clone().matmul(w.clone().transpose()) / 0.1, 1);
        let rows = (log_p * Tensor::from_inner(target.clone())).sum_dim(1).neg();
        let expected = (rows * Tensor::from_inner(weights.clone().reshape([m, 1]))).sum();
        let expected_value: f32 = expected.clone().into_scalar();
        let grads = expected.backward();
        let (gx, gw) = (x.grad(&grads).expect("gradient"), w.grad(&grads).expect("gradient"));

        let halves = [
            Targets {
                probabilities: target.clone().slice(s![0..3, ..]),
                mass: 2.0,
                weights: weights.clone().slice(s![0..3]),
            },
            Targets { probabilities: target.slice(s![3..7, ..]), mass: 2.0, weights: weights.slice(s![3..7]) },
        ];
        for block_elements in [1, 2 * k, 1000] {
            let loss = cross_entropy_in_blocks(x.clone(), w.clone(), &halves, 0.1, block_elements);
            let value: f32 = loss.value.into_scalar();
            assert!((value - expected_value).abs() < 1e-5 * expected_value.abs(), "{value} is not {expected_value}");
            let grads = loss.graph.backward();
            for (ours, theirs) in [(x.grad(&grads), &gx), (w.grad(&grads), &gw)] {
                let off: f32 = (ours.expect("gradient") - theirs.clone()).abs().max().into_scalar();
                assert!(off < 1e-5, "gradient is off by {off}");
            }
        }
    }
}
