//! The DINO loss: a crop's CLS token should be assigned to prototypes as the teacher assigns another crop's (DINO eq. 3).

use burn::tensor::{Tensor, s};
use dinoxide_kernels::Precision;

use crate::{
    Loss,
    prototypes::{Targets, cross_entropy},
};

/// Pairs of global crops: student crop `s` against every teacher crop `t`, or every `t ≠ s` when the diagonal is ignored.
///
/// A mean over (sample, pair), in nats.
///
/// # Shapes
/// `bottleneck [S·B, b]` with crops outermost, `vectors [K, b]`, `targets [T, B, K]` plain, rows summing to 1. With
/// `ignore_diagonal`, a student crop must have a teacher crop other than its own.
pub fn global(
    bottleneck: Tensor<2>,
    vectors: Tensor<2>,
    targets: Tensor<3>,
    temperature: f64,
    ignore_diagonal: bool,
    precision: Precision,
) -> Loss {
    let [teacher_crops, batch, _] = targets.dims();
    let student_crops = bottleneck.dims()[0] / batch;
    let ignored = if ignore_diagonal { student_crops.min(teacher_crops) } else { 0 };
    let pairs = student_crops * teacher_crops - ignored;
    let groups: Vec<Targets> = (0..student_crops)
        .map(|s| summed(&targets, (0..teacher_crops).filter(|&t| !ignore_diagonal || t != s), pairs))
        .collect();
    cross_entropy(bottleneck, vectors, &groups, temperature, precision)
}

/// Local crops against all of the teacher's global crops; a mean over (sample, local crop, teacher crop), in nats.
///
/// # Shapes
/// `bottleneck [L·B, b]` with crops outermost, `vectors [K, b]`, `targets [T, B, K]` plain.
pub fn local(
    bottleneck: Tensor<2>,
    vectors: Tensor<2>,
    targets: Tensor<3>,
    temperature: f64,
    precision: Precision,
) -> Loss {
    let [teacher_crops, batch, _] = targets.dims();
    let crops = bottleneck.dims()[0] / batch;
    let group = summed(&targets, 0..teacher_crops, crops * teacher_crops);
    cross_entropy(bottleneck, vectors, &vec![group; crops], temperature, precision)
}

/// `Σ_t CE(T_t, s) = CE(Σ_t T_t, s)`: one pass over the student's logits serves all its teacher crops.
fn summed(targets: &Tensor<3>, teacher_crops: impl Iterator<Item = usize>, pairs: usize) -> Targets {
    let [_, batch, prototypes] = targets.dims();
    let mut mass = 0.0;
    let mut sum: Option<Tensor<2>> = None;
    for t in teacher_crops {
        let one = targets.clone().slice(s![t..t + 1]).reshape([batch, prototypes]);
        sum = Some(match sum {
            Some(sum) => sum + one,
            None => one,
        });
        mass += 1.0;
    }
    let probabilities = sum.expect("each student crop is paired with at least one teacher crop");
    let weights = Tensor::full([batch], 1.0 / (batch * pairs) as f64, &probabilities.device());
    Targets { probabilities, mass, weights }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use dinoxide_kernels::Precision::Fp32;

    /// With prototypes that are the unit vectors, the bottleneck is the logits.
    fn logits(rows: &[[f32; 2]]) -> (Tensor<2>, Tensor<2>) {
        let device = Device::flex();
        let values: Vec<f32> = rows.concat();
        let x = Tensor::<1>::from_data(values.as_slice(), &device).reshape([rows.len(), 2]);
        (x, Tensor::eye(2, &device))
    }

    #[test]
    fn two_crops_by_hand() {
        let targets = Tensor::<3>::from_data([[[0.9f32, 0.1]], [[0.6, 0.4]]], &Device::flex());
        let (x, w) = logits(&[[0.1, 0.0], [0.0, 0.05]]);
        let value: f32 = global(x, w, targets.clone(), 0.1, true, Fp32).value.into_scalar();
        assert!((value - 0.818669).abs() < 1e-6, "{value}");
        let (x, w) = logits(&[[0.02, 0.01]]);
        let value: f32 = local(x, w, targets, 0.1, Fp32).value.into_scalar();
        assert!((value - 0.669397).abs() < 1e-6, "{value}");
    }

    #[test]
    fn uniform_student_and_teacher_give_ln_k() {
        let device = Device::flex();
        let (batch, prototypes) = (3, 7);
        let targets = Tensor::<3>::full([2, batch, prototypes], 1.0 / prototypes as f64, &device);
        let x = Tensor::<2>::zeros([2 * batch, 4], &device);
        let w = Tensor::<2>::ones([prototypes, 4], &device);
        for ignore_diagonal in [false, true] {
            let value: f32 =
                global(x.clone(), w.clone(), targets.clone(), 0.1, ignore_diagonal, Fp32).value.into_scalar();
            assert!((value - (prototypes as f32).ln()).abs() < 1e-5, "{value}");
        }
    }
}
