//! The rate at which this machine multiplies matrices of the sizes of a training step: `benches/step/gemm_share.py` runs it.
//!
//!     cargo bench -p dinoxide-benches --bench products -- 384 1576:2 1184:1
//!
//! Arguments are the width of the tokens, and for each group of crops `tokens:forwards`, where a student's forward is
//! followed by a backward and a teacher's is not. For each of the four linear layers of a transformer block these are the
//! products of its forwards, of the gradient of its input and of that of its weight. Prints GFLOP/s over all of them.

#![allow(clippy::print_stdout, reason = "the rate is what this is for")]

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use dinoxide_kernels::{Precision, linear, run_on};

/// Each product runs once unmeasured, then so often.
const REPEATS: usize = 2;

fn filled([rows, columns]: [usize; 2], device: &Device) -> Tensor<2> {
    let values: Vec<f32> = (0..rows * columns).map(|i| (i * 7919 % 113) as f32 * 0.01 - 0.5).collect();
    Tensor::<1>::from_floats(values.as_slice(), device).reshape([rows, columns])
}

fn main() {
    // Cargo adds a flag of its own.
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let number = |text: &str| text.parse::<usize>().unwrap_or_else(|_| panic!("`{text}` is no number"));
    let Some(width) = arguments.next() else {
        println!("products: nothing to multiply; `benches/step/gemm_share.py` says what a step does");
        return;
    };
    let width = number(&width);
    let groups: Vec<(usize, usize)> = arguments
        .map(|group| {
            let (tokens, forwards) = group.split_once(':').expect("TOKENS:FORWARDS");
            (number(tokens), number(forwards))
        })
        .collect();
    let device = Device::flex();
    let (mut work, mut seconds) = (0.0, 0.0);
    // `count` products of `rows × inner` with `inner × columns`.
    let mut multiply = |[rows, inner, columns]: [usize; 3], count: usize| {
        let (a, b) = (filled([rows, inner], &device), filled([columns, inner], &device));
        let run = || drop(black_box(linear(a.clone(), b.clone(), None, Precision::Fp32)));
        run_on(&device, || {
            run();
            let start = Instant::now();
            (0..REPEATS).for_each(|_| run());
            seconds += count as f64 * start.elapsed().as_secs_f64() / REPEATS as f64;
        });
        work += count as f64 * 2.0 * (rows * inner * columns) as f64;
    };
    for (tokens, forwards) in groups {
        for (input, output) in [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] {
            multiply([tokens, input, output], forwards);
            multiply([tokens, output, input], 1);
            multiply([output, tokens, input], 1);
        }
    }
    println!("{:.1}", work / seconds / 1e9);
}
