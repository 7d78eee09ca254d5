//! Matrix products on slices: the one place that calls the `gemm` crate.
//!
//! Products run on the processor's matrix unit where it has one and they are large enough ([`amx`]). Elsewhere they are the
//! `gemm` crate's; in bfloat16 operands are rounded in copies and multiplied as numbers of single precision, and the result is
//! rounded.
//!
//! A product that uses several threads is cut into tiles of the result, each computed by one thread: with the crate a tenth
//! faster than its own threads on two cores, and which threads there are does not change the tiles, nor the bits.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::memory::copied;
use super::{ELEMENT_BLOCK, simd};
use crate::Precision;

/// How a result is cut into tiles.
#[derive(Clone, Copy, Debug)]
struct Tiling {
    /// Rows or columns of the largest tile. Its operands lie in the caches of one core, and packing them costs little beside
    /// the product.
    largest: usize,
    /// Rows of a tile are a multiple of this, which the rows of a kernel divide.
    rows: usize,
    /// Columns of a tile are a multiple of this, which the columns of a kernel divide: other ones fall to a slower kernel.
    cols: usize,
}

/// For kernels of 6 × 16 elements, and second-level caches from 256 kB on.
const AVX2: Tiling = Tiling { largest: 288, rows: 48, cols: 48 };

/// For kernels of 6 × 64 elements, and second-level caches of 1 MB and more.
const AVX512: Tiling = Tiling { largest: 768, rows: 48, cols: 64 };

/// Tiles that a product is cut into at least, so that no thread waits long for another, as far as their units allow.
const LEAST_TILES: usize = 8;

/// Multiplications below which a product is not worth waking another thread for.
const LEAST_SHARED_WORK: usize = 1 << 19;

/// A strided view of a row-major or column-major matrix inside a slice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A dense row-major matrix.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows start `row_stride` elements apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let extent = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
        assert!(
            extent <= data.len(),
            "matrix: {rows} rows of {cols} with stride {row_stride} do not fit in {} elements",
            data.len()
        );
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view.
    pub(crate) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Its elements rounded to bfloat16, in the same order without gaps.
    fn rounded(self) -> Vec<f32> {
        let (lines, len, stride) = match self.col_stride {
            1 => (self.rows, self.cols, self.row_stride),
            _ => (self.cols, self.rows, self.col_stride),
        };
        if len == stride {
            return copied(&self.data[..lines * len], ELEMENT_BLOCK, |_, block| simd::round_to_bf16(block));
        }
        let mut dense = Vec::with_capacity(lines * len);
        (0..lines).for_each(|line| dense.extend_from_slice(&self.data[line * stride..][..len]));
        simd::round_to_bf16(&mut dense);
        dense
    }

    /// The view of the same elements in the memory that [`rounded`](Self::rounded) made.
    fn on(self, data: &'a [f32]) -> Self {
        match self.col_stride {
            1 => Self { data, row_stride: self.cols, ..self },
            _ => Self { data, col_stride: self.rows, ..self },
        }
    }

    /// The view of some of its rows.
    fn rows_of(self, rows: &Range<usize>) -> Self {
        assert!(rows.end <= self.rows, "matrix: rows {rows:?} of {}", self.rows);
        let first = if rows.is_empty() || self.cols == 0 { 0 } else { rows.start * self.row_stride };
        Self { data: &self.data[first..], rows: rows.len(), ..self }
    }
}

/// What a product does with the values that its destination holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Destination {
    /// They are overwritten.
    Overwrite,
    /// The product is added to them.
    Accumulate,
}

/// How many threads a product uses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Threads {
    /// The calling thread: for products inside a parallel loop.
    One,
    /// Those of the current rayon pool.
    Pool,
}

/// `out = a·b` or `out += a·b`, where `out` is row-major with rows `row_stride` elements apart. In bfloat16 the
/// operands are rounded, and the result unless it is added to others.
pub(crate) fn multiply_into(
    out: &mut [f32],
    row_stride: usize,
    destination: Destination,
    [a, b]: [Matrix; 2],
    precision: Precision,
    threads: Threads,
) {
    let (rows, cols) = (a.rows, b.cols);
    assert_eq!(a.cols, b.rows, "product: {}x{} times {}x{}", a.rows, a.cols, b.rows, b.cols);
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(row_stride >= cols, "product: rows of {cols} elements overlap at stride {row_stride}");
    let extent = (rows - 1) * row_stride + cols;
    assert!(extent <= out.len(), "product: {rows}x{cols} does not fit in {} elements", out.len());
    if a.cols == 0 {
        if destination == Destination::Overwrite {
            out[..extent].chunks_mut(row_stride).for_each(|row| row[..cols].fill(0.0));
        }
        return;
    }
    // SAFETY: `out` covers `extent` elements and its rows do not overlap; the views cover their own extents, which
    // `Matrix::strided` checked; `out` is borrowed mutably, so it overlaps neither of them.
    #[allow(unsafe_code, reason = "the `gemm` crate takes pointers; every extent is asserted above")]
    unsafe {
        call(out.as_mut_ptr(), row_stride, destination, [a, b], Unit::of(precision, a, b), threads);
    }
}

/// `a·b` as a new dense matrix, on the threads of the current pool. In bfloat16 operands and result are rounded.
pub(crate) fn multiply(a: Matrix, b: Matrix, precision: Precision) -> Vec<f32> {
    assert_eq!(a.cols, b.rows, "product: {}x{} times {}x{}", a.rows, a.cols, b.rows, b.cols);
    let len = a.rows * b.cols;
    if len == 0 || a.cols == 0 {
        return vec![0.0; len];
    }
    let mut out = Vec::with_capacity(len);
    // SAFETY: as in `multiply_into`, and a product with a non-empty inner dimension writes each of the `len` elements
    // without reading it first.
    #[allow(unsafe_code, reason = "zeroing the result first would cost a pass over it")]
    unsafe {
        let unit = Unit::of(precision, a, b);
        call(out.as_mut_ptr(), b.cols, Destination::Overwrite, [a, b], unit, Threads::Pool);
        out.set_len(len);
    }
    out
}

/// What computes the tiles of a product.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Unit {
    /// The vectors, by the `gemm` crate.
    Vectors,
    /// The same, on operands that were rounded to bfloat16; the result is rounded too.
    Rounding,
    /// The matrix unit.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(Precision),
}

impl Unit {
    /// Of the product of two matrices.
    fn of(precision: Precision, a: Matrix, b: Matrix) -> Self {
        Self::for_size(precision, [a.rows, a.cols, b.cols])
    }

    /// Of a product of `rows × inner` and `inner × cols`.
    fn for_size(precision: Precision, [rows, inner, cols]: [usize; 3]) -> Self {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if amx::pays(precision, [rows, inner, cols]) && amx::available() {
            return Self::Amx(precision);
        }
        let _ = (rows, inner, cols);
        match precision {
            Precision::Fp32 => Self::Vectors,
            Precision::Bf16 => Self::Rounding,
        }
    }
}

/// # Safety
/// `out` points to `a.rows` non-overlapping rows of `b.cols` elements, `row_stride` apart, which nothing else aliases, and
/// `a.cols == b.rows`; and the processor has the unit.
#[allow(unsafe_code, reason = "the `gemm` crate takes pointers")]
unsafe fn call(
    out: *mut f32,
    row_stride: usize,
    destination: Destination,
    [a, b]: [Matrix; 2],
    unit: Unit,
    threads: Threads,
) {
    let copies = (unit == Unit::Rounding).then(|| [a, b].map(|operand| operand.rounded()));
    let [a, b] = match &copies {
        Some([rounded_a, rounded_b]) => [a.on(rounded_a), b.on(rounded_b)],
        None => [a, b],
    };
    let out = Shared(out);
    let parallel = matches!(threads, Threads::Pool) && a.rows * b.cols * a.cols >= LEAST_SHARED_WORK;
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Unit::Amx(precision) = unit {
        // SAFETY: the caller's promises.
        return unsafe { amx::multiply(out, row_stride, destination, [a, b], precision, parallel) };
    }
    let tile = |(rows, cols): (Range<usize>, Range<usize>)| {
        let (a, b) = (a.rows_of(&rows), b.t().rows_of(&cols).t());
        // SAFETY: tiles lie within the result and do not overlap.
        let out = unsafe { out.at(rows.start * row_stride + cols.start) };
        // SAFETY: the caller's promise for `out`, and the checked extents of `a` and `b`.
        unsafe {
            gemm::gemm(
                a.rows,
                b.cols,
                a.cols,
                out,
                1,
                row_stride as isize,
                destination == Destination::Accumulate,
                a.data.as_ptr(),
                a.col_stride as isize,
                a.row_stride as isize,
                b.data.as_ptr(),
                b.col_stride as isize,
                b.row_stride as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
            if unit == Unit::Rounding && destination == Destination::Overwrite {
                for row in 0..a.rows {
                    simd::round_to_bf16(std::slice::from_raw_parts_mut(out.add(row * row_stride), b.cols));
                }
            }
        }
    };
    match parallel {
        true => tiles(a.rows, b.cols, if simd::has_avx512() { AVX512 } else { AVX2 }).into_par_iter().for_each(tile),
        false => tile((0..a.rows, 0..b.cols)),
    }
}

/// A result that several threads write tiles of.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: the tiles that are written through the copies do not overlap.
#[allow(unsafe_code, reason = "the `gemm` crate takes pointers")]
unsafe impl Send for Shared {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "the `gemm` crate takes pointers")]
unsafe impl Sync for Shared {}

impl Shared {
    /// # Safety
    /// The element `offset` belongs to the result.
    #[allow(unsafe_code, reason = "the `gemm` crate takes pointers")]
    unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

/// The tiles of a `rows × cols` result: of nearly equal size, row by row.
fn tiles(rows: usize, cols: usize, tiling: Tiling) -> Vec<(Range<usize>, Range<usize>)> {
    let (mut down, mut across) = (rows.div_ceil(tiling.largest), cols.div_ceil(tiling.largest));
    while down * across < LEAST_TILES {
        let (height, width) = (rows.div_ceil(down), cols.div_ceil(across));
        match (height > tiling.rows, width > tiling.cols) {
            (false, false) => break,
            (true, wide) if !wide || height >= width => down += 1,
            _ => across += 1,
        }
    }
    let row_of_tiles = |rows: Range<usize>| cut(cols, across, tiling.cols).map(move |cols| (rows.clone(), cols));
    cut(rows, down, tiling.rows).flat_map(row_of_tiles).collect()
}

/// `len` rows or columns in about as many parts, each but the last a multiple of `unit`.
fn cut(len: usize, parts: usize, unit: usize) -> impl Iterator<Item = Range<usize>> {
    let step = len.div_ceil(parts).next_multiple_of(unit);
    (0..len).step_by(step).map(move |start| start..(start + step).min(len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision::{Bf16, Fp32};
    use crate::testing::numbers;

    fn counted(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7) % 11) as f32 - 5.0).collect()
    }

    #[test]
    fn product_equals_the_naive_loop_for_every_orientation() {
        let mut cases = 0;
        for (m, k, n) in [(1, 1, 1), (1, 5, 3), (4, 1, 2), (3, 2, 1), (17, 33, 9), (40, 7, 65)] {
            for (transposed_a, transposed_b) in [(false, false), (true, false), (false, true), (true, true)] {
                let (a_data, b_data) = (counted(m * k), counted(k * n));
                let a = if transposed_a { Matrix::new(&a_data, k, m).t() } else { Matrix::new(&a_data, m, k) };
                let b = if transposed_b { Matrix::new(&b_data, n, k).t() } else { Matrix::new(&b_data, k, n) };
                let at = |x: &Matrix, i: usize, j: usize| x.data[i * x.row_stride + j * x.col_stride];
                let expected: Vec<f32> =
                    (0..m * n).map(|e| (0..k).map(|l| at(&a, e / n, l) * at(&b, l, e % n)).sum()).collect();
                assert_eq!(multiply(a, b, Fp32), expected, "{m}x{k}x{n}");

                // Into rows that are two elements longer than needed, which keep what they held.
                let stride = n + 2;
                let mut out = vec![1.0; m * stride];
                multiply_into(&mut out, stride, Destination::Accumulate, [a, b], Fp32, Threads::One);
                for (i, row) in out.chunks(stride).enumerate() {
                    let wanted: Vec<f32> = expected[i * n..][..n].iter().map(|v| 1.0 + v).collect();
                    assert_eq!(row[..n], wanted);
                    assert_eq!(row[n..], [1.0, 1.0]);
                }
                cases += 1;
            }
        }
        assert_eq!(cases, 24);
    }

    #[test]
    fn tiles_cover_the_result_once_and_threads_do_not_change_the_bits() {
        let mut cases = 0;
        for (m, k, n) in
            [(289, 40, 47), (1576, 24, 577), (49, 300, 1153), (96, 520, 96), (1, 1000, 4099), (700, 3, 300)]
        {
            let numbers = |len: usize| (0..len).map(|i| ((i * 37) % 101) as f32 * 0.37 - 18.0).collect::<Vec<_>>();
            let (a_data, b_data) = (numbers(m * k), numbers(k * n));
            for (transposed_a, transposed_b) in [(false, false), (true, false), (false, true)] {
                let a = if transposed_a { Matrix::new(&a_data, k, m).t() } else { Matrix::new(&a_data, m, k) };
                let b = if transposed_b { Matrix::new(&b_data, n, k).t() } else { Matrix::new(&b_data, k, n) };
                let with = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
                    let stride = n + 3;
                    let mut out = vec![1.0; m * stride];
                    pool.install(|| {
                        multiply_into(&mut out, stride, Destination::Accumulate, [a, b], Fp32, Threads::Pool);
                    });
                    out
                };
                let (one, three) = (with(1), with(3));
                assert!(one.iter().zip(&three).all(|(x, y)| x.to_bits() == y.to_bits()), "{m}x{k}x{n}");
                let whole = multiply(a, b, Fp32);
                for (i, row) in one.chunks(n + 3).enumerate() {
                    let scale = whole.iter().fold(1.0, |most: f32, v| most.max(v.abs()));
                    assert_eq!(row[n..], [1.0; 3]);
                    for j in 0..n {
                        let at =
                            |x: &Matrix, i: usize, j: usize| f64::from(x.data[i * x.row_stride + j * x.col_stride]);
                        let naive: f64 = (0..k).map(|l| at(&a, i, l) * at(&b, l, j)).sum();
                        assert!((f64::from(row[j]) - 1.0 - naive).abs() < 1e-5 * f64::from(scale), "{i} {j}");
                        assert!((f64::from(whole[i * n + j]) - naive).abs() < 1e-5 * f64::from(scale), "{i} {j}");
                    }
                }
                cases += 1;
            }
        }
        assert_eq!(cases, 18);
    }

    /// What computes products here.
    fn units(precision: Precision) -> Vec<Unit> {
        let mut units = vec![if precision == Fp32 { Unit::Vectors } else { Unit::Rounding }];
        let best = Unit::for_size(precision, [256; 3]);
        units.extend((best != units[0]).then_some(best));
        units
    }

    fn multiply_on(unit: Unit, out: &mut [f32], stride: usize, destination: Destination, factors: [Matrix; 2]) {
        assert!(out.len() >= (factors[0].rows - 1) * stride + factors[1].cols);
        // SAFETY: the rows lie in `out`, and the unit is one that this processor has.
        #[allow(unsafe_code, reason = "the unit is chosen here")]
        unsafe {
            call(out.as_mut_ptr(), stride, destination, factors, unit, Threads::Pool);
        }
    }

    #[test]
    fn in_bfloat16_every_unit_rounds_operands_and_result_in_every_orientation() {
        let numbers = |len: usize| (0..len).map(|i| ((i * 37) % 101) as f32 * 0.37 - 18.0).collect::<Vec<_>>();
        let mut cases = 0;
        // The depth of the last is cut into pieces; strips, steps and columns are whole in one alone.
        for (m, k, n) in
            [(1, 1, 1), (16, 16, 16), (64, 96, 32), (37, 70, 45), (33, 17, 100), (200, 31, 1030), (40, 2500, 21)]
        {
            for (transposed_a, transposed_b) in [(false, false), (true, false), (false, true), (true, true)] {
                let (a_data, b_data) = (numbers(m * k), numbers(k * n + 5));
                let a = if transposed_a { Matrix::new(&a_data, k, m).t() } else { Matrix::new(&a_data, m, k) };
                let b = if transposed_b { Matrix::new(&b_data, n, k).t() } else { Matrix::new(&b_data, k, n) };
                let at = |x: &Matrix, i: usize, j: usize| {
                    let mut value = [x.data[i * x.row_stride + j * x.col_stride]];
                    simd::round_to_bf16(&mut value);
                    f64::from(value[0])
                };
                for unit in units(Bf16) {
                    let stride = n + 3;
                    let (mut over, mut onto) = (vec![1.0; m * stride], vec![1.0; m * stride]);
                    multiply_on(unit, &mut over, stride, Destination::Overwrite, [a, b]);
                    multiply_on(unit, &mut onto, stride, Destination::Accumulate, [a, b]);
                    for (i, (over, onto)) in over.chunks(stride).zip(onto.chunks(stride)).enumerate() {
                        assert_eq!([&over[n..], &onto[n..]], [[1.0; 3]; 2], "{unit:?} {m}x{k}x{n}: what lies beside");
                        for j in 0..n {
                            let terms = (0..k).map(|l| at(&a, i, l) * at(&b, l, j));
                            let (exact, size) = terms.fold((0.0, 1.0), |(sum, size), t| (sum + t, size + t.abs()));
                            let summed = 1e-6 * size;
                            // Half the distance of two numbers of bfloat16.
                            let bound = exact.abs() / 256.0 + summed;
                            let found = f64::from(over[j]);
                            assert!((found - exact).abs() <= bound, "{unit:?} {m}x{k}x{n}: {found} for {exact}");
                            assert_eq!(over[j].to_bits() & 0xffff, 0, "{unit:?} {m}x{k}x{n}: {found} is not rounded");
                            let added = f64::from(onto[j]) - 1.0 - exact;
                            assert!(added.abs() <= summed, "{unit:?} {m}x{k}x{n}: {added} beside the sum");
                        }
                    }
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, 7 * 4 * units(Bf16).len());
    }

    #[test]
    fn in_single_precision_every_unit_is_as_exact_as_fused_multiply_adds() {
        let mut cases = 0;
        // Strips are whole in the second alone. The inner dimension of the last three is cut into pieces, that of the last one
        // and the columns of the one before into panels.
        for (m, k, n) in
            [(1, 1, 1), (64, 96, 32), (37, 70, 45), (33, 17, 100), (40, 2500, 21), (70, 300, 8300), (65, 6100, 190)]
        {
            for (transposed_a, transposed_b) in [(false, false), (true, false), (false, true), (true, true)] {
                let (a_data, b_data) = (numbers(m * k, 3), numbers(k * n, 4));
                let a = if transposed_a { Matrix::new(&a_data, k, m).t() } else { Matrix::new(&a_data, m, k) };
                let b = if transposed_b { Matrix::new(&b_data, n, k).t() } else { Matrix::new(&b_data, k, n) };
                let at = |x: &Matrix, i: usize, j: usize| f64::from(x.data[i * x.row_stride + j * x.col_stride]);
                // All of the result, or every so many elements of it.
                let seen: Vec<(usize, usize)> =
                    (0..m * n).step_by(1 + m * n * k / 3_000_000).map(|e| (e / n, e % n)).collect();
                let exact: Vec<f64> =
                    seen.iter().map(|&(i, j)| (0..k).map(|l| at(&a, i, l) * at(&b, l, j)).sum()).collect();
                let error = |unit: Unit, destination: Destination| {
                    let stride = n + 3;
                    let before = if destination == Destination::Accumulate { 1.0 } else { 0.0 };
                    let mut out = vec![1.0; m * stride];
                    multiply_on(unit, &mut out, stride, destination, [a, b]);
                    for row in out.chunks(stride) {
                        assert_eq!(row[n..], [1.0; 3], "{unit:?} {m}x{k}x{n}: what lies beside");
                    }
                    let squares = seen
                        .iter()
                        .zip(&exact)
                        .map(|(&(i, j), exact)| (f64::from(out[i * stride + j]) - before - exact).powi(2));
                    (squares.sum::<f64>() / exact.iter().map(|v| v * v).sum::<f64>()).sqrt()
                };
                for destination in [Destination::Overwrite, Destination::Accumulate] {
                    // A few units in the last place, after as many additions.
                    let most = error(Unit::Vectors, destination).max(2e-7);
                    for unit in units(Fp32) {
                        let error = error(unit, destination);
                        assert!(error <= most, "{unit:?} {m}x{k}x{n} {destination:?}: {error:.1e}, not {most:.1e}");
                        cases += 1;
                    }
                }
            }
        }
        assert_eq!(cases, 7 * 4 * 2 * units(Fp32).len());
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for precision in [Fp32, Bf16] {
            for unit in units(precision) {
                let (mut a, b) = (vec![1.0; 20 * 40], vec![1.0; 40 * 24]);
                (a[3 * 40 + 7], a[5 * 40]) = (f32::NAN, f32::INFINITY);
                let mut out = vec![0.0; 20 * 24];
                let factors = [Matrix::new(&a, 20, 40), Matrix::new(&b, 40, 24)];
                multiply_on(unit, &mut out, 24, Destination::Overwrite, factors);
                // Of what is infinite, parts are no numbers.
                let in_parts = unit != units(Fp32)[0] && precision == Fp32;
                for (i, row) in out.chunks(24).enumerate() {
                    let expected: fn(f32) -> bool = match i {
                        3 => f32::is_nan,
                        5 if in_parts => f32::is_nan,
                        5 => |v| v == f32::INFINITY,
                        _ => |v| v == 40.0,
                    };
                    assert!(row.iter().all(|v| expected(*v)), "{unit:?}, row {i}: {row:?}");
                }
            }
        }
    }

    #[test]
    fn whatever_the_unit_threads_do_not_change_the_bits() {
        let mut cases = 0;
        for (m, k, n) in [(289, 1100, 47), (1576, 24, 577), (96, 520, 96), (65, 6100, 190)] {
            let (a_data, b_data) = (numbers(m * k, 5), numbers(k * n, 6));
            let factors = [Matrix::new(&a_data, m, k), Matrix::new(&b_data, n, k).t()];
            for unit in [Fp32, Bf16].into_iter().flat_map(units) {
                let with = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
                    let mut out = vec![1.0; m * n];
                    pool.install(|| multiply_on(unit, &mut out, n, Destination::Accumulate, factors));
                    out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                assert!(with(1) == with(3), "{unit:?} {m}x{k}x{n}");
                cases += 1;
            }
        }
        assert_eq!(cases, 4 * (units(Fp32).len() + units(Bf16).len()));
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn tiles_of_the_matrix_unit_cover_the_result_once() {
        for (rows, cols) in [(2760, 1152), (384, 1536), (100, 16384), (1, 1), (17, 5000), (33, 40), (5000, 3)] {
            let tiles = amx::tiles(rows, cols);
            let covered: usize = tiles.iter().map(|(r, c)| r.len() * c.len()).sum();
            assert_eq!(covered, rows * cols, "{rows}x{cols}");
            assert!(tiles.iter().all(|(r, c)| r.start % 32 == 0 && c.start % 16 == 0 && c.len() <= 1024));
            let starts: std::collections::HashSet<_> = tiles.iter().map(|(r, c)| (r.start, c.start)).collect();
            assert_eq!(starts.len(), tiles.len(), "{rows}x{cols}");
            let possible = rows.div_ceil(32) * cols.div_ceil(128);
            assert!(tiles.len() >= possible.min(12), "{} tiles of {rows}x{cols}", tiles.len());
        }
    }

    #[test]
    fn tiles_are_many_and_no_larger_than_they_may() {
        let sizes =
            [(8320, 192), (192, 192), (235, 16384), (1, 1), (1, 5000), (49, 97), (768, 8320), (50, 60), (40, 400)];
        for (tiling, (rows, cols)) in [AVX2, AVX512].into_iter().flat_map(|tiling| sizes.map(|size| (tiling, size))) {
            let tiles = tiles(rows, cols, tiling);
            let covered: usize = tiles.iter().map(|(r, c)| r.len() * c.len()).sum();
            assert_eq!(covered, rows * cols, "{rows}x{cols} {tiling:?}");
            assert!(tiles.iter().all(|(r, c)| r.len() <= tiling.largest && c.len() <= tiling.largest));
            assert!(tiles.iter().all(|(r, c)| r.start % tiling.rows == 0 && c.start % tiling.cols == 0));
            let possible = rows.div_ceil(2 * tiling.rows) * cols.div_ceil(2 * tiling.cols);
            assert!(tiles.len() >= LEAST_TILES.min(possible), "{} tiles of {rows}x{cols} {tiling:?}", tiles.len());
        }
    }

    #[test]
    fn empty_inner_dimension_gives_zero_or_keeps() {
        let (a, b) = (Matrix::new(&[], 2, 0), Matrix::new(&[], 0, 3));
        assert_eq!(multiply(a, b, Fp32), vec![0.0; 6]);
        let mut out = vec![4.0; 6];
        multiply_into(&mut out, 3, Destination::Accumulate, [a, b], Fp32, Threads::One);
        assert_eq!(out, vec![4.0; 6]);
        multiply_into(&mut out, 3, Destination::Overwrite, [a, b], Fp32, Threads::One);
        assert_eq!(out, vec![0.0; 6]);
    }

    #[test]
    #[should_panic(expected = "do not fit in 5 elements")]
    fn view_outside_its_slice_panics() {
        Matrix::strided(&[0.0; 5], 2, 3, 3);
    }

    #[test]
    #[should_panic(expected = "does not fit in 5 elements")]
    fn destination_that_is_too_small_panics() {
        let data = [0.0; 6];
        let (a, b) = (Matrix::new(&data, 2, 3), Matrix::new(&data, 3, 2));
        multiply_into(&mut [0.0; 5], 4, Destination::Overwrite, [a, b], Fp32, Threads::One);
    }
}
