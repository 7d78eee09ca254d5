//! `silu(gate)·value` and its gradients, one pass over plain tensors.

use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Flex, backend_extension};
use rayon::prelude::*;

use super::{ELEMENT_BLOCK, contiguous, dims2, elements, simd, tensor, transform};

/// The gate of a SwiGLU layer, on `flex` without automatic differentiation.
#[backend_extension(Flex)]
pub(crate) trait FlexGates: Backend {
    /// `gate [M, F]`, `value [M, F]` → `[M, F]`.
    fn gated(gate: FloatTensor<Self>, value: FloatTensor<Self>) -> FloatTensor<Self>;
    /// The same again, and the gradients of gate and value, given that of the result.
    fn gated_backward(
        gate: FloatTensor<Self>,
        value: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

impl FlexGates for Flex {
    fn gated(gate: FlexTensor, value: FlexTensor) -> FlexTensor {
        assert_eq!(dims2(&gate), dims2(&value), "gate and value");
        let value = contiguous(value);
        let values = elements(&value);
        transform(gate, ELEMENT_BLOCK, |start, block| {
            let values = &values[start..][..block.len()];
            simd::vectorized(
                #[inline(always)]
                || {
                    for (gate, value) in block.iter_mut().zip(values) {
                        *gate *= logistic(*gate) * value;
                    }
                },
            );
        })
    }

    fn gated_backward(gate: FlexTensor, value: FlexTensor, grad: FlexTensor) -> (FlexTensor, FlexTensor, FlexTensor) {
        let shape = dims2(&gate);
        assert_eq!([dims2(&value), dims2(&grad)], [shape; 2], "gate, value and gradient");
        let (gate, value, grad) = (contiguous(gate), contiguous(value), contiguous(grad));
        let len = shape[0] * shape[1];
        let [mut activated, mut dgate, mut dvalue] = [(); 3].map(|()| vec![0.0; len]);
        let inputs = [&gate, &value, &grad].map(|input| elements(input).par_chunks(ELEMENT_BLOCK));
        let outputs = [&mut activated, &mut dgate, &mut dvalue].map(|output| output.par_chunks_mut(ELEMENT_BLOCK));
        let ([gates, values, grads], [activated_blocks, dgates, dvalues]) = (inputs, outputs);
        gates.zip(values).zip(grads).zip(activated_blocks).zip(dgates).zip(dvalues).for_each(
            |(((((gate, value), grad), activated), dgate), dvalue)| {
                simd::vectorized(
                    #[inline(always)]
                    || {
                        for i in 0..gate.len() {
                            let (x, open) = (gate[i], logistic(gate[i]));
                            activated[i] = x * open * value[i];
                            dvalue[i] = grad[i] * (x * open);
                            // The slope of x·σ(x) is σ(x)·(1 + x·(1 − σ(x))).
                            dgate[i] = grad[i] * value[i] * (open * x.mul_add(1.0 - open, 1.0));
                        }
                    },
                );
            },
        );
        (tensor(activated, shape), tensor(dgate, shape), tensor(dvalue, shape))
    }
}

/// `1/(1 + e^−x)`.
#[inline(always)]
fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + simd::exp(-x))
}
