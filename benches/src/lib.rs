//! Benchmarks of the kernels and of whole backbones: see `benches/kernels.rs` and `benches/backbones.rs`. This library is empty; a package needs a target.
