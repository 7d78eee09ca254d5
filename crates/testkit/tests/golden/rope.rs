//! Fixture `rope_v3`: rotary tables of several geometries, and training-time augmentations with given draws.

use burn::tensor::Device;
use dinoxide_model::{
    Rope, RopeDraw,
    config::{RopeConfig, RopePeriods},
};
use dinoxide_testkit::{Array, Check, Tolerance};
use serde_json::Value;

use crate::{tensors::array, vit::rope_normalize};

fn geometry(hyper: &Value) -> Rope {
    let size = |key: &str| hyper[key].as_u64().unwrap_or_else(|| panic!("`{key}` is {}", hyper[key])) as usize;
    let periods = match (hyper["min_period"].as_f64(), hyper["max_period"].as_f64()) {
        (Some(min), Some(max)) => RopePeriods::Range { min, max },
        _ => RopePeriods::Base(hyper["base"].as_f64().expect("a base")),
    };
    let normalize = rope_normalize(&hyper["normalize_coords"]);
    let config = RopeConfig { periods, normalize, shift: 0.0, jitter: 1.0, rescale: 1.0 };
    Rope::new(config, size("embed_dim") / size("num_heads"))
}

pub(crate) fn tables(check: &mut Check) {
    let fixture = check.fixture;
    for (case, hyper) in fixture.hyper().as_object().expect("cases") {
        let rope = geometry(hyper);
        let grid = (hyper["H"].as_u64().expect("rows") as usize, hyper["W"].as_u64().expect("columns") as usize);
        let augmented = fixture.has(&format!("{case}.cos"));
        let prefix = if augmented { format!("{case}.") } else { format!("{case}.fp32.") };
        let mut draw = RopeDraw::NONE;
        for name in fixture.names(&prefix) {
            let values = || fixture.floats(name).values.into_iter().map(f64::from).collect::<Vec<_>>();
            match &name[prefix.len()..] {
                "shift_hw" => draw.shift.copy_from_slice(&values()),
                "jitter_hw" => draw.stretch.iter_mut().zip(values()).for_each(|(stretch, jitter)| *stretch *= jitter),
                "rescale" => draw.stretch.iter_mut().for_each(|stretch| *stretch *= values()[0]),
                _ => {}
            }
        }
        let table = rope.table(grid, 0, &draw, &Device::flex());
        check.tensor(&format!("{prefix}cos"), &array(table.cos));
        check.tensor(&format!("{prefix}sin"), &array(table.sin));
        let name = format!("{prefix}periods");
        if fixture.has(&name) {
            let (expected, values) = (fixture.floats(&name), rope.periods());
            let found = Array { shape: vec![values.len()], values };
            check.values(&name, &expected, &found, Tolerance::stated(fixture, case));
        }
    }
    if fixture.names("").any(|name| name.contains(".bf16.")) {
        check.pending(
            |name| name.contains(".bf16."),
            "tables rounded to bfloat16 at every step: positions are computed in double precision only",
        );
    }
}
