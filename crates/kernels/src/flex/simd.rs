//! Vector instructions chosen at run time, and the elementary functions written for them.
//!
//! The functions are plain scalar code without branches, so that a loop over them becomes vector code. They are
//! `inline(always)`: the instructions that a function may use are those of the function it is inlined into, and
//! [`vectorized`] is where that is decided.

use pulp::{Arch, Simd, WithSimd};

/// Independent partial sums of a reduction: two registers of the widest vectors. Floating-point sums are not reordered by
/// the compiler, so a loop with one sum would run one element at a time.
const LANES: usize = 32;

/// Whether this processor has the vector and fused multiply-add instructions that the loops are written for. On one
/// without (x86-64 before AVX2), `f32::mul_add` would be a function call per element.
pub(super) fn available() -> bool {
    !matches!(Arch::new(), Arch::Scalar)
}

/// Whether this processor has AVX-512.
pub(super) fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    return matches!(Arch::new(), Arch::V4(_));
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Runs a closure compiled for the best instructions of this processor.
///
/// The closure has to be marked `#[inline(always)]`, and everything inside it that does work has to be inlined too: loops
/// and `inline(always)` functions, not `for_each` with closures, which would be compiled apart and without the instructions.
/// It is an `FnMut`, because as an `FnOnce` it would be called through a shim of the compiler's, which is compiled apart.
#[inline(always)]
pub(super) fn vectorized<R>(f: impl FnMut() -> R) -> R {
    struct Closure<F>(F);
    impl<R, F: FnMut() -> R> WithSimd for Closure<F> {
        type Output = R;

        #[inline(always)]
        fn with_simd<S: Simd>(mut self, _: S) -> R {
            (self.0)()
        }
    }
    dispatch(Closure(f))
}

/// Runs what is written in pulp's vector types.
#[inline(always)]
pub(super) fn dispatch<F: WithSimd>(f: F) -> F::Output {
    Arch::new().dispatch(f)
}

/// `e^x`, to 1.1e-7 of its value: 0 below −86.98 (where it is 1.7e-38), infinite above 88.72, NaN for NaN.
///
/// `x = n·ln 2 + r` with `|r| ≤ ln 2 / 2`; the polynomial is the Taylor series of `e^r`, and `2^n` is made from its bits.
#[inline(always)]
#[allow(clippy::excessive_precision, reason = "the two parts of ln 2 are meant digit by digit")]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it leaves the nearest integer in the low bits
    const LN2_HIGH: f32 = 0.693_359_375; // few bits, so that n·LN2_HIGH is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const LOWEST: f32 = -86.98;
    const HIGHEST: f32 = 88.722_84;
    // Comparisons, not `max` and `min`: those would replace NaN.
    let low = if x < LOWEST { LOWEST } else { x };
    let y = if low > HIGHEST { HIGHEST } else { low };
    let shifted = y.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, y));
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = r.mul_add(p, c);
    }
    // 2^(n−1) and then 2, so that n = 128 is still in range.
    let half_power = f32::from_bits(shifted.to_bits().wrapping_add(126) << 23);
    let value = p * half_power * 2.0;
    let value = if x < LOWEST { 0.0 } else { value };
    if x > HIGHEST { f32::INFINITY } else { value }
}

/// `Φ(x) = (1 + erf(x/√2))/2`, to 2e-7.
///
/// `Φ(x) − 1/2` is odd: `x·P(x²)/Q(x²)`, fitted on [0, 5.6] (minimax, 9e-9). Beyond, 0 and 1 are nearer than 1.1e-8.
#[inline(always)]
pub(super) fn normal_cdf(x: f32) -> f32 {
    const P: [f32; 6] = [2.214_536_9e-8, 6.356_471_8e-6, 1.738_470_3e-4, 4.707_237_2e-3, 3.437_578_2e-2, 0.398_942_22];
    const Q: [f32; 6] = [1.180_209_1e-6, 7.510_054e-5, 1.912_957_8e-3, 2.893_989_5e-2, 0.252_833, 1.0];
    let s = x * x;
    let (mut p, mut q) = (P[0], Q[0]);
    for i in 1..6 {
        p = p.mul_add(s, P[i]);
        q = q.mul_add(s, Q[i]);
    }
    let value = x * p / q + 0.5;
    let value = if x < -5.6 { 0.0 } else { value };
    if x > 5.6 { 1.0 } else { value }
}

/// `φ(x)`, the density of the normal distribution.
#[inline(always)]
pub(super) fn normal_density(x: f32) -> f32 {
    const INV_SQRT_TAU: f32 = 0.398_942_3;
    exp(-0.5 * x * x) * INV_SQRT_TAU
}

/// Sums a function of the elements at each place of several slices of one length, in [`LANES`] interleaved partial sums.
#[inline(always)]
pub(super) fn sum_of<const N: usize>(slices: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let split = slices.map(
        #[inline(always)]
        |slice| slice.as_chunks::<LANES>(),
    );
    let (whole, rest) = (split[0].0.len(), split[0].1.len());
    let mut lanes = [0.0f32; LANES];
    for i in 0..whole {
        let chunks: [&[f32; LANES]; N] = split.map(
            #[inline(always)]
            |(chunks, _)| &chunks[i],
        );
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(chunks.map(
                #[inline(always)]
                |chunk| chunk[lane],
            ));
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    let mut total = lanes[0];
    for i in 0..rest {
        total += f(split.map(
            #[inline(always)]
            |(_, rest)| rest[i],
        ));
    }
    total
}

/// `Σ xᵢ`.
#[inline(always)]
pub(super) fn sum(x: &[f32]) -> f32 {
    sum_of(
        [x],
        #[inline(always)]
        |[x]| x,
    )
}

/// `Σ (xᵢ − center)²`.
#[inline(always)]
pub(super) fn squared_distance(x: &[f32], center: f32) -> f32 {
    sum_of(
        [x],
        #[inline(always)]
        |[x]| (x - center) * (x - center),
    )
}

/// `Σ xᵢ·yᵢ`.
#[inline(always)]
pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    sum_of(
        [x, y],
        #[inline(always)]
        |[x, y]| x * y,
    )
}

/// The largest element; NaN is passed over.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &v| if v > max { v } else { max })
}

/// Replaces each `xᵢ` by `e^((xᵢ − shift)·scale)` and returns their sum.
#[inline(always)]
pub(super) fn exp_and_sum(x: &mut [f32], shift: f32, scale: f32) -> f32 {
    for v in x.iter_mut() {
        *v = exp((*v - shift) * scale);
    }
    sum(x)
}

/// The nearest number of bfloat16, of two the even one; NaN for NaN.
#[inline(always)]
pub(super) fn rounded_to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000);
    if x.is_nan() { f32::NAN } else { rounded }
}

/// [`rounded_to_bf16`] of each number.
pub(super) fn round_to_bf16(x: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || {
            for v in x.iter_mut() {
                *v = rounded_to_bf16(*v);
            }
        },
    );
}

/// `xᵢ *= factor`.
#[inline(always)]
pub(super) fn scale(x: &mut [f32], factor: f32) {
    for v in x {
        *v *= factor;
    }
}

/// `sumᵢ += partᵢ`.
#[inline(always)]
pub(super) fn add_assign(sum: &mut [f32], part: &[f32]) {
    for (s, p) in sum.iter_mut().zip(part) {
        *s += p;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every `step`-th f32 from `from` up to `to`, both of one sign.
    fn spread(from: f32, to: f32, step: usize) -> impl Iterator<Item = f32> {
        let (a, b) = (from.to_bits().min(to.to_bits()), from.to_bits().max(to.to_bits()));
        (a..=b).step_by(step).map(f32::from_bits)
    }

    #[test]
    fn exp_is_accurate_to_one_unit_in_the_last_place() {
        let mut worst = 0.0f64;
        let mut count = 0;
        for x in spread(-1e-8, -86.9, 997).chain(spread(1e-8, 88.7, 997)) {
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
            count += 1;
        }
        assert!(count > 400_000, "{count} numbers");
        assert!(worst < 1.1e-7, "worst relative error {worst:e}");
    }

    #[test]
    fn exp_has_its_limits() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn normal_cdf_is_accurate_to_2e_7() {
        let mut worst = 0.0f64;
        let mut count = 0;
        for i in -200_000..=200_000 {
            let x = i as f32 * 5e-5;
            let exact = 0.5 + 0.5 * libm::erf(f64::from(x) * std::f64::consts::FRAC_1_SQRT_2);
            worst = worst.max((f64::from(normal_cdf(x)) - exact).abs());
            count += 1;
        }
        assert_eq!(count, 400_001);
        assert!(worst < 2.0e-7, "worst absolute error {worst:e}");
        assert!(normal_cdf(f32::NAN).is_nan());
    }

    #[test]
    fn normal_density_is_accurate_to_1e_7() {
        for i in -1000..=1000 {
            let x = i as f32 * 0.01;
            let exact = (-0.5 * f64::from(x) * f64::from(x)).exp() / (2.0 * std::f64::consts::PI).sqrt();
            assert!((f64::from(normal_density(x)) - exact).abs() < 1e-7, "at {x}");
        }
    }

    #[test]
    fn reductions_cover_every_element_at_every_length() {
        for len in 0..100 {
            let x: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin()).collect();
            let y: Vec<f32> = (0..len).map(|i| (i as f32 * 1.3).cos()).collect();
            let close = |a: f32, b: f32| assert!((a - b).abs() < 1e-4, "length {len}: {a} and {b}");
            close(sum(&x), x.iter().sum());
            close(dot(&x, &y), x.iter().zip(&y).map(|(a, b)| a * b).sum());
            close(squared_distance(&x, 0.5), x.iter().map(|v| (v - 0.5) * (v - 0.5)).sum());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
