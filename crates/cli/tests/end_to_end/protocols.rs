//! `dinoxide eval`: few-shot k-NN, logistic regression, retrieval, clustering, suites and comparisons.

use image::{GrayImage, Luma, Rgb, RgbImage};
use serde_json::{Value, json};

use crate::eval::{eval, one_object, place};
use crate::support::{Finished, Workplace, picture};

const WEIGHTS: [&str; 2] = ["--weights", "run/teacher.safetensors"];

fn run(place: &Workplace, task: &str, args: &[&str]) -> Finished {
    place.run(&[&["eval", task], &WEIGHTS[..], args].concat())
}

#[test]
fn few_shot_scores_have_a_mean_and_a_deviation_over_draws() {
    let place = place();
    let args = ["--k", "2,5", "--shots", "1,4", "--draws", "3"];
    let found = eval(&place, "knn", &args).succeeded().stdout;
    assert!(found.contains("with few train images, mean of 3 draws:\nimages per class  k"), "{found}");
    let result = one_object(&eval(&place, "knn", &[&args[..], &["--json"]].concat()).succeeded().stdout);
    let scores = result["scores"]["few_shot"].as_array().expect("scores");
    let of: Vec<(u64, u64)> =
        scores.iter().map(|s| (s["shots"].as_u64().expect("a count"), s["k"].as_u64().expect("a count"))).collect();
    assert_eq!(of, [(1, 1), (4, 2), (4, 4)]);
    assert_eq!(scores[0]["by_draw"].as_array().map(Vec::len), Some(3));
    assert_eq!(result["protocol"]["method"]["few_shot"], json!({ "shots": [1, 4], "draws": 3, "seed": 0 }));
    assert_eq!(result["metrics"].as_array().map(Vec::len), Some(5));
    let more = eval(&place, "knn", &["--k", "2", "--shots", "9"]);
    more.failed(2, &["train: class `cat` has 8 images, `--shots` asks for 9", "hint: ask for at most 8"]);
    eval(&place, "knn", &["--k", "2", "--shots", "1", "--draws", "0"]).failed(2, &["few-shot: `--draws` is 0"]);
    eval(&place, "knn", &["--k", "2", "--shots", "1,4,1"]).failed(2, &["few-shot: `--shots` has 1 twice"]);
    eval(&place, "knn", &["--k", "2", "--draws", "3"]).failed(2, &["--shots <N,N,…>"]);
}

#[test]
fn logistic_regression_says_what_its_penalty_was_chosen_on() {
    let place = place();
    let args = ["--c", "0.01,1,100", "--max-iterations", "50"];
    let found = eval(&place, "logistic", &args).succeeded().stdout;
    assert!(found.starts_with("logistic regression: ") && found.contains(" on 9 val images, C = "), "{found}");
    assert!(found.contains("selected on held-out train samples"), "{found}");
    let on_val = eval(&place, "logistic", &[&args[..], &["--select-on-val", "--json"]].concat()).succeeded();
    let result = one_object(&on_val.stdout);
    assert_eq!((&result["task"], &result["scores"]["selection"]["on"]), (&"logistic".into(), &"val".into()));
    assert_eq!(result["scores"]["candidates"].as_array().map(Vec::len), Some(3));
    assert!(result["scores"]["interval"]["low"].is_number());
    for (args, message) in [
        (["--c", "-1"], "logistic: `--c` is [-1.0], it must be an ascending list"),
        (["--c", "1,0.1"], "logistic: `--c` is [1.0, 0.1], it must be an ascending list"),
        (["--max-iterations", "0"], "logistic: `--max-iterations` is 0"),
        (["--held-out", "1.5"], "logistic: `--held-out` is 1.5"),
    ] {
        eval(&place, "logistic", &args).failed(2, &[message]);
    }
}

/// Two classes of three objects with four views each, and a mask beside each view.
fn views(place: &Workplace) {
    for class in 0..2 {
        for object in 0..3 {
            for view in 0..4 {
                let name = format!("views/{}/{object}/{view}", ["cup", "pear"][class]);
                place.write_image(&format!("{name}.png"), &picture(17 + 3 * object, 20, class, 5 * object + view));
                place.write_image(&format!("{name}-mask.png"), &picture(17, 20, 2, 0));
            }
        }
    }
}

#[test]
fn instances_are_folders_at_a_depth_and_masks_are_left_out() {
    let place = place();
    views(&place);
    let args = ["--data", "views", "--exclude", "*-mask.png", "--instance-depth", "2", "--k", "1,3"];
    let found = run(&place, "retrieval", &args).succeeded().stdout;
    let lines: Vec<&str> = found.lines().collect();
    assert_eq!(lines[0], "retrieval: 24 queries among 24 images, 6 instances", "{found}");
    let names: Vec<_> = lines[2..].iter().map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, [Some("mAP"), Some("recall@1"), Some("recall@3")]);
    let queries = ["--data", "train", "--queries", "val", "--k", "1", "--json"];
    let result = one_object(&run(&place, "retrieval", &queries).succeeded().stdout);
    assert_eq!((&result["scores"]["queries"], &result["protocol"]["train_samples"]), (&9.into(), &24.into()));
    for (args, parts) in [
        (
            &["--data", "views", "--instance-depth", "3"][..],
            ["lies in 2 folder(s), `--instance-depth` asks for 3", "hint: "],
        ),
        (&["--data", "views", "--instance-depth", "0"], ["`--instance-depth` is 0", ""]),
        (
            &["--data", "views", "--exclude", "*.tif"],
            ["pattern `*.tif`: none of the 48 images", "the first is `cup/0/0"],
        ),
        (&["--data", "views", "--exclude", "*"], ["pattern `*`: all 48 images", ""]),
        (&["--data", "views", "--k", "48"], ["retrieval: `--k` is [48] with 47 images to rank", ""]),
        (&["--data", "views", "--k", "3,1,3"], ["retrieval: `--k` has 3 twice", ""]),
    ] {
        run(&place, "retrieval", args).failed(2, &parts);
    }
    // Each image alone in its instance.
    place.write_image("single/a/1.png", &picture(20, 20, 0, 0));
    place.write_image("single/b/1.png", &picture(20, 20, 1, 0));
    run(&place, "retrieval", &["--data", "single", "--k", "1"])
        .failed(2, &["none of the 2 queries has a relevant image"]);
}

#[test]
fn landmarks_are_scored_from_a_file_of_ground_truth() {
    let place = place();
    let truth = json!({
        "imlist": ["cat_0", "cat_1", "dog_0", "dog_1", "owl_0"], "qimlist": ["cat_2", "owl_1"],
        "gnd": [
            { "easy": [0], "hard": [1], "junk": [2], "bbx": [1.0, 2.0, 15.5, 16.0] },
            { "easy": [], "hard": [4], "junk": [], "bbx": [0, 0, 20, 17] }
        ]
    });
    for (class, name) in ["cat", "dog", "owl"].into_iter().enumerate() {
        for i in 0..3 {
            place.write_image(&format!("jpg/{name}_{i}.png"), &picture(20, 17, class, i));
        }
    }
    place.write("truth.json", truth.to_string());
    let args = ["--data", "jpg", "--ground-truth", "truth.json", "--json"];
    let result = one_object(&run(&place, "retrieval", &args).succeeded().stdout);
    let found = result["scores"]["by_difficulty"].as_array().expect("difficulties");
    let queries: Vec<_> = found.iter().map(|one| (one["difficulty"].as_str(), one["queries"].as_u64())).collect();
    assert_eq!(queries, [(Some("easy"), Some(1)), (Some("medium"), Some(2)), (Some("hard"), Some(2))]);
    assert_eq!(result["protocol"]["method"]["task"], "revisited");

    let with = |key: &str, value: Value| {
        let mut wrong = truth.clone();
        wrong[key] = value;
        place.write("wrong.json", wrong.to_string());
        run(&place, "retrieval", &["--data", "jpg", "--ground-truth", "wrong.json"])
    };
    with("qimlist", json!(["cat_2", "yak"])).failed(2, &["wrong.json: image `yak` is not in jpg"]);
    with("qimlist", json!(["cat_2"])).failed(2, &["wrong.json: ground truth: 1 queries in `qimlist`, 2 in `gnd`"]);
    with("gnd", json!(3)).failed(2, &["wrong.json: "]);
    run(&place, "retrieval", &["--data", "jpg", "--ground-truth", "none.json"]).failed(2, &["none.json: "]);
}

#[test]
fn clusters_are_compared_with_classes() {
    let place = place();
    let found = run(&place, "clustering", &["--data", "train"]).succeeded().stdout;
    assert!(found.starts_with("clustering: 24 images of 3 classes in 3 clusters\n"), "{found}");
    for name in ["accuracy, matched", "NMI", "ARI"] {
        assert!(found.lines().any(|line| line.starts_with(name)), "{found}");
    }
    run(&place, "clustering", &["--data", "train", "--clusters", "25"])
        .failed(2, &["clustering: `--clusters` is 25 for 24 samples"]);
    run(&place, "clustering", &["--data", "train/cat"]).failed(2, &["train/cat: the images have no classes"]);
}

#[test]
fn a_suite_is_one_table_and_takes_each_set_once() {
    let place = place();
    let suite = "[[task]]\ntask = \"knn\"\ntrain = \"train\"\nval = \"val\"\nk = [2, 5]\n\
                 [[task]]\ntask = \"linear\"\ntrain = \"train\"\nval = \"val\"\niterations = 5\nsamples = 8\n\
                 [[task]]\ntask = \"clustering\"\ndata = \"val\"\n";
    place.write("suite.toml", suite);
    // A warning for each pass over the images would show a second one.
    place.write("val/cat/broken.png", "no image");
    let args = ["--config", "suite.toml", "--output", "suite.json", "--markdown", "suite.md"];
    let found = run(&place, "suite", &args).succeeded();
    assert_eq!(found.stderr.matches("warning: cat/broken.png").count(), 1, "{}", found.stderr);
    assert_eq!(String::from_utf8(place.read("suite.md")).expect("UTF-8"), found.stdout);
    let rows: Vec<&str> = found.stdout.lines().filter(|line| line.starts_with("| ")).collect();
    assert_eq!(rows.len(), 1 + 2 + 1 + 3, "{}", found.stdout);
    assert!(rows[1].starts_with("| knn | top-1, k = 2 | ") && rows[3].starts_with("| linear | top-1 | "));
    let results = one_object(&String::from_utf8(place.read("suite.json")).expect("UTF-8"));
    let alone = one_object(&eval(&place, "knn", &["--k", "2,5", "--json"]).succeeded().stdout);
    assert_eq!(results["results"][0]["scores"], alone["scores"], "a suite changes no score");

    place.write("wrong.toml", suite.replace("iterations", "iteration"));
    run(&place, "suite", &["--config", "wrong.toml"])
        .failed(2, &["wrong.toml: task 2: unexpected argument '--iteration' found", "'--iterations'"]);
    run(&place, "suite", &["--config", "none.toml"]).failed(2, &["none.toml: "]);
    run(&place, "suite", &["--config", "suite.toml", "--output", "nowhere/suite.json"])
        .failed(2, &["nowhere: no such folder to write to"]);
    for flag in ["--output", "--markdown"] {
        run(&place, "suite", &["--config", "suite.toml", flag, "suite.toml"])
            .failed(2, &["suite.toml: is there and is not ", &format!("hint: choose another name for `{flag}`")]);
        assert_eq!(place.read("suite.toml"), suite.as_bytes());
    }
    // What a suite wrote may be written again.
    place.write("suite.toml", "[[task]]\ntask = \"clustering\"\ndata = \"val\"\n");
    run(&place, "suite", &args).succeeded();
    assert_eq!(String::from_utf8(place.read("suite.md")).expect("UTF-8").matches("| clustering |").count(), 1);
}

const DENSE: &str = "[[task]]\ntask = \"knn\"\ntrain = \"train\"\nval = \"val\"\nk = 2\n\
     [[task]]\ntask = \"segmentation\"\ntrain = \"synthetic:images=24,size=32x40\"\nval = \"synthetic:split=val,images=6,size=40x32\"\n\
     iterations = 12\nsamples = 4\n\
     [[task]]\ntask = \"depth\"\ntrain = \"synthetic:images=24,size=32x40\"\nval = \"synthetic:split=val,images=6,size=40x32\"\n\
     iterations = 12\nsamples = 4\nmax_depth = 11\n\
     [[task]]\ntask = \"video\"\ndata = \"videos\"\n\
     [[task]]\ntask = \"foreground\"\ntrain = \"synthetic:images=24,size=32x40\"\nval = \"synthetic:split=val,images=6,size=40x32\"\n\
     iterations = 12\nsamples = 4\n";

/// A video of a square that moves.
fn video(place: &Workplace) {
    for i in 0..4 {
        let inside = |x: u32, y: u32| (4 + 2 * i..14 + 2 * i).contains(&x) && (4..14).contains(&y);
        let frame = |x, y| Rgb(if inside(x, y) { [230, 200, 90] } else { [30, 50, 90] });
        place.write_image(&format!("videos/one/img/{i}.png"), &RgbImage::from_fn(24, 20, frame));
        let mask = GrayImage::from_fn(24, 20, |x, y| Luma([u8::from(inside(x, y))]));
        let path = place.path(&format!("videos/one/mask/{i}.png"));
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        mask.save(path).expect("written");
    }
}

#[test]
fn dense_tasks_stand_in_the_same_table_and_can_be_compared() {
    let place = place();
    video(&place);
    place.write("suite.toml", DENSE);
    let found = run(&place, "suite", &["--config", "suite.toml", "--output", "a.json"]).succeeded().stdout;
    let rows: Vec<Vec<&str>> = found
        .lines()
        .filter(|line| line.starts_with("| "))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    assert_eq!(rows.iter().map(Vec::len).collect::<Vec<_>>(), [5; 14], "{found}");
    let names: Vec<String> = rows[1..].iter().map(|row| format!("{} {}", row[0], row[1])).collect();
    let expected = [
        "knn top-1, k = 2",
        "segmentation mIoU",
        " mean accuracy",
        " pixel accuracy",
        "depth RMSE",
        " AbsRel",
        " δ < 1.25",
        "video J&F",
        " J",
        " F",
        "foreground IoU, linear",
        " IoU, attention",
        " IoU, first component",
    ];
    assert_eq!(names, expected);
    assert!(rows[5][2].ends_with(" m") && rows[5][4] == "6 val, 24 train images", "{:?}", rows[5]);
    let results = one_object(&String::from_utf8(place.read("a.json")).expect("UTF-8"));
    let alone = run(&place, "video", &["--data", "videos", "--json"]).succeeded().stdout;
    assert_eq!(results["results"][3], one_object(&alone), "a suite changes no score");
    let itself = place.run(&["eval", "compare", "a.json", "a.json"]).succeeded().stdout;
    assert!(itself.contains("foreground: IoU, first component"), "{itself}");
}

#[test]
fn several_backbones_stand_side_by_side() {
    let place = place();
    place.train("untrained", &["--length", "0 steps"]).succeeded();
    let suite = "[[task]]\ntask = \"knn\"\ntrain = \"train\"\nval = \"val\"\nk = [2, 5]\n\
                 [[task]]\ntask = \"clustering\"\ndata = \"val\"\n";
    place.write("suite.toml", suite);
    let args = ["--weights", "untrained/teacher.safetensors", "--config", "suite.toml", "--output", "both.json"];
    let found = run(&place, "suite", &args).succeeded();
    let lines: Vec<&str> = found.stdout.lines().collect();
    assert_eq!(lines[..2], ["- A: `run/teacher.safetensors`", "- B: `untrained/teacher.safetensors`"]);
    assert_eq!(lines[3], "| task | metric | A | B | images |");
    assert_eq!(lines.len(), 5 + 2 + 3, "{}", found.stdout);
    let result = one_object(&String::from_utf8(place.read("both.json")).expect("UTF-8"));
    let backbones = result["backbones"].as_array().expect("backbones");
    assert_eq!(backbones.len(), 2);
    for (backbone, weights) in backbones.iter().zip(["run", "untrained"]) {
        let weights = format!("{weights}/teacher.safetensors");
        assert_eq!(backbone["weights"], weights.as_str());
        let alone = place.run(&["eval", "suite", "--weights", &weights, "--config", "suite.toml", "--json"]);
        assert_eq!(backbone["results"], one_object(&alone.succeeded().stdout)["results"]);
    }
    let steps = |i: usize| backbones[i]["results"][0]["provenance"]["steps"].as_u64();
    assert_eq!([steps(0), steps(1)], [Some(10), Some(0)]);
    place
        .run(&["eval", "compare", "both.json", "both.json"])
        .failed(2, &["both.json: holds several backbones", "hint: "]);
    // Other sizes of training would mean other crops, and other patches other windows.
    let larger = ["--length", "0 steps", "--set", "augmentation.global_crop_size=24", "--set", "model.patch_size=8"];
    place.train("larger", &larger).succeeded();
    let args = ["--weights", "larger/teacher.safetensors", "--config", "suite.toml"];
    run(&place, "suite", &args).failed(
        2,
        &["run/teacher.safetensors was trained at 16 px, larger/teacher.safetensors at 24", "hint: ", "`--crop`"],
    );
    let alike = run(&place, "suite", &[&args[..], &["--crop", "24"]].concat()).succeeded();
    assert!(!alike.stderr.contains("warning"), "{}", alike.stderr);
    video(&place);
    place.write("suite.toml", "[[task]]\ntask = \"video\"\ndata = \"videos\"\n");
    let unlike = run(&place, "suite", &args).succeeded();
    let note = "A and B were not measured alike: video: method.inference is";
    assert!(unlike.stderr.contains(&format!("warning: {note}")), "{}", unlike.stderr);
    assert!(unlike.stdout.contains(&format!("\n- {note}")), "{}", unlike.stdout);
}

#[test]
fn a_task_that_fails_is_named_and_the_others_are_measured() {
    let place = place();
    let knn = "[[task]]\ntask = \"knn\"\ntrain = \"train\"\nval = \"val\"\nk = 2\n";
    let missing = "[[task]]\ntask = \"clustering\"\ndata = \"nowhere\"\n";
    video(&place);
    std::fs::copy(place.path("videos/one/img/1.png"), place.path("videos/one/mask/1.png")).expect("copied");
    let damaged = "[[task]]\ntask = \"video\"\ndata = \"videos\"\n";
    let cases = [(missing, 2, "clustering: ", "nowhere"), (damaged, 1, "video: ", "one number per pixel")];
    for (wrong, code, name, message) in cases {
        place.write("suite.toml", format!("{wrong}{knn}"));
        let args = ["--config", "suite.toml", "--output", "partly.json"];
        let found = run(&place, "suite", &args);
        assert_eq!(found.code, Some(code), "{}", found.stderr);
        let error = "error: suite.toml: 1 of 2 evaluations failed\ntask 1, ";
        assert!(found.stderr.contains(&format!("{error}{name}")) && found.stderr.contains(message), "{}", found.stderr);
        assert!(found.stdout.contains("| - | failed | - | - |\n| knn | top-1, k = 2 |"), "{}", found.stdout);
        assert!(found.stdout.contains(&format!("\n- task 1, {name}")), "{}", found.stdout);
        let result = one_object(&String::from_utf8(place.read("partly.json")).expect("UTF-8"));
        assert_eq!(result["results"].as_array().map(Vec::len), Some(1));
        assert!(result["failed"][0]["error"].as_str().is_some_and(|error| error.contains(message)), "{result}");
    }
    assert_eq!(cases.len(), 2);
    place.write("suite.toml", missing);
    std::fs::remove_file(place.path("partly.json")).expect("there");
    run(&place, "suite", &["--config", "suite.toml", "--output", "partly.json"])
        .failed(2, &["suite.toml: 1 of 1 evaluations failed", "task 1, clustering: "]);
    assert!(!place.path("partly.json").exists());
}

#[test]
fn results_are_compared_only_when_they_were_measured_alike() {
    let place = place();
    place.run(&["train", "--config", "tiny.toml", "--run", "other", "--set", "train.seed=5"]).succeeded();
    let knn = |weights: &str, k: &str, output: &str| {
        let args =
            ["eval", "knn", "--weights", weights, "--train", "train", "--val", "val", "--k", k, "--output", output];
        place.run(&args).succeeded();
    };
    knn("run/teacher.safetensors", "2,5", "a.json");
    knn("other/teacher.safetensors", "2,5", "b.json");
    knn("other/teacher.safetensors", "2", "c.json");
    let compare = |args: &[&str]| place.run(&[&["eval", "compare"], args].concat());
    let found = compare(&["a.json", "b.json"]).succeeded().stdout;
    let lines: Vec<&str> = found.lines().collect();
    assert_eq!(lines[..2], ["A: run/teacher.safetensors", "B: other/teacher.safetensors"]);
    assert!(lines[3].starts_with("knn: top-1, k = 2 ") && lines[4].starts_with("knn: top-1, k = 5 "), "{found}");
    let result = one_object(&compare(&["a.json", "b.json", "--json"]).succeeded().stdout);
    let one = &result["metrics"][1];
    let number = |key: &str| one[key].as_f64().expect("a number");
    assert_eq!(number("difference"), number("second") - number("first"));

    let unlike = compare(&["a.json", "c.json"]);
    unlike.failed(2, &["a.json and c.json were not measured alike", "knn: method.k is [2,5], and [2]", "hint: "]);
    let allowed = compare(&["a.json", "c.json", "--allow", "method.k"]).succeeded().stdout;
    assert_eq!(allowed.lines().count(), 4, "{allowed}");
    knn("run/teacher.safetensors", "7", "e.json");
    compare(&["c.json", "e.json", "--allow", "method.k"])
        .failed(2, &["c.json and e.json have no metric in common: `top-1, k = 2`, and `top-1, k = 7`"]);
    compare(&["a.json", "c.json", "--allow", "method.k,k"])
        .failed(2, &["`--allow k`: neither protocol has a field of this name", "hint: the fields are ", "method.k, "]);
    compare(&["a.json", "none.json"]).failed(2, &["none.json: "]);
    place.write("text.json", "{\"task\": 3}");
    compare(&["a.json", "text.json"]).failed(2, &["text.json: is not a result of `dinoxide eval`"]);
    run(&place, "clustering", &["--data", "val", "--output", "d.json"]).succeeded();
    compare(&["a.json", "d.json"]).failed(2, &["a.json holds knn, d.json holds clustering: not the same evaluation"]);
}
