//! The DINO repositories' own names, which everything else is translated to: released backbones of DINO, iBOT, DINOv2 and
//! DINOv3, and the backbones in their training checkpoints.

use dinoxide_model::weights::Weight;

use crate::architecture::Hints;
use crate::{Tensors, in_block, reshaped};

/// Brings the spellings of the repositories to one.
///
/// # Errors
/// Buffers with contents that the model has no words for.
pub(crate) fn normalise(tensors: Tensors) -> Result<(Tensors, Hints), String> {
    let mut found = Tensors::new();
    for (name, weight) in tensors {
        let name = match (name.as_str(), in_block(&name)) {
            // iBOT.
            ("masked_embed", _) => "mask_token".to_owned(),
            (_, Some((index, rest))) => block(index, rest),
            _ => name,
        };
        let weight = if name == "mask_token" { flat_token(weight) } else { weight };
        if found.insert(name.clone(), weight).is_some() {
            return Err(format!("two tensors are called `{name}`"));
        }
    }
    Ok((found, Hints::default()))
}

/// DINOv2 puts blocks into chunks (`blocks.1.7.`, the second number counting from the first block on); iBOT calls layer
/// scale `gamma_1`.
fn block(index: usize, rest: &str) -> String {
    let (index, rest) = match rest.split_once('.') {
        Some((inner, rest)) if inner.bytes().all(|b| b.is_ascii_digit()) => (inner.parse().unwrap_or(index), rest),
        _ => (index, rest),
    };
    let rest = match rest {
        "gamma_1" => "ls1.gamma",
        "gamma_2" => "ls2.gamma",
        rest => rest,
    };
    format!("blocks.{index}.{rest}")
}

/// A token as `[1, D]`, which others write `[1, 1, D]`.
pub(crate) fn flat_token(weight: Weight) -> Weight {
    let length = weight.values.len();
    reshaped(weight, vec![1, length])
}

/// Removes DINOv3's buffers, which are computed, and makes what they say part of the weights: the third of a qkv bias that
/// `bias_mask` holds at zero becomes zero.
///
/// # Errors
/// A mask of another form.
pub(crate) fn fold_buffers(tensors: &mut Tensors, mask_k_bias: bool) -> Result<(), String> {
    tensors.remove("rope_embed.periods");
    let masks: Vec<String> = tensors.keys().filter(|name| name.ends_with(".attn.qkv.bias_mask")).cloned().collect();
    for name in masks {
        let mask = tensors.remove(&name).expect("it was just there");
        let third = mask.values.len() / 3;
        let expected = |i: usize| if (third..2 * third).contains(&i) { 0.0 } else { 1.0 };
        // A mask that was never filled has NaN in it, in files that were written from a model that was never initialised.
        if mask.values.iter().enumerate().any(|(i, value)| !value.is_nan() && *value != expected(i)) {
            return Err(format!("`{name}` holds something else than the keys' third at zero"));
        }
    }
    if mask_k_bias {
        let biases = tensors.iter_mut().filter(|(name, _)| name.ends_with(".attn.qkv.bias"));
        biases.for_each(|(_, bias)| {
            let third = bias.values.len() / 3;
            bias.values[third..2 * third].fill(0.0);
        });
    }
    Ok(())
}
