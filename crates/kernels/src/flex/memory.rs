//! New memory that is written once: zeroing it first, as `vec![0.0; n]` does, would cost a pass of one thread over it.

use std::mem::MaybeUninit;

use rayon::prelude::*;

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

/// [`copied`] from a source whose blocks are changed by `before(source)` first.
pub(super) fn changed_and_copied(
    source: &mut [f32],
    block: usize,
    before: impl Fn(&mut [f32]) + Sync,
    after: impl Fn(&mut [f32]) + Sync,
) -> Vec<f32> {
    write_once(source.len(), |memory| {
        let blocks = memory.par_chunks_mut(block).zip(source.par_chunks_mut(block));
        blocks.for_each(|(to, from)| {
            before(from);
            after(to.write_copy_of_slice(from));
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

/// `len` numbers that `write` writes: every one of them, as the callers do by copying a source of the same length, or by
/// filling all blocks.
fn write_once(len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    write(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is at least `len`, and `write` has written that many elements.
    #[allow(unsafe_code, reason = "the only way to hand over memory that was not zeroed")]
    unsafe {
        values.set_len(len);
    }
    values
}
