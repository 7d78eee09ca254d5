//! What automatic differentiation keeps of a block's forward, composed as on a GPU, in single precision and in bfloat16.

#![allow(clippy::print_stdout, reason = "the measured deviations are what a reader of the run looks for")]

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_kernels::{Branch, Normalization, Precision, Projection, RopeTable, composed};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const TOKENS: usize = 197;
const WIDTH: usize = 384;
const HEADS: usize = 6;

/// Bytes with the result, of the attention and of the feed-forward branch of a ViT-S on so many images.
fn kept(batch: usize, precision: Precision) -> [usize; 2] {
    let device = Device::flex().autodiff();
    let filled = |count: usize| (0..count).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<_>>();
    let vector = |count: usize| Tensor::<1>::from_data(TensorData::new(filled(count), [count]), &device).require_grad();
    let matrix = |rows: usize, columns: usize| {
        Tensor::<2>::from_data(TensorData::new(filled(rows * columns), [rows, columns]), &device).require_grad()
    };
    let branch = |first: usize, inner: usize| Branch {
        norm: Normalization { weight: vector(WIDTH), bias: vector(WIDTH), eps: 1e-6 },
        first: Projection { weight: matrix(first, WIDTH), bias: Some(vector(first)) },
        last: Projection { weight: matrix(WIDTH, inner), bias: Some(vector(WIDTH)) },
        gamma: Some(vector(WIDTH)),
        precision,
        recompute: false,
    };
    let table = matrix(TOKENS, WIDTH / HEADS).detach();
    let rope = RopeTable { cos: table.clone(), sin: table };
    let x = matrix(batch * TOKENS, WIDTH);
    let of = |forward: &dyn Fn(Branch) -> Tensor<2>, branch: Branch| {
        let before = ALLOCATOR.current_usage();
        let y = forward(branch);
        let kept = ALLOCATOR.current_usage() - before;
        drop(y);
        kept
    };
    let attention = |branch: Branch| {
        let y = composed::attention(x.clone().reshape([batch, TOKENS, WIDTH]), branch, HEADS, Some(&rope));
        y.reshape([batch * TOKENS, WIDTH])
    };
    let feed_forward = |branch: Branch| composed::feed_forward(x.clone(), branch);
    [of(&attention, branch(3 * WIDTH, WIDTH)), of(&feed_forward, branch(4 * WIDTH, 4 * WIDTH))]
}

#[test]
fn bfloat16_keeps_less_for_the_backward_pass() {
    // The difference between three images and one leaves out what does not depend on their number, such as cast weights.
    let per_token = |precision| {
        let (one, three) = (kept(1, precision), kept(3, precision));
        [0, 1].map(|i| (three[i] - one[i]) / (2 * TOKENS))
    };
    let (single, half) = (per_token(Precision::Fp32), per_token(Precision::Bf16));
    println!(
        "bytes per token of a ViT-S in attention, feed-forward: {single:?} in single precision, {half:?} in bfloat16"
    );
    for (single, half) in single.into_iter().zip(half) {
        assert!(half < single * 9 / 10, "{half} bytes per token in bfloat16, {single} in single precision");
    }
}
