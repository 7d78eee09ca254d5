//! A scalar whose gradients are constants: no product with them is formed, and they go back in their own memory.

use burn::backend::flex::FlexTensor;

use super::operation::Branch;
use super::{ELEMENT_BLOCK, elements, simd, tensor, transform};

/// Inputs `x`, `w`, and the gradients of both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WithGradients;

impl Branch<4> for WithGradients {
    type Kept = [FlexTensor; 2];

    fn forward(&self, [_, _, dx, dw]: [FlexTensor; 4], keep: bool) -> (FlexTensor, Option<Self::Kept>) {
        (tensor(vec![0.0], [1]), keep.then_some([dx, dw]))
    }

    fn backward(&self, gradients: Self::Kept, grad: FlexTensor) -> [FlexTensor; 4] {
        let factor = elements(&grad)[0];
        let [dx, dw] = gradients.map(|gradient| {
            transform(gradient, ELEMENT_BLOCK, |_, block| {
                simd::vectorized(
                    #[inline(always)]
                    || simd::scale(block, factor),
                );
            })
        });
        // Nothing tracks the gradients: whatever stands in the place of theirs is left there.
        [dx, dw, grad.clone(), grad]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, TensorData};

    use crate::testing::{Case, assert_same, numbers, run};
    use crate::{composed, with_gradients};

    fn constants() -> [Tensor<2>; 2] {
        let matrix = |shape: [usize; 2], seed| {
            Tensor::<2>::from_data(TensorData::new(numbers(shape[0] * shape[1], seed), shape), &Device::flex())
        };
        // The second is longer than a block, and transposed.
        [matrix([3, 5], 11), matrix([5, 9001], 12).transpose()]
    }

    #[test]
    fn equals_composed_whichever_inputs_are_tracked() {
        for tracked in [[true, true], [true, false], [false, true], [false, false]] {
            let case = Case::new(&[&[3, 5], &[9001, 5]], &tracked);
            assert_same(
                &case,
                |t| with_gradients([t.matrix(0), t.matrix(1)], constants()),
                |t| composed::with_gradients([t.matrix(0), t.matrix(1)], constants()),
            );
        }
    }

    #[test]
    fn gradients_are_the_given_ones_times_that_of_the_scalar() {
        let case = Case::new(&[&[3, 5], &[9001, 5]], &[true, true]);
        let results = run(&case, |t| with_gradients([t.matrix(0), t.matrix(1)], constants()));
        let factor = numbers(1, 99)[0];
        assert_eq!(results[0], [0.0]);
        for (found, given) in results[1..].iter().zip(constants()) {
            let given = given.to_data().try_to_vec::<f32>().expect("f32");
            assert_eq!(found, &given.iter().map(|v| v * factor).collect::<Vec<_>>());
        }
    }
}
