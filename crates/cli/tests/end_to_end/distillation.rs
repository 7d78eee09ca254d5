//! Learning from a frozen teacher, and starting from trained weights.

use crate::support::{Workplace, names};

/// A teacher that is wider than the tiny recipe's student.
fn place_with_teacher() -> Workplace {
    let place = Workplace::new();
    let wide = ["--set", "model.embed_dim=48", "--set", "model.num_heads=3", "--set", "dino_head.hidden_dim=24"];
    place.train("large", &wide).succeeded();
    place
}

const TEACHER: [&str; 2] = ["--set", "distillation.teacher='large'"];
const NO_HEADS: [&str; 6] =
    ["--set", "loss.dino_weight=0", "--set", "loss.ibot_weight=0", "--set", "loss.koleo_weight=0"];

fn last_losses(place: &Workplace, run: &str) -> serde_json::Value {
    let metrics = place.metrics(run);
    metrics.iter().rev().find(|line| line["kind"] == "step").expect("a step")["losses"].clone()
}

#[test]
fn a_student_learns_from_heads_features_and_similarities() {
    let place = place_with_teacher();
    let heads = place.train("heads", &TEACHER).succeeded();
    assert!(heads.stderr.contains("ln K") && heads.stderr.contains("2 × 16 px, 2 × 8 px"), "{}", heads.stderr);
    let losses = last_losses(&place, "heads");
    assert!(losses["dino_local"].is_f64() && losses["ibot"].is_f64() && losses["feature_cls"].is_null(), "{losses}");

    let file = ["--set", "distillation.teacher='large/teacher.safetensors'"];
    let modes: [(&str, &[&str], &[&str]); 3] = [
        (
            "features",
            &["--set", "loss.features.cls_weight=1", "--set", "loss.features.patch_weight=1"],
            &["feature_cls", "feature_patch"],
        ),
        ("mse", &["--set", "loss.features.cls_weight=1", "--set", "loss.features.distance='mse'"], &["feature_cls"]),
        ("relation", &["--set", "loss.features.relation_weight=1"], &["relation"]),
    ];
    for (run, weights, terms) in modes {
        let output = place.train(run, &[&file[..], &NO_HEADS, weights, &["--length", "30 steps"]].concat()).succeeded();
        // Without a loss by heads there is no ln K to compare with, and nobody looks at local crops.
        assert!(
            !output.stderr.contains("ln K") && output.stderr.contains("crops      2 × 16 px\n"),
            "{}",
            output.stderr
        );
        let metrics = place.metrics(run);
        let steps: Vec<_> = metrics.iter().filter(|line| line["kind"] == "step").collect();
        for term in terms {
            let loss = |i: usize| steps[i]["losses"][term].as_f64().unwrap_or_else(|| panic!("{run}: no `{term}`"));
            let (first, last) = (loss(0), (25..30).map(loss).sum::<f64>() / 5.0);
            assert!(last < first, "{run}: `{term}` went from {first} to {last}");
        }
    }
}

#[test]
fn a_distillation_that_was_stopped_goes_on_as_if_it_was_not() {
    let place = place_with_teacher();
    let weights = ["--set", "loss.features.cls_weight=1", "--set", "loss.features.relation_weight=0.5"];
    let args = [&TEACHER[..], &weights].concat();
    place.train("straight", &args).succeeded();
    // The checkpoint after step 3 and nothing later.
    place.copy("straight", "stopped");
    for checkpoint in place.checkpoints("stopped").into_iter().skip(1) {
        std::fs::remove_dir_all(place.path(&format!("stopped/checkpoints/{checkpoint}"))).expect("removed");
    }
    place.run(&["train", "--resume", "stopped"]).succeeded();
    crate::resume::assert_same_run(&place, "straight", "stopped");
}

/// Two students of other sizes, crops and losses.
const STUDENTS: &str = r#"extends = "tiny.toml"
distillation = { teacher = "large" }

[[students]]
name = "small"

[[students]]
name = "wide"
[students.set.model]
embed_dim = 40
[students.set.augmentation]
local_crops = 1
[students.set.loss]
features = { cls_weight = 0.5, patch_weight = 0.5 }
[students.set.schedule]
lr = { peak = 2e-3 }
"#;

#[test]
fn students_of_one_teacher_are_what_each_would_be_alone() {
    let place = place_with_teacher();
    place.write("students.toml", STUDENTS);
    let both = place.run(&["train", "--config", "students.toml", "--run", "both"]).succeeded();
    for student in ["small: ", "wide: "] {
        assert!(both.stdout.contains(&format!("{student}k-NN accuracy: ")), "{}", both.stdout);
    }
    place.train("small", &TEACHER).succeeded();
    crate::resume::assert_same_run(&place, "small", "both/small");

    // One of them is behind.
    place.copy("both", "stopped");
    for checkpoint in place.checkpoints("stopped/wide").into_iter().skip(1) {
        std::fs::remove_dir_all(place.path(&format!("stopped/wide/checkpoints/{checkpoint}"))).expect("removed");
    }
    place.run(&["train", "--resume", "stopped"]).succeeded();
    for student in ["small", "wide"] {
        crate::resume::assert_same_run(&place, &format!("both/{student}"), &format!("stopped/{student}"));
    }
}

#[test]
fn masks_are_of_the_patches_of_the_students_that_use_them() {
    let place = place_with_teacher();
    let coarse = "extends = \"tiny.toml\"\ndistillation = { teacher = \"large\" }\n[[students]]\nname = \"coarse\"\n\
                  [students.set]\nmodel = { patch_size = 8 }\nloss = { ibot_weight = 0.0 }\n\
                  [[students]]\nname = \"small\"\n";
    place.write("students.toml", coarse);
    place.run(&["train", "--config", "students.toml", "--run", "both"]).succeeded();
    place.train("small", &TEACHER).succeeded();
    crate::resume::assert_same_run(&place, "small", "both/small");
}

#[test]
fn a_student_learns_from_the_cache_what_it_learns_from_the_teacher() {
    let place = place_with_teacher();
    let cache = |output: &str, more: &[&str]| {
        let args = ["cache", "--config", "tiny.toml", "--teacher", "large", "--output", output];
        place.run(&[&args[..], more].concat())
    };
    // 80 steps of 4 images are two files.
    let long = ["--set", "train.length='80 steps'"];
    let written = cache("tokens", &[&long[..], &["--json"]].concat()).succeeded();
    let result: serde_json::Value = serde_json::from_str(&written.stdout).expect("JSON");
    assert_eq!((&result["images"], &result["interrupted"]), (&320.into(), &false.into()));
    assert_eq!(
        names(&place.path("tokens")),
        ["manifest.json", "tokens-000000.safetensors", "tokens-000001.safetensors"]
    );

    let student = |run: &str, more: &[&str]| place.train(run, &[&TEACHER[..], &long, more].concat());
    student("live", &[]).succeeded();
    student("cached", &["--set", "distillation.cache='tokens'"]).succeeded();
    let losses = |run: &str| -> Vec<f64> {
        let metrics = place.metrics(run);
        metrics
            .iter()
            .filter(|line| line["kind"] == "step")
            .map(|line| line["losses"]["total"].as_f64().unwrap())
            .collect()
    };
    let (live, cached) = (losses("live"), losses("cached"));
    assert_eq!(live.len(), 80);
    for (step, (live, cached)) in live.iter().zip(&cached).enumerate() {
        // Tokens lose their last digits to half precision, and the two runs drift apart by that.
        let allowed = if step == 0 { 2e-3 } else { 5e-2 };
        assert!((live - cached).abs() < allowed * live, "step {step}: {live} and {cached}");
    }

    // A file that is lost is written again, the same.
    let first = place.read("tokens/tokens-000000.safetensors");
    std::fs::remove_file(place.path("tokens/tokens-000000.safetensors")).expect("removed");
    student("lost", &["--set", "distillation.cache='tokens'"])
        .failed(2, &["tokens-000000.safetensors", "`dinoxide cache`"]);
    cache("tokens", &long).succeeded();
    assert!(place.read("tokens/tokens-000000.safetensors") == first, "the tokens differ");

    // So is one that is damaged, which no run begins with.
    place.write("tokens/tokens-000001.safetensors", &place.read("tokens/tokens-000001.safetensors")[..900]);
    student("damaged", &["--set", "distillation.cache='tokens'"])
        .failed(2, &["tokens-000001.safetensors: it has 900 bytes, its header says ", "`dinoxide cache`"]);
    assert!(!place.path("damaged").exists());
    let again = cache("tokens", &long).succeeded();
    assert!(again.stdout.contains("64 images") && again.stdout.contains("256 were there"), "{}", again.stdout);
    student("repaired", &["--set", "distillation.cache='tokens'"]).succeeded();

    place.train("other", &["--set", "model.embed_dim=48", "--set", "model.num_heads=3", "--seed", "5"]).succeeded();
    let with_cache = ["--set", "distillation.cache='tokens'"];
    let gram = ["loss.gram.weight=1", "loss.gram.teacher='snapshot'", "augmentation.gram_crop_size=24"];
    let gram = gram.map(|setting| ["--set", setting]).concat();
    let cases: [(&[&str], &[&str]); 8] = [
        (&gram, &["`crops.gram_crop_size` is 0 in the cache, 24 in the run"]),
        (&["--seed", "3"], &["`distillation.cache`: tokens was made of something else", "`seed` is 0 in the cache, 3"]),
        (&["--set", "train.precision='bf16'"], &["`precision` is \"fp32\" in the cache, \"bf16\" in the run"]),
        (&["--set", "augmentation.hue=0.3"], &["`crops.hue` is 0.1 in the cache, 0.3 in the run"]),
        (&["--set", "train.length='90 steps'"], &["`positions` is 320 in the cache, 360 in the run"]),
        (&["--set", "distillation.teacher='other'"], &["`teacher_crc32` is "]),
        (&["--set", "distillation.teacher=''"], &["`distillation.cache` is set and `distillation.teacher` empty"]),
        (&["--set", "distillation.cache='nowhere'"], &["nowhere/manifest.json", "hint: `dinoxide cache`"]),
    ];
    for (args, parts) in cases {
        student("run", &[&with_cache[..], args].concat()).failed(2, parts);
        assert!(!place.path("run").exists(), "{args:?}");
    }
    assert_eq!(cases.len(), 8);
    cache("tokens", &[&long[..], &["--set", "train.seed=9"]].concat()).failed(2, &["`seed` is 0 in the cache, 9"]);
}

#[test]
fn students_cannot_change_what_they_share() {
    let place = place_with_teacher();
    let student = |set: &str| format!("extends = \"tiny.toml\"\ndistillation = {{ teacher = \"large\" }}\n{set}");
    let named = |set: &str| student(&format!("[[students]]\nname = \"one\"\n{set}"));
    let cases: [(String, &[&str]); 5] = [
        (
            named("[students.set.train]\nbatch_size = 8\n"),
            &["student `one` changes what all students share", "batch_size"],
        ),
        (named("[students.set.augmentation]\nlocal_crops = 5\n"), &["student `one` asks for 5 local crops"]),
        (named("[students.set.augmentation]\nhue = 0.3\n"), &["changes what all students share", "augmentation.hue"]),
        (named("[students.set.modle]\ndepth = 2\n"), &["student `one`", "unknown key `modle`", "`model`"]),
        (
            "extends = \"tiny.toml\"\n[[students]]\nname = \"one\"\n".into(),
            &["`[[students]]` share a frozen teacher and `distillation.teacher` is empty"],
        ),
    ];
    for (recipe, parts) in &cases {
        place.write("wrong.toml", recipe);
        place.run(&["train", "--config", "wrong.toml", "--run", "run"]).failed(2, parts);
        assert!(!place.path("run").exists(), "{recipe}");
    }
    assert_eq!(cases.len(), 5);
}

#[test]
fn a_run_goes_on_from_given_weights() {
    let place = Workplace::new();
    place.train("first", &[]).succeeded();
    let run = place.train("second", &["--init", "first", "--set", "schedule.freeze_backbone='4 steps'"]).succeeded();
    assert!(run.stderr.contains("student and teacher start from first"), "{}", run.stderr);
    let knn = |run: &str, last: bool| {
        let metrics = place.metrics(run);
        let mut evals = metrics.iter().filter(|line| line["kind"] == "eval");
        let line = if last { evals.next_back() } else { evals.next() };
        line.expect("an evaluation")["knn"]["top1"].as_f64().expect("a number")
    };
    assert_eq!(knn("first", true), knn("second", false));
}

#[test]
fn a_gram_teacher_may_differ_in_what_only_training_uses() {
    let place = Workplace::new();
    place.train("first", &[]).succeeded();
    let gram = ["loss.gram.weight=1", "loss.gram.teacher='first'", "loss.gram.refresh_every='2 steps'"];
    let settings = [&gram[..], &["model.drop_path_rate=0.2"]].concat();
    let args: Vec<&str> = settings.iter().flat_map(|setting| ["--set", *setting]).collect();
    place.train("second", &args).succeeded();
    assert!(last_losses(&place, "second")["gram"].is_f64());
}

#[test]
fn teachers_and_weights_that_do_not_fit_are_refused() {
    let place = place_with_teacher();
    let other = ["--set", "dino_head.prototypes=8"];
    let cases: [(&[&str], &[&str]); 14] = [
        (&["--set", "loss.koleo_group=3"], &["`loss.koleo_group` 3 and `train.batch_size` 4", "hint: "]),
        (&["--set", "loss.koleo_neighbours=4"], &["`loss.koleo_neighbours` is 4"]),
        (&["--set", "distillation.teacher='nowhere'"], &["`distillation.teacher`: nowhere: there is no such"]),
        (
            &["--set", "distillation.teacher='large/teacher.safetensors'"],
            &["has no heads, and `loss.dino_weight` is 1", "`[loss.features]`"],
        ),
        (&[TEACHER[0], TEACHER[1], other[0], other[1]], &["has 16 prototypes, `dino_head.prototypes` is 8"]),
        (
            &[TEACHER[0], TEACHER[1], "--set", "model.patch_size=8"],
            &["4 × 4 patches to it and 2 × 2 to the student", "`loss.ibot_weight = 0`"],
        ),
        (&["--set", "loss.features.cls_weight=1"], &["`distillation.teacher` is empty", "hint"]),
        (
            &[TEACHER[0], TEACHER[1], "--set", "loss.gram.weight=1"],
            &["`loss.gram.teacher` is \"ema\" and `distillation.teacher` is set", "\"snapshot\""],
        ),
        (
            &[
                TEACHER[0],
                TEACHER[1],
                "--set",
                "loss.features.relation_weight=1",
                "--set",
                "efficiency.micro_batches=2",
            ],
            &["`efficiency.micro_batches = 1`"],
        ),
        (
            &[
                "--set",
                "loss.gram.weight=1",
                "--set",
                "loss.gram.teacher='large'",
                "--set",
                "augmentation.gram_crop_size=18",
            ],
            &["`augmentation.gram_crop_size`: the Gram teacher large cannot see it", "multiple of the patch size 4"],
        ),
        (
            &[
                "--set",
                "loss.gram.weight=1",
                "--set",
                "loss.gram.teacher='large'",
                "--set",
                "loss.gram.refresh_every='2 steps'",
            ],
            &["`loss.gram.refresh_every`", "another backbone"],
        ),
        (
            &["--set", "augmentation.gram_crop_size=24"],
            &["`augmentation.gram_crop_size` is set, `loss.gram.weight` is 0"],
        ),
        (&["--init", "large"], &["another backbone", "`embed_dim` is 32 in the recipe, 48 in the weights"]),
        (&["--set", "init.take='state'"], &["`init.take` is \"state\" and `init.from` empty"]),
    ];
    for (args, parts) in cases {
        place.train("run", args).failed(2, parts);
        assert!(!place.path("run").exists(), "{args:?}");
    }
    assert_eq!(cases.len(), 14);
}
