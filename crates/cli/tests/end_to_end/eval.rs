//! `dinoxide eval`, `dinoxide inspect` and `dinoxide export`.

use safetensors::SafeTensors;
use serde_json::Value;

use crate::support::{Finished, Workplace};

/// Three classes in `train` and `val`, and a trained `run`.
pub(crate) fn place() -> Workplace {
    let place = Workplace::new();
    place.write_classes("train", &["cat", "dog", "owl"], 8);
    place.write_classes("val", &["cat", "dog", "owl"], 3);
    place.train("run", &[]).succeeded();
    place
}

pub(crate) fn eval(place: &Workplace, task: &str, args: &[&str]) -> Finished {
    let common = ["eval", task, "--weights", "run/teacher.safetensors", "--train", "train", "--val", "val"];
    place.run(&[&common, args].concat())
}

pub(crate) fn one_object(text: &str) -> Value {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert!(value.is_object(), "{text}");
    value
}

#[test]
fn knn_prints_a_row_for_each_k() {
    let place = place();
    let found = eval(&place, "knn", &["--k", "1,5,24"]).succeeded().stdout;
    let lines: Vec<&str> = found.lines().collect();
    assert!(lines[0].starts_with("k-NN of 9 val images among 24 train images, chance 33.33 %"), "{found}");
    assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["k", "top-1", "95", "%", "interval", "top-5"]);
    let ks: Vec<_> = lines[2..].iter().map(|line| line.split_whitespace().next()).collect();
    assert_eq!(ks, [Some("1"), Some("5"), Some("24")]);
    assert!(lines[2].trim_end().ends_with('-'), "three classes have no top-5: {found}");
}

#[test]
fn knn_as_json_is_one_object_with_its_protocol() {
    let place = place();
    let found = eval(&place, "knn", &["--k", "3,5", "--json", "--output", "knn.json"]).succeeded();
    let result = one_object(&found.stdout);
    assert_eq!(result["task"], "knn");
    assert_eq!(result["provenance"]["steps"], 10);
    assert!(result["protocol"].is_object(), "{result}");
    let scores = result["scores"]["by_k"].as_array().expect("scores");
    assert_eq!(scores.len(), 2);
    for score in scores {
        assert!((0.0..=100.0).contains(&score["top1"].as_f64().expect("a score")), "{result}");
    }
    assert_eq!(one_object(&String::from_utf8(place.read("knn.json")).expect("UTF-8")), result);
    let again = eval(&place, "knn", &["--k", "3,5", "--json"]).succeeded();
    assert_eq!(again.stdout, found.stdout, "an evaluation repeats");
}

#[test]
fn linear_prints_the_best_of_each_feature_set() {
    let place = place();
    let args = ["--iterations", "12", "--samples", "8"];
    let found = eval(&place, "linear", &args).succeeded().stdout;
    assert!(found.starts_with("linear probe: ") && found.contains(" on 9 val images ("), "{found}");
    for name in ["features", "cls of 1 block ", "cls of 1 block + patch mean"] {
        assert!(found.lines().any(|line| line.starts_with(name)), "`{name}` is not in\n{found}");
    }
    let thirteen = [&args[..], &["--grid", "dinov3", "--json"]].concat();
    let result = one_object(&eval(&place, "linear", &thirteen).succeeded().stdout);
    assert_eq!(result["scores"]["candidates"].as_array().map(Vec::len), Some(13));
    assert_eq!(result["scores"]["selection"]["on"], "held_out");
    let found = eval(&place, "linear", &[&args[..], &["--json"]].concat()).succeeded().stdout;
    let result = one_object(&found);
    assert_eq!((&result["task"], &result["protocol"]["method"]["iterations"]), (&"linear".into(), &12.into()));
    assert!(result["scores"]["top1"].is_number(), "{result}");
}

#[test]
fn sets_whose_classes_differ_are_refused() {
    let place = place();
    place.write_classes("more", &["cat", "dog", "yak"], 2);
    place.write_classes("fewer", &["cat", "dog"], 2);
    let with = |train: &str, val: &str| {
        let args = ["eval", "knn", "--weights", "run/teacher.safetensors", "--train", train, "--val", val, "--k", "2"];
        place.run(&args)
    };
    with("train", "more").failed(2, &["more: 1 of its 3 classes are not in train: yak", "hint: "]);
    let fewer = with("train", "fewer").succeeded().stdout;
    assert!(fewer.starts_with("k-NN of 4 val images among 24 train images, chance 33.33 %"), "{fewer}");
    with("train/cat", "val")
        .failed(2, &["train/cat: the images have no classes", "hint: put each class into a folder"]);
    with("train", "val/dog").failed(2, &["val/dog: the images have no classes"]);
    with("train", "nowhere").failed(2, &["data: `nowhere`: no such folder"]);
}

#[test]
fn settings_out_of_range_are_refused() {
    let place = place();
    eval(&place, "knn", &["--k", "200"]).failed(2, &["k = 200, but train has only 24 samples", "hint: lower `k`"]);
    eval(&place, "knn", &["--k", "0"]).failed(2, &["knn: `--k` is [0], it must be"]);
    eval(&place, "knn", &["--k", "2", "--crop", "18"]).failed(2, &["18 is not a multiple of the patch size 4"]);
    eval(&place, "knn", &["--k", "2", "--batch-size", "0"]).failed(2, &["`--batch-size` is 0, must be at least 1"]);
    eval(&place, "linear", &["--iterations", "0"]).failed(2, &["linear: `--iterations` is 0"]);
    eval(&place, "knn", &["--k", "2", "--temperature", "-1"])
        .failed(2, &["knn: `--temperature` is -1.0, it must be above 0 and finite"]);
    eval(&place, "knn", &["--k", "-3"]).failed(2, &["invalid value '-3' for '--k <K,K,…>'"]);
    eval(&place, "knn", &["--device", "gpu"]).failed(2, &["unknown device `gpu`"]);
}

#[test]
fn a_result_replaces_nothing_but_a_result() {
    let place = place();
    place.write("names.txt", "a\n");
    place.write("settings.json", "{\"task\": \"knn\", \"metrics\": []}");
    let knn = |output: &str| eval(&place, "knn", &["--k", "2", "--output", output]);
    let mut seen = 0;
    for name in ["run/teacher.safetensors", "train/cat/0.png", "names.txt", "settings.json"] {
        let before = place.read(name);
        let message = format!("{name}: is there and is not a result of `dinoxide eval`");
        knn(name).failed(2, &[&message, "hint: choose another name for `--output`"]);
        assert!(place.read(name) == before, "{name}");
        seen += 1;
    }
    assert_eq!(seen, 4);
    knn("knn.json").succeeded();
    eval(&place, "knn", &["--k", "3", "--output", "knn.json"]).succeeded();
    let result = one_object(&String::from_utf8(place.read("knn.json")).expect("UTF-8"));
    assert_eq!(result["protocol"]["method"]["k"], serde_json::json!([3]));
}

#[test]
fn unreadable_images_are_left_out_with_a_warning() {
    let place = place();
    place.write("val/cat/broken.png", "no image");
    let found = eval(&place, "knn", &["--k", "2"]).succeeded();
    assert!(
        found.stderr.contains("warning: cat/broken.png: ") && found.stderr.contains("; left out"),
        "{}",
        found.stderr
    );
    assert!(found.stdout.starts_with("k-NN of 9 val images"), "{}", found.stdout);
}

#[test]
fn files_that_are_no_backbone_are_named() {
    let place = place();
    let whole = place.read("run/teacher.safetensors");
    place.write("text.safetensors", "no weights at all");
    place.write("empty.safetensors", "");
    place.write("half.safetensors", &whole[..whole.len() / 2]);
    place.write("header.safetensors", &whole[..40]);
    // The state of a run as it was before it described its backbone.
    let described = place.read("run/checkpoints/step-000010/state.safetensors");
    let file = SafeTensors::deserialize(&described).expect("safetensors");
    place.write("state.safetensors", safetensors::serialize(file.iter(), None).expect("bytes"));
    let state = "state.safetensors";
    let cases = [
        ("text.safetensors", "not a readable safetensors file"),
        ("empty.safetensors", "not a readable safetensors file"),
        ("half.safetensors", "not a readable safetensors file"),
        ("header.safetensors", "not a readable safetensors file"),
        ("missing.safetensors", ""),
        ("train", ""),
        (state, "the state of a training run, of a version that did not describe its backbone"),
    ];
    for (file, reason) in cases {
        let parts = [&format!("error: {file}: "), reason];
        // A path that leads nowhere or to a folder without weights is wrong usage, a file that is no backbone is not.
        let code = if file.starts_with("missing") || file == "train" { 2 } else { 1 };
        place.run(&["inspect", file]).failed(code, &parts);
        let args = ["eval", "knn", "--weights", file, "--train", "train", "--val", "val", "--json"];
        place.run(&args).failed(code, &parts);
    }
}

/// Of a ViT with RoPE and registers, which have another name in weight files.
#[test]
fn a_checkpoint_is_its_teacher() {
    let place = Workplace::new();
    place.write_classes("train", &["cat", "dog", "owl"], 8);
    place.write_classes("val", &["cat", "dog", "owl"], 3);
    let sets = ["model.register_tokens=2", "run.checkpoint_every=5 steps", "run.keep_checkpoints=2"];
    place.train("run", &sets.map(|set| ["--set", set]).concat()).succeeded();
    let measured = |weights: &str| {
        let args = ["eval", "knn", "--weights", weights, "--train", "train", "--val", "val", "--k", "5", "--json"];
        let Finished { stdout, stderr, .. } = place.run(&args).succeeded();
        let result = one_object(&stdout);
        let of = |key: &str| result[key].clone();
        ((of("scores"), of("effective_rank"), result["provenance"]["steps"].clone()), stderr)
    };
    let (teacher, _) = measured("run/teacher.safetensors");
    assert_eq!(teacher.2, 10);
    let (last, stderr) = measured("run/checkpoints/step-000010");
    assert_eq!(last, teacher);
    assert!(stderr.contains("a run's checkpoint: its teacher; left out: student, heads and optimizer"), "{stderr}");
    assert_eq!(measured("run/checkpoints/step-000010/state.safetensors").0, teacher);
    let (earlier, _) = measured("run/checkpoints/step-000005");
    assert!(earlier.2 == 5 && earlier.1 != teacher.1, "{earlier:?}");

    // It is also what another run can begin with.
    let init =
        ["--set", "init.from=run/checkpoints/step-000005", "--set", "model.register_tokens=2", "--length", "0 steps"];
    place.train("again", &init).succeeded();
    assert_eq!(measured("again/teacher.safetensors").0.1, earlier.1);

    // One bit of the teacher.
    let mut bytes = place.read("run/checkpoints/step-000010/state.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensor = file.tensor("teacher.backbone.norm.weight").expect("the final norm").data().as_ptr();
    let at = tensor as usize - bytes.as_ptr() as usize;
    bytes[at + 2] ^= 0x40;
    place.write("flipped/state.safetensors", bytes);
    place.run(&["inspect", "flipped"]).failed(1, &["error: flipped: the parameters are not those that were written"]);
}

#[test]
fn inspect_shows_architecture_origin_and_tensors() {
    let place = place();
    let shown = place.run(&["inspect", "run/teacher.safetensors"]).succeeded().stdout;
    for part in [
        "ViT 32 wide, 1 deep, 2 heads, patch 4",
        "10 steps, 40 images of synthetic",
        "16 px",
        "blocks.0.attn.qkv.weight",
        "k-NN top-1 ",
        " % after 10 steps",
    ] {
        assert!(shown.contains(part), "`{part}` is not in\n{shown}");
    }
    let result = one_object(&place.run(&["inspect", "run/teacher.safetensors", "--json"]).succeeded().stdout);
    assert_eq!((&result["architecture"]["embed_dim"], &result["image_size"]), (&32.into(), &16.into()));
    let score = &result["provenance"]["scores"][0];
    assert_eq!((&score["steps"], &score["protocol"]["method"]["k"][0]), (&10.into(), &5.into()), "{score}");
    let tensors = result["tensors"].as_array().expect("tensors");
    let values: u64 = tensors
        .iter()
        .map(|tensor| {
            tensor["shape"].as_array().expect("a shape").iter().map(|n| n.as_u64().expect("a size")).product::<u64>()
        })
        .sum();
    assert_eq!(result["values"].as_u64(), Some(values));
    assert!(tensors.iter().all(|tensor| tensor["norm"].is_number()));
}

#[test]
fn a_trained_backbone_goes_out_and_comes_back() {
    let place = place();
    let knn = |weights: &str| {
        let args = ["eval", "knn", "--weights", weights, "--train", "train", "--val", "val", "--k", "5", "--json"];
        one_object(&place.run(&args).succeeded().stdout)["scores"].clone()
    };
    let expected = knn("run/teacher.safetensors");
    let formats = [("safetensors", "out.safetensors"), ("hf", "out"), ("meta", "out.pth")];
    for (format, output) in formats {
        let args = ["export", "--weights", "run/teacher.safetensors", "--format", format, "--output", output];
        let done = place.run(&args).succeeded();
        assert_eq!(done.stdout, "", "{format}");
        assert!(done.stderr.ends_with(&format!("wrote {output}, read back and compared\n")), "{}", done.stderr);
        let shown = one_object(&place.run(&["inspect", output, "--json"]).succeeded().stdout);
        assert_eq!((&shown["fingerprint"], &shown["provenance"]["steps"]), (&"exact".into(), &10.into()), "{format}");
        assert_eq!(knn(output), expected, "{format}");
    }
    let trained = one_object(&place.run(&["inspect", "run/teacher.safetensors", "--json"]).succeeded().stdout);
    assert_eq!((&trained["fingerprint"], &trained["notes"]), (&"exact".into(), &serde_json::json!([])));
    let again = ["export", "--weights", "run/teacher.safetensors", "--format", "hf", "--output", "out"];
    place.run(&again).failed(2, &["out: a folder with something in it", "hint: give another `--output`"]);
    // The keys of this run's attention have a bias, which timm's DINOv3 models lack.
    let timm = ["export", "--weights", "run/teacher.safetensors", "--format", "timm", "--output", "out.timm"];
    place.run(&timm).failed(2, &["export to timm: its DINOv3 models have no bias of the keys, this model has one"]);
    assert!(!place.path("out.timm").exists());
    let damaged = place.read("out.pth").len() - 5;
    place.write("damaged.pth", &place.read("out.pth")[..damaged]);
    place.run(&["inspect", "damaged.pth"]).failed(1, &["damaged.pth: not a readable PyTorch file: "]);
    assert!(!place.path("nothing").exists());
    let unread = ["export", "--weights", "damaged.pth", "--format", "timm", "--output", "nothing"];
    place.run(&unread).failed(1, &["damaged.pth: not a readable PyTorch file: "]);
    assert!(!place.path("nothing").exists());
}

#[test]
fn a_trained_backbone_becomes_an_onnx_file() {
    let place = place();
    let onnx = |rest: &[&str]| {
        let fixed = ["export", "--weights", "run/teacher.safetensors", "--format", "onnx", "--output", "out.onnx"];
        place.run(&[&fixed, rest].concat())
    };
    for rest in [&[][..], &["--image-size", "24x40", "--normalized-input"], &["--image-size", "dynamic"]] {
        let done = onnx(rest).succeeded();
        assert_eq!(done.stdout, "");
        assert!(done.stderr.contains("wrote out.onnx, run in another runtime and compared: "), "{}", done.stderr);
        std::fs::remove_file(place.path("out.onnx")).expect("the file is there");
    }
    onnx(&["--image-size", "18"]).failed(2, &["image height 18 is not a multiple of the patch size 4"]);
    onnx(&["--image-size", "24x"]).failed(2, &["expected `224`, `224x448` (height first) or `dynamic`"]);
    let size =
        ["export", "--weights", "run/teacher.safetensors", "--format", "hf", "--output", "hf", "--image-size", "24"];
    place.run(&size).failed(2, &["are for `--format onnx`"]);
    assert!(!place.path("out.onnx").exists() && !place.path("hf").exists());
}
