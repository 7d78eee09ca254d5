//! Benchmarks of the kernels: see `benches/kernels.rs`. This library is empty; a package needs a target.
