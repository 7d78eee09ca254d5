//! Fixture `convnext_v3`: the forwards of a ConvNeXt, its stages, and the gradient of every parameter.

use burn::tensor::Device;
use dinoxide_model::{
    Architecture, Backbone, ConvNextConfig, CropGroup, LayerFeatures,
    config::{DropPathKind, ModelConfig},
};
use dinoxide_testkit::{Check, Fixture};
use rand::{SeedableRng, rngs::ChaCha8Rng};
use serde_json::Value;

use crate::tensors::{array, load, named};
use crate::vit::{gradient, images, output, parameter};

pub(crate) fn all(check: &mut Check) {
    let fixture = check.fixture;
    let plain = Device::flex();
    let config = config(fixture.hyper());
    forwards(check, &backbone(fixture, &config, &plain));
    layers(check, &config);
    gradient(check, &backbone(fixture, &config, &plain.autodiff()));
}

/// The backbone that DINOv3's options describe.
fn config(hyper: &Value) -> ConvNextConfig {
    let four = |key: &str| {
        let values = hyper[key].as_array().unwrap_or_else(|| panic!("`{key}`"));
        std::array::from_fn(|stage| values[stage].as_u64().expect("a number") as usize)
    };
    ConvNextConfig {
        in_channels: 3,
        dims: four("dims"),
        depths: four("depths"),
        layer_scale_init: hyper["layer_scale_init_value"].as_f64(),
        norm_eps: ModelConfig::default().norm_eps,
        patch_size: hyper["patch_size"].as_u64().map(|size| size as usize),
        drop_path_rate: 0.0,
        drop_path: DropPathKind::PerSample,
    }
}

/// The backbone of this description with the fixture's weights.
fn backbone(fixture: &Fixture, config: &ConvNextConfig, device: &Device) -> Backbone {
    let architecture = Architecture::ConvNext(config.clone());
    load(Backbone::new(&architecture, device, &mut ChaCha8Rng::seed_from_u64(1)), &named(fixture, "w.", parameter))
}

/// `out.{single,list_train.global,list_train.local}.*`
fn forwards(check: &mut Check, backbone: &Backbone) {
    let fixture = check.fixture;
    let [global, local] = ["in.x", "in.x_local"].map(|name| images(fixture, name, &Device::flex()));
    let draws = |batch: usize| backbone.architecture().draw(batch, &mut ChaCha8Rng::seed_from_u64(2));
    let (batch, local_batch) = (global.dims()[0], local.dims()[0]);
    let runs = [
        ("out.single.", backbone.forward(global.clone(), None)),
        ("out.list_train.global.", backbone.forward_train(global, None, CropGroup::Global, &draws(batch))),
        ("out.list_train.local.", backbone.forward_train(local, None, CropGroup::Local, &draws(local_batch))),
    ];
    for (prefix, features) in runs {
        for name in fixture.names(prefix) {
            check.tensor(name, &output(&features, &name[prefix.len()..]));
        }
    }
}

/// `out.interm.<variant>.<i>.<patch|cls>`: the last stages, with and without norm and resizing.
fn layers(check: &mut Check, config: &ConvNextConfig) {
    let fixture = check.fixture;
    let as_it_is = ConvNextConfig { patch_size: None, ..config.clone() };
    let [_, _, height, width] = images(fixture, "in.x", &Device::flex()).dims();
    let patch = config.patch_size.expect("a size of patches");
    let (rows, columns) = (height / patch, width / patch);
    let runs = [
        ("n2.", 2, config, true),
        ("n2_nonorm.", 2, config, false),
        ("n4_reshape.", 4, config, true),
        ("noresize_n1.", 1, &as_it_is, true),
    ];
    for (variant, count, config, norm) in runs {
        let stages: Vec<usize> = (4 - count..4).collect();
        let backbone = backbone(fixture, config, &Device::flex());
        let found = backbone.forward_layers(images(fixture, "in.x", &Device::flex()), &stages, norm);
        for (i, LayerFeatures { cls, patches, .. }) in found.into_iter().enumerate() {
            let prefix = format!("out.interm.{variant}{i}.");
            for name in fixture.names(&prefix) {
                let found = match &name[prefix.len()..] {
                    "cls" => array(cls.clone()),
                    "patch" if variant == "n4_reshape." => {
                        let [batch, _, dim] = patches.dims();
                        array(patches.clone().swap_dims(1, 2).reshape([batch, dim, rows, columns]))
                    }
                    "patch" => array(patches.clone()),
                    _ => panic!("an output `{name}` is not known"),
                };
                check.tensor(name, &found);
            }
        }
    }
}
