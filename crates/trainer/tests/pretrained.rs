//! Starting from weights that others trained: the backbone before the first step is theirs.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_exchange::load;
use dinoxide_model::weights::host;
use dinoxide_model::{Architecture, HeadConfig};
use dinoxide_random::{Purpose, stream};
use dinoxide_trainer::network::Network;
use dinoxide_trainer::pretrained::Pretrained;
use rand::RngExt;

fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../exchange/tests/fixtures").join(name).display().to_string()
}

fn images(height: usize, width: usize) -> Tensor<4> {
    let mut rng = stream(5, Purpose::Synthetic, 0, 0);
    let values: Vec<f32> = (0..2 * 3 * height * width).map(|_| rng.random_range(-2.0..2.0)).collect();
    Tensor::from_data(TensorData::new(values, [2, 3, height, width]), &Device::flex())
}

/// What a recipe for crops of another size would ask for: other positions, stochastic depth, a mask token.
fn recipe_of(given: &Architecture) -> Architecture {
    let mut recipe = given.clone();
    if let Architecture::Vit(config) = &mut recipe {
        config.drop_path_rate = 0.3;
        config.mask_token = true;
        config.untie_global_and_local_cls_norm = true;
        if let Some(learned) = &mut config.learned {
            learned.grid += 2;
        }
    }
    recipe
}

#[test]
fn a_run_starts_with_the_features_of_the_weights_it_is_given() {
    let device = Device::flex();
    let names = [
        "hf_dinov2_with_registers",
        "hf_dinov2_swiglu",
        "hf_dinov3_vit",
        "hf_dinov3_vit_gated_sharded",
        "hf_dinov3_convnext",
        "dino_full_checkpoint.pth",
        "dinov3_teacher_checkpoint.pth",
    ];
    let mut cases = 0;
    for name in names {
        let path = fixture(name);
        let expected = load(Path::new(&path), &device).expect("a backbone").backbone;
        let mut architecture = recipe_of(&expected.architecture());
        let given = Pretrained::open("init.from", &path, &device).expect("weights");
        given.fit(&mut architecture).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut rng = stream(1, Purpose::Init, 0, 0);
        let head = HeadConfig { prototypes: 5, bottleneck_dim: 3, hidden_dim: 7, ..HeadConfig::default() };
        let fresh = Network::new(&architecture, &head, None, &device.clone().autodiff(), &mut rng);
        let (network, notes) = given.put_into(fresh, &device);
        assert!(notes.iter().any(|note| note.contains("`dino_head` starts from fresh weights")), "{notes:?}");
        let (height, width) = (2 * expected.architecture().stride(), 3 * expected.architecture().stride());
        let found = network.backbone.forward(Tensor::from_inner(images(height, width)), None);
        let expected = expected.forward(images(height, width), None);
        for (found, expected) in [
            (found.cls.inner().reshape([-1]), expected.cls.reshape([-1])),
            (found.patches.inner().reshape([-1]), expected.patches.reshape([-1])),
        ] {
            for (found, expected) in host(found).into_iter().zip(host(expected)) {
                assert!(
                    (found - expected).abs() <= 1e-5 * expected.abs().max(1.0),
                    "{name}: {found} is not {expected}"
                );
            }
        }
        cases += 1;
    }
    assert_eq!(cases, 7);
}

#[test]
fn what_would_change_the_features_is_an_error_with_both_values() {
    let device = Device::flex();
    let given = Pretrained::open("init.from", &fixture("hf_dinov3_vit"), &device).expect("weights");
    let Architecture::Vit(config) = given.backbone.architecture() else { panic!("a vision transformer") };
    let mut other = config.clone();
    other.norm_eps = 1e-3;
    other.depth += 1;
    other.register_tokens += 1;
    let error = given.fit(&mut Architecture::Vit(other.clone())).expect_err("another backbone").to_string();
    let expected = [
        format!("`norm_eps` is 0.001 in the recipe, {} in the weights", serde_json::json!(config.norm_eps)),
        format!("`depth` is {} in the recipe, {} in the weights", other.depth, config.depth),
        format!(
            "`register_tokens` is {} in the recipe, {} in the weights",
            other.register_tokens, config.register_tokens
        ),
    ];
    for part in expected {
        assert!(error.contains(&part), "`{part}` is not in\n{error}");
    }
}
