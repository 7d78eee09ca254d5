//! `dinoxide embed`.

use std::collections::BTreeMap;

use safetensors::SafeTensors;

use crate::eval::place;
use crate::support::{Finished, Workplace, names};

fn embed(place: &Workplace, args: &[&str]) -> Finished {
    place.run(&[&["embed", "--weights", "run/teacher.safetensors", "--data", "train"], args].concat())
}

/// Shapes and single-precision values of the tensors of a file; of labels, the values as numbers.
fn tensors(place: &Workplace, name: &str) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = place.read(name);
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let values = |name: &str, data: &[u8]| match name {
        "labels" => data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f32).collect(),
        _ => data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    };
    file.iter().map(|(n, view)| (n.to_owned(), (view.shape().to_vec(), values(n, view.data())))).collect()
}

#[test]
fn every_kind_of_token_is_written_with_labels_and_names() {
    let place = place();
    place.write("train/dog/broken.png", "no image");
    let done = embed(&place, &["--tokens", "patches,cls,mean", "--output", "f.safetensors"]).succeeded();
    assert!(done.stderr.contains("warning: dog/broken.png: "), "{}", done.stderr);
    assert!(
        done.stderr.ends_with("wrote f.safetensors: cls [32], mean [32], patches [16, 32] of 24 images, 1 left out\n"),
        "{}",
        done.stderr
    );
    assert_eq!(done.stdout, "");
    let found = tensors(&place, "f.safetensors");
    assert_eq!(found.keys().collect::<Vec<_>>(), ["cls", "labels", "mean", "patches"]);
    assert_eq!((&found["cls"].0[..], &found["patches"].0[..]), (&[24, 32][..], &[24, 16, 32][..]));
    let labels: Vec<f32> = (0..24).map(|row| (row / 8) as f32).collect();
    assert_eq!(found["labels"], (vec![24], labels));
    for (image, mean) in found["patches"].1.chunks(16 * 32).zip(found["mean"].1.chunks(32)) {
        for (d, &mean) in mean.iter().enumerate() {
            let sum: f32 = image.iter().skip(d).step_by(32).sum();
            assert!((sum / 16.0 - mean).abs() < 1e-5);
        }
    }
    let csv = String::from_utf8(place.read("f.csv")).expect("UTF-8");
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 25);
    assert_eq!((lines[0], lines[1], lines[9]), ("row,image,label,class", "0,cat/0.png,0,cat", "8,dog/0.png,1,dog"));

    // The header counts what is there, and so does whoever finds the file.
    let bytes = place.read("f.safetensors");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("a header");
    let stamp = &header.metadata().as_ref().expect("metadata")["dinoxide.embed"];
    let stamp: serde_json::Value = serde_json::from_str(stamp).expect("JSON");
    assert_eq!((&stamp["images"], &stamp["images_found"]), (&24.into(), &25.into()), "{stamp}");
    let again = embed(&place, &["--tokens", "patches,cls,mean", "--output", "f.safetensors"]).succeeded();
    let all = "f.safetensors is there already, nothing was written: cls [32], mean [32], patches [16, 32] of 24 images, \
               1 left out\n";
    assert!(again.stderr.ends_with(all) && !again.stderr.contains("wrote"), "{}", again.stderr);
    assert_eq!(place.read("f.safetensors"), bytes);

    embed(&place, &["--normalize", "--output", "unit.safetensors"]).succeeded();
    let unit = tensors(&place, "unit.safetensors");
    for (unit, plain) in unit["cls"].1.chunks(32).zip(found["cls"].1.chunks(32)) {
        let norm = |row: &[f32]| row.iter().map(|v| v * v).sum::<f32>().sqrt();
        assert!((norm(unit) - 1.0).abs() < 1e-5 && (unit[3] * norm(plain) - plain[3]).abs() < 1e-5);
    }
}

#[test]
fn an_interrupted_run_goes_on_with_the_files_that_are_missing() {
    let place = place();
    let args = ["--tokens", "cls", "--output", "out/f.safetensors", "--shard-images", "10", "--batch-size", "4"];
    std::fs::create_dir(place.path("out")).expect("a folder");
    embed(&place, &args).succeeded();
    let file = |number: usize| format!("out/f-{number:05}-of-00003.safetensors");
    let all: Vec<Vec<u8>> = (1..=3).map(|number| place.read(&file(number))).collect();
    assert_eq!(tensors(&place, &file(3))["cls"].0, [4, 32]);
    assert_eq!(names(&place.path("out")).len(), 6);

    // As if it had been killed before the second file was in its place.
    std::fs::remove_file(place.path(&file(2))).expect("removed");
    let before = std::fs::metadata(place.path(&file(1))).expect("a file").modified().expect("a time");
    let again = embed(&place, &args).succeeded();
    assert!(again.stderr.contains("2 of 3 files are there already"), "{}", again.stderr);
    assert!(again.stderr.contains("wrote 1 of 3 files, out/f-00001-of-00003.safetensors to "), "{}", again.stderr);
    assert!(again.stderr.ends_with(": cls [32] of 24 images\n"), "{}", again.stderr);
    assert_eq!((1..=3).map(|number| place.read(&file(number))).collect::<Vec<_>>(), all);
    assert_eq!(std::fs::metadata(place.path(&file(1))).expect("a file").modified().expect("a time"), before);
    let whole = embed(&place, &["--output", "whole.safetensors", "--batch-size", "24"]);
    whole.succeeded();
    let parts: Vec<f32> = (1..=3).flat_map(|number| tensors(&place, &file(number))["cls"].1.clone()).collect();
    let whole = &tensors(&place, "whole.safetensors")["cls"].1;
    assert!(parts.iter().zip(whole).all(|(a, b)| (a - b).abs() < 1e-5) && parts.len() == whole.len());

    // Other settings under the same name.
    let other = embed(&place, &[&args[..], &["--normalize"]].concat());
    other.failed(
        2,
        &["f-00001-of-00003.safetensors: is there with other settings: `normalized` is false, now true", "hint: "],
    );
    let fewer = ["--tokens", "cls", "--output", "out/f.safetensors", "--shard-images", "12"];
    embed(&place, &fewer).failed(2, &["is of the same name, but of another number of files than 2"]);
    place.write(&file(2), "something else");
    embed(&place, &args).failed(2, &["f-00002-of-00003.safetensors: is there and was not written by `embed`"]);
    place.write_image("train/cat/new.png", &crate::support::picture(20, 17, 0, 9));
    embed(&place, &args).failed(2, &["`images_found` is 24, now 25"]);
}

#[test]
fn what_cannot_be_written_is_refused_before_anything_is_read() {
    let place = place();
    embed(&place, &["--output", "f.npz"]).failed(2, &["f.npz: give `--output` a name that ends in .safetensors"]);
    embed(&place, &["--output", "no/f.safetensors"]).failed(2, &["no: no such folder to write to"]);
    embed(&place, &["--output", "f.safetensors", "--shard-images", "0"]).failed(2, &["`--shard-images` is 0"]);
    embed(&place, &["--output", "f.safetensors", "--crop", "18"])
        .failed(2, &["18 is not a multiple of the patch size 4"]);
    embed(&place, &["--output", "f.safetensors", "--tokens", "registers"])
        .failed(2, &["`--tokens registers`: the backbone has no register tokens"]);
    assert!(!place.path("f.safetensors").exists());
    assert!(!place.path("no").exists());
}

#[test]
fn registers_are_written_where_there_are_any() {
    let place = place();
    let args = ["train", "--config", "tiny.toml", "--run", "registers", "--set", "model.register_tokens=2"];
    place.run(&args).succeeded();
    let weights = "registers/teacher.safetensors";
    let tokens = ["--tokens", "registers", "--output", "r.safetensors"];
    place.run(&[&["embed", "--weights", weights, "--data", "val"][..], &tokens].concat()).succeeded();
    assert_eq!(tensors(&place, "r.safetensors")["registers"].0, [9, 2, 32]);
}

#[test]
fn features_that_are_not_finite_are_refused_with_the_image() {
    let place = place();
    let bytes = place.read("run/teacher.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut tensors: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)> = file
        .iter()
        .map(|(name, view)| (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    let norm = tensors.iter_mut().find(|(name, ..)| name == "norm.bias").expect("the final norm");
    norm.3[20..24].copy_from_slice(&f32::NAN.to_le_bytes());
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), data);
        (name.as_str(), view.expect("a tensor"))
    });
    // Without a description there is no fingerprint that would notice.
    place.write("nan.safetensors", safetensors::serialize(views, None).expect("bytes"));
    let message = ["a value of `cat/0.png` is NaN", "hint: "];
    for (task, args) in [
        ("embed", &["--data", "train", "--output", "nan-features.safetensors"][..]),
        ("eval", &["knn", "--train", "train", "--val", "val", "--k", "2"]),
    ] {
        let (first, rest) = if task == "eval" { (&args[..1], &args[1..]) } else { (&args[..0], args) };
        let fixed = ["--weights", "nan.safetensors", "--crop", "16"];
        place.run(&[&[task], first, &fixed, rest].concat()).failed(1, &message);
    }
    assert!(!place.path("nan-features.safetensors").exists() && !place.path("nan-features.csv").exists());
}

/// Of neighbours by cosine of the given features: the share of the 9 val images whose nearest of 24 train images is of their
/// class, and whose other val images of their class (two) are the two nearest of the other eight.
fn nearest(train: &[Vec<f32>], val: &[Vec<f32>]) -> (f64, f64) {
    let cosine = |a: &[f32], b: &[f32]| {
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let (mut right, mut recalled) = (0, 0);
    for (row, query) in val.iter().enumerate() {
        let best = |rows: &mut dyn Iterator<Item = (usize, &Vec<f32>)>| {
            rows.max_by(|a, b| cosine(query, a.1).total_cmp(&cosine(query, b.1))).expect("a row").0
        };
        right += usize::from(best(&mut train.iter().enumerate()) / 8 == row / 3);
        recalled += usize::from(best(&mut val.iter().enumerate().filter(|(other, _)| *other != row)) / 3 == row / 3);
    }
    (100.0 * right as f64 / 9.0, 100.0 * recalled as f64 / 9.0)
}

#[test]
fn knn_and_retrieval_by_any_tokens_find_what_the_written_features_say() {
    let place = place();
    let weights = ["--weights", "run/teacher.safetensors"];
    for set in ["train", "val"] {
        let to = format!("{set}.safetensors");
        let args = ["--data", set, "--tokens", "cls,mean", "--normalize", "--output", &to];
        place.run(&[&["embed"][..], &weights, &args].concat()).succeeded();
    }
    let (train, val) = (tensors(&place, "train.safetensors"), tensors(&place, "val.safetensors"));
    let rows = |of: &BTreeMap<String, (Vec<usize>, Vec<f32>)>, names: &[&str]| -> Vec<Vec<f32>> {
        let count = of["cls"].0[0];
        let row = |row: usize| names.iter().flat_map(|name| of[*name].1[row * 32..][..32].to_vec()).collect();
        (0..count).map(row).collect()
    };
    let mut ranks = Vec::new();
    for (given, names, stamped) in [
        ("cls", &["cls"][..], serde_json::json!(["cls"])),
        ("mean", &["mean"], serde_json::json!(["patch_mean"])),
        ("mean,cls,mean", &["cls", "mean"], serde_json::json!(["cls", "patch_mean"])),
    ] {
        let (right, recalled) = nearest(&rows(&train, names), &rows(&val, names));
        let knn = crate::eval::eval(&place, "knn", &["--k", "1", "--tokens", given, "--json"]).succeeded().stdout;
        let knn = crate::eval::one_object(&knn);
        assert!((knn["scores"]["by_k"][0]["top1"].as_f64().expect("a score") - right).abs() < 1e-9, "{given}: {knn}");
        assert_eq!(knn["protocol"]["features"][0]["tokens"], stamped);
        ranks.push(knn["effective_rank"].as_f64().expect("a rank"));
        let args = [&["eval", "retrieval"][..], &weights, &["--data", "val", "--k", "1", "--tokens", given, "--json"]];
        let retrieval = crate::eval::one_object(&place.run(&args.concat()).succeeded().stdout);
        let recall = retrieval["scores"]["recall"][0]["recall"].as_f64().expect("a recall");
        assert!((recall - recalled).abs() < 1e-9, "{given}: {retrieval}");
        assert_eq!(retrieval["protocol"]["features"][0]["tokens"], stamped);
    }
    assert!(ranks[0] != ranks[1] && ranks[1] != ranks[2], "other features have another rank: {ranks:?}");
    for task in ["clustering", "logistic"] {
        let data = if task == "clustering" { &["--data", "val"][..] } else { &["--train", "train", "--val", "val"] };
        let of = |given: &str| {
            let args = [&["eval", task][..], &weights, data, &["--tokens", given, "--json"]].concat();
            crate::eval::one_object(&place.run(&args).succeeded().stdout)["protocol"]["features"][0]["tokens"].clone()
        };
        assert_eq!(of("cls,mean"), serde_json::json!(["cls", "patch_mean"]), "{task}");
    }
    crate::eval::eval(&place, "knn", &["--tokens", "patches"]).failed(2, &["invalid value 'patches' for '--tokens"]);
}
