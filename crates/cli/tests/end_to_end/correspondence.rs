//! `dinoxide eval correspondence`.

use image::{GrayImage, Luma, Rgb, RgbImage};
use serde_json::Value;

use crate::eval::one_object;
use crate::support::{Finished, Workplace};

fn correspondence(place: &Workplace, args: &[&str]) -> Finished {
    place.run(&[&["eval", "correspondence", "--weights", "run/teacher.safetensors"], args].concat())
}

/// Two classes of two objects with three views each: a square on a ground, further to the right from view to view.
fn place() -> Workplace {
    let place = Workplace::new();
    place.train("run", &[]).succeeded();
    for class in ["cup", "pear"] {
        for object in 0..2u32 {
            for view in 0..3u32 {
                let name = format!("things/{class}/{object}/{view}");
                let inside = |x: u32, y: u32| (4 + 4 * view..12 + 4 * view).contains(&x) && (4..12).contains(&y);
                let color = |x, y| {
                    if inside(x, y) { Rgb([230, 90 + 40 * object as u8, 20]) } else { Rgb([30, 50, (9 * x) as u8]) }
                };
                place.write_image(&format!("{name}.png"), &RgbImage::from_fn(24, 20, color));
                let mask = GrayImage::from_fn(24, 20, |x, y| Luma([if inside(x, y) { 255 } else { 0 }]));
                mask.save(place.path(&format!("{name}-mask.png"))).expect("written");
            }
        }
    }
    place
}

#[test]
fn silhouettes_are_carried_within_objects_and_across_them() {
    let place = place();
    let within = ["--data", "things", "--instance-depth", "2", "--sources", "9", "--json"];
    let found = correspondence(&place, &within).succeeded();
    let result = one_object(&found.stdout);
    let count = |result: &Value, key: &str| result["scores"][key].as_u64();
    assert_eq!((count(&result, "pairs"), count(&result, "targets")), (Some(24), Some(12)));
    assert_eq!(result["scores"]["by_group"].as_array().map(Vec::len), Some(4));
    assert_eq!(result["protocol"]["method"]["task"], "silhouettes");
    assert_eq!(correspondence(&place, &within).succeeded().stdout, found.stdout, "an evaluation repeats");
    // 64 pixels that move by 4 or 8: a third or nothing stays; two of the six pairs are two steps apart.
    let still = result["scores"]["still"].as_f64().expect("a number");
    assert!((still - 100.0 * (4.0 / 3.0) / 6.0).abs() < 1e-3, "{still}");
    let text = correspondence(&place, &["--data", "things", "--across", "--sources", "2"]).succeeded().stdout;
    assert!(text.starts_with("correspondence: ") && text.contains(" targets in 2 groups\n"), "{text}");
    for name in ["IoU of silhouettes ", "left where they are", "everything is figure", "IoU of silhouettes, pear"] {
        assert!(text.lines().any(|line| line.starts_with(name)), "`{name}` is not in\n{text}");
    }
    let mut seen = 0;
    for (args, message) in [
        (&["--instance-depth", "3"][..], "`--instance-depth` is 3 with `cup/0/0` in 2 folder(s)"),
        (&["--sources", "0"], "`--sources` is 0"),
        (&["--boxes", "b.csv"], "--keypoints"),
        (&["--layers", "9"], "the last 9 blocks"),
    ] {
        correspondence(&place, &[&["--data", "things"], args].concat()).failed(2, &[message]);
        seen += 1;
    }
    assert_eq!(seen, 4);
    correspondence(&place, &["--data", "nowhere"]).failed(2, &["nowhere"]);
}

#[test]
fn keypoints_are_carried_by_folders_or_by_a_list() {
    let place = place();
    let mut lines = String::new();
    for (class, view) in [("cup", 0), ("cup", 1), ("cup", 2), ("pear", 0), ("pear", 1)] {
        for (name, x) in [("left", 5), ("right", 10)] {
            lines += &format!("{class}/0/{view}.png,{name},{},7.5\n", x + 4 * view);
        }
    }
    place.write("points.csv", &lines);
    let base = ["--data", "things", "--keypoints", "points.csv"];
    let result = one_object(&correspondence(&place, &[&base[..], &["--json"]].concat()).succeeded().stdout);
    let count = |result: &Value, key: &str| result["scores"][key].as_u64();
    assert_eq!((count(&result, "pairs"), count(&result, "points")), (Some(8), Some(16)));
    let names: Vec<_> = result["metrics"].as_array().expect("metrics").iter().map(|m| m["name"].as_str()).collect();
    assert_eq!(names, ["PCK@0.1", "PCK@0.05", "PCK@0.1, by point", "PCK@0.05, by point"].map(Some));
    assert_eq!(result["protocol"]["method"]["extent"], "image");
    // Everything is within ten times the image, and nothing moves by less than a twentieth of it.
    assert_eq!(result["scores"]["still"], serde_json::json!([0.0, 0.0]));
    place.write("pairs.csv", "cup/0/0.png,cup/0/1.png\ncup/0/0.png,pear/0/1.png\npear/0/0.png, pear/0/1.png\n");
    place.write("boxes.csv", "cup/0/1.png,0,0,4000,9\npear/0/1.png,0,0,4,4000\n");
    let listed = [&base[..], &["--pairs", "pairs.csv", "--boxes", "boxes.csv"]].concat();
    correspondence(&place, &listed).failed(2, &["boxes.csv: no box of `cup/0/0.png`, which has keypoints"]);
    let boxes: String =
        lines.lines().map(|line| format!("{},0,0,4000,9\n", &line[..line.find(',').expect("a comma")])).collect();
    let mut boxes: Vec<&str> = boxes.lines().collect();
    boxes.dedup();
    place.write("boxes.csv", boxes.join("\n"));
    let text = correspondence(&place, &listed).succeeded().stdout;
    assert!(text.starts_with("correspondence: 3 pairs, 6 keypoints\n"), "{text}");
    assert!(text.lines().any(|line| line.starts_with("PCK@0.05 ") && line.contains("100.00 %")), "{text}");

    let wrong = |file: &str, text: &str, message: &str| {
        let before = place.read(file);
        place.write(file, text);
        correspondence(&place, &listed).failed(2, &[file, message]);
        place.write(file, before);
    };
    wrong("points.csv", "cup/0/0.png,left,5\n", "line 1: `cup/0/0.png,left,5` is not `IMAGE,NAME,X,Y`");
    wrong("points.csv", "cup/0/0.png,left,5,nan\n", "line 1: `nan` is not a number");
    wrong("points.csv", "cup/9/0.png,left,5,5\n", "line 1: image `cup/9/0.png` is not in things");
    wrong(
        "points.csv",
        "cup/0/0.png,a,5,5\n\ncup/0/0.png,a,6,5\n",
        "line 3: keypoint `a` of `cup/0/0.png` was listed before",
    );
    wrong("points.csv", "\n", "no line");
    wrong("boxes.csv", "cup/0/0.png,5,5,5,9\n", "line 1: a box ends to the right of where it begins");
    wrong("pairs.csv", "cup/0/0.png\n", "line 1: `cup/0/0.png` is not `SOURCE,TARGET`");
    place.write("points.csv", "cup/0/0.png,left,24,5\ncup/0/1.png,left,3,5\n");
    correspondence(&place, &base)
        .failed(1, &["cup/0/0.png", "keypoint `left` at column 24, row 5 is outside the image of 24x20"]);
    place.write("points.csv", "cup/0/0.png,left,4,5\ncup/0/1.png,right,3,5\n");
    correspondence(&place, &base).failed(2, &["no two images have one in common, in 2 pairs"]);
    correspondence(&place, &[&base[..], &["--temperature", "0"]].concat()).failed(2, &["`--temperature` is 0"]);
}
