use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_model::config::{FfnKind, ModelConfig, NormKind, Position, RopeNormalize};
use dinoxide_model::weights::Provenance;
use dinoxide_model::{Arch, Sides};
use dinoxide_random::{Purpose, stream};
use rand::{Rng, RngExt};

use super::*;

/// DINO: learned positions with an offset, an MLP, no registers, no layer scale.
fn v1() -> (ModelConfig, usize) {
    let config = ModelConfig {
        embed_dim: Some(24),
        depth: Some(2),
        num_heads: Some(3),
        patch_size: 4,
        layer_scale_init: 0.0,
        mask_token: false,
        ..ModelConfig::default()
    };
    (config, 20)
}

/// DINOv2 with registers: antialiased interpolation, layer scale, packed SwiGLU.
fn v2() -> (ModelConfig, usize) {
    let config = ModelConfig {
        embed_dim: Some(32),
        depth: Some(3),
        num_heads: Some(2),
        patch_size: 3,
        ffn: FfnKind::SwigluFused,
        register_tokens: 3,
        interpolate_offset: 0.0,
        interpolate_antialias: true,
        ..ModelConfig::default()
    };
    (config, 21)
}

/// DINOv3: RoPE, storage tokens, SwiGLU, no key bias, untied norms; here with RMS normalisation and few biases too.
fn v3() -> (ModelConfig, usize) {
    let config = ModelConfig {
        embed_dim: Some(40),
        depth: Some(2),
        num_heads: Some(5),
        patch_size: 4,
        ffn: FfnKind::Swiglu,
        proj_bias: false,
        ffn_bias: false,
        mask_k_bias: true,
        norm: NormKind::RmsNorm,
        register_tokens: 4,
        position: Position::Rope,
        untie_cls_and_patch_norms: true,
        untie_global_and_local_cls_norm: true,
        ..ModelConfig::default()
    };
    (config, 16)
}

/// DINOv3's rarer geometry, one kind of coordinates each; one token in front, an MLP, layer normalisation, no qkv bias.
fn v3_other(rope_normalize: RopeNormalize) -> (ModelConfig, usize) {
    let config = ModelConfig {
        embed_dim: Some(24),
        depth: Some(2),
        num_heads: Some(2),
        patch_size: 5,
        qkv_bias: false,
        position: Position::Rope,
        rope_normalize,
        rope_min_period: Some(0.5),
        rope_max_period: Some(60.0),
        ..ModelConfig::default()
    };
    (config, 15)
}

/// A small ConvNeXt of stages that differ in width and depth.
fn convnext() -> (ModelConfig, usize) {
    let config = ModelConfig {
        arch: Arch::ConvNextTiny,
        dims: Some([8, 12, 16, 24]),
        depths: Some([1, 2, 3, 1]),
        layer_scale_init: 1e-6,
        ..ModelConfig::default()
    };
    (config, 64)
}

/// Without layer scale, with stages whose widths and depths rise and fall, and with an epsilon that matters.
fn convnext_plain() -> (ModelConfig, usize) {
    let (config, image_size) = convnext();
    let (dims, depths) = (Some([12, 8, 20, 16]), Some([2, 1, 1, 2]));
    (ModelConfig { dims, depths, layer_scale_init: 0.0, norm_eps: 0.1, ..config }, image_size)
}

fn cases() -> [(&'static str, (ModelConfig, usize)); 7] {
    [
        ("v1", v1()),
        ("v2", v2()),
        ("v3", v3()),
        ("v3 max", v3_other(RopeNormalize::Max)),
        ("v3 min", v3_other(RopeNormalize::Min)),
        ("convnext", convnext()),
        ("convnext plain", convnext_plain()),
    ]
}

/// A backbone in which every parameter matters: no two have equal values, attention is far from uniform.
fn backbone((config, image_size): (ModelConfig, usize)) -> (Backbone, Description) {
    let architecture = config.resolve(image_size).expect("sizes that fit");
    let mut rng = stream(7, Purpose::Init, 0, 0);
    let backbone = Backbone::new(&architecture, &Device::flex(), &mut rng);
    let shapes: BTreeMap<String, Vec<usize>> = parameters::shapes(&backbone).into_iter().collect();
    let backbone = parameters::replace(backbone, |name, value| {
        let shape = &shapes[name];
        let (mean, std) = match shape.as_slice() {
            [_] if !name.ends_with("bias") => (1.0, 0.3),
            [_, inputs] if name.ends_with("weight") => (0.0, 2.0 / (*inputs as f32).sqrt()),
            _ => (0.0, 0.4),
        };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| mean + std * symmetric(&mut rng)).collect();
        Tensor::from_data(TensorData::from(values.as_slice()), &value.device())
    });
    let description = Description {
        architecture,
        image_size,
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
        provenance: Provenance::default(),
        fingerprint: None,
    };
    (backbone, description)
}

/// Uniform, of mean 0 and deviation 1.
fn symmetric(rng: &mut impl Rng) -> f32 {
    (rng.random::<f32>() - 0.5) * 12f32.sqrt()
}

fn fixed(height: usize, width: usize) -> Options {
    Options::new(ImageSize::Fixed { height, width })
}

/// The distance of neighbouring patches, and how many pixels at most are beyond the last one, in images that a backbone
/// takes.
fn patches(architecture: &Architecture) -> (usize, usize) {
    let (Sides { step, .. }, stride) = (architecture.sides(), architecture.stride());
    (stride, stride - step)
}

fn entries(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").file_name());
    names.map(|name| name.into_string().expect("plain names")).collect()
}

#[test]
fn files_of_one_size_give_what_the_backbone_gives() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.onnx");
    let mut checks = 0;
    for (name, case) in cases() {
        let (backbone, description) = backbone(case);
        let (patch, rest) = patches(&description.architecture);
        let trained = description.image_size;
        let (tall, wide) = ((trained + 2 * patch + rest, patch), (2 * patch, trained + 5 * patch + rest));
        for (height, width) in [(trained, trained), tall, wide] {
            for input in [Input::Rgb, Input::Normalized] {
                let options = Options { input, ..fixed(height, width) };
                let report = export(&backbone, &description, &options, &path)
                    .unwrap_or_else(|e| panic!("{name}, {height}×{width}, {input:?}: {e}"));
                assert_eq!(report.bytes, fs::metadata(&path).expect("a file").len());
                let found: Vec<_> = report.checks.iter().map(|c| (c.batch, c.height, c.width)).collect();
                assert_eq!(found, [(1, height, width), (2, height, width)]);
                let model = verify::load(&path).expect("it was loaded before");
                let shape = [3, 3, height, width];
                let of_three = verify::compare_on(&model, &path, &backbone, &description, &options, shape)
                    .unwrap_or_else(|e| panic!("{name}: {e}"));
                let deviation = report.max_deviation().max(of_three.deviation);
                assert!(deviation < 2e-5, "{name}: {report:?}, {of_three:?}");
                checks += 1;
            }
        }
    }
    assert_eq!(checks, 7 * 3 * 2);
    assert_eq!(entries(folder.path()), ["x.onnx"]);
}

#[test]
fn a_file_of_any_size_gives_what_the_backbone_gives_at_every_size() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.onnx");
    let mut checks = 0;
    for (name, case) in cases() {
        let (backbone, description) = backbone(case);
        let options = Options::new(ImageSize::Dynamic);
        let report = export(&backbone, &description, &options, &path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (patch, rest) = patches(&description.architecture);
        let grid = description.image_size / patch;
        let found: Vec<_> = report.checks.iter().map(|c| (c.batch, c.height / patch, c.width / patch)).collect();
        assert_eq!(found, [(1, grid, grid), (2, grid + 2, grid - 1)]);

        let model = verify::load(&path).expect("it was loaded before");
        // Smaller, larger, one of each, one side as it is stored, a single patch.
        for (rows, columns) in [(2, 3), (11, 17), (3, 13), (grid, grid + 1), (grid - 1, grid), (1, 1)] {
            let shape = [3, 3, rows * patch, columns * patch + rest];
            let check = verify::compare_on(&model, &path, &backbone, &description, &options, shape)
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            // Divided by the smaller side, angles reach 92 radians here, of which single precision knows 1e-5.
            let allowed = if name == "v3 min" { TOLERANCE } else { 3e-5 };
            assert!(check.deviation < allowed, "{name}: {check:?}");
            checks += 1;
        }
    }
    assert_eq!(checks, 7 * 6);
}

#[test]
fn images_of_more_patches_than_attention_can_be_computed_for_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let (backbone, description) = backbone(v3());
    for (height, width) in [(516, 512), (4_000_000, 4_000_000), (1 << 40, 1 << 40)] {
        let options = Options::new(ImageSize::Fixed { height, width });
        let error = export(&backbone, &description, &options, &folder.path().join("x.onnx")).expect_err("too many");
        assert!(error.is_usage() && error.to_string().contains("at most 16384"), "{error}");
    }
}

#[test]
fn a_file_of_any_size_refuses_sides_that_the_backbone_does_not_take() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.onnx");
    let (config, size) = convnext();
    let coarse = (ModelConfig { patch_size: 32, ..config }, size);
    // A side of less than a patch, and others that are too small or left over.
    let cases: [(_, &str, &[_], &[_]); 3] = [
        (v3(), "multiples_of_4", &[(12, 8), (4, 4)], &[(13, 8), (12, 7), (3, 8), (8, 1)]),
        (convnext(), "multiples_of_4_from_32_on", &[(64, 36), (32, 32)], &[(66, 64), (64, 35), (28, 64), (64, 3)]),
        (coarse, "multiples_of_4_from_32_on", &[(52, 56)], &[(28, 52), (52, 50)]),
    ];
    for (case, sides, taken, refused) in cases {
        let (backbone, description) = backbone(case);
        export(&backbone, &description, &Options::new(ImageSize::Dynamic), &path).expect("exported");
        let model = verify::load(&path).expect("a model");
        model.node_id(&format!("sides.are_height_and_width_{sides}")).expect("a name that says what is taken");
        let run = |&(height, width): &(usize, usize)| {
            let images = rten_tensor::Tensor::<f32>::zeros(&[2, 3, height, width]);
            let ids = (model.node_id("images").expect("input"), model.node_id("cls").expect("output"));
            model.run(vec![(ids.0, images.into())], &[ids.1], None).map(|_| ()).map_err(|e| e.to_string())
        };
        for size in taken {
            run(size).unwrap_or_else(|e| panic!("{size:?}: {e}"));
        }
        for size in refused {
            let error = run(size).expect_err(&format!("{sides}: {size:?}"));
            assert!(error.contains("Input length does not match target shape"), "{size:?}: {error}");
        }
    }
}

#[test]
fn the_file_says_what_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.onnx");
    let (backbone, description) = backbone(v2());
    let options = fixed(12, 21);
    export(&backbone, &description, &options, &path).expect("exported");
    let model = proto::Model::decode(fs::read(&path).expect("a file").as_slice()).expect("a message");
    let metadata: BTreeMap<String, String> =
        model.metadata_props.into_iter().map(|e| (e.key.expect("a key"), e.value.expect("a value"))).collect();
    assert_eq!(metadata.keys().collect::<Vec<_>>(), ["dinoxide", "image_size", "input", "mean", "std"]);
    let found: Description = serde_json::from_str(&metadata["dinoxide"]).expect("a description");
    assert_eq!(found, description);
    assert_eq!(metadata["image_size"], "12x21");
    assert_eq!((metadata["input"].as_str(), metadata["std"].as_str()), ("rgb", "0.229,0.224,0.225"));

    let graph = model.graph.expect("a graph");
    assert_eq!(names(&graph.input), ["images"]);
    assert_eq!(names(&graph.output), ["cls", "patches", "registers"]);
    assert_no_constant_is_idle(&graph);
}

#[test]
fn the_file_of_a_convnext_says_what_it_is() {
    let (backbone, description) = backbone(convnext());
    let model = model(&backbone, &description, &Options::new(ImageSize::Dynamic)).expect("a model");
    let value = |key: &str| model.metadata_props.iter().find(|e| e.key.as_deref() == Some(key))?.value.as_deref();
    assert_eq!(value("image_size"), Some("multiples of 4 from 32 on"));
    let found: Description = serde_json::from_str(value("dinoxide").expect("a value")).expect("a description");
    assert_eq!(found, description);
    let doc = model.doc_string.expect("text");
    assert!(doc.starts_with("Features of a ConvNeXt. Images, height and width in pixels: multiples of 4 from 32 on;"));
    let graph = model.graph.expect("a graph");
    assert_eq!(names(&graph.output), ["cls", "patches"]);
    assert_no_constant_is_idle(&graph);
}

fn names(values: &[proto::ValueInfo]) -> Vec<String> {
    values.iter().filter_map(|v| v.name.clone()).collect()
}

fn assert_no_constant_is_idle(graph: &proto::Graph) {
    let used: BTreeSet<&String> = graph.node.iter().flat_map(|node| &node.input).collect();
    let constants: Vec<&String> = graph.initializer.iter().filter_map(|t| t.name.as_ref()).collect();
    let idle: Vec<_> = constants.iter().filter(|name| !used.contains(*name)).collect();
    assert!(constants.len() > 40 && idle.is_empty(), "{idle:?}");
}

#[test]
fn two_exchanged_constants_are_noticed() {
    let vit = [
        ("blocks.0.norm1.weight", "blocks.1.norm1.weight"),
        ("blocks.1.ls1.gamma", "blocks.2.ls2.gamma"),
        ("blocks.0.attn.qkv.bias", "blocks.2.attn.qkv.bias"),
    ];
    let stages = [
        ("downsample_layers.0.1.bias", "stages.0.0.norm.bias"),
        ("stages.1.0.gamma", "stages.1.1.gamma"),
        ("stages.2.0.dwconv.weight", "stages.2.2.dwconv.weight"),
    ];
    notices_exchanges(v2(), fixed(21, 21), vit);
    notices_exchanges(v2(), Options::new(ImageSize::Dynamic), vit);
    notices_exchanges(convnext(), fixed(64, 64), stages);
    notices_exchanges(convnext(), Options::new(ImageSize::Dynamic), stages);
}

fn notices_exchanges(case: (ModelConfig, usize), options: Options, pairs: [(&str, &str); 3]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.onnx");
    let (backbone, description) = backbone(case);
    for (a, b) in pairs {
        let mut model = model(&backbone, &description, &options).expect("a model");
        let tensors = &mut model.graph.as_mut().expect("a graph").initializer;
        let place = |name: &str| tensors.iter().position(|t| t.name.as_deref() == Some(name)).expect("a constant");
        let (a, b) = (place(a), place(b));
        let data = tensors[a].raw_data.take();
        tensors[a].raw_data = std::mem::replace(&mut tensors[b].raw_data, data);
        let bytes = encode(model).expect("encoded");
        match keep_if_equal(bytes, &path, &backbone, &description, &options) {
            Err(error @ OnnxError::Deviates { .. }) => {
                assert!(error.to_string().contains("at most 1e-4 is allowed"), "{error}");
            }
            other => panic!("{other:?}"),
        }
        assert!(entries(folder.path()).is_empty());
    }
}

#[test]
fn bytes_that_are_no_graph_are_noticed() {
    let folder = tempfile::tempdir().expect("a folder");
    let (backbone, description) = backbone(v1());
    let options = fixed(20, 20);
    let mut bytes = encode(model(&backbone, &description, &options).expect("a model")).expect("encoded");
    bytes.truncate(bytes.len() / 2);
    let found = keep_if_equal(bytes, &folder.path().join("x.onnx"), &backbone, &description, &options);
    assert!(matches!(found, Err(OnnxError::Runtime { .. })), "{found:?}");
    assert!(entries(folder.path()).is_empty());
}

#[test]
fn options_that_do_not_fit_are_errors() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.onnx");
    let (vit, description) = backbone(v1());
    let fails = |backbone: &Backbone, description: &Description, options: &Options, message: &str| {
        let error = export(backbone, description, options, &path).expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
        assert!(entries(folder.path()).is_empty());
    };
    fails(&vit, &description, &fixed(20, 22), "image width 22 is not a multiple of the patch size 4");
    fails(&vit, &description, &fixed(0, 20), "image height 0");
    let (stages, of_stages) = backbone(convnext());
    fails(&stages, &of_stages, &fixed(64, 34), "image width 34: a ConvNeXt takes multiples of 4 from 32 on");
    fails(&stages, &description, &fixed(20, 20), "another architecture");
    let other = backbone(v2()).1;
    fails(&vit, &other, &fixed(20, 20), "another architecture");
    let flat = Description { std: [0.2, 0.0, 0.2], ..description.clone() };
    fails(&vit, &flat, &fixed(20, 20), "deviation [0.2, 0.0, 0.2]");

    let (config, size) = v1();
    let (one, of_one) = backbone((ModelConfig { in_channels: 1, ..config }, size));
    fails(&one, &of_one, &fixed(20, 20), "images of 1 channels");
    let normalized = Options { input: Input::Normalized, ..fixed(20, 24) };
    export(&one, &of_one, &normalized, &path).expect("a backbone of one channel");
    fs::remove_file(&path).expect("a file");

    let nan = parameters::replace(vit, |name, value| if name == "norm.bias" { value * f32::NAN } else { value });
    fails(&nan, &description, &fixed(20, 20), "not finite");
}

#[test]
fn more_than_the_format_holds_is_an_error() {
    assert!(fits(i32::MAX as u64).is_ok());
    let error = fits(i32::MAX as u64 + 1).expect_err("too long").to_string();
    assert!(error.contains("2147483648 bytes") && error.contains("at most 2147483647"), "{error}");
}

#[test]
fn a_path_that_cannot_be_written_is_an_error_and_an_old_file_stays() {
    let folder = tempfile::tempdir().expect("a folder");
    let (backbone, description) = backbone(v1());
    let missing = folder.path().join("missing/x.onnx");
    let error = export(&backbone, &description, &fixed(20, 20), &missing).expect_err("no folder").to_string();
    assert!(error.starts_with(&format!("{}: ", missing.display())), "{error}");
    let taken = folder.path().join("taken");
    fs::create_dir(&taken).expect("a folder");
    let error = export(&backbone, &description, &fixed(20, 20), &taken).expect_err("a folder").to_string();
    assert!(error.starts_with(&format!("{}: ", taken.display())), "{error}");
    assert_eq!(entries(folder.path()), ["taken"]);
}

/// In the environment of a child of the next test: where to export to.
const FULL: &str = "DINOXIDE_TEST_FULL_DISK";

#[test]
fn a_full_disk_leaves_the_old_file() {
    if let Some(path) = std::env::var_os(FULL) {
        let (backbone, description) = backbone(v1());
        let error = export(&backbone, &description, &fixed(20, 20), Path::new(&path)).expect_err("a full disk");
        assert!(matches!(error, OnnxError::Io { .. }), "{error}");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.onnx");
    fs::write(&path, "old").expect("written");
    let status = |limit: &str| {
        // Files end after so many blocks of 512 or 1024 bytes, depending on the shell.
        Command::new("sh")
            .args(["-c", &format!("trap '' XFSZ; ulimit -f {limit}; exec \"$@\""), "sh"])
            .arg(std::env::current_exe().expect("this program"))
            .args(["--exact", "tests::a_full_disk_leaves_the_old_file"])
            .env(FULL, &path)
            .output()
            .expect("a shell")
    };
    let full = status("8");
    assert!(full.status.success(), "{full:?}");
    assert_eq!(entries(folder.path()), ["x.onnx"]);
    assert_eq!(fs::read(&path).expect("a file"), b"old");
    // With room for it the child finds no error, which is what it was to find.
    assert!(!status("100000").status.success());
}
