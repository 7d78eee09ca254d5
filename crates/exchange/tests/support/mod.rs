//! Tiny backbones whose every tensor matters, and comparisons of what they compute.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_exchange::{ExchangeError, Loaded, load};
use dinoxide_model::config::{DropPathKind, FfnKind, LearnedConfig, NormKind, RopeConfig, RopeNormalize, RopePeriods};
use dinoxide_model::weights::{Description, Provenance, WeightFile, host};
use dinoxide_model::{Architecture, Backbone, ConvNextConfig, VitConfig, parameters};
use dinoxide_random::{Purpose, stream};
use rand::RngExt;

pub(crate) fn open(path: &Path) -> Result<Loaded, ExchangeError> {
    load(path, &Device::flex())
}

/// DINOv2 without registers: two heads, as many as its width implies.
pub(crate) fn dinov2() -> VitConfig {
    VitConfig {
        patch_size: 4,
        in_channels: 3,
        embed_dim: 128,
        depth: 2,
        num_heads: 2,
        ffn_hidden: 256,
        ffn: FfnKind::Mlp,
        qkv_bias: true,
        proj_bias: true,
        ffn_bias: true,
        mask_k_bias: false,
        layer_scale_init: Some(1e-5),
        norm: NormKind::LayerNorm,
        norm_eps: 1e-6,
        register_tokens: 0,
        mask_token: true,
        learned: Some(LearnedConfig { grid: 5, offset: 0.1, antialias: false }),
        rope: None,
        drop_path_rate: 0.1,
        drop_path: DropPathKind::PerSample,
        untie_cls_and_patch_norms: false,
        untie_global_and_local_cls_norm: false,
    }
}

/// With registers, and packed SwiGLU as in the giant.
pub(crate) fn dinov2_registers() -> VitConfig {
    VitConfig {
        register_tokens: 3,
        ffn: FfnKind::SwigluFused,
        ffn_hidden: 88,
        learned: Some(LearnedConfig { grid: 5, offset: 0.0, antialias: true }),
        ..dinov2()
    }
}

/// DINO: no layer scale, no mask token.
pub(crate) fn dino() -> VitConfig {
    VitConfig { embed_dim: 64, num_heads: 1, depth: 1, layer_scale_init: None, mask_token: false, ..dinov2() }
}

/// DINOv3: RoPE, registers, no bias of the keys.
pub(crate) fn dinov3() -> VitConfig {
    let rope = RopeConfig {
        periods: RopePeriods::Base(100.0),
        normalize: RopeNormalize::Separate,
        shift: 0.0,
        jitter: 1.0,
        rescale: 2.0,
    };
    VitConfig {
        embed_dim: 64,
        num_heads: 1,
        depth: 3,
        ffn_hidden: 96,
        mask_k_bias: true,
        norm_eps: 1e-5,
        register_tokens: 4,
        learned: None,
        rope: Some(rope),
        drop_path: DropPathKind::Subset,
        ..dinov2()
    }
}

/// The 7B's kind: SwiGLU, no bias of queries, keys and values, a norm for local crops.
pub(crate) fn dinov3_gated() -> VitConfig {
    VitConfig {
        embed_dim: 128,
        num_heads: 2,
        depth: 1,
        qkv_bias: false,
        mask_k_bias: false,
        ffn: FfnKind::Swiglu64,
        ffn_hidden: 64,
        untie_global_and_local_cls_norm: true,
        ..dinov3()
    }
}

pub(crate) fn convnext() -> ConvNextConfig {
    ConvNextConfig {
        in_channels: 3,
        dims: [4, 6, 8, 10],
        depths: [1, 2, 1, 3],
        layer_scale_init: Some(1e-6),
        norm_eps: 1e-6,
        patch_size: None,
        drop_path_rate: 0.0,
        drop_path: DropPathKind::PerSample,
    }
}

/// A backbone with values of a size that lets every tensor matter.
pub(crate) fn backbone(architecture: impl Into<Architecture>, seed: u64) -> Backbone {
    let architecture = architecture.into();
    let mut rng = stream(seed, Purpose::Init, 0, 0);
    let backbone = Backbone::new(&architecture, &Device::flex(), &mut rng);
    parameters::replace(backbone, |name, value| {
        let count = value.dims()[0];
        let (center, width) = match name.rsplit('.').next() {
            Some("weight") if name.contains("norm") => (1.0, 0.2),
            Some("gamma") => (0.5, 0.2),
            _ => (0.0, 0.3),
        };
        let values: Vec<f32> = (0..count).map(|_| center + width * rng.random_range(-1.0f32..1.0)).collect();
        Tensor::from_data(TensorData::new(values, [count]), &Device::flex())
    })
}

pub(crate) fn description(backbone: &Backbone) -> Description {
    Description {
        architecture: backbone.architecture(),
        image_size: 20,
        mean: [0.5, 0.4, 0.3],
        std: [0.2, 0.3, 0.4],
        provenance: Provenance {
            recipe: "tiny".into(),
            steps: 7,
            images: 28,
            data: "photos".into(),
            software: "test".into(),
            scores: Vec::new(),
        },
        fingerprint: None,
    }
}

/// The images of the fixtures: pixel i is (7919·i mod 2003)/1001.5 − 1.
pub(crate) fn images(height: usize, width: usize) -> Tensor<4> {
    let count = 2 * 3 * height * width;
    let values: Vec<f32> = (0..count).map(|i| ((7919 * i % 2003) as f64 / 1001.5 - 1.0) as f32).collect();
    Tensor::from_data(TensorData::new(values, [2, 3, height, width]), &Device::flex())
}

/// CLS and patch tokens after the final norm.
pub(crate) fn features(backbone: &Backbone, height: usize, width: usize) -> [Vec<f32>; 2] {
    let features = backbone.forward(images(height, width), None);
    [host(features.cls.flatten(0, 1)), host(features.patches.flatten(0, 2))]
}

/// The largest difference; infinite if the lengths differ or anything is not a number.
pub(crate) fn distance(a: &[Vec<f32>; 2], b: &[Vec<f32>; 2]) -> f32 {
    let mut largest = 0f32;
    for (a, b) in a.iter().zip(b) {
        if a.len() != b.len() || a.iter().chain(b).any(|value| !value.is_finite()) {
            return f32::INFINITY;
        }
        largest = a.iter().zip(b).fold(largest, |found, (a, b)| found.max((a - b).abs()));
    }
    largest
}

/// The contents of a safetensors file.
pub(crate) fn contents(path: &Path) -> WeightFile {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    WeightFile::from_bytes(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The message of a load that must fail, without the path in front.
#[track_caller]
pub(crate) fn refusal(path: &Path) -> String {
    let error = match open(path) {
        Ok(loaded) => panic!("{} was loaded: {:?}", path.display(), loaded.format),
        Err(error) => error.to_string(),
    };
    error.replace(&format!("{}: ", path.display()), "")
}
