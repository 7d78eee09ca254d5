//! The run directory: one configuration, one process at a time.
//!
//! ```text
//! runs/<name>/
//!   config.toml          the recipe with every value and its origin
//!   metrics.jsonl        see crate::metrics
//!   checkpoints/         see crate::checkpoint
//!   teacher.safetensors  the newest teacher backbone, with what is needed to evaluate it
//! ```

use std::fs::{File, TryLockError};
use std::path::Path;

use dinoxide_config::{Resolved, difference};
use dinoxide_model::weights::write_atomically;

use crate::checkpoint;
use crate::error::TrainError;
use crate::recipe::Recipe;

/// Creates the run directory, or checks that it is of the same configuration.
///
/// The file returned is locked, so that no other process trains here for as long as it is open.
pub(crate) fn prepare_directory(recipe: &Resolved<Recipe>, directory: &Path) -> Result<File, TrainError> {
    std::fs::create_dir_all(directory).map_err(TrainError::io(directory))?;
    let lock_path = directory.join(".lock");
    let lock = File::create(&lock_path).map_err(TrainError::io(&lock_path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let reason = "another process is training in this directory".to_owned();
            return Err(TrainError::NotResumable { path: directory.to_owned(), reason });
        }
        Err(TryLockError::Error(error)) => return Err(TrainError::io(&lock_path)(error)),
    }
    let path = directory.join("config.toml");
    if path.exists() {
        let text = std::fs::read_to_string(&path).map_err(TrainError::io(&path))?;
        let known = Resolved::<Recipe>::from_text(&path.display().to_string(), &text)
            .map_err(|e| TrainError::NotResumable { path: directory.to_owned(), reason: e.to_string() })?;
        // `[run]` and `[efficiency]` do not change results: a run may go on with other values of them.
        let mut known = known.value;
        known.run = recipe.value.run.clone();
        known.efficiency = recipe.value.efficiency.clone();
        // Where a finished run or a file lies may change; what was taken from it is in the checkpoints.
        known.init.from = recipe.value.init.from.clone();
        let differences = difference(&known, &recipe.value);
        if !differences.is_empty() {
            let differences: Vec<String> = differences.iter().map(|d| format!("  {d}")).collect();
            return Err(TrainError::OtherConfig { path: directory.to_owned(), differences: differences.join("\n") });
        }
    }
    checkpoint::remove_unfinished(directory)?;
    checkpoint::remove_unfinished(&directory.join("checkpoints"))?;
    write_atomically(&path, recipe.to_annotated_toml().as_bytes()).map_err(TrainError::io(&path))?;
    Ok(lock)
}
