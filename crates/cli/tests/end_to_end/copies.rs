//! `dinoxide eval copies`.

use crate::eval::{one_object, place};
use crate::support::{Finished, Workplace, picture};

fn copies(place: &Workplace, args: &[&str]) -> Finished {
    place.run(&[&["eval", "copies", "--weights", "run/teacher.safetensors"], args].concat())
}

#[test]
fn copies_are_made_by_each_edit_and_repeat() {
    let place = place();
    let args = ["--originals", "val", "--distractors", "train", "--edits", "flip,jpeg", "--json"];
    let found = copies(&place, &args).succeeded();
    let result = one_object(&found.stdout);
    let scores = &result["scores"];
    assert_eq!((scores["queries"].as_u64(), scores["gallery"].as_u64()), (Some(18), Some(33)));
    let names: Vec<_> = result["metrics"].as_array().expect("metrics").iter().map(|m| m["name"].as_str()).collect();
    let expected = ["micro-AP", "mAP", "original first", "mAP, flip", "mAP, jpeg"].map(Some);
    assert_eq!(names, expected);
    assert_eq!(result["protocol"]["method"]["copies"], "flip, jpeg, seed 0");
    assert_eq!(result["protocol"]["features"][0]["tokens"], serde_json::json!(["cls", "patch_gem"]));
    assert_eq!(copies(&place, &args).succeeded().stdout, found.stdout, "an evaluation repeats");
    let text = copies(&place, &["--originals", "synthetic:images=8,size=16"]).succeeded().stdout;
    assert!(text.starts_with("copies: 64 copies of 8 originals among 8 images\n"), "{text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("mAP, ")).count(), 8, "{text}");
    let white = ["--originals", "val", "--whiten", "train", "--whiten-dims", "5", "--json"];
    let white = one_object(&copies(&place, &white).succeeded().stdout);
    assert_eq!(white["protocol"]["method"]["whitening"], serde_json::json!(["train", 5]));
}

#[test]
fn given_copies_belong_to_originals_by_name_or_by_a_list() {
    let place = place();
    for (i, name) in ["1", "11", "a b"].into_iter().enumerate() {
        place.write_image(&format!("originals/{name}.png"), &picture(20, 17, i, i as u32));
        place.write_image(&format!("copies/{name}-strong.png"), &picture(18, 16, i, i as u32));
    }
    place.write_image("copies/more/11.png", &picture(30, 17, 1, 1));
    let base = ["--originals", "originals", "--copies", "copies"];
    let found = copies(&place, &base).succeeded().stdout;
    assert!(found.starts_with("copies: 4 copies of 3 originals among 3 images\n"), "{found}");
    assert_eq!(found.lines().count(), 5, "{found}");
    // The same image is its own best copy, whatever the backbone.
    std::fs::copy(place.path("originals/1.png"), place.path("copies/1-strong.png")).expect("copied");
    std::fs::remove_file(place.path("copies/more/11.png")).expect("there");
    std::fs::copy(place.path("originals/11.png"), place.path("copies/11-strong.png")).expect("copied");
    std::fs::copy(place.path("originals/a b.png"), place.path("copies/a b-strong.png")).expect("copied");
    let best = one_object(&copies(&place, &[&base[..], &["--json"]].concat()).succeeded().stdout);
    assert_eq!((best["scores"]["map"].as_f64(), best["scores"]["micro_ap"].as_f64()), (Some(100.0), Some(100.0)));

    place.write("pairs.csv", "1-strong.png,11.png\n11-strong.png,\na b-strong.png, a b.png\n");
    let listed = [&base[..], &["--pairs", "pairs.csv"]].concat();
    let found = copies(&place, &listed).succeeded().stdout;
    assert!(found.contains("2 copies of 3 originals among 3 images, 1 images that are no copies"), "{found}");
    let wrong = |text: &str, message: &str| {
        place.write("pairs.csv", text);
        copies(&place, &listed).failed(2, &["pairs.csv: ", message]);
    };
    wrong("1-strong.png\n", "line 1: `1-strong.png` is not `COPY,ORIGINAL`");
    wrong("1-strong.png,2.png\n", "line 1: `2.png` is not in originals");
    wrong("9.png,1.png\n", "line 1: `9.png` is not in copies");
    wrong("1-strong.png,1.png\n\n1-strong.png,\n", "line 3: `1-strong.png` was listed before");
    wrong("1-strong.png,1.png\n", "`11-strong.png` is not listed, one of 2");
    place.write("pairs.csv", "1-strong.png,\n11-strong.png,\na b-strong.png,\n");
    copies(&place, &listed).failed(2, &["none of the 3 queries has a relevant image"]);
    place.write_image("copies/12-strong.png", &picture(18, 16, 0, 0));
    copies(&place, &base).failed(
        2,
        &[
            "copies: no original in originals has the name that `12-strong.png` begins with, and so for 1 of 4",
            "hint: ",
        ],
    );
    place.write_image("originals/again/11.png", &picture(18, 16, 0, 0));
    copies(&place, &base).failed(2, &["originals: `11.png` and `again/11.png` have one name", "hint: `--pairs FILE`"]);
}

#[test]
fn what_cannot_be_asked_of_copies_is_refused() {
    let place = place();
    let mut seen = 0;
    for (args, message) in [
        (&["--originals", "nowhere"][..], "nowhere"),
        (&["--originals", "val", "--distractors", "val"], "val: originals and distractors are the same images"),
        (&["--originals", "val", "--edits", "zoom"], "no edit has this name, the edits are crop, flip, "),
        (&["--originals", "val", "--edits", "crop,flip,crop"], "copies: `--edits` has crop twice"),
        (&["--originals", "val", "--pairs", "p.csv"], "--copies"),
        (&["--originals", "val", "--whiten-dims", "3"], "--whiten"),
        (&["--originals", "val", "--whiten", "val", "--whiten-dims", "9"], "`--whiten-dims` is 9 with 9 images"),
        (&["--originals", "val", "--crop", "18"], "18"),
    ] {
        copies(&place, args).failed(2, &[message]);
        seen += 1;
    }
    assert_eq!(seen, 8);
    place.write("val/cat/broken.png", "no image");
    let found = copies(&place, &["--originals", "val", "--edits", "flip"]).succeeded();
    assert_eq!(found.stderr.matches("warning: cat/broken.png").count(), 1, "{}", found.stderr);
    assert!(found.stdout.starts_with("copies: 9 copies of 10 originals among 9 images\n"), "{}", found.stdout);
}
