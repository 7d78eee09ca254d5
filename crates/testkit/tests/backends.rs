//! Backends agree: single operations and whole training steps on the CPU and on a GPU backend, compared number by number.
//!
//! Needs the feature `wgpu`, `vulkan` or `cuda` and a driver; a software driver serves. `DINOXIDE_DEVICE` says which device:
//! `wgpu:cpu` or `vulkan:cpu` for a software driver, `wgpu`, `vulkan` or `cuda` for the adapter that the backend prefers. Without
//! it, the test says aloud that it compared nothing.

#![cfg(any(feature = "cuda", feature = "vulkan", feature = "wgpu"))]
#![allow(clippy::print_stderr, reason = "what was skipped and what deviated is this test's output")]

use std::collections::BTreeMap;

use burn::tensor::{Device, DeviceKind, FloatDType, Tensor, TensorData};
use dinoxide_augmentation::{MaskConfig, batch_masks};
use dinoxide_kernels::{
    Branch, Normalization, Precision, Projection, RopeTable, attention, feed_forward, gated_feed_forward, layer_norm,
    linear, selected_attention, self_attention,
};
use dinoxide_model::config::{DropPathKind, Position};
use dinoxide_model::weights::host;
use dinoxide_model::{Architecture, HeadConfig, ModelConfig, parameters};
use dinoxide_random::{Purpose, stream};
use dinoxide_trainer::batch::Batch;
use dinoxide_trainer::loss::{Centering, LossConfig};
use dinoxide_trainer::optimizer::OptimConfig;
use dinoxide_trainer::schedule::Scheduled;
use dinoxide_trainer::step::{StepReport, TrainState, train_step};
use rand::RngExt;

const BATCH: usize = 3;
const LOCALS: usize = 2;
/// Height and width of global and of local crops, in pixels.
const SIZES: ([usize; 2], [usize; 2]) = ([20, 12], [8, 12]);
const PATCH: usize = 4;
const STEPS: u64 = 3;

/// Of a branch of a block, on the samples of a batch.
const DROP_PATH: f64 = 0.4;

fn vit(position: Position, drop_path: Option<DropPathKind>) -> Architecture {
    let config = ModelConfig {
        embed_dim: Some(24),
        depth: Some(2),
        num_heads: Some(3),
        patch_size: PATCH,
        register_tokens: if position == Position::Rope { 2 } else { 0 },
        mask_k_bias: position == Position::Rope,
        drop_path_rate: drop_path.map_or(0.0, |_| DROP_PATH),
        drop_path: drop_path.unwrap_or(DropPathKind::Subset),
        position,
        rope_shift: 0.0,
        rope_jitter: 1.0,
        rope_rescale: 1.0,
        layer_scale_init: 1.0,
        ..ModelConfig::default()
    };
    config.resolve(SIZES.0[0]).expect("sizes fit")
}

fn noise(views: usize, [height, width]: [usize; 2], key: u64, device: &Device) -> Tensor<5> {
    let mut rng = stream(2, Purpose::Synthetic, key, 0);
    let shape = [views, BATCH, 3, height, width];
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn batch(key: u64, device: &Device) -> Batch {
    let mut rng = stream(3, Purpose::Mask, key, 0);
    let mask = MaskConfig { probability: 0.6, ..MaskConfig::default() };
    Batch {
        ids: (0..BATCH).map(|i| i.to_string()).collect(),
        global: noise(2, SIZES.0, 2 * key, device),
        local: Some(noise(LOCALS, SIZES.1, 2 * key + 1, device)),
        gram: None,
        masks: batch_masks(2 * BATCH, (SIZES.0[0] / PATCH, SIZES.0[1] / PATCH), &mask, &mut rng),
        tokens: None,
    }
}

/// The reports of a few steps, and every weight of student and teacher after them.
fn train(
    position: Position,
    centering: Centering,
    drop_path: Option<DropPathKind>,
    device: &Device,
) -> (Vec<StepReport>, BTreeMap<String, Vec<f32>>) {
    let backbone = vit(position, drop_path);
    let losses = LossConfig { centering, ..LossConfig::default() };
    let head = |prototypes| HeadConfig { prototypes, bottleneck_dim: 6, hidden_dim: 10, ..HeadConfig::default() };
    // Where a gradient is 0, a first step of Adam is the sign of rounding noise unless `eps` is above it.
    let optim = OptimConfig { eps: 1e-3, ..OptimConfig::default() };
    let mut rng = stream(1, Purpose::Init, 0, 0);
    let mut state = TrainState::new(&backbone, &head(11), Some(&head(7)), &optim, &losses, device, &mut rng);
    let reports = (0..STEPS).map(|step| {
        let mut rng = stream(4, Purpose::Forward, step, 0);
        let draws = vec![[2, LOCALS].map(|crops| backbone.draw(crops * BATCH, &mut rng))];
        let at = Scheduled {
            step,
            lr: 1e-3,
            last_layer_frozen: false,
            backbone_frozen: false,
            weight_decay: 0.04,
            teacher_momentum: 0.9,
            teacher_temp: 0.06,
            teacher_patch_temp: 0.05,
            refresh_gram_teacher: false,
        };
        train_step(&mut state, &batch(step, device), &draws, &losses, at).expect("finite losses")
    });
    let reports = reports.collect();
    let mut weights = BTreeMap::new();
    for (network, of) in [("student", &state.student), ("teacher", &state.teacher)] {
        parameters::visit(of, |name, _, value| {
            weights.insert(format!("{network}.{name}"), host(value));
        });
    }
    (reports, weights)
}

/// `|a − b|` over the larger of `|a|` and `floor`.
fn deviation(a: f64, b: f64, floor: f64) -> f64 {
    (a - b).abs() / a.abs().max(floor)
}

/// The device that `DINOXIDE_DEVICE` names, if it names one.
fn other_device() -> Option<Device> {
    let name = std::env::var("DINOXIDE_DEVICE").ok()?;
    let (backend, kind) = match name.split_once(':') {
        None => (&*name, DeviceKind::DefaultDevice),
        Some((backend, "cpu")) => (backend, DeviceKind::Cpu),
        Some(_) => panic!("DINOXIDE_DEVICE={name}: expected `BACKEND` or `BACKEND:cpu`"),
    };
    match backend {
        #[cfg(feature = "cuda")]
        "cuda" if matches!(kind, DeviceKind::DefaultDevice) => Some(Device::cuda(0)),
        #[cfg(feature = "wgpu")]
        "wgpu" => Some(Device::wgpu(kind)),
        #[cfg(feature = "vulkan")]
        "vulkan" => Some(Device::vulkan(kind)),
        _ => panic!("DINOXIDE_DEVICE={name}: `{backend}` is no backend of this build"),
    }
}

/// That device, or a line that says that there is nothing to compare with.
fn device_or_skip() -> Option<Device> {
    let device = other_device();
    if device.is_none() {
        eprintln!(
            "SKIPPED: set DINOXIDE_DEVICE=wgpu:cpu, wgpu, vulkan:cpu, vulkan or cuda to compare the CPU with that device"
        );
    }
    device
}

/// Width of tokens, heads, width of the hidden layer, crops and tokens of each, in the comparison of operations.
const WIDTH: usize = 24;
const HEADS: usize = 3;
const HIDDEN: usize = 20;
const CROPS: usize = 2;
const TOKENS: usize = 7;

/// The results of an operation, and the gradients of its inputs for a fixed gradient of the result.
fn operation(name: &str, precision: Precision, device: &Device) -> Vec<Vec<f32>> {
    let device = device.clone().autodiff();
    let mut inputs: Vec<Tensor<1>> = Vec::new();
    let mut input = |shape: &[usize]| {
        let len = shape.iter().product();
        let mut rng = stream(4, Purpose::Synthetic, inputs.len() as u64, 0);
        let values: Vec<f32> = (0..len).map(|_| rng.random_range(-1.0..1.0)).collect();
        inputs.push(Tensor::from_data(TensorData::new(values, [len]), &device).require_grad());
        inputs[inputs.len() - 1].clone()
    };
    let rows = CROPS * TOKENS;
    let x = input(&[rows, WIDTH]).reshape([rows, WIDTH]);
    let norm = Normalization { weight: input(&[WIDTH]), bias: input(&[WIDTH]), eps: 1e-6 };
    let mut branch = |first: usize, inner: usize| Branch {
        norm: norm.clone(),
        first: Projection { weight: input(&[first, WIDTH]).reshape([first, WIDTH]), bias: Some(input(&[first])) },
        last: Projection { weight: input(&[WIDTH, inner]).reshape([WIDTH, inner]), bias: Some(input(&[WIDTH])) },
        gamma: Some(input(&[WIDTH])),
        precision,
        recompute: false,
    };
    let angles = |turn: fn(f32) -> f32| {
        let values: Vec<f32> = (0..TOKENS * WIDTH / HEADS).map(|i| turn(i as f32 * 0.37)).collect();
        Tensor::<2>::from_data(TensorData::new(values, [TOKENS, WIDTH / HEADS]), &device)
    };
    let rope = RopeTable { cos: angles(f32::cos), sin: angles(f32::sin) };
    let crops = x.clone().reshape([CROPS, TOKENS, WIDTH]);
    let y = match name {
        "layer norm" => layer_norm(x, norm.weight.clone(), norm.bias.clone(), norm.eps),
        "linear" => {
            let Branch { first, .. } = branch(HIDDEN, HIDDEN);
            linear(x, first.weight, first.bias, precision)
        }
        "self-attention" => {
            let packed = Tensor::cat(vec![x.clone(), x.clone() * 0.5, x * -0.7], 1);
            let packed = packed.reshape([CROPS, TOKENS, 3 * WIDTH]);
            self_attention(packed, HEADS, Some(&rope), precision).reshape([rows, WIDTH])
        }
        "attention" => attention(crops, branch(3 * WIDTH, WIDTH), HEADS, Some(&rope)).reshape([rows, WIDTH]),
        "selected attention" => {
            selected_attention(crops, &[0, 3, 7, 8, 13], branch(3 * WIDTH, WIDTH), HEADS, Some(&rope))
        }
        "feed-forward" => feed_forward(x, branch(HIDDEN, HIDDEN)),
        "gated feed-forward" => {
            let branch = branch(HIDDEN, HIDDEN);
            let weight = input(&[HIDDEN, WIDTH]).reshape([HIDDEN, WIDTH]);
            let value = Projection { weight, bias: Some(input(&[HIDDEN])) };
            gated_feed_forward(x, branch, Some(value))
        }
        "packed gated feed-forward" => gated_feed_forward(x, branch(2 * HIDDEN, HIDDEN), None),
        _ => unreachable!("{name}"),
    };
    let [count, width] = y.dims();
    let weights: Vec<f32> = (0..count * width).map(|i| (i as f32 * 0.73).sin()).collect();
    let weights = Tensor::<2>::from_data(TensorData::new(weights, [count, width]), &device);
    let mut results = vec![host(y.clone().inner().reshape([-1]))];
    let gradients = (y * weights).sum().backward();
    results.extend(inputs.iter().filter_map(|input| input.grad(&gradients)).map(host));
    results
}

#[test]
fn operations_and_their_gradients_are_those_of_the_cpu() {
    let Some(device) = device_or_skip() else { return };
    let mut precisions = vec![(Precision::Fp32, 2e-5)];
    if device.supports_dtype(FloatDType::BF16) {
        precisions.push((Precision::Bf16, 0.02));
    } else {
        eprintln!("this device has no bfloat16: single precision alone is compared");
    }
    let mut compared = 0;
    for (precision, bound) in &precisions {
        for (name, results) in [
            ("layer norm", 4),
            ("linear", 4),
            ("self-attention", 2),
            ("attention", 9),
            ("selected attention", 9),
            ("feed-forward", 9),
            ("gated feed-forward", 11),
            ("packed gated feed-forward", 9),
        ] {
            let (cpu, gpu) = (operation(name, *precision, &Device::flex()), operation(name, *precision, &device));
            assert_eq!(
                (cpu.len(), gpu.len()),
                (results, results),
                "{name}: the result and the gradients of its inputs"
            );
            let mut worst = 0f32;
            for (a, b) in cpu.iter().zip(&gpu) {
                assert_eq!(a.len(), b.len(), "{name}");
                let scale = a.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
                let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs() / scale);
                worst = differences.fold(worst, |m, v| if v > m || v.is_nan() { v } else { m });
            }
            eprintln!("{name}, {precision:?}: differs by {worst:.1e} of the largest element");
            assert!(worst < *bound, "{name} in {precision:?} differs by {worst:.1e}, bound {bound:.0e}");
            compared += results;
        }
    }
    assert_eq!(compared, 57 * precisions.len());
}

#[test]
fn cpu_and_gpu_take_the_same_steps() {
    let Some(device) = device_or_skip() else { return };
    let mut compared = 0;
    for (position, centering, drop_path) in [
        (Position::Rope, Centering::Sinkhorn, None),
        (Position::Learned, Centering::Softmax, None),
        (Position::Rope, Centering::Sinkhorn, Some(DropPathKind::Subset)),
        (Position::Rope, Centering::Sinkhorn, Some(DropPathKind::PerSample)),
    ] {
        let (cpu, cpu_weights) = train(position, centering, drop_path, &Device::flex());
        let (gpu, gpu_weights) = train(position, centering, drop_path, &device);
        let mut worst: BTreeMap<&str, f64> = BTreeMap::new();
        let mut see = |what, deviation: f64| {
            let worst = worst.entry(what).or_default();
            *worst = worst.max(deviation);
            compared += 1;
        };
        for (a, b) in cpu.iter().zip(&gpu) {
            let terms = |r: &StepReport| {
                let l = &r.losses;
                [l.dino_global, l.dino_local, l.ibot, l.koleo, Some(l.total)]
                    .map(|term| term.expect("every term is on"))
            };
            terms(a).into_iter().zip(terms(b)).for_each(|(a, b)| see("loss", deviation(a, b, 0.1)));
            assert_eq!(a.gradient_norms.len(), b.gradient_norms.len());
            for (name, norm) in &a.gradient_norms {
                see("gradient norm", deviation(*norm, b.gradient_norms[name], 1e-3));
            }
            let entropy = |r: &StepReport| r.target_entropy.expect("CLS tokens have targets").conditional;
            see("entropy", deviation(entropy(a), entropy(b), 0.1));
        }
        assert_eq!(cpu_weights.len(), gpu_weights.len());
        for (name, a) in &cpu_weights {
            let b = &gpu_weights[name];
            assert_eq!(a.len(), b.len(), "{name}");
            let scale = a.iter().fold(0f32, |m, v| m.max(v.abs())).max(1e-2);
            let worst = a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / scale;
            see("weight", f64::from(worst));
        }
        eprintln!("{position:?}, {centering:?}, stochastic depth {drop_path:?}: largest relative deviations {worst:?}");
        for (what, bound) in [("loss", 1e-4), ("gradient norm", 1e-3), ("entropy", 1e-4), ("weight", 1e-3)] {
            assert!(
                worst[what] < bound,
                "{position:?}, {drop_path:?}: {what} deviates by {:.2e}, bound {bound:.0e}",
                worst[what]
            );
        }
    }
    eprintln!("backends: {compared} values compared");
    assert!(compared > 400);
}
