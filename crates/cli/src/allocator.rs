//! The memory allocator, and what it is told about the work.

use std::ffi::c_long;

use dinoxide_trainer::Recipe;
use libmimalloc_sys::mi_option_set_default;

/// Tensors of a step are allocated and freed by the thousand; giving their memory back to the system and asking for it
/// again costs more than the work on the small ones.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc's header, which the bindings do not name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Milliseconds for which memory that a recipe with `efficiency.recompute` frees is kept.
const SHORT: c_long = 100;

/// Keeps freed memory for the next step instead of giving it back after 10 ms: each page that comes back is zeroed by the
/// system at its first use, which was a quarter of a step. The environment variable `MIMALLOC_PURGE_DELAY`, in
/// milliseconds, overrides it.
pub(crate) fn keep_freed_memory() {
    keep_freed_memory_for(-1);
}

/// Gives freed memory back soon for a recipe that takes time to save memory. What the losses free is of other sizes than
/// what the backward pass asks for next, and would stay beside it.
pub(crate) fn follow(recipe: &Recipe) {
    if recipe.efficiency.recompute {
        keep_freed_memory_for(SHORT);
    }
}

fn keep_freed_memory_for(milliseconds: c_long) {
    // SAFETY: sets a number that mimalloc reads; -1 is the documented value for "never".
    #[allow(unsafe_code, reason = "the allocator's options have no safe interface")]
    unsafe {
        mi_option_set_default(PURGE_DELAY, milliseconds);
    }
}
