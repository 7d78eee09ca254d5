//! Fixture `augment`: pixel operations in levels of 8 bits, normalisation, and how random crops and blurs are distributed.

use dinoxide_augmentation::{
    AugmentationConfig, Blur, BlurKind, ColorOp, CropBox, MultiCrop, Resizer, RgbImage, grayscale, horizontal_flip,
    normalize, solarize,
};
use dinoxide_testkit::{Array, Check, Fixture, Tolerance};
use rand::{SeedableRng, rngs::ChaCha8Rng};
use serde_json::Value;

use crate::statistics::{self, DRAWS, Sample, number, numbers};

pub(crate) fn all(check: &mut Check) {
    pixels(check);
    normalized(check);
    boxes(check);
    blurs(check);
    type Which = fn(&str) -> bool;
    let left_out: [(Which, &str); 3] = [
        (|name| name.contains("_noaa."), "resizing of images without antialiasing is not offered"),
        (|name| name.ends_with(".post_resize_float"), "resizing of images after normalisation is not offered"),
        (only_of_tensors, "hue of torchvision's tensors: Pillow's is followed, the two differ by several levels"),
    ];
    for (which, reason) in left_out {
        if check.fixture.names("").any(which) {
            check.pending(which, reason);
        }
    }
}

/// Hue, alone or with other colour operations, of torchvision's tensors.
fn only_of_tensors(name: &str) -> bool {
    name.ends_with(".tensor") && (name.starts_with("jitter.") || name.contains(".hue"))
}

/// A `[3, H, W]` tensor of bytes as an image.
fn image(fixture: &Fixture, name: &str) -> RgbImage {
    let Array { shape, values } = fixture.array::<u8>(name);
    let [3, height, width] = shape[..] else { panic!("`{name}` is {shape:?}") };
    let pixels = (0..height * width).flat_map(|at| [0, 1, 2].map(|c| values[c * height * width + at]));
    RgbImage::from_raw(width as u32, height as u32, pixels.collect()).expect("an image")
}

/// Compares every operation that the crate has.
fn pixels(check: &mut Check) {
    let fixture = check.fixture;
    for name in fixture.names("").filter(|name| !only_of_tensors(name)) {
        let mut parts = name.split('.');
        let (Some(picture), Some(operation)) = (parts.next(), parts.next()) else { panic!("`{name}`") };
        let of_tensors = parts.next() == Some("tensor");
        if picture == "img" {
            continue;
        }
        let Some((found, levels)) = apply(fixture, picture, operation, of_tensors) else { continue };
        let expected = image(fixture, name);
        if found.dimensions() != expected.dimensions() {
            check.failure(&format!("{name}: {:?} pixels, not {:?}", found.dimensions(), expected.dimensions()));
            continue;
        }
        let worst = found.iter().zip(expected.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0);
        let tolerance = Tolerance { atol: f64::from(levels), rtol_of_max: 0.0 };
        check.number(name, 0.0, f64::from(worst), tolerance);
    }
}

/// What the tensor of an operation should be, and by how many levels it may differ: none where the arithmetic is of whole
/// numbers, one where libraries round floats, two where they go through another colour space.
fn apply(fixture: &Fixture, picture: &str, operation: &str, of_tensors: bool) -> Option<(RgbImage, u8)> {
    let hyper = fixture.hyper();
    let parameter = || match &hyper[operation] {
        Value::Null => panic!("`hyper` has no `{operation}`"),
        parameter => parameter,
    };
    let edited = |edit: &dyn Fn(&mut RgbImage)| {
        let mut image = image(fixture, &format!("{picture}.base"));
        edit(&mut image);
        image
    };
    let color = |op: ColorOp| edited(&|image| op.apply(image));
    let blurred = |kind: BlurKind, sigma: &Value| edited(&|image| Blur::default().apply(image, kind, number(sigma)));
    let by_library = u8::from(of_tensors);
    Some(match operation.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "crop" => {
            let p = &hyper[format!("{picture}.{operation}")];
            let length = |key: &str| p[key].as_u64().unwrap_or_else(|| panic!("`{picture}.{operation}.{key}`")) as u32;
            let area =
                CropBox { left: length("left"), top: length("top"), width: length("width"), height: length("height") };
            let source = image(fixture, &format!("img.{picture}"));
            (Resizer::default().resized_crop(&source, area, (length("size"), length("size"))), 1)
        }
        "hflip" => (edited(&horizontal_flip), 0),
        "solarize" | "pilsolarize" => (edited(&|image| solarize(image, 128)), 0),
        "gray" => (edited(&grayscale), by_library),
        "brightness" => (color(ColorOp::Brightness(number(parameter()) as f32)), by_library),
        "contrast" => (color(ColorOp::Contrast(number(parameter()) as f32)), by_library),
        "saturation" => (color(ColorOp::Saturation(number(parameter()) as f32)), by_library),
        "hue" => (color(ColorOp::Hue(number(parameter()))), 2),
        "blur" => (blurred(BlurKind::Gaussian9, &parameter()["sigma"]), 1),
        "pilblur" => (blurred(BlurKind::Pil, &parameter()["radius"]), 0),
        order if picture == "jitter" && order != "base" => {
            let strength = |key: &str| number(&hyper["jitter"][key]);
            let steps = |image: &mut RgbImage| {
                for step in order.chars() {
                    match step {
                        'b' => ColorOp::Brightness(strength("brightness") as f32),
                        'c' => ColorOp::Contrast(strength("contrast") as f32),
                        's' => ColorOp::Saturation(strength("saturation") as f32),
                        'h' => ColorOp::Hue(strength("hue")),
                        other => panic!("a step `{other}` in `{order}`"),
                    }
                    .apply(image);
                }
            };
            (edited(&steps), 2)
        }
        // Inputs, and what other functions compare or leave out.
        "base" | "normalize" | "post_resize_float" => return None,
        other if other.ends_with("_noaa") => return None,
        other => panic!("an operation `{other}` is not known"),
    })
}

/// `<picture>.normalize`: the upper left corner of the picture.
fn normalized(check: &mut Check) {
    let fixture = check.fixture;
    let AugmentationConfig { mean, std, .. } = AugmentationConfig::default();
    for name in fixture.names("").filter(|name| name.ends_with(".normalize")) {
        let expected = fixture.floats(name);
        let (height, width) = (expected.shape[1] as u32, expected.shape[2] as u32);
        let base = image(fixture, &name.replace(".normalize", ".base"));
        let corner = RgbImage::from_fn(width, height, |x, y| *base.get_pixel(x, y));
        let values = normalize([&corner].into_iter(), (width, height), mean, std);
        let found = Array { shape: expected.shape.clone(), values };
        check.values(name, &expected, &found, Tolerance { atol: 1e-5, rtol_of_max: 0.0 });
    }
}

/// `random_resized_crop_stats`: area, aspect and place of random boxes.
fn boxes(check: &mut Check) {
    let cases = check.fixture.json()["random_resized_crop_stats"].as_object().expect("cases");
    for (case, hyper) in cases {
        let [height, width] = numbers(&hyper["img_hw"])[..] else { panic!("`{case}.img_hw`") };
        let range = |key: &str| <[f64; 2]>::try_from(numbers(&hyper[key])).expect("a range");
        let rng = &mut ChaCha8Rng::seed_from_u64(6);
        let drawn: Vec<CropBox> = (0..DRAWS)
            .map(|_| CropBox::draw((width as u32, height as u32), range("scale"), range("ratio"), rng))
            .collect();
        let n = number(&hyper["draws"]);
        let sample = |f: &dyn Fn(&CropBox) -> f64| Sample::new(drawn.iter().map(f).collect());
        let place = |start: u32, length: u32, whole: f64| f64::from(start) / (whole - f64::from(length)).max(1.0);
        for (what, sample) in [
            ("area", sample(&|b| f64::from(b.width) * f64::from(b.height) / (width * height))),
            ("logaspect", sample(&|b| (f64::from(b.width) / f64::from(b.height)).ln())),
            ("top_frac", sample(&|b| place(b.top, b.height, height))),
            ("left_frac", sample(&|b| place(b.left, b.width, width))),
        ] {
            let name = format!("{case}.{what}");
            sample.compare_mean(check, &name, number(&hyper[format!("mean_{what}")]), n);
            if let Some(variance) = hyper[format!("var_{what}")].as_f64() {
                sample.compare_variance(check, &name, variance, n);
            }
            if hyper.get(format!("{what}_hist")).is_some() {
                let edges = numbers(&hyper[format!("{what}_edges")]);
                let reference = numbers(&hyper[format!("{what}_hist")]);
                let shares = sample.shares(&edges[1..reference.len()]);
                statistics::compare_frequencies(check, &format!("{name}_hist"), &shares, &reference, n);
            }
        }
    }
}

/// `blur_applied_fraction`: how often the references blur the first and the second global crop and local crops.
fn blurs(check: &mut Check) {
    /// Images behind each of the fixture's fractions.
    const IMAGES: f64 = 300.0;
    let config = AugmentationConfig::default();
    let recipe = MultiCrop::new(&config).expect("a recipe");
    for (name, fraction) in check.fixture.json()["blur_applied_fraction"].as_object().expect("fractions") {
        // The probability in the references' recipes, which is that of leaving a view sharp.
        let nominal = name.split_once("p=").expect("a probability").1.trim_end_matches(')');
        let view = match nominal {
            "1.0" => 0,
            "0.1" => 1,
            "0.5" => 2,
            other => panic!("no view is left sharp with probability {other}"),
        };
        let rng = &mut ChaCha8Rng::seed_from_u64(7);
        let blurred = (0..DRAWS).filter(|_| recipe.draw(view, (50, 40), rng).blur_sigma.is_some()).count();
        let found = [blurred as f64 / DRAWS as f64];
        statistics::compare_frequencies(check, name, &found, &[number(fraction)], IMAGES);
    }
}
