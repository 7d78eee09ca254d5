//! Hugging Face `transformers`: `Dinov2Model`, `Dinov2WithRegistersModel`, `DINOv3ViTModel` and `DINOv3ConvNextModel`.
//!
//! Their modules have other names, and queries, keys and values are matrices of their own. Reading knows the names of early
//! versions and of current ones; writing uses those of the published checkpoints, which every version reads.

use std::collections::BTreeMap;

use dinoxide_model::config::{FfnKind, NormKind, RopeNormalize, RopePeriods};
use dinoxide_model::weights::{Description, Weight};
use dinoxide_model::{Architecture, ConvNextConfig, VitConfig};
use serde_json::{Value, json};

use crate::architecture::Hints;
use crate::reference::flat_token;
use crate::{Tensors, concatenate, constant, in_block, reshaped, split};

/// Types of models that can be read.
const TYPES: [&str; 4] = ["dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext"];

/// What `config.json` says.
///
/// # Errors
/// A type of model or an activation that is not supported.
pub(crate) fn hints(config: Option<&Value>) -> Result<Hints, String> {
    let Some(config) = config else { return Ok(Hints::default()) };
    let kind = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    if !TYPES.contains(&kind) {
        return Err(format!("`config.json` has model type `{kind}`; supported are {}", TYPES.join(", ")));
    }
    let gated = config.get("use_gated_mlp").and_then(Value::as_bool).unwrap_or(false);
    let expected = if gated { "silu" } else { "gelu" };
    let activation = config.get("hidden_act").and_then(Value::as_str).unwrap_or(expected);
    if activation != expected {
        return Err(format!("`config.json` has `hidden_act` `{activation}`, only `{expected}` is supported here"));
    }
    let number = |key: &str| config.get(key).and_then(Value::as_f64);
    let base = config.get("rope_parameters").and_then(|rope| rope.get("rope_theta")).and_then(Value::as_f64);
    Ok(Hints {
        num_heads: config.get("num_attention_heads").and_then(Value::as_u64).map(|heads| heads as usize),
        norm_eps: number("layer_norm_eps"),
        rope_base: number("rope_theta").or(base),
        ..Hints::default()
    })
}

/// The references' names for a ViT's tensors.
///
/// # Errors
/// Parts of a packed tensor that do not fit together, or that are not all there.
pub(crate) fn vit(tensors: Tensors, config: Option<&Value>) -> Result<(Tensors, Hints), String> {
    let mut hints = hints(config)?;
    let learned = tensors.contains_key("embeddings.position_embeddings");
    let registers = if learned { "register_tokens" } else { "storage_tokens" };
    let mut found = Tensors::new();
    // Per block: parts of packed tensors.
    let mut parts: BTreeMap<(usize, String), Weight> = BTreeMap::new();
    for (name, weight) in tensors {
        let outer = name.strip_prefix("encoder.").or_else(|| name.strip_prefix("model.")).unwrap_or(&name);
        let layer = outer.strip_prefix("layer.").and_then(|rest| rest.split_once('.'));
        if let Some((Ok(index), rest)) = layer.map(|(index, rest)| (index.parse::<usize>(), rest)) {
            match in_layer(rest) {
                Some(Part::Whole(rest)) => {
                    found.insert(format!("blocks.{index}.{rest}"), weight);
                }
                Some(Part::Of(part)) => {
                    parts.insert((index, part), weight);
                }
                None => {
                    found.insert(name, weight);
                }
            }
            continue;
        }
        let (name, weight) = match name.as_str() {
            "embeddings.cls_token" => ("cls_token".to_owned(), weight),
            "embeddings.mask_token" => ("mask_token".to_owned(), flat_token(weight)),
            "embeddings.position_embeddings" => ("pos_embed".to_owned(), weight),
            // Without registers, DINOv3 has a tensor of none.
            "embeddings.register_tokens" if weight.values.is_empty() => continue,
            "embeddings.register_tokens" => (registers.to_owned(), weight),
            _ => match name.strip_prefix("embeddings.patch_embeddings.") {
                Some(rest) => {
                    let rest = rest.strip_prefix("projection.").or_else(|| rest.strip_prefix("proj.")).unwrap_or(rest);
                    (format!("patch_embed.proj.{rest}"), weight)
                }
                None => (name.replace("layernorm.", "norm."), weight),
            },
        };
        found.insert(name, weight);
    }
    let blocks: Vec<usize> = parts.keys().map(|(index, _)| *index).collect();
    for index in blocks {
        pack(index, learned, &mut parts, &mut found, &mut hints).map_err(|e| format!("block {index}: {e}"))?;
    }
    for ((index, part), weight) in parts {
        found.insert(format!("layer.{index}.{part}"), weight);
    }
    if learned {
        // `interpolate` is given the size, and filters only in the class with registers.
        hints.interpolation = Some((0.0, found.contains_key("register_tokens")));
    }
    Ok((found, hints))
}

/// What a tensor of a layer is.
enum Part {
    /// A tensor of the reference, by its name in the block.
    Whole(String),
    /// A part of one, by its current name.
    Of(String),
}

fn in_layer(name: &str) -> Option<Part> {
    let (module, kind) = name.rsplit_once('.')?;
    let whole = |module: &str| Some(Part::Whole(format!("{module}.{kind}")));
    let of = |module: &str| Some(Part::Of(format!("{module}.{kind}")));
    match module {
        "norm1" | "norm2" | "mlp.fc1" | "mlp.fc2" => whole(module),
        "layer_scale1" => Some(Part::Whole("ls1.gamma".to_owned())),
        "layer_scale2" => Some(Part::Whole("ls2.gamma".to_owned())),
        "attention.output.dense" | "attention.o_proj" => whole("attn.proj"),
        "attention.attention.query" | "attention.q_proj" => of("q"),
        "attention.attention.key" | "attention.k_proj" => of("k"),
        "attention.attention.value" | "attention.v_proj" => of("v"),
        "mlp.weights_in" => whole("mlp.w12"),
        "mlp.weights_out" => whole("mlp.w3"),
        "mlp.gate_proj" => of("gate"),
        "mlp.up_proj" => of("up"),
        "mlp.down_proj" => of("down"),
        _ => None,
    }
}

/// Packs what a block has in parts.
fn pack(
    index: usize,
    packed: bool,
    parts: &mut BTreeMap<(usize, String), Weight>,
    found: &mut Tensors,
    hints: &mut Hints,
) -> Result<(), String> {
    let mut take = |part: String| parts.remove(&(index, part));
    for kind in ["weight", "bias"] {
        let mut put = |name: &str, weight: Weight| {
            found.insert(format!("blocks.{index}.{name}.{kind}"), weight);
        };
        let [q, k, v] = ["q", "k", "v"].map(|part| take(format!("{part}.{kind}")));
        match (q, k, v) {
            (Some(q), Some(k), Some(v)) => put("attn.qkv", concatenate(&[&q, &k, &v])?),
            (Some(q), None, Some(v)) if kind == "bias" => {
                hints.mask_k_bias = true;
                put("attn.qkv", concatenate(&[&q, &constant(q.shape.clone(), 0.0), &v])?);
            }
            (None, None, None) => {}
            (q, k, v) => {
                let state = |part: Option<Weight>| if part.is_some() { "there" } else { "missing" };
                return Err(format!(
                    "the {kind} of queries is {}, of keys {}, of values {}",
                    state(q),
                    state(k),
                    state(v)
                ));
            }
        }
        let [gate, up, down] = ["gate", "up", "down"].map(|part| take(format!("{part}.{kind}")));
        match (gate, up, down) {
            // DINOv2 packs gate and value, DINOv3 does not.
            (Some(gate), Some(up), Some(down)) if packed => {
                put("mlp.w12", concatenate(&[&gate, &up])?);
                put("mlp.w3", down);
            }
            (Some(gate), Some(up), Some(down)) => {
                put("mlp.w1", gate);
                put("mlp.w2", up);
                put("mlp.w3", down);
            }
            (None, Some(up), Some(down)) => {
                put("mlp.fc1", up);
                put("mlp.fc2", down);
            }
            (None, None, None) => {}
            _ => return Err(format!("the {kind} of its feed-forward layer are not all there")),
        }
    }
    Ok(())
}

/// Pairs of names in a ConvNeXt block, the reference's first.
const CONVNEXT: [(&str, &str); 4] = [
    ("dwconv.", "depthwise_conv."),
    ("norm.", "layer_norm."),
    ("pwconv1.", "pointwise_conv1."),
    ("pwconv2.", "pointwise_conv2."),
];

/// The references' names for a ConvNeXt's tensors.
///
/// # Errors
/// A configuration of something else.
pub(crate) fn convnext(tensors: Tensors, config: Option<&Value>) -> Result<(Tensors, Hints), String> {
    let hints = hints(config)?;
    let name = |name: &str| -> Option<String> {
        let name = name.strip_prefix("model.").unwrap_or(name);
        if let Some(rest) = name.strip_prefix("layer_norm.") {
            return Some(format!("norm.{rest}"));
        }
        let (stage, rest) = name.strip_prefix("stages.")?.split_once('.')?;
        if let Some(rest) = rest.strip_prefix("downsample_layers.") {
            return Some(format!("downsample_layers.{stage}.{rest}"));
        }
        let (block, rest) = rest.strip_prefix("layers.")?.split_once('.')?;
        let pair = CONVNEXT.iter().find_map(|(ours, theirs)| Some(format!("{ours}{}", rest.strip_prefix(theirs)?)));
        Some(format!("stages.{stage}.{block}.{}", pair.unwrap_or_else(|| rest.to_owned())))
    };
    Ok((tensors.into_iter().map(|(old, weight)| (name(&old).unwrap_or(old), weight)).collect(), hints))
}

/// Makes a backbone one that the library can express, without changing what it computes, or says why it cannot; notes what
/// is given up.
pub(crate) fn adjust(
    architecture: &mut Architecture,
    tensors: &mut Tensors,
    notes: &mut Vec<String>,
) -> Result<(), String> {
    match architecture {
        Architecture::Vit(config) => adjust_vit(config, tensors, notes),
        Architecture::ConvNext(config) => {
            if config.layer_scale_init.is_none() {
                notes.push("layer scale of ones added, which the format requires".to_owned());
                config.layer_scale_init = Some(1.0);
                for (stage, (dim, depth)) in config.dims.into_iter().zip(config.depths).enumerate() {
                    for block in 0..depth {
                        tensors.insert(format!("stages.{stage}.{block}.gamma"), constant(vec![dim], 1.0));
                    }
                }
            }
            Ok(())
        }
    }
}

fn adjust_vit(config: &mut VitConfig, tensors: &mut Tensors, notes: &mut Vec<String>) -> Result<(), String> {
    let dim = config.embed_dim;
    if config.norm == NormKind::RmsNorm {
        return Err("it has no RMS normalisation".to_owned());
    }
    if config.untie_cls_and_patch_norms {
        return Err("it has one final norm, this model has one for CLS and another for patches".to_owned());
    }
    drop_local_norm(config, tensors, notes);
    if config.layer_scale_init.is_none() {
        notes.push("layer scale of ones added, which the format requires".to_owned());
        config.layer_scale_init = Some(1.0);
        for (block, scale) in (0..config.depth).flat_map(|block| [(block, 1), (block, 2)]) {
            tensors.insert(format!("blocks.{block}.ls{scale}.gamma"), constant(vec![dim], 1.0));
        }
    }
    if !config.mask_token {
        notes.push("mask token of zeros added, which the format requires".to_owned());
        config.mask_token = true;
        tensors.insert("mask_token".to_owned(), constant(vec![1, dim], 0.0));
    }
    if let Some(rope) = &config.rope {
        if rope.normalize != RopeNormalize::Separate {
            return Err("it normalises RoPE's coordinates per axis, this model does not".to_owned());
        }
        if !matches!(rope.periods, RopePeriods::Base(_)) {
            return Err("it gives RoPE's periods by their base, this model by the shortest and the longest".to_owned());
        }
        if config.ffn == FfnKind::SwigluFused {
            for (block, kind) in (0..config.depth).flat_map(|block| [(block, "weight"), (block, "bias")]) {
                if let Some(both) = tensors.remove(&format!("blocks.{block}.mlp.w12.{kind}")) {
                    for (i, half) in split(&both, 2).into_iter().enumerate() {
                        tensors.insert(format!("blocks.{block}.mlp.w{}.{kind}", i + 1), half);
                    }
                }
            }
            config.ffn = FfnKind::Swiglu;
        }
        return Ok(());
    }
    if !(config.proj_bias && config.ffn_bias) {
        return Err("its attention output and feed-forward layer have biases, this model leaves some out".to_owned());
    }
    // With learned positions there is no mask for the keys' bias; it is zero in the weights.
    if config.mask_k_bias {
        config.mask_k_bias = false;
        crate::reference::fold_buffers(tensors, true)?;
    }
    pack_swiglu(config, tensors)?;
    let learned = config.learned.as_ref().expect("positions are learned or rotary");
    let antialias = config.register_tokens > 0;
    if learned.offset != 0.0 || learned.antialias != antialias {
        let with = |antialias| if antialias { "with" } else { "without" };
        notes.push(format!(
            "transformers interpolates positions with offset 0, {} antialiasing; this model with offset {}, {}: features of \
             images of other sizes than {side}×{side} px differ slightly",
            with(antialias),
            learned.offset,
            with(learned.antialias),
            side = learned.grid * config.patch_size
        ));
    }
    mlp_ratio(config).map(|_| ())
}

/// Removes the norm of local crops, which only training uses.
pub(crate) fn drop_local_norm(config: &mut VitConfig, tensors: &mut Tensors, notes: &mut Vec<String>) {
    if config.untie_global_and_local_cls_norm {
        notes.push("the norm of local crops is left out; only training uses it".to_owned());
        config.untie_global_and_local_cls_norm = false;
        tensors.retain(|name, _| !name.starts_with("local_cls_norm."));
    }
}

/// Packs gate and value, as DINOv2 has them.
pub(crate) fn pack_swiglu(config: &mut VitConfig, tensors: &mut Tensors) -> Result<(), String> {
    if matches!(config.ffn, FfnKind::Mlp | FfnKind::SwigluFused) {
        return Ok(());
    }
    for (block, kind) in (0..config.depth).flat_map(|block| [(block, "weight"), (block, "bias")]) {
        let [gate, value] = ["w1", "w2"].map(|part| tensors.remove(&format!("blocks.{block}.mlp.{part}.{kind}")));
        if let (Some(gate), Some(value)) = (gate, value) {
            tensors.insert(format!("blocks.{block}.mlp.w12.{kind}"), concatenate(&[&gate, &value])?);
        }
    }
    config.ffn = FfnKind::SwigluFused;
    Ok(())
}

/// The ratio that gives the hidden width by the formula of `Dinov2Config`, which takes whole numbers alone.
fn mlp_ratio(config: &VitConfig) -> Result<usize, String> {
    let (dim, hidden) = (config.embed_dim, config.ffn_hidden);
    // Two thirds of the nominal width, rounded up to 8, for SwiGLU.
    let width = |ratio: usize| match config.ffn {
        FfnKind::Mlp => dim * ratio,
        _ => (2 * dim * ratio / 3).div_ceil(8) * 8,
    };
    (1..=2 * hidden.div_ceil(dim)).find(|ratio| width(*ratio) == hidden).ok_or_else(|| {
        format!("no whole `mlp_ratio`, as it needs one, gives a feed-forward layer of width {hidden} at width {dim}")
    })
}

/// `config.json`.
pub(crate) fn config(architecture: &Architecture, image_size: usize) -> Value {
    match architecture {
        Architecture::Vit(config) => vit_config(config, image_size),
        Architecture::ConvNext(config) => {
            let ConvNextConfig { in_channels, dims, depths, norm_eps, layer_scale_init, .. } = config;
            json!({
                "architectures": ["DINOv3ConvNextModel"],
                "model_type": "dinov3_convnext",
                "num_channels": in_channels,
                "hidden_sizes": dims,
                "depths": depths,
                "hidden_act": "gelu",
                "layer_norm_eps": norm_eps,
                "layer_scale_init_value": layer_scale_init,
                "drop_path_rate": 0.0,
                "image_size": image_size,
                "dtype": "float32",
            })
        }
    }
}

fn vit_config(config: &VitConfig, image_size: usize) -> Value {
    let gated = config.ffn != FfnKind::Mlp;
    let mut value = json!({
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_channels": config.in_channels,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.norm_eps,
        "layerscale_value": config.layer_scale_init,
        "drop_path_rate": 0.0,
        "dtype": "float32",
    });
    let mut set = |entries: Value| {
        let (Value::Object(to), Value::Object(from)) = (&mut value, entries) else { unreachable!("both are objects") };
        to.extend(from);
    };
    if let Some(rope) = &config.rope {
        let RopePeriods::Base(base) = rope.periods else { unreachable!("refused before") };
        set(json!({
            "architectures": ["DINOv3ViTModel"],
            "model_type": "dinov3_vit",
            "intermediate_size": config.ffn_hidden,
            "hidden_act": if gated { "silu" } else { "gelu" },
            "use_gated_mlp": gated,
            "query_bias": config.qkv_bias,
            "key_bias": config.qkv_bias && !config.mask_k_bias,
            "value_bias": config.qkv_bias,
            "proj_bias": config.proj_bias,
            "mlp_bias": config.ffn_bias,
            "num_register_tokens": config.register_tokens,
            "rope_theta": base,
            "pos_embed_shift": (rope.shift != 0.0).then_some(rope.shift),
            "pos_embed_jitter": (rope.jitter != 1.0).then_some(rope.jitter),
            "pos_embed_rescale": (rope.rescale != 1.0).then_some(rope.rescale),
            "image_size": image_size,
        }));
    } else {
        let grid = config.learned.as_ref().expect("positions are learned or rotary").grid;
        set(json!({
            "hidden_act": "gelu",
            "mlp_ratio": mlp_ratio(config).expect("checked before"),
            "qkv_bias": config.qkv_bias,
            "use_swiglu_ffn": gated,
            "image_size": grid * config.patch_size,
        }));
        if config.register_tokens > 0 {
            set(json!({
                "architectures": ["Dinov2WithRegistersModel"],
                "model_type": "dinov2_with_registers",
                "num_register_tokens": config.register_tokens,
            }));
        } else {
            set(json!({ "architectures": ["Dinov2Model"], "model_type": "dinov2" }));
        }
    }
    value
}

/// `preprocessor_config.json`: the evaluation crop, by the processor that `Dinov2` models are published with.
pub(crate) fn preprocessor(description: &Description) -> Value {
    let side = description.image_size;
    json!({
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": true,
        "do_resize": true,
        "size": { "shortest_edge": side },
        "resample": 3,
        "do_center_crop": true,
        "crop_size": { "height": side, "width": side },
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": description.mean,
        "image_std": description.std,
    })
}

/// The library's names for tensors that [`adjust`] has been through.
pub(crate) fn from_reference(architecture: &Architecture, tensors: Tensors) -> Tensors {
    match architecture {
        Architecture::Vit(config) => vit_from_reference(config, tensors),
        Architecture::ConvNext(_) => tensors.into_iter().map(|(name, weight)| (convnext_name(&name), weight)).collect(),
    }
}

fn convnext_name(name: &str) -> String {
    if let Some((stage, rest)) = name.strip_prefix("downsample_layers.").and_then(|rest| rest.split_once('.')) {
        return format!("stages.{stage}.downsample_layers.{rest}");
    }
    if let Some((stage, (block, rest))) = name
        .strip_prefix("stages.")
        .and_then(|rest| rest.split_once('.'))
        .and_then(|(stage, rest)| Some((stage, rest.split_once('.')?)))
    {
        let pair = CONVNEXT.iter().find_map(|(ours, theirs)| Some(format!("{theirs}{}", rest.strip_prefix(ours)?)));
        return format!("stages.{stage}.layers.{block}.{}", pair.unwrap_or_else(|| rest.to_owned()));
    }
    format!("layer_{name}")
}

fn vit_from_reference(config: &VitConfig, tensors: Tensors) -> Tensors {
    let rope = config.rope.is_some();
    let layers = if rope { "layer" } else { "encoder.layer" };
    let mut found = Tensors::new();
    if rope && config.register_tokens == 0 {
        found.insert("embeddings.register_tokens".to_owned(), constant(vec![1, 0, config.embed_dim], 0.0));
    }
    for (name, weight) in tensors {
        if let Some((index, rest)) = in_block(&name) {
            for (rest, weight) in layer_from_reference(config, rest, weight) {
                found.insert(format!("{layers}.{index}.{rest}"), weight);
            }
            continue;
        }
        let name = match name.as_str() {
            "cls_token" | "mask_token" | "register_tokens" => format!("embeddings.{name}"),
            "storage_tokens" => "embeddings.register_tokens".to_owned(),
            "pos_embed" => "embeddings.position_embeddings".to_owned(),
            _ if rope => name.replace("patch_embed.proj.", "embeddings.patch_embeddings."),
            _ => name
                .replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
                .replace("norm.", "layernorm."),
        };
        let dim = config.embed_dim;
        let token = rope && name == "embeddings.mask_token";
        found.insert(name, if token { reshaped(weight, vec![1, 1, dim]) } else { weight });
    }
    found
}

fn layer_from_reference(config: &VitConfig, name: &str, weight: Weight) -> Vec<(String, Weight)> {
    let rope = config.rope.is_some();
    let (module, kind) = name.rsplit_once('.').unwrap_or((name, ""));
    let one = |module: &str| vec![(format!("{module}.{kind}"), weight.clone())];
    match module {
        "attn.qkv" => {
            let names = if rope {
                ["attention.q_proj", "attention.k_proj", "attention.v_proj"]
            } else {
                ["attention.attention.query", "attention.attention.key", "attention.attention.value"]
            };
            let parts = names.into_iter().zip(split(&weight, 3));
            // Keys whose bias is held at zero have none there.
            let parts = parts.filter(|(name, _)| !(config.mask_k_bias && kind == "bias" && *name == names[1]));
            parts.map(|(name, part)| (format!("{name}.{kind}"), part)).collect()
        }
        "attn.proj" => one(if rope { "attention.o_proj" } else { "attention.output.dense" }),
        "ls1" => vec![("layer_scale1.lambda1".to_owned(), weight)],
        "ls2" => vec![("layer_scale2.lambda1".to_owned(), weight)],
        "mlp.w12" => one("mlp.weights_in"),
        "mlp.w1" => one("mlp.gate_proj"),
        "mlp.w2" => one("mlp.up_proj"),
        "mlp.w3" => one(if rope { "mlp.down_proj" } else { "mlp.weights_out" }),
        "mlp.fc1" if rope => one("mlp.up_proj"),
        "mlp.fc2" if rope => one("mlp.down_proj"),
        _ => one(module),
    }
}
