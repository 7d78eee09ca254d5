//! The program as its users see it: exit codes, messages, and what a run leaves behind.

mod augmented;
mod bad_input;
mod bench;
mod convnext;
mod copies;
mod correspondence;
mod dense;
mod distillation;
mod embed;
mod eval;
mod export;
mod finetune;
mod plan;
mod protocols;
mod resume;
mod stages;
mod support;
mod train;
