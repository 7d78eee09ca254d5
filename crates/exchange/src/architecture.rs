//! The architecture that tensors imply, under the references' names.
//!
//! Sizes are in the shapes. What shapes cannot say is taken from a configuration beside the weights, or else from the rules
//! that hold for every released model; each use of such a rule is noted.

use dinoxide_model::config::{DropPathKind, FfnKind, LearnedConfig, NormKind, RopeConfig, RopeNormalize, RopePeriods};
use dinoxide_model::{Architecture, ConvNextConfig, VitConfig};

use crate::{Tensors, in_block};

/// What is known from elsewhere than the tensors.
#[derive(Default)]
pub(crate) struct Hints {
    pub(crate) num_heads: Option<usize>,
    pub(crate) norm_eps: Option<f64>,
    pub(crate) rope_base: Option<f64>,
    /// Offset and antialiasing of interpolated positions, if the format has a rule of its own.
    pub(crate) interpolation: Option<(f64, bool)>,
    /// Keys have no bias, although queries have one.
    pub(crate) mask_k_bias: bool,
}

/// The architecture of `tensors`, and what was assumed.
///
/// # Errors
/// Tensors that are no ViT or ConvNeXt, or one that has no words here.
pub(crate) fn derive(tensors: &Tensors, hints: &Hints) -> Result<(Architecture, Vec<String>), String> {
    if tensors.contains_key("cls_token") { vit(tensors, hints) } else { convnext(tensors, hints) }
}

/// A tensor's shape, of a known rank.
fn shape<const N: usize>(tensors: &Tensors, name: &str) -> Result<[usize; N], String> {
    let found = &tensors.get(name).ok_or_else(|| format!("it has no `{name}`"))?.shape;
    found.as_slice().try_into().map_err(|_| format!("`{name}` is {found:?}, expected {N} axes"))
}

/// One more than the highest index that `index` finds; it cannot be more than there are tensors.
fn count(tensors: &Tensors, what: &str, index: impl Fn(&str) -> Option<usize>) -> Result<usize, String> {
    let last = tensors.keys().filter_map(|name| index(name)).max().ok_or_else(|| format!("it has no {what}"))?;
    if last >= tensors.len() {
        return Err(format!("its {what} go up to {last}, and it has {} tensors", tensors.len()));
    }
    Ok(last + 1)
}

fn vit(tensors: &Tensors, hints: &Hints) -> Result<(Architecture, Vec<String>), String> {
    let mut notes = Vec::new();
    let [_, _, dim] = shape(tensors, "cls_token")?;
    let [_, in_channels, patch, width] = shape(tensors, "patch_embed.proj.weight")?;
    if patch != width || patch == 0 {
        return Err(format!("its patches are {patch}×{width} pixels; only square ones are supported"));
    }
    let depth = count(tensors, "blocks", |name| in_block(name).map(|(index, _)| index))?;
    let has = |name: &str| tensors.contains_key(&format!("blocks.0.{name}"));
    let periods = tensors.get("rope_embed.periods").map(|weight| weight.values.as_slice());
    let registers = ["register_tokens", "storage_tokens"].into_iter().find(|name| tensors.contains_key(*name));
    let registers = registers.map(|name| shape::<3>(tensors, name)).transpose()?.map_or(0, |[_, count, _]| count);

    let learned = match tensors.get("pos_embed") {
        None => None,
        Some(_) => {
            let [_, slots, _] = shape(tensors, "pos_embed")?;
            let grid = slots.saturating_sub(1).isqrt();
            if grid == 0 || grid * grid + 1 != slots {
                return Err(format!("`pos_embed` has {slots} slots, not one and a square grid"));
            }
            let (offset, antialias) =
                hints.interpolation.unwrap_or(if registers > 0 { (0.0, true) } else { (0.1, false) });
            Some(LearnedConfig { grid, offset, antialias })
        }
    };
    let rope = if learned.is_some() {
        None
    } else {
        let periods = match (periods, hints.rope_base) {
            (Some(values), _) => self::periods(values)?,
            (None, Some(base)) => RopePeriods::Base(base),
            (None, None) => {
                notes.push("RoPE base 100, as in all released models".to_owned());
                RopePeriods::Base(100.0)
            }
        };
        Some(RopeConfig { periods, normalize: RopeNormalize::Separate, shift: 0.0, jitter: 1.0, rescale: 1.0 })
    };

    let num_heads = match (hints.num_heads, periods) {
        (Some(heads), _) => heads,
        (None, Some(values)) if !values.is_empty() && dim.is_multiple_of(4 * values.len()) => dim / (4 * values.len()),
        _ => {
            let width = if dim == 4096 { 128 } else { 64 };
            if !dim.is_multiple_of(width) {
                return Err(format!(
                    "the number of heads is not in it, and {dim} is no multiple of {width}, the width of a head in released \
                     models\n\nhint: a Hugging Face folder has the number in `config.json`"
                ));
            }
            notes.push(format!("{} heads of width {width}, as in released models", dim / width));
            dim / width
        }
    };

    let rows = |name: &str, axis: usize| -> Result<usize, String> {
        shape::<2>(tensors, &format!("blocks.0.mlp.{name}.weight")).map(|sizes| sizes[axis])
    };
    let (ffn, ffn_hidden, last) = if has("mlp.fc1.weight") {
        (FfnKind::Mlp, rows("fc1", 0)?, "fc2")
    } else if has("mlp.w12.weight") {
        (FfnKind::SwigluFused, rows("w3", 1)?, "w3")
    } else {
        (FfnKind::Swiglu, rows("w1", 0)?, "w3")
    };
    let qkv_bias = has("attn.qkv.bias");
    let config = VitConfig {
        patch_size: patch,
        in_channels,
        embed_dim: dim,
        depth,
        num_heads,
        ffn_hidden,
        ffn,
        qkv_bias,
        proj_bias: has("attn.proj.bias"),
        ffn_bias: has(&format!("mlp.{last}.bias")),
        mask_k_bias: qkv_bias && (hints.mask_k_bias || has("attn.qkv.bias_mask")),
        layer_scale_init: has("ls1.gamma").then_some(1e-5),
        norm: if tensors.contains_key("norm.bias") { NormKind::LayerNorm } else { NormKind::RmsNorm },
        norm_eps: hints.norm_eps.unwrap_or(assumed_norm_eps(rope.is_some())),
        register_tokens: registers,
        mask_token: tensors.contains_key("mask_token"),
        learned,
        rope,
        drop_path_rate: 0.0,
        drop_path: DropPathKind::Subset,
        untie_cls_and_patch_norms: tensors.contains_key("cls_norm.weight"),
        untie_global_and_local_cls_norm: tensors.contains_key("local_cls_norm.weight"),
    };
    Ok((Architecture::Vit(config), notes))
}

/// RoPE's periods as a formula. Files have them in single precision or in bfloat16.
fn periods(values: &[f32]) -> Result<RopePeriods, String> {
    let count = values.len();
    let near = |formula: &dyn Fn(f64) -> f64| {
        values.iter().enumerate().all(|(i, value)| {
            let expected = formula(i as f64);
            (f64::from(*value) - expected).abs() <= 5e-3 * expected.abs()
        })
    };
    let (Some(first), Some(last)) = (values.first().copied(), values.last().copied()) else {
        return Err("`rope_embed.periods` is empty".to_owned());
    };
    let (first, last) = (f64::from(first), f64::from(last));
    if count == 1 && near(&|_| 1.0) {
        return Ok(RopePeriods::Base(100.0));
    }
    let mut base = last.powf(count as f64 / (count as f64 - 1.0));
    if (base - base.round()).abs() <= 5e-4 * base {
        base = base.round();
    }
    if count > 1 && near(&|i| base.powf(i / count as f64)) {
        return Ok(RopePeriods::Base(base));
    }
    if count > 1 && near(&|i| first * (last / first).powf(i / (count as f64 - 1.0))) {
        return Ok(RopePeriods::Range { min: first, max: last });
    }
    Err(format!("`rope_embed.periods` {values:?} follow none of DINOv3's formulas"))
}

fn convnext(tensors: &Tensors, hints: &Hints) -> Result<(Architecture, Vec<String>), String> {
    let [first, in_channels, _, _] = shape(tensors, "downsample_layers.0.0.weight")?;
    let (mut dims, mut depths) = ([first; 4], [0; 4]);
    for stage in 0..4 {
        if stage > 0 {
            [dims[stage], _, _, _] = shape(tensors, &format!("downsample_layers.{stage}.1.weight"))?;
        }
        let prefix = format!("stages.{stage}.");
        depths[stage] = count(tensors, &format!("blocks in stage {stage}"), |name| {
            name.strip_prefix(&prefix)?.split_once('.')?.0.parse().ok()
        })?;
    }
    let config = ConvNextConfig {
        in_channels,
        dims,
        depths,
        layer_scale_init: tensors.contains_key("stages.0.0.gamma").then_some(1e-6),
        norm_eps: hints.norm_eps.unwrap_or(assumed_norm_eps(false)),
        patch_size: None,
        drop_path_rate: 0.0,
        drop_path: DropPathKind::PerSample,
    };
    Ok((Architecture::ConvNext(config), Vec::new()))
}

/// The epsilon of norms that a format without a word on it stands for: that of the references' models.
pub(crate) fn assumed_norm_eps(rope: bool) -> f64 {
    if rope { 1e-5 } else { 1e-6 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_in_bfloat16_are_still_those_of_base_100() {
        let exact: Vec<f32> = (0..16).map(|i| 100f32.powf(i as f32 / 16.0)).collect();
        let rounded: Vec<f32> = exact.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
        assert_ne!(exact, rounded);
        for values in [exact, rounded] {
            assert_eq!(periods(&values), Ok(RopePeriods::Base(100.0)));
        }
    }

    #[test]
    fn other_periods_are_a_range_or_an_error() {
        let range: Vec<f32> = (0..5).map(|i| 0.5 * 40f32.powf(i as f32 / 4.0)).collect();
        let Ok(RopePeriods::Range { min, max }) = periods(&range) else { panic!("{:?}", periods(&range)) };
        assert!((min - 0.5).abs() < 1e-6 && (max - 20.0).abs() < 1e-4);
        for bad in [&[][..], &[1.0, 2.0, 30.0], &[f32::NAN, 2.0], &[-1.0, 2.0, 4.0], &[0.0, 0.0]] {
            assert!(periods(bad).is_err(), "{bad:?}");
        }
    }
}
