//! The KoLeo regulariser: the Kozachenko–Leonenko estimate of entropy pushes each CLS token away from its nearest
//! neighbour in the batch (Sablayrolles et al. 2019, eq. 3; DINOv2 §4).

use burn::tensor::{Tensor, s};

use crate::{Loss, plain};

const EPS: f64 = 1e-8;

/// `−1/B Σ_i log(‖x_i − x_nn(i) + ε‖ + ε)` on normalised rows, where `nn(i)` is the row with the largest cosine to row `i`.
///
/// # Shapes
/// `features [B, D]`: CLS tokens of one crop, so that a sample's other view is not its neighbour.
///
/// # Panics
/// If there are fewer than two rows: there is no neighbour then.
pub fn koleo(features: Tensor<2>) -> Loss {
    let [batch, _] = features.dims();
    assert!(batch >= 2, "KoLeo needs at least two samples, there is {batch}");
    let length = features.clone().powi_scalar(2).sum_dim(1).sqrt().clamp_min(EPS);
    let x = features / length;
    let fixed = plain(x.clone());
    let cosines = fixed.clone().matmul(fixed.clone().transpose());
    let own = Tensor::<2>::eye(batch, &cosines.device());
    // The diagonal becomes −1, less than or equal to every cosine.
    let neighbours = (cosines * (own.clone() * -1.0 + 1.0) - own).argmax(1).reshape([batch]);
    let neighbours = if x.device().is_autodiff() {
        x.clone().select(0, Tensor::from_inner(neighbours))
    } else {
        x.clone().select(0, neighbours)
    };
    let distances = (x - neighbours + EPS).powi_scalar(2).sum_dim(1).sqrt();
    Loss::from_graph((distances + EPS).log().mean().neg())
}

/// The sum of [`koleo`] over the crops of a batch.
///
/// # Shapes
/// `features [crops·B, D]`, crops outermost.
pub fn koleo_per_crop(features: Tensor<2>, crops: usize) -> Loss {
    let batch = features.dims()[0] / crops;
    let graph = (0..crops)
        .map(|c| koleo(features.clone().slice(s![c * batch..(c + 1) * batch, ..])).graph)
        .reduce(|sum, one| sum + one)
        .expect("at least one crop");
    Loss::from_graph(graph)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn orthonormal_rows_by_hand() {
        let value: f32 = koleo(Tensor::eye(2, &Device::flex())).value.into_scalar();
        assert!((value + 0.346574).abs() < 1e-6, "{value}");
    }

    #[test]
    fn identical_rows_are_finite() {
        let device = Device::flex().autodiff();
        let x = Tensor::<2>::ones([3, 384], &device).require_grad();
        let loss = koleo(x.clone());
        let value: f32 = loss.value.into_scalar();
        assert!((value - 15.4).abs() < 0.1, "{value}");
        let gradient: f32 = x.grad(&loss.graph.backward()).expect("gradient").abs().max().into_scalar();
        assert!(gradient.is_finite());
    }

    #[test]
    fn the_gradient_moves_the_closest_pair_apart() {
        let device = Device::flex().autodiff();
        let x = Tensor::<2>::from_data([[1.0f32, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]], &device).require_grad();
        let g: Vec<f32> = x.grad(&koleo(x.clone()).graph.backward()).expect("gradient").into_data().try_to_vec().expect("f32");
        // Against the gradient the second coordinate of row 0 falls and that of row 1 rises.
        assert!(g[1] > 0.0 && g[4] < 0.0, "{g:?}");
    }
}
