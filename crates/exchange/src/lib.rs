//! Weights in and out: the formats of the DINO repositories, Hugging Face `transformers` and `timm`.
//!
//! [`load`] tells by its contents what a file or folder is, and makes a backbone of it or says what is missing, extra, or of
//! another shape. [`export`] writes one for another library, or says why that library cannot express it. In between, tensors
//! go by the names of the reference repositories, whatever they are called outside. Nothing in a file is executed.

mod architecture;
mod error;
mod export;
mod hugging_face;
mod load;
mod pytorch;
mod reference;
mod safetensors_file;
mod source;
mod timm;

pub use error::ExchangeError;
pub use export::{Format, check_output, export};
pub use load::{Loaded, Verdict, load};

use std::collections::BTreeMap;

use dinoxide_model::weights::Weight;

/// Tensors by name.
type Tensors = BTreeMap<String, Weight>;

/// The name within `blocks.{i}.` and the block's index.
fn in_block(name: &str) -> Option<(usize, &str)> {
    let (index, rest) = name.strip_prefix("blocks.")?.split_once('.')?;
    Some((index.parse().ok()?, rest))
}

/// Rows of several matrices, or entries of several vectors, one after the other.
///
/// # Errors
/// Other shapes beyond the first axis.
fn concatenate(parts: &[&Weight]) -> Result<Weight, String> {
    let first = parts.first().ok_or("no parts")?;
    let mut shape = first.shape.clone();
    if shape.is_empty() || parts.iter().any(|part| part.shape.get(1..) != first.shape.get(1..)) {
        let shapes: Vec<_> = parts.iter().map(|part| format!("{:?}", part.shape)).collect();
        return Err(format!("shapes {} do not go one below the other", shapes.join(", ")));
    }
    shape[0] = parts.iter().map(|part| part.shape[0]).sum();
    Ok(Weight { shape, values: parts.iter().flat_map(|part| part.values.iter().copied()).collect() })
}

/// The opposite of [`concatenate`], into `count` equal parts.
///
/// # Panics
/// If the first axis is no multiple of `count`.
fn split(weight: &Weight, count: usize) -> Vec<Weight> {
    assert!(weight.shape[0].is_multiple_of(count), "{:?} in {count} parts", weight.shape);
    let mut shape = weight.shape.clone();
    shape[0] /= count;
    let length = weight.values.len() / count;
    (0..count)
        .map(|i| Weight { shape: shape.clone(), values: weight.values[i * length..(i + 1) * length].to_vec() })
        .collect()
}

/// The same values in another shape.
fn reshaped(weight: Weight, shape: Vec<usize>) -> Weight {
    if shape.iter().product::<usize>() == weight.values.len() { Weight { shape, ..weight } } else { weight }
}

/// One value everywhere.
fn constant(shape: Vec<usize>, value: f32) -> Weight {
    Weight { values: vec![value; shape.iter().product()], shape }
}
