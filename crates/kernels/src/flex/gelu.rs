//! The exact GELU, `x·Φ(x)`, with derivative `Φ(x) + x·φ(x)` computed again from the input.

use burn::backend::flex::FlexTensor;

use super::operation::Operation;
use super::{ELEMENT_BLOCK, contiguous, elements, simd, transform};

/// Input `x` of any shape.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gelu;

impl Operation<1> for Gelu {
    fn forward(&self, [x]: [FlexTensor; 1]) -> FlexTensor {
        transform(x, ELEMENT_BLOCK, |_, block| {
            simd::vectorized(
                #[inline(always)]
                || {
                    for x in block.iter_mut() {
                        *x *= simd::normal_cdf(*x);
                    }
                },
            );
        })
    }

    fn reads(&self, _: [bool; 1]) -> [bool; 1] {
        [true]
    }

    fn backward(&self, [x]: [Option<FlexTensor>; 1], grad: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let x = contiguous(x.expect("x is kept"));
        let x = elements(&x);
        let dx = transform(grad, ELEMENT_BLOCK, |start, block| {
            simd::vectorized(
                #[inline(always)]
                || {
                    for (g, &x) in block.iter_mut().zip(&x[start..]) {
                        *g *= x.mul_add(simd::normal_density(x), simd::normal_cdf(x));
                    }
                },
            );
        });
        [Some(dx)]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use crate::testing::{Case, assert_same};
    use crate::{composed, gelu};

    #[test]
    fn equals_composed() {
        let mut cases = 0;
        // The last is longer than one block of the loop.
        for [rows, width] in [[1, 1], [3, 13], [2, 24], [37, 1001]] {
            for tracked in [true, false] {
                for scale in [1.0, 6.0] {
                    let case = Case::new(&[&[rows, width]], &[tracked]).scaled(scale);
                    assert_same(&case, |t| gelu(t.matrix(0)), |t| composed::gelu(t.matrix(0)));
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, 16);
    }

    #[test]
    fn transposed_input_is_read_in_its_own_order() {
        let case = Case::new(&[&[3, 13]], &[true]);
        assert_same(&case, |t| gelu(t.matrix(0).transpose()), |t| composed::gelu(t.matrix(0).transpose()));
    }

    #[test]
    fn only_an_input_that_nothing_else_sees_is_overwritten() {
        let x = Tensor::<2>::from_floats([[1.0, -2.0, 0.0]], &Device::flex());
        let shared = gelu(x.clone()).to_data();
        assert_eq!(x.to_data().try_to_vec::<f32>().unwrap(), [1.0, -2.0, 0.0]);
        assert_eq!(gelu(x).to_data(), shared);
    }

    #[test]
    fn not_a_number_stays_and_infinities_have_their_limits() {
        let x = Tensor::<2>::from_floats([[f32::NAN, f32::INFINITY, 1e30, -1e30]], &Device::flex());
        let y = gelu(x).to_data().try_to_vec::<f32>().unwrap();
        assert!(y[0].is_nan());
        assert_eq!(y[1..], [f32::INFINITY, 1e30, 0.0]);
    }
}
