//! From one backbone's tokens to another's width, for feature matching.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use dinoxide_kernels::Precision;
use rand::Rng;

use crate::{init::Init, layers::Linear};

/// A linear map each for CLS and patch tokens.
#[derive(Module, Debug)]
pub struct Projector {
    cls: Linear,
    patches: Linear,
}

impl Projector {
    /// Fresh maps from tokens of `from` to tokens of `to` columns.
    pub fn new(from: usize, to: usize, device: &Device, rng: &mut impl Rng) -> Self {
        let mut init = Init { rng, device };
        Self { cls: Linear::new(from, to, true, &mut init), patches: Linear::new(from, to, true, &mut init) }
    }

    /// The same with its products in this precision.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.cls.precision = precision;
        self.patches.precision = precision;
        self
    }

    /// `[N, D]` → `[N, D']`.
    pub fn cls(&self, tokens: Tensor<2>) -> Tensor<2> {
        self.cls.forward(tokens)
    }

    /// `[N, D]` → `[N, D']`.
    pub fn patches(&self, tokens: Tensor<2>) -> Tensor<2> {
        self.patches.forward(tokens)
    }
}
