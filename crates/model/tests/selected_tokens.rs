//! A forward of which only some tokens are computed to the end, against one that computes all: values and every gradient.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Device, Gradients, Int, Tensor, TensorData};
use dinoxide_model::config::{DropPathKind, FfnKind, NormKind, Position};
use dinoxide_model::weights::host;
use dinoxide_model::{Arch, Architecture, Backbone, CropGroup, ModelConfig, parameters};
use dinoxide_random::{Purpose, stream};
use rand::RngExt;

/// Images in a batch, and their patches.
const BATCH: usize = 4;
const GRID: (usize, usize) = (2, 3);
const PATCHES: usize = GRID.0 * GRID.1;
const DIM: usize = 24;

fn model() -> ModelConfig {
    ModelConfig {
        arch: Arch::VitTiny,
        patch_size: 4,
        embed_dim: Some(DIM),
        depth: Some(2),
        num_heads: Some(3),
        layer_scale_init: 1.0,
        ..ModelConfig::default()
    }
}

fn noise<const D: usize>(shape: [usize; D], key: u64, device: &Device) -> Tensor<D> {
    let mut rng = stream(7, Purpose::Synthetic, key, 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// The gradients of all parameters that have one, by name.
fn gradients(of: &Backbone, grads: &Gradients) -> BTreeMap<String, Vec<f32>> {
    struct Collect<'a> {
        path: parameters::Path,
        grads: &'a Gradients,
        found: BTreeMap<String, Vec<f32>>,
    }
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = param.val().grad(self.grads) {
                self.found.insert(self.path.name(), host(gradient.reshape([-1])));
            }
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    let mut collect = Collect { path: parameters::Path::default(), grads, found: BTreeMap::new() };
    of.visit(&mut collect);
    collect.found
}

fn assert_near(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
    for (a, e) in found.iter().zip(expected) {
        assert!((a - e).abs() <= 2e-5 * largest, "{what}: {a} is not {e}, of up to {largest}");
    }
}

/// CLS, patches and all gradients of a weighted sum of both: the selected forward beside the whole one. Returns how many
/// gradients were compared.
fn compare(what: &str, config: &ModelConfig, group: CropGroup, patches: &[usize]) -> usize {
    let architecture = config.resolve(16).expect("a model");
    let device = Device::flex().autodiff();
    let backbone = Backbone::new(&architecture, &device, &mut stream(1, Purpose::Init, 0, 0));
    // Weights as they are after training: tokens differ, and attention is far from uniform.
    let backbone = parameters::replace(backbone, |_, value| value * 4.0);
    let images = noise([BATCH, 3, 4 * GRID.0, 4 * GRID.1], 3, &device);
    let draws = architecture.draw(BATCH, &mut stream(2, Purpose::Forward, 0, 0));
    let hidden: Vec<bool> = (0..BATCH * PATCHES).map(|i| i % 4 == 1).collect();
    let masked = group == CropGroup::Global && matches!(architecture, Architecture::Vit(_));
    let mask = masked.then(|| Tensor::<2, Bool>::from_data(TensorData::new(hidden, [BATCH, PATCHES]), &device));
    let indices: Vec<i32> = patches.iter().map(|&patch| patch as i32).collect();
    let chosen = |all: Tensor<3>| {
        let [batch, count, dim] = all.dims();
        all.reshape([batch * count, dim]).select(0, Tensor::<1, Int>::from_data(indices.as_slice(), &device))
    };
    let results = [true, false].map(|selected| {
        let (cls, found) = if selected {
            let found = backbone.forward_selected(images.clone(), mask.clone(), group, Some(&draws), patches);
            (found.cls, found.patches)
        } else {
            let all = backbone.forward_train(images.clone(), mask.clone(), group, &draws);
            let count = all.patches.dims()[1];
            let found = if patches.is_empty() { Tensor::zeros([0, DIM], &device) } else { chosen(all.patches) };
            assert!(patches.iter().all(|patch| *patch < BATCH * count));
            (all.cls, found)
        };
        let mut objective = (cls.clone() * noise(cls.dims(), 4, &device)).sum();
        if !patches.is_empty() {
            objective = objective + (found.clone() * noise(found.dims(), 5, &device)).sum();
        }
        let gradients = gradients(&backbone, &objective.backward());
        let values = [cls.inner().reshape([-1]), found.inner().reshape([-1])].map(host);
        (values, gradients)
    });
    let [(found, found_gradients), (expected, expected_gradients)] = results;
    for (part, (found, expected)) in ["cls", "patches"].into_iter().zip(found.iter().zip(&expected)) {
        assert_near(&format!("{what}: {part}"), found, expected);
    }
    let mut compared = 0;
    for (name, expected) in &expected_gradients {
        match found_gradients.get(name) {
            Some(found) => assert_near(&format!("{what}: gradient of {name}"), found, expected),
            // What only tokens pass through that nobody looks at.
            None => assert!(expected.iter().all(|v| *v == 0.0), "{what}: no gradient of {name}"),
        }
        compared += 1;
    }
    assert!(found_gradients.keys().all(|name| expected_gradients.contains_key(name)), "{what}");
    // Outside training.
    let plain = backbone.valid();
    let images = images.inner();
    let all = plain.forward(images.clone(), None);
    let found = plain.forward_selected(images, None, CropGroup::Global, None, patches);
    assert_near(what, &host(found.cls.reshape([-1])), &host(all.cls.reshape([-1])));
    compared
}

/// None; some, of which one image has none and one all; the last alone; every one.
fn selections() -> [Vec<usize>; 4] {
    let some = vec![1, 2, PATCHES + 5].into_iter().chain(3 * PATCHES..4 * PATCHES).collect();
    [vec![], some, vec![BATCH * PATCHES - 1], (0..BATCH * PATCHES).collect()]
}

#[test]
fn selected_tokens_and_their_gradients_are_those_of_the_whole_forward() {
    let variants: [(&str, ModelConfig); 6] = [
        ("learned positions", ModelConfig { position: Position::Learned, ..model() }),
        (
            "registers, rotary positions, norms of their own",
            ModelConfig {
                position: Position::Rope,
                register_tokens: 2,
                untie_cls_and_patch_norms: true,
                untie_global_and_local_cls_norm: true,
                ..model()
            },
        ),
        (
            "a subset of samples",
            ModelConfig { drop_path_rate: 0.4, drop_path: DropPathKind::Subset, position: Position::Rope, ..model() },
        ),
        (
            "scaled samples",
            ModelConfig { drop_path_rate: 0.4, drop_path: DropPathKind::PerSample, register_tokens: 1, ..model() },
        ),
        ("SwiGLU", ModelConfig { ffn: FfnKind::Swiglu, ..model() }),
        ("RMS norm", ModelConfig { norm: NormKind::RmsNorm, ..model() }),
    ];
    let mut compared = 0;
    for (what, config) in &variants {
        for group in [CropGroup::Global, CropGroup::Local] {
            for patches in selections() {
                let what = format!("{what}, {group:?}, {} patches", patches.len());
                compared += compare(&what, config, group, &patches);
            }
        }
    }
    assert!(compared > 6 * 2 * 4 * 20, "{compared}");
}

#[test]
#[should_panic(expected = "patches of 4 images of 6: not in ascending order, or outside")]
fn patches_outside_are_refused() {
    compare("outside", &model(), CropGroup::Global, &[0, BATCH * PATCHES]);
}
