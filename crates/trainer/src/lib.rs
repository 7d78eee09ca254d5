//! Training by self-distillation: the recipe, the step, the loop and the run directory.
//!
//! Read [`step::train_step`] first: it is one optimisation step on one screen. [`run::train`] is the loop around it, and
//! `running.rs` what is done between two steps.

pub mod batch;
pub mod cache;
pub mod checkpoint;
mod clock;
mod directory;
pub mod duration;
pub mod error;
mod event;
pub mod forecast;
pub mod loss;
pub mod measure;
pub mod metrics;
pub mod monitor;
pub mod network;
pub mod optimizer;
pub mod pretrained;
pub mod recipe;
pub mod run;
mod running;
mod samples;
pub mod schedule;
pub mod stages;
mod start;
pub mod step;
pub mod targets;
mod terms;
pub mod trial;

pub use error::TrainError;
pub use event::{Event, Outcome};
pub use recipe::Recipe;
pub use run::{train, train_students};
