//! Time of each fused operation beside its composed definition, on `flex`, forward and forward + backward, at the shapes of
//! a training step.
//!
//! `cargo bench -p dinoxide-benches --bench kernels [-- NAME]` prints the median of several runs in milliseconds; the two
//! versions take turns, so that other work on the machine falls on both. `NAME` keeps the operations that contain it.

#![allow(clippy::print_stdout, reason = "a benchmark prints its results")]

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use dinoxide_kernels::{self as kernels, Precision::Fp32, RopeTable, composed};

const RUNS: usize = 9;

/// `[B, H, W, C]` of the four stages of a ConvNeXt-T on 32 images of 64 px, and of its first one at 224 px.
const MAPS: [[usize; 4]; 5] = [[32, 16, 16, 96], [32, 8, 8, 192], [32, 4, 4, 384], [32, 2, 2, 768], [4, 56, 56, 96]];

/// One shape of the token matrix.
struct Shape {
    images: usize,
    tokens: usize,
    width: usize,
    heads: usize,
}

const SHAPES: [Shape; 3] = [
    Shape { images: 128, tokens: 65, width: 192, heads: 3 },
    Shape { images: 8, tokens: 201, width: 384, heads: 6 },
    Shape { images: 32, tokens: 41, width: 384, heads: 6 },
];

type Function = Box<dyn Fn(&[Tensor<2>]) -> Tensor<2>>;

/// An operation in both versions, with the shapes of its inputs, all of which are tracked, and its floating-point operations
/// forward, where they are what counts.
struct Operation {
    name: String,
    inputs: Vec<[usize; 2]>,
    fused: Function,
    composed: Function,
    flops: Option<usize>,
}

fn main() {
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with("--")).unwrap_or_default();
    println!("{} threads, median of {RUNS} runs in ms\n", std::thread::available_parallelism().map_or(1, usize::from));
    println!("{:38} {:>31}   {:>31}", "", "forward", "forward + backward");
    println!("{:38} {:>9} {:>9} {:>11}   {:>9} {:>9} {:>11}", "", "composed", "fused", "", "composed", "fused", "");
    for shape in &SHAPES {
        println!("{} images of {} tokens, width {}, {} heads", shape.images, shape.tokens, shape.width, shape.heads);
        for operation in operations(shape).iter().filter(|operation| operation.name.contains(&filter)) {
            measure(operation);
        }
    }
    println!("depthwise convolutions, 7 × 7");
    for operation in MAPS.map(depthwise_conv).iter().filter(|operation| operation.name.contains(&filter)) {
        measure(operation);
    }
}

fn depthwise_conv(shape: [usize; 4]) -> Operation {
    let [batch, height, width, channels] = shape;
    let inputs =
        move |t: &[Tensor<2>]| (t[0].clone().reshape(shape), t[1].clone().reshape([channels, 1, 7, 7]), vector(&t[2]));
    let rows = batch * height * width;
    Operation {
        name: format!("depthwise_conv {shape:?}"),
        inputs: vec![[rows, channels], [channels, 49], [1, channels]],
        fused: Box::new(move |t| {
            let (x, weight, bias) = inputs(t);
            kernels::depthwise_conv(x, weight, bias).reshape([rows, channels])
        }),
        composed: Box::new(move |t| {
            let (x, weight, bias) = inputs(t);
            composed::depthwise_conv(x, weight, bias).reshape([rows, channels])
        }),
        flops: Some(2 * 49 * rows * channels),
    }
}

fn operations(shape: &Shape) -> Vec<Operation> {
    let &Shape { images, tokens, width, heads } = shape;
    let rows = images * tokens;
    let hidden = 4 * width;
    let mut operations = Vec::new();
    for (input, output) in [(width, 3 * width), (width, width), (width, hidden), (hidden, width)] {
        operations.push(Operation {
            name: format!("linear {input} -> {output}"),
            inputs: vec![[rows, input], [output, input], [1, output]],
            fused: Box::new(|t| kernels::linear(t[0].clone(), t[1].clone(), Some(vector(&t[2])), Fp32)),
            composed: Box::new(|t| composed::linear(t[0].clone(), t[1].clone(), Some(vector(&t[2])), Fp32)),
            flops: Some(2 * rows * input * output),
        });
    }
    operations.push(Operation {
        name: "layer_norm".into(),
        inputs: vec![[rows, width], [1, width], [1, width]],
        fused: Box::new(|t| kernels::layer_norm(t[0].clone(), vector(&t[1]), vector(&t[2]), 1e-6)),
        composed: Box::new(|t| composed::layer_norm(t[0].clone(), vector(&t[1]), vector(&t[2]), 1e-6)),
        flops: None,
    });
    operations.push(Operation {
        name: format!("gelu, width {hidden}"),
        inputs: vec![[rows, hidden]],
        fused: Box::new(|t| kernels::gelu(t[0].clone())),
        composed: Box::new(|t| composed::gelu(t[0].clone())),
        flops: None,
    });
    operations.push(Operation {
        name: "residual".into(),
        inputs: vec![[rows, width], [rows, width], [1, width]],
        fused: Box::new(|t| kernels::residual(t[0].clone(), t[1].clone(), Some(vector(&t[2])))),
        composed: Box::new(|t| composed::residual(t[0].clone(), t[1].clone(), Some(vector(&t[2])))),
        flops: None,
    });
    let packed = move |t: &Tensor<2>| t.clone().reshape([images, tokens, 3 * width]);
    let table = move |t: &[Tensor<2>]| RopeTable { cos: t[1].clone().detach(), sin: t[2].clone().detach() };
    let head_dim = width / heads;
    operations.push(Operation {
        name: "self_attention".into(),
        inputs: vec![[rows, 3 * width], [tokens, head_dim], [tokens, head_dim]],
        fused: Box::new(move |t| {
            kernels::self_attention(packed(&t[0]), heads, Some(&table(t)), Fp32).reshape([rows, width])
        }),
        composed: Box::new(move |t| {
            composed::self_attention(packed(&t[0]), heads, Some(&table(t)), Fp32).reshape([rows, width])
        }),
        flops: Some(4 * rows * tokens * width),
    });
    operations
}

fn vector(row: &Tensor<2>) -> Tensor<1> {
    row.clone().flatten(0, 1)
}

fn measure(operation: &Operation) {
    let plain = Device::flex();
    let inputs: Vec<Tensor<2>> =
        operation.inputs.iter().map(|shape| Tensor::random(*shape, Distribution::Normal(0.0, 1.0), &plain)).collect();
    let forward = |function: &Function| {
        let start = Instant::now();
        let value = function(&inputs);
        let time = start.elapsed();
        drop(value);
        time.as_secs_f64() * 1e3
    };
    let tracked: Vec<Tensor<2>> =
        inputs.iter().map(|tensor| Tensor::from_inner(tensor.clone()).require_grad()).collect();
    let upstream = Tensor::from_inner((operation.fused)(&inputs));
    let step = |function: &Function| {
        // A gradient that is not constant; of the loss that gives it, only the backward pass is in the time.
        let start = Instant::now();
        let value = function(&tracked);
        let forward = start.elapsed();
        let loss = (value * upstream.clone()).sum();
        let start = Instant::now();
        let grads = loss.backward();
        let backward = start.elapsed();
        drop(grads);
        (forward + backward).as_secs_f64() * 1e3
    };
    let [forward_composed, forward_fused] = medians(&operation.composed, &operation.fused, forward);
    let [step_composed, step_fused] = medians(&operation.composed, &operation.fused, step);
    let rate = |times: usize, ms: f64| {
        operation.flops.map_or(String::new(), |flops| format!("{:4.0} GF/s", (times * flops) as f64 / ms / 1e6))
    };
    println!(
        "  {:36} {forward_composed:9.2} {forward_fused:9.2} {:>11}   {step_composed:9.2} {step_fused:9.2} {:>11}",
        operation.name,
        rate(1, forward_fused),
        rate(3, step_fused)
    );
}

/// The median times of both versions, which take turns after a first run of each.
fn medians(a: &Function, b: &Function, time: impl Fn(&Function) -> f64) -> [f64; 2] {
    let mut times = [Vec::new(), Vec::new()];
    time(a);
    time(b);
    for _ in 0..RUNS {
        times[0].push(time(a));
        times[1].push(time(b));
    }
    times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[RUNS / 2]
    })
}
