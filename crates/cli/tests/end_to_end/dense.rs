//! `dinoxide eval` of dense tasks, and `dinoxide viz`.

use image::{GrayImage, ImageBuffer, Luma, Rgb, RgbImage};
use serde_json::Value;

use crate::support::{Finished, Workplace};

const WEIGHTS: [&str; 2] = ["--weights", "run/teacher.safetensors"];
const TRAIN: [&str; 2] = ["--train", "synthetic:images=24,size=32x40"];
const VAL: [&str; 2] = ["--val", "synthetic:split=val,images=6,size=40x32"];
const SHORT: [&str; 4] = ["--iterations", "12", "--samples", "4"];

/// A trained `run`.
fn place() -> Workplace {
    let place = Workplace::new();
    place.train("run", &[]).succeeded();
    place
}

fn run(place: &Workplace, what: [&str; 2], args: &[&[&str]]) -> Finished {
    place.run(&[&what[..], &WEIGHTS, &args.concat()].concat())
}

fn save(place: &Workplace, path: &str, image: &GrayImage) {
    let path = place.path(path);
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    image.save(path).expect("written");
}

/// Images `img/<i>.png` of 24 × 20 pixels below `folder`, and what `mask` gives for each.
fn annotated(place: &Workplace, folder: &str, count: u32, mask: impl Fn(u32) -> GrayImage) {
    for i in 0..count {
        let bright = |x: u32, y: u32| (4 + 2 * i..14 + 2 * i).contains(&x) && (4..14).contains(&y);
        let color = |x, y| if bright(x, y) { Rgb([230, 200, 90]) } else { Rgb([30, 50 + x as u8, 90]) };
        place.write_image(&format!("{folder}/img/{i}.png"), &RgbImage::from_fn(24, 20, color));
        save(place, &format!("{folder}/mask/{i}.png"), &mask(i));
    }
}

fn square(i: u32, id: u8) -> GrayImage {
    GrayImage::from_fn(24, 20, |x, y| {
        Luma([if (4 + 2 * i..14 + 2 * i).contains(&x) && (4..14).contains(&y) { id } else { 0 }])
    })
}

fn json(found: &Finished) -> Value {
    serde_json::from_str(&found.stdout).unwrap_or_else(|e| panic!("{e}: {}", found.stdout))
}

#[test]
fn segmentation_prints_a_row_for_each_class_and_repeats() {
    let place = place();
    let found = run(&place, ["eval", "segmentation"], &[&TRAIN, &VAL, &SHORT]).succeeded();
    let lines: Vec<&str> = found.stdout.lines().collect();
    assert!(lines[0].starts_with("segmentation: mIoU ") && lines[1].starts_with("6 val images, head trained on 24"));
    assert_eq!(lines.len(), 3 + 13, "{}", found.stdout);
    let as_json = |extra: &[&str]| run(&place, ["eval", "segmentation"], &[&TRAIN, &VAL, &SHORT, &["--json"], extra]);
    let (first, second) = (as_json(&["--output", "seg.json"]).succeeded(), as_json(&[]).succeeded());
    assert_eq!(first.stdout, second.stdout, "an evaluation repeats");
    let result = json(&first);
    assert_eq!(result["protocol"]["method"]["task"], "segmentation");
    assert_eq!(result["scores"]["classes"].as_array().expect("classes").len(), 13);
    assert_eq!(place.read("seg.json"), first.stdout.trim_end().as_bytes());
    // By windows that are smaller than the images, the images being resized.
    run(&place, ["eval", "segmentation"], &[&TRAIN, &VAL, &SHORT, &["--window", "16", "--resize", "28"]]).succeeded();
}

#[test]
fn masks_that_do_not_fit_are_refused_by_name() {
    let place = place();
    annotated(&place, "good", 3, |i| square(i, 1));
    let train = ["--train", "good"];
    let bad = |args: &[&[&str]]| run(&place, ["eval", "segmentation"], &[&train, &SHORT, &args.concat()]);
    annotated(&place, "small", 2, |_| GrayImage::new(24, 19));
    bad(&[&["--val", "small"]]).failed(1, &["`0`: the image is 24x20, its map 24x19", "hint: "]);
    annotated(&place, "strange", 2, |i| square(i, 9));
    bad(&[&["--val", "strange"]])
        .failed(1, &["`0`: the mask has id 9 at column 4, row 4; there are 2 classes", "`--void 9`"]);
    bad(&[&["--val", "strange", "--void", "9"]]).succeeded();
    // Here the flag is at fault, in val masks and in train masks.
    bad(&[&["--val", "strange", "--classes", "2"]]).failed(2, &["the mask has id 9", "there are 2 classes"]);
    bad(&[&["--val", "good", "--classes", "1"]]).failed(2, &["the mask has id 1", "there are 1 classes"]);
    bad(&[&["--val", "small", "--classes", "2"]]).failed(1, &["`0`: the image is 24x20, its map 24x19"]);
    place.write_image("colors/img/0.png", &RgbImage::new(24, 20));
    place.write_image("colors/mask/0.png", &RgbImage::new(24, 20));
    let colors = bad(&[&["--val", "colors"]]);
    colors.failed(1, &["Rgb samples; a mask or depth map has one number per pixel"]);
    annotated(&place, "apart", 1, |i| square(i, 1));
    std::fs::rename(place.path("apart/mask/0.png"), place.path("apart/mask/7.png")).expect("renamed");
    bad(&[&["--val", "apart"]]).failed(2, &["`apart`: 1 image(s) and 1 mask(s), no name in common", "hint: "]);
    bad(&[]).failed(2, &["the following required arguments were not provided", "--val <DIR>"]);
    run(&place, ["viz", "segmentation"], &[&train, &["--output", "a.png"]]).failed(2, &["--val <DIR>"]);
    bad(&[&["--val", "nowhere"]]).failed(2, &["`nowhere`: no such folder"]);
    bad(&[&["--val", "good", "--window", "18"]])
        .failed(2, &["18 px is not a multiple of the patch size 4", "hint: 16"]);
    bad(&[&["--val", "good", "--layers", "7"]]).failed(2, &["the last 7 blocks"]);
    bad(&[&["--val", "good", "--learning-rate", "0"]]).failed(2, &["segmentation: `--learning-rate` is 0"]);
    bad(&[&["--val", "good", "--learning-rate", "-1"]]).failed(2, &["segmentation: `--learning-rate` is -1"]);
    bad(&[&["--val", "good", "--output", "nowhere/a.json"]]).failed(2, &["nowhere: no such folder to write to"]);
    place.write("names.txt", "ground\n");
    bad(&[&["--val", "good", "--class-names", "names.txt"]]).failed(2, &["names.txt: 1 names for 2 classes"]);
    place.write("list.txt", "0\n5\n");
    bad(&[&["--val", "good", "--val-list", "list.txt"]]).failed(2, &["`5` is listed", "1 of 2"]);
    bad(&[&["--val", "good", "--train-list", "none.txt"]]).failed(2, &["data: list `none.txt`: ", "hint: "]);
    place.write("list.txt", "2\n0\n");
    let listed = bad(&[&["--val", "good", "--val-list", "list.txt"]]).succeeded();
    assert!(listed.stdout.contains("2 val images"), "{}", listed.stdout);
}

#[test]
fn flags_about_files_are_refused_for_built_in_images() {
    let place = place();
    let mut seen = 0;
    for (flag, value) in [
        ("--train-maps", "maps"),
        ("--train-list", "list.txt"),
        ("--val-maps", "maps"),
        ("--val-list", "list.txt"),
        ("--image-suffix", "_rgb"),
        ("--map-suffix", "_id"),
    ] {
        for task in ["segmentation", "depth", "foreground"] {
            let found = run(&place, ["eval", task], &[&TRAIN, &VAL, &SHORT, &[flag, value]]);
            found.failed(2, &[&format!("`{flag}` is about files, and the built-in images are in none"), "hint: "]);
            seen += 1;
        }
    }
    assert_eq!(seen, 18);
    // A folder beside them may have suffixes.
    annotated(&place, "good", 2, |i| square(i, 1));
    let beside = ["--val", "good", "--map-suffix", "_id"];
    run(&place, ["eval", "segmentation"], &[&TRAIN, &SHORT, &beside]).failed(2, &["`good`: 2 image(s) and 0 mask(s)"]);
    run(&place, ["eval", "depth"], &[&TRAIN, &SHORT, &["--split-by-time", "0.5", "--val-list", "list.txt"]])
        .failed(2, &["--val <DIR>"]);
}

#[test]
fn depth_is_scored_beside_the_mean() {
    let place = place();
    for output in ["bins", "regression"] {
        let args = ["--max-depth", "11", "--head-output", output];
        let found = run(&place, ["eval", "depth"], &[&TRAIN, &VAL, &SHORT, &args]).succeeded().stdout;
        assert!(found.starts_with("depth: RMSE ") && found.contains("6 val images, head trained on 24"), "{found}");
        assert!(found.contains("\nlinear head ") && found.contains("\nmean of the train depths "), "{found}");
    }
    for i in 0..10 {
        place.write_image(&format!("room/frame-{i:03}.png"), &RgbImage::from_pixel(24, 20, Rgb([20 * i as u8, 9, 70])));
        let map = |value: u16| ImageBuffer::<Luma<u16>, Vec<u16>>::from_pixel(24, 20, Luma([value]));
        map(1000 + 100 * i).save(place.path(&format!("room/frame-{i:03}.depth.png"))).expect("written");
    }
    let room = |args: &[&str]| run(&place, ["eval", "depth"], &[&["--train", "room"], &SHORT, args]);
    let found = room(&["--split-by-time", "0.5", "--gap", "2"]).succeeded().stdout;
    assert!(found.contains("3 val images, head trained on 5"), "{found}");
    room(&[]).failed(2, &["`--val` is missing", "hint: `--split-by-time"]);
    room(&["--split-by-time", "0.5", "--gap", "5"]).failed(2, &["`--split-by-time 0.5` with `--gap 5`"]);
    room(&["--split-by-time", "0.5", "--val", "room"]).failed(2, &["two ways"]);
    room(&["--split-by-time", "0.5", "--depth-scale", "1"])
        .failed(1, &["none of the 5 depth map(s)", "the largest is 1400 m", "hint: ", "0.001 for millimetres"]);
    room(&["--split-by-time", "0.5", "--min-depth", "3", "--max-depth", "2"])
        .failed(2, &["`--min-depth` to `--max-depth` is 3 to 2 m"]);
    for i in 0..10 {
        let map = ImageBuffer::<Luma<u16>, Vec<u16>>::new(24, 20);
        map.save(place.path(&format!("room/frame-{i:03}.depth.png"))).expect("written");
    }
    room(&["--split-by-time", "0.5"])
        .failed(1, &["none of the 5 depth map(s)", "the largest is 0 m", "0 is read as missing"]);
}

#[test]
fn a_dpt_head_takes_four_blocks() {
    let place = Workplace::new();
    place.train("run", &["--set", "model.depth=4"]).succeeded();
    let few = ["--iterations", "2", "--samples", "2", "--head", "dpt"];
    let sets = ["--train", "synthetic:images=4,size=16x20", "--val", "synthetic:split=val,images=2,size=20x16"];
    let segmentation = run(&place, ["eval", "segmentation"], &[&sets, &few, &["--json"]]).succeeded();
    let result = json(&segmentation);
    assert_eq!(result["protocol"]["features"][0]["layers"], serde_json::json!([0, 1, 2, 3]));
    let head = result["protocol"]["method"]["head"].as_str().expect("words");
    assert!(head.starts_with("DPT, AdamW, "), "{head}");
    let again = run(&place, ["eval", "segmentation"], &[&sets, &few, &["--json"]]).succeeded();
    assert_eq!(segmentation.stdout, again.stdout, "an evaluation repeats");
    let depth = run(&place, ["eval", "depth"], &[&sets, &few, &["--max-depth", "11"]]).succeeded().stdout;
    assert!(depth.contains("\nDPT head ") && !depth.contains("linear head"), "{depth}");
    run(&place, ["eval", "depth"], &[&sets, &few, &["--layers", "2"]])
        .failed(2, &["`--head dpt` takes 4 blocks, evenly from all; `--layers` is 2"]);
    place.train("shallow", &[]).succeeded();
    let shallow = ["eval", "segmentation", "--weights", "shallow/teacher.safetensors"];
    place.run(&[&shallow[..], &sets, &few].concat()).failed(2, &["the last 4 blocks were asked for, 1 are given"]);
}

#[test]
fn videos_are_scored_object_by_object() {
    let place = place();
    annotated(&place, "videos/one", 5, |i| square(i, 255));
    // Two objects: the square and a strip at the bottom.
    annotated(&place, "videos/two", 4, |i| {
        let mut mask = square(i, 1);
        (0..24).for_each(|x| mask.put_pixel(x, 19, Luma([2])));
        (0..24).for_each(|x| mask.put_pixel(x, 18, Luma([2])));
        mask
    });
    let video = |args: &[&str]| run(&place, ["eval", "video"], &[args]);
    let found = video(&["--data", "videos", "--json"]).succeeded();
    let result = json(&found);
    let videos = result["scores"]["videos"].as_array().expect("videos");
    let counts: Vec<_> = videos.iter().map(|v| (v["frames"].as_u64(), v["objects"].as_array().map(Vec::len))).collect();
    assert_eq!(counts, [(Some(3), Some(1)), (Some(2), Some(2))]);
    assert_eq!(result["protocol"]["method"]["propagation"]["context"], 7);
    let text = video(&["--data", "videos", "--context", "1", "--top-k", "2"]).succeeded().stdout;
    assert!(text.starts_with("video: J&F ") && text.contains(" over 3 objects in 2 videos"), "{text}");
    annotated(&place, "empty/one", 4, |_| GrayImage::new(24, 20));
    video(&["--data", "empty"]).failed(1, &["video `one`: the first mask has no object"]);
    annotated(&place, "short/one", 2, |i| square(i, 1));
    video(&["--data", "short"]).failed(2, &["`one` has 2 frames"]);
    std::fs::remove_file(place.path("videos/one/mask/3.png")).expect("there");
    video(&["--data", "videos"]).failed(2, &["1 of the 5 frames of `one` have no mask"]);
    std::fs::create_dir(place.path("nothing")).expect("made");
    video(&["--data", "nothing"]).failed(2, &["nothing: no folder of a video", "hint: "]);
    video(&["--data", "synthetic"]).failed(2, &["synthetic: the built-in images are no videos", "hint: give a folder"]);
    video(&["--data", "short", "--temperature", "0"]).failed(2, &["`--temperature` is 0"]);
}

#[test]
fn figure_and_ground_have_a_row_for_each_way() {
    let place = place();
    let found = run(&place, ["eval", "foreground"], &[&TRAIN, &VAL, &SHORT]).succeeded().stdout;
    for name in ["linear classifier", "attention of CLS, head", "first principal component", "everything is figure"] {
        assert!(found.lines().any(|line| line.starts_with(name)), "`{name}` is not in\n{found}");
    }
    for object in ["a", "b", "c"] {
        for i in 0..3 {
            place.write_image(
                &format!("things/{object}/{i}.png"),
                &RgbImage::from_pixel(16, 20, Rgb([40 * i as u8; 3])),
            );
            save(&place, &format!("things/{object}/{i}-mask.png"), &GrayImage::from_pixel(16, 20, Luma([i as u8])));
        }
    }
    let split = |share: &str| {
        run(&place, ["eval", "foreground"], &[&["--train", "things", "--split-by-folder", share], &SHORT])
    };
    let found = split("0.3").succeeded().stdout;
    assert!(found.contains("on 3 val images; 6 train images"), "{found}");
    split("1").failed(2, &["`--split-by-folder` is 1, must be above 0 and below 1"]);
    run(&place, ["eval", "foreground"], &[&["--train", "things/a", "--split-by-folder", "0.5"]])
        .failed(2, &["all images are in one folder"]);
}

#[test]
fn every_picture_is_a_png_of_some_size() {
    let place = place();
    let data = ["--data", "synthetic:images=30,size=32x40"];
    let few = ["--count", "2"];
    let pictures: [(&str, Vec<&[&str]>); 7] = [
        ("pca", vec![&data, &few]),
        ("pca", vec![&data, &["--foreground"]]),
        ("attention", vec![&data, &few]),
        ("norms", vec![&data]),
        ("neighbors", vec![&data, &few, &["--k", "3"]]),
        ("segmentation", vec![&TRAIN, &VAL, &SHORT, &few]),
        ("depth", vec![&TRAIN, &VAL, &SHORT, &few, &["--max-depth", "11"]]),
    ];
    let mut seen = 0;
    for (kind, args) in &pictures {
        let output = ["--output", "picture.png"];
        let done = run(&place, ["viz", kind], &[&args.concat(), &output]).succeeded();
        assert_eq!((done.stdout.as_str(), done.stderr.ends_with("wrote picture.png\n")), ("", true), "{}", done.stderr);
        let picture = image::open(place.path("picture.png")).expect("a PNG").into_rgb8();
        let (width, height) = picture.dimensions();
        assert!(width > 320 && height > 200, "{kind}: {width}x{height}");
        let distinct: std::collections::BTreeSet<[u8; 3]> = picture.pixels().map(|pixel| pixel.0).collect();
        assert!(distinct.len() > 50, "{kind}: {} colours", distinct.len());
        std::fs::remove_file(place.path("picture.png")).expect("there");
        seen += 1;
    }
    assert_eq!(seen, 7);
    let pca = |args: &[&str]| run(&place, ["viz", "pca"], &[args]);
    pca(&["--data", "nowhere", "--output", "a.png"]).failed(2, &["no such folder"]);
    pca(&["--data", "synthetic", "--output", "a.jpg"]).failed(2, &["a.jpg: pictures are written as PNG", "hint: "]);
    pca(&["--data", "synthetic", "--output", "no/a.png"]).failed(2, &["no: no such folder to write to"]);
    run(&place, ["viz", "neighbors"], &[&["--data", "synthetic:images=5,size=16", "--output", "a.png"]])
        .failed(2, &["5 images, too few for 7 neighbours"]);
    pca(&["--data", "synthetic", "--output", "a.png", "--count", "-1"])
        .failed(2, &["invalid value '-1' for '--count <N>'"]);
    assert!(!place.path("a.png").exists() && !place.path("a.jpg").exists());
}

#[test]
fn pictures_leave_out_what_cannot_be_read() {
    let place = place();
    annotated(&place, "good", 3, |i| square(i, 1));
    annotated(&place, "partly", 3, |i| square(i, 1));
    place.write("partly/img/1.png", "no image");
    place.write("bad/0.png", "no image");
    let output = ["--output", "picture.png"];
    for kind in ["pca", "attention", "norms"] {
        let done = run(&place, ["viz", kind], &[&["--data", "partly/img"], &output]).succeeded();
        assert!(done.stderr.contains("warning: 1.png: ") && done.stderr.contains("; left out\n"), "{}", done.stderr);
        std::fs::remove_file(place.path("picture.png")).expect("there");
        run(&place, ["viz", kind], &[&["--data", "bad"], &output])
            .failed(1, &["none of the 1 image(s) can be read\n  `0.png`: "]);
        run(&place, ["viz", kind], &[&["--data", "partly/img/1.png"], &output]).failed(1, &["partly/img/1.png: "]);
        assert!(!place.path("picture.png").exists());
    }
    let heads = ["--train", "good", "--val", "partly"];
    let done = run(&place, ["viz", "segmentation"], &[&heads, &SHORT, &output]).succeeded();
    assert!(done.stderr.contains("warning: partly/img/1.png: "), "{}", done.stderr);
    place.write("partly/img/0.png", "no image");
    place.write("partly/mask/2.png", "no mask");
    std::fs::remove_file(place.path("picture.png")).expect("there");
    run(&place, ["viz", "segmentation"], &[&heads, &SHORT, &output])
        .failed(1, &["none of the 3 image(s) can be read", "`partly/img/0.png`: ", "`partly/mask/2.png`: "]);
    assert!(!place.path("picture.png").exists());
}
