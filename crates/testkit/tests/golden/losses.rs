//! Fixture `losses`: every loss and centering, values and gradients with respect to the student.

use burn::tensor::{Device, Int, Tensor, TensorData, s};
use dinoxide_losses::{
    Loss,
    center::Center,
    dino, ibot,
    koleo::{koleo, koleo_in_groups},
    sinkhorn::sinkhorn_knopp,
};
use dinoxide_model::Precision::Fp32;
use dinoxide_testkit::{Array, Check};
use serde_json::Value;

use crate::{
    gram,
    heads::{Head, parameter_gradients},
    tensors::{array, gradient, gradients, tensor},
};

pub(crate) fn all(check: &mut Check) {
    let cases = check.fixture.hyper().as_object().expect("cases");
    for (case, hyper) in cases {
        let family = case.split(['_', '.']).take(2).collect::<Vec<_>>().join("_");
        match family.as_str() {
            "dino_v3" => dino_v3(check, case, hyper),
            "dino_v2" => dino_v2(check, case, hyper),
            "dino_v1" => dino_v1(check, case, hyper),
            "ibot_v1" => ibot_v1(check, case, hyper),
            "ibot_v2" => ibot_through_a_head(check, case, hyper),
            "ibot_masked" => ibot_masked(check, case, hyper),
            "sk_cls" | "sk_patch" => sinkhorn(check, case, hyper),
            "center_v2" => centers(check, case, hyper),
            "gram_resize" => gram::resized(check, case, hyper),
            _ if case.starts_with("gram.") => gram::tokens(check, case, hyper),
            _ if case.starts_with("koleo_") => spread(check, case),
            _ => panic!("a case `{case}` is not known"),
        }
    }
}

pub(crate) fn number(hyper: &Value, key: &str) -> f64 {
    hyper[key].as_f64().unwrap_or_else(|| panic!("`{key}` is {}", hyper[key]))
}

/// A leaf of the student's graph.
pub(crate) fn student<const D: usize>(check: &Check, name: &str) -> Tensor<D> {
    tensor::<D>(&check.fixture.floats(name), &Device::flex().autodiff()).require_grad()
}

/// A plain tensor.
pub(crate) fn plain<const D: usize>(check: &Check, name: &str) -> Tensor<D> {
    tensor(&check.fixture.floats(name), &Device::flex())
}

/// Compares a loss's value and its gradient, both multiplied by `factor`.
pub(crate) fn compare<const D: usize>(
    check: &mut Check,
    loss: &Loss,
    factor: f64,
    value: &str,
    x: &Tensor<D>,
    grad: &str,
) {
    check.scalar(value, loss.value.clone().into_scalar::<f32>() * factor as f32);
    let grads = (loss.graph.clone() * factor).backward();
    check.tensor(grad, &gradient(x, &grads));
}

/// Logits are given: prototypes that are the unit vectors make the bottleneck the logits.
fn unit_vectors(prototypes: usize) -> Tensor<2> {
    Tensor::eye(prototypes, &Device::flex().autodiff())
}

/// Crops outermost: `[S, B, K]` → `[S·B, K]`.
fn flat(x: Tensor<3>) -> Tensor<2> {
    let [crops, batch, prototypes] = x.dims();
    x.reshape([crops * batch, prototypes])
}

fn dino_v3(check: &mut Check, case: &str, hyper: &Value) {
    let x: Tensor<3> = student(check, &format!("{case}.in.student"));
    let targets: Tensor<3> = plain(check, &format!("{case}.in.teacher_probs"));
    let vectors = unit_vectors(x.dims()[2]);
    let ignore = hyper["ignore_diagonal"].as_bool().expect("`ignore_diagonal`");
    let temperature = number(hyper, "student_temp");
    let mut losses = vec![dino::global(flat(x.clone()), vectors.clone(), targets.clone(), temperature, ignore, Fp32)];
    if !ignore {
        // All pairs: the local loss is the same one.
        losses.push(dino::local(flat(x.clone()), vectors, targets, temperature, Fp32));
    }
    for loss in losses {
        compare(check, &loss, 1.0, &format!("{case}.out.loss"), &x, &format!("{case}.out.grad.student"));
    }
}

fn dino_v2(check: &mut Check, case: &str, hyper: &Value) {
    let global: Tensor<2> = student(check, &format!("{case}.in.global"));
    let local: Tensor<2> = student(check, &format!("{case}.in.local"));
    // The reference swaps the teacher's two crops beforehand, so that row i belongs to the other crop of the student's row i.
    let targets = plain::<3>(check, &format!("{case}.in.teacher_probs")).flip([0]);
    let [crops, batch, prototypes] = targets.dims();
    let temperature = number(hyper, "student_temp");
    let (global_pairs, local_pairs) = (crops * (crops - 1), local.dims()[0] / batch * crops);
    let pairs = (global_pairs + local_pairs) as f64;

    let loss = dino::global(global.clone(), unit_vectors(prototypes), targets.clone(), temperature, true, Fp32);
    compare(check, &loss, 1.0, &format!("{case}.out.loss_global"), &global, &format!("{case}.out.grad.global"));
    let scaled = loss.value.into_scalar::<f32>() * (global_pairs as f64 / pairs) as f32;
    check.scalar(&format!("{case}.out.loss_global_scaled"), scaled);

    // The reference sums over pairs where ours is a mean.
    let loss = dino::local(local.clone(), unit_vectors(prototypes), targets, temperature, Fp32);
    let (value, grad) = (format!("{case}.out.loss_local_sum"), format!("{case}.out.grad.local"));
    compare(check, &loss, local_pairs as f64, &value, &local, &grad);
    let scaled = loss.value.into_scalar::<f32>() * (local_pairs as f64 / pairs) as f32;
    check.scalar(&format!("{case}.out.loss_local_scaled"), scaled);
}

/// How many steps a case has: inputs `<prefix>0`, `<prefix>1`, …
fn steps(check: &Check, prefix: &str) -> usize {
    check.fixture.names(prefix).count()
}

fn dino_v1(check: &mut Check, case: &str, hyper: &Value) {
    let mut center: Option<Center> = None;
    for step in 0..steps(check, &format!("{case}.in.student.")) {
        let x: Tensor<2> = student(check, &format!("{case}.in.student.{step}"));
        let logits: Tensor<2> = plain(check, &format!("{case}.in.teacher.{step}"));
        let [rows, prototypes] = x.dims();
        let crops = hyper["ncrops"].as_u64().expect("`ncrops`") as usize;
        let batch = rows / crops;
        let teacher_crops = logits.dims()[0] / batch;
        let temperature = f64::from(check.fixture.scalar(&format!("{case}.out.temp.{step}")));
        let center =
            center.get_or_insert_with(|| Center::new(prototypes, number(hyper, "center_momentum"), &Device::flex()));
        let targets = center.targets(logits.clone(), temperature).reshape([teacher_crops, batch, prototypes]);
        center.update(logits);
        // Global crops come first: a student's crop meets every teacher's crop but its own.
        let loss =
            dino::global(x.clone(), unit_vectors(prototypes), targets, number(hyper, "student_temp"), true, Fp32);
        let (value, grad) = (format!("{case}.out.loss.{step}"), format!("{case}.out.grad.student.{step}"));
        compare(check, &loss, 1.0, &value, &x, &grad);
        check.tensor(&format!("{case}.out.center.{step}"), &array(center.value.clone()));
    }
}

/// iBOT's teacher temperature in an epoch: linear over the warm-up, both of its ends included.
fn ibot_temperature(hyper: &Value, suffix: &str, epoch: usize) -> f64 {
    let (first, last) =
        (number(hyper, &format!("warmup_teacher_temp{suffix}")), number(hyper, &format!("teacher_temp{suffix}")));
    let warmup = hyper["warmup_teacher_temp_epochs"].as_u64().expect("a warm-up") as usize;
    if epoch >= warmup { last } else { first + (last - first) * epoch as f64 / (warmup - 1).max(1) as f64 }
}

fn ibot_v1(check: &mut Check, case: &str, hyper: &Value) {
    let temperature = number(hyper, "student_temp");
    let epochs = hyper["epochs"].as_array().expect("`epochs`");
    let mut centers: Option<[Center; 2]> = None;
    for (step, epoch) in epochs.iter().enumerate() {
        let name = |part: &str| format!("{case}.{part}.{step}");
        let epoch = epoch.as_u64().expect("an epoch") as usize;
        let cls: Tensor<2> = student(check, &name("in.student_cls"));
        let local: Tensor<2> = student(check, &name("in.student_local_cls"));
        let patches: Tensor<3> = student(check, &name("in.student_patch"));
        let teacher_cls: Tensor<2> = plain(check, &name("in.teacher_cls"));
        let teacher_patches: Tensor<3> = plain(check, &name("in.teacher_patch"));
        let masks = check.fixture.array::<bool>(&name("in.mask"));
        let [crops_of_batch, patches_of_crop, patch_prototypes] = patches.dims();
        let prototypes = cls.dims()[1];
        let teacher_crops = hyper["ngcrops"].as_u64().expect("`ngcrops`") as usize;
        let batch = crops_of_batch / teacher_crops;
        let [center, patch_center] = centers.get_or_insert_with(|| {
            [(prototypes, "center_momentum"), (patch_prototypes, "center_momentum2")]
                .map(|(count, momentum)| Center::new(count, number(hyper, momentum), &Device::flex()))
        });

        let targets = center.targets(teacher_cls.clone(), ibot_temperature(hyper, "", epoch));
        let targets = targets.reshape([teacher_crops, batch, prototypes]);
        let students = Tensor::cat(vec![cls.clone(), local.clone()], 0);
        let cls_loss = dino::global(students, unit_vectors(prototypes), targets, temperature, true, Fp32);

        let masks = Array { shape: vec![crops_of_batch, patches_of_crop], values: masks.values };
        let all_patches = [crops_of_batch * patches_of_crop, patch_prototypes];
        let teacher_patches = teacher_patches.reshape(all_patches);
        let targets = patch_center.targets(teacher_patches.clone(), ibot_temperature(hyper, "2", epoch));
        let (rows, weights) = masked(&masks);
        let patch_loss = ibot::masked_patches(
            selected(patches.clone().reshape(all_patches), &rows),
            unit_vectors(patch_prototypes),
            selected(targets, &rows),
            weights,
            crops_of_batch,
            temperature,
            Fp32,
        );
        center.update(teacher_cls);
        patch_center.update(teacher_patches);

        let (w1, w2) = (number(hyper, "lambda1"), number(hyper, "lambda2"));
        let cls_value = cls_loss.value.into_scalar::<f32>() * w1 as f32;
        let patch_value = patch_loss.value.into_scalar::<f32>() * w2 as f32;
        check.scalar(&name("out.cls"), cls_value);
        check.scalar(&name("out.patch"), patch_value);
        check.scalar(&name("out.loss"), cls_value + patch_value);
        let grads = (cls_loss.graph * w1 + patch_loss.graph * w2).backward();
        check.tensor(&name("out.grad.cls"), &gradient(&cls, &grads));
        check.tensor(&name("out.grad.local"), &gradient(&local, &grads));
        check.tensor(&name("out.grad.patch"), &gradient(&patches, &grads));
        check.tensor(&name("out.center"), &array(center.value.clone()));
        check.tensor(&name("out.center2"), &array(patch_center.value.clone().unsqueeze::<3>()));
    }
}

/// Places of the masked patches of masks `[crops, P]`, and one over their number in the crop.
fn masked(masks: &Array<bool>) -> (Vec<i32>, Tensor<1>) {
    let patches = masks.shape[1];
    let mut rows = Vec::new();
    let mut weights = Vec::new();
    for (crop, mask) in masks.values.chunks_exact(patches).enumerate() {
        let count = mask.iter().filter(|&&masked| masked).count();
        rows.extend((0..patches).filter(|&p| mask[p]).map(|p| (crop * patches + p) as i32));
        weights.extend(std::iter::repeat_n(1.0 / count as f32, count));
    }
    (rows, Tensor::from_data(TensorData::from(weights.as_slice()), &Device::flex()))
}

/// These rows of a matrix.
pub(crate) fn selected(x: Tensor<2>, rows: &[i32]) -> Tensor<2> {
    let rows = Tensor::<1, Int>::from_data(TensorData::from(rows), &x.device());
    x.select(0, rows)
}

fn ibot_masked(check: &mut Check, case: &str, hyper: &Value) {
    let temperature = number(hyper, "student_temp");
    let masks = check.fixture.array::<bool>(&format!("{case}.in.masks"));
    let (rows, weights) = masked(&masks);
    check.tensor(&format!("{case}.in.masks_weight"), &array(weights.clone()));
    let crops = masks.shape[0];
    for version in ["v2", "v3"] {
        let x: Tensor<2> = student(check, &format!("{case}.in.student"));
        let targets = plain(check, &format!("{case}.in.teacher_probs"));
        let vectors = unit_vectors(x.dims()[1]);
        let loss = ibot::masked_patches(x.clone(), vectors, targets, weights.clone(), crops, temperature, Fp32);
        let prefix = format!("{case}.out.{version}");
        compare(check, &loss, 1.0, &format!("{prefix}.loss"), &x, &format!("{prefix}.grad.student"));
        // The reference finds the same weights itself when it is given none.
        check.scalar(&format!("{prefix}.loss_noweight_arg"), loss.value.into_scalar());
    }
    let x: Tensor<3> = student(check, &format!("{case}.in.student_full"));
    let targets: Tensor<3> = plain(check, &format!("{case}.in.teacher_full"));
    let vectors = unit_vectors(x.dims()[2]);
    let (x_rows, target_rows) = (selected(flat(x.clone()), &rows), selected(flat(targets), &rows));
    let loss = ibot::masked_patches(x_rows, vectors, target_rows, weights, crops, temperature, Fp32);
    let prefix = format!("{case}.out.full");
    compare(check, &loss, 1.0, &format!("{prefix}.loss"), &x, &format!("{prefix}.grad.student"));
}

/// Masked tokens through a head into the loss, with the reference's padding of the student's rows.
fn ibot_through_a_head(check: &mut Check, case: &str, hyper: &Value) {
    let fixture = check.fixture;
    let input = |name: &str| format!("{case}.in.{name}");
    let output = |name: &str| format!("{case}.out.{name}");
    let head = Head::of(fixture, &input("w."), &output("grad."));
    let device = Device::flex().autodiff();
    let (student_head, teacher_head) = (head.build(&device), head.build(&Device::flex()));

    let masks = fixture.array::<bool>(&input("masks"));
    let (rows, weights) = masked(&masks);
    check.tensor(&input("masks_weight"), &array(weights.clone()));
    let indices: Vec<i32> = fixture.array::<i64>(&input("mask_indices")).values.iter().map(|&i| i as i32).collect();
    if indices != rows {
        check.failure(&format!("{case}: masked patches are at {rows:?}, the reference's at {indices:?}"));
    }

    let tokens: Tensor<3> = plain(check, &input("teacher_tokens"));
    let cls: Tensor<2> = plain(check, &input("teacher_cls"));
    let logits = teacher_head.forward_patches(selected(flat(tokens.clone()), &rows));
    check.tensor(&output("teacher_after_head"), &array(logits.clone()));
    // Through a head that CLS and patches share, in one pass.
    let (first, count) = (cls.dims()[0], rows.len());
    let both = teacher_head.forward(Tensor::cat(vec![cls, selected(flat(tokens), &rows)], 0));
    check.tensor(&output("teacher_after_shared_head"), &array(both.slice(s![first..first + count, ..])));
    let targets = sinkhorn_knopp(logits, number(hyper, "teacher_temp"), 3);
    check.tensor(&output("probs"), &array(targets.clone()));

    let x: Tensor<3> = student(check, &input("student_tokens"));
    let x_rows = selected(flat(x.clone()), &rows);
    let padding = hyper["upperbound"].as_u64().expect("`upperbound`") as usize - count;
    let padded = Tensor::cat(vec![x_rows.clone(), Tensor::zeros([padding, x.dims()[2]], &device)], 0);
    check.tensor(&output("student_after_head_incl_padding"), &array(student_head.forward_patches(padded)));
    let loss = ibot::masked_patches(
        student_head.bottleneck(x_rows),
        student_head.patch_prototypes().vectors(),
        targets,
        weights,
        masks.shape[0],
        // The reference's constant.
        0.1,
        Fp32,
    );
    check.scalar(&output("loss"), loss.value.into_scalar());
    let grads = loss.graph.backward();
    check.tensor(&output("grad.student_tokens"), &gradient(&x, &grads));
    let mut found = gradients(&student_head, &grads);
    found.insert("student_tokens".into(), gradient(&x, &grads));
    parameter_gradients(check, &output("grad."), found);
}

fn sinkhorn(check: &mut Check, case: &str, hyper: &Value) {
    let logits: Tensor<2> = plain(check, &format!("{case}.in.teacher"));
    let iterations = hyper["n_iterations"].as_u64().expect("`n_iterations`") as usize;
    let found = sinkhorn_knopp(logits, number(hyper, "teacher_temp"), iterations);
    check.tensor(&format!("{case}.out.probs"), &array(found));
}

fn centers(check: &mut Check, case: &str, hyper: &Value) {
    let temperatures = hyper["temps"].as_array().expect("`temps`");
    for (kind, axes) in [("cls", 2), ("patch", 3)] {
        let mut center: Option<Center> = None;
        let shaped = |center: &Center| match axes {
            2 => array(center.value.clone()),
            _ => array(center.value.clone().unsqueeze::<3>()),
        };
        for (step, temperature) in temperatures.iter().enumerate() {
            let logits: Tensor<2> = plain(check, &format!("{case}.in.{kind}.{step}"));
            let momentum = number(hyper, "center_momentum");
            let center = center.get_or_insert_with(|| Center::new(logits.dims()[1], momentum, &Device::flex()));
            check.tensor(&format!("{case}.out.{kind}_center_used.{step}"), &shaped(center));
            let targets = center.targets(logits.clone(), temperature.as_f64().expect("a temperature"));
            check.tensor(&format!("{case}.out.{kind}_probs.{step}"), &array(targets));
            center.update(logits);
        }
        check.tensor(&format!("{case}.out.{kind}_center_final"), &shaped(&center.expect("a step")));
    }
}

/// KoLeo: `<case>.out.{v2,v3,topk<k>}.*`.
fn spread(check: &mut Check, case: &str) {
    let prefix = format!("{case}.out.");
    let variants: Vec<&str> =
        check.fixture.names(&prefix).filter_map(|name| name[prefix.len()..].strip_suffix(".loss")).collect();
    for variant in variants {
        let x: Tensor<2> = student(check, &format!("{case}.in.x"));
        let batch = x.dims()[0];
        let loss = match variant.strip_prefix("topk") {
            Some(nearest) => koleo_in_groups(x.clone(), nearest.parse().expect("a number"), batch),
            None => koleo(x.clone()),
        };
        compare(check, &loss, 1.0, &format!("{prefix}{variant}.loss"), &x, &format!("{prefix}{variant}.grad"));
    }
}
