//! Fixtures `train_*`: six optimisation steps through the trainer's own step.
//!
//! After every step the losses, the gradient norms and the norm of every weight and moment are compared; after the first
//! and the last one every weight and moment itself.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_augmentation::Masks;
use dinoxide_losses::center::Center;
use dinoxide_model::{Architecture, Backbone, HeadConfig, StochasticDraws};
use dinoxide_testkit::{Array, Check, Fixture, Tolerance};
use dinoxide_trainer::{
    batch::Batch,
    network::{Network, SUBMODULES},
    step::{StepReport, TrainState, train_step},
    targets::FrozenTeacher,
};
use rand::{SeedableRng, rngs::ChaCha8Rng};
use serde_json::Value;

use crate::{
    comparison::{Comparison, parameter},
    groups,
    heads::Head,
    recipes::{Recipe, loss_at, scheduled},
    tensors::{array, load, named},
    vit,
};

/// DINOv3.
pub(crate) fn v3(check: &mut Check) {
    run(check, &Recipe::v3(check.fixture), &v3_losses);
}

/// DINOv2.
pub(crate) fn v2(check: &mut Check) {
    run(check, &Recipe::v2(check.fixture), &v2_losses);
}

/// DINO and iBOT.
pub(crate) fn arguments(check: &mut Check) {
    run(check, &Recipe::arguments(check.fixture), &argument_losses);
}

/// Student and teacher before the first step.
fn networks(check: &mut Check, recipe: &Recipe) -> (Network, Network) {
    let fixture = check.fixture;
    let device = Device::flex();
    let mut weights = named(fixture, "w.student.", parameter);
    let head = |name: &str| {
        let prefix = format!("w.student.{name}.");
        let trained = format!("step6.adam_m.{name}.");
        fixture.names(&prefix).next().is_some().then(|| Head::of(fixture, &prefix, &trained).config)
    };
    let mut dino_head = head("dino_head").or_else(|| head("head")).expect("a head");
    let ibot_head = head("ibot_head");
    if fixture.hyper()["shared_head"].as_bool() == Some(true) {
        // The patch prototypes are those of CLS under a second name.
        dino_head.patch_prototypes = None;
        weights.retain(|name, _| !name.contains(".last_layer2."));
    }
    let build = |head: &HeadConfig, weights: &BTreeMap<String, Array>, device: &Device| {
        let rng = &mut ChaCha8Rng::seed_from_u64(1);
        let architecture = Architecture::Vit(recipe.backbone.clone());
        load(Network::new(&architecture, head, ibot_head.as_ref(), device, rng), weights)
    };
    let student = build(&dino_head, &weights, &device.clone().autodiff());
    buffers(check, "w.student.backbone.", &student.backbone);

    let given = named(fixture, "w.ema0.", parameter);
    if !given.is_empty() {
        let teacher = build(&dino_head, &given, &device);
        buffers(check, "w.ema0.backbone.", &teacher.backbone);
        return (student, teacher);
    }
    if fixture.hyper()["shared_head_teacher"].as_bool() == Some(true) {
        dino_head.patch_prototypes = None;
        weights.retain(|name, _| !name.contains(".last_layer2."));
    }
    weights.extend(named(fixture, "w.teacher0.", parameter));
    (student, build(&dino_head, &weights, &device))
}

fn start(check: &mut Check, recipe: &Recipe) -> TrainState {
    let device = Device::flex();
    let (student, teacher) = networks(check, recipe);
    let mut state = TrainState::of(student, &recipe.optim, &recipe.loss, &device);
    state.teacher = teacher;
    state.frozen = frozen(check);
    let weights = named(check.fixture, "w.gram_teacher.", parameter);
    state.gram_teacher = (!weights.is_empty()).then(|| {
        let inner = |(name, value): (String, Array)| {
            (name.strip_prefix("backbone.").expect("a backbone alone").to_owned(), value)
        };
        let architecture = Architecture::Vit(recipe.backbone.clone());
        let fresh = Backbone::new(&architecture, &device, &mut ChaCha8Rng::seed_from_u64(3));
        let backbone = load(fresh, &weights.into_iter().map(inner).collect());
        buffers(check, "w.gram_teacher.backbone.", &backbone);
        backbone
    });
    state
}

/// The teacher of a distillation, with heads of sizes of its own.
fn frozen(check: &mut Check) -> Option<FrozenTeacher> {
    let fixture = check.fixture;
    let backbone = Recipe::v3_teacher(fixture)?;
    let head = |name: &str| Head::of(fixture, &format!("w.teacher.{name}."), "").config;
    let (dino_head, ibot_head) = (head("dino_head"), head("ibot_head"));
    let rng = &mut ChaCha8Rng::seed_from_u64(4);
    let fresh = Network::new(&Architecture::Vit(backbone), &dino_head, Some(&ibot_head), &Device::flex(), rng);
    let Network { backbone, dino_head, ibot_head, .. } = load(fresh, &named(fixture, "w.teacher.", parameter));
    buffers(check, "w.teacher.backbone.", &backbone);
    let architecture = backbone.architecture();
    Some(FrozenTeacher { architecture, backbone: Some(backbone), dino_head: Some(dino_head), ibot_head })
}

/// Batch `number` of the fixture: pixels are thirty-seconds.
fn batch(fixture: &Fixture, number: u64, patch_size: usize) -> Batch {
    let crops = |name: &str, views: Option<usize>| {
        let Array { shape, values } = fixture.array::<i8>(&format!("batch{number}.{name}"));
        let pixels: Vec<f32> = values.into_iter().map(|value| f32::from(value) / 32.0).collect();
        let batch = fixture.shape(&format!("batch{number}.global_crops"))[0] / 2;
        let views = views.unwrap_or(shape[0] / batch);
        let data = TensorData::new(pixels, [views, batch, shape[1], shape[2], shape[3]]);
        Tensor::<5>::from_data(data, &Device::flex())
    };
    let global = crops("global_crops", Some(2));
    let has = |name: &str| fixture.has(&format!("batch{number}.{name}"));
    let local = has("local_crops").then(|| crops("local_crops", None));
    let gram = has("gram_teacher_crops").then(|| crops("gram_teacher_crops", Some(2)));
    let [views, samples, _, height, width] = global.dims();
    let patches = (height / patch_size) * (width / patch_size);
    let name = format!("batch{number}.masks");
    let mask =
        if fixture.has(&name) { fixture.array::<bool>(&name).values } else { vec![false; views * samples * patches] };
    let extra = format!("batch{number}.extra_upperbound");
    if fixture.has(&extra) {
        // Room for more masked patches than there are, which DINOv2 pads with; nothing may depend on it.
        fixture.leave_out(&extra);
    }
    Batch {
        ids: (0..samples).map(|sample| sample.to_string()).collect(),
        global,
        local,
        gram,
        masks: masks(mask, views * samples, patches),
        tokens: None,
    }
}

fn masks(mask: Vec<bool>, crops: usize, patches: usize) -> Masks {
    assert_eq!(mask.len(), crops * patches, "a mask has one entry for each patch");
    let indices: Vec<usize> = (0..mask.len()).filter(|&i| mask[i]).collect();
    let of_crop = |crop: usize| mask[crop * patches..(crop + 1) * patches].iter().filter(|&&masked| masked).count();
    let weights = indices.iter().map(|index| 1.0 / of_crop(index / patches) as f32).collect();
    Masks { crops, patches, mask, indices, weights }
}

/// Compares the losses of a step, which it is given with their case and tolerance.
type Losses = dyn Fn(&mut Check, &str, &Value, &StepReport, &Recipe, f64, Tolerance);

fn buffers(check: &mut Check, prefix: &str, backbone: &Backbone) {
    let Backbone::Vit(vit) = backbone else { panic!("the fixtures' networks are vision transformers") };
    vit::buffers(check, prefix, vit);
}

fn run(check: &mut Check, recipe: &Recipe, losses: &Losses) {
    let fixture = check.fixture;
    let mut state = start(check, recipe);
    multipliers(check, &state);
    let steps = fixture.json()["steps"].as_array().expect("`steps`");
    let mut lr_so_far = 0.0;
    for (i, step) in steps.iter().enumerate() {
        let case = format!("step {}", i + 1);
        let batch = batch(fixture, step["batch"].as_u64().expect("a batch"), recipe.backbone.patch_size);
        let locals = batch.local.as_ref().map_or(0, |crops| crops.dims()[0]);
        let draws = [2, locals].map(|views| {
            StochasticDraws::draw(&recipe.backbone, views * batch.len(), &mut ChaCha8Rng::seed_from_u64(2))
        });
        let at = scheduled(fixture, i);
        let before = (state.cls_center.clone(), state.patch_center.clone());
        let loss = loss_at(fixture, &recipe.loss, i);
        let report = train_step(&mut state, &batch, &vec![draws], &loss, at).expect("a step");
        lr_so_far += at.lr;

        let rtol = |first: f64, later: f64| Tolerance { atol: 0.0, rtol_of_max: if i == 0 { first } else { later } };
        let pairs = 2.0 + 2.0 * locals as f64;
        losses(check, &case, step, &report, recipe, pairs, rtol(1e-5, 1e-4));
        gradient_norms(check, &case, step, &report, rtol(1e-4, 1e-3));
        centers(check, i + 1, &before, &state);
        Comparison { recipe, state: &state, steps_done: i + 1, lr_so_far }.all(check, step);
        let replaced = step["gram_updated"].as_bool().unwrap_or(false);
        if at.refresh_gram_teacher != replaced {
            check.failure(&format!(
                "{case}: the Gram teacher was replaced: {}, in the reference: {replaced}",
                !replaced
            ));
        }
    }
}

fn loss(check: &mut Check, case: &str, dict: &Value, key: &str, found: Option<f64>, tolerance: Tolerance) {
    if let Some(expected) = dict[key].as_f64() {
        check.number(&format!("{case}: {key}"), expected, found.unwrap_or(f64::NAN), tolerance);
    }
}

fn v3_losses(
    check: &mut Check,
    case: &str,
    step: &Value,
    report: &StepReport,
    _: &Recipe,
    _: f64,
    tolerance: Tolerance,
) {
    let (dict, losses) = (&step["loss_dict"], &report.losses);
    loss(check, case, dict, "dino_local_crops_loss", losses.dino_local, tolerance);
    loss(check, case, dict, "dino_global_crops_loss", losses.dino_global, tolerance);
    loss(check, case, dict, "koleo_loss", losses.koleo, tolerance);
    loss(check, case, dict, "ibot_loss", losses.ibot, tolerance);
    loss(check, case, dict, "gram_loss", losses.gram, tolerance);
    loss(check, case, step, "total_loss", Some(losses.total), tolerance);
}

/// DINOv2 logs each DINO term as its share of the mean over all pairs, KoLeo weighted, and iBOT halved.
fn v2_losses(
    check: &mut Check,
    case: &str,
    step: &Value,
    report: &StepReport,
    recipe: &Recipe,
    pairs: f64,
    tolerance: Tolerance,
) {
    let (dict, losses, weights) = (&step["loss_dict"], &report.losses, &recipe.loss);
    let local = losses.dino_local.map(|l| l * weights.dino_weight * (pairs - 2.0) / pairs);
    loss(check, case, dict, "dino_local_crops_loss", local, tolerance);
    let global = losses.dino_global.map(|l| l * weights.dino_weight * 2.0 / pairs);
    loss(check, case, dict, "dino_global_crops_loss", global, tolerance);
    loss(check, case, dict, "koleo_loss", losses.koleo.map(|l| l * weights.koleo_weight), tolerance);
    loss(check, case, dict, "ibot_loss", losses.ibot.map(|l| l * weights.ibot_weight / 2.0), tolerance);
    loss(check, case, step, "total_loss", Some(losses.total), tolerance);
}

/// DINO logs the mean over all pairs, iBOT that and the loss of the patches.
fn argument_losses(
    check: &mut Check,
    case: &str,
    step: &Value,
    report: &StepReport,
    recipe: &Recipe,
    pairs: f64,
    tolerance: Tolerance,
) {
    let (dict, losses) = (&step["loss_dict"], &report.losses);
    let local = losses.dino_local.map_or(0.0, |l| l * (pairs - 2.0));
    let cls = losses.dino_global.map(|global| (global * 2.0 + local) / pairs * recipe.loss.dino_weight);
    loss(check, case, dict, "cls", cls, tolerance);
    loss(check, case, dict, "patch", losses.ibot.map(|l| l * recipe.loss.ibot_weight), tolerance);
    loss(check, case, dict, "loss", Some(losses.total), tolerance);
    loss(check, case, step, "total_loss", Some(losses.total), tolerance);
}

/// By submodule; where the reference has them by parameter, their root of squares.
fn gradient_norms(check: &mut Check, case: &str, step: &Value, report: &StepReport, tolerance: Tolerance) {
    let mut squares = BTreeMap::<&str, f64>::new();
    let by_submodule = step["grad_norm"].as_object();
    for (name, norm) in by_submodule.or(step["param_grad_norms"].as_object()).expect("gradient norms") {
        let submodule = name.split('.').next().expect("a first part");
        let submodule = if submodule == "head" { "dino_head" } else { submodule };
        *squares.entry(submodule).or_default() += norm.as_f64().expect("a norm").powi(2);
    }
    for submodule in SUBMODULES {
        if let Some(square) = squares.remove(submodule) {
            let found = report.gradient_norms.get(submodule).copied().unwrap_or(f64::NAN);
            check.number(&format!("{case}: gradient norm of {submodule}"), square.sqrt(), found, tolerance);
        } else if report.gradient_norms.contains_key(submodule) {
            check.failure(&format!("{case}: `{submodule}` has a gradient, in the reference it has none"));
        }
    }
    squares.keys().for_each(|name| check.failure(&format!("{case}: there is no submodule `{name}`")));
}

/// `center.*.<steps done>`: DINOv2's buffers are one step behind, their update is pending.
fn centers(check: &mut Check, done: usize, before: &(Center, Center), after: &TrainState) {
    let fixture = check.fixture;
    let all = [("dino", &before.0), ("ibot", &before.1), ("cls", &after.cls_center), ("patch", &after.patch_center)];
    for (kind, center) in all {
        let name = format!("center.{kind}.{done}");
        if fixture.has(&name) {
            let expected = fixture.floats(&name);
            let found = Array { shape: expected.shape.clone(), ..array(center.value.clone()) };
            check.values(&name, &expected, &found, Tolerance { atol: 2e-5, rtol_of_max: 2e-5 });
        }
    }
}

/// The optimizer's parameter groups.
fn multipliers(check: &mut Check, state: &TrainState) {
    let groups = check.fixture.json()["steps"][0]["param_groups"].as_array().expect("`param_groups`");
    for group in groups {
        // DINO's and iBOT's groups are lists of names: first those that are decayed, then those that are not.
        let names = group.as_array().or(group["params"].as_array()).expect("names");
        let decay = group["wd_multiplier"].as_f64().unwrap_or(if std::ptr::eq(group, &groups[0]) { 1.0 } else { 0.0 });
        let lr = group["lr_multiplier"].as_f64().unwrap_or(1.0);
        for name in names.iter().map(|name| name.as_str().expect("a name")) {
            let found = &state.optimizer.groups()[&parameter(name).expect("a parameter")];
            check.number(&format!("lr multiplier of {name}"), lr, found.lr_multiplier, groups::TOLERANCE);
            check.number(&format!("wd multiplier of {name}"), decay, found.weight_decay_multiplier, Tolerance::EXACT);
            let last = group["is_last_layer"].as_bool().unwrap_or(name.contains("last_layer"));
            if last != found.is_last_layer {
                check.failure(&format!("{name}: belongs to the last layer: {}", found.is_last_layer));
            }
        }
    }
}
