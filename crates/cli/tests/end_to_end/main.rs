//! The program as its users see it: exit codes, messages, and what a run leaves behind.

mod bad_input;
mod bench;
mod convnext;
mod eval;
mod resume;
mod support;
mod train;
