//! `dinoxide eval finetune`.

use serde_json::Value;

use crate::eval::{eval, one_object, place};
use crate::support::finish;

const SHORT: [&str; 6] = ["--epochs", "3", "--samples", "6", "--lr", "0.05"];

#[test]
fn a_fine_tuned_backbone_is_scored_once_and_can_be_written() {
    let place = place();
    let weights = place.read("run/teacher.safetensors");
    let args = [&SHORT[..], &["--json", "--save", "tuned.safetensors", "--output", "a.json"]].concat();
    let found = eval(&place, "finetune", &args).succeeded();
    let result = one_object(&found.stdout);
    let scores = &result["scores"];
    assert_eq!((&result["task"], &result["protocol"]["method"]["task"]), (&"finetune".into(), &"finetune".into()));
    assert_eq!(scores["epochs"].as_array().map(Vec::len), Some(3));
    assert_eq!((&scores["selection"]["on"], &scores["selection"]["samples"]), (&"held_out".into(), &3.into()));
    assert!(scores["interval"]["low"].is_number() && scores["top1"].is_number(), "{result}");
    let method = &result["protocol"]["method"];
    // The recipe's rate of stochastic depth, and the default factor of a vision transformer's layers.
    let inspected = one_object(&place.run(&["inspect", "run/teacher.safetensors", "--json"]).succeeded().stdout);
    assert_eq!(method["drop_path"], inspected["architecture"]["drop_path_rate"]);
    assert_eq!((&method["layer_decay"], &method["epochs"]), (&0.75.into(), &3.into()));
    let stamp = result["protocol"]["features"][0]["augmentation"].as_str().expect("a stamp");
    assert!(stamp.starts_with("random resized crop, "), "{stamp}");
    let lines: Vec<&str> = found.stderr.lines().filter(|line| line.starts_with("epoch ")).collect();
    assert_eq!(lines.len(), 3, "{}", found.stderr);
    assert!(lines[2].starts_with("epoch 3/3: loss ") && lines[2].ends_with(" % top-1"), "{}", lines[2]);

    // What was read is as it was; what was written is another backbone, whole, and says where it comes from.
    assert_eq!(place.read("run/teacher.safetensors"), weights);
    let tuned = one_object(&place.run(&["inspect", "tuned.safetensors", "--json"]).succeeded().stdout);
    assert_eq!(tuned["fingerprint"], "exact");
    let recipe = tuned["provenance"]["recipe"].as_str().expect("a recipe");
    assert_eq!(recipe, "fine-tuned from run/teacher.safetensors, after 10 steps");
    assert_eq!(tuned["provenance"]["scores"][0]["value"], scores["top1"]);
    // 21 of 24 images are trained on: 4 iterations of 6 make an epoch.
    assert_eq!(tuned["provenance"]["steps"].as_u64(), scores["epoch"].as_u64().map(|epoch| 4 * epoch));
    let norms = |shown: &Value| -> Vec<f64> {
        let tensors = shown["tensors"].as_array().expect("tensors").iter();
        // No gradient reaches the mask token, and buffers are computed.
        let still = ["mask_token", "rope_embed.periods"];
        tensors
            .filter(|t| !still.iter().any(|name| t["name"] == *name))
            .map(|t| t["norm"].as_f64().expect("a norm"))
            .collect()
    };
    let (before, after) = (norms(&inspected), norms(&tuned));
    assert!(before.len() > 10 && before.iter().zip(&after).all(|(a, b)| a != b), "every tensor is trained");

    // It is a weight file like any other.
    let knn = ["eval", "knn", "--train", "train", "--val", "val", "--k", "1", "--json", "--weights"];
    place.run(&[&knn[..], &["tuned.safetensors"]].concat()).succeeded();

    let other = [&SHORT[..], &["--label-smoothing", "0", "--output", "b.json"]].concat();
    let shown = eval(&place, "finetune", &other).succeeded().stdout;
    assert!(shown.starts_with("fine-tuning: ") && shown.contains(" on 9 val images, after epoch "), "{shown}");
    place
        .run(&["eval", "compare", "a.json", "b.json"])
        .failed(2, &["finetune: method.label_smoothing is 0.1, and 0.0", "hint: "]);
}

#[test]
fn fine_tuning_does_not_depend_on_threads_and_hardly_on_the_size_of_a_forward() {
    let place = place();
    let with = |threads: &str, batch: &str| {
        let common = ["eval", "finetune", "--weights", "run/teacher.safetensors", "--train", "train", "--val", "val"];
        let args = ["--json", "--patches", "--drop-path", "0", "--batch-size", batch];
        let mut command = place.command(&[&common[..], &SHORT, &args].concat());
        one_object(&finish(command.env("RAYON_NUM_THREADS", threads)).succeeded().stdout)
    };
    let one = with("1", "4");
    assert_eq!(one, with("3", "4"));
    assert_eq!(one["protocol"]["features"][0]["tokens"], serde_json::json!(["cls", "patch_mean"]));
    let loss = |result: &Value| result["scores"]["epochs"][2]["train_loss"].as_f64().expect("a loss");
    let other = with("2", "64");
    assert!((loss(&one) - loss(&other)).abs() < 1e-3, "{one} {other}");
}

#[test]
fn what_cannot_be_fine_tuned_is_refused() {
    let place = place();
    for (args, message) in [
        (["--epochs", "0"], "finetune: `--epochs` is 0, it must be at least 1"),
        (["--samples", "0"], "finetune: `--samples` is 0, it must be at least 1"),
        (["--lr", "0"], "finetune: `--lr` is 0, it must be above 0 and finite"),
        (["--lr", "-0.001"], "finetune: `--lr` is -0.001, it must be above 0 and finite"),
        (["--epochs", "-2"], "invalid value '-2' for '--epochs <N>'"),
        (["--layer-decay", "1.5"], "finetune: `--layer-decay` is 1.5, it must be above 0 and at most 1"),
        (["--weight-decay", "inf"], "finetune: `--weight-decay` is inf, it must be at least 0 and finite"),
        (["--warmup", "1"], "finetune: `--warmup` is 1, it must be at least 0 and below 1"),
        (["--drop-path", "1"], "finetune: `--drop-path` is 1, it must be at least 0 and below 1"),
        (["--held-out", "0"], "finetune: `--held-out` is 0, it must be above 0 and below 1"),
        (["--crop", "18"], "18 is not a multiple of the patch size 4"),
        (["--save", "nowhere/a.safetensors"], "nowhere: no such folder to write to"),
    ] {
        eval(&place, "finetune", &args).failed(2, &[message]);
    }
    let sets = |train: &str, val: &str| {
        let args = ["eval", "finetune", "--weights", "run/teacher.safetensors", "--train", train, "--val", val];
        place.run(&args)
    };
    sets("train/cat", "val").failed(2, &["train/cat: the images have no classes", "hint: put each class"]);
    place.write_classes("more", &["cat", "dog", "yak"], 2);
    sets("train", "more").failed(2, &["more: 1 of its 3 classes are not in train: yak"]);
}

#[test]
fn a_fine_tuned_backbone_replaces_nothing_but_an_earlier_one() {
    let place = place();
    let state = "run/checkpoints/step-000010/state.safetensors";
    let mut seen = 0;
    for (weights, save, message) in [
        ("run/teacher.safetensors", "run/teacher.safetensors", "is read as `--weights`"),
        ("run/teacher.safetensors", "run/../run/teacher.safetensors", "is read as `--weights`"),
        ("run/checkpoints/step-000010", state, "is read as `--weights`"),
        ("run/teacher.safetensors", state, "is there and is not a backbone that `eval finetune` wrote"),
        ("run/teacher.safetensors", "train/cat/0.png", "is there and is not a backbone that `eval finetune` wrote"),
    ] {
        let before = place.read(save);
        let args = ["eval", "finetune", "--weights", weights, "--train", "train", "--val", "val", "--save", save];
        let message = format!("{save}: {message}");
        place.run(&args).failed(2, &[&message, "hint: choose another name for `--save`"]);
        assert!(place.read(save) == before, "{save}");
        seen += 1;
    }
    assert_eq!(seen, 5);
    let save = ["--epochs", "1", "--samples", "6", "--save", "tuned.safetensors"];
    eval(&place, "finetune", &save).succeeded();
    let first = place.read("tuned.safetensors");
    eval(&place, "finetune", &[&save[..], &["--seed", "1"]].concat()).succeeded();
    assert!(place.read("tuned.safetensors") != first, "another seed");
}

#[test]
fn a_loss_that_is_not_finite_ends_it_with_one_message_and_no_file() {
    let place = place();
    let args = ["--epochs", "2", "--samples", "6", "--lr", "1e30", "--save", "tuned.safetensors", "--output", "a.json"];
    let found = eval(&place, "finetune", &args);
    found.failed(1, &["finetune: the loss is not finite at iteration ", "hint: lower the learning rate, 1e30"]);
    assert!(!place.path("tuned.safetensors").exists() && !place.path("a.json").exists());
}
