//! The memory allocator, and what it is told about the work.

use libmimalloc_sys::mi_option_set_default;

/// Tensors of a step are allocated and freed by the thousand; giving their memory back to the system and asking for it
/// again costs more than the work on the small ones.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc's header, which the bindings do not name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Keeps freed memory for the next step instead of giving it back after 10 ms: each page that comes back is zeroed by the
/// system at its first use, which was a quarter of a step. The environment variable `MIMALLOC_PURGE_DELAY`, in
/// milliseconds, overrides it where memory is short.
pub(crate) fn keep_freed_memory() {
    // SAFETY: sets a number that mimalloc reads; -1 is the documented value for "never".
    #[allow(unsafe_code, reason = "the allocator's options have no safe interface")]
    unsafe {
        mi_option_set_default(PURGE_DELAY, -1);
    }
}
