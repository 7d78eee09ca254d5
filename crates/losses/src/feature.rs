//! Feature matching: the student's tokens, through a projector, should be those of a teacher that has no prototypes.
//!
//! As in knowledge distillation by regression (Romero et al. 2015, "FitNets"; Ranzinger et al. 2024, "AM-RADIO" eq. 2).

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{Loss, unit};

/// How far a student's token is from the teacher's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distance {
    /// One less the cosine of the angle between them: 0 to 2, blind to lengths.
    #[default]
    Cosine,
    /// The mean square of the differences from the teacher's token, shifted and scaled to mean 0 and variance 1.
    Mse,
}

/// The mean distance between the rows of two sets of tokens.
///
/// # Shapes
/// `student [N, D]`, tracked; `teacher [N, D]`, plain.
///
/// # Panics
/// If the shapes differ.
pub fn feature(student: Tensor<2>, teacher: Tensor<2>, distance: Distance) -> Loss {
    assert_eq!(student.dims(), teacher.dims(), "tokens of the student and of the teacher");
    let teacher = match distance {
        Distance::Cosine => unit(teacher),
        Distance::Mse => standardised(teacher),
    };
    let teacher = if student.device().is_autodiff() { Tensor::from_inner(teacher) } else { teacher };
    Loss::from_graph(match distance {
        Distance::Cosine => (unit(student) * teacher).sum_dim(1).neg().mean() + 1.0,
        Distance::Mse => (student - teacher).powi_scalar(2).mean(),
    })
}

/// Rows of mean 0 and variance 1.
fn standardised(x: Tensor<2>) -> Tensor<2> {
    let centred = x.clone() - x.mean_dim(1);
    let variance = centred.clone().powi_scalar(2).mean_dim(1);
    centred / (variance + 1e-6).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn two_tokens_by_hand() {
        let device = Device::flex();
        let student = Tensor::<2>::from_data([[3.0f32, 0.0, 4.0], [0.0, 2.0, 0.0]], &device);
        let teacher = Tensor::<2>::from_data([[2.0f32, 0.0, 0.0], [0.0, -5.0, 0.0]], &device);
        let value = |distance| feature(student.clone(), teacher.clone(), distance).value.into_scalar::<f32>();
        assert!((value(Distance::Cosine) - ((1.0 - 0.6) + 2.0) / 2.0).abs() < 1e-6);
        // Standardised, the teacher's are [√2, −1/√2, −1/√2] and [1/√2, −√2, 1/√2].
        let (a, b) = (2f32.sqrt(), 0.5f32.sqrt());
        let squares = [3.0 - a, b, 4.0 + b, -b, 2.0 + a, -b].map(|d| d * d);
        let expected = squares.iter().sum::<f32>() / 6.0;
        let found = value(Distance::Mse);
        assert!((found - expected).abs() < 1e-4, "{found} is not {expected}");
    }

    #[test]
    fn a_teacher_of_zeros_gives_a_finite_gradient() {
        let device = Device::flex().autodiff();
        for distance in [Distance::Cosine, Distance::Mse] {
            let student = Tensor::<2>::zeros([2, 3], &device).require_grad();
            let loss = feature(student.clone(), Tensor::zeros([2, 3], &Device::flex()), distance);
            let gradient = student.grad(&loss.graph.backward()).expect("gradient");
            assert!(gradient.abs().max().into_scalar::<f32>().is_finite(), "{distance:?}");
        }
    }
}
