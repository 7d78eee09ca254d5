//! AdamW and the teacher's running mean beside loops over single numbers in double precision.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_model::config::Position;
use dinoxide_model::weights::host;
use dinoxide_model::{HeadConfig, HeadNorm, ModelConfig, parameters};
use dinoxide_random::{Purpose, stream};
use dinoxide_trainer::network::Network;
use dinoxide_trainer::optimizer::{AdamW, Clip, Freeze, Gradients, Norms, OptimConfig, ema};
use dinoxide_trainer::schedule::Scheduled;
use rand::RngExt;

const DEPTH: usize = 2;

/// Every kind of parameter: tokens, positions, blocks with layer scale, norms, heads with and without weight norm.
fn network() -> Network {
    let config = ModelConfig {
        embed_dim: Some(8),
        depth: Some(DEPTH),
        num_heads: Some(2),
        patch_size: 4,
        register_tokens: 1,
        position: Position::Learned,
        ..ModelConfig::default()
    };
    let head =
        |prototypes, norm| HeadConfig { prototypes, bottleneck_dim: 3, hidden_dim: 5, norm, ..Default::default() };
    let (dino, ibot) = (head(7, HeadNorm::None), head(6, HeadNorm::WeightFixed));
    let mut rng = stream(1, Purpose::Init, 0, 0);
    Network::new(&config.resolve(12).expect("sizes fit"), &dino, Some(&ibot), &Device::flex(), &mut rng)
}

type Values = BTreeMap<String, Vec<f64>>;

fn values(network: &Network) -> Values {
    let double = |values: Tensor<1>| host(values).into_iter().map(f64::from).collect();
    parameters::values(network).into_iter().map(|(name, values)| (name, double(values))).collect()
}

/// Noise for every parameter; none for magnitudes that are fixed, and for the mask token, as without masks.
fn gradients(network: &Network, step: u64) -> Gradients {
    let mut all = Gradients::new();
    for (i, (name, shape)) in parameters::shapes(network).into_iter().enumerate() {
        let mut rng = stream(2, Purpose::Synthetic, step, i as u64);
        if !(name.ends_with("weight_g") || name.ends_with("mask_token")) {
            let noise: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
            all.insert(name, Tensor::from_data(TensorData::from(noise.as_slice()), &Device::flex()));
        }
    }
    all
}

fn at(step: u64) -> Scheduled {
    Scheduled {
        step,
        lr: 0.01 * (1.0 + step as f64),
        last_layer_frozen: step == 1,
        backbone_frozen: false,
        weight_decay: 0.3 + 0.1 * step as f64,
        teacher_momentum: 0.9,
        teacher_temp: 0.06,
        teacher_patch_temp: 0.05,
        refresh_gram_teacher: false,
    }
}

/// Weights and moments as single numbers.
struct Loops {
    weights: Values,
    /// First and second moments with the number of updates, by parameter.
    moments: BTreeMap<String, (Vec<f64>, Vec<f64>, i32)>,
}

impl Loops {
    fn new(network: &Network) -> Self {
        let weights = values(network);
        let zeros = |values: &Vec<f64>| (vec![0.0; values.len()], vec![0.0; values.len()], 0);
        let moments = weights.iter().map(|(name, values)| (name.clone(), zeros(values))).collect();
        Self { weights, moments }
    }

    fn step(&mut self, gradients: &Values, config: &OptimConfig, at: &Scheduled) {
        let norm_of = |which: &dyn Fn(&str) -> bool| {
            let squares = gradients.iter().filter(|(name, _)| which(name)).flat_map(|(_, g)| g).map(|g| g * g);
            squares.sum::<f64>().sqrt()
        };
        for (name, weights) in &mut self.weights {
            let submodule = name.split('.').next().expect("a submodule");
            let frozen = at.last_layer_frozen && name.contains("last_layer");
            if name.ends_with("weight_g") || (frozen && config.freeze == Freeze::Gradient) {
                continue;
            }
            let norm = match config.clip {
                Clip::Submodule => norm_of(&|other| other.starts_with(&format!("{submodule}."))),
                Clip::Parameter => norm_of(&|other| other == name),
            };
            let factor = (config.clip_norm / (norm + 1e-6)).min(1.0);
            let lr = if frozen { 0.0 } else { at.lr * lr_multiplier(name, config) };
            let decay = if is_decayed(name) { at.weight_decay } else { 0.0 };
            let (m, v, steps) = self.moments.get_mut(name).expect("moments");
            *steps += 1;
            for i in 0..weights.len() {
                let g = gradients.get(name).map_or(0.0, |gradient| gradient[i] * factor);
                m[i] = config.beta1 * m[i] + (1.0 - config.beta1) * g;
                v[i] = config.beta2 * v[i] + (1.0 - config.beta2) * g * g;
                let (m, v) = (m[i] / (1.0 - config.beta1.powi(*steps)), v[i] / (1.0 - config.beta2.powi(*steps)));
                weights[i] -= lr * decay * weights[i] + lr * m / (v.sqrt() + config.eps);
            }
        }
    }
}

/// Tokens, positions and the patch embedding are layer 0, blocks 1 to `DEPTH`, the rest one more; heads have no layers.
fn lr_multiplier(name: &str, config: &OptimConfig) -> f64 {
    let Some(inner) = name.strip_prefix("backbone.") else { return 1.0 };
    let layers_above = match inner.split('.').collect::<Vec<_>>()[..] {
        ["norm", _] => 0,
        ["blocks", block, ..] => DEPTH - block.parse::<usize>().expect("a number"),
        _ => DEPTH + 1,
    };
    let patch = if inner.starts_with("patch_embed") { config.patch_embed_lr_mult } else { 1.0 };
    config.layerwise_decay.powi(layers_above as i32) * patch
}

/// All but biases, norms and layer scales.
fn is_decayed(name: &str) -> bool {
    !name.split('.').any(|part| matches!(part, "bias" | "norm" | "norm1" | "norm2" | "ls1" | "ls2"))
}

#[track_caller]
fn assert_near(what: &str, found: &Values, expected: &Values, tolerance: f64) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, expected) in expected {
        for (i, (found, expected)) in found[name].iter().zip(expected).enumerate() {
            let off = (found - expected).abs();
            assert!(off <= tolerance * expected.abs().max(1.0), "{what}: {name}[{i}]: {found} and {expected}");
        }
    }
}

#[test]
fn adamw_equals_a_loop_over_numbers_with_every_way_of_clipping_and_freezing() {
    let mut cases = 0;
    for clip in [Clip::Submodule, Clip::Parameter] {
        for freeze in [Freeze::Lr, Freeze::Gradient] {
            for clip_norm in [0.7, 1e3] {
                // A large `eps`, so that its place in the formula matters.
                let config = OptimConfig { clip, freeze, clip_norm, eps: 0.1, ..OptimConfig::default() };
                let mut network = network();
                let mut loops = Loops::new(&network);
                let mut optimizer = AdamW::new(&config, &network, &Device::flex());
                for step in 0..4 {
                    let gradients = gradients(&network, step);
                    let double = |g: &Tensor<1>| host(g.clone()).into_iter().map(f64::from).collect();
                    let numbers = gradients.iter().map(|(name, g)| (name.clone(), double(g))).collect();
                    loops.step(&numbers, &config, &at(step));
                    let norms = Norms::of(&gradients);
                    network = optimizer.step(network, gradients, &norms, &at(step));
                    let what = format!("{clip:?}, {freeze:?}, norm {clip_norm}, step {step}");
                    assert_near(&what, &values(&network), &loops.weights, 2e-6);
                    cases += 1;
                }
                let undecayed = loops.weights.keys().filter(|name| !is_decayed(name)).count();
                // Two norms of two parameters, four biases and two layer scales in a block; the final norm, the patches' bias, six in heads.
                assert_eq!(undecayed, DEPTH * 10 + 3 + 6);
            }
        }
    }
    assert_eq!(cases, 2 * 2 * 2 * 4);
}

#[test]
fn the_running_mean_keeps_equal_weights_and_moves_others_by_its_momentum() {
    let teacher = network();
    let student = parameters::replace(teacher.clone(), |_, weight| weight * 1.5 + 0.25);
    let (old, new) = (values(&teacher), values(&student));
    assert_eq!(values(&ema(teacher.clone(), &student, 1.0)), old);
    assert_eq!(values(&ema(teacher.clone(), &student, 0.0)), new);
    assert_near("equal weights", &values(&ema(teacher.clone(), &teacher, 0.996)), &old, 2e-7);
    let expected = old.iter().map(|(name, old)| {
        let mean = old.iter().zip(&new[name]).map(|(old, new)| 0.75 * old + 0.25 * new);
        (name.clone(), mean.collect())
    });
    assert_near("a quarter", &values(&ema(teacher, &student, 0.75)), &expected.collect(), 2e-7);
}
