//! Small seeded data sets for the tests of this crate.

use burn::tensor::Device;
use dinoxide_model::{Arch, Backbone, ModelConfig};
use dinoxide_random::{Purpose, stream};
use rand::Rng;

use crate::{features::Features, labels::LabeledFeatures, linear_probe::standard_normal};

/// A ViT of patch 4, 12 wide, 2 deep.
pub(crate) fn model_config() -> ModelConfig {
    ModelConfig {
        arch: Arch::VitTiny,
        patch_size: 4,
        embed_dim: Some(12),
        depth: Some(2),
        num_heads: Some(3),
        // Blocks matter from the start.
        layer_scale_init: 0.5,
        ..ModelConfig::default()
    }
}

/// A backbone of that configuration, for crops of 12 pixels.
pub(crate) fn backbone_of(config: &ModelConfig) -> Backbone {
    let architecture = config.resolve(12).expect("a model");
    Backbone::new(&architecture, &Device::flex(), &mut stream(1, Purpose::Init, 0, 0))
}

/// The backbone of [`model_config`].
pub(crate) fn backbone() -> Backbone {
    backbone_of(&model_config())
}

/// Standard normal values.
pub(crate) fn gaussian(rows: usize, dim: usize, seed: u64) -> Features {
    let mut rng = stream(seed, Purpose::Evaluation, 1000, 0);
    Features::new(rows, dim, standard_normal(rows * dim, &mut rng)).unwrap()
}

/// Normal clouds of the given spread around class centres that are the same for every seed. The first samples have one of
/// each class, later ones follow a skewed distribution.
pub(crate) fn clustered(num_classes: usize, rows: usize, dim: usize, spread: f32, seed: u64) -> LabeledFeatures {
    let centers = gaussian(num_classes, dim, 1 << 32);
    let mut rng = stream(seed, Purpose::Evaluation, 1001, 0);
    let labels: Vec<u32> = (0..rows)
        .map(|row| {
            let (a, b) = (rng.next_u32() as usize % num_classes, rng.next_u32() as usize % num_classes);
            if row < num_classes { row as u32 } else { a.min(b) as u32 }
        })
        .collect();
    let noise = standard_normal(rows * dim, &mut rng);
    let values = noise.chunks(dim).zip(&labels).flat_map(|(noise, &label)| {
        noise.iter().zip(centers.row(label as usize)).map(|(noise, center)| center + spread * noise).collect::<Vec<_>>()
    });
    LabeledFeatures::new(Features::new(rows, dim, values.collect()).unwrap(), labels, num_classes).unwrap()
}
