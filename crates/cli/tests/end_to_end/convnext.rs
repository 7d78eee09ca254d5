//! A ConvNeXt instead of a vision transformer, from the recipe to the evaluation.

use std::fs;

use serde_json::Value;

use crate::resume::assert_same_run;
use crate::support::{Finished, Workplace};

/// Ten steps of five blocks, on synthetic images.
const RECIPE: &str = r#"extends = "base/dino.toml"

[data]
source = "synthetic:images=48,size=36"

[train]
length = "10 steps"
batch_size = 4

[model]
arch = "convnext_tiny"
dims = [8, 12, 16, 24]
depths = [1, 1, 2, 1]
layer_scale_init = 0.1

[augmentation]
global_crop_size = 64
local_crops = 2
local_crop_size = 36

[dino_head]
prototypes = 16
bottleneck_dim = 8
hidden_dim = 16

[loss]
koleo_weight = 0.1

[schedule]
lr = { start = 0.0, peak = 1e-2, end = 1e-6, warmup = "2 steps" }
teacher_temp = { start = 0.04, peak = 0.07, end = 0.07, warmup = "2 steps" }
freeze_last_layer = "0 steps"

[run]
log_every = "1 steps"
checkpoint_every = "3 steps"

[eval]
val = "synthetic:split=val,images=24,size=36"
k = 5
"#;

fn place() -> Workplace {
    let place = Workplace::new();
    place.write("convnext.toml", RECIPE);
    place
}

fn train(place: &Workplace, run: &str, args: &[&str]) -> Finished {
    place.run(&[&["train", "--config", "convnext.toml", "--run", run], args].concat())
}

#[test]
fn a_convnext_trains_resumes_bit_for_bit_is_evaluated_and_exported() {
    let place = place();
    let shown = train(&place, "straight", &[]).succeeded().stderr;
    assert!(shown.contains("backbone   ConvNeXt 8-12-16-24 wide, 1-1-2-1 deep: "), "{shown}");
    assert_eq!(place.checkpoints("straight"), ["step-000006", "step-000009", "step-000010"]);

    place.copy("straight", "resumed");
    for checkpoint in ["step-000009", "step-000010"] {
        fs::remove_dir_all(place.path("resumed/checkpoints").join(checkpoint)).expect("removed");
    }
    let resumed = place.run(&["train", "--resume", "resumed"]).succeeded();
    assert!(resumed.stderr.contains("resumed    after step 6\n"), "{}", resumed.stderr);
    assert_same_run(&place, "straight", "resumed");

    let weights = "straight/teacher.safetensors";
    let data = ["--train", "synthetic:images=48,size=36", "--val", "synthetic:split=val,images=24,size=36", "--json"];
    let found = place.run(&[&["eval", "knn", "--weights", weights, "--k", "5"], &data[..]].concat()).succeeded();
    let knn: Value = serde_json::from_str(&found.stdout).expect("an object");
    assert!(knn["scores"]["by_k"][0]["top1"].is_number(), "{knn}");
    assert_eq!(knn["effective_rank"].as_f64().map(|rank| (1.0..24.0).contains(&rank)), Some(true), "{knn}");
    let checkpoint = ["eval", "knn", "--weights", "straight/checkpoints/step-000010", "--k", "5"];
    let of_checkpoint = place.run(&[&checkpoint, &data[..]].concat()).succeeded().stdout;
    let of_checkpoint: Value = serde_json::from_str(&of_checkpoint).expect("an object");
    assert_eq!(of_checkpoint["effective_rank"], knn["effective_rank"]);
    let linear = ["eval", "linear", "--weights", weights, "--iterations", "5", "--samples", "8"];
    let found = place.run(&[&linear, &data[..]].concat()).succeeded();
    let linear: Value = serde_json::from_str(&found.stdout).expect("an object");
    assert!(linear["scores"]["top1"].is_number(), "{linear}");

    let onnx = |rest: &[&str]| {
        place.run(&[&["export", "--weights", weights, "--format", "onnx", "--output", "out.onnx"], rest].concat())
    };
    for rest in [&[][..], &["--image-size", "36x100", "--normalized-input"], &["--image-size", "dynamic"]] {
        let done = onnx(rest).succeeded();
        assert!(done.stderr.contains("wrote out.onnx, run in another runtime and compared: "), "{}", done.stderr);
        fs::remove_file(place.path("out.onnx")).expect("the file is there");
    }
    onnx(&["--image-size", "28x64"]).failed(2, &["image height 28: a ConvNeXt takes multiples of 4 from 32 on"]);
    assert!(!place.path("out.onnx").exists());
}

#[test]
fn its_weight_file_has_both_names_of_the_final_norm() {
    let place = place();
    train(&place, "run", &["--length", "2 steps", "--set", "run.checkpoint_every='1 steps'"]).succeeded();
    let weights = "run/teacher.safetensors";
    let shown = place.run(&["inspect", weights, "--json"]).succeeded().stdout;
    let shown: Value = serde_json::from_str(&shown).expect("an object");
    assert_eq!(shown["architecture"]["family"], "convnext");
    let tensors = shown["tensors"].as_array().expect("tensors");
    let norm = |name: &str| {
        let found = tensors.iter().find(|tensor| tensor["name"] == name).unwrap_or_else(|| panic!("no `{name}`"));
        found["norm"].as_f64().expect("a number")
    };
    for name in ["downsample_layers.0.0.weight", "downsample_layers.3.1.bias", "stages.2.1.dwconv.weight"] {
        norm(name);
    }
    for part in ["weight", "bias"] {
        assert_eq!(norm(&format!("norm.{part}")), norm(&format!("norms.3.{part}")));
    }
    // Values of `norms.3.bias` that are not those of `norm.bias`.
    let mut bytes = place.read(weights);
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..8 + header]).expect("a header");
    let start = json["norms.3.bias"]["data_offsets"][0].as_u64().expect("an offset") as usize;
    bytes[8 + header + start..][..4].copy_from_slice(&7f32.to_le_bytes());
    place.write("other.safetensors", bytes);
    let parts = ["`norms.3.bias` is not equal to `norm.bias`"];
    place.run(&["inspect", "other.safetensors"]).failed(1, &parts);
}

#[test]
fn what_a_convnext_cannot_do_is_an_error() {
    let place = place();
    let cases: [(&[&str], &[&str]); 7] = [
        (&["loss.ibot_weight=1"], &["`loss.ibot_weight` is 1", "no mask token", "hint: set `loss.ibot_weight = 0.0`"]),
        (
            &["optim.layerwise_decay=0.9"],
            &["`optim.layerwise_decay` is 0.9", "hint: set `optim.layerwise_decay = 1.0`"],
        ),
        (&["optim.patch_embed_lr_mult=0.2"], &["`optim.patch_embed_lr_mult` is 0.2"]),
        (
            &["model.register_tokens=4", "model.position='rope'"],
            &[
                "`model.register_tokens = 4`, `model.position = \"rope\"`",
                "`model.arch` is \"convnext_tiny\"",
                "hint: ",
            ],
        ),
        (&["model.embed_dim=64"], &["`model.embed_dim = 64`", "no `embed_dim`"]),
        (
            &["augmentation.local_crop_size=28"],
            &["`augmentation.local_crop_size`", "28: a ConvNeXt takes", "hint: 32 "],
        ),
        (
            &["model.arch='vit_tiny'"],
            &["`model.dims = [8,12,16,24]`", "`model.arch` is \"vit_tiny\"", "hint: leave it out"],
        ),
    ];
    for (values, parts) in &cases {
        let args: Vec<&str> = values.iter().flat_map(|value| ["--set", value]).collect();
        train(&place, "run", &args).failed(2, parts);
        assert!(!place.path("run").exists(), "{values:?}");
    }
}
