//! The layout of the matrix unit's operands.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Matrix;

/// Steps along the inner dimension of one instruction.
pub(super) const DEPTH: usize = 32;

/// What a register holds of an operand: 16 rows of 16 pairs of numbers. Of the left one, a row of pairs is a row of the operand;
/// of the right one, it is one pair of each of 16 columns. The numbers of a pair are 16 steps apart.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Register([u16; 16 * DEPTH]);

/// [`DEPTH`] steps of a strip of as many registers, in `PARTS` parts, the largest first.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Block<const REGISTERS: usize, const PARTS: usize>([[Register; REGISTERS]; PARTS]);

impl<const REGISTERS: usize, const PARTS: usize> Block<REGISTERS, PARTS> {
    pub(super) const ZERO: Self = Self([[Register([0; 16 * DEPTH]); REGISTERS]; PARTS]);
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Side {
    Left,
    Right,
}

/// A strip of a matrix: some of its rows, in some steps along the inner dimension, which its columns are.
#[derive(Clone)]
pub(super) struct Source<'a> {
    /// Of a right operand, its transpose.
    pub(super) matrix: Matrix<'a>,
    pub(super) rows: Range<usize>,
    pub(super) steps: Range<usize>,
    pub(super) side: Side,
}

impl Source<'_> {
    /// How many squares of 16 rows and [`DEPTH`] steps the strip is packed in.
    pub(super) fn squares<const REGISTERS: usize>(&self) -> usize {
        REGISTERS * self.steps.len().div_ceil(DEPTH)
    }

    /// Whether the numbers of a row lie side by side, or else those of a step.
    fn along_rows(&self) -> bool {
        self.matrix.col_stride == 1
    }

    /// The first row and the first step of a square: in the order in which few lines of the matrix go on side by side.
    fn corner<const REGISTERS: usize>(&self, square: usize) -> (usize, usize) {
        let blocks = self.steps.len().div_ceil(DEPTH);
        let (register, block) = match self.along_rows() {
            true => (square / blocks, square % blocks),
            false => (square % REGISTERS, square / REGISTERS),
        };
        (16 * register, DEPTH * block)
    }

    /// Has the caches fetch a square, which is packed soon.
    #[inline]
    pub(super) fn fetch<const REGISTERS: usize>(&self, square: usize) {
        let (row, step) = self.corner::<REGISTERS>(square);
        let first =
            (self.rows.start + row) * self.matrix.row_stride + (self.steps.start + step) * self.matrix.col_stride;
        let first = self.matrix.data.as_ptr().wrapping_add(first);
        // SAFETY: a hint, which every processor of this architecture knows, and for which the place need not exist.
        let fetch = |place: usize| unsafe { _mm_prefetch::<_MM_HINT_T1>(first.wrapping_add(place).cast()) };
        match self.along_rows() {
            true => (0..16).for_each(|i| [0, 16].iter().for_each(|j| fetch(i * self.matrix.row_stride + j))),
            false => (0..DEPTH).for_each(|i| fetch(i * self.matrix.col_stride)),
        }
    }

    /// Packs a square; what it lacks becomes zero.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) fn pack<const REGISTERS: usize, const PARTS: usize>(
        &self,
        strip: &mut [Block<REGISTERS, PARTS>],
        square: usize,
    ) {
        let (row, step) = self.corner::<REGISTERS>(square);
        let (register, block) = (row / 16, step / DEPTH);
        let (mut first, mut second) = match row + 16 <= self.rows.len() && step + DEPTH <= self.steps.len() {
            true => (self.half::<true>(row, step), self.half::<true>(row, step + 16)),
            false => (self.half::<false>(row, step), self.half::<false>(row, step + 16)),
        };
        if self.along_rows() != (self.side == Side::Left) {
            (first, second) = (turned(first), turned(second));
        }
        let parts = &mut strip[block].0;
        for i in 0..16 {
            let pairs = paired::<PARTS>(first[i], second[i]);
            for part in 0..PARTS {
                parts[part][register].store(i, pairs[part]);
            }
        }
    }

    /// 16 rows in 16 steps, and zeros for those that there are not: a row, or a step if they lie side by side, in each vector.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn half<const WHOLE: bool>(&self, row: usize, step: usize) -> [__m512; 16] {
        let mut half = [_mm512_setzero_ps(); 16];
        let (lines, len) = (self.rows.len().saturating_sub(row).min(16), self.steps.len().saturating_sub(step).min(16));
        let (lines, len, stride) = match self.along_rows() {
            true => (lines, len, self.matrix.row_stride),
            false => (len, lines, self.matrix.col_stride),
        };
        if lines == 0 || len == 0 {
            return half;
        }
        let first =
            (self.rows.start + row) * self.matrix.row_stride + (self.steps.start + step) * self.matrix.col_stride;
        let data = &self.matrix.data[first..];
        assert!((lines - 1) * stride + len <= data.len(), "matrix: lines {stride} apart do not fit");
        for (i, line) in half.iter_mut().enumerate().take(if WHOLE { 16 } else { lines }) {
            let start = data.as_ptr().wrapping_add(i * stride);
            // SAFETY: reads numbers of the lines, which were seen to fit.
            *line = unsafe {
                match WHOLE {
                    true => _mm512_loadu_ps(start),
                    false => _mm512_maskz_loadu_ps(lanes(len), start),
                }
            };
        }
        half
    }
}

/// The first lanes of 16.
pub(super) fn lanes(count: usize) -> __mmask16 {
    if count >= 16 { !0 } else { (1 << count) - 1 }
}

/// 16 pairs of a number of `x` and one of `y`, in parts of bfloat16 whose sums they are: the first is the number rounded, the
/// next what that lacks, rounded, and so on. Three parts leave nothing out of a number of single precision.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn paired<const PARTS: usize>(mut x: __m512, mut y: __m512) -> [__m512i; PARTS] {
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
    let mut parts = [_mm512_setzero_si512(); PARTS];
    for (i, part) in parts.iter_mut().enumerate() {
        // SAFETY: 512 bits in either type.
        let rounded = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(y, x)) };
        *part = _mm512_permutexvar_epi16(places, rounded);
        if i + 1 < PARTS {
            let upper = _mm512_set1_epi32(!0xffff);
            x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(*part)));
            y = _mm512_sub_ps(y, _mm512_castsi512_ps(_mm512_and_si512(*part, upper)));
        }
    }
    parts
}

impl Register {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn store(&mut self, row: usize, pairs: __m512i) {
        // SAFETY: writes 64 bytes, which the slice has; registers are aligned to as many.
        unsafe { _mm512_store_si512(self.0[DEPTH * row..][..DEPTH].as_mut_ptr().cast(), pairs) };
    }
}

/// The transpose of 16 × 16 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn turned(rows: [__m512; 16]) -> [__m512; 16] {
    // SAFETY: as many bits in either type.
    let mut rows = unsafe { std::mem::transmute::<[__m512; 16], [__m512i; 16]>(rows) };
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
        rows[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[i + 8]);
        rows[i + 4] = _mm512_shuffle_i32x4::<0x88>(t[i + 4], t[i + 12]);
        rows[i + 8] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[i + 8]);
        rows[i + 12] = _mm512_shuffle_i32x4::<0xdd>(t[i + 4], t[i + 12]);
    }
    // SAFETY: as above.
    unsafe { std::mem::transmute::<[__m512i; 16], [__m512; 16]>(rows) }
}
