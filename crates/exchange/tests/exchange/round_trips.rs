//! Out and in again, through every format.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;

use dinoxide_exchange::{Format, Verdict, export};
use dinoxide_model::config::{NormKind, RopeNormalize, RopePeriods};
use dinoxide_model::weights::{DESCRIPTION_KEY, backbone_file};
use dinoxide_model::{Architecture, VitConfig};
use zip::write::SimpleFileOptions;

use crate::support::{
    backbone, contents, convnext, description, dino, dinov2, dinov2_registers, dinov3, dinov3_gated, distance,
    features, open,
};

const FORMATS: [Format; 4] = [Format::Safetensors, Format::HuggingFace, Format::Meta, Format::Timm];

fn architectures() -> Vec<(&'static str, Architecture)> {
    vec![
        ("dino", dino().into()),
        ("dinov2", dinov2().into()),
        ("dinov2 with registers", dinov2_registers().into()),
        ("dinov3", dinov3().into()),
        ("dinov3 gated", dinov3_gated().into()),
        ("convnext", convnext().into()),
    ]
}

/// An image that is not square, and one of the grid that positions are stored for.
fn sizes(architecture: &Architecture) -> [(usize, usize); 2] {
    match architecture {
        Architecture::Vit(_) => [(12, 28), (20, 20)],
        Architecture::ConvNext(_) => [(64, 96), (32, 32)],
    }
}

#[test]
fn every_format_gives_the_backbone_back() {
    let mut cases = 0;
    for (seed, (name, architecture)) in architectures().into_iter().enumerate() {
        let sizes = sizes(&architecture);
        let backbone = backbone(architecture, seed as u64);
        for format in FORMATS {
            let case = format!("{name} as {}", format.name());
            let place = tempfile::tempdir().expect("a folder");
            let path = place.path().join("out");
            export(&backbone, &description(&backbone), format, &path).unwrap_or_else(|e| panic!("{case}: {e}"));
            assert_eq!(fs::read_dir(place.path()).expect("a folder").count(), 1, "{case}: something else was left");
            let loaded = open(&path).unwrap_or_else(|e| panic!("{case}: {e}"));
            assert_eq!(loaded.verdict, Verdict::Exact, "{case}");
            assert_eq!(loaded.description.provenance, description(&backbone).provenance, "{case}");
            for (height, width) in sizes {
                let off = distance(&features(&loaded.backbone, height, width), &features(&backbone, height, width));
                assert!(off <= 1e-5, "{case}, {height}×{width}: off by {off}");
            }
            cases += 1;
        }
    }
    assert_eq!(cases, 24);
}

/// Removes our description, so that what is left is what another library would have written.
fn strip(path: &Path, format: Format) {
    let without = |path: &Path| {
        let mut file = contents(path);
        file.metadata.remove(DESCRIPTION_KEY).expect("a description");
        file.write(path).expect("written");
    };
    match format {
        Format::Safetensors | Format::Timm => without(path),
        Format::HuggingFace => without(&path.join("model.safetensors")),
        Format::Meta => {
            let mut archive = zip::ZipArchive::new(fs::File::open(path).expect("open")).expect("an archive");
            let mut out = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
            let mut removed = 0;
            for index in 0..archive.len() {
                let mut entry = archive.by_index(index).expect("an entry");
                let name = entry.name().expect("a name").into_owned();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).expect("bytes");
                if name.ends_with("dinoxide.json") {
                    removed += 1;
                    continue;
                }
                let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
                out.start_file(name, stored).expect("an entry");
                out.write_all(&bytes).expect("bytes");
            }
            assert_eq!(removed, 1);
            fs::write(path, out.finish().expect("an archive").into_inner()).expect("written");
        }
    }
}

#[test]
fn without_our_description_a_file_is_read_as_its_library_would() {
    let mut cases = 0;
    for (seed, (name, architecture)) in architectures().into_iter().enumerate() {
        let sizes = sizes(&architecture);
        let backbone = backbone(architecture, 100 + seed as u64);
        for format in FORMATS {
            let case = format!("{name} as {}", format.name());
            let place = tempfile::tempdir().expect("a folder");
            let path = place.path().join("out");
            let notes = export(&backbone, &description(&backbone), format, &path).expect("an export");
            strip(&path, format);
            let loaded = open(&path).unwrap_or_else(|e| panic!("{case}: {e}"));
            assert_eq!(loaded.verdict, Verdict::Absent, "{case}");
            let interpolates = notes.iter().any(|note| note.contains("interpolates positions"));
            for (height, width) in sizes.into_iter().skip(usize::from(interpolates)) {
                let off = distance(&features(&loaded.backbone, height, width), &features(&backbone, height, width));
                assert!(off <= 1e-5, "{case}, {height}×{width}: off by {off}");
            }
            cases += 1;
        }
    }
    assert_eq!(cases, 24);
}

#[test]
fn changes_that_a_format_makes_are_noted() {
    let backbone = backbone(dino(), 3);
    let notes = |format: Format| {
        let place = tempfile::tempdir().expect("a folder");
        export(&backbone, &description(&backbone), format, &place.path().join("out")).expect("an export")
    };
    assert_eq!(notes(Format::Safetensors), [""; 0]);
    assert_eq!(notes(Format::Meta), [""; 0]);
    assert_eq!(
        notes(Format::HuggingFace),
        [
            "layer scale of ones added, which the format requires",
            "mask token of zeros added, which the format requires",
            "transformers interpolates positions with offset 0, without antialiasing; this model with offset 0.1, without: \
             features of images of other sizes than 20×20 px differ slightly",
        ]
    );
    assert_eq!(
        notes(Format::Timm),
        [
            "timm interpolates positions with offset 0, with antialiasing; this model with offset 0.1, without: features of \
          images of other sizes than 20×20 px differ slightly"
        ]
    );
}

#[test]
fn norms_that_a_file_of_tensors_does_not_tell_are_noted() {
    let mut cases = 0;
    for (name, mut architecture) in architectures() {
        let (eps, rope) = match &mut architecture {
            Architecture::Vit(config) => (&mut config.norm_eps, config.rope.is_some()),
            Architecture::ConvNext(config) => (&mut config.norm_eps, false),
        };
        // The usual one of the other kind.
        *eps = if rope { 1e-6 } else { 1e-5 };
        let text = format!("epsilon {:e}", *eps);
        let backbone = backbone(architecture, 7);
        for format in FORMATS {
            let place = tempfile::tempdir().expect("a folder");
            let notes = export(&backbone, &description(&backbone), format, &place.path().join("out"));
            let notes = notes.expect("an export").join("\n");
            let expected = matches!(format, Format::Timm | Format::Meta);
            assert_eq!(notes.contains(&text), expected, "{name} as {}: {notes}", format.name());
            assert_eq!(notes.contains("norm_layer="), format == Format::Timm, "{name} as {}: {notes}", format.name());
            cases += 1;
        }
    }
    assert_eq!(cases, 24);
}

#[test]
fn what_a_format_cannot_express_is_refused_and_nothing_is_left() {
    let rope = |change: &dyn Fn(&mut dinoxide_model::config::RopeConfig)| {
        let mut config = dinov3();
        change(config.rope.as_mut().expect("RoPE"));
        config
    };
    let max = || rope(&|rope| rope.normalize = RopeNormalize::Max);
    let range = || rope(&|rope| rope.periods = RopePeriods::Range { min: 1.0, max: 30.0 });
    let rms = || VitConfig { norm: NormKind::RmsNorm, ..dinov3() };
    let untied = || VitConfig { untie_cls_and_patch_norms: true, ..dinov3() };
    let (hf, meta, timm) = (Format::HuggingFace, Format::Meta, Format::Timm);
    let cases = [
        (max(), hf, "export to hf: it normalises RoPE's coordinates per axis, this model does not"),
        (
            range(),
            hf,
            "export to hf: it gives RoPE's periods by their base, this model by the shortest and the longest",
        ),
        (rms(), hf, "export to hf: it has no RMS normalisation"),
        (untied(), hf, "export to hf: it has one final norm, this model has one for CLS and another for patches"),
        (
            VitConfig { proj_bias: false, ..dinov2() },
            hf,
            "export to hf: its attention output and feed-forward layer have biases, this model leaves some out",
        ),
        (
            VitConfig { ffn_hidden: 44, ..dinov2_registers() },
            hf,
            "export to hf: no whole `mlp_ratio`, as it needs one, gives a feed-forward layer of width 44 at width 128",
        ),
        (max(), timm, "export to timm: its RoPE normalises coordinates per axis and has a base; this model's differs"),
        (
            VitConfig { mask_k_bias: false, ..dinov3() },
            timm,
            "export to timm: its DINOv3 models have no bias of the keys, this model has one",
        ),
        (rms(), timm, "export to timm: its models have no RMS normalisation"),
        (
            VitConfig { norm: NormKind::RmsNorm, ..dinov2() },
            meta,
            "export to meta: with learned positions, the repositories have no RMS normalisation",
        ),
    ];
    let count = cases.len();
    let mut seen = 0;
    for (config, format, expected) in cases {
        let backbone = backbone(config, 5);
        let place = tempfile::tempdir().expect("a folder");
        let error = export(&backbone, &description(&backbone), format, &place.path().join("out")).expect_err(expected);
        assert!(error.is_usage());
        assert_eq!(error.to_string(), expected);
        assert_eq!(fs::read_dir(place.path()).expect("a folder").count(), 0, "{expected}");
        seen += 1;
    }
    assert_eq!((seen, count), (10, 10));
}

#[test]
fn an_output_in_the_way_is_refused_and_kept() {
    let place = tempfile::tempdir().expect("a folder");
    let backbone = backbone(convnext(), 5);
    let path = |name: &str| place.path().join(name);
    fs::create_dir_all(path("full/inner")).expect("a folder");
    fs::create_dir(path("empty")).expect("a folder");
    fs::write(path("file"), "old").expect("a file");
    let refused = |name: &str, format| {
        let error = export(&backbone, &description(&backbone), format, &path(name)).expect_err(name);
        error.to_string().replace(&format!("{}: ", path(name).display()), "")
    };
    let hint = "\n\nhint: give another `--output`";
    assert_eq!(refused("full", Format::HuggingFace), format!("a folder with something in it{hint}"));
    assert_eq!(refused("file", Format::HuggingFace), format!("a file, and this format is a folder{hint}"));
    assert_eq!(refused("empty", Format::Timm), format!("a folder, and this format is a file{hint}"));
    assert_eq!(refused("no/where", Format::Meta), format!("the folder that it would be in does not exist{hint}"));
    assert_eq!(fs::read(path("file")).expect("kept"), b"old");
    export(&backbone, &description(&backbone), Format::HuggingFace, &path("empty")).expect("an empty folder will do");
    export(&backbone, &description(&backbone), Format::Meta, &path("file")).expect("a file is replaced");
    open(&path("empty")).expect("loads");
    open(&path("file")).expect("loads");
}

#[test]
fn early_names_of_hugging_face_and_of_the_repositories_are_read() {
    // Our export has the early names of Hugging Face; the fixtures have the current ones. Here: other early spellings.
    let place = tempfile::tempdir().expect("a folder");
    let backbone = backbone(dinov3(), 8);
    let path = place.path().join("hf");
    export(&backbone, &description(&backbone), Format::HuggingFace, &path).expect("an export");
    strip(&path, Format::HuggingFace);
    let file = path.join("model.safetensors");
    let mut weights = contents(&file);
    let rename =
        |name: String| name.replace("patch_embeddings.", "patch_embeddings.proj.").replace("layer.", "model.layer.");
    weights.tensors = weights.tensors.into_iter().map(|(name, weight)| (rename(name), weight)).collect();
    weights.write(&file).expect("written");
    let found = features(&open(&path).expect("loads").backbone, 12, 28);
    assert!(distance(&found, &features(&backbone, 12, 28)) <= 1e-5);

    // Chunks of blocks in DINOv2, wrappers, and iBOT's mask token.
    let backbone = crate::support::backbone(dinov2(), 9);
    let mut weights = backbone_file(&backbone, &description(&backbone));
    weights.metadata.remove(DESCRIPTION_KEY);
    let rename = |name: String| {
        let name = name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1.");
        format!("teacher.module.backbone.{}", name.replace("mask_token", "masked_embed"))
    };
    weights.tensors = weights.tensors.into_iter().map(|(name, weight)| (rename(name), weight)).collect();
    let file = place.path().join("chunks.safetensors");
    weights.write(&file).expect("written");
    let found = features(&open(&file).expect("loads").backbone, 12, 28);
    assert!(distance(&found, &features(&backbone, 12, 28)) <= 1e-5);
}
