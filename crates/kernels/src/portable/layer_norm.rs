//! Layer normalisation: mean and deviation of each row are computed again in the backward pass.

use burn::backend::DispatchTensor;
use burn::tensor::Tensor;

use super::operation::{Operation, ternary};
use crate::composed;

/// See [`crate::layer_norm`].
pub(crate) fn layer_norm(x: Tensor<2>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<2> {
    let inputs = [x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch()];
    Tensor::from_dispatch(ternary(inputs, LayerNorm { eps }))
}

/// Inputs `x [M, D]`, `weight [D]`, `bias [D]`.
#[derive(Clone, Copy, Debug)]
struct LayerNorm {
    eps: f64,
}

impl Operation<3> for LayerNorm {
    type Kept = (Tensor<2>, Norm);

    fn forward(&self, [x, weight, bias]: [DispatchTensor; 3], keep: bool) -> (DispatchTensor, Option<Self::Kept>) {
        let x = Tensor::from_dispatch(x);
        let norm = Norm::new(weight, bias, self.eps);
        let y = norm.forward(x.clone()).into_dispatch();
        (y, keep.then_some((x, norm)))
    }

    fn backward(&self, (x, norm): Self::Kept, grad: DispatchTensor) -> [DispatchTensor; 3] {
        norm.backward(norm.units(x), Tensor::from_dispatch(grad))
    }
}

/// Gain and offset of a norm. Plain.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    weight: Tensor<1>,
    bias: Tensor<1>,
    eps: f64,
}

impl Norm {
    pub(super) fn new(weight: DispatchTensor, bias: DispatchTensor, eps: f64) -> Self {
        Self { weight: Tensor::from_dispatch(weight), bias: Tensor::from_dispatch(bias), eps }
    }

    /// `[M, D]` → `[M, D]`.
    pub(super) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        composed::layer_norm(x, self.weight.clone(), self.bias.clone(), self.eps)
    }

    /// What the backward pass computes again of the forward pass.
    pub(super) fn units(&self, x: Tensor<2>) -> Units {
        let centered = x.clone() - x.mean_dim(1);
        let deviation = (centered.clone().powi_scalar(2).mean_dim(1) + self.eps).sqrt();
        Units { value: centered / deviation.clone(), deviation }
    }

    /// What [`forward`](Self::forward) makes of the same input, to the bit.
    pub(super) fn scaled(&self, units: &Units) -> Tensor<2> {
        units.value.clone() * self.weight.clone().unsqueeze() + self.bias.clone().unsqueeze()
    }

    /// The gradients of input, gain and offset.
    ///
    /// With `u = (x − mean)/deviation` and `a = grad·weight`, both means over a row:
    /// `dx = (a − mean(a) − u·mean(a·u))/deviation`.
    pub(super) fn backward(&self, Units { value: unit, deviation }: Units, grad: Tensor<2>) -> [DispatchTensor; 3] {
        let dbias = column_sums(grad.clone());
        let dweight = column_sums(grad.clone() * unit.clone());
        let scaled = grad * self.weight.clone().unsqueeze();
        let along = (scaled.clone() * unit.clone()).mean_dim(1);
        let dx = (scaled.clone() - scaled.mean_dim(1) - unit * along) / deviation;
        [dx.into_dispatch(), dweight.into_dispatch(), dbias.into_dispatch()]
    }
}

/// Rows of mean 0 and variance 1, `[M, D]`, and the deviation of each before, `[M, 1]`.
pub(super) struct Units {
    value: Tensor<2>,
    deviation: Tensor<2>,
}

/// `[M, D]` → `[D]`.
pub(super) fn column_sums(x: Tensor<2>) -> Tensor<1> {
    x.sum_dim(0).reshape([-1])
}

#[cfg(test)]
mod tests {
    use super::layer_norm;
    use crate::composed;
    use crate::testing::{Case, assert_same};

    #[test]
    fn equals_composed_with_every_combination_of_tracked_inputs() {
        let mut cases = 0;
        for [rows, width] in [[1, 1], [1, 13], [3, 24], [5, 77]] {
            for tracked in 0..8 {
                let tracked = [tracked & 1 > 0, tracked & 2 > 0, tracked & 4 > 0];
                assert_same(
                    &Case::new(&[&[rows, width], &[width], &[width]], &tracked),
                    |t| layer_norm(t.matrix(0), t.vector(1), t.vector(2), 1e-5),
                    |t| composed::layer_norm(t.matrix(0), t.vector(1), t.vector(2), 1e-5),
                );
                cases += 1;
            }
        }
        assert_eq!(cases, 32);
    }
}
