//! The memory of a step: what blocks save whose backward pass computes their inside again, with nothing else changed, and
//! how many sets of gradients there are.

#![allow(clippy::print_stdout, reason = "the measured bytes are what a reader of the run looks for")]

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_augmentation::{MaskConfig, batch_masks};
use dinoxide_model::config::FfnKind;
use dinoxide_model::weights::host;
use dinoxide_model::{HeadConfig, ModelConfig, Precision, parameters};
use dinoxide_random::{Purpose, stream};
use dinoxide_trainer::batch::Batch;
use dinoxide_trainer::loss::LossConfig;
use dinoxide_trainer::optimizer::OptimConfig;
use dinoxide_trainer::schedule::Scheduled;
use dinoxide_trainer::step::{TrainState, train_step};
use peak_alloc::PeakAlloc;
use rand::RngExt;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const BATCH: usize = 3;
const LOCALS: usize = 2;

fn noise(shape: [usize; 5], key: u64) -> Tensor<5> {
    let mut rng = stream(2, Purpose::Synthetic, key, 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// The most bytes that two steps set aside at once beyond what there was before, and the student's weights after them.
fn two_steps(
    embed_dim: usize,
    [size, local_size]: [usize; 2],
    ffn: FfnKind,
    recompute: bool,
    precision: Precision,
) -> (usize, Vec<u32>) {
    let config = ModelConfig {
        embed_dim: Some(embed_dim),
        depth: Some(6),
        num_heads: Some(3),
        patch_size: 4,
        drop_path_rate: 0.3,
        ffn,
        ..Default::default()
    };
    let backbone = config.resolve(size).expect("sizes fit");
    let head = HeadConfig { prototypes: 11, bottleneck_dim: 6, hidden_dim: 10, ..Default::default() };
    let (optim, losses) = (OptimConfig::default(), LossConfig::default());
    let mut rng = stream(1, Purpose::Init, 0, 0);
    let mut state = TrainState::new(&backbone, &head, Some(&head), &optim, &losses, &Device::flex(), &mut rng);
    state.student = state.student.with_precision(precision);
    state.teacher = state.teacher.with_precision(precision);
    state.student.backbone = state.student.backbone.recomputing(recompute);
    let grid = (size / 4, size / 4);
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    for step in 0..2 {
        let masks = batch_masks(2 * BATCH, grid, &MaskConfig::default(), &mut stream(3, Purpose::Mask, step, 0));
        let batch = Batch {
            ids: (0..BATCH).map(|i| i.to_string()).collect(),
            global: noise([2, BATCH, 3, size, size], 2 * step),
            local: Some(noise([LOCALS, BATCH, 3, local_size, local_size], 2 * step + 1)),
            gram: None,
            masks,
            tokens: None,
        };
        let draws = [2, LOCALS].map(|crops| backbone.draw(crops * BATCH, &mut stream(4, Purpose::Forward, step, 0)));
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
        train_step(&mut state, &batch, &vec![draws], &losses, at).expect("a step");
    }
    let peak = ALLOCATOR.peak_usage() - before;
    let mut weights = Vec::new();
    parameters::visit(&state.student, |_, _, value| weights.extend(host(value).into_iter().map(f32::to_bits)));
    (peak, weights)
}

// One test, since both ask the one allocator of this program.
#[test]
fn a_step_keeps_activations_or_gradients_but_never_two_of_the_larger() {
    let crops = [40, 16];
    for (ffn, precision, share) in [
        (FfnKind::Mlp, Precision::Fp32, 0.5),
        (FfnKind::Mlp, Precision::Bf16, 0.85),
        (FfnKind::SwigluFused, Precision::Fp32, 0.65),
        (FfnKind::Swiglu, Precision::Bf16, 0.85),
    ] {
        let (kept, expected) = two_steps(48, crops, ffn, false, precision);
        let (recomputed, weights) = two_steps(48, crops, ffn, true, precision);
        println!("{ffn:?} in {precision:?}: {recomputed} bytes with recomputation, {kept} without");
        assert!(weights == expected, "{ffn:?} in {precision:?}: the weights differ");
        assert!(weights.len() > 100_000, "{} weights", weights.len());
        assert!(
            (recomputed as f64) < share * kept as f64,
            "{ffn:?} in {precision:?}: {recomputed} bytes with recomputation, {kept} without"
        );
    }

    let (peak, weights) = two_steps(192, [8, 4], FfnKind::Mlp, false, Precision::Fp32);
    // Two moments, which the first step sets aside, and one set of gradients.
    let parameters = 4 * weights.len();
    assert!(peak < parameters * 7 / 2, "{peak} bytes beside parameters of {parameters}");
}
