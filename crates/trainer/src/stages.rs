//! Several runs in one recipe, each the recipe with some values changed: stages, each of which goes on where the one before
//! it ended, or students, which learn from one teacher side by side.
//!
//! ```text
//! runs/<name>/
//!   config.toml          the whole recipe
//!   <stage or student>/  a run directory for each
//!   teacher.safetensors  the backbone after the last finished stage
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};

use dinoxide_augmentation::AugmentationConfig;
use dinoxide_config::{Resolved, difference};
use dinoxide_model::weights::write_atomically;
use serde::{Deserialize, Serialize};

use crate::directory::prepare_directory;
use crate::error::TrainError;
use crate::metrics::MetricsFile;
use crate::pretrained::is_run;
use crate::recipe::Recipe;

/// One entry of `[[stages]]` or `[[students]]`.
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

/// The stages or students of a recipe in their directory, which no other process trains in meanwhile.
#[derive(Debug)]
pub struct Row {
    /// The stages, in order, or the students.
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
        Self::checked("stage", recipe, directory, plan(recipe, directory)?)
    }

    fn checked(
        what: &'static str,
        recipe: &Resolved<Recipe>,
        directory: &Path,
        stages: Vec<Planned>,
    ) -> Result<Self, TrainError> {
        for stage in &stages {
            let config = &stage.recipe.value;
            let checked = config.data.open().map_err(TrainError::from).and_then(|source| config.plan(source.len()));
            checked.map_err(|source| TrainError::Stage { what, name: stage.name.clone(), source: Box::new(source) })?;
        }
        let lock = prepare_directory(recipe, directory)?;
        Ok(Self { stages, directory: directory.to_owned(), _lock: lock })
    }

    /// The students of a recipe, likewise.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of_students(recipe: &Resolved<Recipe>, directory: &Path) -> Result<Self, TrainError> {
        Self::checked("student", recipe, directory, students(recipe, directory)?)
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
    let mut planned: Vec<Planned> = Vec::new();
    for (index, Stage { name, set }) in recipe.value.stages.iter().enumerate() {
        check_name("stage", name, &planned)?;
        let before = planned.last().map(|stage| start_from(&stage.directory.display().to_string(), true));
        planned.push(Planned {
            name: name.clone(),
            recipe: laid_over("stage", recipe, name, stage_table(recipe, index, before), set)?,
            directory: directory.join(name),
        });
    }
    Ok(planned)
}

/// The students of a recipe that is trained in `directory`.
///
/// # Errors
/// Names as in [`plan`]; students that set what the recipe does not have, or what all of them share.
pub fn students(recipe: &Resolved<Recipe>, directory: &Path) -> Result<Vec<Planned>, TrainError> {
    let mut planned: Vec<Planned> = Vec::new();
    for Stage { name, set } in &recipe.value.students {
        check_name("student", name, &planned)?;
        let student = laid_over("student", recipe, name, toml::Table::new(), set)?;
        let (own, all) = (&student.value, &recipe.value);
        // What is left is what the batches, the teacher and the length of the run depend on.
        let shared = Recipe {
            run: all.run.clone(),
            model: all.model.clone(),
            dino_head: all.dino_head.clone(),
            ibot_head: all.ibot_head.clone(),
            init: all.init.clone(),
            loss: all.loss.clone(),
            optim: all.optim.clone(),
            schedule: all.schedule.clone(),
            eval: all.eval.clone(),
            efficiency: all.efficiency.clone(),
            stages: all.stages.clone(),
            students: all.students.clone(),
            augmentation: AugmentationConfig { local_crops: all.augmentation.local_crops, ..own.augmentation.clone() },
            ..own.clone()
        };
        let differences = difference(all, &shared);
        if let Some(first) = differences.first() {
            return Err(TrainError::Recipe(format!(
                "student `{name}` changes what all students share: {first}\n\nhint: set it in the recipe, outside \
                 `[[students]]`"
            )));
        }
        if own.augmentation.local_crops > all.augmentation.local_crops {
            return Err(TrainError::Recipe(format!(
                "student `{name}` asks for {} local crops, and `augmentation.local_crops` of the recipe is {}",
                own.augmentation.local_crops, all.augmentation.local_crops
            )));
        }
        planned.push(Planned { name: name.clone(), recipe: student, directory: directory.join(name) });
    }
    if !planned.is_empty() && !recipe.value.is_distilled() {
        return Err(TrainError::Recipe(
            "`[[students]]` share a frozen teacher and `distillation.teacher` is empty\n\nhint: set it, or train them in \
             runs of their own"
                .into(),
        ));
    }
    if !planned.is_empty() && !recipe.value.stages.is_empty() {
        return Err(TrainError::Recipe("a recipe has either `[[stages]]` or `[[students]]`, not both".into()));
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
    let Some(index) = stages.iter().position(|stage| stage.name == name) else {
        let names: Vec<String> = stages.iter().map(|stage| format!("`{}`", stage.name)).collect();
        let list = if names.is_empty() { "it has no stages".into() } else { format!("it has {}", names.join(", ")) };
        return Err(TrainError::Recipe(format!("there is no stage `{name}`: {list}")));
    };
    let before = start_from(init, is_run(Path::new(init)));
    let recipe = laid_over("stage", recipe, name, stage_table(recipe, index, Some(before)), &stages[index].set)?;
    Ok(Planned { name: name.to_owned(), recipe, directory: directory.join(name) })
}

/// What a stage has besides what it sets: where it starts, and a seed of its own, without which it would draw the order, crops
/// and masks of the stage before it again.
fn stage_table(recipe: &Resolved<Recipe>, index: usize, before: Option<toml::Table>) -> toml::Table {
    let mut table = before.unwrap_or_default();
    if index > 0 {
        let seed = recipe.value.train.seed.wrapping_add(index as u64) & i64::MAX as u64;
        let train = [("seed".to_owned(), toml::Value::from(seed as i64))];
        table.insert("train".to_owned(), toml::Value::Table(train.into_iter().collect()));
    }
    table
}

/// The table that starts a stage from `path`.
fn start_from(path: &str, all: bool) -> toml::Table {
    let take = if all { "state" } else { "weights" };
    let init = [("from", path), ("take", take)].map(|(key, value)| (key.to_owned(), toml::Value::from(value)));
    [("init".to_owned(), toml::Value::Table(init.into_iter().collect()))].into_iter().collect()
}

fn check_name(what: &str, name: &str, planned: &[Planned]) -> Result<(), TrainError> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || !name.chars().all(is_plain) || name == "checkpoints" {
        return Err(TrainError::Recipe(format!(
            "a {what} is called `{name}`: its name is also that of a folder\n\nhint: use letters, digits, `-` and `_`"
        )));
    }
    match planned.iter().any(|other| other.name == *name) {
        true => Err(TrainError::Recipe(format!("two {what}s are called `{name}`"))),
        false => Ok(()),
    }
}

fn laid_over(
    what: &str,
    recipe: &Resolved<Recipe>,
    name: &str,
    own: toml::Table,
    set: &toml::Table,
) -> Result<Resolved<Recipe>, TrainError> {
    if let Some(key) = ["stages", "students"].into_iter().find(|key| set.contains_key(*key)) {
        return Err(TrainError::Recipe(format!("{what} `{name}` has {key} of its own, which is not possible")));
    }
    let text = |table: &toml::Table| toml::to_string(table).expect("it was read from TOML");
    let layers = [
        (format!("{what} `{name}`"), text(&own)),
        (format!("{what} `{name}`, set"), text(set)),
        (format!("{what} `{name}`"), "stages = []\nstudents = []".to_owned()),
    ];
    recipe.laid_over(&layers).map_err(|e| TrainError::Recipe(e.to_string()))
}
