//! Gram anchoring: the similarities between a student's patch tokens should stay those of an earlier teacher's, while the
//! tokens themselves are free to move (DINOv3 §4.1, eq. 2).
//!
//! A Gram matrix has as many entries as there are pairs of patches. As in [`prototypes`](crate::prototypes), a block of it is
//! computed, reduced to its loss and its gradient, and forgotten, instead of being kept for autodiff.

use burn::tensor::{Tensor, s};
use serde::{Deserialize, Serialize};

use crate::{Loss, plain, prototypes::BLOCK_ELEMENTS, unit};

/// What happens to negative similarities before they are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Negatives {
    /// They are compared as they are.
    #[default]
    Keep,
    /// They count as zero, the student's and the teacher's.
    Remove,
    /// The teacher's count as zero, and there the student's too.
    RemoveWhereTeacher,
    /// The teacher's count as zero, the student's are kept: what DINOv3's code does under the name
    /// `remove_only_teacher_neg`, because it looks for the teacher's negatives after having removed them.
    RemoveTeacher,
}

/// `mean((X_s·X_sᵀ − X_t·X_tᵀ)²)` over all entries of the Gram matrices, where `X` are tokens of length 1 if `normalize`.
///
/// Similarities are between tokens of one entry of the leading axis. An entry per image compares patches within an image;
/// one entry with all patches of the batch, or with selected rows of them, compares them across images.
///
/// # Shapes
/// `student [G, P, D]`; `teacher [G, P, D']`, plain.
///
/// # Panics
/// If there is not a teacher's token for each of the student's.
pub fn gram(student: Tensor<3>, teacher: Tensor<3>, normalize: bool, negatives: Negatives) -> Loss {
    gram_in_blocks(student, teacher, normalize, negatives, BLOCK_ELEMENTS)
}

fn gram_in_blocks(
    student: Tensor<3>,
    teacher: Tensor<3>,
    normalize: bool,
    negatives: Negatives,
    block_elements: usize,
) -> Loss {
    let [groups, tokens, _] = student.dims();
    assert_eq!([groups, tokens], teacher.dims()[..2], "groups and tokens of the student and of the teacher");
    let tracked = student.device().is_autodiff();
    let (student, teacher) = if normalize { (unit(student), unit(teacher)) } else { (student, teacher) };
    let x = plain(student.clone());

    let entries = (groups * tokens * tokens) as f64;
    let groups_at_once = (block_elements / (tokens * tokens).max(1)).max(1);
    let rows_at_once = (block_elements / tokens.max(1)).max(1);
    let mut value = Tensor::<1>::zeros([1], &x.device());
    let mut gradients = Vec::new();
    for group in (0..groups).step_by(groups_at_once) {
        let of = group..(group + groups_at_once).min(groups);
        let (x, y) = (x.clone().slice(s![of.clone()]), teacher.clone().slice(s![of]));
        let mut rows = Vec::new();
        for row in (0..tokens).step_by(rows_at_once) {
            let of = row..(row + rows_at_once).min(tokens);
            let similarities = |x: &Tensor<3>| x.clone().slice(s![.., of.clone()]).matmul(x.clone().swap_dims(1, 2));
            let (difference, pull) = compare(similarities(&x), similarities(&y), negatives);
            value = value + difference.powi_scalar(2).sum() / entries;
            if tracked {
                // Both factors of a similarity are the student's, hence 4 and not 2.
                rows.push(pull.matmul(x.clone()) * (4.0 / entries));
            }
        }
        if tracked {
            gradients.push(Tensor::cat(rows, 1));
        }
    }
    let graph = match gradients.is_empty() {
        // The gradients are constants of this scalar, so its own gradient is them.
        false => (student * Tensor::from_inner(Tensor::cat(gradients, 0))).sum(),
        true if tracked => student.sum() * 0.0,
        true => value.clone(),
    };
    Loss { value, graph }
}

/// The difference of two blocks of similarities, and the part of it that depends on the student.
fn compare(student: Tensor<3>, teacher: Tensor<3>, negatives: Negatives) -> (Tensor<3>, Tensor<3>) {
    let negative = |similarities: &Tensor<3>| similarities.clone().lower_elem(0.0);
    let removed = match negatives {
        Negatives::Keep | Negatives::RemoveTeacher => None,
        Negatives::Remove => Some(negative(&student)),
        Negatives::RemoveWhereTeacher => Some(negative(&student).bool_and(negative(&teacher))),
    };
    let teacher = match negatives {
        Negatives::Keep => teacher,
        _ => teacher.clone().mask_fill(negative(&teacher), 0.0),
    };
    match removed {
        None => {
            let difference = student - teacher;
            (difference.clone(), difference)
        }
        Some(removed) => {
            let difference = student.mask_fill(removed.clone(), 0.0) - teacher;
            (difference.clone(), difference.mask_fill(removed, 0.0))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;
    use burn::tensor::Device;

    const ALL: [Negatives; 4] =
        [Negatives::Keep, Negatives::Remove, Negatives::RemoveWhereTeacher, Negatives::RemoveTeacher];

    #[test]
    fn two_tokens_by_hand() {
        let device = Device::flex();
        // Similarities 1, −1 of the student and 4, −2 of the teacher, on and off the diagonal.
        let student = Tensor::<3>::from_data([[[1.0f32, 0.0], [-1.0, 0.0]]], &device);
        let teacher = Tensor::<3>::from_data([[[2.0f32, 0.0, 0.0], [-1.0, 3f32.sqrt(), 0.0]]], &device);
        let expected = [(9.0 + 1.0) / 2.0, 9.0 / 2.0, 9.0 / 2.0, (9.0 + 1.0) / 2.0];
        for (negatives, expected) in ALL.into_iter().zip(expected) {
            let value: f32 = gram(student.clone(), teacher.clone(), false, negatives).value.into_scalar();
            assert!((value - expected).abs() < 1e-5, "{negatives:?}: {value} is not {expected}");
        }
        // Normalised, the teacher's are 1 and −1/2.
        let expected = [0.25 / 2.0, 0.0, 0.0, 1.0 / 2.0];
        for (negatives, expected) in ALL.into_iter().zip(expected) {
            let value: f32 = gram(student.clone(), teacher.clone(), true, negatives).value.into_scalar();
            assert!((value - expected).abs() < 1e-6, "{negatives:?}: {value} is not {expected}");
        }
    }

    #[test]
    fn gradients_are_those_of_autodiff_whatever_the_block() {
        let device = Device::flex().autodiff();
        let (groups, tokens, dim) = (3, 5, 4);
        let x = noise([groups, tokens, dim], 1, &device).require_grad();
        let y = noise([groups, tokens, dim + 2], 2, &Device::flex());
        let mut cases = 0;
        for normalize in [false, true] {
            for negatives in ALL {
                let unit_of = |x: Tensor<3>| if normalize { unit(x) } else { x };
                let gram_of = |x: Tensor<3>| x.clone().matmul(x.swap_dims(1, 2));
                let (s, t) = (gram_of(unit_of(x.clone())), gram_of(unit_of(Tensor::from_inner(y.clone()))));
                let expected = compare(s, t, negatives).0.powi_scalar(2).mean();
                let wanted: f32 = expected.clone().into_scalar();
                let wanted_gradient = x.grad(&expected.backward()).expect("gradient");
                for block_elements in [1, 2 * tokens, tokens * tokens, 2 * tokens * tokens, 10_000] {
                    let loss = gram_in_blocks(x.clone(), y.clone(), normalize, negatives, block_elements);
                    let value: f32 = loss.value.into_scalar();
                    assert!((value - wanted).abs() < 1e-5 * wanted, "{value} is not {wanted}");
                    let found = x.grad(&loss.graph.backward()).expect("gradient");
                    let off: f32 = (found - wanted_gradient.clone()).abs().max().into_scalar();
                    assert!(off < 1e-5, "{negatives:?}, blocks of {block_elements}: gradient is off by {off}");
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, 2 * 4 * 5);
    }

    #[test]
    fn a_turn_of_all_tokens_costs_nothing() {
        let device = Device::flex();
        let x = noise([2, 6, 2], 3, &device);
        let turn = Tensor::<2>::from_data([[0.6f32, 0.8], [-0.8, 0.6]], &device).unsqueeze::<3>();
        let value: f32 = gram(x.clone(), x.matmul(turn), false, Negatives::Keep).value.into_scalar();
        assert!(value < 1e-10, "{value}");
    }

    #[test]
    fn a_token_of_zeros_is_finite() {
        let device = Device::flex().autodiff();
        let x = Tensor::<3>::from_data([[[0.0f32, 0.0], [1.0, 2.0]]], &device).require_grad();
        let loss = gram(x.clone(), Tensor::ones([1, 2, 3], &Device::flex()), true, Negatives::Keep);
        let largest: f32 = x.grad(&loss.graph.backward()).expect("gradient").abs().max().into_scalar();
        assert!(largest.is_finite());
    }
}
