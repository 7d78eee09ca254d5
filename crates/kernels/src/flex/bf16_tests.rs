//! The fused operations in bfloat16: each as near to single precision as its definition, and not equal to it.

use burn::tensor::Tensor;

use crate::Precision::{self, Bf16, Fp32};
use crate::testing::{Case, Inputs, assert_as_near, attention_case, branch, feed_forward_case, rope, run};
use crate::{
    attention, composed, feed_forward, linear, plain_product, product, selected_attention, self_attention, times,
};

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
        let case = attention_case([batch, tokens, heads, head_dim], [true; 8]);
        compared += compare(
            &case,
            |t, precision| attention(t.cube(0), branch(t, true, true, precision), heads, Some(&rope(t))),
            |t, precision| composed::attention(t.cube(0), branch(t, true, true, precision), heads, Some(&rope(t))),
        );
        let rows: Vec<usize> = (0..batch * tokens).filter(|i| i % 3 != 1).collect();
        compared += compare(
            &case,
            |t, precision| {
                selected_attention(t.cube(0), &rows, branch(t, true, true, precision), heads, Some(&rope(t)))
            },
            |t, precision| {
                composed::selected_attention(t.cube(0), &rows, branch(t, true, true, precision), heads, Some(&rope(t)))
            },
        );
        let packed = Case::new(&[&[batch, tokens, 3 * heads * head_dim]], &[true]);
        compared += compare(
            &packed,
            |t, precision| self_attention(t.cube(0), heads, None, precision),
            |t, precision| composed::self_attention(t.cube(0), heads, None, precision),
        );
    }
    for (rows, width, inner) in [(190, 48, 100), (9, 13, 10)] {
        compared += compare(
            &feed_forward_case([rows, width, inner], [true; 8]),
            |t, precision| feed_forward(t.matrix(0), branch(t, true, true, precision)),
            |t, precision| composed::feed_forward(t.matrix(0), branch(t, true, true, precision)),
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
