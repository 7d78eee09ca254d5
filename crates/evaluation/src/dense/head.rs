//! The linear head of dense tasks: dropout of channels, batch normalisation, and a linear layer on each token.
//!
//! The head of the references is `Dropout2d`, `SyncBatchNorm` and a 1×1 convolution, trained with AdamW. It stands on a
//! frozen backbone, so its gradients are written down here: with `z` the normalised tokens and `δ` the gradient with
//! respect to the outputs, everything follows from `G = δᵀz` and `s = δᵀ1`.

use burn::tensor::{DType, Device, Tensor, TensorData};
use dinoxide_random::{Purpose, stream};
use rand::RngExt;
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::TokenGrid;
use super::heads::HeadKind;
use super::scratch::{Scratch, StoredGrid};
use crate::EvaluationError;
use crate::linear_probe::standard_normal;
use crate::neighbors::{floats, read};
use crate::selection::draws;

/// Added to the variance, as everywhere in PyTorch.
const NORM_EPS: f64 = 1e-5;
/// Share of a batch in the running statistics.
const NORM_MOMENTUM: f64 = 0.1;
/// Standard deviation of the initial weights.
const INIT_STD: f32 = 0.01;

/// How a head is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HeadConfig {
    /// What it is made of.
    pub kind: HeadKind,
    /// AdamW iterations.
    pub iterations: usize,
    /// Images (or windows of large images) in an iteration.
    pub batch_size: usize,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Weight decay, decoupled.
    pub weight_decay: f64,
    /// Decay of the moments.
    pub betas: (f64, f64),
    /// Probability with which a channel of an image is left out; by a linear head.
    pub dropout: f64,
    /// Share of the iterations in which the learning rate rises, linearly; it falls to 0 by half a cosine over all.
    pub warmup: f64,
    /// Seed of initial weights, dropout and the order of images.
    pub seed: u64,
}

impl Default for HeadConfig {
    /// DINOv3's for ADE20K, but for the length, which there is 40,000 iterations.
    fn default() -> Self {
        Self {
            kind: HeadKind::Linear,
            iterations: 1000,
            batch_size: 16,
            learning_rate: 1e-3,
            weight_decay: 1e-3,
            betas: (0.9, 0.999),
            dropout: 0.1,
            warmup: 0.0375,
            seed: 0,
        }
    }
}

impl HeadConfig {
    /// Checks the settings, on behalf of `task`.
    ///
    /// # Errors
    /// The first that is out of range.
    pub fn check(&self, task: &'static str) -> Result<(), EvaluationError> {
        let setting = |key, value: String, expected| Err(EvaluationError::Setting { task, key, value, expected });
        if self.iterations == 0 {
            return setting("iterations", "0".into(), "at least 1");
        }
        if self.batch_size == 0 {
            return setting("batch_size", "0".into(), "at least 1");
        }
        if !(self.learning_rate > 0.0 && self.learning_rate.is_finite()) {
            return setting("learning_rate", self.learning_rate.to_string(), "above 0 and finite");
        }
        Ok(())
    }

    /// Learning rate of iteration `t`.
    fn rate(&self, t: usize) -> f64 {
        let (t, total) = (t as f64, self.iterations as f64);
        let warmup = self.warmup * total;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * t / total).cos());
        self.learning_rate * cosine * if t < warmup { (t + 1.0) / (warmup + 1.0) } else { 1.0 }
    }

    /// In words, for a protocol.
    pub fn description(&self) -> String {
        let kind = match self.kind {
            HeadKind::Linear => format!("batch norm and 1x1 convolution, dropout {}", self.dropout),
            HeadKind::Dpt => "DPT".to_owned(),
        };
        format!(
            "{kind}, AdamW, learning rate {:e}, weight decay {:e}, {} iterations of {}, seed {}",
            self.learning_rate, self.weight_decay, self.iterations, self.batch_size, self.seed
        )
    }
}

/// A parameter with its moments.
pub(super) struct Parameter {
    pub(super) value: Tensor<2>,
    first: Tensor<2>,
    second: Tensor<2>,
}

impl Parameter {
    pub(super) fn new(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Self {
        let zeros = Tensor::zeros(shape, (device, DType::F32));
        Self { value: matrix(values, shape, device), first: zeros.clone(), second: zeros }
    }

    pub(super) fn update(&mut self, gradient: Tensor<2>, t: usize, config: &HeadConfig) {
        let (b1, b2) = config.betas;
        self.first = self.first.clone().mul_scalar(b1) + gradient.clone().mul_scalar(1.0 - b1);
        self.second = self.second.clone().mul_scalar(b2) + gradient.powi_scalar(2).mul_scalar(1.0 - b2);
        let unbiased = |beta: f64| 1.0 - beta.powi(t as i32 + 1);
        let first = self.first.clone().div_scalar(unbiased(b1));
        let second = self.second.clone().div_scalar(unbiased(b2));
        let rate = config.rate(t);
        let step = first / (second.sqrt() + 1e-8);
        self.value = self.value.clone().mul_scalar(1.0 - rate * config.weight_decay) - step.mul_scalar(rate);
    }
}

pub(super) fn matrix(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

/// The head.
pub(crate) struct LinearHead {
    /// `[C, D]`.
    weight: Parameter,
    /// `[1, C]`.
    bias: Parameter,
    /// `[1, D]`, of the normalisation.
    gamma: Parameter,
    /// `[1, D]`, of the normalisation.
    beta: Parameter,
    /// `[1, D]`, running.
    mean: Tensor<2>,
    /// `[1, D]`, running.
    variance: Tensor<2>,
    device: Device,
}

/// Outputs of a head for one image, `[rows · columns, channels]`.
pub(crate) struct Outputs<'a> {
    /// Number of the image among those stored.
    pub(crate) image: usize,
    pub(crate) grid: (usize, usize),
    pub(crate) values: &'a [f32],
}

/// The loss of a batch of outputs, and its gradient with respect to the outputs of each image.
pub(crate) type BatchLoss<'a> = dyn Fn(&[Outputs<'_>]) -> Result<(f64, Vec<Vec<f32>>), EvaluationError> + 'a;

impl LinearHead {
    fn new(dim: usize, channels: usize, seed: u64, device: &Device) -> Self {
        let mut rng = stream(seed, Purpose::Evaluation, draws::HEAD_INIT, 0);
        let weight = standard_normal(dim * channels, &mut rng).into_iter().map(|v| INIT_STD * v).collect();
        Self {
            weight: Parameter::new(weight, [channels, dim], device),
            bias: Parameter::new(vec![0.0; channels], [1, channels], device),
            gamma: Parameter::new(vec![1.0; dim], [1, dim], device),
            beta: Parameter::new(vec![0.0; dim], [1, dim], device),
            mean: Tensor::zeros([1, dim], (device, DType::F32)),
            variance: Tensor::ones([1, dim], (device, DType::F32)),
            device: device.clone(),
        }
    }

    /// Trains a head on stored tokens.
    ///
    /// `loss` is given the outputs of a batch and gives its loss, and the gradient with respect to the outputs, image after
    /// image.
    ///
    /// # Errors
    /// Settings out of range, a loss that is not finite, or what `loss` or the scratch file say.
    pub(crate) fn train(
        task: &'static str,
        (scratch, grids): (&Scratch, &[StoredGrid]),
        channels: usize,
        config: &HeadConfig,
        device: &Device,
        loss: &BatchLoss<'_>,
        progress: &mut dyn FnMut(usize, f64),
    ) -> Result<Self, EvaluationError> {
        config.check(task)?;
        let dim = grids[0].dim;
        let mut head = Self::new(dim, channels, config.seed, device);
        let mut order = Order::new(grids.len(), config.seed);
        for t in 0..config.iterations {
            let images: Vec<usize> = (0..config.batch_size).map(|i| order.at(t * config.batch_size + i)).collect();
            let mut rng = stream(config.seed, Purpose::Evaluation, draws::HEAD_DROPOUT, t as u64);
            let kept_scale = 1.0 / (1.0 - config.dropout as f32);
            let kept: Vec<Vec<f32>> = images
                .iter()
                .map(|_| {
                    let kept = |_| if rng.random::<f64>() < config.dropout { 0.0 } else { kept_scale };
                    (0..dim).map(kept).collect()
                })
                .collect();
            let tokens = images
                .par_iter()
                .zip(&kept)
                .map(|(&image, kept)| {
                    let mut grid = scratch.get_grid(&grids[image])?;
                    for token in grid.values.chunks_exact_mut(dim) {
                        token.iter_mut().zip(kept).for_each(|(value, kept)| *value *= kept);
                    }
                    Ok(grid)
                })
                .collect::<Result<Vec<TokenGrid>, EvaluationError>>()?;
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
        let dim = tokens[0].dim;
        let channels = self.bias.value.dims()[1];
        let all: Vec<f32> = tokens.iter().flat_map(|grid| grid.values.iter().copied()).collect();
        let count = all.len() / dim;
        let x = matrix(all, [count, dim], &self.device);
        let mean = x.clone().mean_dim(0);
        let centered = x - mean.clone();
        let variance = centered.clone().powi_scalar(2).mean_dim(0);
        let running = |old: &Tensor<2>, new: Tensor<2>| {
            old.clone().mul_scalar(1.0 - NORM_MOMENTUM) + new.mul_scalar(NORM_MOMENTUM)
        };
        self.mean = running(&self.mean, mean);
        let unbiased = count as f64 / (count as f64 - 1.0).max(1.0);
        self.variance = running(&self.variance, variance.clone().mul_scalar(unbiased));
        let z = centered / (variance + NORM_EPS).sqrt();

        let outputs = read(self.affine(z.clone()))?;
        let values = floats(&outputs)?;
        let mut parts = Vec::with_capacity(images.len());
        let mut from = 0;
        for (&image, grid) in images.iter().zip(tokens) {
            let length = grid.rows * grid.columns * channels;
            parts.push(Outputs { image, grid: (grid.rows, grid.columns), values: &values[from..from + length] });
            from += length;
        }
        let (value, gradients) = loss(&parts)?;
        let delta = matrix(gradients.concat(), [count, channels], &self.device);

        let s = delta.clone().sum_dim(0).transpose();
        let g = delta.transpose().matmul(z);
        let weight = self.weight.value.clone();
        let weight_gradient = g.clone() * self.gamma.value.clone() + s.clone().matmul(self.beta.value.clone());
        self.gamma.update((weight.clone() * g).sum_dim(0), t, config);
        self.beta.update((weight * s.clone()).sum_dim(0), t, config);
        self.weight.update(weight_gradient, t, config);
        self.bias.update(s.transpose(), t, config);
        Ok(value)
    }

    /// `(z·γ + β)·Wᵀ + b`.
    fn affine(&self, z: Tensor<2>) -> Tensor<2> {
        let normed = z * self.gamma.value.clone() + self.beta.value.clone();
        normed.matmul(self.weight.value.clone().transpose()) + self.bias.value.clone()
    }

    /// The outputs for an image, `[rows · columns, channels]`, with the running statistics and without dropout.
    pub(crate) fn outputs(&self, grid: &TokenGrid) -> Result<Vec<f32>, EvaluationError> {
        let x = matrix(grid.values.clone(), [grid.rows * grid.columns, grid.dim], &self.device);
        let z = (x - self.mean.clone()) / (self.variance.clone() + NORM_EPS).sqrt();
        Ok(floats(&read(self.affine(z))?)?.to_vec())
    }

    /// Number of outputs for a token.
    pub(crate) fn channels(&self) -> usize {
        self.bias.value.dims()[1]
    }
}

/// An endless sequence of epochs, each a permutation of the images.
pub(super) struct Order {
    images: usize,
    seed: u64,
    epoch: Option<usize>,
    permutation: Vec<usize>,
}

impl Order {
    pub(super) fn new(images: usize, seed: u64) -> Self {
        Self { images, seed, epoch: None, permutation: Vec::new() }
    }

    pub(super) fn at(&mut self, position: usize) -> usize {
        let epoch = position / self.images;
        if self.epoch != Some(epoch) {
            self.epoch = Some(epoch);
            self.permutation = (0..self.images).collect();
            let mut rng = stream(self.seed, Purpose::Evaluation, draws::HEAD_ORDER, epoch as u64);
            self.permutation.shuffle(&mut rng);
        }
        self.permutation[position % self.images]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Tolerance;

    const DIM: usize = 5;
    const CHANNELS: usize = 3;

    fn wave(count: usize, phase: f32) -> Vec<f32> {
        (0..count).map(|i| ((i * i + 1) as f32 * 0.41 + phase).sin() * (1.0 + (i % DIM) as f32)).collect()
    }

    fn grids() -> Vec<TokenGrid> {
        [(2, 3), (4, 1), (3, 3)]
            .into_iter()
            .enumerate()
            .map(|(i, (rows, columns))| TokenGrid {
                rows,
                columns,
                dim: DIM,
                values: wave(rows * columns * DIM, i as f32),
            })
            .collect()
    }

    /// Half the squared distance to a fixed target; its gradient is the difference.
    fn squares(parts: &[Outputs<'_>]) -> Result<(f64, Vec<Vec<f32>>), EvaluationError> {
        let gradients: Vec<Vec<f32>> = parts
            .iter()
            .map(|part| part.values.iter().zip(wave(part.values.len(), 9.0)).map(|(v, t)| v - t).collect())
            .collect();
        let loss = gradients.iter().flatten().map(|d| f64::from(d * d) / 2.0).sum();
        Ok((loss, gradients))
    }

    #[test]
    fn a_step_follows_the_gradients_of_autodiff() {
        let device = Device::flex();
        let (grids, images) = (grids(), [0, 1, 2]);
        let tracked = device.clone().autodiff();
        let mut head = LinearHead::new(DIM, CHANNELS, 4, &device);
        head.gamma = Parameter::new(vec![0.5, 1.0, 2.0, -1.0, 0.25], [1, DIM], &device);
        head.beta = Parameter::new(vec![0.1, -0.3, 0.2, 0.0, 0.7], [1, DIM], &device);
        let leaf = |p: &Parameter| Tensor::<2>::from_data(p.value.to_data(), &tracked).require_grad();
        let (w, b, gamma, beta) = (leaf(&head.weight), leaf(&head.bias), leaf(&head.gamma), leaf(&head.beta));
        let all: Vec<f32> = grids.iter().flat_map(|grid| grid.values.clone()).collect();
        let target: Vec<f32> = grids.iter().flat_map(|grid| wave(grid.rows * grid.columns * CHANNELS, 9.0)).collect();
        let count = all.len() / DIM;
        let x = Tensor::<2>::from_data(TensorData::new(all, [count, DIM]), &tracked);
        let (variance, mean) = x.clone().var_mean_bias(0);
        let z = (x - mean) / (variance + 1e-5).sqrt();
        let y = (z * gamma.clone() + beta.clone()).matmul(w.clone().transpose()) + b.clone();
        let target = Tensor::<2>::from_data(TensorData::new(target, [count, CHANNELS]), &tracked);
        let gradients = (y - target).powi_scalar(2).sum().div_scalar(2.0).backward();
        // With β₁ = 0 and β₂ = 0 the first moment is the gradient itself.
        let config = HeadConfig { betas: (0.0, 0.0), warmup: 0.0, ..HeadConfig::default() };
        head.step(&images, &grids, 0, &config, &squares).unwrap();
        let mut seen = 0;
        for (own, leaf) in [(&head.weight, w), (&head.bias, b), (&head.gamma, gamma), (&head.beta, beta)] {
            let expected = leaf.grad(&gradients).expect("a gradient").into_data();
            own.first.to_data().assert_approx_eq::<f32>(&expected, Tolerance::rel_abs(1e-4, 1e-4));
            seen += 1;
        }
        assert_eq!(seen, 4);
    }

    #[test]
    fn adamw_by_hand() {
        let device = Device::flex();
        let mut parameter = Parameter::new(vec![2.0], [1, 1], &device);
        let config = HeadConfig {
            iterations: 4,
            learning_rate: 0.1,
            weight_decay: 0.5,
            betas: (0.5, 0.75),
            warmup: 0.0,
            ..HeadConfig::default()
        };
        let (mut value, mut first, mut second) = (2.0f64, 0.0, 0.0);
        for (t, gradient) in [0.3, -0.2, 0.7].into_iter().enumerate() {
            parameter.update(matrix(vec![gradient as f32], [1, 1], &device), t, &config);
            let rate = 0.1 * 0.5 * (1.0 + (std::f64::consts::PI * t as f64 / 4.0).cos());
            first = 0.5 * first + 0.5 * gradient;
            second = 0.75 * second + 0.25 * gradient * gradient;
            let (m, v) = (first / (1.0 - 0.5f64.powi(t as i32 + 1)), second / (1.0 - 0.75f64.powi(t as i32 + 1)));
            value = value * (1.0 - rate * 0.5) - rate * m / (v.sqrt() + 1e-8);
            let found = f64::from(parameter.value.to_data().as_slice::<f32>().unwrap()[0]);
            assert!((found - value).abs() < 1e-6, "{found} {value}");
        }
    }

    #[test]
    fn a_head_learns_a_linear_function_and_repeats() {
        let device = Device::flex();
        let mut scratch = Scratch::new().unwrap();
        let stored: Vec<StoredGrid> = grids().iter().map(|grid| scratch.push_grid(grid).unwrap()).collect();
        let truth = |grid: &TokenGrid| -> Vec<f32> {
            grid.values.chunks(DIM).map(|token| 2.0 * token[1] - token[4] + 0.5).collect()
        };
        let all = grids();
        let loss = |parts: &[Outputs<'_>]| {
            let gradients: Vec<Vec<f32>> = parts
                .iter()
                .map(|part| part.values.iter().zip(truth(&all[part.image])).map(|(v, t)| v - t).collect())
                .collect();
            Ok((gradients.iter().flatten().map(|d| f64::from(d * d)).sum(), gradients))
        };
        let config = HeadConfig {
            iterations: 900,
            batch_size: 3,
            learning_rate: 0.05,
            weight_decay: 0.0,
            dropout: 0.0,
            ..HeadConfig::default()
        };
        let train = |config: &HeadConfig| {
            LinearHead::train("test", (&scratch, &stored), 1, config, &device, &loss, &mut |_, _| ())
        };
        let head = train(&config).unwrap();
        let again = train(&config).unwrap();
        for grid in &all {
            let found = head.outputs(grid).unwrap();
            assert_eq!(found, again.outputs(grid).unwrap());
            for (found, truth) in found.iter().zip(truth(grid)) {
                // The running variance is the unbiased one, of 19 tokens.
                let shrunk = truth * (18.0f32 / 19.0).sqrt();
                assert!((found - truth).abs().min((found - shrunk).abs()) < 0.1, "{found} {truth}");
            }
        }
        let seeded = train(&HeadConfig { seed: 1, iterations: 2, ..config.clone() }).unwrap();
        assert_ne!(seeded.outputs(&all[0]).unwrap(), head.outputs(&all[0]).unwrap());
        let message = train(&HeadConfig { learning_rate: f64::INFINITY, ..config }).err().unwrap().to_string();
        assert!(message.contains("`learning_rate` is inf"), "{message}");
    }

    #[test]
    fn every_epoch_draws_every_image_once() {
        let (mut orders, mut endless) = (Vec::new(), Order::new(7, 5));
        for epoch in 0..3 {
            let mut order: Vec<usize> = (0..7).map(|i| endless.at(7 * epoch + i)).collect();
            orders.push(order.clone());
            order.sort_unstable();
            assert_eq!(order, (0..7).collect::<Vec<_>>());
        }
        assert!(orders[0] != orders[1] || orders[1] != orders[2]);
    }
}
