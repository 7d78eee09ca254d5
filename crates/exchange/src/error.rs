//! What can be wrong with weights that come or go.

use std::path::{Path, PathBuf};

use dinoxide_model::Mismatch;
use dinoxide_model::weights::AssemblyError;

/// Why weights could not be loaded or exported.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The file system.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not a file that can be read, or not one of a backbone.
    #[error("{}: {reason}", path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Tensors that do not make up a backbone.
    #[error("{}: {source}", path.display())]
    Assembly {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: AssemblyError,
    },
    /// Weights that are not those that were written.
    #[error(
        "{}: {source}\n\nhint: the file was damaged or changed after it was written; take the original, or export it again",
        path.display()
    )]
    Fingerprint {
        /// The file or folder.
        path: PathBuf,
        /// What differs.
        source: Mismatch,
    },
    /// A backbone that a format has no words for.
    #[error("export to {format}: {reason}")]
    Inexpressible {
        /// The format.
        format: &'static str,
        /// What it cannot express.
        reason: String,
    },
    /// A folder with no weights in it.
    #[error(
        "{}: a folder without `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin` or `teacher.safetensors`",
        folder.display()
    )]
    NoWeights {
        /// The folder.
        folder: PathBuf,
    },
    /// An output that is in the way.
    #[error("{}: {reason}\n\nhint: give another `--output`", path.display())]
    Output {
        /// The file or folder.
        path: PathBuf,
        /// Why it cannot be written there.
        reason: String,
    },
}

impl ExchangeError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn unreadable(path: &Path, reason: impl Into<String>) -> Self {
        Self::Unreadable { path: path.to_owned(), reason: reason.into() }
    }

    /// Whether the request is at fault, rather than a file: a path that leads nowhere, an output that cannot be.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            Self::Inexpressible { .. } | Self::Output { .. } | Self::NoWeights { .. } => true,
            Self::Unreadable { .. } | Self::Assembly { .. } | Self::Fingerprint { .. } => false,
        }
    }
}
