//! Depthwise convolution on images with the channels last: every place reads its neighbours' channels as they lie in memory.
//!
//! With `p = ⌊k/2⌋` and `g` the gradient of the result, at place `(i, j)` and for each channel by itself:
//! `y[i, j] = bias + Σ_ab w[a, b]·x[i + a − p, j + b − p]`, where places outside the image count as zero and are passed over;
//! `dx` is the same sum over `g` with the kernel turned by half a turn; `dw[a, b] = Σ_ij g[i, j]·x[i + a − p, j + b − p]`;
//! `dbias = Σ_ij g[i, j]`.

use std::ops::Range;

use burn::backend::flex::FlexTensor;
use pulp::{Simd, WithSimd};

use super::linear::column_sums;
use super::operation::Operation;
use super::{ELEMENT_BLOCK, ROW_BLOCK, contiguous, elements, for_each_block, in_order, simd, tensor};

/// Sums that are formed at once: of neighbouring places, or of neighbouring taps. With [`WIDE`] vectors each they fill half
/// of the registers that AVX2 has.
const TILE: usize = 4;

/// Vectors of channels that are handled at once.
const WIDE: usize = 2;

/// Inputs `x [B, H, W, C]`, `weight [C, 1, k, k]`, `bias [C]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DepthwiseConv {
    /// Side of the kernel, odd.
    pub(crate) kernel: usize,
}

impl Operation<3> for DepthwiseConv {
    fn forward(&self, [x, weight, bias]: [FlexTensor; 3]) -> FlexTensor {
        let shape @ [_, _, _, channels] = dims4(&x);
        let (weight_shape, kernel) = (dims4(&weight), self.kernel);
        let bias_len = bias.layout().shape().num_elements();
        assert!(
            weight_shape == [channels, 1, kernel, kernel] && kernel % 2 == 1 && bias_len == channels,
            "depthwise_conv: x {shape:?}, weight {weight_shape:?} and bias [{bias_len}]"
        );
        let (x, weight, bias) = (contiguous(x), contiguous(weight), contiguous(bias));
        let taps = taps_first(elements(&weight), channels);
        tensor(correlate(elements(&x), &taps, elements(&bias), Grid::new(shape, kernel)), shape)
    }

    fn reads(&self, [x, weight, _]: [bool; 3]) -> [bool; 3] {
        [weight, x, false]
    }

    fn backward(
        &self,
        [x, weight, _]: [Option<FlexTensor>; 3],
        grad: FlexTensor,
        [for_x, for_weight, for_bias]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let shape @ [batch, height, width, channels] = dims4(&grad);
        let (grid, kernel) = (Grid::new(shape, self.kernel), self.kernel);
        let grad = contiguous(grad);
        let g = elements(&grad);
        let dx = weight.filter(|_| for_x).map(|weight| {
            let weight = contiguous(weight);
            let turned: Vec<f32> = elements(&weight)
                .chunks_exact(kernel * kernel)
                .flat_map(|of_channel| of_channel.iter().rev().copied())
                .collect();
            tensor(correlate(g, &taps_first(&turned, channels), &vec![0.0; channels], grid), shape)
        });
        let dw = x.filter(|_| for_weight).map(|x| {
            let x = contiguous(x);
            let sums = tap_sums(elements(&x), g, batch, grid);
            tensor(transposed(&sums, kernel * kernel, channels), [channels, 1, kernel, kernel])
        });
        let db = for_bias.then(|| tensor(column_sums(g, batch * height * width, channels), [channels]));
        [dx, dw, db]
    }
}

/// The four dimensions of a tensor of images or of kernels.
fn dims4(tensor: &FlexTensor) -> [usize; 4] {
    tensor.layout().shape().dims()
}

/// `[rows, columns]` → `[columns, rows]`.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
}

/// A weight `[C, 1, k, k]` as `[k·k, C]`.
fn taps_first(weight: &[f32], channels: usize) -> Vec<f32> {
    transposed(weight, channels, weight.len() / channels.max(1))
}

/// Sizes of an image and of the kernel.
#[derive(Clone, Copy, Debug)]
struct Grid {
    height: usize,
    width: usize,
    channels: usize,
    kernel: usize,
}

impl Grid {
    fn new([_, height, width, channels]: [usize; 4], kernel: usize) -> Self {
        Self { height, width, channels, kernel }
    }

    /// Elements of a row of places.
    fn row(self) -> usize {
        self.width * self.channels
    }

    /// Elements of an image.
    fn image(self) -> usize {
        self.height * self.row()
    }

    /// The place that a tap of the place `at` reads, if it is below `size`; else a number that is not.
    #[inline(always)]
    fn neighbor(self, at: usize, tap: usize) -> usize {
        (at + tap).wrapping_sub(self.kernel / 2)
    }
}

/// Work on each channel by itself.
trait ByChannel {
    /// How many channels there are.
    fn count(&self) -> usize;

    /// Does the work for the channels `span`: `U` whole vectors of them, or, unless `WHOLE`, at most one.
    fn channels<S: Simd, const U: usize, const WHOLE: bool>(&mut self, simd: S, span: Range<usize>);
}

/// The work for all channels, as many at once as fit.
struct AllChannels<W>(W);

impl<W: ByChannel> WithSimd for AllChannels<W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let channels = self.0.count();
        let mut first = 0;
        while first + WIDE * S::F32_LANES <= channels {
            self.0.channels::<S, WIDE, true>(simd, first..first + WIDE * S::F32_LANES);
            first += WIDE * S::F32_LANES;
        }
        while first < channels {
            let end = channels.min(first + S::F32_LANES);
            self.0.channels::<S, 1, false>(simd, first..end);
            first = end;
        }
    }
}

/// `start + Σ taps·x` at every place of every image.
fn correlate(x: &[f32], taps: &[f32], start: &[f32], grid: Grid) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    let row = grid.row().max(1);
    let block = (ELEMENT_BLOCK / row).max(1) * row;
    for_each_block(&mut out, block, &mut [], 0, |first, out, _| {
        simd::dispatch(AllChannels(Correlate { x, taps, start, grid, first_row: first / row, out }));
    });
    out
}

/// Some rows of [`correlate`].
struct Correlate<'a> {
    x: &'a [f32],
    taps: &'a [f32],
    start: &'a [f32],
    grid: Grid,
    /// Which row of all images `out` begins with.
    first_row: usize,
    out: &'a mut [f32],
}

impl ByChannel for Correlate<'_> {
    fn count(&self) -> usize {
        self.grid.channels
    }

    #[inline(always)]
    fn channels<S: Simd, const U: usize, const WHOLE: bool>(&mut self, simd: S, span: Range<usize>) {
        let Grid { height, width, channels, kernel } = self.grid;
        let start = load::<S, U, WHOLE>(simd, &self.start[span.clone()]);
        for (row, out) in self.out.chunks_exact_mut(self.grid.row()).enumerate() {
            let (image, y) = ((self.first_row + row) / height, (self.first_row + row) % height);
            let image = &self.x[image * self.grid.image()..][..self.grid.image()];
            let mut at = 0;
            while at < width {
                let mut sums = [start; TILE];
                for a in 0..kernel {
                    let from = self.grid.neighbor(y, a);
                    if from >= height {
                        continue;
                    }
                    let source = &image[from * self.grid.row()..][..self.grid.row()];
                    for b in 0..kernel {
                        let tap = &self.taps[(a * kernel + b) * channels..][..channels][span.clone()];
                        let tap = load::<S, U, WHOLE>(simd, tap);
                        for (t, sum) in sums.iter_mut().enumerate() {
                            let from = self.grid.neighbor(at + t, b);
                            if from < width && at + t < width {
                                let value = &source[from * channels..][..channels][span.clone()];
                                let value = load::<S, U, WHOLE>(simd, value);
                                add_product(simd, sum, value, tap);
                            }
                        }
                    }
                }
                for (t, sum) in sums.into_iter().enumerate() {
                    if at + t < width {
                        store::<S, U, WHOLE>(simd, &mut out[(at + t) * channels..][..channels][span.clone()], sum);
                    }
                }
                at += TILE;
            }
        }
    }
}

/// `[k·k, C]`: for each tap the sum, over all places of all images, of the gradient there times what the tap reads there.
fn tap_sums(x: &[f32], grad: &[f32], batch: usize, grid: Grid) -> Vec<f32> {
    let images = (ROW_BLOCK / (grid.height * grid.width).max(1)).max(1);
    let len = grid.kernel * grid.kernel * grid.channels;
    let mut partial = vec![0.0; batch.div_ceil(images) * len];
    for_each_block(&mut partial, len.max(1), &mut [], 0, |first, sums, _| {
        let first = first / len * images;
        let images = first * grid.image()..batch.min(first + images) * grid.image();
        simd::dispatch(AllChannels(TapSums { x: &x[images.clone()], grad: &grad[images], grid, sums }));
    });
    in_order(&partial, len)
}

/// [`tap_sums`] of some images.
struct TapSums<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    grid: Grid,
    sums: &'a mut [f32],
}

impl ByChannel for TapSums<'_> {
    fn count(&self) -> usize {
        self.grid.channels
    }

    #[inline(always)]
    fn channels<S: Simd, const U: usize, const WHOLE: bool>(&mut self, simd: S, span: Range<usize>) {
        let Grid { height, width, channels, kernel } = self.grid;
        let (image, row) = (self.grid.image(), self.grid.row());
        for a in 0..kernel {
            let mut b = 0;
            while b < kernel {
                let mut sums = [[simd.splat_f32s(0.0); U]; TILE];
                for (x, grad) in self.x.chunks_exact(image).zip(self.grad.chunks_exact(image)) {
                    for (y, grad) in grad.chunks_exact(row).enumerate() {
                        let from = self.grid.neighbor(y, a);
                        if from >= height {
                            continue;
                        }
                        let source = &x[from * row..][..row];
                        for (at, grad) in grad.chunks_exact(channels).enumerate() {
                            let grad = load::<S, U, WHOLE>(simd, &grad[span.clone()]);
                            for (t, sum) in sums.iter_mut().enumerate() {
                                let from = self.grid.neighbor(at, b + t);
                                if from < width && b + t < kernel {
                                    let value = &source[from * channels..][..channels][span.clone()];
                                    add_product(simd, sum, load::<S, U, WHOLE>(simd, value), grad);
                                }
                            }
                        }
                    }
                }
                for (t, sum) in sums.into_iter().enumerate() {
                    if b + t < kernel {
                        let tap = &mut self.sums[(a * kernel + b + t) * channels..][..channels];
                        store::<S, U, WHOLE>(simd, &mut tap[span.clone()], sum);
                    }
                }
                b += TILE;
            }
        }
    }
}

/// The vectors of a slice: `U` whole ones, or one that is filled up with zeros.
#[inline(always)]
fn load<S: Simd, const U: usize, const WHOLE: bool>(simd: S, slice: &[f32]) -> [S::f32s; U] {
    let mut vectors = [simd.splat_f32s(0.0); U];
    if WHOLE {
        vectors.copy_from_slice(S::as_simd_f32s(&slice[..U * S::F32_LANES]).0);
    } else {
        vectors[0] = simd.partial_load_f32s(slice);
    }
    vectors
}

/// The inverse of [`load`].
#[inline(always)]
fn store<S: Simd, const U: usize, const WHOLE: bool>(simd: S, slice: &mut [f32], vectors: [S::f32s; U]) {
    if WHOLE {
        S::as_mut_simd_f32s(&mut slice[..U * S::F32_LANES]).0.copy_from_slice(&vectors);
    } else {
        simd.partial_store_f32s(slice, vectors[0]);
    }
}

/// `sum += a·b`.
#[inline(always)]
fn add_product<S: Simd, const U: usize>(simd: S, sum: &mut [S::f32s; U], a: [S::f32s; U], b: [S::f32s; U]) {
    for u in 0..U {
        sum[u] = simd.mul_add_e_f32s(a[u], b[u], sum[u]);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, TensorData};

    use crate::testing::{Case, assert_same, run};
    use crate::{composed, depthwise_conv};

    #[test]
    fn equals_composed_with_every_combination_of_tracked_inputs() {
        let mut cases = 0;
        // Images smaller than the kernel, larger, and larger than a block of the weight's gradient; channels that are less
        // than a vector, several pairs of vectors, and what leaves something over.
        let shapes = [
            ([1, 1, 1, 1], 7),
            ([2, 5, 9, 13], 7),
            ([3, 2, 3, 40], 7),
            ([2, 11, 8, 96], 7),
            ([1, 9, 4, 33], 3),
            ([5, 12, 11, 24], 5),
            ([37, 2, 2, 20], 7),
        ];
        for (shape @ [_, _, _, channels], kernel) in shapes {
            for tracked in 0..8 {
                let tracked = [tracked & 1 > 0, tracked & 2 > 0, tracked & 4 > 0];
                let case = Case::new(&[&shape, &[channels, 1, kernel, kernel], &[channels]], &tracked);
                assert_same(
                    &case,
                    |t| depthwise_conv(t.images(0), t.images(1), t.vector(2)),
                    |t| composed::depthwise_conv(t.images(0), t.images(1), t.vector(2)),
                );
                cases += 1;
            }
        }
        assert_eq!(cases, 7 * 8);
    }

    #[test]
    fn permuted_inputs_are_read_in_their_own_order() {
        let case = Case::new(&[&[2, 6, 5, 4], &[3, 1, 3, 6], &[6]], &[true; 3]);
        let arguments = |x: Tensor<4>, weight: Tensor<4>| (x.permute([0, 2, 3, 1]), weight.permute([3, 1, 0, 2]));
        assert_same(
            &case,
            |t| {
                let (x, weight) = arguments(t.images(0), t.images(1));
                depthwise_conv(x, weight, t.vector(2))
            },
            |t| {
                let (x, weight) = arguments(t.images(0), t.images(1));
                composed::depthwise_conv(x, weight, t.vector(2))
            },
        );
    }

    #[test]
    fn a_kernel_of_one_tap_moves_the_image() {
        let device = Device::flex();
        // 2 × 3 places of one channel; the tap one row above and one column to the left.
        let x = Tensor::<4>::from_data(TensorData::new(vec![1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [1, 2, 3, 1]), &device);
        let mut weight = vec![0f32; 9];
        weight[0] = 10.0;
        let weight = Tensor::<4>::from_data(TensorData::new(weight, [1, 1, 3, 3]), &device);
        let y = depthwise_conv(x, weight, Tensor::from_floats([0.5], &device));
        assert_eq!(y.to_data().try_to_vec::<f32>().unwrap(), [0.5, 0.5, 0.5, 0.5, 10.5, 20.5]);
    }

    #[test]
    fn number_of_threads_does_not_change_the_bits() {
        let case = Case::new(&[&[5, 12, 11, 24], &[24, 1, 7, 7], &[24]], &[true; 3]);
        let results = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| run(&case, |t| depthwise_conv(t.images(0), t.images(1), t.vector(2))))
        });
        assert_eq!(results[0].len(), 4);
        assert!(results[0] == results[1]);
    }
}
