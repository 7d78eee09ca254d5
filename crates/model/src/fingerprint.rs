//! What a backbone computes, in a few numbers that travel with its weights.
//!
//! A file can be whole and still wrong: a square matrix transposed by a converter, the thirds of a packed projection in
//! another order, positions interpolated by another rule. So a weight file carries statistics of the features of a fixed
//! image, and whoever loads it computes them again. A checksum of the parameters beside them finds what is too small to be
//! seen in the features, such as a flipped bit.

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::{Architecture, Backbone, Precision, parameters, weights::host};

/// How far a statistic may be off, in standard deviations of the tokens that it is of.
///
/// Rounding, of single precision on another processor as of weights that were stored in 16 bits, stays below a tenth of
/// this; a wrong function is off by about one.
const TOLERANCE: f32 = 0.05;

/// Projections of each group of tokens.
const PROJECTIONS: usize = 4;

/// A checksum of a backbone's parameters and statistics of its features.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// CRC-32 of names, shapes and single-precision values of the parameters, in the order of the module. The third of a
    /// qkv bias that the model holds at zero counts as zero.
    pub parameters: u32,
    /// For CLS and for the patch tokens, after the final norm: mean, standard deviation, and four projections on fixed
    /// vectors of ±1, divided by the root of their length. Of an image of 2×3 patches (of 64×96 pixels for a ConvNeXt) with
    /// fixed noise in it.
    pub features: Vec<f32>,
}

/// What a fingerprint found.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Mismatch {
    /// The features are others.
    #[error(
        "the backbone does not compute what it did when the file was written: statistic {index} of its features is \
         {found}, recorded {recorded}"
    )]
    Features {
        /// Place in [`Fingerprint::features`].
        index: usize,
        /// The recorded value.
        recorded: f32,
        /// The value now.
        found: f32,
    },
    /// The features agree, the parameters do not.
    #[error("the parameters are not those that were written: their CRC-32 is {found:08x}, recorded {recorded:08x}")]
    Parameters {
        /// The recorded checksum.
        recorded: u32,
        /// The checksum now.
        found: u32,
    },
}

impl Fingerprint {
    /// The fingerprint of a backbone; `None` if its features are not finite, which leaves nothing to compare.
    ///
    /// # Panics
    /// If values cannot be read back from the device.
    pub fn of(backbone: &Backbone) -> Option<Self> {
        let features = statistics(backbone);
        features.iter().all(|value| value.is_finite()).then(|| Self { parameters: checksum(backbone), features })
    }

    /// Compares with the fingerprint of a loaded backbone. Parameters are compared if they were stored in single precision.
    ///
    /// # Errors
    /// The first difference.
    pub fn check(&self, found: &Self, exact: bool) -> Result<(), Mismatch> {
        // Each group has its mean, then its standard deviation.
        let scale = |index: usize| self.features.get(index / (2 + PROJECTIONS) * (2 + PROJECTIONS) + 1).copied();
        for index in 0..self.features.len().max(found.features.len()) {
            let at = |features: &[f32]| features.get(index).copied().unwrap_or(f32::NAN);
            let (recorded, now) = (at(&self.features), at(&found.features));
            let near = (recorded - now).abs() <= TOLERANCE * scale(index).unwrap_or(0.0).abs().max(1e-6);
            // Not `far`, so that what is not a number differs.
            if !near {
                return Err(Mismatch::Features { index, recorded, found: now });
            }
        }
        if exact && self.parameters != found.parameters {
            return Err(Mismatch::Parameters { recorded: self.parameters, found: found.parameters });
        }
        Ok(())
    }
}

/// SplitMix64: the `index`-th number of a fixed sequence. The sequence is part of the file format.
fn hash(index: u64) -> u64 {
    let mut z = index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn statistics(backbone: &Backbone) -> Vec<f32> {
    let architecture = backbone.architecture();
    let channels = architecture.in_channels();
    let (height, width) = (2 * architecture.stride(), 3 * architecture.stride());
    // Uniform in (−2, 2), about the range of normalised images; with 24 bits, so that it is exact in single precision.
    let pixels: Vec<f32> =
        (0..(channels * height * width) as u64).map(|i| (hash(i) >> 40) as f32 / (1 << 22) as f32 - 2.0).collect();
    let image = Tensor::<4>::from_data(TensorData::new(pixels, [1, channels, height, width]), &device(backbone));
    // Whoever loads the weights computes in single precision.
    let features = backbone.clone().with_precision(Precision::Fp32).forward(image, None);
    let (cls, patches) = (host(features.cls.flatten(0, 1)), host(features.patches.flatten(0, 2)));
    [cls, patches].iter().flat_map(|values| summary(values)).collect()
}

/// Mean, standard deviation and projections.
fn summary(values: &[f32]) -> Vec<f32> {
    let count = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
    let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / count;
    let projection = |k: usize| {
        let signed = values.iter().enumerate().map(|(i, v)| {
            let negative = hash(i as u64) >> k & 1 == 1;
            if negative { -f64::from(*v) } else { f64::from(*v) }
        });
        signed.sum::<f64>() / count.sqrt()
    };
    [mean, variance.sqrt()].into_iter().chain((0..PROJECTIONS).map(projection)).map(|v| v as f32).collect()
}

fn checksum(backbone: &Backbone) -> u32 {
    let masked = match backbone.architecture() {
        Architecture::Vit(config) if config.mask_k_bias => Some(config.embed_dim),
        _ => None,
    };
    let mut crc = crc32fast::Hasher::new();
    parameters::visit(backbone, |name, shape, value| {
        let mut values = host(value);
        if let Some(dim) = masked.filter(|_| name.ends_with(".attn.qkv.bias")) {
            values[dim..2 * dim].fill(0.0);
        }
        crc.update(name.as_bytes());
        shape.iter().for_each(|size| crc.update(&(*size as u64).to_le_bytes()));
        for part in values.chunks(1 << 14) {
            let bytes: Vec<u8> = part.iter().flat_map(|v| v.to_le_bytes()).collect();
            crc.update(&bytes);
        }
    });
    crc.finalize()
}

fn device(backbone: &Backbone) -> Device {
    let mut device = None;
    parameters::visit(backbone, |_, _, value| device = device.take().or_else(|| Some(value.device())));
    device.expect("a backbone has parameters")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;
    use dinoxide_random::{Purpose, stream};

    fn backbone(layer_scale: f64) -> Backbone {
        let config = ModelConfig {
            embed_dim: Some(24),
            depth: Some(2),
            num_heads: Some(3),
            patch_size: 4,
            layer_scale_init: layer_scale,
            mask_k_bias: true,
            ..ModelConfig::default()
        };
        let architecture = config.resolve(20).expect("an architecture");
        let mut rng = stream(3, Purpose::Init, 0, 0);
        let backbone = Backbone::new(&architecture, &Device::flex(), &mut rng);
        // The usual 0.02 makes branches so small that little of them reaches the features.
        parameters::replace(backbone, |name, value| if name.contains("weight") { value * 8.0 } else { value })
    }

    fn changed(backbone: &Backbone, name: &str, change: impl Fn(&mut Vec<f32>)) -> Backbone {
        let mut seen = false;
        let found = parameters::replace(backbone.clone(), |at, value| {
            if at != name {
                return value;
            }
            seen = true;
            let mut values = host(value);
            change(&mut values);
            Tensor::from_data(TensorData::from(values.as_slice()), &Device::flex())
        });
        assert!(seen, "{name}");
        found
    }

    fn transpose(values: &mut Vec<f32>) {
        let side = values.len().isqrt();
        *values = (0..values.len()).map(|i| values[i % side * side + i / side]).collect();
    }

    #[test]
    fn a_transposed_square_matrix_changes_the_features() {
        let backbone = backbone(1.0);
        let recorded = Fingerprint::of(&backbone).expect("finite");
        assert_eq!(recorded.features.len(), 12);
        recorded.check(&Fingerprint::of(&backbone).expect("finite"), true).expect("the same");
        for name in ["blocks.0.attn.proj.weight", "blocks.1.attn.proj.weight"] {
            let found = Fingerprint::of(&changed(&backbone, name, transpose)).expect("finite");
            assert!(matches!(recorded.check(&found, false), Err(Mismatch::Features { .. })), "{name}");
        }
    }

    #[test]
    fn one_flipped_bit_changes_the_checksum_alone() {
        let backbone = backbone(1e-5);
        let recorded = Fingerprint::of(&backbone).expect("finite");
        let flip = |values: &mut Vec<f32>| values[7] = f32::from_bits(values[7].to_bits() ^ 1);
        let found = Fingerprint::of(&changed(&backbone, "blocks.1.mlp.fc1.weight", flip)).expect("finite");
        assert!(matches!(recorded.check(&found, true), Err(Mismatch::Parameters { .. })));
        recorded.check(&found, false).expect("the features hardly change");
    }

    #[test]
    fn rounding_to_sixteen_bits_is_no_other_function() {
        let backbone = backbone(1.0);
        let recorded = Fingerprint::of(&backbone).expect("finite");
        let rounded = parameters::replace(backbone, |_, value| {
            let values: Vec<f32> =
                host(value).iter().map(|v| f32::from_bits((v.to_bits() + 0x8000) & 0xFFFF_0000)).collect();
            Tensor::from_data(TensorData::from(values.as_slice()), &Device::flex())
        });
        recorded.check(&Fingerprint::of(&rounded).expect("finite"), false).expect("near");
    }

    #[test]
    fn what_the_model_holds_at_zero_does_not_count() {
        let backbone = backbone(1.0);
        let recorded = Fingerprint::of(&backbone).expect("finite");
        let name = "blocks.0.attn.qkv.bias";
        let key = changed(&backbone, name, |values| values[30] = 5.0);
        recorded.check(&Fingerprint::of(&key).expect("finite"), true).expect("a key's bias");
        let query = changed(&backbone, name, |values| values[3] = 5.0);
        assert!(recorded.check(&Fingerprint::of(&query).expect("finite"), true).is_err());
    }

    #[test]
    fn features_that_are_not_finite_have_no_fingerprint() {
        let broken = changed(&backbone(1.0), "norm.bias", |values| values[2] = f32::NAN);
        assert_eq!(Fingerprint::of(&broken), None);
    }

    #[test]
    fn a_recorded_value_that_is_missing_differs() {
        let recorded = Fingerprint::of(&backbone(1.0)).expect("finite");
        let short = Fingerprint { features: recorded.features[..5].to_vec(), ..recorded.clone() };
        assert!(short.check(&recorded, true).is_err() && recorded.check(&short, true).is_err());
    }
}
