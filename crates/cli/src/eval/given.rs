//! The backbone that is evaluated: where it comes from, and what results say of it.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use burn::tensor::Device;
use dinoxide_exchange::{Loaded, load};
use dinoxide_model::Backbone;
use dinoxide_model::weights::Description;
use serde_json::{Value, json};

use super::outcome::Outcome;
use crate::{device, terminal};

/// Weights, and where to compute.
#[derive(clap::Args)]
pub(crate) struct Weights {
    /// Weights: a run directory, its `teacher.safetensors`, one of its checkpoints, a `.pth` file of the DINO repositories, a
    /// Hugging Face folder, a timm file
    #[arg(long, value_name = "PATH")]
    pub(crate) weights: PathBuf,
    /// Where to compute: `cpu`, `cuda:0`, `vulkan:0`, `wgpu:0`, `metal`
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub(crate) device: String,
}

impl Weights {
    pub(crate) fn load(&self) -> anyhow::Result<Rc<Given>> {
        Given::load(&self.weights, &self.device)
    }
}

/// A backbone that is not trained.
pub(crate) struct Given {
    /// Its path, as the user gave it.
    pub(crate) weights: String,
    pub(crate) backbone: Backbone,
    pub(crate) description: Description,
    pub(crate) device: Device,
}

impl Given {
    pub(crate) fn load(weights: &Path, device: &str) -> anyhow::Result<Rc<Self>> {
        let device = device::parse(device)?;
        let Loaded { backbone, description, notes, .. } = load(weights, &device)?;
        terminal::notes(weights, &notes);
        Ok(Rc::new(Self { weights: weights.display().to_string(), backbone, description, device }))
    }

    /// What a protocol calls it.
    pub(crate) fn name(&self) -> String {
        let provenance = &self.description.provenance;
        if provenance.is_known() {
            format!("{}, after {} steps", self.weights, provenance.steps)
        } else {
            self.weights.clone()
        }
    }

    /// The JSON result of an evaluation.
    pub(crate) fn result(&self, outcome: &Outcome) -> Value {
        let mut result = json!({
            "task": outcome.task,
            "weights": self.weights,
            "provenance": self.description.provenance,
            "protocol": outcome.protocol,
            "scores": outcome.scores,
            "metrics": outcome.metrics,
        });
        outcome.more.iter().for_each(|(key, value)| result[*key] = value.clone());
        result
    }
}
