//! One step from outside: what a batch that is not finite costs, and what micro-batches change.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_augmentation::{MaskConfig, batch_masks};
use dinoxide_model::config::Position;
use dinoxide_model::weights::host;
use dinoxide_model::{Architecture, HeadConfig, ModelConfig, Projector, parameters};
use dinoxide_random::{Purpose, stream};
use dinoxide_trainer::batch::Batch;
use dinoxide_trainer::loss::{CenterOver, Centering, FeatureConfig, GramConfig, LossConfig};
use dinoxide_trainer::network::Network;
use dinoxide_trainer::optimizer::OptimConfig;
use dinoxide_trainer::schedule::Scheduled;
use dinoxide_trainer::step::{StepDraws, StepError, StepReport, TrainState, train_step};
use dinoxide_trainer::targets::FrozenTeacher;
use rand::RngExt;

const BATCH: usize = 5;
const LOCALS: usize = 3;
/// Sides of global and local crops, in pixels.
const SIZES: (usize, usize) = (16, 8);

fn backbone() -> Architecture {
    let config = ModelConfig {
        embed_dim: Some(24),
        depth: Some(2),
        num_heads: Some(3),
        patch_size: 4,
        drop_path_rate: 0.0,
        position: Position::Learned,
        // With less, all CLS tokens are nearly the same, and KoLeo makes much of how they are rounded.
        layer_scale_init: 1.0,
        ..ModelConfig::default()
    };
    config.resolve(SIZES.0).expect("sizes fit")
}

/// Softmax centering, so that the centers are part of what a step changes.
fn losses() -> LossConfig {
    let gram = GramConfig { weight: 0.8, ..GramConfig::default() };
    LossConfig { centering: Centering::Softmax, gram, ..LossConfig::default() }
}

fn state() -> TrainState {
    let head = |prototypes| HeadConfig { prototypes, bottleneck_dim: 6, hidden_dim: 10, ..HeadConfig::default() };
    let mut rng = stream(1, Purpose::Init, 0, 0);
    let (dino, ibot) = (head(11), head(7));
    // A first step of Adam is the sign of the gradient where that is far above `eps`, and of rounding noise where it is 0.
    let optim = OptimConfig { eps: 1e-3, ..OptimConfig::default() };
    TrainState::new(&backbone(), &dino, Some(&ibot), &optim, &losses(), &Device::flex(), &mut rng)
}

fn noise(shape: [usize; 5], key: u64) -> Tensor<5> {
    let mut rng = stream(2, Purpose::Synthetic, key, 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

fn batch(key: u64) -> Batch {
    let (global, local) = SIZES;
    let mut rng = stream(3, Purpose::Mask, key, 0);
    let mask = MaskConfig { probability: 0.6, ..MaskConfig::default() };
    Batch {
        ids: (0..BATCH).map(|i| format!("photo-{i}.jpg")).collect(),
        global: noise([2, BATCH, 3, global, global], 2 * key),
        local: Some(noise([LOCALS, BATCH, 3, local, local], 2 * key + 1)),
        gram: None,
        masks: batch_masks(2 * BATCH, (global / 4, global / 4), &mask, &mut rng),
        tokens: None,
    }
}

/// Draws of so many micro-batches; without stochastic depth they say nothing but their sizes.
fn draws(parts: usize) -> StepDraws {
    let mut rng = stream(4, Purpose::Forward, 0, 0);
    (0..parts)
        .map(|part| {
            let samples = (part + 1) * BATCH / parts - part * BATCH / parts;
            [2, LOCALS].map(|crops| backbone().draw(crops * samples, &mut rng))
        })
        .collect()
}

fn at(step: u64) -> Scheduled {
    Scheduled {
        step,
        lr: 1e-3,
        last_layer_frozen: false,
        backbone_frozen: false,
        weight_decay: 0.04,
        teacher_momentum: 0.9,
        teacher_temp: 0.06,
        teacher_patch_temp: 0.05,
        refresh_gram_teacher: false,
    }
}

/// Every number of a state, by name.
fn numbers(state: &TrainState) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    for (network, of) in [("student", &state.student), ("teacher", &state.teacher)] {
        parameters::visit(of, |name, _, value| {
            all.insert(format!("{network}.{name}"), host(value));
        });
    }
    for (name, moments) in &state.optimizer.moments {
        all.insert(format!("m.{name}"), host(moments.m.clone()));
        all.insert(format!("v.{name}"), host(moments.v.clone()));
        all.insert(format!("steps.{name}"), vec![moments.steps as f32]);
    }
    all.insert("cls_center".into(), host(state.cls_center.value.clone().reshape([-1])));
    all.insert("patch_center".into(), host(state.patch_center.value.clone().reshape([-1])));
    all.insert("step".into(), vec![state.step as f32]);
    all
}

fn bits(numbers: &BTreeMap<String, Vec<f32>>) -> BTreeMap<&String, Vec<u32>> {
    numbers.iter().map(|(name, values)| (name, values.iter().map(|v| v.to_bits()).collect())).collect()
}

/// `batch` with NaN in one pixel of one crop of sample 3.
fn with_nan(mut batch: Batch, in_local: bool) -> Batch {
    let at = |crop: usize| [crop..crop + 1, 3..4, 1..2, 2..3, 5..6];
    let nan = Tensor::<5>::full([1, 1, 1, 1, 1], f32::NAN, &Device::flex());
    if in_local {
        batch.local = batch.local.map(|local| local.slice_assign(at(2), nan));
    } else {
        batch.global = batch.global.slice_assign(at(1), nan);
    }
    batch
}

#[test]
fn a_nan_pixel_is_reported_with_its_sample_and_changes_nothing() {
    let mut state = state();
    train_step(&mut state, &batch(0), &draws(1), &losses(), at(0)).expect("a sound batch");
    let before = numbers(&state);
    assert!(before["cls_center"].iter().any(|v| *v != 0.0), "the centers have moved");
    let mut cases = 0;
    for in_local in [false, true] {
        for parts in [1, 3] {
            let error = train_step(&mut state, &with_nan(batch(1), in_local), &draws(parts), &losses(), at(1));
            let error = error.expect_err("a NaN pixel");
            let StepError::NotFinite { step, what, value, ids } = &error;
            assert!((*step, ids.as_slice()) == (1, &["photo-3.jpg".to_owned()]), "{error}");
            assert!(what.starts_with("loss `") && value.is_nan(), "{error}");
            let text = error.to_string();
            assert!(text.starts_with("step 1: loss `") && text.contains("no weight was changed"), "{text}");
            assert!(bits(&numbers(&state)) == bits(&before), "the state has changed");
            cases += 1;
        }
    }
    assert_eq!(cases, 4);
    train_step(&mut state, &batch(1), &draws(1), &losses(), at(1)).expect("the state is as good as before");
}

#[track_caller]
fn assert_near(what: &str, left: f64, right: f64) {
    assert!((left - right).abs() <= 1e-5, "{what}: {left} and {right}");
}

/// One step in one part and in three.
fn compare(batch: &Batch, config: &LossConfig) {
    compare_from(state, batch, config);
}

fn compare_from(state: impl Fn() -> TrainState, batch: &Batch, config: &LossConfig) {
    let (mut whole, mut parts) = (state(), state());
    let first = train_step(&mut whole, batch, &draws(1), config, at(0)).expect("a step");
    let second = train_step(&mut parts, batch, &draws(3), config, at(0)).expect("a step");
    let mut terms = 0;
    for ((name, left), (_, right)) in first.losses.named().into_iter().zip(second.losses.named()) {
        assert_eq!(left.is_some(), right.is_some(), "{name}");
        if let (Some(left), Some(right)) = (left, right) {
            assert_near(name, left, right);
            terms += 1;
        }
    }
    assert_eq!(terms, if whole.frozen.is_some() { 6 } else { 5 }, "every term is on");
    assert_near("total", first.losses.total, second.losses.total);
    let entropy = |report: &StepReport| report.target_entropy.expect("a DINO loss").conditional;
    assert_near("entropy", entropy(&first), entropy(&second));
    let (whole, parts) = (numbers(&whole), numbers(&parts));
    assert_eq!(whole.len(), parts.len());
    for (name, values) in &whole {
        let scale = values.iter().fold(1.0f32, |scale, v| scale.max(v.abs()));
        for (left, right) in values.iter().zip(&parts[name]) {
            assert!((left - right).abs() <= 1e-5 * scale, "{name}: {left} and {right}");
        }
    }
}

#[test]
fn micro_batches_change_neither_losses_nor_weights() {
    compare(&batch(0), &losses());
    compare(&batch(1), &LossConfig { centering: Centering::Sinkhorn, koleo_weight: 0.7, ..losses() });
    // Parts of one, two and two samples.
    compare(&batch(1), &LossConfig { patch_center: CenterOver::All, center_momentum: 0.0, ..losses() });
}

/// A frozen teacher, wider and with larger patches than the student, whose features are matched; and a Gram teacher.
#[test]
fn micro_batches_change_nothing_under_a_frozen_teacher() {
    let distilled = || {
        let mut state = state();
        let device = Device::flex();
        let mut rng = stream(6, Purpose::Init, 0, 0);
        let Architecture::Vit(mut wide) = backbone() else { panic!("a vision transformer") };
        wide.embed_dim = 32;
        wide.num_heads = 2;
        wide.patch_size = 8;
        wide.learned.as_mut().expect("learned positions").grid = 2;
        let head = |prototypes| HeadConfig { prototypes, bottleneck_dim: 4, hidden_dim: 9, ..HeadConfig::default() };
        let teacher = Network::new(&wide.into(), &head(11), Some(&head(7)), &device, &mut rng);
        let mut student = state.student.clone();
        student.projector = Some(Projector::new(24, 32, &device.clone().autodiff(), &mut rng));
        state = TrainState::of(student, &OptimConfig { eps: 1e-3, ..OptimConfig::default() }, &losses(), &device);
        let Network { backbone: wide, dino_head, ibot_head, .. } = teacher;
        let architecture = wide.architecture();
        state.frozen =
            Some(FrozenTeacher { architecture, backbone: Some(wide), dino_head: Some(dino_head), ibot_head });
        state.gram_teacher = Some(state.teacher.backbone.clone());
        state
    };
    let features = FeatureConfig { cls_weight: 0.4, patch_weight: 0.3, ..FeatureConfig::default() };
    // Targets of patches need the student's grid; those of CLS tokens do not.
    let config = LossConfig { features, ibot_weight: 0.0, ..losses() };
    let first = {
        let mut state = distilled();
        let report = train_step(&mut state, &batch(0), &draws(1), &config, at(0)).expect("a step");
        assert!(report.gradient_norms.contains_key("projector"), "{:?}", report.gradient_norms);
        report.losses
    };
    assert!(first.feature_patch.is_some_and(|loss| (0.0..2.0).contains(&loss)), "{first:?}");
    compare_from(distilled, &batch(0), &config);
}

/// Local crops of one channel would panic in a forward, and a head of NaN would be seen in a center.
#[test]
fn what_no_loss_looks_at_is_not_computed() {
    let mut batch = batch(0);
    batch.local = batch.local.map(|local| local.slice([0..LOCALS, 0..BATCH, 0..1]));
    let state = || {
        let mut state = state();
        state.teacher.dino_head = parameters::replace(state.teacher.dino_head, |_, weight| weight * f32::NAN);
        state
    };
    for parts in [1, 3] {
        let mut without = state();
        let config = LossConfig { dino_weight: 0.0, koleo_weight: 0.3, ..losses() };
        let report = train_step(&mut without, &batch, &draws(parts), &config, at(0)).expect("a step");
        assert!(report.target_entropy.is_none() && report.losses.dino_global.is_none(), "{report:?}");
        assert!(report.losses.dino_local.is_none() && report.losses.ibot.is_some(), "{report:?}");
        assert!(!report.gradient_norms.contains_key("dino_head"), "{report:?}");
        assert!(host(without.cls_center.value.reshape([-1])).iter().all(|value| *value == 0.0));
        assert!(host(without.patch_center.value.reshape([-1])).iter().any(|value| *value != 0.0));
    }
    let mut state = self::state();
    let config = LossConfig { local_weight: 0.0, ..losses() };
    let report = train_step(&mut state, &batch, &draws(1), &config, at(0)).expect("a step");
    assert!(report.losses.dino_local.is_none() && report.losses.dino_global.is_some(), "{report:?}");
}

/// An epoch's end and the next one's beginning may bring a photo twice, in different crops.
#[test]
fn micro_batches_with_the_same_samples_keep_their_own_gradients() {
    let mut batch = batch(2);
    batch.ids = vec!["photo.jpg".to_owned(); BATCH];
    compare(&batch, &LossConfig { koleo_weight: 0.7, ..losses() });
}

/// The student moves first, then the teacher follows its new weights (DINO, algorithm 1).
#[test]
fn the_teacher_follows_the_weights_that_the_student_has_after_the_step() {
    let mut state = state();
    train_step(&mut state, &batch(0), &draws(1), &losses(), at(0)).expect("a step");
    let before = numbers(&state);
    train_step(&mut state, &batch(1), &draws(1), &losses(), at(1)).expect("a step");
    let after = numbers(&state);
    let mut moved = 0;
    for (name, teacher) in after.iter().filter(|(name, _)| name.starts_with("teacher.")) {
        let student = name.replacen("teacher", "student", 1);
        for i in 0..teacher.len() {
            let expected = 0.9 * before[name][i] + 0.1 * after[&student][i];
            assert!((teacher[i] - expected).abs() <= 3e-7 * expected.abs().max(0.1), "{name}[{i}]");
            moved += usize::from((after[&student][i] - before[&student][i]).abs() > 1e-4);
        }
    }
    assert!(moved > 1000, "the student's step is so short that its two ends cannot be told apart");
}
