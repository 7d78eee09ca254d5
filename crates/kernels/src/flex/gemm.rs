//! Matrix products on slices: the one place that calls the `gemm` crate, and the one file with `unsafe`.
//!
//! `gemm` takes raw pointers and strides. Here every product is described by [`Matrix`] views whose extent is checked
//! against the slice behind them, so that no combination of arguments can read or write outside a slice.

use gemm::Parallelism;

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

/// `out = scale·a·b` or `out += scale·a·b`, where `out` is row-major with rows `row_stride` elements apart.
pub(crate) fn multiply_into(
    out: &mut [f32],
    row_stride: usize,
    destination: Destination,
    scale: f32,
    a: Matrix,
    b: Matrix,
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
        call(out.as_mut_ptr(), row_stride, destination, scale, a, b, threads);
    }
}

/// `a·b` as a new dense matrix, on the threads of the current pool.
pub(crate) fn multiply(a: Matrix, b: Matrix) -> Vec<f32> {
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
        call(out.as_mut_ptr(), b.cols, Destination::Overwrite, 1.0, a, b, Threads::Pool);
        out.set_len(len);
    }
    out
}

/// # Safety
/// `out` points to `a.rows` non-overlapping rows of `b.cols` elements, `row_stride` apart, which nothing else aliases, and
/// `a.cols == b.rows`.
#[allow(unsafe_code, reason = "the `gemm` crate takes pointers")]
unsafe fn call(
    out: *mut f32,
    row_stride: usize,
    destination: Destination,
    scale: f32,
    a: Matrix,
    b: Matrix,
    threads: Threads,
) {
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::Pool => Parallelism::Rayon(0),
    };
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
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
                assert_eq!(multiply(a, b), expected, "{m}x{k}x{n}");

                // Into rows that are two elements longer than needed, which keep what they held.
                let stride = n + 2;
                let mut out = vec![1.0; m * stride];
                multiply_into(&mut out, stride, Destination::Accumulate, 2.0, a, b, Threads::One);
                for (i, row) in out.chunks(stride).enumerate() {
                    let wanted: Vec<f32> = expected[i * n..][..n].iter().map(|v| 1.0 + 2.0 * v).collect();
                    assert_eq!(row[..n], wanted);
                    assert_eq!(row[n..], [1.0, 1.0]);
                }
                cases += 1;
            }
        }
        assert_eq!(cases, 24);
    }

    #[test]
    fn empty_inner_dimension_gives_zero_or_keeps() {
        let (a, b) = (Matrix::new(&[], 2, 0), Matrix::new(&[], 0, 3));
        assert_eq!(multiply(a, b), vec![0.0; 6]);
        let mut out = vec![4.0; 6];
        multiply_into(&mut out, 3, Destination::Accumulate, 1.0, a, b, Threads::One);
        assert_eq!(out, vec![4.0; 6]);
        multiply_into(&mut out, 3, Destination::Overwrite, 1.0, a, b, Threads::One);
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
        multiply_into(&mut [0.0; 5], 4, Destination::Overwrite, 1.0, a, b, Threads::One);
    }
}
