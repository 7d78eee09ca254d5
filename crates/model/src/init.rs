//! Initial weights, drawn on the host from a stream that the caller passes in.

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use rand::{Rng, RngExt};
use rand_distr::StandardNormal;

/// Where initial values come from and where they go.
pub(crate) struct Init<'a, R: Rng> {
    pub(crate) rng: &'a mut R,
    pub(crate) device: &'a Device,
}

impl<R: Rng> Init<'_, R> {
    /// Normal values of the given standard deviation.
    ///
    /// The references truncate at an absolute ±2, which for a standard deviation of 0.02 is a hundred deviations away.
    pub(crate) fn normal<const D: usize>(&mut self, shape: [usize; D], std: f64) -> Param<Tensor<D>> {
        let count = shape.iter().product();
        let values = (0..count).map(|_| (self.rng.sample::<f64, _>(StandardNormal) * std) as f32).collect();
        self.param(shape, values)
    }

    /// Uniform values in ±`bound`.
    pub(crate) fn uniform<const D: usize>(&mut self, shape: [usize; D], bound: f64) -> Param<Tensor<D>> {
        let count = shape.iter().product();
        let values = (0..count).map(|_| self.rng.random_range(-bound..=bound) as f32).collect();
        self.param(shape, values)
    }

    /// One value everywhere.
    pub(crate) fn constant<const D: usize>(&mut self, shape: [usize; D], value: f64) -> Param<Tensor<D>> {
        self.param(shape, vec![value as f32; shape.iter().product()])
    }

    fn param<const D: usize>(&self, shape: [usize; D], values: Vec<f32>) -> Param<Tensor<D>> {
        Param::from_data(TensorData::new(values, shape), self.device)
    }
}
