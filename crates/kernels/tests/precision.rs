//! Products in bfloat16 beside loops over rounded operands, with their gradients.

#![allow(clippy::print_stdout, reason = "the measured deviations are what a reader of the run looks for")]

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use dinoxide_kernels::{Precision, RopeTable, linear, product, self_attention};

/// To bfloat16, to the nearest and of two as near to the even one, by its bits.
fn rounded(x: f64) -> f64 {
    let bits = (x as f32).to_bits();
    f64::from(f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000))
}

/// Numbers in [−1, 1) that single precision holds exactly.
fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678_9ABC_DEF1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / f64::from(1u32 << 23) - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor<const D: usize>(values: &[f64], shape: [usize; D], device: &Device) -> Tensor<D> {
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("single precision")
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
    let (mut cases, device) = (0, Device::flex().autodiff());
    for [rows, inner, out] in [[1, 1, 1], [5, 24, 13], [17, 3, 40], [40, 130, 33]] {
        let (x, w, b) = (numbers(rows * inner, 1), numbers(out * inner, 2), numbers(out, 3));
        let g = numbers(rows * out, 4);
        let f = |precision| {
            let x = tensor(&x, [rows, inner], &device).require_grad();
            let w = tensor(&w, [out, inner], &device).require_grad();
            let b = tensor(&b, [out], &device).require_grad();
            let y = linear(x.clone(), w.clone(), Some(b.clone()), precision);
            let grads = (y.clone() * tensor(&g, [rows, out], &device)).sum().backward();
            let gradient = "every input has a gradient";
            let [x, w] = [x, w].map(|t| read(t.grad(&grads).expect(gradient)));
            [read(y), x, w, read(b.grad(&grads).expect(gradient))]
        };
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
        let values = |precision| f(precision)[0].clone();
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
    let (mut cases, device) = (0, Device::flex().autodiff());
    for sizes @ [batch, tokens, heads, dim] in [[1, 1, 1, 2], [2, 7, 3, 4], [3, 19, 2, 6], [1, 40, 1, 16]] {
        let scaled = |count: usize, seed: u64| numbers(count, seed).into_iter().map(|v| 2.0 * v).collect::<Vec<_>>();
        let (cos, sin) = (scaled(tokens * dim, 2), scaled(tokens * dim, 3));
        let qkv = scaled(batch * tokens * 3 * heads * dim, 1);
        let g = numbers(batch * tokens * heads * dim, 4);
        let f = |precision| {
            let qkv = tensor(&qkv, [batch, tokens, 3 * heads * dim], &device).require_grad();
            let table = |values: &[f64]| tensor(values, [tokens, dim], &device);
            let rope = RopeTable { cos: table(&cos), sin: table(&sin) };
            let y = self_attention(qkv.clone(), heads, Some(&rope), precision);
            let grads = (y.clone() * tensor(&g, [batch, tokens, heads * dim], &device)).sum().backward();
            [read(y), read(qkv.grad(&grads).expect("a gradient"))]
        };
        let expected = slow(sizes, &qkv, [&cos, &sin], &g);
        assert_near(&format!("{sizes:?}"), &f(Precision::Bf16), &expected);
        let values = |precision| f(precision)[0].clone();
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
