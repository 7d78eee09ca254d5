//! Products of bfloat16 on the matrix unit of x86 servers (AMX: Intel's Xeon from 2023 on): sixteen times as many at a time as
//! vectors multiply of single precision.
//!
//! Operands are packed into the unit's layout, and rounded on the way: of 32 rows or columns, a strip, 32 steps along the inner
//! dimension at a time. Sums are formed in single precision. What is below the smallest normal number, 1.2e-38, counts as zero.
//!
//! The compiler's own functions for the unit are not stable, so it is driven by a few lines of assembly.

#![allow(unsafe_code, reason = "instructions that only some processors have, on buffers that are checked here")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::sync::OnceLock;

use super::{Destination, Matrix};

/// Rows of the left operand, or columns of the right one, that are packed and multiplied together: two registers of 16.
const STRIP: usize = 32;

/// Steps along the inner dimension of one instruction.
const DEPTH: usize = 32;

/// Steps along the inner dimension that are packed at a time: two strips of them lie in the second-level cache.
const PACKED_DEPTH: usize = 1024;

/// Columns of the right operand that are packed at a time.
const PACKED_COLUMNS: usize = 1024;

/// Strips of the left operand that are packed at a time, and that meet each strip of the right one while it lies in the
/// cache.
const PACKED_STRIPS: usize = 4;

/// Rows, inner and columns from which on the unit is faster than vectors: below, most of a strip would be padding.
pub(super) const LEAST: usize = 16;

/// Whether this processor has the unit, with the vector instructions that feed it, and the system lets this process use it.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILE: u32 = 1 << 24;
        let vectors = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        vectors && __cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE && permitted()
    })
}

/// Asks the system to save the unit's registers with those of this process: they take 8 kB, which it does not set aside
/// unasked.
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    // SAFETY: a request that writes to no memory of ours; a system that does not know it answers with an error.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// What a register holds of an operand. Of the left one: 16 rows of 32 numbers. Of the right one: 16 rows that hold, for each
/// of 16 columns, two numbers that follow one another in it.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Register([u16; 16 * DEPTH]);

/// Both halves of a strip, [`DEPTH`] steps of it.
#[derive(Clone, Copy)]
#[repr(C)]
struct Block([Register; 2]);

impl Block {
    const ZERO: Self = Self([Register([0; 16 * DEPTH]); 2]);
}

/// A strip's share of the result.
#[repr(C, align(64))]
struct Sums([f32; STRIP * STRIP]);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Side {
    Left,
    Right,
}

/// Packed operands, kept from one product to the next.
#[derive(Default)]
struct Packed {
    left: Vec<Block>,
    right: Vec<Block>,
}

thread_local! {
    static PACKED: RefCell<Packed> = RefCell::default();
}

/// `out = scale·a·b`, rounded to bfloat16, or `out += scale·a·b`, not rounded, on the calling thread.
///
/// # Safety
/// `out` points to `a.rows` non-overlapping rows of `b.cols` elements, `row_stride` apart, which nothing else aliases; and the
/// unit is [`available`].
pub(super) unsafe fn multiply(
    out: *mut f32,
    row_stride: usize,
    destination: Destination,
    scale: f32,
    a: Matrix,
    b: Matrix,
) {
    let (rows, cols, inner) = (a.rows, b.cols, a.cols);
    assert_eq!(inner, b.rows, "product: the inner dimensions differ");
    // Pieces of equal depth, which do not depend on how the result was cut into tiles: nor do its bits.
    let depth = inner.div_ceil(inner.div_ceil(PACKED_DEPTH)).next_multiple_of(DEPTH);
    let blocks = depth / DEPTH;
    let b = b.t();
    PACKED.with_borrow_mut(|Packed { left, right }| {
        let reserve = |packed: &mut Vec<Block>, strips: usize| {
            if packed.len() < strips * blocks {
                packed.resize(strips * blocks, Block::ZERO);
            }
        };
        reserve(left, rows.div_ceil(STRIP).min(PACKED_STRIPS));
        reserve(right, cols.min(PACKED_COLUMNS).div_ceil(STRIP));
        let mut sums = Sums([0.0; STRIP * STRIP]);
        // SAFETY: the processor has the unit and the instructions; the sums are written to rows and columns that
        // the result has.
        unsafe {
            configure();
            for first_col in (0..cols).step_by(PACKED_COLUMNS) {
                let cols = first_col..cols.min(first_col + PACKED_COLUMNS);
                for first in (0..inner).step_by(depth) {
                    let steps = first..inner.min(first + depth);
                    let used = steps.len().div_ceil(DEPTH);
                    let write = Write {
                        add: destination == Destination::Accumulate || first > 0,
                        round: destination == Destination::Overwrite && steps.end == inner,
                        scale,
                    };
                    for (strip, col) in right.chunks_exact_mut(blocks).zip(cols.clone().step_by(STRIP)) {
                        pack(strip, b, col..cols.end.min(col + STRIP), steps.clone(), Side::Right);
                    }
                    for group in (0..rows).step_by(PACKED_STRIPS * STRIP) {
                        let group = group..rows.min(group + PACKED_STRIPS * STRIP);
                        for (strip, row) in left.chunks_exact_mut(blocks).zip(group.clone().step_by(STRIP)) {
                            pack(strip, a, row..group.end.min(row + STRIP), steps.clone(), Side::Left);
                        }
                        for (right, col) in right.chunks_exact(blocks).zip(cols.clone().step_by(STRIP)) {
                            for (left, row) in left.chunks_exact(blocks).zip(group.clone().step_by(STRIP)) {
                                strips(&mut sums, &left[..used], &right[..used]);
                                let size = (STRIP.min(group.end - row), STRIP.min(cols.end - col));
                                write.to(out.add(row * row_stride + col), row_stride, &sums, size);
                            }
                        }
                    }
                }
            }
            release();
        }
    });
}

/// Sets all eight registers to 16 rows of 64 bytes.
///
/// # Safety
/// The processor has the unit, and this process may use it.
unsafe fn configure() {
    #[repr(C, align(64))]
    struct Configuration([u8; 64]);
    const CONFIGURATION: Configuration = {
        let mut bytes = [0; 64];
        bytes[0] = 1; // the palette
        let mut register = 0;
        while register < 8 {
            bytes[16 + 2 * register] = 64; // bytes of a row, 16 bits
            bytes[48 + register] = 16; // rows
            register += 1;
        }
        Configuration(bytes)
    };
    // SAFETY: reads the 64 bytes; the caller's promise.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIGURATION, options(nostack, readonly)) };
}

/// Gives the registers back, so that the system need not save them.
///
/// # Safety
/// As for [`configure`].
unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// The product of a strip of rows and a strip of columns. Four registers hold the sums, so that each waits for its last
/// instruction while the others are in the unit; two hold halves of the left strip and two of the right one.
///
/// # Safety
/// The registers are configured, as by [`configure`].
unsafe fn strips(sums: &mut Sums, left: &[Block], right: &[Block]) {
    assert!(!left.is_empty() && left.len() == right.len(), "strips of {} and {} blocks", left.len(), right.len());
    // SAFETY: reads the blocks, of which there are as many of both, and writes all of the sums.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{left} + {row}]",
            "tileloadd tmm6, [{right} + {row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{right} + {row} + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{left} + {row} + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {left}, 2048",
            "add {right}, 2048",
            "dec {blocks}",
            "jnz 2b",
            "tilestored [{sums} + {sums_row}], tmm0",
            "tilestored [{sums} + {sums_row} + 64], tmm1",
            "tilestored [{sums} + {sums_row} + 2048], tmm2",
            "tilestored [{sums} + {sums_row} + 2112], tmm3",
            left = inout(reg) left.as_ptr() => _,
            right = inout(reg) right.as_ptr() => _,
            blocks = inout(reg) left.len() => _,
            sums = in(reg) sums,
            row = in(reg) 64_usize,
            sums_row = in(reg) 4 * STRIP,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// How sums become elements of the result.
#[derive(Clone, Copy)]
struct Write {
    /// To what they are.
    add: bool,
    /// What comes out, to bfloat16.
    round: bool,
    scale: f32,
}

impl Write {
    /// Writes the part of the sums that the result has.
    ///
    /// # Safety
    /// `out` points to as many rows and columns, `row_stride` apart, which nothing else aliases.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn to(self, out: *mut f32, row_stride: usize, sums: &Sums, (rows, cols): (usize, usize)) {
        let scale = _mm512_set1_ps(self.scale);
        for (i, row) in sums.0.chunks_exact(STRIP).take(rows).enumerate() {
            for (j, sums) in row.chunks_exact(16).enumerate().take(cols.div_ceil(16)) {
                let mask = lanes(cols - 16 * j);
                // SAFETY: the mask leaves the columns that the result has; the caller's promise.
                unsafe {
                    let out = out.add(i * row_stride + 16 * j);
                    let sums = _mm512_loadu_ps(sums.as_ptr());
                    let value = match self.add {
                        true => _mm512_fmadd_ps(sums, scale, _mm512_maskz_loadu_ps(mask, out)),
                        false => _mm512_mul_ps(sums, scale),
                    };
                    let value = if self.round { _mm512_cvtpbh_ps(_mm512_cvtneps_pbh(value)) } else { value };
                    _mm512_mask_storeu_ps(out, mask, value);
                }
            }
        }
    }
}

/// The first lanes of 16.
fn lanes(count: usize) -> __mmask16 {
    if count >= 16 { !0 } else { (1 << count) - 1 }
}

/// Packs the `steps` of a strip of `rows` of a matrix, one block after the other; what the strip lacks becomes zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack(strip: &mut [Block], matrix: Matrix, rows: std::ops::Range<usize>, steps: std::ops::Range<usize>, side: Side) {
    // Whether the numbers of a row lie side by side, or those of a column do.
    let along_rows = matrix.col_stride == 1;
    for (block, first) in strip.iter_mut().zip(steps.clone().step_by(DEPTH)) {
        for (half, row) in block.0.iter_mut().zip([rows.start, rows.start + 16]) {
            let square = |first: usize| {
                let (height, width) = (rows.end.saturating_sub(row).min(16), steps.end.saturating_sub(first).min(16));
                let start = row * matrix.row_stride + first * matrix.col_stride;
                match (height.min(width), along_rows) {
                    (0, _) => [_mm512_setzero_ps(); 16],
                    (_, true) => load(&matrix.data[start..], matrix.row_stride, height, width),
                    (_, false) => load(&matrix.data[start..], matrix.col_stride, width, height),
                }
            };
            let (mut x, mut y) = (square(first), square(first + 16));
            if along_rows != (side == Side::Left) {
                (x, y) = (transposed(x), transposed(y));
            }
            match side {
                Side::Left => rows_side_by_side(half, &x, &y),
                Side::Right => pairs_of_rows(half, &x, &y),
            }
        }
    }
}

/// Up to 16 rows, `stride` apart, of up to 16 numbers that lie side by side, and zeros for the rest.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn load(data: &[f32], stride: usize, rows: usize, cols: usize) -> [__m512; 16] {
    let mut loaded = [_mm512_setzero_ps(); 16];
    if rows == 16 && cols == 16 {
        for (i, row) in loaded.iter_mut().enumerate() {
            // SAFETY: reads 16 numbers, which the slice has.
            *row = unsafe { _mm512_loadu_ps(data[i * stride..][..16].as_ptr()) };
        }
    } else {
        for (i, row) in loaded.iter_mut().take(rows).enumerate() {
            // SAFETY: reads `cols` numbers, which the slice has.
            *row = unsafe { _mm512_maskz_loadu_ps(lanes(cols), data[i * stride..][..cols].as_ptr()) };
        }
    }
    loaded
}

/// Rows of the left operand: the numbers of `x`, then those of `y`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn rows_side_by_side(half: &mut Register, x: &[__m512; 16], y: &[__m512; 16]) {
    for (i, (&x, &y)) in x.iter().zip(y).enumerate() {
        store(half, i, rounded(x, y));
    }
}

/// Steps of the right operand, two and two: those of `x`, then those of `y`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pairs_of_rows(half: &mut Register, x: &[__m512; 16], y: &[__m512; 16]) {
    // One of the first 16, one of the last 16, and so on.
    const ALTERNATE: [u16; 32] = {
        let mut places = [0; 32];
        let mut i = 0;
        while i < 32 {
            places[i as usize] = i / 2 + 16 * (i % 2);
            i += 1;
        }
        places
    };
    // SAFETY: reads the 64 bytes.
    let alternate = unsafe { _mm512_loadu_si512(ALTERNATE.as_ptr().cast()) };
    for (i, pair) in x.chunks_exact(2).chain(y.chunks_exact(2)).enumerate() {
        store(half, i, _mm512_permutexvar_epi16(alternate, rounded(pair[0], pair[1])));
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn store(register: &mut Register, row: usize, numbers: __m512i) {
    // SAFETY: writes 64 bytes, which the slice has; registers are aligned to as many.
    unsafe { _mm512_store_si512(register.0[32 * row..][..32].as_mut_ptr().cast(), numbers) };
}

/// 32 numbers, those of `x` first.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn rounded(x: __m512, y: __m512) -> __m512i {
    // SAFETY: 512 bits in either type.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(y, x)) }
}

/// The transpose of a square of 16 × 16 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn transposed(mut rows: [__m512; 16]) -> [__m512; 16] {
    let pairs = |x: __m512| _mm512_castps_pd(x);
    let singles = |x: __m512d| _mm512_castpd_ps(x);
    let mut t = [_mm512_setzero_ps(); 16];
    // Squares of 2, then of 4, inside the quarters of the vectors.
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for i in (0..16).step_by(4) {
        let [a, b, c, d] = [t[i], t[i + 1], t[i + 2], t[i + 3]].map(pairs);
        rows[i] = singles(_mm512_unpacklo_pd(a, c));
        rows[i + 1] = singles(_mm512_unpackhi_pd(a, c));
        rows[i + 2] = singles(_mm512_unpacklo_pd(b, d));
        rows[i + 3] = singles(_mm512_unpackhi_pd(b, d));
    }
    // Then the quarters themselves.
    for i in 0..4 {
        t[i] = _mm512_shuffle_f32x4::<0x88>(rows[i], rows[i + 4]);
        t[i + 4] = _mm512_shuffle_f32x4::<0xdd>(rows[i], rows[i + 4]);
        t[i + 8] = _mm512_shuffle_f32x4::<0x88>(rows[i + 8], rows[i + 12]);
        t[i + 12] = _mm512_shuffle_f32x4::<0xdd>(rows[i + 8], rows[i + 12]);
    }
    for i in 0..4 {
        rows[i] = _mm512_shuffle_f32x4::<0x88>(t[i], t[i + 8]);
        rows[i + 4] = _mm512_shuffle_f32x4::<0x88>(t[i + 4], t[i + 12]);
        rows[i + 8] = _mm512_shuffle_f32x4::<0xdd>(t[i], t[i + 8]);
        rows[i + 12] = _mm512_shuffle_f32x4::<0xdd>(t[i + 4], t[i + 12]);
    }
    rows
}
