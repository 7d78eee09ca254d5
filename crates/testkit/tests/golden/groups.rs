//! Fixture `param_groups`: how each parameter of each released model is treated, and the released models' parameters.

use std::collections::BTreeMap;

use burn::tensor::Device;
use dinoxide_model::{
    Arch, Backbone, ModelConfig, Vit,
    config::{FfnKind, Position},
    parameters,
};
use dinoxide_testkit::{Check, Tolerance};
use dinoxide_trainer::optimizer::{OptimConfig, group};
use rand::{SeedableRng, rngs::ChaCha8Rng};
use serde_json::Value;

use crate::vit;

/// Powers are taken in double precision, and read from decimals.
pub(crate) const TOLERANCE: Tolerance = Tolerance { atol: 0.0, rtol_of_max: 1e-15 };

pub(crate) fn all(check: &mut Check) {
    let json = check.fixture.json();
    let config = OptimConfig {
        layerwise_decay: json["hyper"]["layerwise_decay"].as_f64().expect("a decay"),
        patch_embed_lr_mult: json["hyper"]["patch_embed_lr_mult"].as_f64().expect("a factor"),
        ..OptimConfig::default()
    };
    for (model, submodules) in json["param_groups"].as_object().expect("`param_groups`") {
        if submodules["rows"].is_array() {
            // A sample of a model whose blocks are grouped in chunks; the index within the model is the second one.
            let depth = chunked_depth(&submodules["rows"]);
            rows(check, model, &submodules["rows"], depth, &config);
            continue;
        }
        for (submodule, described) in submodules.as_object().expect("submodules") {
            let case = format!("{model}.{submodule}");
            if described["n_blocks"].is_null() {
                // Heads and ConvNeXt: no blocks, so no decay by depth.
                rows(check, &case, &described["params"], 0, &config);
            } else {
                let depth = described["n_blocks"].as_u64().expect("a count") as usize;
                rows(check, &case, &described["non_block"], depth, &config);
                blocks(check, &case, described, depth, &config);
            }
        }
    }
    for (model, layout) in json["layouts"].as_object().expect("`layouts`") {
        if let Some(reason) = released(check, model, layout) {
            check.pending_part(&format!("layout of {model}"), reason);
        }
    }
}

/// Compares a parameter with what the reference does with it.
fn one(
    check: &mut Check,
    case: &str,
    name: &str,
    depth: usize,
    config: &OptimConfig,
    (lr, decay, last): (&Value, &Value, &Value),
) {
    let ours = vit::parameter(name).expect("no buffer");
    let found = group(&ours, depth, config);
    let case = format!("{case}.{name}");
    let number = |value: &Value| value.as_f64().expect("a factor");
    check.number(&format!("{case}: lr"), number(lr), found.lr_multiplier, TOLERANCE);
    check.number(&format!("{case}: weight decay"), number(decay), found.weight_decay_multiplier, Tolerance::EXACT);
    let last = f64::from(last.as_bool().expect("a flag"));
    check.number(&format!("{case}: last layer"), last, f64::from(found.is_last_layer), Tolerance::EXACT);
}

/// `[name, lr, weight decay, last layer]`
fn rows(check: &mut Check, case: &str, rows: &Value, depth: usize, config: &OptimConfig) {
    for row in rows.as_array().expect("rows") {
        one(check, case, row[0].as_str().expect("a name"), depth, config, (&row[1], &row[2], &row[3]));
    }
}

/// Parameters of blocks: `[suffix, weight decay, last layer]`, and a learning rate for each block.
fn blocks(check: &mut Check, case: &str, described: &Value, depth: usize, config: &OptimConfig) {
    let rates = described["block_lr"].as_array().expect("`block_lr`");
    assert_eq!(rates.len(), depth, "{case}: a rate for each block");
    for (block, lr) in rates.iter().enumerate() {
        for row in described["block_template"].as_array().expect("`block_template`") {
            let name = format!("blocks.{block}.{}", row[0].as_str().expect("a name"));
            one(check, case, &name, depth, config, (lr, &row[1], &row[2]));
        }
    }
}

/// The number of blocks of a sample with names `blocks.<chunk>.<block>.*` that has the last block.
fn chunked_depth(rows: &Value) -> usize {
    let names = rows.as_array().expect("rows").iter().filter_map(|row| row[0].as_str());
    let blocks = names.filter_map(|name| name.strip_prefix("blocks.")?.split('.').nth(1)?.parse::<usize>().ok());
    blocks.max().expect("blocks") + 1
}

type Shapes = BTreeMap<String, Vec<usize>>;

/// Shapes by name; buffers are left out.
fn shapes(layout: &Value, prefix: &str) -> Shapes {
    let entries = layout.as_object().expect("shapes").iter().filter_map(|(name, shape)| {
        let sizes = shape.as_array().expect("a shape").iter().map(|size| size.as_u64().expect("a size") as usize);
        Some((vit::parameter(&format!("{prefix}{name}"))?, sizes.collect()))
    });
    entries.collect()
}

/// Compares the parameters of a released backbone with ours of one block; returns why it does not, if it does not.
fn released(check: &mut Check, model: &str, layout: &Value) -> Option<&'static str> {
    if layout["n_blocks"].is_null() {
        if layout["tensors"].is_null() {
            return Some("heads are compared by the fixture `heads`");
        }
        // The list has the final norm under its second name as well.
        let mut expected = shapes(&layout["tensors"], "");
        for part in ["weight", "bias"] {
            let (alias, norm) = (expected.remove(&format!("norms.3.{part}")), expected.get(&format!("norm.{part}")));
            assert_eq!(alias.as_ref(), norm, "{model}: `norms.3.{part}`");
        }
        let config = ModelConfig { arch: Arch::ConvNextTiny, ..ModelConfig::default() };
        let architecture = config.resolve(32).expect("a configuration");
        let backbone = Backbone::new(&architecture, &Device::flex(), &mut ChaCha8Rng::seed_from_u64(5));
        compare_layouts(check, model, &expected, &parameters::shapes(&backbone).into_iter().collect());
        return None;
    }
    let mut expected = shapes(&layout["non_block"], "");
    let block = &layout["block"];
    expected.extend(shapes(block, "blocks.0."));
    let embed_dim = expected["cls_token"][2];
    if embed_dim > 2048 {
        return Some("even one block has hundreds of millions of weights");
    }
    let hidden = |name: &str| expected.get(&format!("blocks.0.mlp.{name}.weight")).map(|shape| shape[0] as f64);
    let width = embed_dim as f64;
    let (ffn, ffn_ratio) = match (hidden("fc1"), hidden("w12"), hidden("w1")) {
        (Some(hidden), _, _) => (FfnKind::Mlp, hidden / width),
        // Two thirds of the width, and for the packed form both halves of it.
        (_, Some(packed), _) => (FfnKind::SwigluFused, packed / 2.0 * 1.5 / width),
        (_, _, Some(hidden)) => (FfnKind::Swiglu, hidden * 1.5 / width),
        _ => panic!("{model}: a block has a feed-forward layer"),
    };
    let patch_size = expected["patch_embed.proj.weight"][3];
    let has = |name: &str| expected.contains_key(name);
    let config = ModelConfig {
        embed_dim: Some(embed_dim),
        depth: Some(1),
        num_heads: Some(embed_dim / 64),
        patch_size,
        ffn,
        ffn_ratio: Some(ffn_ratio),
        qkv_bias: has("blocks.0.attn.qkv.bias"),
        mask_k_bias: !block["attn.qkv.bias_mask"].is_null(),
        layer_scale_init: if has("blocks.0.ls1.gamma") { 1e-5 } else { 0.0 },
        register_tokens: expected.get("register_tokens").map_or(0, |shape| shape[1]),
        position: if has("pos_embed") { Position::Learned } else { Position::Rope },
        untie_global_and_local_cls_norm: has("local_cls_norm.weight"),
        ..ModelConfig::default()
    };
    let side = expected.get("pos_embed").map_or(1, |shape| (shape[1] - 1).isqrt());
    let config = config.vit(side * patch_size).expect("a configuration");
    let vit = Vit::new(&config, &Device::flex(), &mut ChaCha8Rng::seed_from_u64(5));
    let found: Shapes = parameters::shapes(&vit).into_iter().collect();
    compare_layouts(check, model, &expected, &found);
    None
}

fn compare_layouts(check: &mut Check, model: &str, expected: &Shapes, found: &Shapes) {
    let differing = expected.iter().filter(|(name, shape)| found.get(*name) != Some(*shape)).count()
        + found.keys().filter(|name| !expected.contains_key(*name)).count();
    check.number(&format!("layout of {model}: parameters that differ"), 0.0, differing as f64, Tolerance::EXACT);
}
