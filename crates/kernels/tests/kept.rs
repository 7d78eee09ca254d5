//! What is kept of a block's forward for its backward pass: left to automatic differentiation, in single precision and in
//! bfloat16, and by the operations that a block is made of.

#![allow(clippy::print_stdout, reason = "the measured deviations are what a reader of the run looks for")]

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_kernels::{
    Branch, Normalization, Precision, Projection, RopeTable, attention, composed, feed_forward, gated_feed_forward,
};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const TOKENS: usize = 197;
const WIDTH: usize = 384;
const HEADS: usize = 6;
/// Hidden features of a gated feed-forward layer: as many weights as in an ordinary one of 4·WIDTH.
const GATED: usize = WIDTH * 8 / 3;

/// Whose operations they are.
#[derive(Clone, Copy)]
enum By {
    /// The definitions, differentiated automatically.
    Definition,
    /// Those that a backbone runs.
    Backbone,
}

/// Bytes with the result, of the attention, of the feed-forward and of a gated feed-forward branch of a ViT-S on so many images.
fn kept(batch: usize, precision: Precision, by: By) -> [usize; 3] {
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
        let run = match by {
            By::Definition => composed::attention,
            By::Backbone => attention,
        };
        run(x.clone().reshape([batch, TOKENS, WIDTH]), branch, HEADS, Some(&rope)).reshape([batch * TOKENS, WIDTH])
    };
    let feed_forward = |branch: Branch| match by {
        By::Definition => composed::feed_forward(x.clone(), branch),
        By::Backbone => feed_forward(x.clone(), branch),
    };
    let gated = |branch: Branch| match by {
        By::Definition => composed::gated_feed_forward(x.clone(), branch, None),
        By::Backbone => gated_feed_forward(x.clone(), branch, None),
    };
    [
        of(&attention, branch(3 * WIDTH, WIDTH)),
        of(&feed_forward, branch(4 * WIDTH, 4 * WIDTH)),
        of(&gated, branch(2 * GATED, GATED)),
    ]
}

/// The same per token: the difference between three images and one leaves out what does not depend on their number, such as
/// cast weights. What a thread keeps for its products it allocates at the first one that it takes part in, which any run may
/// be: the least of several counts.
fn per_token(precision: Precision, by: By) -> [usize; 3] {
    kept(3, precision, by);
    let least = |batch: usize| {
        let runs = (0..5).map(|_| kept(batch, precision, by));
        runs.reduce(|least, run| [0, 1, 2].map(|i| least[i].min(run[i]))).expect("some runs")
    };
    let (one, three) = (least(1), least(3));
    [0, 1, 2].map(|i| (three[i] - one[i]) / (2 * TOKENS))
}

// One test: the allocator counts what the whole process holds.
#[test]
fn bfloat16_keeps_less_and_operations_with_a_backward_of_their_own_a_fraction() {
    let (single, half) = (per_token(Precision::Fp32, By::Definition), per_token(Precision::Bf16, By::Definition));
    let ours = [Precision::Fp32, Precision::Bf16].map(|precision| per_token(precision, By::Backbone));
    println!(
        "bytes per token of a ViT-S in attention, feed-forward, gated feed-forward: {single:?} in single precision, {half:?} in bfloat16; with \
         a backward of their own {:?} and {:?}",
        ours[0], ours[1]
    );
    for ((single, half), percent) in single.into_iter().zip(half).zip([90, 90, 95]) {
        assert!(half < single * percent / 100, "{half} bytes per token in bfloat16, {single} in single precision");
    }
    // The result in single precision; three projections and the heads' results, and the hidden layer or gates and values, in bfloat16.
    for (ours, numbers) in ours[1].into_iter().zip([4 * WIDTH, 4 * WIDTH, 2 * GATED]) {
        let expected = 4 * WIDTH + 2 * numbers;
        assert!(
            (expected * 99 / 100..expected * 11 / 10).contains(&ours),
            "{ours} bytes per token, expected {expected}"
        );
    }
}
