//! The fused operations in bfloat16: each as near to single precision as its definition, and not equal to it.

use burn::tensor::Tensor;

use crate::Precision::{self, Bf16, Fp32};
use crate::testing::{Case, Inputs, assert_as_near, run};
use crate::{Branch, Normalization, Projection, RopeTable, composed};
use crate::{attention, feed_forward, linear, plain_product, product, selected_attention, self_attention, times};

fn branch(t: &Inputs, precision: Precision) -> Branch {
    Branch {
        norm: Normalization { weight: t.vector(1), bias: t.vector(2), eps: 1e-5 },
        first: Projection { weight: t.matrix(3), bias: Some(t.vector(4)) },
        last: Projection { weight: t.matrix(5), bias: Some(t.vector(6)) },
        gamma: Some(t.vector(7)),
        precision,
        recompute: false,
    }
}

fn rope(t: &Inputs) -> RopeTable {
    RopeTable { cos: t.matrix(8), sin: t.matrix(9) }
}

fn attention_case(batch: usize, tokens: usize, heads: usize, head_dim: usize) -> Case {
    let width = heads * head_dim;
    Case::new(
        &[
            &[batch, tokens, width],
            &[width],
            &[width],
            &[3 * width, width],
            &[3 * width],
            &[width, width],
            &[width],
            &[width],
            &[tokens, head_dim],
            &[tokens, head_dim],
        ],
        &[true, true, true, true, true, true, true, true, false, false],
    )
}

/// Asserts that the operation is as near as the definition, and that it rounds.
fn compare<const D: usize>(
    case: &Case,
    ours: impl Fn(&Inputs, Precision) -> Tensor<D>,
    defined: impl Fn(&Inputs, Precision) -> Tensor<D>,
) -> usize {
    assert_ne!(run(case, |t| ours(t, Fp32))[0], run(case, |t| ours(t, Bf16))[0], "nothing was rounded");
    // Where results of products are not rounded, or at another place, their errors are other draws: one by one they differ by
    // some 15 % either way.
    assert_as_near(case, ours, defined, 1.3)
}

#[test]
fn fused_operations_are_as_near_to_single_precision_as_their_definitions() {
    let mut compared = 0;
    // Sizes that the matrix unit takes, with rests in every dimension, and sizes below.
    for (batch, tokens, heads, head_dim) in [(3, 41, 2, 20), (5, 7, 3, 6)] {
        let case = attention_case(batch, tokens, heads, head_dim);
        compared += compare(
            &case,
            |t, precision| attention(t.cube(0), branch(t, precision), heads, Some(&rope(t))),
            |t, precision| composed::attention(t.cube(0), branch(t, precision), heads, Some(&rope(t))),
        );
        let rows: Vec<usize> = (0..batch * tokens).filter(|i| i % 3 != 1).collect();
        compared += compare(
            &case,
            |t, precision| selected_attention(t.cube(0), &rows, branch(t, precision), heads, Some(&rope(t))),
            |t, precision| composed::selected_attention(t.cube(0), &rows, branch(t, precision), heads, Some(&rope(t))),
        );
        let packed = Case::new(&[&[batch, tokens, 3 * heads * head_dim]], &[true]);
        compared += compare(
            &packed,
            |t, precision| self_attention(t.cube(0), heads, None, precision),
            |t, precision| composed::self_attention(t.cube(0), heads, None, precision),
        );
    }
    for (rows, width, inner) in [(190, 48, 100), (9, 13, 10)] {
        let shapes: [&[usize]; 8] =
            [&[rows, width], &[width], &[width], &[inner, width], &[inner], &[width, inner], &[width], &[width]];
        compared += compare(
            &Case::new(&shapes, &[true; 8]),
            |t, precision| feed_forward(t.matrix(0), branch(t, precision)),
            |t, precision| composed::feed_forward(t.matrix(0), branch(t, precision)),
        );
        // The bias's gradient is a sum without products.
        compared += compare(
            &Case::new(&[&[rows, width], &[inner, width], &[inner]], &[true, true, false]),
            |t, precision| linear(t.matrix(0), t.matrix(1), Some(t.vector(2)), precision),
            |t, precision| composed::linear(t.matrix(0), t.matrix(1), Some(t.vector(2)), precision),
        );
        compared += compare(
            &Case::new(&[&[rows, width], &[width, inner]], &[false; 2]),
            |t, precision| plain_product(t.matrix(0), t.matrix(1), precision),
            |t, precision| product(t.matrix(0), t.matrix(1), precision),
        );
        // Of tensors of bfloat16, which is what other operations make of them.
        compared += compare(
            &Case::new(&[&[rows, width], &[inner, width]], &[false; 2]),
            |t, precision| {
                let of = |i| precision.operand(t.matrix(i));
                crate::precision::widened(times(of(0), of(1).transpose()))
            },
            |t, precision| product(t.matrix(0), t.matrix(1).transpose(), precision),
        );
    }
    assert_eq!(compared, 2 * (9 + 9 + 2 + 9 + 3 + 1 + 1));
}
