//! AdamW with the references' parameter groups, scheduled weight decay and clipping (Loshchilov & Hutter 2019).

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use dinoxide_kernels as kernels;
use dinoxide_model::{Architecture, parameters, weights::host};
use dinoxide_optimizer::Update;
pub use dinoxide_optimizer::{Gradients, Group, Moments};
use serde::{Deserialize, Serialize};

use crate::network::{Network, SUBMODULES};
use crate::schedule::Scheduled;

/// What a gradient's norm is taken over when it is clipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clip {
    /// Backbone, heads and projectors, each by itself (DINOv2, DINOv3).
    Submodule,
    /// Each parameter tensor by itself (DINO, iBOT).
    Parameter,
}

/// How the prototypes are held still in the first part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Freeze {
    /// Learning rate 0; the moments go on (DINOv2, DINOv3).
    Lr,
    /// No gradient: neither moments nor step count move (DINO, iBOT).
    Gradient,
}

/// The `[optim]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment. Large batches that collapse: try 0.95 to 0.99.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest gradient norm; 0 turns clipping off. Unstable: try 1 or 0.3.
    pub clip_norm: f64,
    /// What the norm is taken over.
    pub clip: Clip,
    /// Factor of the learning rate per block, from the last block down to the patch embedding; 1 is none.
    pub layerwise_decay: f64,
    /// Further factor for the patch embedding.
    pub patch_embed_lr_mult: f64,
    /// How the prototypes are frozen for `schedule.freeze_last_layer`.
    pub freeze: Freeze,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            clip_norm: 3.0,
            clip: Clip::Submodule,
            layerwise_decay: 0.9,
            patch_embed_lr_mult: 0.2,
            freeze: Freeze::Lr,
        }
    }
}

/// The group of a parameter of a submodule with `depth` blocks (0 for a head), by its name within it:
/// [`dinoxide_optimizer::group`], and the patch embedding's own factor.
pub fn group(name: &str, depth: usize, config: &OptimConfig) -> Group {
    let mut group = dinoxide_optimizer::group(name, depth, config.layerwise_decay);
    if name.contains("patch_embed") {
        group.lr_multiplier *= config.patch_embed_lr_mult;
    }
    group
}

/// AdamW.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: OptimConfig,
    groups: BTreeMap<String, Group>,
    /// By parameter name.
    pub moments: BTreeMap<String, Moments>,
}

/// The submodule that a parameter of a network belongs to, and its name there.
fn split(name: &str) -> (&str, &str) {
    name.split_once('.').expect("a network's parameters lie in its submodules")
}

/// The squared norms of gradients, by parameter name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Norms {
    squares: BTreeMap<String, f64>,
}

impl Norms {
    /// Those of `gradients`. One transfer from the device.
    pub fn of(gradients: &Gradients) -> Self {
        let squares = Self::squares(gradients);
        let squares = if squares.is_empty() { Vec::new() } else { host(Tensor::cat(squares, 0)) };
        Self::read(gradients, squares)
    }

    /// A number for each of `gradients`, on their device.
    pub(crate) fn squares(gradients: &Gradients) -> Vec<Tensor<1>> {
        gradients.values().map(kernels::sum_of_squares).collect()
    }

    /// The [`squares`](Self::squares) of `gradients` after they were read.
    pub(crate) fn read(gradients: &Gradients, squares: impl IntoIterator<Item = f32>) -> Self {
        Self { squares: gradients.keys().cloned().zip(squares.into_iter().map(f64::from)).collect() }
    }

    /// The norm of the gradients of each submodule that has any.
    pub fn by_submodule(&self) -> BTreeMap<&'static str, f64> {
        let mut norms = BTreeMap::<&'static str, f64>::new();
        for (name, square) in &self.squares {
            let submodule = SUBMODULES.into_iter().find(|s| *s == split(name).0).expect("one of the submodules");
            *norms.entry(submodule).or_default() += square;
        }
        norms.values_mut().for_each(|norm| *norm = norm.sqrt());
        norms
    }
}

impl AdamW {
    /// For the parameters of `network`, with moments at zero.
    pub fn new(config: &OptimConfig, network: &Network, device: &Device) -> Self {
        let mut groups = BTreeMap::new();
        let mut moments = BTreeMap::new();
        // A ConvNeXt's learning rate does not fall with depth, as in the reference.
        let depth = match network.backbone.architecture() {
            Architecture::Vit(config) => config.depth,
            Architecture::ConvNext(_) => 0,
        };
        for (name, shape) in parameters::shapes(network) {
            let (submodule, inner) = split(&name);
            groups.insert(name.clone(), group(inner, if submodule == "backbone" { depth } else { 0 }, config));
            moments.insert(name, Moments::zeros(shape.iter().product(), device));
        }
        Self { config: config.clone(), groups, moments }
    }

    /// The groups, by parameter name.
    pub fn groups(&self) -> &BTreeMap<String, Group> {
        &self.groups
    }

    /// One step: clips the gradients and moves the weights. `norms` are theirs.
    ///
    /// A parameter that got no gradient has gradient zero: its moments fade and it is decayed. But fixed norms of prototypes
    /// stay as they are.
    pub fn step<M: Module>(&mut self, network: M, mut gradients: Gradients, norms: &Norms, at: &Scheduled) -> M {
        let Self { config, groups, moments } = self;
        let submodules = norms.by_submodule();
        let coefficient = |norm: f64| {
            if config.clip_norm > 0.0 { (config.clip_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
        };
        parameters::replace(network, |name, weight| {
            let group = groups[name];
            let frozen = group.is_last_layer && at.last_layer_frozen;
            let trained = gradients.contains_key(name) || !name.ends_with("weight_g");
            if (frozen && config.freeze == Freeze::Gradient) || !trained {
                return weight;
            }
            let state = moments.get_mut(name).expect("each parameter has its moments");
            let gradient = match gradients.remove(name) {
                Some(gradient) => gradient,
                None => weight.zeros_like(),
            };
            let factor = match config.clip {
                Clip::Submodule => submodules.get(split(name).0).map_or(1.0, |norm| coefficient(*norm)),
                Clip::Parameter => norms.squares.get(name).map_or(1.0, |square| coefficient(square.sqrt())),
            };
            let still = frozen || (at.backbone_frozen && split(name).0 == "backbone");
            let lr = if still { 0.0 } else { at.lr * group.lr_multiplier };
            let by = Update {
                beta1: config.beta1,
                beta2: config.beta2,
                eps: config.eps,
                gradient_factor: factor,
                lr,
                weight_decay: at.weight_decay * group.weight_decay_multiplier,
            };
            state.update(weight, gradient, by)
        })
    }
}

/// The teacher's weights after a step: `momentum · teacher + (1 − momentum) · student` (DINO §3.1), parameter by parameter.
pub fn ema<M: Module>(teacher: M, student: &M, momentum: f64) -> M {
    let mut values = parameters::values(student);
    parameters::replace(teacher, |name, weight| {
        let student = values.remove(name).expect("student and teacher have the same parameters");
        kernels::running_mean(weight, student, momentum)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_patch_embedding_has_a_factor_of_its_own() {
        let config = OptimConfig::default();
        for (name, lr) in [("patch_embed.proj.weight", 0.01435796), ("cls_token", 0.07178980), ("norm.weight", 1.0)] {
            let found = group(name, 24, &config).lr_multiplier;
            assert!((found - lr).abs() < 1e-7, "{name}: {found}");
        }
    }
}
