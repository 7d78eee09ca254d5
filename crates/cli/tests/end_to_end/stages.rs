//! Stages of one recipe, and the Gram teachers and crop sizes that differ between them.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::resume::assert_same_run;
use crate::support::{Workplace, names};

/// Pretraining, Gram anchoring with a copy that is replaced, and crops of two sizes with fresh moments.
const STAGES: &str = r#"extends = "tiny.toml"

[[stages]]
name = "pretrain"
[stages.set.train]
length = "60 steps"

[[stages]]
name = "gram"
[stages.set.train]
length = "40 steps"
[stages.set.loss.gram]
weight = 2.0
teacher = "snapshot"
refresh_every = "9 steps"
max_refreshes = 2
[stages.set.augmentation]
gram_crop_size = 24
gram_crop_distorted = false
[stages.set.schedule]
form = "blocks"
loss = { gram = { start = 0.0, peak = 1.0, end = 0.5, warmup = "5 steps", cosine = "10 steps" } }

[[stages]]
name = "high-resolution"
[stages.set.init]
take = "weights"
[stages.set.train]
length = "40 steps"
[stages.set.loss.gram]
weight = 1.5
teacher = "snapshot"
[[stages.set.augmentation.sizes]]
global = 16
local = 8
gram = 24
share = 0.5
[[stages.set.augmentation.sizes]]
global = 24
local = 12
gram = 32
share = 0.5
"#;

const NAMES: [&str; 3] = ["pretrain", "gram", "high-resolution"];

fn place() -> Workplace {
    let place = Workplace::new();
    place.write("stages.toml", STAGES);
    place
}

fn lines(place: &Workplace, run: &str) -> usize {
    let metrics = std::fs::read(place.path(run).join("metrics.jsonl")).unwrap_or_default();
    metrics.iter().filter(|byte| **byte == b'\n').count()
}

#[test]
fn stages_killed_in_each_of_them_equal_uninterrupted_ones() {
    let place = place();
    let straight = place.run(&["train", "--config", "stages.toml", "--run", "straight"]).succeeded();
    assert!(straight.stdout.starts_with("k-NN accuracy: "), "{}", straight.stdout);
    for (i, stage) in NAMES.iter().enumerate() {
        assert!(straight.stderr.contains(&format!("stage      {} of 3: {stage}", i + 1)), "{}", straight.stderr);
    }
    for stage in NAMES {
        let mut child = place
            .command(&["train", "--config", "stages.toml", "--run", "killed"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary starts");
        let start = Instant::now();
        // Two lines a step: in the middle of the stage.
        while lines(&place, &format!("killed/{stage}")) < 45 {
            assert!(child.try_wait().expect("a child").is_none(), "the run ended before its stage {stage}");
            assert!(start.elapsed() < Duration::from_secs(60), "no stage {stage} within a minute");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().expect("a running child");
        assert!(!child.wait().expect("a child").success(), "{stage} was not killed");
    }
    let resumed = place.run(&["train", "--resume", "killed"]).succeeded();
    assert!(resumed.stderr.contains("stage      2 of 3: gram, finished before"), "{}", resumed.stderr);
    for stage in NAMES {
        assert_same_run(&place, &format!("straight/{stage}"), &format!("killed/{stage}"));
    }
    assert_eq!(names(&place.path("straight")), names(&place.path("killed")));
    assert!(place.read("straight/teacher.safetensors") == place.read("straight/high-resolution/teacher.safetensors"));

    // No stage draws what the one before it drew.
    for (stage, seed) in NAMES.iter().zip(0..) {
        let config = String::from_utf8(place.read(&format!("straight/{stage}/config.toml"))).expect("text");
        let config: toml::Table = config.parse().expect("TOML");
        assert_eq!(config["train"]["seed"].as_integer(), Some(seed), "{stage}");
    }

    // What the stages asked for was done.
    let gram = place.metrics("straight/gram");
    let losses = |line: &serde_json::Value| line["losses"]["gram"].as_f64();
    let steps: Vec<_> = gram.iter().filter(|line| line["kind"] == "step").collect();
    assert_eq!(steps.len(), 40);
    assert_eq!(losses(steps[0]), None, "the weight is 0 in the first step");
    assert!(steps[1..].iter().all(|step| losses(step).is_some_and(|loss| loss > 0.0)));
    // A copy of the teacher as it is differs from it by nothing but what the student has not unlearned yet.
    assert!(losses(steps[9]).expect("a loss").is_finite());
}

#[test]
fn a_stage_alone_starts_from_given_weights_or_from_a_run() {
    let place = place();
    place.run(&["train", "--config", "stages.toml", "--run", "all"]).succeeded();
    let alone = ["train", "--config", "stages.toml", "--stage", "gram", "--init"];
    place.run(&[&alone[..], &["all/pretrain", "--run", "alone"]].concat()).succeeded();
    // A stage's own configuration says where it started.
    assert_same_run(&place, "all/gram", "alone/gram");
    let from_file =
        place.run(&[&alone[..], &["all/pretrain/teacher.safetensors", "--run", "file"]].concat()).succeeded();
    assert!(from_file.stderr.contains("`dino_head` starts from fresh weights"), "{}", from_file.stderr);
}

#[test]
fn what_a_stage_sets_itself_is_named_where_the_command_line_sets_it_too() {
    let place = place();
    let given = ["--length", "30 steps", "--seed", "5", "--set", "loss.gram.max_refreshes=0"];
    let run = |more: &[&str]| -> Vec<String> {
        let done = place.run(&[&["train", "--config", "stages.toml"], &given[..], more].concat()).succeeded();
        done.stderr.lines().filter(|line| line.starts_with("note: ")).map(str::to_owned).collect()
    };
    let length = |stage: &str| format!("note: `--length` has no effect in stage `{stage}`, which sets `train.length`");
    let both = "note: `--length`, `--set loss.gram.max_refreshes=0` have no effect in stage `gram`, which sets \
                `train.length`, `loss.gram.max_refreshes`";
    assert_eq!(run(&["--run", "all"]), [length("pretrain"), both.to_owned(), length("high-resolution")]);
    assert_eq!(run(&["--run", "alone", "--stage", "gram", "--init", "all/pretrain"]), [both]);
}

#[test]
fn mistakes_in_stages_are_named_before_anything_is_trained() {
    let place = place();
    let stage = |set: &str| format!("extends = \"tiny.toml\"\n\n[[stages]]\nname = \"one\"\n{set}");
    let gram = |set: &str| stage(&format!("[stages.set.loss.gram]\nweight = 1.0\n{set}"));
    let cases: [(String, &[&str]); 11] = [
        (
            gram("teacher = \"snapshot\"\n[stages.set.augmentation]\ngram_crop_size = 18\n"),
            &["stage `one`", "`augmentation.gram_crop_size`", "18 is not a multiple of"],
        ),
        (
            gram("teacher = \"snapshot\"\nrefresh_from = \"8 steps\"\n[stages.set.train]\nlength = \"8 steps\"\n"),
            &["stage `one`", "`loss.gram.refresh_from` is \"8 steps\", which is step 8, and the run has 8"],
        ),
        (
            gram("teacher = \"a file\"\nrefresh_from = \"3 steps\"\n"),
            &["`loss.gram.refresh_from` is \"3 steps\" and `loss.gram.refresh_every` 0", "a file"],
        ),
        (
            stage("[stages.set.train]\nlenght = \"5 steps\"\n"),
            &["stage `one`", "unknown key `train.lenght`", "`train.length`"],
        ),
        (stage("[stages.set.train]\nlength = 5\n"), &["stage `one`", "`train.length`"]),
        (stage("[stages.set.train]\nlength = \"1 images\"\n"), &["stage `one`", "not a single step"]),
        (stage("[stages.set]\nstages = []\n"), &["stage `one` has stages of its own"]),
        ("extends = \"tiny.toml\"\n\n[[stages]]\nname = \"a/b\"\n".into(), &["a stage is called `a/b`", "letters"]),
        (
            "extends = \"tiny.toml\"\n\n[[stages]]\nname = \"a\"\n[[stages]]\nname = \"a\"\n".into(),
            &["two stages are called `a`"],
        ),
        (
            stage("[stages.set.loss.gram]\nweight = 1.0\nteacher = \"ema\"\nrefresh_every = \"3 steps\"\n"),
            &["stage `one`", "`loss.gram.teacher` is \"ema\"", "\"snapshot\""],
        ),
        (
            stage("[stages.set.loss.gram]\nweight = 1.0\ntokens = \"masked\"\n"),
            &["stage `one`", "`loss.gram.tokens`", "`loss.gram.per_image = false`"],
        ),
    ];
    for (recipe, parts) in &cases {
        place.write("wrong.toml", recipe);
        place.run(&["train", "--config", "wrong.toml", "--run", "run"]).failed(2, parts);
        assert!(!place.path("run").exists(), "{recipe}");
    }
    assert_eq!(cases.len(), 11);
    let unknown = ["train", "--config", "stages.toml", "--stage", "grams", "--init", "x", "--run", "run"];
    place.run(&unknown).failed(2, &["there is no stage `grams`", "`gram`"]);
}
