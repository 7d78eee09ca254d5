//! Weights in and out: fixtures that other libraries wrote, round trips through every format, and what must be refused.

mod coverage;
mod fixtures;
mod round_trips;
#[path = "../support/mod.rs"]
mod support;
