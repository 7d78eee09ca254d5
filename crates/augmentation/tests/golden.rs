//! Pixel operations, box draws and masks against what the reference systems compute.
//!
//! `augment.{json,safetensors}` and `masking.json` hold inputs, parameters and results of torchvision, Pillow and the
//! references' mask generators; the fixtures' README says how they came to be. The tests are driven by what the files
//! contain: set `DINOXIDE_GOLDEN` to a folder with files of the same schema to run others.

// Each test says how close it came and how many cases it ran.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use dinoxide_augmentation::{
    AugmentationConfig, BlockMasks, Blur, BlurKind, ColorOp, CropBox, MaskConfig, MaskStyle, MultiCrop, Resizer,
    RgbImage, batch_masks, grayscale, horizontal_flip, normalize, solarize,
};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    let folder = std::env::var_os("DINOXIDE_GOLDEN")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../testkit/golden"), PathBuf::from);
    folder.join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(number).collect()
}

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// A `[3, H, W]` tensor of bytes as an image.
fn image(tensors: &SafeTensors, name: &str) -> RgbImage {
    let tensor = tensors.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::U8, "{name}");
    let &[3, height, width] = tensor.shape() else { panic!("{name}: {:?}", tensor.shape()) };
    let data = tensor.data();
    RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let at = y as usize * width + x as usize;
        image::Rgb([data[at], data[height * width + at], data[2 * height * width + at]])
    })
}

fn edited(mut image: RgbImage, edit: impl FnOnce(&mut RgbImage)) -> RgbImage {
    edit(&mut image);
    image
}

/// What the fixture's tensor `<picture>.<op>` should be, or nothing if the operation is not this crate's.
fn apply(tensors: &SafeTensors, hyper: &Value, picture: &str, op: &str) -> Option<RgbImage> {
    let base = || image(tensors, &format!("{picture}.base"));
    let color = |op: ColorOp| Some(edited(base(), |image| op.apply(image)));
    let blurred = |kind, sigma: &Value| Some(edited(base(), |image| Blur::default().apply(image, kind, number(sigma))));
    let parameter = || match &hyper[op] {
        Value::Null => panic!("`hyper` has no `{op}`"),
        parameter => parameter,
    };
    match op.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "crop" => {
            let p = &hyper[format!("{picture}.{op}")];
            let length = |key: &str| p[key].as_u64().unwrap_or_else(|| panic!("`{picture}.{op}.{key}`")) as u32;
            assert_eq!((&p["op"], &p["interpolation"]), (&"resized_crop".into(), &"bicubic".into()));
            let area =
                CropBox { left: length("left"), top: length("top"), width: length("width"), height: length("height") };
            let size = length("size");
            Some(Resizer::default().resized_crop(&image(tensors, &format!("img.{picture}")), area, (size, size)))
        }
        "hflip" => Some(edited(base(), horizontal_flip)),
        "gray" => Some(edited(base(), grayscale)),
        "solarize" | "pilsolarize" => Some(edited(base(), |image| solarize(image, 128))),
        "brightness" => color(ColorOp::Brightness(number(parameter()) as f32)),
        "contrast" => color(ColorOp::Contrast(number(parameter()) as f32)),
        "saturation" => color(ColorOp::Saturation(number(parameter()) as f32)),
        "hue" => color(ColorOp::Hue(number(parameter()))),
        "blur" => {
            assert_eq!(parameter()["kernel"], 9, "`{op}`");
            blurred(BlurKind::Gaussian9, &parameter()["sigma"])
        }
        "pilblur" => blurred(BlurKind::Pil, &parameter()["radius"]),
        order if picture == "jitter" && order != "base" => {
            let strength = |key: &str| number(&hyper["jitter"][key]);
            Some(edited(base(), |image| {
                for step in order.chars() {
                    match step {
                        'b' => ColorOp::Brightness(strength("brightness") as f32),
                        'c' => ColorOp::Contrast(strength("contrast") as f32),
                        's' => ColorOp::Saturation(strength("saturation") as f32),
                        'h' => ColorOp::Hue(strength("hue")),
                        other => panic!("jitter step `{other}` in `{op}`"),
                    }
                    .apply(image);
                }
            }))
        }
        // `normalize` has its own test; resizing without antialiasing or of float images is not done here.
        "base" | "normalize" | "post_resize_float" => None,
        other if other.ends_with("_noaa") => None,
        other => panic!("unknown operation `{other}` in the fixture"),
    }
}

/// How far from the fixture an operation may be, in levels; nothing where the two libraries differ among themselves.
fn tolerance(op: &str, library: &str) -> Option<u8> {
    match (op, library) {
        ("crop" | "blur", _) => Some(1),
        ("hue" | "jitter", "tensor") => None,
        (_, "tensor") if !matches!(op, "hflip" | "solarize") => Some(1),
        _ => Some(0),
    }
}

/// How many of `values` may be one level beyond the tolerance. The filter weights of a resize have 16 bits, as those of
/// torchvision's 8-bit tensors; Pillow's have 22, and on both axes together that shows in a value of 100 000.
fn exceptions(op: &str, library: &str, values: usize) -> usize {
    if (op, library) == ("crop", "pil") { values / 1000 } else { 0 }
}

#[test]
fn pixel_operations_equal_the_fixture() {
    let bytes = std::fs::read(golden("augment.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let hyper = &json("augment.json")["hyper"];
    let mut worst: BTreeMap<(String, &str), (u8, usize)> = BTreeMap::new();
    let mut failures = Vec::new();
    for name in tensors.names() {
        let mut parts = name.split('.');
        let (picture, op) = (parts.next().unwrap(), parts.next().unwrap());
        let library = parts.next().unwrap_or("pil");
        if picture == "img" {
            continue;
        }
        let Some(found) = apply(&tensors, hyper, picture, op) else { continue };
        let expected = image(&tensors, name);
        assert_eq!(found.dimensions(), expected.dimensions(), "{name}");
        let errors: Vec<u8> = found.iter().zip(expected.iter()).map(|(a, b)| a.abs_diff(*b)).collect();
        let error = *errors.iter().max().unwrap();

        let kind = if picture == "jitter" { "jitter" } else { op.trim_end_matches(|c: char| c.is_ascii_digit()) };
        let entry = worst.entry((kind.to_owned(), library)).or_default();
        *entry = (entry.0.max(error), entry.1 + 1);
        if let Some(allowed) = tolerance(kind, library) {
            let beyond = errors.iter().filter(|&&error| error > allowed).count();
            if beyond > exceptions(kind, library, errors.len()) || error > allowed + 1 {
                failures.push(format!("{name}: {error} levels, {beyond} values beyond {allowed}"));
            }
        }
    }
    for ((kind, library), (error, cases)) in &worst {
        println!("{kind:>12} {library:<6} {cases:>3} cases, worst {error} levels");
    }
    assert!(failures.is_empty(), "{failures:#?}");
    let expected = [
        "crop",
        "hflip",
        "gray",
        "solarize",
        "pilsolarize",
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "blur",
        "pilblur",
        "jitter",
    ];
    for kind in expected {
        assert!(worst.contains_key(&(kind.to_owned(), "pil")), "the fixture has no case of `{kind}`");
    }
    let cases: usize = worst.values().map(|(_, cases)| cases).sum();
    println!("{cases} cases");
    assert!(cases >= 40, "only {cases} cases in the fixture");
}

#[test]
fn normalized_values_equal_the_fixture() {
    let bytes = std::fs::read(golden("augment.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let AugmentationConfig { mean, std, .. } = AugmentationConfig::default();
    let mut cases = 0;
    for name in tensors.names() {
        let Some(picture) = name.strip_suffix(".normalize") else { continue };
        let tensor = tensors.tensor(name).unwrap();
        let &[3, height, width] = tensor.shape() else { panic!("{name}: {:?}", tensor.shape()) };
        let size = (width as u32, height as u32);
        // The fixture normalises the upper left corner of the picture.
        let base = image(&tensors, &format!("{picture}.base"));
        let corner = image::imageops::crop_imm(&base, 0, 0, size.0, size.1).to_image();
        let found = normalize([&corner].into_iter(), size, mean, std);
        let expected: Vec<f32> = tensor.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        assert_eq!(found.len(), expected.len());
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{name}: worst {worst:e}");
        assert!(worst <= 1e-5, "{name}: {worst}");
        cases += 1;
    }
    assert!(cases >= 1);
}

/// Number of draws of ours behind each statistic.
const DRAWS: usize = 20_000;

/// Standard deviations by which a statistic of two samples may differ: one in two million by chance, over some hundred
/// statistics; the seeds are fixed.
const SIGMAS: f64 = 5.0;

/// Whether two frequencies can be of the same probability, from `DRAWS` draws of ours and `n` of the reference.
fn frequencies_agree(ours: f64, reference: f64, n: usize) -> bool {
    let pooled = (ours * DRAWS as f64 + reference * n as f64) / (DRAWS + n) as f64;
    let deviation = (pooled * (1.0 - pooled) * (1.0 / DRAWS as f64 + 1.0 / n as f64)).sqrt();
    // The reference's frequencies are rounded to four or five decimals.
    (ours - reference).abs() <= SIGMAS * deviation + 1e-4
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Asserts that our sample has the reference's mean and, if given, variance.
fn assert_moments(what: &str, ours: &[f64], reference_mean: f64, reference_variance: Option<f64>, n: usize) {
    let center = mean(ours);
    let squares: Vec<f64> = ours.iter().map(|v| (v - center).powi(2)).collect();
    let variance = mean(&squares);
    let samples = (1.0 / ours.len() as f64 + 1.0 / n as f64).sqrt();
    let allowed = SIGMAS * variance.sqrt() * samples + 1e-9;
    assert!(
        (center - reference_mean).abs() <= allowed,
        "{what}: mean {center}, reference {reference_mean} ± {allowed}"
    );
    if let Some(reference) = reference_variance {
        let spread = mean(&squares.iter().map(|v| (v - variance).powi(2)).collect::<Vec<_>>()).sqrt();
        let allowed = SIGMAS * spread * samples + 1e-9;
        assert!(
            (variance - reference).abs() <= allowed,
            "{what}: variance {variance}, reference {reference} ± {allowed}"
        );
    }
}

/// Asserts that our values fall into the reference's bins as often as its own did; the outer bins are open.
fn assert_histogram(what: &str, ours: &[f64], edges: &[f64], reference: &[f64], n: usize) {
    let mut counts = vec![0usize; reference.len()];
    for value in ours {
        counts[edges[1..reference.len()].partition_point(|edge| edge <= value)] += 1;
    }
    for (bin, (&count, &expected)) in counts.iter().zip(reference).enumerate() {
        let found = count as f64 / ours.len() as f64;
        assert!(frequencies_agree(found, expected, n), "{what}: bin {bin} has {found}, reference {expected}");
    }
}

#[test]
fn boxes_of_random_resized_crop_are_distributed_as_the_fixture() {
    let augment = json("augment.json");
    let cases = augment["random_resized_crop_stats"].as_object().unwrap();
    for (name, case) in cases {
        let [height, width] = numbers(&case["img_hw"])[..] else { panic!("{name}") };
        let range = |key: &str| <[f64; 2]>::try_from(numbers(&case[key])).unwrap();
        let (scale, ratio, n) = (range("scale"), range("ratio"), number(&case["draws"]) as usize);
        let rng = &mut rng(1);
        let boxes: Vec<CropBox> =
            (0..DRAWS).map(|_| CropBox::draw((width as u32, height as u32), scale, ratio, rng)).collect();
        let of = |f: &dyn Fn(&CropBox) -> f64| boxes.iter().map(f).collect::<Vec<f64>>();
        let area = of(&|b| f64::from(b.width) * f64::from(b.height) / (width * height));
        let log_aspect = of(&|b| (f64::from(b.width) / f64::from(b.height)).ln());
        let fraction = |start: u32, length: u32, whole: f64| f64::from(start) / (whole - f64::from(length)).max(1.0);

        let key = |key: &str| number(&case[key]);
        assert_moments(&format!("{name} area"), &area, key("mean_area"), Some(key("var_area")), n);
        let variance = Some(key("var_logaspect"));
        assert_moments(&format!("{name} log aspect"), &log_aspect, key("mean_logaspect"), variance, n);
        let top = of(&|b| fraction(b.top, b.height, height));
        assert_moments(&format!("{name} top"), &top, key("mean_top_frac"), None, n);
        let left = of(&|b| fraction(b.left, b.width, width));
        assert_moments(&format!("{name} left"), &left, key("mean_left_frac"), None, n);
        for (values, which) in [(&area, "area"), (&log_aspect, "logaspect")] {
            let edges = numbers(&case[format!("{which}_edges")]);
            let histogram = numbers(&case[format!("{which}_hist")]);
            assert_histogram(&format!("{name} {which}"), values, &edges, &histogram, n);
        }
    }
    println!("{} cases", cases.len());
    assert!(cases.len() >= 2);
}

#[test]
fn views_are_blurred_as_often_as_the_references_blur_them() {
    /// Images behind each of the fixture's fractions.
    const IMAGES: usize = 300;
    let augment = json("augment.json");
    let cases = augment["blur_applied_fraction"].as_object().unwrap();
    let config = AugmentationConfig::default();
    let recipe = MultiCrop::new(&config).unwrap();
    for (name, fraction) in cases {
        let nominal: f64 = name.split_once("p=").unwrap().1.trim_end_matches(')').parse().unwrap();
        let view = match nominal {
            1.0 => 0,
            0.1 => 1,
            0.5 => 2,
            other => panic!("no view is blurred with nominal probability {other}"),
        };
        let rng = &mut rng(2);
        let blurred = (0..DRAWS).filter(|_| recipe.draw(view, (50, 40), rng).blur_sigma.is_some()).count();
        let found = blurred as f64 / DRAWS as f64;
        assert!(frequencies_agree(found, number(fraction), IMAGES), "{name}: {found}, reference {fraction}");
    }
    assert!(cases.len() >= 3);
}

/// Half the sum of absolute differences between our counts and a reference's frequencies.
fn total_variation(ours: &BTreeMap<usize, usize>, reference: &Value) -> f64 {
    let reference: BTreeMap<usize, f64> =
        reference.as_object().unwrap().iter().map(|(k, v)| (k.parse().unwrap(), number(v))).collect();
    let keys: std::collections::BTreeSet<_> = ours.keys().chain(reference.keys()).collect();
    let frequency = |k| ours.get(k).map_or(0.0, |&count| count as f64 / DRAWS as f64);
    0.5 * keys.into_iter().map(|k| (frequency(k) - reference.get(k).copied().unwrap_or(0.0)).abs()).sum::<f64>()
}

/// Asserts that each patch is masked as often as in the reference, and the patches on average more closely so.
fn assert_marginal(what: &str, masked: &[usize], reference: &Value, n: usize) {
    let reference: Vec<f64> = reference.as_array().unwrap().iter().flat_map(numbers).collect();
    assert_eq!(masked.len(), reference.len(), "{what}");
    for (i, (&count, &p)) in masked.iter().zip(&reference).enumerate() {
        let found = count as f64 / DRAWS as f64;
        assert!(frequencies_agree(found, p, n), "{what}: patch {i} is masked with {found}, reference {p}");
    }
}

#[test]
fn block_masks_are_distributed_as_the_fixture() {
    let masking = json("masking.json");
    let n = masking["draws"].as_u64().unwrap() as usize;
    let cases = masking["cases"].as_array().unwrap();
    for case in cases {
        let [h, w] = numbers(&case["grid"])[..] else { panic!("{case}") };
        let (grid, target) = ((h as usize, w as usize), case["target"].as_u64().unwrap() as usize);
        let what = format!("{grid:?} target {target}");
        let blocks = BlockMasks { max_patches: number(&case["max_num_patches"]), ..BlockMasks::new(grid) };
        let rng = &mut rng(3);

        let (mut counts, mut rectangles) = (BTreeMap::new(), BTreeMap::new());
        let (mut at_most, mut exact) = (vec![0; grid.0 * grid.1], vec![0; grid.0 * grid.1]);
        let mut masked = Vec::with_capacity(DRAWS);
        for _ in 0..DRAWS {
            let drawn = blocks.draw(target as f64, rng);
            *counts.entry(drawn.masked).or_default() += 1;
            *rectangles.entry(drawn.blocks).or_default() += 1;
            masked.push(drawn.masked as f64);
            at_most.iter_mut().zip(drawn.mask).for_each(|(count, masked)| *count += usize::from(masked));

            let drawn = blocks.draw_exact(target, rng);
            assert_eq!(drawn.mask.iter().filter(|&&m| m).count(), target);
            exact.iter_mut().zip(drawn.mask).for_each(|(count, masked)| *count += usize::from(masked));
        }
        let (v2, v3) = (&case["v2"], &case["v3"]);
        assert_moments(&what, &masked, number(&v2["mean"]), Some(number(&v2["var"])), n);
        let (count, rectangle) =
            (total_variation(&counts, &v2["count_hist"]), total_variation(&rectangles, &v2["rect_hist"]));
        println!("{what}: total variation {count:.4} (counts), {rectangle:.4} (rectangles)");
        assert!(count <= 0.02 && rectangle <= 0.02, "{what}: {count} {rectangle}");
        assert_marginal(&format!("{what} at most"), &at_most, &v2["marginal"], n);
        assert_marginal(&format!("{what} exact"), &exact, &v3["marginal"], n);
    }
    println!("{} cases", cases.len());
    assert!(cases.len() >= 3);
}

#[test]
fn mask_counts_of_a_batch_equal_the_fixture() {
    let masking = json("masking.json");
    let cases = masking["collate"]["cases"].as_array().unwrap();
    for case in cases {
        let side = case["grid"].as_u64().unwrap() as usize;
        let crops = case["n_images"].as_u64().unwrap() as usize;
        let exact = MaskConfig {
            probability: number(&case["mask_probability"]),
            ratio: numbers(&case["mask_ratio"]).try_into().unwrap(),
            style: MaskStyle::Exact,
            random_circular_shift: false,
        };
        let masks = batch_masks(crops, (side, side), &exact, &mut rng(4));
        let per_crop = masks.mask.chunks_exact(side * side).map(|row| row.iter().filter(|&&m| m).count() as f64);
        let mut found: Vec<f64> = per_crop.filter(|&count| count > 0.0).collect();
        found.sort_by(f64::total_cmp);
        assert_eq!(found, numbers(&case["v3_targets_in_order"]), "{case}");
        assert_eq!(masks.indices.len() as u64, case["v3_n_masked_total"].as_u64().unwrap());
        let sum: f64 = masks.weights.iter().copied().map(f64::from).sum();
        assert!((sum - number(&case["v3_masks_weight_sum"])).abs() < 1e-4, "{sum}");

        let at_most = MaskConfig { style: MaskStyle::AtMost, ..exact };
        let upper_bound = case["upperbound"].as_u64().unwrap() as usize;
        let totals: Vec<f64> = (0..200)
            .map(|seed| batch_masks(crops, (side, side), &at_most, &mut rng(seed)).indices.len())
            .inspect(|&total| assert!(total <= upper_bound))
            .map(|total| total as f64)
            .collect();
        // The fixture has the mean of 200 sums of targets; masks fall short of their target by a tenth on average.
        let masked = found.len() as f64;
        let part = (side * side) as f64 * (at_most.ratio[1] - at_most.ratio[0]) / masked;
        let deviation = (masked * part * part / 12.0 * (2.0 / 200.0)).sqrt();
        let (ours, reference) = (mean(&totals), number(&case["v2_total_target_mean_200"]));
        assert!((ours - reference).abs() <= SIGMAS * deviation + 0.3 * masked, "{ours} for {reference}: {case}");
    }
    println!("{} cases", cases.len());
    assert!(cases.len() >= 3);
}
