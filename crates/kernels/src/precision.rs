//! In what precision matrix products are computed. All casts of the workspace's tensors are in [`product`].

use burn::tensor::{DType, FloatDType, Tensor};
use serde::{Deserialize, Serialize};

/// What matrix products are computed in. Every operation that contains products takes one; this is where to read what it
/// does.
///
/// Weights, gradients of weights, activations between operations, losses, optimizer and running mean are in single
/// precision under each. Under [`Bf16`](Self::Bf16) the two operands of a product are rounded to bfloat16 (8 bits of
/// mantissa, the exponents of single precision) as they enter it, and its result as it leaves it, whereupon it is single
/// precision again. So are the two products of its gradient, with the gradient of the result as an operand. Sums of products
/// are formed in single precision: in the accumulators of a GPU's matrix units, and on the CPU, where rounded operands are
/// multiplied as single-precision numbers. The two differ by the order of the sums.
///
/// These are the products:
/// * of linear layers: packed projections and output projection of attention, feed-forward layers, pointwise layers of a
///   ConvNeXt, the layers of projection heads and projectors. The bias is added to the result, in single precision;
/// * of the patch embedding and of a ConvNeXt's stem and downsampling, which are linear layers;
/// * of attention: `q·kᵀ`, and probabilities times values;
/// * of the prototypes: logits, and in the losses the two products of their gradient.
///
/// Everything else is single precision from beginning to end: norms, softmax, GELU and SiLU, rotary positions, layer scale
/// and residual sums, depthwise convolution, interpolation of positions, the normalisation of bottleneck and prototypes,
/// the losses from the logits on, KoLeo, Gram and feature losses, centering, clipping, AdamW, the teacher's running mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Single precision.
    #[default]
    Fp32,
    /// Operands and results rounded to bfloat16.
    Bf16,
}

/// The matrix product `a·b` in a precision.
///
/// # Shapes
/// `a [.., M, I]`, `b [.., I, N]` → `[.., M, N]`.
///
/// # Panics
/// If the operands are of two types, or not of single precision where they are to be rounded: some backends would read one
/// as the other.
pub fn product<const D: usize>(a: Tensor<D>, b: Tensor<D>, precision: Precision) -> Tensor<D> {
    assert_eq!(a.dtype(), b.dtype(), "a product of two types");
    match precision {
        Precision::Fp32 => a.matmul(b),
        Precision::Bf16 => {
            assert_eq!(a.dtype(), DType::F32, "what is rounded here has to be of single precision");
            // A cast's gradient is a cast back, so gradients are rounded where values are and arrive in single precision.
            a.cast(FloatDType::BF16).matmul(b.cast(FloatDType::BF16)).cast(FloatDType::F32)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flex::testing::{Case, numbers, run};
    use crate::{RopeTable, linear, self_attention};
    use burn::tensor::Device;

    /// To bfloat16, to the nearest and of two as near to the even one, by its bits.
    fn rounded(x: f64) -> f64 {
        let bits = (x as f32).to_bits();
        f64::from(f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000))
    }

    fn doubles(count: usize, seed: u64) -> Vec<f64> {
        numbers(count, seed).into_iter().map(f64::from).collect()
    }

    /// `Σ` over `0..count` of products of rounded operands, rounded.
    fn sum(count: usize, operands: impl Fn(usize) -> (f64, f64)) -> f64 {
        rounded((0..count).map(&operands).map(|(a, b)| rounded(a) * rounded(b)).sum())
    }

    /// Asserts that at most one value in a hundred differs by more than rounding of single precision does, and none by more
    /// than 2⁻⁷ of the largest. Some differ: sums in another order fall on the other side between two numbers of bfloat16.
    fn assert_near(what: &str, actual: &[Vec<f32>], expected: &[Vec<f64>]) {
        assert_eq!(actual.len(), expected.len());
        for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
            assert_eq!(a.len(), e.len(), "{what}, result {i}");
            let largest = e.iter().fold(1e-3f64, |most, v| most.max(v.abs()));
            let off: Vec<f64> = a.iter().zip(e).map(|(a, e)| (f64::from(*a) - e).abs() / largest).collect();
            let worst = off.iter().fold(0.0f64, |m, v| if *v > m || v.is_nan() { *v } else { m });
            let many = off.iter().filter(|off| **off > 1e-5).count();
            println!("{what} {i}: {worst:.2e} {many}/{}", a.len());
            assert!(worst <= 1.0 / 128.0, "{what}, result {i}: off by {worst} of the largest");
            assert!(100 * many <= a.len().max(100), "{what}, result {i}: {many} of {} are not equal", a.len());
        }
    }

    #[test]
    fn a_linear_layer_equals_loops_over_rounded_operands() {
        let mut cases = 0;
        for [rows, inner, out] in [[1, 1, 1], [5, 24, 13], [17, 3, 40], [40, 130, 33]] {
            let case = Case::new(&[&[rows, inner], &[out, inner], &[out]], &[true; 3]);
            let f = |precision| run(&case, |t| linear(t.matrix(0), t.matrix(1), Some(t.vector(2)), precision));
            let (x, w, b) = (doubles(rows * inner, 1), doubles(out * inner, 2), doubles(out, 3));
            let g = doubles(rows * out, 99);
            let each = |m: usize, n: usize, f: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
                (0..m * n).map(|i| f(i / n, i % n)).collect()
            };
            let expected = [
                each(rows, out, &|i, o| sum(inner, |c| (x[i * inner + c], w[o * inner + c])) + b[o]),
                each(rows, inner, &|i, c| sum(out, |o| (g[i * out + o], w[o * inner + c]))),
                each(out, inner, &|o, c| sum(rows, |i| (g[i * out + o], x[i * inner + c]))),
                each(1, out, &|_, o| (0..rows).map(|i| g[i * out + o]).sum()),
            ];
            assert_near(&format!("{rows}, {inner}, {out}"), &f(Precision::Bf16), &expected);
            let values = |precision| f(precision).remove(0);
            assert_ne!(values(Precision::Bf16), values(Precision::Fp32));
            cases += 1;
        }
        assert_eq!(cases, 4);
    }

    /// Value and gradient of attention for the gradient `g` of the value, on `qkv [B, N, 3·D]`.
    fn slow([batch, tokens, heads, dim]: [usize; 4], qkv: &[f64], [cos, sin]: [&[f64]; 2], g: &[f64]) -> [Vec<f64>; 2] {
        let (width, half) = (heads * dim, dim / 2);
        let (mut value, mut gradient) = (vec![0.0; batch * tokens * width], vec![0.0; qkv.len()]);
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            // Where a token's part 0, 1, 2 (query, key, value) begins; and its result.
            let at = |n: usize, part: usize| (b * tokens + n) * 3 * width + part * width + h * dim;
            let to = |n: usize| (b * tokens + n) * width + h * dim;
            let turned = |n: usize, part: usize, c: usize| {
                let x = &qkv[at(n, part)..][..dim];
                let other = if c < half { -x[c + half] } else { x[c - half] };
                // In single precision, as what goes into the product is.
                f64::from((x[c] * cos[n * dim + c]) as f32 + (other * sin[n * dim + c]) as f32)
            };
            let root = (dim as f64).sqrt();
            let mut probabilities = vec![0.0; tokens * tokens];
            for (i, row) in probabilities.chunks_exact_mut(tokens).enumerate() {
                for (j, p) in row.iter_mut().enumerate() {
                    *p = (sum(dim, |c| (turned(i, 0, c), turned(j, 1, c))) / root).exp();
                }
                let total: f64 = row.iter().sum();
                row.iter_mut().for_each(|p| *p /= total);
            }
            let p = |i: usize, j: usize| probabilities[i * tokens + j];
            // Of the scores before their division by the root.
            let mut dscores = vec![0.0; tokens * tokens];
            for i in 0..tokens {
                let dp: Vec<f64> = (0..tokens).map(|j| sum(dim, |c| (g[to(i) + c], qkv[at(j, 2) + c]))).collect();
                let mean: f64 = (0..tokens).map(|j| p(i, j) * dp[j]).sum();
                (0..tokens).for_each(|j| dscores[i * tokens + j] = p(i, j) * (dp[j] - mean) / root);
            }
            for (n, c) in (0..tokens).flat_map(|n| (0..dim).map(move |c| (n, c))) {
                value[to(n) + c] = sum(tokens, |j| (p(n, j), qkv[at(j, 2) + c]));
                gradient[at(n, 2) + c] = sum(tokens, |i| (p(i, n), g[to(i) + c]));
                let dturned = [
                    sum(tokens, |j| (dscores[n * tokens + j], turned(j, 1, c))),
                    sum(tokens, |i| (dscores[i * tokens + n], turned(i, 0, c))),
                ];
                // `c` went into its own place, and into its partner's through the sine.
                let (partner, sign) = if c < half { (c + half, 1.0) } else { (c - half, -1.0) };
                for (part, d) in dturned.into_iter().enumerate() {
                    gradient[at(n, part) + c] += d * cos[n * dim + c];
                    gradient[at(n, part) + partner] -= sign * d * sin[n * dim + c];
                }
            }
        }
        [value, gradient]
    }

    #[test]
    fn attention_with_rotary_positions_equals_loops_over_rounded_operands() {
        let mut cases = 0;
        for sizes @ [batch, tokens, heads, dim] in [[1, 1, 1, 2], [2, 7, 3, 4], [3, 19, 2, 6], [1, 40, 1, 16]] {
            let (packed, rows): ([usize; 3], [usize; 2]) = ([batch, tokens, 3 * heads * dim], [tokens, dim]);
            let case = Case::new(&[&packed, &rows, &rows], &[true, false, false]).scaled(2.0);
            let f = |precision| {
                run(&case, |t| {
                    let rope = RopeTable { cos: t.matrix(1), sin: t.matrix(2) };
                    self_attention(t.cube(0), heads, Some(&rope), precision)
                })
            };
            let scaled =
                |count: usize, seed: u64| doubles(count, seed).into_iter().map(|v| 2.0 * v).collect::<Vec<_>>();
            let (cos, sin) = (scaled(tokens * dim, 2), scaled(tokens * dim, 3));
            let g = doubles(batch * tokens * heads * dim, 99);
            let expected = slow(sizes, &scaled(packed.iter().product(), 1), [&cos, &sin], &g);
            assert_near(&format!("{sizes:?}"), &f(Precision::Bf16), &expected);
            let values = |precision| f(precision).remove(0);
            assert_ne!(values(Precision::Bf16), values(Precision::Fp32));
            cases += 1;
        }
        assert_eq!(cases, 4);
    }

    #[test]
    fn results_and_gradients_are_in_single_precision() {
        let device = Device::flex().autodiff();
        let [a, b] = [[3, 4], [4, 2]].map(|shape| Tensor::<2>::ones(shape, &device).require_grad());
        let y = product(a.clone(), b.clone(), Precision::Bf16);
        assert_eq!(y.dtype(), DType::F32);
        let grads = y.sum().backward();
        for x in [a, b] {
            assert_eq!(x.grad(&grads).expect("a gradient").dtype(), DType::F32);
        }
    }

    #[test]
    #[should_panic(expected = "what is rounded here has to be of single precision")]
    fn operands_that_were_rounded_elsewhere_are_refused() {
        let x = Tensor::<2>::ones([2, 2], &Device::flex()).cast(FloatDType::BF16);
        product(x.clone(), x, Precision::Bf16);
    }

    #[test]
    #[should_panic(expected = "a product of two types")]
    fn operands_of_two_types_are_refused() {
        let x = Tensor::<2>::ones([2, 2], &Device::flex());
        product(x.clone().cast(FloatDType::BF16), x, Precision::Fp32);
    }
}
