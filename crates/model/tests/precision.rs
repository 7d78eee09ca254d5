//! Which operands are rounded in bfloat16: matrices that enter a product, and nothing else.
//!
//! A matrix that is rounded when it enters a product may as well be rounded before: not one bit of the result changes. With
//! any other parameter some do.

use std::collections::BTreeSet;

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use dinoxide_model::config::{DropPathKind, FfnKind, NormKind, Position};
use dinoxide_model::weights::host;
use dinoxide_model::{
    Arch, Backbone, CropGroup, HeadConfig, HeadNorm, ModelConfig, Precision, ProjectionHead, Projector, parameters,
};
use dinoxide_random::{Purpose, stream};
use rand::RngExt;

const BATCH: usize = 5;

fn noise<const D: usize>(shape: [usize; D], key: u64) -> Tensor<D> {
    let mut rng = stream(2, Purpose::Synthetic, key, 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

fn rounded(x: Tensor<1>) -> Tensor<1> {
    x.cast(FloatDType::BF16).cast(FloatDType::F32)
}

/// The parameters whose rounding leaves every bit of `results` as it is.
fn unaffected<M: burn::module::Module>(module: &M, results: impl Fn(&M) -> Vec<f32>) -> BTreeSet<String> {
    let bits = |module: &M| results(module).into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let before = bits(module);
    let names = parameters::shapes(module).into_iter().map(|(name, _)| name);
    let same = |name: &String| {
        let changed = parameters::replace(module.clone(), |n, v| if n == name { rounded(v) } else { v });
        bits(&changed) == before
    };
    names.filter(same).collect()
}

/// Fresh weights with noise on each, so that none is a number of bfloat16.
fn disturbed<M: burn::module::Module>(module: M) -> M {
    let mut key = 100;
    parameters::replace(module, |_, value| {
        key += 1;
        let [length] = value.dims();
        value + noise([length], key) * 0.1
    })
}

/// Names of matrices that enter products: of two axes, and those of convolutions that are no depthwise ones.
fn matrices<M: burn::module::Module>(module: &M) -> BTreeSet<String> {
    let is_matrix = |name: &str, shape: &[usize]| {
        name.ends_with(".weight") && shape.len() >= 2 && !name.contains("dwconv") && !name.contains("rope")
    };
    parameters::shapes(module)
        .into_iter()
        .filter(|(name, shape)| is_matrix(name, shape))
        .map(|(name, _)| name)
        .collect()
}

#[test]
fn in_every_backbone_matrices_are_rounded_and_nothing_else() {
    let vit = ModelConfig {
        embed_dim: Some(24),
        depth: Some(2),
        num_heads: Some(3),
        patch_size: 4,
        layer_scale_init: 0.5,
        drop_path_rate: 0.4,
        ..ModelConfig::default()
    };
    let rope = ModelConfig { position: Position::Rope, register_tokens: 2, rope_shift: 0.1, ..vit.clone() };
    let cases = [
        ("learned positions", vit.clone(), 20, 1 + 2 * 4),
        ("RoPE", ModelConfig { mask_k_bias: true, ..rope.clone() }, 20, 1 + 2 * 4),
        ("RoPE, no draws", ModelConfig { drop_path_rate: 0.0, rope_shift: 0.0, ..rope.clone() }, 20, 1 + 2 * 4),
        ("SwiGLU, RMS norm", ModelConfig { ffn: FfnKind::Swiglu, norm: NormKind::RmsNorm, ..rope }, 20, 1 + 2 * 5),
        (
            "packed SwiGLU, a coin per sample",
            ModelConfig { ffn: FfnKind::SwigluFused, drop_path: DropPathKind::PerSample, ..vit },
            20,
            1 + 2 * 4,
        ),
        (
            "ConvNeXt",
            ModelConfig {
                arch: Arch::ConvNextTiny,
                dims: Some([4, 6, 8, 10]),
                depths: Some([1, 2, 1, 1]),
                layer_scale_init: 0.5,
                drop_path_rate: 0.3,
                ..ModelConfig::default()
            },
            64,
            4 + 5 * 2,
        ),
    ];
    let device = Device::flex();
    for (what, config, size, count) in cases {
        let architecture = config.resolve(size).expect("sizes fit");
        let backbone = disturbed(Backbone::new(&architecture, &device, &mut stream(1, Purpose::Init, 0, 0)));
        let draws = architecture.draw(BATCH, &mut stream(4, Purpose::Forward, 0, 0));
        let images = noise([BATCH, 3, size, size], 1);
        let results = |backbone: &Backbone| {
            let global = backbone.forward_train(images.clone(), None, CropGroup::Global, &draws);
            let cls = backbone.forward_selected(images.clone(), None, CropGroup::Local, Some(&draws), &[]).cls;
            let plain = backbone.forward(images.clone(), None);
            assert_eq!(global.prenorm.dtype(), burn::tensor::DType::F32);
            let patches = [global.patches, plain.patches].map(|t| host(t.flatten(0, 2)));
            let cls = [global.cls, cls, plain.cls].map(|t| host(t.flatten(0, 1)));
            [patches.concat(), cls.concat()].concat()
        };
        let (single, half) = (backbone.clone(), backbone.with_precision(Precision::Bf16));
        let expected = matrices(&single);
        assert_eq!(expected.len(), count, "{what}: {expected:?}");
        // No patch is masked here.
        let unused = |mut names: BTreeSet<String>| {
            assert_eq!(names.remove("mask_token"), matches!(single, Backbone::Vit(_)), "{what}");
            names
        };
        assert_eq!(unused(unaffected(&half, results)), expected, "{what}");
        assert_eq!(unused(unaffected(&single, results)), BTreeSet::new(), "{what}");
    }
}

#[test]
fn of_a_head_layers_and_plain_prototypes_are_rounded_and_directions_only_after_their_normalisation() {
    let device = Device::flex();
    for (norm, expected) in [(HeadNorm::None, 4), (HeadNorm::Weight, 3), (HeadNorm::WeightFixed, 3)] {
        let config = HeadConfig { prototypes: 11, bottleneck_dim: 6, hidden_dim: 10, norm, ..HeadConfig::default() };
        let head = disturbed(ProjectionHead::new(24, &config, &device, &mut stream(1, Purpose::Init, 0, 0)));
        let logits = |head: &ProjectionHead| host(head.forward(noise([300, 24], 1)).flatten(0, 1));
        assert_eq!(unaffected(&head, logits), BTreeSet::new());
        let half = head.with_precision(Precision::Bf16);
        let found = unaffected(&half, logits);
        assert_eq!(found, matrices(&half), "{norm:?}");
        assert_eq!(found.len(), expected);
        // The normalisation itself is in single precision: rows have length 1 to its rounding, not to 2⁻⁹.
        let bottleneck = host(half.bottleneck(noise([300, 24], 1)).flatten(0, 1));
        for row in bottleneck.chunks(6) {
            let length = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            assert!((length - 1.0).abs() < 1e-6, "{length}");
        }
    }
}

#[test]
fn both_maps_of_a_projector_are_rounded() {
    let projector = disturbed(Projector::new(24, 9, &Device::flex(), &mut stream(1, Purpose::Init, 0, 0)));
    let both = |p: &Projector| {
        let [cls, patches] = [p.cls(noise([5, 24], 1)), p.patches(noise([7, 24], 2))].map(|t| host(t.flatten(0, 1)));
        [cls, patches].concat()
    };
    assert_eq!(unaffected(&projector, both), BTreeSet::new());
    let half = projector.with_precision(Precision::Bf16);
    assert_eq!(unaffected(&half, both), matrices(&half));
    assert_eq!(matrices(&half).len(), 2);
}

#[test]
fn a_fingerprint_is_of_single_precision_whatever_the_run_computed_in() {
    let config = ModelConfig {
        embed_dim: Some(24),
        depth: Some(2),
        num_heads: Some(3),
        patch_size: 4,
        ..ModelConfig::default()
    };
    let architecture = config.resolve(20).expect("sizes fit");
    let backbone = Backbone::new(&architecture, &Device::flex(), &mut stream(1, Purpose::Init, 0, 0));
    let of = |precision| dinoxide_model::Fingerprint::of(&backbone.clone().with_precision(precision)).expect("finite");
    assert_eq!(of(Precision::Bf16), of(Precision::Fp32));
}
