//! `dinoxide eval linear --augment`.

use serde_json::Value;

use crate::eval::{eval, one_object, place};
use crate::support::finish;

const SHORT: [&str; 8] = ["--augment", "--iterations", "4", "--samples", "6", "--grid", "dinov3", "--json"];

#[test]
fn a_probe_on_random_crops_says_so_and_is_not_compared_with_one_on_central_crops() {
    let place = place();
    let found = eval(&place, "linear", &[&SHORT[..], &["--output", "a.json"]].concat()).succeeded().stdout;
    let result = one_object(&found);
    let stamp = result["protocol"]["features"][0]["augmentation"].as_str().expect("a stamp");
    assert!(stamp.starts_with("random resized crop, area 0.08 to 1, "), "{stamp}");
    assert_eq!(result["scores"]["candidates"].as_array().map(Vec::len), Some(13));
    assert_eq!(result["scores"]["selection"]["on"], "held_out");
    assert_eq!((&result["protocol"]["train_samples"], &result["protocol"]["val_samples"]), (&24.into(), &9.into()));
    assert!(result["scores"]["interval"]["low"].is_number());
    let plain = [&SHORT[1..], &["--output", "b.json"]].concat();
    let central = one_object(&eval(&place, "linear", &plain).succeeded().stdout);
    assert_eq!(central["protocol"]["features"][0]["augmentation"], "none");
    // The same images are held out.
    assert_eq!(central["scores"]["selection"]["samples"], result["scores"]["selection"]["samples"]);
    place.run(&["eval", "compare", "a.json", "b.json"]).failed(
        2,
        &["a.json and b.json were not measured alike", "linear: features[0].augmentation is \"random resized crop"],
    );
    let losses = |result: &Value| {
        let all = result["scores"]["candidates"].as_array().expect("candidates");
        all.iter().map(|one| one["loss"].as_f64().expect("a loss")).collect::<Vec<_>>()
    };
    assert!(losses(&result).iter().zip(losses(&central)).all(|(a, b)| (a - b).abs() > 1e-9), "other crops");
}

#[test]
fn a_probe_on_random_crops_does_not_depend_on_threads_or_on_the_size_of_a_forward() {
    let place = place();
    let with = |threads: &str, batch: &str| {
        let common = ["eval", "linear", "--weights", "run/teacher.safetensors", "--train", "train", "--val", "val"];
        let mut command = place.command(&[&common[..], &SHORT, &["--batch-size", batch]].concat());
        one_object(&finish(command.env("RAYON_NUM_THREADS", threads)).succeeded().stdout)
    };
    let one = with("1", "4");
    assert_eq!(one, with("3", "4"));
    let other = with("2", "64");
    assert_eq!(one["scores"]["top1"], other["scores"]["top1"]);
    let loss = |result: &Value| result["scores"]["loss"].as_f64().expect("a loss");
    assert!((loss(&one) - loss(&other)).abs() < 1e-5, "{one} {other}");
}

#[test]
fn learning_rates_can_be_chosen() {
    let place = place();
    let args = ["--iterations", "4", "--samples", "6", "--grid", "dinov3", "--json", "--lr"];
    let rates = |list: &str| {
        let result = one_object(&eval(&place, "linear", &[&args[..], &[list]].concat()).succeeded().stdout);
        let all = result["scores"]["candidates"].as_array().expect("candidates").clone();
        all.iter().map(|one| one["learning_rate"].as_f64().expect("a rate")).collect::<Vec<_>>()
    };
    assert_eq!(rates("0.02"), [0.02]);
    assert_eq!(rates("0.1,1e-3"), [0.1, 1e-3]);
    for list in ["0", "0.1,-1", "inf"] {
        let list = format!("--lr={list}");
        let refused = eval(&place, "linear", &[&args[..7], &[list.as_str()]].concat());
        refused.failed(2, &["linear: `--lr` is [", "it must be a list of numbers above 0, at least one"]);
    }
}

#[test]
fn train_images_that_cannot_be_read_are_left_out_of_random_crops() {
    let place = place();
    place.write("train/cat/broken.png", "no image");
    let found = eval(&place, "linear", &SHORT).succeeded();
    let warnings = found.stderr.lines().filter(|line| line.starts_with("warning: cat/broken.png: ")).count();
    assert_eq!(warnings, 1, "{}", found.stderr);
    assert_eq!(one_object(&found.stdout)["protocol"]["train_samples"], 24);
    place.write("bad/cat/a.png", "no image");
    place.write("bad/dog/a.png", "no image");
    let args = ["eval", "linear", "--weights", "run/teacher.safetensors", "--train", "bad", "--val", "bad"];
    place.run(&[&args[..], &SHORT].concat()).failed(1, &["features: none of the 2 image(s) can be read"]);
}
