//! The KoLeo regulariser: the Kozachenko–Leonenko estimate of entropy pushes each CLS token away from its nearest
//! neighbour in the batch (Sablayrolles et al. 2019, eq. 3; DINOv2 §4).

use burn::tensor::{Int, Tensor, s};

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
    koleo_in_groups(features, 1, batch)
}

/// [`koleo`] with the `nearest` rows as neighbours of each row, in place of one, among the rows of its group: groups are
/// `group` consecutive rows. A mean over (row, neighbour).
///
/// Groups bound the neighbourhood when the batch is large (DINOv3 uses groups of 16 at high resolution).
///
/// # Shapes
/// `features [B, D]`, with `B` a multiple of `group`.
///
/// # Panics
/// If the rows do not make up whole groups, or a group has no more than `nearest` rows.
pub fn koleo_in_groups(features: Tensor<2>, nearest: usize, group: usize) -> Loss {
    let [batch, dim] = features.dims();
    assert!(group >= 2 && batch.is_multiple_of(group), "KoLeo in groups of {group} samples, there are {batch}");
    assert!((1..group).contains(&nearest), "KoLeo with {nearest} neighbours in groups of {group} samples");
    let groups = batch / group;
    let length = features.clone().powi_scalar(2).sum_dim(1).sqrt().clamp_min(EPS);
    let x = features / length;
    let fixed = plain(x.clone()).reshape([groups, group, dim]);
    let cosines = fixed.clone().matmul(fixed.transpose());
    let own = Tensor::<2>::eye(group, &cosines.device()).unsqueeze::<3>();
    // The diagonal becomes −2, less than every cosine, rounding included.
    let neighbours = (cosines * (own.clone() * -1.0 + 1.0) - own * 2.0).argtopk(nearest, 2);
    let first = Tensor::<1, Int>::arange(0..groups as i64, &neighbours.device()) * group as i64;
    let neighbours = (neighbours + first.reshape([groups, 1, 1])).reshape([batch * nearest]);
    let neighbours = if x.device().is_autodiff() { Tensor::from_inner(neighbours) } else { neighbours };
    let neighbours = x.clone().select(0, neighbours).reshape([batch, nearest, dim]);
    let distances = (x.reshape([batch, 1, dim]) - neighbours + EPS).powi_scalar(2).sum_dim(2).sqrt();
    Loss::from_graph((distances + EPS).log().mean().neg())
}

/// The sum of [`koleo_in_groups`] over the crops of a batch; a `group` of 0 is the whole batch.
///
/// # Shapes
/// `features [crops·B, D]`, crops outermost.
///
/// # Panics
/// As [`koleo_in_groups`].
pub fn koleo_per_crop(features: Tensor<2>, crops: usize, nearest: usize, group: usize) -> Loss {
    let batch = features.dims()[0] / crops;
    let group = if group == 0 { batch } else { group };
    let of = |c: usize| features.clone().slice(s![c * batch..(c + 1) * batch, ..]);
    let graph = (0..crops)
        .map(|c| koleo_in_groups(of(c), nearest, group).graph)
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
        let g: Vec<f32> =
            x.grad(&koleo(x.clone()).graph.backward()).expect("gradient").into_data().try_to_vec().expect("f32");
        // Against the gradient the second coordinate of row 0 falls and that of row 1 rises.
        assert!(g[1] > 0.0 && g[4] < 0.0, "{g:?}");
    }

    #[test]
    fn neighbours_are_of_the_same_group_and_as_many_as_asked_for() {
        let device = Device::flex();
        // Four directions in the plane, at 0°, 30°, 40° and 90°: the nearest of 30° is 40° in the batch, 0° in its pair.
        let x: Vec<[f32; 2]> = [0.0f32, 30.0, 40.0, 90.0].iter().map(|a| a.to_radians().sin_cos().into()).collect();
        let x = Tensor::<2>::from_data([x[0], x[1], x[2], x[3]], &device);
        let chord = |degrees: f64| (2.0 * (degrees.to_radians() / 2.0).sin()).ln();
        let mut cases = 0;
        for (nearest, group, expected) in [
            (1, 4, (chord(30.0) + 2.0 * chord(10.0) + chord(50.0)) / 4.0),
            (1, 2, (2.0 * chord(30.0) + 2.0 * chord(50.0)) / 4.0),
            (2, 4, (2.0 * chord(30.0) + chord(40.0) * 2.0 + 2.0 * chord(10.0) + chord(50.0) + chord(60.0)) / 8.0),
        ] {
            let value: f32 = koleo_in_groups(x.clone(), nearest, group).value.into_scalar();
            assert!((f64::from(value) + expected).abs() < 1e-5, "{nearest} of {group}: {value} is not {}", -expected);
            cases += 1;
        }
        assert_eq!(cases, 3);
    }
}
