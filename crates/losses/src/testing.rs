//! Inputs of tests: the same in every run, so that a test which passed once passes always.

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_random::{Purpose, stream};
use rand::RngExt;

/// Numbers in [−1, 1) that depend on the seed only.
pub(crate) fn noise<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let mut rng = stream(seed, Purpose::Init, 0, 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}
