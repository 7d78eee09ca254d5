//! What a run tells whoever watches it, and how it ended.

use std::path::{Path, PathBuf};

use dinoxide_data::Rejected;
use dinoxide_evaluation::EvaluationError;

use crate::monitor::Finding;
use crate::recipe::Plan;
use crate::step::StepReport;

/// What a run tells whoever watches it.
pub enum Event<'a> {
    /// Everything is set up; the first step is next.
    Started {
        /// Lengths in steps.
        plan: &'a Plan,
        /// Parameters of the backbone.
        backbone_parameters: usize,
        /// Parameters of the heads.
        head_parameters: usize,
        /// Classes of the data; 0 when it has none.
        classes: usize,
        /// The step that the run goes on from, when it is resumed.
        resumed: Option<u64>,
        /// Whether k-NN is measured.
        monitored: bool,
    },
    /// Something about the weights that the run starts or learns from.
    Note(&'a str),
    /// A damaged checkpoint was passed over.
    DamagedCheckpoint {
        /// Where.
        path: &'a Path,
        /// What is wrong with it.
        reason: &'a str,
    },
    /// An image could not be read and was replaced by another.
    BadImage(&'a Rejected),
    /// An image could not be read and was left out of an evaluation; each is shown once.
    BadEvalImage(&'a Rejected),
    /// A step was taken.
    Step {
        /// What it did.
        report: &'a StepReport,
        /// Images per second since the last line of metrics.
        images_per_second: f64,
        /// Share of that time spent waiting for images.
        data_wait: f64,
        /// Resident memory in bytes.
        memory_bytes: u64,
        /// Whether a line of metrics was written.
        logged: bool,
    },
    /// An evaluation is at this image of so many.
    Evaluating {
        /// Images done.
        done: usize,
        /// All images.
        of: usize,
    },
    /// An evaluation is done.
    Evaluated {
        /// Steps taken.
        step: u64,
        /// What it found.
        finding: &'a Finding,
    },
    /// An evaluation after the first step failed; the run goes on.
    EvaluationFailed {
        /// Steps taken.
        step: u64,
        /// Why.
        error: &'a EvaluationError,
    },
    /// A checkpoint was written.
    Checkpoint(&'a Path),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Whether it was asked to stop before its end.
    pub interrupted: bool,
    /// Steps taken.
    pub steps: u64,
    /// Images seen.
    pub images: u64,
    /// Seconds spent training, over all sessions.
    pub seconds: f64,
    /// k-NN accuracy before training, in percent.
    pub first_knn: Option<f64>,
    /// The evaluation after the last step; `None` if it failed.
    pub last: Option<Finding>,
    /// The exported teacher.
    pub teacher: PathBuf,
    /// Highest resident memory of the process, in bytes.
    pub peak_memory_bytes: u64,
}
