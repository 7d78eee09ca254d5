//! Fixture `droppath`: a block under given draws of stochastic depth, and the per-sample form by itself.

use burn::tensor::{Device, Tensor};
use dinoxide_model::{
    Block, BranchDraw, ModelConfig, Rope, RopeDraw, Vit,
    config::{Position, RopeConfig, RopeNormalize, RopePeriods},
};
use dinoxide_testkit::{Array, Check, Tolerance};
use rand::{SeedableRng, rngs::ChaCha8Rng};

use crate::tensors::{array, gradient, gradients, load, named, tensor};

pub(crate) fn all(check: &mut Check) {
    let fixture = check.fixture;
    let cases: Vec<String> =
        fixture.names("").filter_map(|name| name.strip_suffix(".perm0")).map(str::to_owned).collect();
    for case in &cases {
        subsets(check, case);
    }
    per_sample(check);
}

fn hyper(check: &Check, key: &str) -> usize {
    check.fixture.hyper()[key].as_u64().unwrap_or_else(|| panic!("`{key}`")) as usize
}

/// The fixture's block.
fn block(check: &Check, device: &Device) -> Block {
    let fixture = check.fixture;
    let config = ModelConfig {
        embed_dim: Some(hyper(check, "dim")),
        depth: Some(1),
        num_heads: Some(hyper(check, "heads")),
        ffn_ratio: fixture.hyper()["ffn_ratio"].as_f64(),
        patch_size: 1,
        qkv_bias: fixture.has("w.attn.qkv.bias"),
        proj_bias: fixture.has("w.attn.proj.bias"),
        ffn_bias: fixture.has("w.mlp.fc2.bias"),
        layer_scale_init: if fixture.has("w.ls1.gamma") { 1.0 } else { 0.0 },
        norm_eps: fixture.hyper()["eps"].as_f64().expect("an epsilon"),
        position: Position::Rope,
        ..ModelConfig::default()
    };
    let config = config.vit(1).expect("a configuration");
    let block = Vit::new(&config, device, &mut ChaCha8Rng::seed_from_u64(5)).blocks.remove(0);
    load(block, &named(fixture, "w.", |name| Some(name.to_owned())))
}

/// Cases `<case>.{perm*,out*,grad*}`: the block on several groups of crops, each branch on a subset of the batch.
fn subsets(check: &mut Check, case: &str) {
    let fixture = check.fixture;
    let device = Device::flex().autodiff();
    let block = block(check, &device);
    let rate = fixture.hyper()["drop_path"].as_f64().expect("a rate");
    let groups = fixture.names(&format!("{case}.out")).count();
    // First the attention draws of all groups, then the feed-forward draws.
    let draw = |i: usize| {
        let order = fixture.array::<i64>(&format!("{case}.perm{i}")).values;
        BranchDraw::subset(rate, order.into_iter().map(|i| i as usize).collect())
    };
    let mut total = Tensor::<1>::zeros([1], &device);
    let mut inputs = Vec::new();
    for group in 0..groups {
        let x: Tensor<3> = tensor::<3>(&fixture.floats(&format!("in.x{group}")), &device).require_grad();
        // Only DINOv3's blocks turn queries and keys.
        let rope = case.starts_with("v3").then(|| {
            let grid = &fixture.hyper()["patch_grids"][group];
            let side = |i: usize| grid[i].as_u64().expect("a grid") as usize;
            let (periods, normalize) = (RopePeriods::Base(100.0), RopeNormalize::Separate);
            let config = RopeConfig { periods, normalize, shift: 0.0, jitter: 1.0, rescale: 1.0 };
            Rope::new(config, hyper(check, "dim") / hyper(check, "heads")).table(
                (side(0), side(1)),
                hyper(check, "n_special_tokens"),
                &RopeDraw::NONE,
                &device,
            )
        });
        let out = block.forward(x.clone(), rope.as_ref(), &[draw(group), draw(groups + group)]);
        check.tensor(&format!("{case}.out{group}"), &array(out.clone()));
        total = total + (out * tensor(&fixture.floats(&format!("proj{group}")), &device)).sum();
        inputs.push(x);
    }
    let grads = total.backward();
    for (group, x) in inputs.iter().enumerate() {
        check.tensor(&format!("{case}.grad_in{group}"), &gradient(x, &grads));
    }
    let found = gradients(&block, &grads);
    let prefix = format!("{case}.grad.");
    for name in fixture.names(&prefix) {
        check.tensor(name, &found[&name[prefix.len()..]]);
    }
}

/// Case `droppath`: `out` is `in`, each sample either dropped or scaled, as its draw `u` says.
fn per_sample(check: &mut Check) {
    let fixture = check.fixture;
    let (x, out, u) = (fixture.floats("droppath.in"), fixture.floats("droppath.out"), fixture.floats("droppath.u"));
    // The fixture does not state the rate: it is what the kept samples were scaled by.
    let scales = x.values.iter().zip(&out.values).map(|(x, out)| f64::from(out / x));
    let scale = scales.fold(0.0, f64::max);
    let BranchDraw::Scale(factors) = BranchDraw::per_sample(1.0 - 1.0 / scale, u.values.iter().map(|&u| f64::from(u)))
    else {
        panic!("the per-sample form is a scale");
    };
    let sample = x.values.len() / factors.len();
    let values = x.values.iter().enumerate().map(|(i, x)| x * factors[i / sample]).collect();
    let found = Array { shape: x.shape.clone(), values };
    check.values("droppath.out", &out, &found, Tolerance::stated(fixture, "droppath"));
}
