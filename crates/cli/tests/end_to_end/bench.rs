//! `dinoxide bench step`: what it measures, and what it refuses.

use serde_json::Value;

use crate::support::{Workplace, names};

#[test]
fn parts_of_the_step_add_up_to_less_than_the_step_and_nothing_is_written() {
    let place = Workplace::new();
    let args = ["bench", "step", "--config", "tiny.toml", "--steps", "3", "--json"];
    let done = place.run(&args).succeeded();
    let value: Value = serde_json::from_str(&done.stdout).expect("one JSON object");
    let rate = value["images_per_second"].as_f64().expect("a rate");
    let range = [value["lowest"].as_f64().expect("lowest"), value["highest"].as_f64().expect("highest")];
    assert!(range[0] <= rate && rate <= range[1] && range[0] > 0.0, "{value}");
    let parts = value["seconds"].as_object().expect("parts");
    assert_eq!(parts.len(), 5);
    for (name, seconds) in parts {
        let seconds = seconds.as_f64().expect("seconds");
        assert!(seconds > 0.0 && seconds < 4.0 / range[0], "{name}: {seconds} s of a step of four images at {rate}");
    }
    assert!(value["peak_bytes"].as_u64().expect("bytes") > 1_000_000);
    assert_eq!(names(&place.path(".")), ["tiny.toml"]);
}

#[test]
fn the_report_names_the_parts_and_their_shares() {
    let place = Workplace::new();
    let done = place.run(&["bench", "step", "--config", "tiny.toml", "--steps", "1"]).succeeded();
    for part in ["images/s", "memory", "teacher", "backward", "optimizer", "100.0 %"] {
        assert!(done.stdout.contains(part), "`{part}` is not in\n{}", done.stdout);
    }
    assert_eq!(done.stderr.lines().count(), 3, "a line for each step: {}", done.stderr);
}

#[test]
fn flags_are_those_of_train_and_stages_are_left_out() {
    let place = Workplace::new();
    let distilled = "extends = \"tiny.toml\"\ndistillation = { teacher = \"nowhere\" }\n\n[[stages]]\nname = \"one\"\n";
    place.write("distilled.toml", distilled);
    place.train("large", &["--length", "2 steps"]).succeeded();
    let run =
        |args: &[&str]| place.run(&[&["bench", "step", "--config", "distilled.toml", "--steps", "1"], args].concat());
    let hint = "nowhere: there is no such file or folder\n\nhint: give one with `--teacher`";
    run(&[]).failed(2, &[hint]);
    run(&["--device", "abacus"]).failed(2, &["abacus"]);
    run(&["--batch-size", "3", "--set", "train.batch_size=5"]).failed(2, &["`--batch-size`", "3 and 5"]);
    let done = run(&["--teacher", "large", "--batch-size", "3"]).succeeded();
    assert!(done.stdout.contains("steps of 3 images"), "{}", done.stdout);
    assert!(done.stderr.starts_with("note: measured is the recipe itself, without what its `[[stages]]` set\n"));
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let place = Workplace::new();
    let run = |args: &[&str]| place.run(&[&["bench", "step"], args].concat());
    run(&["--config", "tiny.toml", "--steps", "0"]).failed(2, &["`--steps 0`", "at least one"]);
    run(&["--config", "tinny.toml"]).failed(2, &["recipe `tinny.toml` not found"]);
    run(&["--config", "tiny.toml", "--set", "augmentation.global_crop_size=17"]).failed(2, &["17"]);
}
