//! Support for tests of the whole workspace: golden fixtures, and the rule by which a result equals a reference.
//!
//! A golden fixture is what a reference implementation computed: a `<name>.json` with the hyper-parameters and tolerances,
//! and mostly a `<name>.safetensors` with inputs, weights, outputs and gradients. [`Golden`] finds the fixtures,
//! [`Fixture`] reads one, [`Check`] compares results with it, and [`Report`] collects every comparison, so that a run lists
//! all failures instead of the first.
//!
//! Nothing here is for production code: a missing tensor or an unreadable file panics with its name.

mod check;
mod fixture;
mod report;

pub use check::{Check, Tolerance};
pub use fixture::{Array, Element, Fixture, Golden};
pub use report::{FileSummary, Report};
