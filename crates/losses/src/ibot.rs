//! The iBOT loss: a masked patch should be assigned to prototypes as the teacher, who sees it, assigns it (iBOT eq. 2).

use burn::tensor::Tensor;
use dinoxide_kernels::Precision;

use crate::{
    Loss,
    prototypes::{Targets, cross_entropy},
};

/// A mean over masked patches within a crop, then over all `crops` of the batch, in nats. Crops without masked patches
/// count in the second mean, so with half of the crops masked the loss is about half the cross-entropy of a patch.
///
/// # Shapes
/// `bottleneck [M, b]` of the student's masked patches, `vectors [K, b]`, `targets [M, K]` plain, rows summing to 1;
/// `weights [M]` plain: one over the number of masked patches in the patch's crop.
pub fn masked_patches(
    bottleneck: Tensor<2>,
    vectors: Tensor<2>,
    targets: Tensor<2>,
    weights: Tensor<1>,
    crops: usize,
    temperature: f64,
    precision: Precision,
) -> Loss {
    let weights = weights / crops as f64;
    let targets = [Targets { probabilities: targets, mass: 1.0, weights }];
    cross_entropy(bottleneck, vectors, &targets, temperature, precision)
}
