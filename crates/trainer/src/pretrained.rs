//! Networks that were trained before: what a run starts from, or learns from.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_config::Resolved;
use dinoxide_model::weights::Weight;
use dinoxide_model::{Architecture, Backbone, Precision, ProjectionHead, VitConfig, parameters};
use dinoxide_random::{Purpose, stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint;
use crate::error::TrainError;
use crate::network::Network;
use crate::recipe::Recipe;
use crate::targets::FrozenTeacher;

/// What a run takes over from [`InitConfig::from`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Take {
    /// Weights, for student and teacher alike: of a run those of its teacher, with its heads; of anything else the backbone.
    #[default]
    Weights,
    /// Of a run, everything but its step: student, teacher, moments, centers.
    State,
}

/// The `[init]` table: what a run starts from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InitConfig {
    /// Weights of any supported format, or a run directory; empty: fresh weights.
    pub from: String,
    /// What is taken over.
    pub take: Take,
}

/// The `[distillation]` table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillationConfig {
    /// A network that does not train, from which the student learns instead of from its own running mean: a run directory,
    /// or weights of any supported format, which have no heads. Empty: none.
    ///
    /// With heads it gives the targets of the DINO and iBOT losses (DINOv3's way); the student then sees its crops unmasked.
    /// Without, set `loss.dino_weight` and `loss.ibot_weight` to 0 and match features with `[loss.features]`.
    pub teacher: String,
    /// A folder in which `dinoxide cache` has written this teacher's tokens for this recipe: the teacher's backbone is then
    /// not kept in memory. Empty: it sees every batch.
    pub cache: String,
}

/// A network from a file or a run.
#[derive(Clone, Debug)]
pub struct Pretrained {
    /// Where it is from.
    pub from: String,
    /// The backbone.
    pub backbone: Backbone,
    /// The head of CLS tokens, which only a run has.
    pub dino_head: Option<ProjectionHead>,
    /// The head of patch tokens, of a run with separate heads.
    pub ibot_head: Option<ProjectionHead>,
    /// What was assumed or left out in reading it.
    pub notes: Vec<String>,
}

/// Whether a path is the directory of a run.
pub(crate) fn is_run(path: &Path) -> bool {
    path.join("config.toml").is_file() && path.join("checkpoints").is_dir()
}

impl Pretrained {
    /// The recipe's key that names a frozen teacher.
    pub(crate) const TEACHER: &'static str = "distillation.teacher";

    /// The recipe's frozen teacher, if it has one.
    pub(crate) fn teacher(config: &Recipe, device: &Device) -> Result<Option<Self>, TrainError> {
        let open = || Self::open(Self::TEACHER, &config.distillation.teacher, device);
        config.is_distilled().then(open).transpose()
    }

    /// It as a frozen teacher, with its backbone or without.
    pub(crate) fn frozen(&self, with_backbone: bool, precision: Precision) -> FrozenTeacher {
        let head = |head: &Option<ProjectionHead>| head.clone().map(|head| head.with_precision(precision));
        FrozenTeacher {
            architecture: self.backbone.architecture(),
            backbone: with_backbone.then(|| self.backbone.clone().with_precision(precision)),
            dino_head: head(&self.dino_head),
            ibot_head: head(&self.ibot_head),
        }
    }

    /// Reads weights of any supported format, or the teacher of a run's newest whole checkpoint. `key` is the recipe's key
    /// that names them.
    ///
    /// # Errors
    /// What cannot be read or is not whole.
    pub fn open(key: &str, from: &str, device: &Device) -> Result<Self, TrainError> {
        let path = Path::new(from);
        let fault = |reason: String| TrainError::Pretrained { key: key.to_owned(), reason };
        if !path.exists() {
            return Err(fault(format!("{from}: there is no such file or folder")));
        }
        if is_run(path) {
            return Self::of_run(path, device).map_err(fault);
        }
        let loaded = dinoxide_exchange::load(path, device).map_err(|e| fault(e.to_string()))?;
        let (backbone, notes) = (loaded.backbone, loaded.notes);
        Ok(Self { from: from.to_owned(), backbone, dino_head: None, ibot_head: None, notes })
    }

    /// A checksum of the backbone's weights.
    pub(crate) fn checksum(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        for (name, value) in parameters::values(&self.backbone) {
            hasher.update(name.as_bytes());
            dinoxide_model::weights::host(value).iter().for_each(|value| hasher.update(&value.to_le_bytes()));
        }
        hasher.finalize()
    }

    fn of_run(path: &Path, device: &Device) -> Result<Self, String> {
        let from = path.display().to_string();
        let config = path.join("config.toml");
        let text = std::fs::read_to_string(&config).map_err(|e| format!("{}: {e}", config.display()))?;
        let recipe = Resolved::<Recipe>::from_text(&config.display().to_string(), &text).map_err(|e| e.to_string())?;
        let recipe = recipe.value;
        let mut tensors = checkpoint::teacher(&path.join("checkpoints")).map_err(|e| e.to_string())?;
        let architecture = recipe.model.resolve(recipe.augmentation.global_crop_size).map_err(|e| e.to_string())?;
        let architecture = with_table_of(architecture, &tensors);
        let mut rng = stream(0, Purpose::Init, 0, 0);
        let network = Network::new(&architecture, &recipe.dino_head, recipe.patch_head(), device, &mut rng);
        tensors.retain(|name, _| !name.starts_with("projector."));
        let differences = differences(&parameters::shapes(&network), &tensors);
        if !differences.is_empty() {
            return Err(format!("{from}: its checkpoint is not of its `config.toml`\n{}", differences.join("\n")));
        }
        let network = filled(network, tensors, device);
        let Network { backbone, dino_head, ibot_head, .. } = network;
        Ok(Self { from, backbone, dino_head: Some(dino_head), ibot_head, notes: Vec::new() })
    }

    /// Fits the backbone of a recipe to these weights: its table of positions becomes theirs, since positions are
    /// interpolated in every forward, to the same effect whatever grid they are kept for.
    ///
    /// # Errors
    /// Every difference that would change what the weights compute, with both values.
    pub fn fit(&self, recipe: &mut Architecture) -> Result<Vec<String>, TrainError> {
        let mut notes = Vec::new();
        let given = self.backbone.architecture();
        if let (Architecture::Vit(recipe), Architecture::Vit(given)) = (&mut *recipe, &given) {
            fit_positions(recipe, given, &mut notes);
        }
        let differences = described_differences(recipe, &given);
        if differences.is_empty() {
            return Ok(notes);
        }
        Err(TrainError::Pretrained {
            key: "init.from".into(),
            reason: format!(
                "{} has another backbone than the recipe\n{}\n\nhint: set the keys of `[model]` to what the weights \
                 have; `dinoxide inspect {}` shows all of it",
                self.from,
                differences.join("\n"),
                self.from
            ),
        })
    }

    /// The network with these weights, wherever it has the same parameters; and what it keeps of its own.
    pub fn put_into(&self, network: Network, device: &Device) -> (Network, Vec<String>) {
        let mut given = BTreeMap::new();
        let mut add = |prefix: &str, name: &str, shape: &[usize], value: Tensor<1>| {
            given.insert(format!("{prefix}.{name}"), (shape.to_vec(), value));
        };
        parameters::visit(&self.backbone, |name, shape, value| add("backbone", name, shape, value));
        for (prefix, head) in [("dino_head", &self.dino_head), ("ibot_head", &self.ibot_head)] {
            if let Some(head) = head {
                parameters::visit(head, |name, shape, value| add(prefix, name, shape, value));
            }
        }
        // Norms of their own start as the one that they were split from.
        for (own, of) in [("cls_norm", "norm"), ("local_cls_norm", "cls_norm"), ("local_cls_norm", "norm")] {
            for part in ["weight", "bias"] {
                let name = format!("backbone.{own}.{part}");
                if let (false, Some(value)) = (given.contains_key(&name), given.get(&format!("backbone.{of}.{part}"))) {
                    given.insert(name, value.clone());
                }
            }
        }
        let shapes: BTreeMap<String, Vec<usize>> = parameters::shapes(&network).into_iter().collect();
        let mut fresh = Vec::new();
        let network = parameters::replace(network, |name, own| match given.remove(name) {
            Some((shape, value)) if shape == shapes[name] => value.to_device(device),
            _ => {
                fresh.push(name.to_owned());
                own
            }
        });
        let (mut notes, mut heads) = (Vec::new(), Vec::new());
        for name in fresh {
            match name.split_once('.') {
                Some(("backbone", inner)) => notes.push(format!("`{inner}` is not in {}: fresh values", self.from)),
                Some((head, _)) if !heads.contains(&head.to_owned()) => heads.push(head.to_owned()),
                _ => {}
            }
        }
        notes.extend(heads.iter().map(|head| format!("`{head}` starts from fresh weights")));
        (network, notes)
    }
}

/// A head that is missing where a loss asks for it, or a size that does not fit, in words.
pub(crate) fn misfit(key: &str, reason: String) -> TrainError {
    TrainError::Pretrained { key: key.to_owned(), reason }
}

fn fit_positions(recipe: &mut VitConfig, given: &VitConfig, notes: &mut Vec<String>) {
    if let (Some(own), Some(table)) = (&mut recipe.learned, &given.learned)
        && own.grid != table.grid
    {
        notes.push(format!(
            "positions are kept for a grid of {0} × {0} patches and interpolated to that of the crops, {1} × {1}",
            table.grid, own.grid
        ));
        own.grid = table.grid;
    }
}

/// An architecture with the table of positions that a checkpoint has.
fn with_table_of(mut architecture: Architecture, tensors: &BTreeMap<String, Weight>) -> Architecture {
    if let Architecture::Vit(config) = &mut architecture
        && let (Some(learned), Some(table)) = (&mut config.learned, tensors.get("backbone.pos_embed"))
    {
        learned.grid = table.shape.get(1).map_or(learned.grid, |rows| rows.saturating_sub(1).isqrt());
    }
    architecture
}

/// What may differ between a recipe's backbone and given weights without changing what the weights compute.
fn is_free(key: &str, recipe: &Value, given: &Value) -> bool {
    let drops = ["drop_path_rate", "drop_path", "rope.rescale", "rope.shift", "rope.jitter", "mask_token"];
    // An initial value; whether there is a layer scale at all is another matter.
    let initial = key == "layer_scale_init" && recipe.is_null() == given.is_null();
    // What the weights lack starts fresh, or as a copy of what it was split from.
    let added = key == "register_tokens" && given == &Value::from(0)
        || key.starts_with("untie_") && given == &Value::Bool(false)
        || key == "untie_global_and_local_cls_norm";
    drops.contains(&key) || initial || added
}

/// Each difference that changes what weights compute, one line.
pub(crate) fn described_differences(recipe: &Architecture, given: &Architecture) -> Vec<String> {
    let leaves = |architecture: &Architecture| {
        let mut leaves = BTreeMap::new();
        collect("", &serde_json::to_value(architecture).expect("plain data"), &mut leaves);
        leaves
    };
    let (recipe, given) = (leaves(recipe), leaves(given));
    let keys: std::collections::BTreeSet<&String> = recipe.keys().chain(given.keys()).collect();
    keys.into_iter()
        .filter_map(|key| {
            let of = |leaves: &BTreeMap<String, Value>| leaves.get(key).cloned().unwrap_or(Value::Null);
            let (own, theirs) = (of(&recipe), of(&given));
            (own != theirs && !is_free(key, &own, &theirs))
                .then(|| format!("  `{key}` is {own} in the recipe, {theirs} in the weights"))
        })
        .collect()
}

fn collect(prefix: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                collect(&name, value, into);
            }
        }
        leaf => {
            into.insert(prefix.to_owned(), leaf.clone());
        }
    }
}

fn differences(shapes: &[(String, Vec<usize>)], tensors: &BTreeMap<String, Weight>) -> Vec<String> {
    let mut differences = Vec::new();
    for (name, shape) in shapes {
        match tensors.get(name) {
            None => differences.push(format!("  missing: `{name}` {shape:?}")),
            Some(found) if &found.shape != shape => {
                differences.push(format!("  `{name}` is {:?}, the recipe's is {shape:?}", found.shape));
            }
            Some(_) => {}
        }
    }
    let known = |name: &String| shapes.iter().any(|(expected, _)| expected == name);
    differences.extend(tensors.keys().filter(|name| !known(name)).map(|name| format!("  extra: `{name}`")));
    differences
}

/// The network with these values, which cover it.
fn filled(network: Network, mut tensors: BTreeMap<String, Weight>, device: &Device) -> Network {
    parameters::replace(network, |name, _| {
        let values = tensors.remove(name).expect("coverage was checked").values;
        let length = values.len();
        Tensor::from_data(TensorData::new(values, [length]), device)
    })
}
