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
use std::ops::Range;
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

/// Strips of the left operand that are packed at a time. Each meets all of the right one, so that the result is written row by
/// row.
const PACKED_STRIPS: usize = 16;

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

/// `out = a·b`, rounded to bfloat16, or `out += a·b`, not rounded, on the calling thread.
///
/// # Safety
/// `out` points to `a.rows` non-overlapping rows of `b.cols` elements, `row_stride` apart, which nothing else aliases; and the
/// unit is [`available`].
pub(super) unsafe fn multiply(out: *mut f32, row_stride: usize, destination: Destination, a: Matrix, b: Matrix) {
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
                    };
                    pack(right, blocks, b, &cols, &steps, Side::Right);
                    for group in (0..rows).step_by(PACKED_STRIPS * STRIP) {
                        let group = group..rows.min(group + PACKED_STRIPS * STRIP);
                        pack(left, blocks, a, &group, &steps, Side::Left);
                        for (left, row) in left.chunks_exact(blocks).zip(group.clone().step_by(STRIP)) {
                            for (right, col) in right.chunks_exact(blocks).zip(cols.clone().step_by(STRIP)) {
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
}

impl Write {
    /// Writes the part of the sums that the result has.
    ///
    /// # Safety
    /// `out` points to as many rows and columns, `row_stride` apart, which nothing else aliases.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn to(self, out: *mut f32, row_stride: usize, sums: &Sums, (rows, cols): (usize, usize)) {
        for (i, row) in sums.0.chunks_exact(STRIP).take(rows).enumerate() {
            for (j, sums) in row.chunks_exact(16).enumerate().take(cols.div_ceil(16)) {
                let mask = lanes(cols - 16 * j);
                // SAFETY: the mask leaves the columns that the result has; the caller's promise.
                unsafe {
                    let out = out.add(i * row_stride + 16 * j);
                    let sums = _mm512_loadu_ps(sums.as_ptr());
                    let value = match self.add {
                        true => _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, out)),
                        false => sums,
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

/// Packs the `steps` of `rows` of a matrix, strip by strip, `blocks` of each; what the last strip or block lacks becomes zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack(strips: &mut [Block], blocks: usize, matrix: Matrix, rows: &Range<usize>, steps: &Range<usize>, side: Side) {
    // Whether the numbers of a row lie side by side, or those of a step do.
    let along_rows = matrix.col_stride == 1;
    let source = Source { matrix, rows, steps };
    let (halves, used) = (2 * rows.len().div_ceil(STRIP), steps.len().div_ceil(DEPTH));
    for i in 0..halves * used {
        // In the order in which few lines of the matrix go on side by side.
        let (half, block) = if along_rows { (i / used, i % used) } else { (i % halves, i / halves) };
        let (row, step) = (16 * half, DEPTH * block);
        let register = &mut strips[half / 2 * blocks + block].0[half % 2];
        match (along_rows, side) {
            (true, Side::Left) => (0..16).for_each(|i| register.store(i, source.of_row(row + i, step))),
            (false, Side::Right) => (0..16).for_each(|i| register.store(i, source.of_pair(row, step + 2 * i))),
            (true, Side::Right) => register.store_turned(std::array::from_fn(|i| source.of_row(row + i, step))),
            (false, Side::Left) => register.store_turned(std::array::from_fn(|i| source.of_pair(row, step + 2 * i))),
        }
    }
}

/// The part of a matrix that is packed.
struct Source<'a> {
    matrix: Matrix<'a>,
    rows: &'a Range<usize>,
    steps: &'a Range<usize>,
}

/// How many rows further along a step what is read soon begins to be fetched: two strips. The processor alone does not see so
/// many lines going on side by side.
const AHEAD: usize = 2 * STRIP;

impl Source<'_> {
    /// 32 steps of a row, which lie side by side.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn of_row(&self, row: usize, step: usize) -> __m512i {
        let left = if row < self.rows.len() { self.steps.len() - step } else { 0 };
        let start = (self.rows.start + row) * self.matrix.row_stride + self.steps.start + step;
        let first = numbers(self.matrix.data, start, left);
        rounded(first, numbers(self.matrix.data, start + 16, left.saturating_sub(16)))
    }

    /// Two steps of 16 rows, which lie side by side: one of each row after the other.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn of_pair(&self, row: usize, step: usize) -> __m512i {
        let rows = self.rows.len().saturating_sub(row);
        let start = self.rows.start + row + (self.steps.start + step) * self.matrix.col_stride;
        let next = start + self.matrix.col_stride;
        // Hints, for which the places need not exist.
        let ahead = |start: usize| self.matrix.data.as_ptr().wrapping_add(start + AHEAD).cast();
        _mm_prefetch::<_MM_HINT_T0>(ahead(start));
        _mm_prefetch::<_MM_HINT_T0>(ahead(next));
        let first = numbers(self.matrix.data, start, if step < self.steps.len() { rows } else { 0 });
        let second = numbers(self.matrix.data, next, if step + 1 < self.steps.len() { rows } else { 0 });
        alternating(rounded(first, second))
    }
}

/// So many numbers from a place on, at most 16, and zeros for the rest.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn numbers(data: &[f32], start: usize, count: usize) -> __m512 {
    if count >= 16 {
        // SAFETY: reads 16 numbers, which the slice has.
        unsafe { _mm512_loadu_ps(data[start..][..16].as_ptr()) }
    } else if count > 0 {
        // SAFETY: reads `count` numbers, which the slice has.
        unsafe { _mm512_maskz_loadu_ps(lanes(count), data[start..][..count].as_ptr()) }
    } else {
        _mm512_setzero_ps()
    }
}

/// 32 numbers, those of `x` first.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn rounded(x: __m512, y: __m512) -> __m512i {
    // SAFETY: 512 bits in either type.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(y, x)) }
}

/// One of the first 16, one of the last 16, and so on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn alternating(numbers: __m512i) -> __m512i {
    const PLACES: [u16; 32] = {
        let mut places = [0; 32];
        let mut i = 0;
        while i < 32 {
            places[i as usize] = i / 2 + 16 * (i % 2);
            i += 1;
        }
        places
    };
    // SAFETY: reads the 64 bytes.
    let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
    _mm512_permutexvar_epi16(places, numbers)
}

impl Register {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn store(&mut self, row: usize, numbers: __m512i) {
        // SAFETY: writes 64 bytes, which the slice has; registers are aligned to as many.
        unsafe { _mm512_store_si512(self.0[32 * row..][..32].as_mut_ptr().cast(), numbers) };
    }

    /// Stores the transpose of 16 × 16 pairs of numbers, given by rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn store_turned(&mut self, mut rows: [__m512i; 16]) {
        let mut t = [_mm512_setzero_si512(); 16];
        // Squares of 2, then of 4, inside the quarters of the vectors.
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        for i in 0..4 {
            let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
            rows[4 * i] = _mm512_unpacklo_epi64(a, c);
            rows[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
            rows[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
            rows[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
        }
        // Then the quarters themselves.
        for i in 0..4 {
            t[i] = _mm512_shuffle_i32x4::<0x88>(rows[i], rows[i + 4]);
            t[i + 4] = _mm512_shuffle_i32x4::<0xdd>(rows[i], rows[i + 4]);
            t[i + 8] = _mm512_shuffle_i32x4::<0x88>(rows[i + 8], rows[i + 12]);
            t[i + 12] = _mm512_shuffle_i32x4::<0xdd>(rows[i + 8], rows[i + 12]);
        }
        for i in 0..4 {
            self.store(i, _mm512_shuffle_i32x4::<0x88>(t[i], t[i + 8]));
            self.store(i + 4, _mm512_shuffle_i32x4::<0x88>(t[i + 4], t[i + 12]));
            self.store(i + 8, _mm512_shuffle_i32x4::<0xdd>(t[i], t[i + 8]));
            self.store(i + 12, _mm512_shuffle_i32x4::<0xdd>(t[i + 4], t[i + 12]));
        }
    }
}
