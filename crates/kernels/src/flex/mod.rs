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
mod gelu;
mod gemm;
mod layer_norm;
mod linear;
mod operation;
mod residual;
mod simd;
#[cfg(test)]
mod testing;

pub(crate) use attention::{Attention, RotaryAttention};
pub(crate) use gelu::Gelu;
pub(crate) use layer_norm::LayerNorm;
pub(crate) use linear::Linear;
pub(crate) use operation::FlexKernels;
pub(crate) use residual::Residual;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Device, Shape, backend::DispatchDevice};
use rayon::prelude::*;

/// Rows whose sum is formed by one task before the sums are added in order.
const ROW_BLOCK: usize = 128;

/// Elements that one task of an elementwise loop handles: large enough to hide the cost of a task, and within the second
/// level of cache with its operands.
const ELEMENT_BLOCK: usize = 16 * 1024;

/// Whether tensors of this device and type are computed here.
pub(crate) fn supports(device: &Device, dtype: DType) -> bool {
    let flex = match device.as_dispatch() {
        DispatchDevice::Flex(_) => true,
        DispatchDevice::Autodiff(inner) => matches!(**inner, DispatchDevice::Flex(_)),
        #[allow(unreachable_patterns, reason = "the other backends are features")]
        _ => false,
    };
    flex && dtype == DType::F32 && simd::available()
}

/// The tensor with its elements in row-major order.
fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The elements of a [`contiguous`] tensor.
fn elements(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("a contiguous f32 tensor")
}

/// Applies `f(start, block, extra)` to blocks of `block` elements of a tensor, where `start` is the place of the block's
/// first element: in the tensor's own memory if nothing else sees it, else in a copy made block by block.
fn transform_with<E: Send>(
    source: FlexTensor,
    block: usize,
    extra: impl IndexedParallelIterator<Item = E>,
    f: impl Fn(usize, &mut [f32], E) + Sync + Send,
) -> FlexTensor {
    let mut source = contiguous(source);
    if elements(&source).is_empty() {
        return source;
    }
    let (from, to) = source.layout().contiguous_offsets().expect("a contiguous tensor");
    if let Some(storage) = source.try_storage_mut::<f32>() {
        let blocks = storage[from..to].par_chunks_mut(block).enumerate();
        blocks.zip(extra).for_each(|((i, values), extra)| f(i * block, values, extra));
        return source;
    }
    let shape = source.layout().shape().clone();
    let data = elements(&source);
    let mut out = vec![0.0; data.len()];
    let blocks = out.par_chunks_mut(block).zip(data.par_chunks(block)).enumerate();
    blocks.zip(extra).for_each(|((i, (values, source)), extra)| {
        values.copy_from_slice(source);
        f(i * block, values, extra);
    });
    FlexTensor::new(Bytes::from_elems(out), Layout::contiguous(shape), DType::F32)
}

/// [`transform_with`] nothing beside the blocks.
fn transform(source: FlexTensor, block: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) -> FlexTensor {
    let blocks = source.layout().num_elements().div_ceil(block);
    transform_with(source, block, rayon::iter::repeat_n((), blocks), |start, values, ()| f(start, values))
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
    let blocks = rows.div_ceil(ROW_BLOCK);
    let mut partial = vec![0.0; blocks * width];
    if width == 0 {
        return partial;
    }
    partial.par_chunks_mut(width).enumerate().for_each(|(i, sum)| {
        add(i * ROW_BLOCK..rows.min((i + 1) * ROW_BLOCK), sum);
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
        || partial.chunks_exact(width).for_each(|part| simd::add_assign(&mut total, part)),
    );
    total
}
