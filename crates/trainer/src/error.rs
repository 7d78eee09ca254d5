//! Why a run could not start or go on.

use std::path::{Path, PathBuf};

use dinoxide_data::{DataError, LoaderError};
use dinoxide_evaluation::EvaluationError;

use crate::step::StepError;

/// What can go wrong with a run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A recipe whose values do not fit together.
    #[error("recipe: {0}")]
    Recipe(String),
    /// The images.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The loader.
    #[error(transparent)]
    Loader(#[from] LoaderError),
    /// A step.
    #[error(transparent)]
    Step(#[from] StepError),
    /// An evaluation.
    #[error(transparent)]
    Evaluation(#[from] EvaluationError),
    /// The file system.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint that may be whole, but that the system does not let us read.
    #[error(
        "{}: {source}\n\nhint: make it readable; to go on from the checkpoint before it, remove `{}`",
        path.display(), path.parent().unwrap_or(path).display()
    )]
    UnreadableCheckpoint {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Weights that the recipe names and that cannot be read or do not fit it.
    #[error("`{key}`: {reason}")]
    Pretrained {
        /// The recipe's key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A stage or a student of a recipe.
    #[error("{what} `{name}`: {source}")]
    Stage {
        /// Which of the two.
        what: &'static str,
        /// Its name.
        name: String,
        /// What is wrong with it.
        source: Box<TrainError>,
    },
    /// A run directory that belongs to another configuration.
    #[error(
        "{}: this run was started with another configuration\n{differences}\n\nhint: give the new run another directory \
         (`--run`), or go back to the values that it was started with",
        path.display()
    )]
    OtherConfig {
        /// The run directory.
        path: PathBuf,
        /// One line for each value that differs.
        differences: String,
    },
    /// A run directory in which nothing can be resumed.
    #[error("{}: {reason}", path.display())]
    NotResumable {
        /// The run directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl TrainError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    /// Whether the user's configuration is at fault, rather than the run.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Recipe(_) | Self::OtherConfig { .. } | Self::Pretrained { .. } => true,
            Self::Data(error) => error.is_usage(),
            Self::Stage { source, .. } => source.is_usage(),
            _ => false,
        }
    }
}
