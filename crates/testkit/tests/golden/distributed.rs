//! Fixture `losses_dist`: losses over several ranks are the same arithmetic on the batch of all ranks, rank by rank.

use burn::tensor::{Device, Tensor};
use dinoxide_losses::{koleo::koleo_in_groups, sinkhorn::sinkhorn_knopp};
use dinoxide_testkit::{Array, Check, Tolerance};

use crate::{
    losses::number,
    tensors::{array, gradient, tensor},
};

pub(crate) fn all(check: &mut Check) {
    let fixture = check.fixture;
    let ranks = fixture.hyper()["world_size"].as_u64().expect("`world_size`") as usize;
    let local_batch = fixture.hyper()["local_batch"].as_u64().expect("`local_batch`") as usize;
    let cases: Vec<&str> = fixture
        .names("rank0.koleo_")
        .filter_map(|name| name.strip_prefix("rank0.").and_then(|name| name.strip_suffix(".loss")))
        .collect();
    for case in cases {
        let (nearest, group) =
            case.strip_prefix("koleo_topk").and_then(|c| c.split_once('_')).expect("`topk<k>_<group>`");
        let group = match group.strip_prefix("group").map(|g| g.trim_end_matches('s').trim_end_matches("rank")) {
            Some(ranks) => local_batch * ranks.parse::<usize>().expect("a number of ranks"),
            None => local_batch * ranks,
        };
        koleo(check, case, ranks, nearest.parse().expect("a number of neighbours"), group);
    }
    let iterations = fixture.hyper()["n_iterations"].as_u64().expect("`n_iterations`") as usize;
    for kind in ["cls", "patch"] {
        let temperature = number(fixture.hyper(), &format!("teacher_temp_{kind}"));
        let (logits, rows) = gathered(check, &format!("in.sk_{kind}"), ranks, &Device::flex());
        let found = sinkhorn_knopp(logits, temperature, iterations);
        for (rank, rows) in rows.into_iter().enumerate() {
            check.tensor(&format!("rank{rank}.sk_{kind}.probs"), &array(found.clone().slice([rows])));
        }
    }
}

/// All ranks' rows, and which are whose.
fn gathered(check: &Check, name: &str, ranks: usize, device: &Device) -> (Tensor<2>, Vec<std::ops::Range<usize>>) {
    let parts: Vec<Tensor<2>> =
        (0..ranks).map(|rank| tensor(&check.fixture.floats(&format!("rank{rank}.{name}")), device)).collect();
    let mut rows = Vec::new();
    for part in &parts {
        let first = rows.last().map_or(0, |last: &std::ops::Range<usize>| last.end);
        rows.push(first..first + part.dims()[0]);
    }
    (Tensor::cat(parts, 0), rows)
}

fn koleo(check: &mut Check, case: &str, ranks: usize, nearest: usize, group: usize) {
    let fixture = check.fixture;
    let device = Device::flex().autodiff();
    let (x, rows) = gathered(check, "in.koleo", ranks, &device);
    let x = x.require_grad();
    let loss = koleo_in_groups(x.clone(), nearest, group);
    // Each rank has the mean over its own rows, ours is the mean over all of them.
    let mean = (0..ranks).map(|rank| fixture.scalar(&format!("rank{rank}.{case}.loss"))).sum::<f32>() / ranks as f32;
    let scalar = |value: f32| Array { shape: vec![], values: vec![value] };
    let found = scalar(loss.value.into_scalar());
    check.values(&format!("{case}.loss"), &scalar(mean), &found, Tolerance::stated(fixture, "rank0"));
    // The gradient of a rank's rows is that of the sum of all ranks' losses.
    let grads = gradient(&x, &(loss.graph * ranks as f64).backward());
    let width = grads.shape[1];
    for (rank, rows) in rows.into_iter().enumerate() {
        let shape = vec![rows.len(), width];
        let values = grads.values[rows.start * width..rows.end * width].to_vec();
        check.tensor(&format!("rank{rank}.{case}.grad"), &Array { shape, values });
    }
}
