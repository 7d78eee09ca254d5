//! A recipe with one field of each kind, for the tests.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Request, Resolved, load};

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Recipe {
    pub(crate) run: Run,
    pub(crate) model: Model,
    pub(crate) optim: Optim,
    pub(crate) schedule: Schedule,
    pub(crate) stages: Vec<Stage>,
    pub(crate) probe: Option<Probe>,
    pub(crate) lr_scale: BTreeMap<String, f32>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Run {
    pub(crate) name: String,
    pub(crate) note: Option<String>,
    pub(crate) seed: u64,
}

impl Default for Run {
    fn default() -> Self {
        Self { name: "run".to_owned(), note: None, seed: 7 }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Model {
    pub(crate) arch: Arch,
    pub(crate) patch_size: u8,
    pub(crate) depth: usize,
    pub(crate) head: Head,
}

/// The head's own default differs: a recipe that sets one key of the head must keep the others as they are here.
impl Default for Model {
    fn default() -> Self {
        Self { arch: Arch::VitSmall, patch_size: 14, depth: 12, head: Head { hidden_dim: 2048, bottleneck_dim: 256 } }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Arch {
    VitSmall,
    VitBase,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Head {
    pub(crate) hidden_dim: usize,
    pub(crate) bottleneck_dim: usize,
}

impl Default for Head {
    fn default() -> Self {
        Self { hidden_dim: 1, bottleneck_dim: 2 }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Optim {
    pub(crate) base_lr: f32,
    pub(crate) weight_decay: f64,
    pub(crate) betas: [f64; 2],
}

impl Default for Optim {
    fn default() -> Self {
        Self { base_lr: 0.004, weight_decay: 0.04, betas: [0.9, 0.999] }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Schedule {
    Constant { value: f64 },
    Cosine { start: f64, end: f64 },
}

impl Default for Schedule {
    fn default() -> Self {
        Self::Cosine { start: 1.0, end: 0.0 }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Stage {
    pub(crate) steps: u32,
    pub(crate) crop_px: u32,
    pub(crate) head: Head,
}

impl Default for Stage {
    fn default() -> Self {
        Self { steps: 10, crop_px: 224, head: Head::default() }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Probe {
    pub(crate) crop_px: u32,
}

/// A temporary folder of recipes. Messages are given without the folder's own path.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new(files: &[(&str, &str)]) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        for (name, content) in files {
            folder.write(name, content.as_bytes());
        }
        folder
    }

    pub(crate) fn write(&self, name: &str, content: &[u8]) {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// The path of a file in the folder.
    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// `text` without the folder's path.
    pub(crate) fn shorten(&self, text: &str) -> String {
        text.replace(&self.path(""), "")
    }

    /// Loads a file of the folder.
    pub(crate) fn load(&self, name: &str, overrides: &[&str]) -> Result<Resolved<Recipe>, String> {
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        let request = Request { name: &self.path(name), overrides: &overrides, ..Request::default() };
        load(&request).map_err(|error| self.shorten(&error.to_string()))
    }

    /// The message of a file that does not load.
    pub(crate) fn message(&self, name: &str) -> String {
        self.load(name, &[]).expect_err("a recipe that does not load")
    }
}

/// A base, a file that extends it, and one override of each kind.
pub(crate) fn layered() -> (Folder, Resolved<Recipe>) {
    let folder = Folder::new(&[
        (
            "base/b.toml",
            "run.seed = 1\n\n[optim]\nbase_lr = 0.001 # slow\nweight_decay = 0.1\nbetas = [\n  0.8,\n  0.9,\n]\n\
             [schedule]\nkind = 'constant'\nvalue = 2.0\n[lr_scale]\n'blocks.0' = 0.5\n",
        ),
        (
            "top.toml",
            "extends = 'base/b.toml'\n[optim]\nweight_decay = 0.2\n[model]\nhead.hidden_dim = 8\n\
             [[stages]]\nsteps = 3\n[[stages]]\nhead = { hidden_dim = 4 }\n",
        ),
    ]);
    let resolved = folder.load("top.toml", &["schedule.value=3", "run.name=two words", "run.name=third"]).unwrap();
    (folder, resolved)
}
