//! `dinoxide train` from beginning to end.

use serde_json::Value;

use crate::support::{Workplace, names};

#[track_caller]
fn assert_numbers(line: &Value, keys: &[&str]) {
    for key in keys {
        let value = key.split('.').fold(line, |value, key| &value[key]);
        assert!(value.as_f64().is_some_and(f64::is_finite), "`{key}` in {line}");
    }
}

fn of_kind<'a>(metrics: &'a [Value], kind: &str) -> Vec<&'a Value> {
    metrics.iter().filter(|line| line["kind"] == kind).collect()
}

#[test]
fn a_run_leaves_a_complete_directory() {
    let place = Workplace::new();
    let run = place.train("run", &["--seed", "6"]).succeeded();
    let found = names(&place.path("run"));
    assert_eq!(found, [".lock", "checkpoints", "config.toml", "log.txt", "metrics.jsonl", "teacher.safetensors"]);
    assert_eq!(place.checkpoints("run"), ["step-000006", "step-000009", "step-000010"]);
    for checkpoint in place.checkpoints("run") {
        let files = names(&place.path("run/checkpoints").join(checkpoint));
        assert_eq!(files, ["manifest.json", "state.safetensors"]);
    }
    let log = String::from_utf8(place.read("run/log.txt")).expect("UTF-8");
    let software = concat!("software   dinoxide ", env!("CARGO_PKG_VERSION"), ", device cpu, seed 6\n");
    let recipe = "recipe     tiny.toml\n";
    for part in [recipe, software, "step 10/10", "checkpoint run/checkpoints/step-000009", "finished   10 steps"] {
        assert!(log.contains(part), "`{part}` is not in\n{log}");
    }
    assert!(log.contains(&run.stdout), "{log}");
    assert_eq!((log.matches(recipe).count(), run.stderr.matches(recipe).count()), (1, 1));
}

#[cfg(unix)]
#[test]
fn who_may_read_a_log_may_read_the_weights() {
    use std::os::unix::fs::PermissionsExt;
    let place = Workplace::new();
    place.train("run", &[]).succeeded();
    let mode = |name: &str| place.path("run").join(name).metadata().expect("a file").permissions().mode();
    for name in ["config.toml", "metrics.jsonl", "teacher.safetensors", "checkpoints/step-000010/state.safetensors"] {
        assert_eq!(mode(name), mode("log.txt"), "{name}");
    }
}

#[test]
fn stdout_has_the_change_of_knn_accuracy_and_nothing_else() {
    let place = Workplace::new();
    let run = place.train("run", &[]).succeeded();
    assert_eq!(run.stdout.lines().count(), 1, "{}", run.stdout);
    assert!(run.stdout.starts_with("k-NN accuracy: ") && run.stdout.contains("(chance 8.33 %)"), "{}", run.stdout);
    assert!(run.stderr.contains("after 0 steps") && run.stderr.contains("after 10 steps"), "{}", run.stderr);
}

#[test]
fn recomputation_is_refused_where_nothing_would_be_computed_again() {
    let place = Workplace::new();
    let expected = ["`efficiency.recompute` is true", "micro_batches"];
    let recompute = ["--set", "efficiency.recompute=true"];
    place.train("refused", &[&recompute[..], &["--set", "model.norm=rms_norm"]].concat()).failed(2, &expected);
    // `quickstart` trains a ConvNeXt.
    place
        .run(&[&["train", "--config", "quickstart", "--run", "refused"][..], &recompute].concat())
        .failed(2, &expected);
}

#[test]
fn a_run_of_no_step_writes_the_backbone_that_a_longer_run_starts_from() {
    let place = Workplace::new();
    let run = place.train("untrained", &["--length", "0 steps"]).succeeded();
    assert_eq!(run.stderr.matches("after 0 steps").count(), 1, "{}", run.stderr);
    let numbers: Vec<&str> = run.stdout.split_whitespace().filter(|word| word.parse::<f64>().is_ok()).collect();
    assert_eq!(numbers[0], numbers[1], "{}", run.stdout);
    assert_eq!(place.checkpoints("untrained"), ["step-000000"]);
    place.train("untrained", &["--length", "0 steps"]).succeeded();
    // Nothing moves at a learning rate of zero, in a long run that starts from the same seed.
    let still = ["--set", "schedule.lr={ start = 0.0, peak = 0.0, end = 0.0, warmup = '0 steps' }"];
    place.train("still", &still).succeeded();
    let norms = |run: &str| -> Vec<f64> {
        let shown = place.run(&["inspect", &format!("{run}/teacher.safetensors"), "--json"]).succeeded().stdout;
        let shown: Value = serde_json::from_str(&shown).expect("JSON");
        let tensors = shown["tensors"].as_array().expect("tensors");
        tensors.iter().map(|tensor| tensor["norm"].as_f64().expect("a number")).collect()
    };
    place.train("other", &["--length", "0 steps", "--seed", "9"]).succeeded();
    let [untrained, still, other] = ["untrained", "still", "other"].map(norms);
    let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * a.abs());
    assert!(untrained.len() > 10 && near(&untrained, &still), "{untrained:?} {still:?}");
    assert!(!near(&untrained, &other), "another seed has other weights");
    place.train("short", &["--length", "1 images"]).failed(2, &["\"1 images\" is not a single step of 4 images"]);
}

#[test]
fn metrics_keep_their_schema() {
    let place = Workplace::new();
    place.train("run", &["--set", "eval.every='4 steps'"]).succeeded();
    let metrics = place.metrics("run");
    let [steps, health, evals, ends] = ["step", "health", "eval", "end"].map(|kind| of_kind(&metrics, kind));
    assert_eq!((steps.len(), health.len(), evals.len(), ends.len()), (10, 10, 4, 1));
    assert_eq!(metrics.len(), 25);
    for (i, line) in steps.iter().enumerate() {
        assert_eq!((line["step"].as_u64(), line["images"].as_u64()), (Some(i as u64 + 1), Some(4 * (i as u64 + 1))));
        assert_numbers(line, &["epoch", "seconds", "images_per_second", "data_wait", "memory_bytes"]);
        assert_numbers(
            line,
            &["losses.dino_global", "losses.dino_local", "losses.ibot", "losses.koleo", "losses.total"],
        );
        assert!(
            line["losses"].as_object().is_some_and(|losses| losses.contains_key("gram") && losses["gram"].is_null())
        );
        assert_numbers(line, &["gradient_norms.backbone", "gradient_norms.dino_head", "gradient_norms.ibot_head"]);
        assert_numbers(
            line,
            &["schedule.lr", "schedule.weight_decay", "schedule.teacher_momentum", "schedule.teacher_temp"],
        );
    }
    for line in health {
        assert_numbers(
            line,
            &["step", "images", "target_entropy.conditional", "target_entropy.marginal", "ln_prototypes"],
        );
        assert!(
            line["bad_images"] == 0 && line["bad_eval_images"] == 0 && line["evaluation_error"].is_null(),
            "{line}"
        );
    }
    let at: Vec<_> = evals.iter().map(|line| line["step"].as_u64()).collect();
    assert_eq!(at, [Some(0), Some(4), Some(8), Some(10)]);
    for line in evals {
        assert_numbers(line, &["images", "seconds", "knn.top1", "knn.top5", "knn.k", "knn.chance"]);
        assert_numbers(line, &["effective_rank", "embed_dim"]);
    }
    assert_numbers(ends[0], &["step", "images", "seconds", "images_per_second", "peak_memory_bytes"]);
    assert!(ends[0]["peak_memory_bytes"].as_u64() > Some(0));
}

#[test]
fn the_saved_config_is_the_recipe_that_was_run() {
    let place = Workplace::new();
    place.train("run", &["--seed", "7", "--lr", "0.002", "--set", "loss.koleo_weight=0.5"]).succeeded();
    let shown = place.run(&["recipes", "run/config.toml"]).succeeded().stdout;
    for part in ["seed = 7", "peak = 0.002", "koleo_weight = 0.5", "embed_dim = 32"] {
        assert!(shown.contains(part), "`{part}` is not in\n{shown}");
    }
    // The values alone: what made them is another file now.
    let values = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.split("  # ").next().unwrap_or_default().to_owned()).collect()
    };
    let saved = String::from_utf8(place.read("run/config.toml")).expect("UTF-8");
    assert_eq!(values(&shown), values(saved.trim_end()));
    place.run(&["train", "--config", "run/config.toml", "--run", "again"]).succeeded();
    assert!(place.read("again/teacher.safetensors") == place.read("run/teacher.safetensors"));
}

#[test]
fn inspect_says_what_a_score_was_measured_on_and_counts_blocks() {
    let place = Workplace::new();
    place.train("run", &["--length", "4 steps", "--set", "model.depth=11"]).succeeded();
    let text = place.run(&["inspect", "run/teacher.safetensors"]).succeeded().stdout;
    for part in ["  method     task knn, k 5, ", "  features   backbone ", "val_samples 24"] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    let at = |block: usize| text.find(&format!("blocks.{block}.attn.qkv.weight")).expect("a block");
    assert!(at(1) < at(2) && at(2) < at(10), "{text}");
}

#[test]
fn another_seed_gives_another_backbone() {
    let place = Workplace::new();
    place.train("a", &[]).succeeded();
    place.train("b", &["--seed", "1"]).succeeded();
    assert!(place.read("a/teacher.safetensors") != place.read("b/teacher.safetensors"));
}

#[test]
fn runs_without_a_name_are_numbered() {
    let place = Workplace::new();
    for expected in [vec!["tiny"], vec!["tiny", "tiny-2"]] {
        place.run(&["train", "--config", "tiny.toml", "--length", "2 steps"]).succeeded();
        assert_eq!(names(&place.path("runs")), expected);
    }
}
