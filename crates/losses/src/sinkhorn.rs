//! Sinkhorn–Knopp centering: targets that use all prototypes equally (SwAV, Caron et al. 2020, §3.1; DINOv2 §4).

use burn::tensor::Tensor;
use dinoxide_kernels as kernels;

/// Targets from teacher logits: `exp(logits / temperature)` scaled so that, alternately, prototypes have equal mass and
/// samples sum to 1, ending with the samples.
///
/// # Shapes
/// `logits [B, K]`, plain, single precision → `[B, K]`, rows sum to 1.
pub fn sinkhorn_knopp(logits: Tensor<2>, temperature: f64, iterations: usize) -> Tensor<2> {
    if logits.dims()[0] == 0 {
        return logits;
    }
    kernels::sinkhorn(logits, temperature, iterations)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;
    use burn::tensor::Device;

    fn check(logits: Tensor<2>, temperature: f64, expected: &[f32]) {
        let found: Vec<f32> = sinkhorn_knopp(logits, temperature, 3).into_data().try_to_vec().expect("f32");
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 2e-6, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn three_iterations_by_hand() {
        let device = Device::flex();
        check(
            Tensor::from_data([[1.0f32, 0.0], [0.5, 0.5], [0.0, 2.0]], &device),
            1.0,
            &[0.785907, 0.214093, 0.574546, 0.425454, 0.154521, 0.845479],
        );
        check(
            Tensor::from_data([[0.3f32, 0.1, 0.0], [0.0, 0.2, 0.1], [0.1, 0.1, 0.4], [0.2, 0.0, 0.2]], &device),
            0.07,
            &[
                0.803952, 0.189992, 0.006057, 0.013346, 0.956172, 0.030482, 0.022280, 0.091678, 0.886042, 0.560638,
                0.132491, 0.306871,
            ],
        );
    }

    #[test]
    fn rows_sum_to_one_and_prototypes_have_equal_mass_in_the_limit() {
        let logits = noise([24, 5], 1, &Device::flex());
        let q = sinkhorn_knopp(logits, 0.1, 200);
        for row in q.clone().sum_dim(1).into_data().try_to_vec::<f32>().expect("f32") {
            assert!((row - 1.0).abs() < 1e-5);
        }
        for column in q.sum_dim(0).into_data().try_to_vec::<f32>().expect("f32") {
            assert!((column - 24.0 / 5.0).abs() < 1e-2, "{column}");
        }
    }

    #[test]
    fn logits_far_beyond_the_range_of_exp_stay_finite() {
        let logits = Tensor::<2>::from_data([[40.0f32, -3.0, 0.0], [-40.0, 5.0, 1.0]], &Device::flex());
        for value in sinkhorn_knopp(logits, 0.04, 3).into_data().try_to_vec::<f32>().expect("f32") {
            assert!(value.is_finite());
        }
    }

    #[test]
    fn a_constant_added_to_all_logits_changes_nothing() {
        let logits = noise([6, 9], 2, &Device::flex());
        let shifted = sinkhorn_knopp(logits.clone() + 2.5, 0.07, 3);
        let off: f32 = (sinkhorn_knopp(logits, 0.07, 3) - shifted).abs().max().into_scalar();
        assert!(off < 1e-5, "{off}");
    }
}
