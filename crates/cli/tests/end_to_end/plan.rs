//! `dinoxide plan`: what it foretells, and what then happens.

use serde_json::Value;

use crate::support::{Workplace, names};

fn plan(place: &Workplace, args: &[&str]) -> Value {
    let done = place.run(&[&["plan", "--config", "tiny.toml", "--json"], args].concat()).succeeded();
    serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", done.stdout))
}

fn size(place: &Workplace, folder: &str) -> u64 {
    let of = |name: String| {
        let path = format!("{folder}/{name}");
        if place.path(&path).is_dir() { size(place, &path) } else { place.read(&path).len() as u64 }
    };
    names(&place.path(folder)).into_iter().map(of).sum()
}

#[test]
fn the_disk_of_a_run_is_that_of_its_plan_and_nothing_is_written() {
    let place = Workplace::new();
    // Of eight blocks the plan sees two and four, in two and four of six micro-batches.
    let more = ["--set", "model.depth=8", "--set", "efficiency.micro_batches=6", "--set", "train.batch_size=12"];
    let found = plan(&place, &[&more[..], &["--seconds", "0"]].concat());
    assert_eq!(names(&place.path(".")), ["tiny.toml"]);
    let (run, trials) = (&found["runs"][0]["forecast"], found["runs"][0]["trials"].as_array().expect("trials"));
    let extent =
        |trial: &Value| [&trial["extent"]["blocks"], &trial["extent"]["parts"]].map(|n| n.as_u64().expect("a number"));
    assert_eq!(trials.iter().map(extent).collect::<Vec<_>>(), [[2, 2], [4, 2], [2, 4], [4, 4]]);
    assert_eq!(
        [&run["steps"], &run["evaluations"], &run["checkpoints"]].map(|n| n.as_u64()),
        [Some(10), Some(2), Some(4)]
    );
    for key in ["images_per_second", "step_seconds", "training_seconds"] {
        assert!(run[key].as_f64().is_some_and(|value| value.is_finite() && value > 0.0), "{key}: {run}");
    }
    // Of what takes no time to speak of, what is worked out may be none.
    for key in ["evaluation_seconds", "checkpoint_seconds"] {
        assert!(run[key].as_f64().is_some_and(|value| value.is_finite() && value >= 0.0), "{key}: {run}");
    }

    place.train("run", &more).succeeded();
    let near = |key: &str, happened: u64, tolerance: f64| {
        let foretold = run[key].as_f64().expect("a number");
        let off = (foretold - happened as f64).abs() / happened as f64;
        assert!(off < tolerance, "{key}: {foretold} foretold, {happened} happened");
    };
    near("checkpoint_bytes", size(&place, "run/checkpoints/step-000010"), 0.02);
    near("teacher_bytes", place.read("run/teacher.safetensors").len() as u64, 0.05);
    near("disk_bytes", size(&place, "run"), 0.05);
}

#[test]
fn the_whole_recipe_is_measured_where_that_is_quick_and_stages_are_planned_one_by_one() {
    let place = Workplace::new();
    let stages = "stages=[{ name = \"one\" }, { name = \"two\", set = { train = { length = \"6 steps\" } } }]";
    let found = plan(&place, &["--set", "model.depth=3", "--set", stages]);
    let runs = found["runs"].as_array().expect("runs");
    let steps: Vec<_> = runs.iter().map(|run| run["forecast"]["steps"].as_u64().expect("a number")).collect();
    let blocks =
        |run: &Value| run["trials"].as_array().expect("trials").iter().map(|t| t["extent"]["blocks"].clone()).collect();
    let blocks: Vec<Vec<Value>> = runs.iter().map(blocks).collect();
    assert_eq!((steps, blocks), (vec![10, 6], vec![vec![Value::from(3)]; 2]));
    let done = place.run(&["plan", "--config", "tiny.toml", "--set", stages, "--seconds", "0"]).succeeded();
    for part in
        ["stage       two", "images/s", "memory", "2 times k-NN", "checkpoints of", "all stages", "the whole recipe"]
    {
        assert!(done.stdout.contains(part), "`{part}` is not in\n{}", done.stdout);
    }
}

#[test]
fn flags_are_those_of_train_and_reach_what_is_measured() {
    let place = Workplace::new();
    let found = plan(&place, &["--batch-size", "6", "--length", "7 steps", "--lr", "1e-4", "--seed", "3"]);
    let run = &found["runs"][0];
    assert_eq!((&run["forecast"]["steps"], &run["forecast"]["batch_size"]), (&7.into(), &6.into()), "{run}");
    assert_eq!(run["trials"][0]["batch_size"], 6, "{run}");
    // A stage's own length is that of the stage.
    let stages = "stages=[{ name = \"one\", set = { train = { length = \"6 steps\" } } }]";
    let args = ["plan", "--config", "tiny.toml", "--seconds", "0", "--set", stages, "--length", "9 steps"];
    let done = place.run(&args).succeeded();
    let note = "note: `--length` has no effect in stage `one`, which sets `train.length`\n";
    assert_eq!(done.stderr.matches(note).count(), 1, "{}", done.stderr);
    assert!(done.stdout.contains("length      6 steps of 4 images"), "{}", done.stdout);
}

#[test]
fn what_cannot_be_planned_is_refused() {
    let place = Workplace::new();
    let run = |args: &[&str]| place.run(&[&["plan", "--config", "tiny.toml"], args].concat());
    run(&["--seconds", "-1"]).failed(2, &["`--seconds -1`"]);
    run(&["--data", "nowhere"]).failed(2, &["nowhere"]);
    run(&["--set", "augmentation.global_crop_size=17"]).failed(2, &["17"]);
    run(&["--device", "abacus"]).failed(2, &["abacus"]);
    run(&["--length", "0 steps"]).failed(2, &["\"0 steps\": there is nothing to plan for"]);
    run(&["--lr", "-1", "--seconds", "0"]).failed(2, &["`schedule.lr.peak` is -1"]);
    run(&["--lr", "1", "--set", "schedule.lr.peak=2"]).failed(2, &["`--lr` and `--set schedule.lr.peak=2`"]);
    let hint = "nowhere: there is no such file or folder\n\nhint: give one with `--teacher`";
    run(&["--teacher", "nowhere"]).failed(2, &[hint]);
    // Said before anything is measured.
    for wrong in [&["--lr", "-1"][..], &["--length", "1 steps"]] {
        let refused = run(wrong);
        refused.failed(2, &["`schedule.lr"]);
        assert!(!refused.stderr.contains("measuring"), "{}", refused.stderr);
    }
    // Weights of terabytes: said before anything is measured.
    let huge = run(&["--set", "dino_head.prototypes=16777216", "--set", "dino_head.bottleneck_dim=16000"]);
    if cfg!(target_os = "linux") {
        huge.failed(1, &["weights, moments and gradients alone", "are free", "dino_head.prototypes"]);
    }
    assert_eq!(names(&place.path(".")), ["tiny.toml"]);
}
