//! Fixture `schedules`: the schedules of every shipped configuration, through the trainer's curves.

use std::collections::BTreeMap;

use dinoxide_testkit::{Check, Tolerance};
use dinoxide_trainer::schedule::{Curve, Form, GramRefresh, LrScaling, Schedule};
use serde_json::Value;

/// In double precision; cosines differ by their last digits between libraries.
const TOLERANCE: Tolerance = Tolerance { atol: 1e-18, rtol_of_max: 1e-12 };

pub(crate) fn all(check: &mut Check) {
    let json = check.fixture.json();
    for (name, config) in json["configs"].as_object().expect("`configs`") {
        match config["style"].as_str() {
            Some("old") => configured(check, name, config, &old(config, name.starts_with("dinov3"))),
            Some("v2-schedules") => configured(check, name, config, &blocks(config)),
            None => dino(check, name, config),
            Some(other) => panic!("{name}: the style is `{other}`"),
        }
    }
    for (i, raw) in json["raw"].as_array().expect("`raw`").iter().enumerate() {
        one(check, &format!("raw.{i}"), raw);
    }
}

fn number(object: &Value, key: &str) -> f64 {
    object[key].as_f64().unwrap_or_else(|| panic!("`{key}` is {}, not a number", object[key]))
}

fn count(object: &Value, key: &str) -> u64 {
    object[key].as_u64().unwrap_or_else(|| panic!("`{key}` is {}, not a count", object[key]))
}

/// A curve without options.
fn plain(form: Form, [start, peak, end]: [f64; 3], warmup: u64, total: u64) -> Curve {
    Curve { form, start, peak, end, warmup, cosine: None, trunc_extra: 0.0, total }
}

/// The run of a configuration, by the number of images in a batch.
type Run = dyn Fn(usize) -> Schedule;

/// Options in the form `lr`, `min_lr`, `warmup_epochs` (DINOv2, and DINOv3 by default).
fn old(config: &Value, is_v3: bool) -> Box<Run> {
    let (cfg, total) = (config["schedule_cfg"].clone(), count(config, "total_iters"));
    let epoch = count(config, "epoch_length");
    let steps = move |epochs: f64| (epochs * epoch as f64) as u64;
    let scaling = match config["scaling_rule"].as_str() {
        Some("sqrt_wrt_1024") if is_v3 => LrScaling::Sqrt1024Times4,
        Some("sqrt_wrt_1024") => LrScaling::Sqrt1024,
        Some("linear_wrt_256") => LrScaling::Linear256,
        _ => LrScaling::None,
    };
    Box::new(move |batch| {
        let teacher = &cfg["teacher"];
        let trunc_extra = cfg["trunc_extra"].as_f64().unwrap_or(0.0);
        let curve = |values: [f64; 3], warmup: u64| Curve { trunc_extra, ..plain(Form::Cosine, values, warmup, total) };
        let peak = number(&cfg, if cfg["base_lr"].is_null() { "lr" } else { "base_lr" }) * scaling.factor(batch);
        let [decay, decay_end] = ["weight_decay", "weight_decay_end"].map(|key| number(&cfg, key));
        let [momentum, momentum_end] = ["momentum_teacher", "final_momentum_teacher"].map(|key| number(teacher, key));
        let [cold, warm] = ["warmup_teacher_temp", "teacher_temp"].map(|key| number(teacher, key));
        let teacher_temp = curve([cold, warm, warm], steps(number(teacher, "warmup_teacher_temp_epochs")));
        Schedule {
            lr: curve([0.0, peak, number(&cfg, "min_lr")], steps(number(&cfg, "warmup_epochs"))),
            weight_decay: curve([decay, decay, decay_end], 0),
            teacher_momentum: curve([momentum, momentum, momentum_end], 0),
            teacher_patch_temp: teacher_temp.clone(),
            teacher_temp,
            freeze_steps: steps(number(&cfg, "freeze_last_layer_epochs")),
            total,
            freeze_backbone_steps: 0,
            loss: BTreeMap::new(),
            gram_refresh: GramRefresh::default(),
        }
    })
}

/// `{start, peak, end, warmup_epochs, cosine_epochs}`, DINOv3's second form.
fn block(value: &Value, config: &Value, factor: f64) -> Curve {
    let epoch = count(config, "epoch_length") as f64;
    let steps = |epochs: f64| (epochs * epoch) as u64;
    let [start, peak, end] = ["start", "peak", "end"].map(|key| number(value, key));
    let warmup = steps(number(value, "warmup_epochs"));
    let cosine = value["cosine_epochs"].as_f64().map(steps);
    Curve { cosine, ..plain(Form::Blocks, [start, peak * factor, end * factor], warmup, count(config, "total_iters")) }
}

fn blocks(config: &Value) -> Box<Run> {
    let scaling = match config["scaling_rule"].as_str() {
        Some("sqrt_wrt_1024") => LrScaling::Sqrt1024Times4,
        Some("linear_wrt_256") => LrScaling::Linear256,
        _ => LrScaling::None,
    };
    let config = config.clone();
    Box::new(move |batch| {
        let cfg = &config["schedule_cfg"];
        let freeze = cfg["lr"]["freeze_last_layer_epochs"].as_f64().unwrap_or(0.0);
        Schedule {
            lr: block(&cfg["lr"], &config, scaling.factor(batch)),
            weight_decay: block(&cfg["weight_decay"], &config, 1.0),
            teacher_momentum: block(&cfg["momentum"], &config, 1.0),
            teacher_temp: block(&cfg["teacher_temp"], &config, 1.0),
            teacher_patch_temp: block(&cfg["teacher_temp"], &config, 1.0),
            freeze_steps: (freeze * count(&config, "epoch_length") as f64) as u64,
            total: count(&config, "total_iters"),
            freeze_backbone_steps: 0,
            loss: BTreeMap::new(),
            gram_refresh: GramRefresh::default(),
        }
    })
}

/// The steps at which a configuration was sampled.
fn steps(config: &Value) -> Vec<u64> {
    config["iters"].as_array().expect("`iters`").iter().map(|step| step.as_u64().expect("a step")).collect()
}

/// Compares a list of values, sampled at `steps`.
fn sampled(check: &mut Check, case: &str, expected: &Value, steps: &[u64], found: impl Fn(u64) -> f64) {
    let expected = expected.as_array().unwrap_or_else(|| panic!("{case} is a list"));
    assert_eq!(expected.len(), steps.len(), "{case}: one value for each step");
    for (expected, &step) in expected.iter().zip(steps) {
        check.number(&format!("{case} at {step}"), expected.as_f64().expect("a number"), found(step), TOLERANCE);
    }
}

fn configured(check: &mut Check, name: &str, config: &Value, run: &Run) {
    let iters = steps(config);
    let batch = count(config, "batch_size_per_gpu") as usize;
    for (world, expected) in config["lr"].as_object().expect("`lr`") {
        let schedule = run(batch * world.parse::<usize>().expect("a number of processes"));
        sampled(check, &format!("{name}: lr of {world}"), expected, &iters, |step| schedule.at(step).lr);
        for &step in &iters {
            let at = schedule.at(step);
            // Listed are the steps in which the two differ; everywhere else they are the same.
            let listed = config["last_layer_lr_zero_iters"].as_array().expect("steps").contains(&Value::from(step));
            let expected = if listed { 0.0 } else { at.lr };
            check.number(
                &format!("{name}: last layer's lr of {world} at {step}"),
                expected,
                if at.last_layer_frozen { 0.0 } else { at.lr },
                TOLERANCE,
            );
        }
    }
    let schedule = run(batch);
    sampled(check, &format!("{name}: wd"), &config["wd"], &iters, |step| schedule.at(step).weight_decay);
    sampled(check, &format!("{name}: momentum"), &config["momentum"], &iters, |step| {
        schedule.at(step).teacher_momentum
    });
    sampled(check, &format!("{name}: teacher_temp"), &config["teacher_temp"], &iters, |step| {
        schedule.at(step).teacher_temp
    });
    for weight in ["gram_weight", "local_weight"] {
        let options = &config[format!("{weight}_cfg")];
        if !options.is_null() {
            let curve = block(options, config, 1.0);
            sampled(check, &format!("{name}: {weight}"), &config[weight], &iters, |step| curve.at(step));
        }
    }
}

/// The defaults of DINO's command line: 100 epochs, the first 10 of them warm-up, a rate of 0.0005 per 256 images.
fn dino(check: &mut Check, name: &str, config: &Value) {
    let iters = steps(config);
    let epoch = count(config, "niter_per_ep");
    let batch = count(config, "batch_size_per_gpu") as usize;
    let total = 100 * epoch;
    for (world, expected) in config["lr"].as_object().expect("`lr`") {
        let factor = LrScaling::Linear256.factor(batch * world.parse::<usize>().expect("a number of processes"));
        let curve = plain(Form::Cosine, [0.0, 0.0005 * factor, 1e-6], 10 * epoch, total);
        sampled(check, &format!("{name}: lr of {world}"), expected, &iters, |step| curve.at(step));
    }
    let curve = plain(Form::Cosine, [0.04, 0.04, 0.4], 0, total);
    sampled(check, &format!("{name}: wd"), &config["wd"], &iters, |step| curve.at(step));
    let curve = plain(Form::Cosine, [0.996, 0.996, 1.0], 0, total);
    sampled(check, &format!("{name}: momentum"), &config["momentum"], &iters, |step| curve.at(step));
    for (label, expected) in config["teacher_temp_per_epoch"].as_object().expect("temperatures") {
        // `<name>(<first>,<last>,<epochs of warm-up>) ...`
        let numbers = label.split(['(', ')']).nth(1).expect("numbers in parentheses");
        let numbers: Vec<f64> = numbers.split(',').map(|number| number.parse().expect("a number")).collect();
        let curve = plain(Form::Cosine, [numbers[0], numbers[1], numbers[1]], numbers[2] as u64, 100);
        let epochs: Vec<u64> = (0..expected.as_array().expect("values").len() as u64).collect();
        sampled(check, &format!("{name}: {label}"), expected, &epochs, |epoch| curve.at(epoch));
    }
}

/// One curve by itself, at every step and after the last.
fn one(check: &mut Check, case: &str, raw: &Value) {
    let args = &raw["args"];
    let or_zero = |key: &str| args[key].as_u64().unwrap_or(0);
    let (curve, freeze) = match raw["fn"].as_str() {
        Some("v2.CosineScheduler" | "v3.CosineScheduler") => {
            let freeze = or_zero("freeze_iters");
            let start = args["start_warmup_value"].as_f64().unwrap_or(0.0);
            let values = [start, number(args, "base_value"), number(args, "final_value")];
            let total = count(args, "total_iters") - freeze;
            let trunc_extra = args["trunc_extra"].as_f64().unwrap_or(0.0);
            (Curve { trunc_extra, ..plain(Form::Cosine, values, or_zero("warmup_iters"), total) }, freeze)
        }
        Some("v3.linear_warmup_cosine_decay") => {
            let values = ["start", "peak", "end"].map(|key| number(args, key));
            let cosine = args["cosine_iterations"].as_u64();
            let curve = plain(Form::Blocks, values, count(args, "warmup_iterations"), count(args, "total_iterations"));
            (Curve { cosine, ..curve }, 0)
        }
        other => panic!("{case}: the function is {other:?}"),
    };
    let values = raw["values"].as_array().expect("`values`").len() as u64;
    let steps: Vec<u64> = (0..values).collect();
    // Frozen steps come before the curve begins.
    sampled(check, case, &raw["values"], &steps, |step| step.checked_sub(freeze).map_or(0.0, |step| curve.at(step)));
    if let Some(end) = raw["beyond_end"].as_f64() {
        check.number(&format!("{case} after the end"), end, curve.at(values), TOLERANCE);
    }
}
