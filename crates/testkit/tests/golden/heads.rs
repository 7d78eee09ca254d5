//! Fixture `heads`: projection heads of all four systems, outputs and gradients of `sum(out·proj)`.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::{Device, Tensor};
use dinoxide_model::{HeadConfig, HeadNorm, ProjectionHead};
use dinoxide_testkit::{Array, Check, Fixture, Tolerance};
use rand::{SeedableRng, rngs::ChaCha8Rng};

use crate::tensors::{array, gradient, gradients, load, named, tensor};

pub(crate) fn all(check: &mut Check) {
    let fixture = check.fixture;
    let cases: BTreeSet<&str> = fixture.names("").map(|name| name.split('.').next().expect("a case")).collect();
    for case in cases {
        let Head { config, weights } = head(check, &format!("{case}."));
        if fixture.has(&format!("{case}.out0")) {
            tokens(check, case, &config, &weights);
        } else {
            rows(check, case, &config, &weights);
        }
    }
}

/// A head's description, and its weights under our names.
pub(crate) struct Head {
    pub(crate) config: HeadConfig,
    pub(crate) weights: BTreeMap<String, Array>,
}

impl Head {
    /// The head with its weights.
    pub(crate) fn build(&self, device: &Device) -> ProjectionHead {
        build(&self.config, &self.weights, device)
    }

    /// The head of the weights `<weights>*`, whose magnitudes are trained if there is a gradient `<gradients>*` of them.
    pub(crate) fn of(fixture: &Fixture, weights: &str, gradients: &str) -> Self {
        let weights = named(fixture, weights, |name| Some(parameter(name)));
        let shape = |name: &str| weights.get(name).map(|w| w.shape.as_slice());
        let layers = weights.keys().filter(|name| name.starts_with("mlp.") && name.ends_with(".weight")).count();
        let last = shape(&format!("mlp.{}.weight", 2 * (layers - 1))).expect("the last layer of the MLP");
        let norm = if shape("last_layer.weight").is_some() {
            HeadNorm::None
        } else if fixture.has(&format!("{gradients}last_layer.weight_g")) {
            HeadNorm::Weight
        } else {
            HeadNorm::WeightFixed
        };
        let prototypes = shape("last_layer.weight").or(shape("last_layer.weight_v")).expect("prototypes")[0];
        let config = HeadConfig {
            prototypes,
            bottleneck_dim: last[0],
            hidden_dim: shape("mlp.0.weight").expect("a first layer")[0],
            layers,
            mlp_bias: shape("mlp.0.bias").is_some(),
            norm,
            patch_prototypes: shape("last_layer2.weight_v").map(|shape| shape[0]),
        };
        Self { config, weights }
    }

    /// Width of the tokens that come in.
    fn embed_dim(weights: &BTreeMap<String, Array>) -> usize {
        weights["mlp.0.weight"].shape[1]
    }
}

/// The reference's MLP of one layer is that layer, ours is a list of one.
pub(crate) fn parameter(name: &str) -> String {
    match name.strip_prefix("mlp.") {
        Some(rest @ ("weight" | "bias")) => format!("mlp.0.{rest}"),
        _ => name.to_owned(),
    }
}

fn build(config: &HeadConfig, weights: &BTreeMap<String, Array>, device: &Device) -> ProjectionHead {
    let rng = &mut ChaCha8Rng::seed_from_u64(4);
    load(ProjectionHead::new(Head::embed_dim(weights), config, device, rng), weights)
}

/// Reads a head; if its patch prototypes are the CLS prototypes under a second name, they are compared and dropped.
fn head(check: &mut Check, prefix: &str) -> Head {
    let fixture = check.fixture;
    let mut head = Head::of(fixture, &format!("{prefix}w."), &format!("{prefix}grad."));
    if fixture.hyper()[prefix.trim_end_matches('.')]["shared_head"].as_bool() == Some(true) {
        for part in ["weight_g", "weight_v"] {
            let alias = head.weights.remove(&format!("last_layer2.{part}")).expect("an alias");
            let name = format!("{prefix}w.last_layer2.{part}");
            check.values(&name, &head.weights[&format!("last_layer.{part}")], &alias, Tolerance::EXACT);
        }
        head.config.patch_prototypes = None;
    }
    head
}

/// Compares `<prefix>*` with the gradients of a head's parameters; every trained one must be there.
pub(crate) fn parameter_gradients(check: &mut Check, prefix: &str, mut found: BTreeMap<String, Array>) {
    for name in check.fixture.names(prefix) {
        match found.remove(&parameter(&name[prefix.len()..])) {
            Some(gradient) => check.tensor(name, &gradient),
            None => check.failure(&format!("{name}: the head has no such parameter")),
        }
    }
    for (name, gradient) in found {
        if gradient.values.iter().any(|&value| value != 0.0) {
            check.failure(&format!("{prefix}{name}: has a gradient, in the reference it has none"));
        }
    }
}

/// Heads on rows `[M, D]`.
fn rows(check: &mut Check, case: &str, config: &HeadConfig, weights: &BTreeMap<String, Array>) {
    let fixture = check.fixture;
    let device = Device::flex().autodiff();
    let head = build(config, weights, &device);
    let x: Tensor<2> = tensor::<2>(&fixture.floats(&format!("{case}.in")), &device).require_grad();
    let out = head.forward(x.clone());
    check.tensor(&format!("{case}.out"), &array(out.clone()));
    let bottleneck = head.bottleneck(x.clone());
    for (name, found) in [
        ("out_no_last_layer", bottleneck.clone()),
        ("out_only_last_layer", bottleneck.matmul(head.last_layer.vectors().transpose())),
    ] {
        let name = format!("{case}.{name}");
        if fixture.has(&name) {
            check.tensor(&name, &array(found));
        }
    }
    let loss = (out * tensor(&fixture.floats(&format!("{case}.proj")), &device)).sum();
    check.scalar(&format!("{case}.proj_loss"), loss.clone().into_scalar());
    let grads = loss.backward();
    check.tensor(&format!("{case}.grad_in"), &gradient(&x, &grads));
    parameter_gradients(check, &format!("{case}.grad."), gradients(&head, &grads));
}

/// iBOT's heads on tokens `[B, 1 + P, D]`: CLS to its prototypes, patches to theirs.
fn tokens(check: &mut Check, case: &str, config: &HeadConfig, weights: &BTreeMap<String, Array>) {
    let fixture = check.fixture;
    let device = Device::flex().autodiff();
    let head = build(config, weights, &device);
    let x: Tensor<3> = tensor::<3>(&fixture.floats(&format!("{case}.in")), &device).require_grad();
    let [batch, tokens, dim] = x.dims();
    let patches = tokens - 1;
    let cls = head.forward(x.clone().slice([0..batch, 0..1]).reshape([batch, dim]));
    let patch = head.forward_patches(x.clone().slice([0..batch, 1..tokens]).reshape([batch * patches, dim]));
    let prototypes = patch.dims()[1];
    let patch = patch.reshape([batch, patches, prototypes]);
    check.tensor(&format!("{case}.out0"), &array(cls.clone()));
    check.tensor(&format!("{case}.out1"), &array(patch.clone()));
    let loss = (cls * tensor(&fixture.floats(&format!("{case}.proj0")), &device)).sum()
        + (patch * tensor(&fixture.floats(&format!("{case}.proj1")), &device)).sum();
    check.scalar(&format!("{case}.proj_loss"), loss.clone().into_scalar());
    let grads = loss.backward();
    check.tensor(&format!("{case}.grad_in"), &gradient(&x, &grads));
    parameter_gradients(check, &format!("{case}.grad."), gradients(&head, &grads));
}
