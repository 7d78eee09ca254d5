//! `x + branch·gamma` in one pass. With `g` the gradient of the sum: `dx = g` (the same memory), `dbranch = g·gamma`,
//! `dgamma = Σ_rows g·branch`.

use burn::backend::flex::FlexTensor;

use super::operation::Operation;
use super::{ELEMENT_BLOCK, ROW_BLOCK, contiguous, dims2, elements, in_order, simd, tensor, transform, transform_with};

/// Inputs `x [M, D]`, `branch [M, D]` and, with `N = 3`, `gamma [D]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Residual;

impl Operation<2> for Residual {
    fn forward(&self, [x, branch]: [FlexTensor; 2]) -> FlexTensor {
        assert_eq!(dims2(&x), dims2(&branch), "residual: x and branch");
        // Into the operand that nothing else sees, if there is one.
        let (target, other) = if branch.is_unique() { (branch, x) } else { (x, branch) };
        let other = contiguous(other);
        let other = elements(&other);
        transform(target, ELEMENT_BLOCK, |start, block| {
            simd::vectorized(
                #[inline(always)]
                || simd::add_assign(block, &other[start..]),
            );
        })
    }

    fn reads(&self, _: [bool; 2]) -> [bool; 2] {
        [false; 2]
    }

    fn backward(
        &self,
        _: [Option<FlexTensor>; 2],
        grad: FlexTensor,
        [for_x, for_branch]: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        [for_x.then(|| grad.clone()), for_branch.then_some(grad)]
    }
}

impl Operation<3> for Residual {
    fn forward(&self, [x, branch, gamma]: [FlexTensor; 3]) -> FlexTensor {
        let [rows, width] = dims2(&x);
        assert_eq!([rows, width], dims2(&branch), "residual: x and branch");
        let gamma = contiguous(gamma);
        let gamma = elements(&gamma);
        assert_eq!(gamma.len(), width, "residual: gamma [{}] and x [{rows}, {width}]", gamma.len());
        let into_branch = branch.is_unique();
        let (target, other) = if into_branch { (branch, x) } else { (x, branch) };
        let other = contiguous(other);
        let other = elements(&other);
        transform(target, ROW_BLOCK * width.max(1), |start, block| {
            let others = other[start..].chunks_exact(width);
            simd::vectorized(
                #[inline(always)]
                || {
                    for (row, other) in block.chunks_exact_mut(width).zip(others.clone()) {
                        for ((a, &b), &gamma) in row.iter_mut().zip(other).zip(gamma) {
                            *a = if into_branch { a.mul_add(gamma, b) } else { b.mul_add(gamma, *a) };
                        }
                    }
                },
            );
        })
    }

    fn reads(&self, [_, branch, gamma]: [bool; 3]) -> [bool; 3] {
        [false, gamma, branch]
    }

    fn backward(
        &self,
        [_, branch, gamma]: [Option<FlexTensor>; 3],
        grad: FlexTensor,
        [for_x, for_branch, for_gamma]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [rows, width] = dims2(&grad);
        let dx = for_x.then(|| grad.clone());
        if !for_branch && !for_gamma {
            return [dx, None, None];
        }
        let (branch, gamma) = (branch.map(contiguous), gamma.map(contiguous));
        let (branch, gamma) = (branch.as_ref().map(elements), gamma.as_ref().map(elements));
        let mut partial = vec![0.0; rows.div_ceil(ROW_BLOCK) * width];
        let dbranch = transform_with(grad, ROW_BLOCK * width.max(1), &mut partial, width, |start, block, sum| {
            simd::vectorized(
                #[inline(always)]
                || {
                    if let Some(branch) = branch {
                        for (g, branch) in block.chunks_exact(width).zip(branch[start..].chunks_exact(width)) {
                            for ((sum, g), b) in sum.iter_mut().zip(g).zip(branch) {
                                *sum = g.mul_add(*b, *sum);
                            }
                        }
                    }
                    if let Some(gamma) = gamma {
                        for g in block.chunks_exact_mut(width) {
                            for (g, gamma) in g.iter_mut().zip(gamma) {
                                *g *= gamma;
                            }
                        }
                    }
                },
            );
        });
        let dgamma = for_gamma.then(|| tensor(in_order(&partial, width), [width]));
        [dx, for_branch.then_some(dbranch), dgamma]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use crate::testing::{Case, assert_same};
    use crate::{composed, residual};

    #[test]
    fn equals_composed_with_every_combination_of_tracked_inputs() {
        let mut cases = 0;
        for [rows, width] in [[1, 1], [1, 13], [6, 24], [300, 40]] {
            for tracked in 0..8 {
                let tracked = [tracked & 1 > 0, tracked & 2 > 0, tracked & 4 > 0];
                let case = Case::new(&[&[rows, width], &[rows, width], &[width]], &tracked);
                assert_same(
                    &case,
                    |t| residual(t.matrix(0), t.matrix(1), Some(t.vector(2))),
                    |t| composed::residual(t.matrix(0), t.matrix(1), Some(t.vector(2))),
                );
                cases += 1;
            }
            for tracked in [[true, true], [true, false], [false, true], [false, false]] {
                let case = Case::new(&[&[rows, width], &[rows, width]], &tracked);
                assert_same(
                    &case,
                    |t| residual(t.matrix(0), t.matrix(1), None),
                    |t| composed::residual(t.matrix(0), t.matrix(1), None),
                );
                cases += 1;
            }
        }
        assert_eq!(cases, 4 * 12);
    }

    #[test]
    fn sum_of_a_tensor_with_itself_adds_both_gradients() {
        let case = Case::new(&[&[5, 13], &[13]], &[true; 2]);
        assert_same(
            &case,
            |t| residual(t.matrix(0), t.matrix(0), Some(t.vector(1))),
            |t| composed::residual(t.matrix(0), t.matrix(0), Some(t.vector(1))),
        );
    }

    #[test]
    fn operands_that_others_see_are_left_as_they_are() {
        let device = Device::flex();
        let x = Tensor::<2>::from_floats([[1.0, 2.0], [3.0, 4.0]], &device);
        let branch = Tensor::<2>::from_floats([[10.0, 20.0], [30.0, 40.0]], &device);
        let gamma = Tensor::<1>::from_floats([0.5, 2.0], &device);
        let sum = [6.0, 42.0, 18.0, 84.0];
        let read = |t: &Tensor<2>| t.to_data().try_to_vec::<f32>().unwrap();
        assert_eq!(read(&residual(x.clone(), branch.clone(), Some(gamma.clone()))), sum);
        assert_eq!((read(&x), read(&branch)), (vec![1.0, 2.0, 3.0, 4.0], vec![10.0, 20.0, 30.0, 40.0]));
        // Overwriting the branch, then x.
        assert_eq!(read(&residual(x.clone(), branch.clone() * 1.0, Some(gamma.clone()))), sum);
        assert_eq!(read(&residual(x * 1.0, branch.clone(), Some(gamma))), sum);
        assert_eq!(read(&branch), [10.0, 20.0, 30.0, 40.0]);
    }
}
