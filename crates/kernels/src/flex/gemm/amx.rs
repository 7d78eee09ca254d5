//! Products on the matrix unit of x86 servers (AMX: Intel's Xeon from 2023 on), which multiplies numbers of bfloat16: sixteen
//! times as many at a time as vectors do of single precision.
//!
//! In bfloat16, operands are rounded. In single precision each number becomes three of bfloat16 whose sum it is, and six of the
//! nine products of parts are added up: the other three are below 2⁻²⁵ of the whole. Either way sums are formed in single
//! precision, and what is below the smallest normal number, 1.2e-38, counts as zero. In single precision an infinite operand has
//! parts that are no numbers, and so has the result.
//!
//! Operands are packed into the unit's layout strip by strip ([`packing`]). Five of its eight registers are used: the others are
//! left to the processor, which needs some for what is under way, and shares all of them between the threads of a core. Where
//! another thread holds eight, as another guest of a server may, using eight here halves the speed.
//!
//! The compiler's own functions for the unit are not stable, so it is driven by a few lines of assembly.

#![allow(unsafe_code, reason = "instructions that only some processors have, on buffers that are checked here")]

mod packing;

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::OnceLock;
use std::thread::LocalKey;

use rayon::prelude::*;

use self::packing::{Block, DEPTH, Side, Source};
use super::{Destination, Matrix, Shared, cut};
use crate::Precision;

/// Rows of the left operand that are multiplied at a time: two registers of 16.
const LEFT: usize = 32;

/// Columns of the right operand that are multiplied at a time.
const RIGHT: usize = 16;

/// Numbers of the right operand that are packed at a time, for all threads.
const PANEL: usize = 1 << 20;

/// Columns of them.
const PANEL_COLUMNS: usize = 1 << 13;

/// Steps along the inner dimension that a strip has at most: a right one lies in the first-level cache, and a left one and the
/// right ones that a tile meets in the second-level cache.
const fn most_steps<const PARTS: usize>() -> usize {
    if PARTS == 1 { 384 } else { 256 }
}

/// Whether the unit is faster than vectors, where it is there: for small products it is not, whose operands are packed for few
/// multiplications.
pub(super) fn pays(precision: Precision, [rows, inner, cols]: [usize; 3]) -> bool {
    match precision {
        Precision::Bf16 => rows.min(inner).min(cols) >= 16,
        Precision::Fp32 => inner >= 32 && rows * cols >= 64 * (rows + cols),
    }
}

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

/// Packed operands, kept from one product to the next.
#[derive(Default)]
struct Buffers<const PARTS: usize> {
    /// Two strips: while one is multiplied, the next is packed.
    left: RefCell<[Vec<Block<2, PARTS>>; 2]>,
    /// Taken by a product of this thread, which may begin another one while it waits for other threads.
    right: Cell<Vec<Block<1, PARTS>>>,
}

thread_local! {
    static ROUNDED: Buffers<1> = Buffers::default();
    static WHOLE: Buffers<3> = Buffers::default();
}

/// `out = a·b` or `out += a·b`, on the threads of the current pool or on the calling one. In bfloat16 the operands are rounded,
/// and the result unless it is added to others.
///
/// # Safety
/// `out` points to `a.rows` non-overlapping rows of `b.cols` elements, `row_stride` apart, which nothing else aliases; and the
/// unit is [`available`].
pub(super) unsafe fn multiply(
    out: Shared,
    row_stride: usize,
    destination: Destination,
    [a, b]: [Matrix; 2],
    precision: Precision,
    parallel: bool,
) {
    assert_eq!(a.cols, b.rows, "product: the inner dimensions differ");
    let product = Product { out, row_stride, destination, a, b: b.t(), parallel };
    // SAFETY: the caller's promises.
    unsafe {
        match precision {
            Precision::Bf16 => product.compute(&ROUNDED),
            Precision::Fp32 => product.compute(&WHOLE),
        }
    }
}

/// A product and where it goes.
#[derive(Clone, Copy)]
struct Product<'a> {
    out: Shared,
    row_stride: usize,
    destination: Destination,
    /// The left operand.
    a: Matrix<'a>,
    /// The transpose of the right operand: its rows are columns of the result.
    b: Matrix<'a>,
    parallel: bool,
}

/// Columns of the right operand in some steps along the inner dimension. They are packed strip by strip: all of the first
/// piece of steps, then all of the second, and so on.
struct Panel {
    cols: Range<usize>,
    steps: Range<usize>,
    /// Steps of a piece.
    depth: usize,
}

impl Panel {
    fn strips(&self) -> usize {
        self.cols.len().div_ceil(RIGHT)
    }

    fn pieces(&self) -> usize {
        self.steps.len().div_ceil(self.depth)
    }

    /// Blocks of a strip.
    fn blocks(&self) -> usize {
        self.depth / DEPTH
    }

    /// The steps of a piece.
    fn steps_of(&self, piece: usize) -> Range<usize> {
        let start = self.steps.start + piece * self.depth;
        start..self.steps.end.min(start + self.depth)
    }
}

/// Tiles of a result, row by row: wide ones, since a left strip is packed for each, but no wider than right strips fit in the
/// second-level cache; and so many that no thread waits long for another.
pub(super) fn tiles(rows: usize, cols: usize) -> Vec<(Range<usize>, Range<usize>)> {
    const WIDEST: usize = 1024;
    const LEAST: usize = 16;
    let across = cols.div_ceil(WIDEST).max(LEAST.div_ceil(rows.div_ceil(LEFT)).min(cols.div_ceil(4 * RIGHT)));
    let row_of_tiles = |rows: Range<usize>| cut(cols, across, RIGHT).map(move |cols| (rows.clone(), cols));
    cut(rows, LEAST.div_ceil(across), LEFT).flat_map(row_of_tiles).collect()
}

impl Product<'_> {
    /// # Safety
    /// As for [`multiply`].
    unsafe fn compute<const PARTS: usize>(self, buffers: &'static LocalKey<Buffers<PARTS>>) {
        let (rows, cols, inner) = (self.a.rows, self.b.rows, self.a.cols);
        // Pieces of equal depth, which do not depend on how the result is cut into tiles: nor do its bits.
        let depth = inner.div_ceil(inner.div_ceil(most_steps::<PARTS>())).next_multiple_of(DEPTH);
        let mut packed = buffers.with(|buffers| buffers.right.take());
        for first_col in (0..cols).step_by(PANEL_COLUMNS) {
            let cols = first_col..cols.min(first_col + PANEL_COLUMNS);
            let strips = cols.len().div_ceil(RIGHT);
            let pieces = (PANEL / (strips * RIGHT * depth)).max(1);
            for first in (0..inner).step_by(pieces * depth) {
                let steps = first..inner.min(first + pieces * depth);
                let panel = Panel { cols: cols.clone(), steps, depth };
                let len = panel.pieces() * strips * panel.blocks();
                packed.resize(len.max(packed.len()), Block::ZERO);
                let pack = |(i, strip): (usize, &mut [Block<1, PARTS>])| {
                    let col = cols.start + i % strips * RIGHT;
                    let steps = panel.steps_of(i / strips);
                    let rows = col..cols.end.min(col + RIGHT);
                    let source = Source { matrix: self.b, rows, steps, side: Side::Right };
                    // What the next strip but one is packed from.
                    let ahead = col + 2 * RIGHT..cols.end.min(col + 3 * RIGHT);
                    let ahead = (!ahead.is_empty()).then(|| Source { rows: ahead, ..source.clone() });
                    for square in 0..source.squares::<1>() {
                        if let Some(ahead) = &ahead {
                            ahead.fetch::<1>(square);
                        }
                        // SAFETY: the processor has the instructions.
                        unsafe { source.pack(strip, square) };
                    }
                };
                let whole = &mut packed[..len];
                match self.parallel {
                    true => whole.par_chunks_exact_mut(panel.blocks()).enumerate().with_min_len(8).for_each(pack),
                    false => whole.chunks_exact_mut(panel.blocks()).enumerate().for_each(pack),
                }
                let whole = &packed[..len];
                let tile = |tile| {
                    buffers.with(|buffers| {
                        // SAFETY: the caller's promises.
                        unsafe { self.tile(&panel, whole, tile, &mut buffers.left.borrow_mut()) };
                    });
                };
                let tiles = tiles(rows, cols.len());
                match self.parallel {
                    true => tiles.into_par_iter().for_each(tile),
                    false => tiles.into_iter().for_each(tile),
                }
            }
        }
        buffers.with(|buffers| buffers.right.set(packed));
    }

    /// Adds what a panel has to some rows and columns of the result, or begins them.
    ///
    /// # Safety
    /// As for [`multiply`].
    unsafe fn tile<const PARTS: usize>(
        &self,
        panel: &Panel,
        packed: &[Block<1, PARTS>],
        (rows, cols): (Range<usize>, Range<usize>),
        [current, next]: &mut [Vec<Block<2, PARTS>>; 2],
    ) {
        let blocks = panel.blocks();
        for buffer in [&mut *current, &mut *next] {
            buffer.resize(blocks.max(buffer.len()), Block::ZERO);
        }
        let strips = rows.len().div_ceil(LEFT);
        // The left strips in order: all of a piece, then those of the next piece.
        let source = |i: usize| {
            let row = rows.start + i % strips * LEFT;
            let rows = row..rows.end.min(row + LEFT);
            Source { matrix: self.a, rows, steps: panel.steps_of(i / strips), side: Side::Left }
        };
        let (count, meetings) = (strips * panel.pieces(), cols.len().div_ceil(RIGHT));
        let mut sums = [const { Sums([0.0; LEFT * RIGHT]) }; 2];
        // SAFETY: the processor has the unit and the instructions; the sums are written to rows and columns that the result
        // has, and that no other tile has.
        unsafe {
            configure();
            (0..source(0).squares::<2>()).for_each(|square| source(0).pack(current, square));
            for i in 0..count {
                let (row, steps) = (rows.start + i % strips * LEFT, panel.steps_of(i / strips));
                let used = steps.len().div_ceil(DEPTH);
                let write = Write {
                    add: self.destination == Destination::Accumulate || steps.start > 0,
                    round: PARTS == 1 && self.destination == Destination::Overwrite && steps.end == self.a.cols,
                    rows: LEFT.min(rows.end - row),
                    row_stride: self.row_stride,
                };
                let following = (i + 1 < count).then(|| source(i + 1));
                let ahead = (i + 2 < count).then(|| source(i + 2));
                let squares = following.as_ref().map_or(0, Source::squares::<2>);
                let mut square = 0;
                let mut finished = None;
                let first = (i / strips * panel.strips() + cols.start / RIGHT) * blocks;
                for (j, right) in packed[first..][..meetings * blocks].chunks_exact(blocks).enumerate() {
                    let col = panel.cols.start + cols.start + j * RIGHT;
                    write.fetch(self.out.at(row * self.row_stride + col));
                    multiply_strips(&mut sums[j % 2], &current[..used], &right[..used]);
                    // While the unit works on these, what it finished before is written, and some of the next strip packed.
                    if let Some(col) = finished.replace(col) {
                        write.to(self.out.at(row * self.row_stride + col), &sums[(j + 1) % 2], RIGHT);
                    }
                    if let Some(source) = &following {
                        while square < squares * (j + 1) / meetings {
                            source.pack(next, square);
                            if let Some(ahead) = &ahead {
                                ahead.fetch::<2>(square);
                            }
                            square += 1;
                        }
                    }
                }
                if let Some(col) = finished {
                    let len = panel.cols.start + cols.end - col;
                    write.to(self.out.at(row * self.row_stride + col), &sums[(meetings + 1) % 2], len);
                }
                std::mem::swap(current, next);
            }
            release();
        }
    }
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

/// A strip's share of the result.
#[repr(C, align(64))]
struct Sums([f32; LEFT * RIGHT]);

/// The product of a strip of rows and a strip of columns. Two registers hold the sums, two the halves of the left strip, and one
/// the right one.
///
/// # Safety
/// The registers are configured, as by [`configure`].
unsafe fn multiply_strips<const PARTS: usize>(sums: &mut Sums, left: &[Block<2, PARTS>], right: &[Block<1, PARTS>]) {
    assert!(!left.is_empty() && left.len() == right.len(), "strips of {} and {} blocks", left.len(), right.len());
    macro_rules! strips {
        ($($instruction:expr),* $(,)?) => {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                $($instruction,)*
                "add {left}, {left_size}",
                "add {right}, {right_size}",
                "dec {blocks}",
                "jnz 2b",
                "tilestored [{sums} + {row}], tmm0",
                "tilestored [{sums} + {row} + 1024], tmm1",
                left = inout(reg) left.as_ptr() => _,
                right = inout(reg) right.as_ptr() => _,
                blocks = inout(reg) left.len() => _,
                sums = in(reg) sums,
                row = in(reg) 64_usize,
                left_size = const size_of::<Block<2, PARTS>>(),
                right_size = const size_of::<Block<1, PARTS>>(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _,
                options(nostack),
            )
        };
    }
    // Fetches four lines of the block of the right strip that follows.
    macro_rules! ahead {
        ($place:literal) => {
            concat!(
                "prefetcht0 [{right} + {right_size} + ",
                $place,
                "]\n",
                "prefetcht0 [{right} + {right_size} + ",
                $place,
                " + 64]\n",
                "prefetcht0 [{right} + {right_size} + ",
                $place,
                " + 128]\n",
                "prefetcht0 [{right} + {right_size} + ",
                $place,
                " + 192]",
            )
        };
    }
    // SAFETY: reads the blocks, of which there are as many of both, and writes all of the sums; what is fetched ahead need not
    // exist.
    unsafe {
        match PARTS {
            1 => strips!(
                "tileloadd tmm4, [{right} + {row}]",
                "tileloaddt1 tmm2, [{left} + {row}]",
                "tdpbf16ps tmm0, tmm2, tmm4",
                "tileloaddt1 tmm3, [{left} + {row} + 1024]",
                "tdpbf16ps tmm1, tmm3, tmm4",
            ),
            // The left strip is read past the first-level cache, where the right one would not find room beside it; the block of
            // the right one that follows is fetched meanwhile.
            _ => strips!(
                // The third part by the first one.
                "tileloadd tmm4, [{right} + {row}]",
                "tileloaddt1 tmm2, [{left} + {row} + 4096]",
                "tdpbf16ps tmm0, tmm2, tmm4",
                ahead!(0),
                "tileloaddt1 tmm3, [{left} + {row} + 5120]",
                "tdpbf16ps tmm1, tmm3, tmm4",
                ahead!(256),
                // The second by the first.
                "tileloaddt1 tmm2, [{left} + {row} + 2048]",
                "tdpbf16ps tmm0, tmm2, tmm4",
                ahead!(512),
                "tileloaddt1 tmm3, [{left} + {row} + 3072]",
                "tdpbf16ps tmm1, tmm3, tmm4",
                ahead!(768),
                // The second by the second.
                "tileloadd tmm4, [{right} + {row} + 1024]",
                "tdpbf16ps tmm0, tmm2, tmm4",
                ahead!(1024),
                "tdpbf16ps tmm1, tmm3, tmm4",
                ahead!(1280),
                // The first by the second.
                "tileloaddt1 tmm2, [{left} + {row}]",
                "tdpbf16ps tmm0, tmm2, tmm4",
                ahead!(1536),
                "tileloaddt1 tmm3, [{left} + {row} + 1024]",
                "tdpbf16ps tmm1, tmm3, tmm4",
                ahead!(1792),
                // The first by the third.
                "tileloadd tmm4, [{right} + {row} + 2048]",
                "tdpbf16ps tmm0, tmm2, tmm4",
                ahead!(2048),
                "tdpbf16ps tmm1, tmm3, tmm4",
                ahead!(2304),
                // The first by the first: the largest.
                "tileloadd tmm4, [{right} + {row}]",
                "tdpbf16ps tmm0, tmm2, tmm4",
                ahead!(2560),
                "tdpbf16ps tmm1, tmm3, tmm4",
                ahead!(2816),
            ),
        }
    }
}

/// How sums become elements of the result.
#[derive(Clone, Copy)]
struct Write {
    /// To what they are.
    add: bool,
    /// What comes out, to bfloat16.
    round: bool,
    /// That the result has.
    rows: usize,
    row_stride: usize,
}

impl Write {
    /// Has the caches fetch a line of each row, which is written soon.
    #[inline]
    fn fetch(self, out: *mut f32) {
        for i in 0..self.rows {
            // SAFETY: a hint, which every processor of this architecture knows.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(out.wrapping_add(i * self.row_stride).cast()) };
        }
    }

    /// Writes as many columns.
    ///
    /// # Safety
    /// `out` points to as many rows and columns, `row_stride` apart, which nothing else aliases.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn to(self, out: *mut f32, sums: &Sums, cols: usize) {
        let mask = packing::lanes(cols);
        for (i, sums) in sums.0.chunks_exact(RIGHT).take(self.rows).enumerate() {
            // SAFETY: the mask leaves the columns that the result has; the caller's promise.
            unsafe {
                let out = out.add(i * self.row_stride);
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
