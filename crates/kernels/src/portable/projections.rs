//! The two linear layers of a residual branch: the first on the normalised input, the last with layer scale and residual sum.

use burn::backend::DispatchTensor;
use burn::tensor::Tensor;

use super::layer_norm::{Norm, column_sums};
use crate::precision::widened;
use crate::{Precision, times};

/// The first linear layer of a branch, on the normalised input. Plain.
#[derive(Clone, Debug)]
pub(super) struct First {
    weight: Tensor<2>,
    bias: Tensor<1>,
    precision: Precision,
}

impl First {
    pub(super) fn new(weight: DispatchTensor, bias: DispatchTensor, precision: Precision) -> Self {
        Self { weight: Tensor::from_dispatch(weight), bias: Tensor::from_dispatch(bias), precision }
    }

    /// `normalized·Wᵀ`, as the product leaves it.
    pub(super) fn forward(&self, normalized: Tensor<2>) -> Tensor<2> {
        times(self.precision.operand(normalized), self.precision.operand(self.weight.clone()).transpose())
    }

    pub(super) fn with_bias(&self, unbiased: Tensor<2>) -> Tensor<2> {
        widened(unbiased) + self.bias.clone().unsqueeze()
    }

    /// The gradients of its input, of weight and bias.
    pub(super) fn backward(&self, normalized: Tensor<2>, grad: Tensor<2>) -> (Tensor<2>, [DispatchTensor; 2]) {
        let rounded = self.precision.operand(grad.clone());
        let dweight = widened(times(rounded.clone().transpose(), self.precision.operand(normalized)));
        let dnormalized = widened(times(rounded, self.precision.operand(self.weight.clone())));
        (dnormalized, [dweight.into_dispatch(), column_sums(grad).into_dispatch()])
    }
}

/// The gradients of a norm's input, its gain and offset, and of weight and bias of each layer that takes its result, given
/// those of what the layers make of it.
pub(super) fn first_backward<const N: usize>(
    x: Tensor<2>,
    norm: &Norm,
    layers: [(First, Tensor<2>); N],
) -> ([DispatchTensor; 3], [[DispatchTensor; 2]; N]) {
    let units = norm.units(x);
    let normalized = norm.scaled(&units);
    let mut sum: Option<Tensor<2>> = None;
    let gradients = layers.map(|(layer, grad)| {
        let (dnormalized, gradients) = layer.backward(normalized.clone(), grad);
        sum = Some(match sum.take() {
            Some(sum) => sum + dnormalized,
            None => dnormalized,
        });
        gradients
    });
    (norm.backward(units, sum.expect("a layer takes what the norm makes")), gradients)
}

/// The last linear layer of a branch, with the layer scale and the residual sum. Plain.
#[derive(Clone, Debug)]
pub(super) struct Last {
    weight: Tensor<2>,
    bias: Tensor<1>,
    gamma: Tensor<1>,
    precision: Precision,
}

impl Last {
    pub(super) fn new(
        weight: DispatchTensor,
        bias: DispatchTensor,
        gamma: DispatchTensor,
        precision: Precision,
    ) -> Self {
        let (bias, gamma) = (Tensor::from_dispatch(bias), Tensor::from_dispatch(gamma));
        Self { weight: Tensor::from_dispatch(weight), bias, gamma, precision }
    }

    /// `x + γ·(input·Wᵀ + b)`.
    pub(super) fn forward(&self, x: Tensor<2>, input: Tensor<2>) -> Tensor<2> {
        let operand = |tensor| self.precision.operand(tensor);
        let branch = widened(times(operand(input), operand(self.weight.clone()).transpose()));
        x + (branch + self.bias.clone().unsqueeze()) * self.gamma.clone().unsqueeze()
    }

    /// The gradient of its input.
    pub(super) fn backward_input(&self, grad: Tensor<2>) -> Tensor<2> {
        let scaled = self.precision.operand(grad * self.gamma.clone().unsqueeze());
        widened(times(scaled, self.precision.operand(self.weight.clone())))
    }

    /// The gradients of its weight, bias and scale.
    ///
    /// The branch's own output is not needed for the gradient of its scale: with `G = gradᵀ·input`,
    /// `dγ = Σ_k W∘G + b·Σ grad`, and the weight's gradient is `γ∘G`.
    pub(super) fn backward(&self, grad: Tensor<2>, input: Tensor<2>) -> [DispatchTensor; 3] {
        let Self { weight, bias, gamma, precision } = self;
        let operand = |tensor| precision.operand(tensor);
        let outer = widened(times(operand(grad.clone()).transpose(), operand(input)));
        let sums = column_sums(grad);
        let along = (weight.clone() * outer.clone()).sum_dim(1).reshape([-1]);
        [
            (outer * gamma.clone().unsqueeze_dim(1)).into_dispatch(),
            (sums.clone() * gamma.clone()).into_dispatch(),
            (along + sums * bias.clone()).into_dispatch(),
        ]
    }
}
