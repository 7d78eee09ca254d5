//! Files that `torch`, `transformers` and `timm` wrote, with the features that they computed.

use std::path::{Path, PathBuf};

use dinoxide_exchange::Verdict;
use dinoxide_model::Architecture;
use dinoxide_model::config::{FfnKind, RopePeriods};

use crate::support::{contents, distance, features, images, open};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

#[test]
fn features_are_those_of_the_library_that_wrote_the_weights() {
    let mut seen = Vec::new();
    for entry in std::fs::read_dir(folder()).expect("fixtures") {
        let path = entry.expect("an entry").path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()?.strip_suffix(".expected.safetensors")) else {
            continue;
        };
        let expected = contents(&path);
        let size = |key: &str| expected.metadata[key].parse::<usize>().expect("a size");
        let (height, width) = (size("height"), size("width"));
        let loaded = open(&folder().join(&expected.metadata["path"])).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(loaded.verdict, Verdict::Absent, "{name}");
        let found = features(&loaded.backbone, height, width);
        let expected = ["cls", "patches"].map(|key| expected.tensors[key].values.clone());
        let off = distance(&found, &expected);
        assert!(off <= 1e-4, "{name}: features are off by {off}; {:?}", loaded.notes);
        assert_eq!(images(height, width).dims()[0], 2);
        seen.push(name.to_owned());
    }
    seen.sort();
    let names = [
        "dino_full_checkpoint",
        "dinov3_teacher_checkpoint",
        "hf_dinov2_swiglu",
        "hf_dinov2_with_registers",
        "hf_dinov3_convnext",
        "hf_dinov3_vit",
        "hf_dinov3_vit_gated_sharded",
        "timm_convnext",
        "timm_dinov3",
        "timm_reg4_dinov2",
    ];
    assert_eq!(seen, names);
}

#[test]
fn what_a_format_cannot_say_is_noted() {
    let notes = |name: &str| open(&folder().join(name)).unwrap_or_else(|e| panic!("{name}: {e}")).notes;
    let assumed = "mean and standard deviation of ImageNet images";
    let unchecked = "no fingerprint: whether the backbone computes what it did where it comes from is not checked";
    assert_eq!(
        notes("dino_full_checkpoint.pth"),
        [
            "left out: `dino_loss.center`, 1 tensor",
            "left out: `optimizer.state`, 6 tensors",
            "left out: `student.backbone`, 2 tensors",
            "left out: `teacher.head`, 2 tensors",
            "1 heads of width 64, as in released models",
            assumed,
            unchecked,
        ]
    );
    assert_eq!(
        notes("dinov3_teacher_checkpoint.pth"),
        ["left out: `teacher.dino_head`, 1 tensor", "left out: `teacher.ibot_head`, 1 tensor", assumed, unchecked,]
    );
    assert_eq!(notes("hf_dinov3_vit"), [assumed, unchecked]);
}

#[test]
fn architectures_are_derived() {
    let vit = |name: &str| match open(&folder().join(name))
        .unwrap_or_else(|e| panic!("{name}: {e}"))
        .description
        .architecture
    {
        Architecture::Vit(config) => config,
        Architecture::ConvNext(_) => panic!("{name}"),
    };
    let teacher = vit("dinov3_teacher_checkpoint.pth");
    assert_eq!((teacher.num_heads, teacher.norm_eps, teacher.register_tokens), (2, 1e-5, 5));
    assert!(teacher.mask_k_bias && teacher.mask_token);
    assert_eq!(teacher.rope.expect("RoPE").periods, RopePeriods::Base(100.0));
    let gated = vit("hf_dinov3_vit_gated_sharded");
    assert_eq!((gated.ffn, gated.ffn_hidden, gated.register_tokens), (FfnKind::Swiglu, 24, 0));
    assert_eq!(gated.rope.expect("RoPE").periods, RopePeriods::Base(50.0));
    let giant = vit("hf_dinov2_swiglu");
    assert_eq!((giant.ffn, giant.ffn_hidden, giant.norm_eps), (FfnKind::SwigluFused, 32, 1e-6));
    let learned = vit("timm_reg4_dinov2.safetensors").learned.expect("a table");
    assert_eq!((learned.grid, learned.offset, learned.antialias), (5, 0.0, true));
    let learned = vit("dino_full_checkpoint.pth").learned.expect("a table");
    assert_eq!((learned.grid, learned.offset, learned.antialias), (3, 0.1, false));
    let description = open(&folder().join("hf_dinov3_convnext")).expect("a ConvNeXt").description;
    let Architecture::ConvNext(config) = description.architecture else { panic!("a ViT") };
    assert_eq!((config.dims, config.depths), ([4, 6, 8, 10], [1, 2, 1, 1]));
    assert_eq!(description.image_size, 224);
}
