//! Several runs in one recipe: each stage is the recipe with some values changed, and goes on where the one before it
//! ended.
//!
//! ```text
//! runs/<name>/
//!   config.toml          the whole recipe
//!   <stage>/             a run directory for each stage
//!   teacher.safetensors  the backbone after the last finished stage
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};

use dinoxide_config::Resolved;
use dinoxide_model::weights::write_atomically;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::metrics::MetricsFile;
use crate::pretrained::is_run;
use crate::recipe::Recipe;
use crate::run::prepare_directory;

/// One entry of `[[stages]]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stage {
    /// Its name, which is also that of its folder.
    pub name: String,
    /// What differs from the recipe, in tables and keys of the recipe: `[stages.set.train]`, then `length = "5000 steps"`.
    ///
    /// A stage starts from all of the state in which the one before it ended; `init.take = "weights"` starts from the
    /// teacher's weights alone, with fresh moments.
    pub set: toml::Table,
}

/// A stage, ready to be trained.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Its recipe.
    pub recipe: Resolved<Recipe>,
    /// Its run directory.
    pub directory: PathBuf,
}

impl Planned {
    /// Whether it was trained to its end.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn is_finished(&self) -> Result<bool, TrainError> {
        MetricsFile::has_end(&self.directory.join("metrics.jsonl"))
    }
}

/// The stages of a recipe in their directory, which no other process trains in meanwhile.
#[derive(Debug)]
pub struct Row {
    /// The stages, in order.
    pub stages: Vec<Planned>,
    directory: PathBuf,
    _lock: File,
}

impl Row {
    /// Checks every stage against the data, and creates the directory or makes sure that it is of the same recipe.
    ///
    /// # Errors
    /// What is wrong with a stage, and what [`train`](crate::train) says of a directory.
    pub fn open(recipe: &Resolved<Recipe>, directory: &Path) -> Result<Self, TrainError> {
        let stages = plan(recipe, directory)?;
        for stage in &stages {
            let config = &stage.recipe.value;
            let checked = config.data.open().map_err(TrainError::from).and_then(|source| config.plan(source.len()));
            checked.map_err(|source| TrainError::Stage { name: stage.name.clone(), source: Box::new(source) })?;
        }
        let lock = prepare_directory(recipe, directory)?;
        Ok(Self { stages, directory: directory.to_owned(), _lock: lock })
    }

    /// Makes the teacher of a stage that of the whole.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn keep_teacher(&self, of: &Path) -> Result<PathBuf, TrainError> {
        let bytes = std::fs::read(of).map_err(TrainError::io(of))?;
        let teacher = self.directory.join("teacher.safetensors");
        write_atomically(&teacher, &bytes).map_err(TrainError::io(&teacher))?;
        Ok(teacher)
    }
}

/// The stages of a recipe that is trained in `directory`, in order.
///
/// # Errors
/// Names that are missing, doubled or no name of a folder, and stages that set what the recipe does not have.
pub fn plan(recipe: &Resolved<Recipe>, directory: &Path) -> Result<Vec<Planned>, TrainError> {
    let invalid = |message: String| TrainError::Recipe(message);
    let mut planned: Vec<Planned> = Vec::new();
    for Stage { name, set } in &recipe.value.stages {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || !name.chars().all(is_plain) || name == "checkpoints" {
            return Err(invalid(format!(
                "a stage is called `{name}`: its name is also that of a folder\n\nhint: use letters, digits, `-` and `_`"
            )));
        }
        if planned.iter().any(|stage| stage.name == *name) {
            return Err(invalid(format!("two stages are called `{name}`")));
        }
        if set.contains_key("stages") {
            return Err(invalid(format!("stage `{name}` has stages of its own, which is not possible")));
        }
        let before = planned.last().map(|stage| start_from(&stage.directory.display().to_string(), true));
        planned.push(Planned {
            name: name.clone(),
            recipe: laid_over(recipe, name, before, set)?,
            directory: directory.join(name),
        });
    }
    Ok(planned)
}

/// The stage `name` alone, from given weights or from a run.
///
/// # Errors
/// As [`plan`]; and if there is no such stage.
pub fn alone(recipe: &Resolved<Recipe>, directory: &Path, name: &str, init: &str) -> Result<Planned, TrainError> {
    plan(recipe, directory)?;
    let stages = &recipe.value.stages;
    let Some(stage) = stages.iter().find(|stage| stage.name == name) else {
        let names: Vec<String> = stages.iter().map(|stage| format!("`{}`", stage.name)).collect();
        let list = if names.is_empty() { "it has no stages".into() } else { format!("it has {}", names.join(", ")) };
        return Err(TrainError::Recipe(format!("there is no stage `{name}`: {list}")));
    };
    let before = start_from(init, is_run(Path::new(init)));
    let recipe = laid_over(recipe, name, Some(before), &stage.set)?;
    Ok(Planned { name: name.to_owned(), recipe, directory: directory.join(name) })
}

/// The table that starts a stage from `path`.
fn start_from(path: &str, all: bool) -> toml::Table {
    let take = if all { "state" } else { "weights" };
    let init = [("from", path), ("take", take)].map(|(key, value)| (key.to_owned(), toml::Value::from(value)));
    [("init".to_owned(), toml::Value::Table(init.into_iter().collect()))].into_iter().collect()
}

fn laid_over(
    recipe: &Resolved<Recipe>,
    name: &str,
    before: Option<toml::Table>,
    set: &toml::Table,
) -> Result<Resolved<Recipe>, TrainError> {
    let text = |table: &toml::Table| toml::to_string(table).expect("it was read from TOML");
    let mut layers = Vec::new();
    layers.extend(before.map(|table| (format!("stage `{name}`"), text(&table))));
    layers.push((format!("stage `{name}`, set"), text(set)));
    layers.push((format!("stage `{name}`"), "stages = []".to_owned()));
    recipe.laid_over(&layers).map_err(|e| TrainError::Recipe(e.to_string()))
}
