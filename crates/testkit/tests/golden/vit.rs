//! Fixtures `vit_v2_*` and `vit_v3_*`: a backbone's forwards, its position tables and the gradient of every parameter.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use dinoxide_model::{
    Backbone, CropGroup, Features, LayerFeatures, ModelConfig, RopeDraw, StochasticDraws, Vit, VitConfig,
    config::{FfnKind, NormKind, Position, RopeNormalize},
};
use dinoxide_testkit::{Array, Check, Fixture, Tolerance};
use rand::{SeedableRng, rngs::ChaCha8Rng};
use serde_json::Value;

use crate::tensors::{array, gradients, load, mask, named, tensor};

/// DINOv2's backbone.
pub(crate) fn v2(check: &mut Check) {
    run(check, &v2_config(check.fixture.hyper()));
}

/// DINOv3's backbone.
pub(crate) fn v3(check: &mut Check) {
    run(check, &v3_config(check.fixture.hyper()));
}

/// `hyper[key]` as a whole number, or `default` where there is none.
fn size(hyper: &Value, key: &str, default: Option<usize>) -> usize {
    match (hyper[key].as_u64(), default) {
        (Some(value), _) => value as usize,
        (None, Some(default)) => default,
        (None, None) => panic!("`{key}` is {}, not a size", hyper[key]),
    }
}

fn flag(hyper: &Value, key: &str, default: bool) -> bool {
    hyper[key].as_bool().unwrap_or(default)
}

fn common(hyper: &Value) -> ModelConfig {
    ModelConfig {
        embed_dim: Some(size(hyper, "embed_dim", None)),
        depth: Some(size(hyper, "depth", None)),
        num_heads: Some(size(hyper, "num_heads", None)),
        patch_size: size(hyper, "patch_size", None),
        qkv_bias: flag(hyper, "qkv_bias", true),
        proj_bias: flag(hyper, "proj_bias", true),
        ffn_bias: flag(hyper, "ffn_bias", true),
        ..ModelConfig::default()
    }
}

/// The backbone that DINOv2's options describe.
pub(crate) fn v2_config(hyper: &Value) -> VitConfig {
    let config = ModelConfig {
        ffn_ratio: hyper["mlp_ratio"].as_f64(),
        ffn: match hyper["ffn_layer"].as_str() {
            Some("mlp") | None => FfnKind::Mlp,
            Some("swiglu" | "swiglufused") => FfnKind::SwigluFused,
            Some(other) => panic!("`ffn_layer` is `{other}`"),
        },
        layer_scale_init: hyper["init_values"].as_f64().unwrap_or(0.0),
        norm_eps: hyper["norm_eps"].as_f64().unwrap_or(1e-6),
        register_tokens: size(hyper, "num_register_tokens", Some(0)),
        position: Position::Learned,
        interpolate_offset: hyper["interpolate_offset"].as_f64().unwrap_or(0.1),
        interpolate_antialias: flag(hyper, "interpolate_antialias", false),
        ..common(hyper)
    };
    config.vit(size(hyper, "img_size", None)).expect("a configuration")
}

/// The backbone that DINOv3's options describe.
pub(crate) fn v3_config(hyper: &Value) -> VitConfig {
    let (norm, norm_eps) = match hyper["norm_layer"].as_str() {
        Some("layernorm") | None => (NormKind::LayerNorm, 1e-6),
        Some("layernormbf16") => (NormKind::LayerNorm, 1e-5),
        Some("rmsnorm") => (NormKind::RmsNorm, 1e-5),
        Some(other) => panic!("`norm_layer` is `{other}`"),
    };
    let config = ModelConfig {
        ffn_ratio: hyper["ffn_ratio"].as_f64(),
        ffn: match hyper["ffn_layer"].as_str() {
            Some("mlp") | None => FfnKind::Mlp,
            Some("swiglu") => FfnKind::Swiglu,
            Some("swiglu32") => FfnKind::Swiglu32,
            Some("swiglu64") => FfnKind::Swiglu64,
            Some("swiglu128") => FfnKind::Swiglu128,
            Some(other) => panic!("`ffn_layer` is `{other}`"),
        },
        mask_k_bias: flag(hyper, "mask_k_bias", false),
        layer_scale_init: hyper["layerscale_init"].as_f64().unwrap_or(0.0),
        norm,
        norm_eps: hyper["eps"].as_f64().unwrap_or(norm_eps),
        register_tokens: size(hyper, "n_storage_tokens", Some(0)),
        position: Position::Rope,
        rope_base: hyper["pos_embed_rope_base"].as_f64().unwrap_or(100.0),
        rope_min_period: hyper["pos_embed_rope_min_period"].as_f64(),
        rope_max_period: hyper["pos_embed_rope_max_period"].as_f64(),
        rope_normalize: rope_normalize(&hyper["pos_embed_rope_normalize_coords"]),
        untie_cls_and_patch_norms: flag(hyper, "untie_cls_and_patch_norms", false),
        untie_global_and_local_cls_norm: flag(hyper, "untie_global_and_local_cls_norm", false),
        ..common(hyper)
    };
    // Rotary positions know no image size.
    config.vit(config.patch_size).expect("a configuration")
}

/// What a fixture calls the normalisation of RoPE's coordinates.
pub(crate) fn rope_normalize(value: &Value) -> RopeNormalize {
    match value.as_str() {
        Some("separate") | None => RopeNormalize::Separate,
        Some("max") => RopeNormalize::Max,
        Some("min") => RopeNormalize::Min,
        Some(other) => panic!("coordinates are normalised by `{other}`"),
    }
}

/// A parameter's name in the backbone for its name in a reference; `None` for buffers.
pub(crate) fn parameter(name: &str) -> Option<String> {
    if name.ends_with("bias_mask") || name.starts_with("rope_embed.") {
        return None;
    }
    let mut parts: Vec<&str> = name.split('.').collect();
    match parts[0] {
        "storage_tokens" => parts[0] = "register_tokens",
        "masked_embed" => parts[0] = "mask_token",
        // DINOv2 may group its blocks in chunks, under names `blocks.<chunk>.<block>`.
        "blocks" if parts.len() > 2 && parts[2].parse::<usize>().is_ok() => drop(parts.remove(1)),
        _ => {}
    }
    Some(parts.join("."))
}

/// The backbone of this description with the fixture's weights.
fn backbone(config: &VitConfig, weights: &BTreeMap<String, Array>, device: &Device) -> Vit {
    load(Vit::new(config, device, &mut ChaCha8Rng::seed_from_u64(1)), weights)
}

fn run(check: &mut Check, config: &VitConfig) {
    let fixture = check.fixture;
    let weights = named(fixture, "w.", parameter);
    let vit = backbone(config, &weights, &Device::flex());
    buffers(check, "w.", &vit);
    forwards(check, config, &weights);
    layers(check, &vit);
    gradient(check, &Backbone::Vit(backbone(config, &weights, &Device::flex().autodiff())));
    if config.rope.is_some() {
        rotary_tables(check, &vit);
    } else {
        learned_tables(check, config, &weights);
    }
}

/// Buffers are not loaded but computed: they must be the ones in the reference's weights.
pub(crate) fn buffers(check: &mut Check, prefix: &str, vit: &Vit) {
    let fixture = check.fixture;
    for name in fixture.names(prefix).filter(|name| parameter(&name[prefix.len()..]).is_none()) {
        let expected = fixture.floats(name);
        if name.ends_with("rope_embed.periods") {
            let found = Array { shape: expected.shape.clone(), values: vit.rope().expect("a RoPE").periods() };
            check.values(name, &expected, &found, Tolerance::stated(fixture, "rope"));
        } else {
            let block: usize = name.split('.').rev().nth(3).and_then(|i| i.parse().ok()).expect("a block's buffer");
            match vit.blocks[block].attn.bias_mask() {
                Some(values) => {
                    let found = Array { shape: expected.shape.clone(), values };
                    check.values(name, &expected, &found, Tolerance::EXACT);
                }
                None => check.failure(&format!("{name}: the backbone has no such buffer")),
            }
        }
    }
}

/// CLS of the last `count` blocks, oldest first, and the mean patch of the last one, all after the final norm; of a DINOv3
/// backbone on its fixture's images.
pub(crate) fn last_layers(fixture: &Fixture, count: usize) -> (Vec<Array>, Array) {
    let vit = backbone(&v3_config(fixture.hyper()), &named(fixture, "w.", parameter), &Device::flex());
    let depth = vit.config().depth;
    let layers: Vec<usize> = (depth - count..depth).collect();
    let found = vit.forward_layers(images(fixture, "in.x", &Device::flex()), &layers, true);
    let patches = found[count - 1].patches.clone();
    let [batch, _, dim] = patches.dims();
    let mean = array(patches.mean_dim(1).reshape([batch, dim]));
    (found.into_iter().map(|layer| array(layer.cls)).collect(), mean)
}

pub(crate) fn images(fixture: &Fixture, name: &str, device: &Device) -> Tensor<4> {
    tensor(&fixture.floats(name), device)
}

/// What a reference calls an output.
pub(crate) fn output(features: &Features, key: &str) -> Array {
    match key {
        "x_norm_clstoken" => array(features.cls.clone()),
        "x_norm_patchtokens" => array(features.patches.clone()),
        "x_storage_tokens" | "x_norm_regtokens" => array(features.registers.clone().expect("registers")),
        "x_prenorm" => array(features.prenorm.clone()),
        _ => panic!("an output `{key}` is not known"),
    }
}

/// `out.{nomask,mask,list_eval,list_train,off<offset>_aa<antialias>.mask}.*`
fn forwards(check: &mut Check, config: &VitConfig, weights: &BTreeMap<String, Array>) {
    let fixture = check.fixture;
    let device = Device::flex();
    let vit = backbone(config, weights, &device);
    let image = || images(fixture, "in.x", &device);
    let local = || images(fixture, "in.x_local", &device);
    let masked = || Some(mask(&fixture.array("in.masks"), &device));
    let still = |vit: &Vit, batch: usize| {
        assert_eq!(vit.config().drop_path_rate, 0.0);
        StochasticDraws::draw(vit.config(), batch, &mut ChaCha8Rng::seed_from_u64(2))
    };
    let (batch, local_batch) = (image().dims()[0], local().dims()[0]);
    let mut runs = vec![
        ("out.nomask.".to_owned(), vit.forward(image(), None)),
        ("out.mask.".into(), vit.forward(image(), masked())),
        ("out.list_eval.global.".into(), vit.forward(image(), masked())),
        ("out.list_eval.local.".into(), vit.forward(local(), None)),
        ("out.list_train.global.".into(), vit.forward_train(image(), masked(), CropGroup::Global, &still(&vit, batch))),
        ("out.list_train.local.".into(), vit.forward_train(local(), None, CropGroup::Local, &still(&vit, local_batch))),
    ];
    for (variant, offset, antialias) in interpolations(fixture, "out.") {
        let vit = backbone(&interpolated(config, offset, antialias), weights, &device);
        runs.push((format!("out.{variant}.mask."), vit.forward(image(), masked())));
    }
    for (prefix, features) in runs {
        for name in fixture.names(&prefix) {
            check.tensor(name, &output(&features, &name[prefix.len()..]));
        }
    }
}

/// `out.interm*`: outputs of blocks before the last.
fn layers(check: &mut Check, vit: &Vit) {
    let fixture = check.fixture;
    let depth = vit.config().depth;
    let run = |layers: &[usize], norm: bool| vit.forward_layers(images(fixture, "in.x", &Device::flex()), layers, norm);
    let [_, _, height, width] = images(fixture, "in.x", &Device::flex()).dims();
    let (rows, columns) = vit.config().grid(height, width).expect("a grid");
    // The highest number in the names says how many layers were asked for.
    let count = |prefix: &str| {
        let number = |name: &str| name[prefix.len()..].split('.').next().and_then(|i| i.parse::<usize>().ok());
        fixture.names(prefix).filter_map(number).max().map_or(0, |last| last + 1)
    };
    let mut compare = |prefix: &str, found: &[LayerFeatures]| {
        for (i, layer) in found.iter().enumerate() {
            for name in fixture.names(&format!("{prefix}{i}")) {
                let found = match name[prefix.len()..].split_once('.') {
                    Some((_, "cls")) => array(layer.cls.clone()),
                    Some((_, "patch")) => array(layer.patches.clone()),
                    Some((_, "extra")) => array(layer.registers.clone().expect("registers")),
                    None => {
                        let [batch, _, dim] = layer.patches.dims();
                        array(layer.patches.clone().swap_dims(1, 2).reshape([batch, dim, rows, columns]))
                    }
                    Some(_) => panic!("an output `{name}` is not known"),
                };
                check.tensor(name, &found);
            }
        }
    };
    for (prefix, norm) in [("out.interm.norm0.", false), ("out.interm.norm1.", true), ("out.interm_extra.", true)] {
        let last: Vec<usize> = (depth - count(prefix)..depth).collect();
        compare(prefix, &run(&last, norm));
    }
    compare("out.interm_list_reshape.", &run(&[depth - 1, 0], true));
}

/// `out.proj_loss` and `grad.*`: of the weighted sum of the training forwards of global and local crops.
pub(crate) fn gradient(check: &mut Check, backbone: &Backbone) {
    let fixture = check.fixture;
    let device = Device::flex().autodiff();
    let mut total = Tensor::<1>::zeros([1], &device);
    for (group, crops, input) in [(CropGroup::Global, "global", "in.x"), (CropGroup::Local, "local", "in.x_local")] {
        let images = images(fixture, input, &device);
        let draws = backbone.architecture().draw(images.dims()[0], &mut ChaCha8Rng::seed_from_u64(3));
        let masked = group == CropGroup::Global && fixture.has("in.masks");
        let masks = masked.then(|| mask(&fixture.array("in.masks"), &device));
        let features = backbone.forward_train(images, masks, group, &draws);
        let prefix = format!("proj.{crops}.");
        for name in fixture.names(&prefix) {
            let weights = fixture.floats(name);
            let sum = match &name[prefix.len()..] {
                "x_norm_clstoken" => (features.cls.clone() * tensor(&weights, &device)).sum(),
                "x_norm_patchtokens" => (features.patches.clone() * tensor(&weights, &device)).sum(),
                "x_prenorm" => (features.prenorm.clone() * tensor(&weights, &device)).sum(),
                _ => (features.registers.clone().expect("registers") * tensor(&weights, &device)).sum(),
            };
            total = total + sum;
        }
    }
    check.scalar("out.proj_loss", total.clone().into_scalar());
    let mut found = gradients(backbone, &total.backward());
    for name in fixture.names("grad.") {
        match parameter(&name["grad.".len()..]).and_then(|parameter| found.remove(&parameter)) {
            Some(gradient) => check.tensor(name, &gradient),
            None => check.failure(&format!("{name}: the backbone has no such parameter")),
        }
    }
    for name in found.keys() {
        check.failure(&format!("the reference has no gradient of `{name}`"));
    }
}

/// `rope.*`: tables of the patches of both crop sizes.
fn rotary_tables(check: &mut Check, vit: &Vit) {
    let fixture = check.fixture;
    let rope = vit.rope().expect("a RoPE");
    for (crops, input) in [("global", "in.x"), ("local", "in.x_local")] {
        let [_, _, height, width] = fixture.shape(input)[..] else { panic!("`{input}` are images") };
        let grid = vit.config().grid(height, width).expect("a grid");
        let table = rope.table(grid, 0, &RopeDraw::NONE, &Device::flex());
        check.tensor(&format!("rope.{crops}.cos"), &array(table.cos));
        check.tensor(&format!("rope.{crops}.sin"), &array(table.sin));
    }
    let values = rope.periods();
    check.tensor("rope.periods", &Array { shape: vec![values.len()], values });
}

/// `pos.<interpolation>.<rows>x<columns>`
fn learned_tables(check: &mut Check, config: &VitConfig, weights: &BTreeMap<String, Array>) {
    let fixture = check.fixture;
    let device = Device::flex();
    for (variant, offset, antialias) in interpolations(fixture, "pos.") {
        let vit = backbone(&interpolated(config, offset, antialias), weights, &device);
        let prefix = format!("pos.{variant}.");
        for name in fixture.names(&prefix) {
            let (rows, columns) = name[prefix.len()..].split_once('x').expect("a grid");
            let grid = (rows.parse().expect("rows"), columns.parse().expect("columns"));
            check.tensor(name, &array(vit.positions(tensor(&weights["pos_embed"], &device), grid)));
        }
    }
}

/// The variants `off<offset>_aa<0|1>` of interpolation that stand after `prefix` in the fixture's names.
fn interpolations(fixture: &Fixture, prefix: &str) -> Vec<(String, f64, bool)> {
    let mut found = BTreeMap::new();
    for name in fixture.names(&format!("{prefix}off")) {
        let (offset, rest) = name[prefix.len() + 3..].split_once("_aa").expect("an offset and `_aa`");
        let antialias = rest.starts_with('1');
        let variant = format!("off{offset}_aa{}", u8::from(antialias));
        found.insert(variant, (offset.parse().expect("an offset"), antialias));
    }
    found.into_iter().map(|(variant, (offset, antialias))| (variant, offset, antialias)).collect()
}

fn interpolated(config: &VitConfig, offset: f64, antialias: bool) -> VitConfig {
    let mut config = config.clone();
    let learned = config.learned.as_mut().expect("learned positions");
    (learned.offset, learned.antialias) = (offset, antialias);
    config
}
