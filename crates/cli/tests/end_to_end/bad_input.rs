//! Mistakes in recipes, arguments and images: each is named, none is a panic, and none leaves half a run.

use std::io::Cursor;

use image::{ImageFormat, RgbImage};

use crate::support::{Workplace, names, picture};

/// Asserts that a command fails as wrong usage and leaves nothing behind.
#[track_caller]
fn assert_refused(place: &Workplace, args: &[&str], parts: &[&str]) {
    place.train("run", args).failed(2, parts);
    assert!(!place.path("run").exists());
}

#[test]
fn a_misspelt_key_in_a_file_is_reported_with_its_line() {
    let place = Workplace::new();
    place.write("mine.toml", "extends = \"tiny.toml\"\n\n[train]\nseed = 3\nbatchsize = 4\n");
    let failed = place.run(&["train", "--config", "mine.toml", "--run", "run"]);
    failed.failed(2, &["error: mine.toml:5:1: unknown key `train.batchsize`\n\nhint: ", "`train.batch_size`"]);
    assert!(!place.path("run").exists());
}

#[test]
fn a_misspelt_override_is_reported_with_the_nearest_key() {
    let place = Workplace::new();
    assert_refused(
        &place,
        &["--set", "train.batchsize=4"],
        &["unknown key `train.batchsize`", "hint: ", "`train.batch_size`"],
    );
    assert_refused(&place, &["--set", "optm.clip_norm=4"], &["unknown key `optm`", "`optim`"]);
    assert_refused(&place, &["--set", "train.batch_size"], &["--set train.batch_size: "]);
}

#[test]
fn a_value_of_the_wrong_type_is_reported_with_both_types() {
    let place = Workplace::new();
    assert_refused(&place, &["--set", "train.batch_size='four'"], &["`train.batch_size`: expected ", "found "]);
    assert_refused(&place, &["--set", "train.length=10"], &["`train.length`: "]);
    assert_refused(&place, &["--length", "ten steps"], &["`train.length`: ", "ten steps"]);
    assert_refused(&place, &["--set", "loss.centering='sinkhorm'"], &["`sinkhorm` is not one of", "`sinkhorn`"]);
}

#[test]
fn recipes_that_are_missing_or_extend_themselves_are_reported() {
    let place = Workplace::new();
    place.write("circle.toml", "extends = \"circle.toml\"\n");
    let cases: [(&str, &[&str]); 3] = [
        ("circle.toml", &["circle.toml extends circle.toml: circular `extends`"]),
        ("quickstrat", &["recipe `quickstrat` not found", "hint: ", "`quickstart"]),
        ("nowhere/mine.toml", &["recipe `nowhere/mine.toml` not found"]),
    ];
    for (recipe, parts) in cases {
        place.run(&["train", "--config", recipe]).failed(2, parts);
        place.run(&["recipes", recipe]).failed(2, parts);
    }
    assert_eq!(names(&place.path(".")), ["circle.toml", "tiny.toml"]);
}

#[test]
fn all_recipes_are_listed_for_a_name_that_is_like_none() {
    let place = Workplace::new();
    let listed = place.run(&["recipes"]).succeeded().stdout;
    let known: Vec<String> =
        listed.lines().map(|line| format!("`{}`", line.split(".toml").next().unwrap_or_default())).collect();
    assert!(known.len() > 15, "{listed}");
    let failed = place.run(&["train", "--config", "nosuch"]);
    failed.failed(2, &known.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(!failed.stderr.contains("`base/"), "{}", failed.stderr);
}

#[test]
fn a_flag_and_a_setting_that_contradict_each_other_are_named_with_both_values() {
    let place = Workplace::new();
    let cases: [(&[&str], &str); 5] = [
        (
            &["--lr", "1e-3", "--set", "schedule.lr.peak=2e-3"],
            "`--lr` and `--set schedule.lr.peak=2e-3` contradict each other in `schedule.lr.peak`: 0.001 and 0.002",
        ),
        (&["--seed", "4", "--set", "train={ seed = 3 }"], "`--seed` and `--set train={ seed = 3 }` contradict"),
        (&["--length", "5 steps", "--set", "train.length='6 steps'"], "`train.length`: \"5 steps\" and \"6 steps\""),
        (&["--data", "photos", "--set", "data.source='others'"], "`data.source`: \"photos\" and \"others\""),
        (&["--loader-threads", "1", "--set", "efficiency.loader_threads=2"], "`--loader-threads` and "),
    ];
    for (args, part) in cases {
        assert_refused(&place, args, &[part]);
    }
    assert_eq!(cases.len(), 5);
    // The same value in two ways, and another key of the same table.
    let same = ["--length", "2 steps", "--set", "train.length='2 steps'"];
    let beside = ["--lr", "1e-3", "--set", "schedule.lr={ peak = 0.001, end = 0.0 }"];
    place.train("run", &[same, beside].concat()).succeeded();
}

#[test]
fn numbers_below_zero_are_refused_with_what_is_possible() {
    let place = Workplace::new();
    let whole = "expected a whole number that is not negative";
    assert_refused(&place, &["--lr", "-1"], &["`schedule.lr.peak` is -1, must be a number from 0 on"]);
    assert_refused(&place, &["--seed", "-1"], &["`train.seed`: ", whole, "-1"]);
    assert_refused(&place, &["--batch-size", "-3"], &["`train.batch_size`: ", whole, "-3"]);
    assert_refused(&place, &["--loader-threads", "-2"], &["`efficiency.loader_threads`: ", whole, "-2"]);
    assert_refused(&place, &["--length", "-2 steps"], &["`train.length`: ", "-2 steps", "lies between 0 and"]);
}

#[test]
fn a_run_does_not_go_into_a_folder_of_other_things() {
    let place = Workplace::new();
    place.write_classes("photos", &["cat", "dog"], 3);
    place.write("photo.jpg", "");
    let hint = "hint: give `--run` a folder that does not exist yet";
    place.train("photos", &[]).failed(2, &["photos: it holds `cat` and no `config.toml`", hint]);
    assert_eq!(names(&place.path("photos")), ["cat", "dog"]);
    for run in ["photo.jpg", "photo.jpg/run"] {
        place.train(run, &[]).failed(2, &["photo.jpg: a file, and a run is a folder", hint]);
    }
    // What a run leaves that is killed at once.
    place.write("begun/.lock", "");
    place.train("begun", &["--length", "2 steps"]).succeeded();
}

#[test]
fn devices_that_this_build_lacks_are_named_with_their_feature() {
    let place = Workplace::new();
    assert_refused(&place, &["--device", "gpu"], &["unknown device `gpu`", "hint: use `cpu`"]);
    assert_refused(&place, &["--device", "cpu:1"], &["unknown device `cpu:1`"]);
    assert_refused(
        &place,
        &["--device", "cuda:first"],
        &["device `cuda:first`: `first` is not the number of a device"],
    );
    for (device, feature, is_built) in [
        ("cuda:0", "cuda", cfg!(feature = "cuda")),
        ("vulkan", "vulkan", cfg!(feature = "vulkan")),
        ("wgpu:0", "wgpu", cfg!(feature = "wgpu")),
        ("metal", "metal", cfg!(feature = "metal")),
    ] {
        if !is_built {
            let parts = [&format!("this build has no `{feature}` backend"), &*format!("--features {feature}`")];
            assert_refused(&place, &["--device", device], &parts);
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_named_with_the_nearest_that_do() {
    let place = Workplace::new();
    let set = |setting: &str, parts: &[&str]| assert_refused(&place, &["--set", setting], parts);
    set("augmentation.global_crop_size=18", &["18 is not a multiple of", "16", "20"]);
    set("augmentation.local_crop_size=10", &["`augmentation.local_crop_size`", "10 is not a multiple of", "8", "12"]);
    set("eval.image_size=18", &["`eval.image_size`", "18 is not a multiple of", "16", "20"]);
    set("efficiency.micro_batches=5", &["`efficiency.micro_batches` is 5, more than `train.batch_size` 4"]);
    set("dino_head.prototypes=0", &["`dino_head.prototypes` is 0, must be at least 1"]);
    set("model.num_heads=3", &["32", "3"]);
    assert_refused(&place, &["--length", "1 steps"], &["`schedule.", "1"]);
}

#[test]
fn values_without_effect_are_named() {
    let place = Workplace::new();
    let set = |settings: &[&str], parts: &[&str]| {
        let args: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        assert_refused(&place, &args, parts);
    };
    set(&["model.interpolate_offset=0.2"], &["`model.interpolate_offset = 0.2` has no effect", "\"rope\""]);
    set(
        &["model.position='learned'", "model.rope_rescale=2.0"],
        &["`model.rope_rescale = 2.0` has no effect", "\"learned\""],
    );
    let temp = "schedule.teacher_patch_temp={start=0.04,peak=0.04,end=0.04}";
    set(&["loss.ibot_weight=0", temp], &["`schedule.teacher_patch_temp` is set and `loss.ibot_weight` is 0"]);
}

#[test]
fn precisions_that_do_not_exist_are_named() {
    let place = Workplace::new();
    let parts = ["train.precision", "fp16", "fp32", "bf16"];
    assert_refused(&place, &["--set", "train.precision='fp16'"], &parts);
}

#[test]
fn koleo_on_a_single_image_is_refused_with_a_hint() {
    let place = Workplace::new();
    let parts =
        ["`loss.koleo_weight` is 0.1 and `train.batch_size` is 1", "hint: set `train.batch_size` to at least 2"];
    assert_refused(&place, &["--batch-size", "1"], &parts);
    place.train("run", &["--batch-size", "1", "--set", "loss.koleo_weight=0"]).succeeded();
}

#[test]
fn folders_without_images_are_named() {
    let place = Workplace::new();
    place.write("notes/a.txt", "text");
    place.write("notes/deep/b.txt", "text");
    std::fs::create_dir(place.path("empty")).expect("a folder");
    let cases: [(&str, &[&str]); 4] = [
        ("empty", &["data: `empty`: no images among 0 file(s)"]),
        ("notes", &["data: `notes`: no images among 2 file(s) (.txt ×2)", "hint: an image is a file named *.jpg"]),
        ("missing", &["data: `missing`: no such folder"]),
        ("notes/a.txt", &["data: `notes/a.txt` is a file, not a folder", "hint: its folder is `notes`"]),
    ];
    for (data, parts) in cases {
        assert_refused(&place, &["--data", data, "--set", "eval.val=''"], parts);
        assert_refused(&place, &["--set", &format!("eval.val='{data}'")], parts);
    }
}

/// Trains on `photos`, and measures k-NN among `known` on `val` every four steps.
const WITH_CLASSES: [&str; 8] =
    ["--data", "photos", "--set", "eval.train='known'", "--set", "eval.val='val'", "--set", "eval.every='4 steps'"];

fn with_classes() -> Workplace {
    let place = Workplace::new();
    for (folder, count) in [("photos", 6), ("known", 5), ("val", 4)] {
        place.write_classes(folder, &["cat", "dog"], count);
    }
    place
}

#[test]
fn images_that_knn_cannot_read_are_named_once_and_counted() {
    let place = with_classes();
    place.write("known/cat/1.png", "no image");
    place.write("val/dog/2.png", "");
    let run = place.train("run", &WITH_CLASSES).succeeded();
    for (path, reason) in [("known/cat/1.png", "not a JPEG"), ("val/dog/2.png", "the file is empty")] {
        let of_it: Vec<_> = run.stderr.lines().filter(|line| line.contains(path)).collect();
        assert!(of_it.len() == 1 && of_it[0].starts_with(&format!("warning: {path}: ")), "{of_it:?}");
        assert!(of_it[0].contains(reason) && of_it[0].ends_with("; left out of k-NN"), "{of_it:?}");
    }
    let metrics = place.metrics("run");
    let health: Vec<_> = metrics.iter().filter(|line| line["kind"] == "health").collect();
    assert_eq!(health.len(), 10);
    assert!(health.iter().all(|line| line["bad_eval_images"] == 2 && line["bad_images"] == 0), "{health:?}");
    assert_eq!(metrics.iter().filter(|line| line["kind"] == "eval").count(), 4);
}

/// The images are there when the run starts, and from step 6 on they cannot be read.
#[test]
fn an_evaluation_that_no_longer_works_costs_a_warning_and_not_the_run() {
    let place = with_classes();
    place.train("straight", &WITH_CLASSES).succeeded();
    let mut cases = 0;
    for (folder, left, reason) in [
        ("val", 0, "features: none of the 8 image(s) can be read\n  `cat/0.png`: the file is empty"),
        ("known", 2, "knn: k = 5, but train has only 4 samples"),
    ] {
        let run = format!("run {cases}");
        place.copy("straight", &run);
        for checkpoint in ["step-000009", "step-000010"] {
            std::fs::remove_dir_all(place.path(&run).join("checkpoints").join(checkpoint)).expect("removed");
        }
        let count = if folder == "val" { 4 } else { 5 };
        for class in ["cat", "dog"] {
            (left..count).for_each(|i| place.write(&format!("{folder}/{class}/{i}.png"), ""));
        }
        let resumed = place.run(&["train", "--resume", &run]).succeeded();
        for step in [8, 10] {
            let warning = format!("warning: k-NN could not be measured after {step} steps: {reason}");
            assert!(resumed.stderr.contains(&warning), "{warning} is not in\n{}", resumed.stderr);
        }
        assert_eq!(resumed.stderr.matches(": the file is empty; left out of k-NN\n").count(), 2 * (count - left));
        assert_eq!(resumed.stdout, "", "no accuracy after training was measured");
        let metrics = place.metrics(&run);
        let failed: Vec<_> = metrics.iter().filter(|line| line["evaluation_error"].is_string()).collect();
        let steps: Vec<_> = failed.iter().map(|line| line["step"].as_u64()).collect();
        assert_eq!(steps, [Some(8), Some(10)]);
        for line in failed {
            assert_eq!(
                (&line["kind"], line["bad_eval_images"].as_u64()),
                (&"health".into(), Some(2 * (count - left) as u64))
            );
            assert!(line["evaluation_error"].as_str().is_some_and(|error| error.starts_with(reason)), "{line}");
        }
        assert_eq!(metrics.iter().filter(|line| line["kind"] == "step").count(), 10);
        let state = |run: &str| place.read(&format!("{run}/checkpoints/step-000010/state.safetensors"));
        assert!(state(&run) == state("straight"), "the weights differ");
        // Its last evaluation is made again, and so is what is written of it.
        place.run(&["train", "--resume", &run]).succeeded();
        assert_eq!(place.metrics(&run).len(), metrics.len());
        place.write_classes("val", &["cat", "dog"], 4);
        cases += 1;
    }
    assert_eq!(cases, 2);
}

#[test]
fn an_evaluation_that_cannot_work_at_all_is_an_error_before_the_first_step() {
    let place = with_classes();
    for class in ["cat", "dog"] {
        (0..4).for_each(|i| place.write(&format!("val/{class}/{i}.png"), ""));
    }
    let failed = place.train("run", &WITH_CLASSES);
    failed.failed(1, &["features: none of the 8 image(s) can be read", "`cat/3.png`: the file is empty", "and 3 more"]);
    assert!(place.metrics("run").is_empty() && !place.path("run/checkpoints").exists());
}

fn encoded(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).expect("encoded");
    bytes.into_inner()
}

/// A BMP whose header claims 100 megapixels, and which has none.
fn huge_header() -> Vec<u8> {
    let side = 10_000u32.to_le_bytes();
    let mut bytes = b"BM".to_vec();
    bytes.extend([0; 8]);
    bytes.extend(54u32.to_le_bytes());
    bytes.extend(40u32.to_le_bytes());
    bytes.extend(side);
    bytes.extend(side);
    // One plane, 24 bits, not compressed.
    bytes.extend([1, 0, 24, 0]);
    bytes.extend([0; 24]);
    bytes
}

#[test]
fn damaged_images_are_left_out_and_listed() {
    let place = Workplace::new();
    place.write_classes("photos", &["cat", "dog"], 22);
    let jpeg = encoded(&picture(64, 48, 0, 1), ImageFormat::Jpeg);
    place.write("photos/cat/truncated.jpg", &jpeg[..jpeg.len() / 2]);
    place.write("photos/cat/empty.jpg", "");
    place.write("photos/dog/text.jpg", "this is no image");
    place.write("photos/dog/huge.bmp", huge_header());
    place.write_image("photos/dog/dot.png", &picture(1, 1, 1, 0));
    // Only its name is wrong.
    place.write("photos/dog/misnamed.jpg", encoded(&picture(24, 20, 1, 3), ImageFormat::Png));
    let args = ["--data", "photos", "--length", "2 epochs", "--set", "eval.val=''", "--set", "data.max_bad_share=0.2"];
    let run = place.train("run", &args).succeeded();
    let warnings: Vec<&str> = run.stderr.lines().filter(|line| line.starts_with("warning: ")).collect();
    let expected = [
        ("cat/truncated.jpg", "ends early"),
        ("cat/empty.jpg", "the file is empty"),
        ("dog/text.jpg", "not a JPEG"),
        ("dog/huge.bmp", "10000x10000 is more than `max_pixels`"),
        ("dog/dot.png", "1x1 has a side below `min_side` 2"),
    ];
    for (name, reason) in expected {
        let of_it: Vec<_> = warnings.iter().filter(|line| line.starts_with(&format!("warning: {name}: "))).collect();
        assert!(of_it.len() == 1 && of_it[0].contains(reason), "{name}: {warnings:?}");
        assert!(of_it[0].ends_with("; another image takes its place"), "{name}: {warnings:?}");
    }
    let of_knn = warnings.iter().filter(|line| line.ends_with("; left out of k-NN")).count();
    assert_eq!((warnings.len(), of_knn), (10, 5), "{warnings:?}");
    let counted = place.metrics("run").iter().filter_map(|line| line["bad_images"].as_u64()).max();
    assert_eq!(counted, Some(5));
    assert_eq!(run.stdout.lines().count(), 1, "k-NN works without them: {}", run.stderr);
}

#[test]
fn more_bad_images_than_allowed_end_the_run() {
    let place = Workplace::new();
    place.write_classes("photos", &["cat", "dog"], 8);
    for i in 0..8 {
        place.write(&format!("photos/cat/bad-{i}.jpg"), "");
    }
    let args = ["--data", "photos", "--length", "4 epochs", "--set", "eval.val=''"];
    let failed = place.train("run", &args);
    failed.failed(
        1,
        &[" of the 24 image(s) read so far cannot be read (", " %, `max_bad_share` allows 10.0 %)\n  `cat/bad-"],
    );
    failed.failed(1, &[" more\n\nhint: repair or remove them, or raise `max_bad_share`"]);
    assert_eq!(failed.stderr.matches(": the file is empty\n").count(), 5, "five are shown: {}", failed.stderr);
    assert!(names(&place.path("run")).iter().all(|name| !name.starts_with(".writing")));
    let log = String::from_utf8(place.read("run/log.txt")).expect("UTF-8");
    assert!(log.contains("\nerror: data: "), "{log}");
}

#[test]
fn a_folder_without_a_readable_image_ends_the_run() {
    let place = Workplace::new();
    for i in 0..3 {
        place.write(&format!("photos/{i}.jpg"), "");
    }
    let failed = place.train("run", &["--data", "photos", "--length", "5 steps", "--set", "eval.val=''"]);
    failed.failed(1, &["none of the 3 image(s) tried can be read", "the file is empty"]);
}

#[test]
fn images_smaller_than_the_crops_work() {
    let place = Workplace::new();
    for i in 0..9 {
        place.write_image(&format!("photos/{i}.png"), &picture(5, 7 + i, 2, i));
    }
    let run = place.train("run", &["--data", "photos", "--set", "eval.val=''"]).succeeded();
    assert!(run.stderr.contains("9 in photos, no classes"), "{}", run.stderr);
    assert!(run.stderr.contains("k-NN       not measured: "), "{}", run.stderr);
    assert_eq!(run.stdout, "");
}

#[test]
fn classes_with_too_few_images_for_knn_are_trained_on_all_the_same() {
    let place = Workplace::new();
    place.write_classes("few", &["cat", "dog"], 6);
    place.write_classes("one held out", &["cat", "dog"], 6);
    for i in 6..14 {
        place.write_image(&format!("one held out/cat/{i}.png"), &picture(20, 17, 0, i));
    }
    for data in ["few", "one held out"] {
        let run = place.train(&format!("run of {data}"), &["--data", data, "--set", "eval.val=''"]).succeeded();
        assert!(run.stderr.contains("k-NN       not measured: it takes two classes"), "{data}: {}", run.stderr);
        assert_eq!(run.stdout, "", "{data}");
    }
}

#[test]
fn a_single_image_is_enough_to_run() {
    let place = Workplace::new();
    place.write_image("photos/only.png", &picture(31, 20, 0, 0));
    place.train("run", &["--data", "photos", "--set", "eval.val=''"]).succeeded();
}

#[test]
fn classes_to_validate_on_must_be_those_trained_on() {
    let place = Workplace::new();
    place.write_classes("photos", &["cat", "dog"], 6);
    place.write_classes("val", &["cat", "owl"], 2);
    let failed = place.train("run", &["--data", "photos", "--set", "eval.val='val'"]);
    failed.failed(2, &["`eval.val` \"val\"", "`photos`", "or their names differ"]);
}
