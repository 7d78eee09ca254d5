//! The operations on burn's CPU backend `flex`, each as one fused pass with a hand-written backward.
//!
//! [`operation`] says what an operation is (value, gradients, what the gradients need) and connects it to burn's automatic
//! differentiation; each other file is one operation on slices. All loops run on the rayon pool of the caller.
//!
//! Two rules hold for every operation:
//! * Sums that cross rows (gradients of weights, biases and gains) go through partial sums over blocks of [`ROW_BLOCK`]
//!   rows, added in the order of the blocks: the result does not depend on the number of threads.
//! * Loops that should use wide vectors run inside [`simd::vectorized`], which picks the instructions at run time.

mod attention;
mod attention_branch;
#[cfg(test)]
mod bf16_tests;
mod branch;
mod depthwise_conv;
mod feed_forward;
mod gate;
mod gelu;
mod gemm;
mod layer_norm;
mod linear;
mod memory;
mod operation;
mod product;
mod prototypes;
mod residual;
mod selected_attention;
mod simd;
mod update;
mod with_gradients;

pub(crate) use attention::{Attention, RotaryAttention};
pub(crate) use attention_branch::{AttentionBranch, RotaryAttentionBranch};
pub(crate) use depthwise_conv::DepthwiseConv;
pub(crate) use feed_forward::FeedForward;
pub(crate) use gate::FlexGates;
pub(crate) use gelu::Gelu;
pub(crate) use layer_norm::LayerNorm;
pub(crate) use linear::Linear;
pub(crate) use operation::FlexKernels;
pub(crate) use product::FlexProducts;
pub(crate) use prototypes::FlexPrototypes;
pub(crate) use residual::Residual;
pub(crate) use selected_attention::{RotarySelectedAttention, SelectedAttention};
pub(crate) use update::FlexUpdates;
pub(crate) use with_gradients::WithGradients;

use burn::backend::DispatchDevice;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Device, Shape};
use rayon::prelude::*;

/// Rows whose sum is formed by one task before the sums are added in order.
const ROW_BLOCK: usize = 128;

/// Elements that one task of an elementwise loop handles: large enough to hide the cost of a task, and within the second
/// level of cache with its operands.
const ELEMENT_BLOCK: usize = 16 * 1024;

/// Whether this is burn's CPU backend, with automatic differentiation or without.
pub(crate) fn is_flex(device: &Device) -> bool {
    match device.as_dispatch() {
        DispatchDevice::Flex(_) => true,
        DispatchDevice::Autodiff(inner) => matches!(**inner, DispatchDevice::Flex(_)),
        #[allow(unreachable_patterns, reason = "the other backends are features")]
        _ => false,
    }
}

/// Whether tensors of this device and type are computed here.
pub(crate) fn supports(device: &Device, dtype: DType) -> bool {
    is_flex(device) && dtype == DType::F32 && simd::available()
}

/// Whether plain tensors of this device and type, which no automatic differentiation follows, are computed here.
pub(crate) fn supports_plain(device: &Device, dtype: DType) -> bool {
    supports(device, dtype) && !device.is_autodiff()
}

/// The tensor with its elements in row-major order.
fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The elements of a [`contiguous`] tensor.
fn elements(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("a contiguous f32 tensor")
}

/// Calls `f(start, values, sums)` for blocks of `block` values, each with its `sum_len` sums, where `start` is the place of
/// the block's first value. One block is not worth waking another thread for.
fn for_each_block(
    values: &mut [f32],
    block: usize,
    sums: &mut [f32],
    sum_len: usize,
    f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    if values.len() <= block {
        if !values.is_empty() {
            f(0, values, sums);
        }
    } else if sum_len == 0 {
        values.par_chunks_mut(block).enumerate().for_each(|(i, values)| f(i * block, values, &mut []));
    } else {
        let blocks = values.par_chunks_mut(block).zip(sums.par_chunks_mut(sum_len)).enumerate();
        blocks.for_each(|(i, (values, sums))| f(i * block, values, sums));
    }
}

/// [`for_each_block`] of a tensor's elements: in its own memory if nothing else sees it, else in a copy made block by block.
fn transform_with(
    source: FlexTensor,
    block: usize,
    sums: &mut [f32],
    sum_len: usize,
    f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) -> FlexTensor {
    let mut source = contiguous(source);
    let (from, to) = source.layout().contiguous_offsets().expect("a contiguous tensor");
    if let Some(storage) = source.try_storage_mut::<f32>() {
        for_each_block(&mut storage[from..to], block, sums, sum_len, f);
        return source;
    }
    let shape = source.layout().shape().clone();
    let data = elements(&source);
    let mut out = vec![0.0; data.len()];
    for_each_block(&mut out, block, sums, sum_len, |start, values, sums| {
        values.copy_from_slice(&data[start..][..values.len()]);
        f(start, values, sums);
    });
    FlexTensor::new(Bytes::from_elems(out), Layout::contiguous(shape), DType::F32)
}

/// [`transform_with`] no sums.
fn transform(source: FlexTensor, block: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> FlexTensor {
    let mut source = contiguous(source);
    let (from, to) = source.layout().contiguous_offsets().expect("a contiguous tensor");
    if let Some(storage) = source.try_storage_mut::<f32>() {
        for_each_block(&mut storage[from..to], block, &mut [], 0, |start, values, _| f(start, values));
        return source;
    }
    let shape = source.layout().shape().clone();
    let out = memory::copied(elements(&source), block, f);
    FlexTensor::new(Bytes::from_elems(out), Layout::contiguous(shape), DType::F32)
}

/// A tensor of these elements.
fn tensor<const D: usize>(data: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(data), Layout::contiguous(Shape::from(shape)), DType::F32)
}

/// The two dimensions of a matrix.
fn dims2(tensor: &FlexTensor) -> [usize; 2] {
    tensor.layout().shape().dims()
}

/// Sums a `[rows, D]` matrix, or something computed from it, over its rows: `add(block, sum)` adds the rows
/// `block.start..block.end` to `sum`, of `width` elements.
fn sum_over_rows(rows: usize, width: usize, add: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync) -> Vec<f32> {
    let mut partial = vec![0.0; rows.div_ceil(ROW_BLOCK) * width];
    for_each_block(&mut partial, width.max(1), &mut [], 0, |start, sum, _| {
        let first = start / width * ROW_BLOCK;
        add(first..rows.min(first + ROW_BLOCK), sum);
    });
    in_order(&partial, width)
}

/// Adds partial sums of `width` elements in their order.
fn in_order(partial: &[f32], width: usize) -> Vec<f32> {
    let mut total = vec![0.0; width];
    if width == 0 {
        return total;
    }
    simd::vectorized(
        #[inline(always)]
        || {
            for part in partial.chunks_exact(width) {
                simd::add_assign(&mut total, part);
            }
        },
    );
    total
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, FloatDType, Tensor};

    use super::{simd, supports};
    use crate::gelu;

    #[test]
    fn f32_on_flex_is_fused_with_and_without_differentiation_and_f64_is_composed() {
        let device = Device::flex();
        let x = Tensor::<2>::from_floats([[0.5, -1.0]], &device);
        assert_eq!(supports(&device, x.dtype()), simd::available());
        assert_eq!(supports(&device.autodiff(), x.dtype()), simd::available());
        let double = x.clone().cast(FloatDType::F64);
        assert!(!supports(&double.device(), double.dtype()));
        let difference = gelu(double).cast(FloatDType::F32) - gelu(x);
        assert!(difference.abs().max().into_scalar::<f32>() < 1e-6);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn processors_with_avx2_and_fma_are_recognised() {
        let both = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
        assert_eq!(simd::available(), both);
    }
}
