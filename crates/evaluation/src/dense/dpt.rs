//! A dense prediction head of convolutions on four blocks (Ranftl et al. 2021, §3), small, trained by autodiff.
//!
//! Tokens of four blocks become four maps, at four, two, one and half times the resolution of patches: a 1×1 convolution,
//! then a transposed convolution of as many pixels as its stride, or a strided one, and a 3×3 convolution to [`FEATURES`]
//! channels. From the coarsest on, a map is added to what came before, with residual units of two 3×3 convolutions before and
//! after, resized to the next size and mixed by a 1×1 convolution. Two more convolutions give the outputs at four times the
//! resolution of patches.
//!
//! Different from the paper: no readout of CLS, no batch normalisation, fewer channels, and outputs at that resolution, which
//! the losses resize to the pixels as they do a linear head's. One image's activations exist at a time: outputs of a batch come
//! from a pass without a graph, and each image is passed again for its gradients.

use burn::tensor::activation::relu;
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, Device, Tensor, TensorData};
use dinoxide_model::interpolation::{Filter, weights};
use dinoxide_random::{Purpose, stream};

use super::TokenGrid;
use super::head::{BatchLoss, HeadConfig, Order, Outputs, Parameter, matrix};
use super::scratch::{Scratch, StoredGrid};
use crate::EvaluationError;
use crate::linear_probe::standard_normal;
use crate::neighbors::{floats, read};
use crate::selection::draws;

/// Blocks whose tokens the head takes.
pub const BLOCKS: usize = 4;
/// Channels of the maps that are added.
const FEATURES: usize = 64;
/// Channels of each block's map before that.
const PROJECTED: [usize; BLOCKS] = [32, 48, 64, 96];
/// Where initial values are to be ten times smaller: of what is added to a map, so that it does not grow from unit to unit, and
/// of the outputs.
const SMALL: usize = 100;
/// Pixels of the outputs along a patch.
const SCALE: usize = 4;

/// The head.
pub(crate) struct DptHead {
    /// In the order in which a pass takes them.
    parameters: Vec<Parameter>,
    /// Channels of each block's tokens, which lie side by side.
    widths: Vec<usize>,
    channels: usize,
    device: Device,
}

/// What a pass takes its parameters from: a matrix of this shape, with which so many terms are summed up. One over their
/// square root is the standard deviation of its initial values.
type Next<'a> = dyn FnMut([usize; 2], usize) -> Tensor<2> + 'a;

impl DptHead {
    fn new(widths: &[usize], channels: usize, seed: u64, device: &Device) -> Self {
        let mut head = Self { parameters: Vec::new(), widths: widths.to_vec(), channels, device: device.clone() };
        let mut rng = stream(seed, Purpose::Evaluation, draws::HEAD_INIT, 1);
        let mut parameters = Vec::new();
        // A pass over two by two patches asks for each parameter once. Biases, which sum up nothing, begin at zero.
        let mut next = |shape: [usize; 2], terms: usize| {
            let scale = if terms == 0 { 0.0 } else { (1.0 / terms as f32).sqrt() };
            let values = standard_normal(shape[0] * shape[1], &mut rng).into_iter().map(|v| scale * v).collect();
            parameters.push(Parameter::new(values, shape, device));
            parameters.last().expect("just pushed").value.clone()
        };
        let dim = widths.iter().sum();
        head.forward(Tensor::zeros([4, dim], (device, DType::F32)), (2, 2), &mut next);
        head.parameters = parameters;
        head
    }

    /// Trains a head on stored tokens; `loss` as for a linear head.
    ///
    /// # Errors
    /// Settings out of range, a loss that is not finite, or what `loss` or the scratch file say.
    pub(crate) fn train(
        task: &'static str,
        (scratch, grids): (&Scratch, &[StoredGrid]),
        (widths, channels): (&[usize], usize),
        config: &HeadConfig,
        device: &Device,
        loss: &BatchLoss<'_>,
        progress: &mut dyn FnMut(usize, f64),
    ) -> Result<Self, EvaluationError> {
        config.check(task)?;
        let mut head = Self::new(widths, channels, config.seed, device);
        let mut order = Order::new(grids.len(), config.seed);
        for t in 0..config.iterations {
            let images: Vec<usize> = (0..config.batch_size).map(|i| order.at(t * config.batch_size + i)).collect();
            let tokens = images.iter().map(|&image| scratch.get_grid(&grids[image])).collect::<Result<Vec<_>, _>>()?;
            let value = head.step(&images, &tokens, t, config, loss)?;
            if !value.is_finite() {
                let learning_rate = config.learning_rate;
                return Err(EvaluationError::HeadDiverged { task, iteration: t, learning_rate });
            }
            progress(t + 1, value);
        }
        Ok(head)
    }

    fn step(
        &mut self,
        images: &[usize],
        tokens: &[TokenGrid],
        t: usize,
        config: &HeadConfig,
        loss: &BatchLoss<'_>,
    ) -> Result<f64, EvaluationError> {
        let outputs = tokens.iter().map(|grid| self.outputs(grid)).collect::<Result<Vec<_>, _>>()?;
        let parts: Vec<Outputs<'_>> = images
            .iter()
            .zip(&outputs)
            .map(|(&image, (values, grid))| Outputs { image, grid: *grid, values })
            .collect();
        let (value, gradients) = loss(&parts)?;
        if !value.is_finite() {
            return Ok(value);
        }
        let mut sums: Vec<Option<Tensor<2>>> = vec![None; self.parameters.len()];
        for (grid, gradient) in tokens.iter().zip(gradients) {
            for (sum, gradient) in sums.iter_mut().zip(self.gradients(grid, gradient)) {
                *sum = Some(match sum.take() {
                    Some(sum) => sum + gradient,
                    None => gradient,
                });
            }
        }
        for (parameter, gradient) in self.parameters.iter_mut().zip(sums) {
            parameter.update(gradient.expect("an image"), t, config);
        }
        Ok(value)
    }

    /// The gradients with respect to the parameters, from that with respect to the outputs of an image.
    fn gradients(&self, grid: &TokenGrid, of_outputs: Vec<f32>) -> Vec<Tensor<2>> {
        let tracked = self.device.clone().autodiff();
        let leaf = |parameter: &Parameter| Tensor::from_inner(parameter.value.clone()).require_grad();
        let leaves: Vec<Tensor<2>> = self.parameters.iter().map(leaf).collect();
        let mut at = 0;
        let mut next = |_: [usize; 2], _: usize| {
            at += 1;
            leaves[at - 1].clone()
        };
        let x = matrix(grid.values.clone(), [grid.rows * grid.columns, grid.dim], &tracked);
        let outputs = self.forward(x, (grid.rows, grid.columns), &mut next);
        let weights = matrix(of_outputs, outputs.dims(), &tracked);
        let gradients = (outputs * weights).sum().backward();
        leaves.iter().map(|leaf| leaf.grad(&gradients).expect("every parameter has a part in the outputs")).collect()
    }

    /// The outputs for an image, `[rows · columns, channels]`, and their grid.
    pub(crate) fn outputs(&self, grid: &TokenGrid) -> Result<(Vec<f32>, (usize, usize)), EvaluationError> {
        let x = matrix(grid.values.clone(), [grid.rows * grid.columns, grid.dim], &self.device);
        let mut at = 0;
        let mut next = |_: [usize; 2], _: usize| {
            at += 1;
            self.parameters[at - 1].value.clone()
        };
        let outputs = self.forward(x, (grid.rows, grid.columns), &mut next);
        Ok((floats(&read(outputs)?)?.to_vec(), (SCALE * grid.rows, SCALE * grid.columns)))
    }

    /// Number of outputs for a place.
    pub(crate) fn channels(&self) -> usize {
        self.channels
    }

    /// Tokens `[h · w, D]` of a grid `(h, w)` to outputs `[4h · 4w, channels]`.
    fn forward(&self, tokens: Tensor<2>, (h, w): (usize, usize), next: &mut Next<'_>) -> Tensor<2> {
        let mut from = 0;
        let mut maps = Vec::with_capacity(BLOCKS);
        for (block, &width) in self.widths.iter().enumerate() {
            let own = tokens.clone().slice([0..h * w, from..from + width]);
            from += width;
            let projected = PROJECTED[block];
            let map = match block {
                0 | 1 => {
                    let scale = SCALE >> block;
                    let x = own.matmul(next([width, projected], width)) + next([1, projected], 0);
                    enlarged(x, (h, w), scale, projected, next)
                }
                _ => {
                    let x = own.matmul(next([width, projected], width)) + next([1, projected], 0);
                    let x = x.transpose().reshape([1, projected, h, w]);
                    if block == 2 { x } else { convolved(x, projected, 3, 2, true, next) }
                }
            };
            maps.push(convolved(map, FEATURES, 3, 1, false, next));
        }
        let mut sum: Option<Tensor<4>> = None;
        let sizes: Vec<(usize, usize)> = maps.iter().map(|map| (map.dims()[2], map.dims()[3])).collect();
        for (level, map) in maps.into_iter().enumerate().rev() {
            let added = match sum.take() {
                Some(below) => below + residual(map, next),
                None => map,
            };
            let mixed = residual(added, next);
            let size = if level == 0 { sizes[0] } else { sizes[level - 1] };
            sum = Some(convolved(resized(mixed, size), FEATURES, 1, 1, true, next));
        }
        let x = sum.expect("a block");
        let x = relu(convolved(x, FEATURES / 2, 3, 1, true, next));
        let x = x.reshape([FEATURES / 2, SCALE * h * SCALE * w]).transpose();
        x.matmul(next([FEATURES / 2, self.channels], SMALL * FEATURES / 2)) + next([1, self.channels], 0)
    }
}

/// A convolution whose output has the input's size, or half of it, rounded up.
fn convolved(
    x: Tensor<4>,
    channels: usize,
    kernel: usize,
    stride: usize,
    has_bias: bool,
    next: &mut Next<'_>,
) -> Tensor<4> {
    let from = x.dims()[1];
    let terms = from * kernel * kernel;
    let weight = next([channels, terms], terms).reshape([channels, from, kernel, kernel]);
    let bias = has_bias.then(|| next([1, channels], 0).reshape([channels]));
    let padding = kernel / 2;
    conv2d(x, weight, bias, ConvOptions::new([stride, stride], [padding, padding], [1, 1], 1))
}

/// A transposed convolution with kernels as large as their stride: each token `[h · w, C]` becomes `scale × scale` pixels of a
/// map `[1, C, scale·h, scale·w]`.
fn enlarged(x: Tensor<2>, (h, w): (usize, usize), scale: usize, channels: usize, next: &mut Next<'_>) -> Tensor<4> {
    let pixels = scale * scale;
    let x = x.matmul(next([channels, pixels * channels], channels)) + next([1, pixels * channels], 0);
    let x: Tensor<5> = x.reshape([h, w, scale, scale, channels]);
    x.permute([4, 0, 2, 1, 3]).reshape([1, channels, scale * h, scale * w])
}

/// `x + conv(relu(conv(relu(x))))`.
fn residual(x: Tensor<4>, next: &mut Next<'_>) -> Tensor<4> {
    let channels = x.dims()[1];
    let inner = relu(convolved(relu(x.clone()), channels, 3, 1, true, next));
    let terms = 9 * channels;
    let weight = next([channels, terms], SMALL * terms).reshape([channels, channels, 3, 3]);
    let bias = next([1, channels], 0).reshape([channels]);
    x + conv2d(inner, weight, Some(bias), ConvOptions::new([1, 1], [1, 1], [1, 1], 1))
}

/// Bilinear, sampled at the middles of pixels.
fn resized(x: Tensor<4>, (height, width): (usize, usize)) -> Tensor<4> {
    let [batch, channels, h, w] = x.dims();
    if (h, w) == (height, width) {
        return x;
    }
    let device = x.device();
    let along = |from: usize, to: usize| -> Tensor<2> {
        let values = weights(Filter::Bilinear, from, to, from as f64 / to as f64, false);
        Tensor::from_data(TensorData::new(values, [to, from]), (&device, DType::F32))
    };
    let wide = x.reshape([batch * channels * h, w]).matmul(along(w, width).transpose());
    let wide = wide.reshape([batch * channels, h, width]).swap_dims(1, 2).reshape([batch * channels * width, h]);
    let both = wide.matmul(along(h, height).transpose()).reshape([batch * channels, width, height]);
    both.swap_dims(1, 2).reshape([batch, channels, height, width])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::gaussian;
    use dinoxide_model::weights::host;

    const WIDTHS: [usize; 4] = [3, 5, 2, 4];

    fn grid(rows: usize, columns: usize, seed: u64) -> TokenGrid {
        TokenGrid { rows, columns, dim: 14, values: gaussian(rows * columns, 14, seed).values().to_vec() }
    }

    #[test]
    fn outputs_have_four_places_along_a_patch_whatever_the_grid() {
        let head = DptHead::new(&WIDTHS, 3, 0, &Device::flex());
        let mut seen = 0;
        for (rows, columns) in [(1, 1), (3, 5), (4, 2)] {
            let (values, size) = head.outputs(&grid(rows, columns, 1)).unwrap();
            assert_eq!((values.len(), size), (16 * rows * columns * 3, (4 * rows, 4 * columns)));
            assert!(values.iter().all(|value| value.is_finite()));
            seen += 1;
        }
        assert_eq!(seen, 3);
    }

    #[test]
    fn gradients_are_finite_differences() {
        let device = Device::flex();
        let mut head = DptHead::new(&WIDTHS, 2, 5, &device);
        let grid = grid(2, 3, 8);
        let of_outputs: Vec<f32> = gaussian(16 * 6, 2, 3).values().to_vec();
        let objective = |head: &DptHead| -> f64 {
            let (values, _) = head.outputs(&grid).unwrap();
            values.iter().zip(&of_outputs).map(|(v, g)| f64::from(v * g)).sum()
        };
        let found = head.gradients(&grid, of_outputs.clone());
        assert_eq!(found.len(), head.parameters.len());
        let mut seen = 0;
        for (number, gradient) in found.iter().enumerate() {
            let shape = gradient.dims();
            let gradient = host(gradient.clone().reshape([-1]));
            // The entry that matters most: small ones drown in rounding.
            let at = (0..gradient.len()).max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs())).unwrap();
            let values = host(head.parameters[number].value.clone().reshape([-1]));
            let mut moved = |by: f32| {
                let mut values = values.clone();
                values[at] += by;
                head.parameters[number].value = matrix(values, shape, &device);
                objective(&head)
            };
            // Short, since few pixels may pass the bend of a ReLU on the way.
            let step = 3e-4;
            let slope = (moved(step) - moved(-step)) / f64::from(2.0 * step);
            moved(0.0);
            let expected = f64::from(gradient[at]);
            assert!((slope - expected).abs() < 3e-2 * expected.abs().max(1.0), "{number}: {slope} {expected}");
            seen += 1;
        }
        assert!(seen > 30, "{seen}");
    }

    #[test]
    fn pixels_of_an_enlarged_token_are_its_own() {
        let mut asked = Vec::new();
        // The identity for one channel, times ten and a number for each pixel.
        let mut next = |shape: [usize; 2], _: usize| {
            asked.push(shape);
            let row: Vec<f32> = if asked.len() == 1 { vec![10.0; 4] } else { vec![0.0, 1.0, 2.0, 3.0] };
            matrix(row, shape, &Device::flex())
        };
        let x = matrix(vec![1.0, 2.0], [2, 1], &Device::flex());
        let map = enlarged(x, (1, 2), 2, 1, &mut next);
        assert_eq!(map.dims(), [1, 1, 2, 4]);
        assert_eq!(host(map.reshape([-1])), [10.0, 11.0, 20.0, 21.0, 12.0, 13.0, 22.0, 23.0]);
        assert_eq!(asked, [[1, 4], [1, 4]]);
    }

    #[test]
    fn a_residual_unit_by_hand() {
        let mut asked = 0;
        // Kernels with a middle alone: times -3 and 0.5 more, then times 2 and 0.25 more.
        let mut next = |shape: [usize; 2], _: usize| {
            let mut values = vec![0.0; shape[1]];
            values[shape[1] / 2] = [-3.0, 0.5, 2.0, 0.25][asked];
            asked += 1;
            matrix(values, shape, &Device::flex())
        };
        let x = Tensor::<4>::from_data(TensorData::new(vec![-1.0f32, 0.1, 2.0], [1, 1, 1, 3]), &Device::flex());
        let found = host(residual(x, &mut next).reshape([-1]));
        // The unit sees 0, 0.1 and 2.
        let expected = [-1.0 + 2.0 * 0.5 + 0.25, 0.1 + 2.0 * 0.2 + 0.25, 2.0 + 0.25];
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?}");
        assert_eq!(asked, 4);
    }

    #[test]
    fn maps_are_resized_as_tokens_are() {
        let values = gaussian(6, 2, 4).values().to_vec();
        let map = Tensor::<4>::from_data(TensorData::new(values.clone(), [1, 2, 2, 3]), &Device::flex());
        let found = host(resized(map, (5, 4)).reshape([-1]));
        let by_place: Vec<f32> = (0..6).flat_map(|at| [values[at], values[6 + at]]).collect();
        let expected = super::super::bilinear::Bilinear::new((2, 3), (5, 4), 2).map(&by_place, <[f32]>::to_vec);
        for (at, expected) in expected.iter().enumerate() {
            for channel in 0..2 {
                assert!((found[channel * 20 + at] - expected[channel]).abs() < 1e-5, "{at} {channel}");
            }
        }
    }

    #[test]
    fn a_head_learns_what_no_linear_one_can_and_repeats() {
        let device = Device::flex();
        let mut scratch = Scratch::new().unwrap();
        let all = [grid(2, 3, 1), grid(3, 2, 2)];
        let stored: Vec<StoredGrid> = all.iter().map(|grid| scratch.push_grid(grid).unwrap()).collect();
        // A checkerboard within each patch, whatever its token.
        let loss = |parts: &[Outputs<'_>]| {
            let gradients: Vec<Vec<f32>> = parts
                .iter()
                .map(|part| {
                    let truth =
                        |at: usize| if (at / part.grid.1 + at % part.grid.1).is_multiple_of(2) { 1.0 } else { -1.0 };
                    part.values.iter().enumerate().map(|(at, value)| value - truth(at)).collect()
                })
                .collect();
            let all: Vec<f32> = gradients.concat();
            let count = all.len() as f32;
            let value = all.iter().map(|d| f64::from(d * d)).sum::<f64>() / f64::from(count);
            let scaled = |gradient: Vec<f32>| gradient.into_iter().map(|d| 2.0 * d / count).collect();
            Ok((value, gradients.into_iter().map(scaled).collect()))
        };
        let config = HeadConfig { iterations: 80, batch_size: 2, learning_rate: 3e-3, ..HeadConfig::default() };
        let train = |config: &HeadConfig| {
            let mut losses = Vec::new();
            let tokens = (&scratch, &stored[..]);
            DptHead::train("test", tokens, (&WIDTHS, 1), config, &device, &loss, &mut |_, value| losses.push(value))
                .map(|head| (head, losses))
        };
        let (head, losses) = train(&config).unwrap();
        assert!(losses[0] > 0.8 && losses[0] < 1.5 && losses[79] < 0.1, "{losses:?}");
        let (again, _) = train(&config).unwrap();
        assert_eq!(head.outputs(&all[0]).unwrap(), again.outputs(&all[0]).unwrap());
        let (other, _) = train(&HeadConfig { seed: 1, iterations: 1, ..config.clone() }).unwrap();
        assert_ne!(other.outputs(&all[0]).unwrap(), head.outputs(&all[0]).unwrap());
    }
}
