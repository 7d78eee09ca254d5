//! The program as its users see it: exit codes, messages, and what a run leaves behind.

mod bad_input;
mod convnext;
mod dense;
mod eval;
mod resume;
mod support;
mod train;
