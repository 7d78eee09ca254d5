//! Writes ONNX files with the features that they must give, for `benches/peer/onnx/check.py` to run in onnxruntime.
//!
//! `peer FOLDER`: of random backbones, two of the size of ViT-S and two ConvNeXts.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_model::config::{FfnKind, ModelConfig, Position};
use dinoxide_model::weights::{Description, Provenance, Weight, WeightFile, host};
use dinoxide_model::{Arch, Backbone, parameters};
use dinoxide_onnx::{ImageSize, Input, Options, export};
use dinoxide_random::{Purpose, stream};
use rand::RngExt;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder] = arguments.as_slice() else { return Err("usage: peer FOLDER".into()) };
    std::fs::create_dir_all(folder)?;
    for (name, case) in [("v2", v2()), ("v3", v3()), ("convnext", convnext()), ("convnext-small", small_convnext())] {
        let (backbone, description) = random(case)?;
        write(Path::new(folder), name, &backbone, &description)?;
    }
    Ok(())
}

/// ViT-S/14 as in DINOv2 with registers.
fn v2() -> (ModelConfig, usize) {
    let config = ModelConfig {
        patch_size: 14,
        register_tokens: 4,
        interpolate_offset: 0.0,
        interpolate_antialias: true,
        ..ModelConfig::default()
    };
    (config, 224)
}

/// The size of ViT-S/16 with everything that DINOv3's larger models have.
fn v3() -> (ModelConfig, usize) {
    let config = ModelConfig {
        register_tokens: 4,
        position: Position::Rope,
        ffn: FfnKind::Swiglu64,
        mask_k_bias: true,
        untie_cls_and_patch_norms: true,
        ..ModelConfig::default()
    };
    (config, 224)
}

/// ConvNeXt-T.
fn convnext() -> (ModelConfig, usize) {
    (ModelConfig { arch: Arch::ConvNextTiny, ..ModelConfig::default() }, 224)
}

/// The backbone of the recipe `small_64px`, without layer scale.
fn small_convnext() -> (ModelConfig, usize) {
    let (dims, depths) = (Some([48, 96, 192, 256]), Some([1, 1, 2, 1]));
    let config = ModelConfig { dims, depths, layer_scale_init: 0.0, ..convnext().0 };
    (config, 64)
}

/// A backbone with weights that make attention far from uniform.
fn random((config, image_size): (ModelConfig, usize)) -> Result<(Backbone, Description), Box<dyn Error>> {
    let architecture = config.resolve(image_size)?;
    let mut rng = stream(7, Purpose::Init, 0, 0);
    let backbone = Backbone::new(&architecture, &Device::flex(), &mut rng);
    let shapes: BTreeMap<String, Vec<usize>> = parameters::shapes(&backbone).into_iter().collect();
    let backbone = parameters::replace(backbone, |name, value| {
        let shape = &shapes[name];
        let (mean, reach) = match shape.as_slice() {
            [_] if name.ends_with("gamma") => (0.3, 0.2),
            [_] if name.ends_with("weight") => (1.0, 0.5),
            [_, inputs] if name.ends_with("weight") => (0.0, 2.5 / (*inputs as f32).sqrt()),
            _ => (0.0, 0.3),
        };
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| mean + reach * rng.random_range(-1f32..1.0)).collect();
        Tensor::from_data(TensorData::from(values.as_slice()), &value.device())
    });
    let description = Description {
        architecture,
        image_size,
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
        provenance: Provenance::default(),
        fingerprint: None,
    };
    Ok((backbone, description))
}

/// Of one square size, of one that is not square, and of any size; each with the features of random images. Where patches
/// need not tile images, they do not tile those that are not square.
fn write(folder: &Path, name: &str, backbone: &Backbone, description: &Description) -> Result<(), Box<dyn Error>> {
    let patch = description.architecture.stride();
    let square = description.image_size;
    let rest = patch - description.architecture.sides().step;
    let (height, width) = (square + 3 * patch + rest, (square / patch / 2).max(1) * patch + rest);
    let files = [
        ("square", ImageSize::Fixed { height: square, width: square }, Input::Rgb, vec![(2, square, square)]),
        ("oblong", ImageSize::Fixed { height, width }, Input::Normalized, vec![(3, height, width)]),
        ("any-size", ImageSize::Dynamic, Input::Rgb, vec![(2, square, square), (3, height, width), (1, width, height)]),
    ];
    for (kind, size, input, batches) in files {
        let stem = format!("{name}-{kind}");
        export(backbone, description, &Options { input, ..Options::new(size) }, &folder.join(format!("{stem}.onnx")))?;
        let mut expected = WeightFile::default();
        for (i, &(batch, height, width)) in batches.iter().enumerate() {
            let shape = [batch, description.architecture.in_channels(), height, width];
            let mut rng = stream(i as u64, Purpose::Evaluation, batch as u64, 0);
            let given: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random::<f32>()).collect();
            let images = Tensor::<4>::from_data(TensorData::new(given.clone(), shape), &Device::flex());
            let images = match input {
                Input::Normalized => images,
                Input::Rgb => {
                    let channels = |values: [f32; 3]| {
                        Tensor::<1>::from_data(TensorData::from(values.as_slice()), &Device::flex())
                            .reshape([1, 3, 1, 1])
                    };
                    (images - channels(description.mean)) / channels(description.std)
                }
            };
            let features = backbone.forward(images, None);
            let mut put = |name: &str, shape: Vec<usize>, values: Vec<f32>| {
                expected.tensors.insert(format!("{i}.{name}"), Weight { shape, values });
            };
            put(input.name(), shape.to_vec(), given);
            put("cls", features.cls.dims().to_vec(), host(features.cls.reshape([-1])));
            put("patches", features.patches.dims().to_vec(), host(features.patches.reshape([-1])));
            if let Some(registers) = features.registers {
                put("registers", registers.dims().to_vec(), host(registers.reshape([-1])));
            }
        }
        expected.write(&folder.join(format!("{stem}.safetensors")))?;
    }
    Ok(())
}
