//! `timm`: `vit_*_dino`, `vit_*_dinov2` with and without registers, `vit_*_dinov3` (its `Eva`) and `convnext_*`.
//!
//! Most names are those of the reference. There is no mask token; with registers, the position of CLS is added to CLS
//! itself; DINOv3's queries and values have biases of their own.

use dinoxide_model::config::{FfnKind, NormKind, RopeNormalize, RopePeriods};
use dinoxide_model::weights::Weight;
use dinoxide_model::{Architecture, VitConfig};

use crate::architecture::Hints;
use crate::hugging_face::{drop_local_norm, pack_swiglu};
use crate::{Tensors, concatenate, constant, in_block, reference, split};

/// Whether a ViT's tensors are `timm`'s rather than the reference's.
///
/// A file of `vit_*_dino` without its `config.json` cannot be told from one of DINO, and counts as the reference's.
pub(crate) fn is_vit(tensors: &Tensors, config: bool) -> bool {
    let has = |name: &str| tensors.contains_key(name);
    let dinov2 = has("pos_embed") && has("blocks.0.ls1.gamma") && !has("mask_token");
    config || has("reg_token") || dinov2
}

/// The references' names for a ViT's tensors.
///
/// # Errors
/// Parts that do not fit together.
pub(crate) fn vit(tensors: Tensors) -> Result<(Tensors, Hints), String> {
    let (mut tensors, mut hints) = reference::normalise(tensors)?;
    let learned = tensors.contains_key("pos_embed");
    if let Some(registers) = tensors.remove("reg_token") {
        let name = if learned { "register_tokens" } else { "storage_tokens" };
        tensors.insert(name.to_owned(), registers);
        // No slot for CLS: its position is part of CLS.
        if let Some(table) = tensors.remove("pos_embed") {
            let &[one, slots, dim] = table.shape.as_slice() else {
                return Err(format!("`pos_embed` is {:?}, expected 3 axes", table.shape));
            };
            if slots == 0 || slots.isqrt().pow(2) != slots {
                return Err(format!(
                    "`pos_embed` has {slots} slots and there are registers: positions of CLS or registers are not supported"
                ));
            }
            let cls = constant(vec![dim], 0.0);
            let values = [cls.values, table.values].concat();
            tensors.insert("pos_embed".to_owned(), Weight { shape: vec![one, slots + 1, dim], values });
        }
    }
    hints.interpolation = learned.then_some((0.0, true));
    let blocks: Vec<usize> = tensors.keys().filter_map(|name| in_block(name)).map(|(index, _)| index).collect();
    for index in blocks {
        let name = |rest: &str| format!("blocks.{index}.{rest}");
        let mut take = |rest: &str| tensors.remove(&name(rest));
        let mut found = Vec::new();
        match (take("attn.q_bias"), take("attn.v_bias")) {
            (Some(q), Some(v)) => {
                hints.mask_k_bias = true;
                let bias = concatenate(&[&q, &constant(q.shape.clone(), 0.0), &v]);
                found.push(("attn.qkv.bias".to_owned(), bias.map_err(|e| format!("block {index}: {e}"))?));
            }
            (None, None) => {}
            _ => return Err(format!("block {index}: a bias of queries or of values is there, and not the other")),
        }
        for kind in ["weight", "bias"] {
            let mut rename = |from: &str, to: &str| {
                found.extend(take(&format!("mlp.{from}.{kind}")).map(|weight| (format!("mlp.{to}.{kind}"), weight)));
            };
            rename("fc1_g", "w1");
            rename("fc1_x", "w2");
        }
        let gated = found.iter().any(|(name, _)| name == "mlp.w1.weight");
        let rows = |tensors: &Tensors, rest: &str, axis: usize| tensors.get(&name(rest))?.shape.get(axis).copied();
        let packed = match (rows(&tensors, "mlp.fc1.weight", 0), rows(&tensors, "mlp.fc2.weight", 1)) {
            (Some(out), Some(input)) => out == 2 * input,
            _ => false,
        };
        let renames: &[(&str, &str)] = match (gated, packed) {
            (true, _) => &[("fc2", "w3")],
            (_, true) => &[("fc1", "w12"), ("fc2", "w3")],
            _ => &[],
        };
        for ((from, to), kind) in renames.iter().flat_map(|pair| [(pair, "weight"), (pair, "bias")]) {
            let weight = tensors.remove(&name(&format!("mlp.{from}.{kind}")));
            found.extend(weight.map(|weight| (format!("mlp.{to}.{kind}"), weight)));
        }
        tensors.extend(found.into_iter().map(|(rest, weight)| (name(&rest), weight)));
    }
    Ok((tensors, hints))
}

/// Pairs of names in a ConvNeXt block, the reference's first.
const CONVNEXT: [(&str, &str); 3] = [("dwconv.", "conv_dw."), ("pwconv1.", "mlp.fc1."), ("pwconv2.", "mlp.fc2.")];

/// The references' names for a ConvNeXt's tensors.
pub(crate) fn convnext(tensors: Tensors) -> Tensors {
    let name = |name: &str| -> Option<String> {
        if let Some(rest) = name.strip_prefix("stem.") {
            return Some(format!("downsample_layers.0.{rest}"));
        }
        if let Some(rest) = name.strip_prefix("head.norm.") {
            return Some(format!("norm.{rest}"));
        }
        let (stage, rest) = name.strip_prefix("stages.")?.split_once('.')?;
        if let Some(rest) = rest.strip_prefix("downsample.") {
            return Some(format!("downsample_layers.{stage}.{rest}"));
        }
        let (block, rest) = rest.strip_prefix("blocks.")?.split_once('.')?;
        let pair = CONVNEXT.iter().find_map(|(ours, theirs)| Some(format!("{ours}{}", rest.strip_prefix(theirs)?)));
        Some(format!("stages.{stage}.{block}.{}", pair.unwrap_or_else(|| rest.to_owned())))
    };
    tensors.into_iter().map(|(old, weight)| (name(&old).unwrap_or(old), weight)).collect()
}

/// Makes a backbone one that the library can express, without changing what it computes, or says why it cannot; notes what
/// is given up.
pub(crate) fn adjust(
    architecture: &mut Architecture,
    tensors: &mut Tensors,
    notes: &mut Vec<String>,
) -> Result<(), String> {
    let Architecture::Vit(config) = architecture else { return Ok(()) };
    if config.norm == NormKind::RmsNorm {
        return Err("its models have no RMS normalisation".to_owned());
    }
    if config.untie_cls_and_patch_norms {
        return Err("it has one final norm, this model has one for CLS and another for patches".to_owned());
    }
    drop_local_norm(config, tensors, notes);
    if config.mask_token {
        notes.push("the mask token is left out; only training uses it".to_owned());
        config.mask_token = false;
        tensors.remove("mask_token");
    }
    match &config.rope {
        Some(rope) => {
            if rope.normalize != RopeNormalize::Separate || !matches!(rope.periods, RopePeriods::Base(_)) {
                return Err("its RoPE normalises coordinates per axis and has a base; this model's differs".to_owned());
            }
            if config.qkv_bias && !config.mask_k_bias {
                return Err("its DINOv3 models have no bias of the keys, this model has one".to_owned());
            }
            if config.ffn == FfnKind::SwigluFused {
                return Err("its DINOv3 models have gate and value apart, this model has them packed".to_owned());
            }
        }
        None => adjust_learned(config, tensors, notes)?,
    }
    Ok(())
}

fn adjust_learned(config: &mut VitConfig, tensors: &mut Tensors, notes: &mut Vec<String>) -> Result<(), String> {
    if config.mask_k_bias {
        config.mask_k_bias = false;
        reference::fold_buffers(tensors, true)?;
    }
    pack_swiglu(config, tensors)?;
    if config.register_tokens > 0
        && let Some(table) = tensors.get_mut("pos_embed")
    {
        let dim = config.embed_dim;
        let position: Vec<f32> = table.values[..dim].to_vec();
        table.values[..dim].fill(0.0);
        let cls = tensors.get_mut("cls_token").expect("a ViT has a CLS token");
        cls.values.iter_mut().zip(position).for_each(|(value, position)| *value += position);
    }
    let learned = config.learned.as_ref().expect("positions are learned or rotary");
    if learned.offset != 0.0 || !learned.antialias {
        let with = if learned.antialias { "with" } else { "without" };
        notes.push(format!(
            "timm interpolates positions with offset 0, with antialiasing; this model with offset {}, {with}: features of \
             images of other sizes than {side}×{side} px differ slightly",
            learned.offset,
            side = learned.grid * config.patch_size
        ));
    }
    Ok(())
}

/// The library's names for tensors that [`adjust`] has been through.
pub(crate) fn from_reference(architecture: &Architecture, tensors: Tensors) -> Tensors {
    let Architecture::Vit(config) = architecture else {
        return tensors.into_iter().map(|(name, weight)| (convnext_name(&name), weight)).collect();
    };
    let rope = config.rope.is_some();
    let mut found = Tensors::new();
    for (name, mut weight) in tensors {
        let name = match (name.as_str(), in_block(&name)) {
            ("register_tokens" | "storage_tokens", _) => "reg_token".to_owned(),
            ("pos_embed", _) if config.register_tokens > 0 => {
                weight.shape[1] -= 1;
                weight.values.drain(..config.embed_dim);
                name
            }
            (_, Some((index, "attn.qkv.bias"))) if rope => {
                let [q, _, v]: [_; 3] = split(&weight, 3).try_into().expect("three parts");
                found.insert(format!("blocks.{index}.attn.q_bias"), q);
                found.insert(format!("blocks.{index}.attn.v_bias"), v);
                continue;
            }
            (_, Some((index, "ls1.gamma"))) if rope => format!("blocks.{index}.gamma_1"),
            (_, Some((index, "ls2.gamma"))) if rope => format!("blocks.{index}.gamma_2"),
            (_, Some(_)) if rope => name.replace(".w1.", ".fc1_g.").replace(".w2.", ".fc1_x.").replace(".w3.", ".fc2."),
            (_, Some(_)) => name.replace(".w12.", ".fc1.").replace(".w3.", ".fc2."),
            _ => name,
        };
        found.insert(name, weight);
    }
    found
}

fn convnext_name(name: &str) -> String {
    if let Some((stage, rest)) = name.strip_prefix("downsample_layers.").and_then(|rest| rest.split_once('.')) {
        return if stage == "0" { format!("stem.{rest}") } else { format!("stages.{stage}.downsample.{rest}") };
    }
    if let Some((stage, (block, rest))) = name
        .strip_prefix("stages.")
        .and_then(|rest| rest.split_once('.'))
        .and_then(|(stage, rest)| Some((stage, rest.split_once('.')?)))
    {
        let pair = CONVNEXT.iter().find_map(|(ours, theirs)| Some(format!("{theirs}{}", rest.strip_prefix(ours)?)));
        return format!("stages.{stage}.blocks.{block}.{}", pair.unwrap_or_else(|| rest.to_owned()));
    }
    format!("head.{name}")
}
