//! New memory that is written once: zeroing it first, as `vec![0.0; n]` does, would cost a pass of one thread over it. And
//! numbers in half the memory, between forward and backward pass.

use std::mem::MaybeUninit;

use burn::tensor::bf16;
use rayon::prelude::*;

use super::{ELEMENT_BLOCK, simd};
use crate::Precision;

/// A copy of `source` made in parallel, block by block, each changed by `f(start, copy)` while it is in the cache.
pub(super) fn copied(source: &[f32], block: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let copy = |start: usize, to: &mut [MaybeUninit<f32>], from: &[f32]| f(start, to.write_copy_of_slice(from));
    write_once(source.len(), |memory| {
        if source.len() <= block {
            copy(0, memory, source);
        } else {
            let blocks = memory.par_chunks_mut(block).zip(source.par_chunks(block)).enumerate();
            blocks.for_each(|(i, (to, from))| copy(i * block, to, from));
        }
    })
}

/// Numbers that are kept for the backward pass: in bfloat16 where the products that make and take them are.
#[derive(Clone, Debug)]
pub(super) enum Stored {
    /// As they were.
    Single(Vec<f32>),
    /// Rounded, unless they were before.
    Half(Vec<bf16>),
}

impl Stored {
    pub(super) fn new(values: Vec<f32>, precision: Precision) -> Self {
        match precision {
            Precision::Fp32 => Self::Single(values),
            Precision::Bf16 => Self::Half(halved(&values)),
        }
    }

    pub(super) fn into_single(self) -> Vec<f32> {
        match self {
            Self::Single(values) => values,
            Self::Half(values) => widened(&values),
        }
    }
}

/// Numbers of bfloat16, rounded to.
pub(super) fn halved(values: &[f32]) -> Vec<bf16> {
    converted(
        values,
        #[inline(always)]
        |value| bf16::from_bits((simd::rounded_to_bf16(value).to_bits() >> 16) as u16),
    )
}

/// The same numbers of single precision.
pub(super) fn widened(values: &[bf16]) -> Vec<f32> {
    converted(
        values,
        #[inline(always)]
        |value| f32::from_bits(u32::from(value.to_bits()) << 16),
    )
}

/// What `convert`, which has to be inlined, makes of each number.
fn converted<A: Copy + Sync, B: Copy + Send>(source: &[A], convert: impl Fn(A) -> B + Sync) -> Vec<B> {
    write_once(source.len(), |memory| {
        memory.par_chunks_mut(ELEMENT_BLOCK).zip(source.par_chunks(ELEMENT_BLOCK)).for_each(|(to, from)| {
            simd::vectorized(
                #[inline(always)]
                || {
                    for (to, from) in to.iter_mut().zip(from) {
                        to.write(convert(*from));
                    }
                },
            );
        });
    })
}

/// `len` numbers in blocks of `block`, each zeroed by the task that then gives it to `f(state, i, block)`.
pub(super) fn zeroed<S>(
    len: usize,
    block: usize,
    state: impl Fn() -> S + Sync + Send,
    f: impl Fn(&mut S, usize, &mut [f32]) + Sync + Send,
) -> Vec<f32> {
    write_once(len, |memory| {
        memory.par_chunks_mut(block.max(1)).enumerate().for_each_init(state, |state, (i, memory)| {
            memory.fill(MaybeUninit::new(0.0));
            // SAFETY: each of its elements has been written.
            #[allow(unsafe_code, reason = "there is no safe way to fill uninitialised memory with one value")]
            f(state, i, unsafe { memory.assume_init_mut() });
        });
    })
}

/// `len` numbers that `write` writes: every one of them, as the callers do by copying or converting a source of the same length,
/// or by filling all blocks.
fn write_once<T>(len: usize, write: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    write(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is at least `len`, and `write` has written that many elements.
    #[allow(unsafe_code, reason = "the only way to hand over memory that was not zeroed")]
    unsafe {
        values.set_len(len);
    }
    values
}
