//! What optimizers that know parameters by name are made of: gradients by name, the references' learning rate groups, and
//! AdamW's memory of one parameter (Loshchilov & Hutter 2019).
//!
//! burn's AdamW fixes weight decay at construction and keys its state by random identifiers. Which parameters are clipped,
//! frozen or scheduled is up to whoever trains.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use dinoxide_kernels as kernels;
use dinoxide_model::parameters;

/// Gradients, flattened and plain, by parameter name.
pub type Gradients = BTreeMap<String, Tensor<1>>;

/// Runs backward from `objective` and adds the gradients of the module's parameters to `into`.
pub fn accumulate<M: Module>(into: &mut Gradients, module: &M, objective: Tensor<1>) {
    struct Collect<'a> {
        path: parameters::Path,
        grads: &'a burn::tensor::Gradients,
        into: &'a mut Gradients,
    }
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = param.val().grad(self.grads) {
                let gradient = gradient.reshape([-1]);
                let name = self.path.name();
                let gradient = match self.into.remove(&name) {
                    // A sum on all threads, in the memory of the one so far.
                    Some(sum) => kernels::residual(sum.unsqueeze(), gradient.unsqueeze(), None).reshape([-1]),
                    None => gradient,
                };
                self.into.insert(name, gradient);
            }
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    let grads = objective.backward();
    module.visit(&mut Collect { path: parameters::Path::default(), grads: &grads, into });
}

/// How a parameter is treated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Factor of the learning rate.
    pub lr_multiplier: f64,
    /// Factor of the weight decay: 0 or 1.
    pub weight_decay_multiplier: f64,
    /// Whether it belongs to the prototypes.
    pub is_last_layer: bool,
}

/// The group of a parameter of a submodule with `depth` blocks (0 for a head, and for a ConvNeXt), by its name within it.
///
/// The learning rate falls by `layerwise_decay` per layer from the output to the input. Biases, layer scales and what is called
/// a norm are not decayed; all else is, as in the references: tokens, position tables, and the norms before a ConvNeXt's
/// convolutions of stride 2 and 4, which are not called so.
pub fn group(name: &str, depth: usize, layerwise_decay: f64) -> Group {
    let at_input = ["pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens"];
    let layer = if depth == 0 {
        1
    } else if at_input.iter().any(|part| name.contains(part)) {
        0
    } else if let Some(block) =
        name.strip_prefix("blocks.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok())
    {
        block + 1
    } else {
        depth + 1
    };
    let undecayed = name.ends_with("bias") || name.contains("norm") || name.contains("gamma");
    Group {
        lr_multiplier: layerwise_decay.powf((depth + 1 - layer) as f64),
        weight_decay_multiplier: if undecayed { 0.0 } else { 1.0 },
        is_last_layer: name.contains("last_layer"),
    }
}

/// The optimizer's memory of one parameter.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Running mean of the gradient.
    pub m: Tensor<1>,
    /// Running mean of its square.
    pub v: Tensor<1>,
    /// Updates so far.
    pub steps: u64,
}

/// The numbers of an update, in which parameters may differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Factor of the gradient, from clipping.
    pub gradient_factor: f64,
    /// Learning rate.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

impl Moments {
    /// Those of a parameter with `len` values that was never updated.
    pub fn zeros(len: usize, device: &Device) -> Self {
        let zeros = Tensor::zeros([len], device);
        Self { m: zeros.clone(), v: zeros, steps: 0 }
    }

    /// AdamW: takes in the gradient and moves the weight, both plain and flat.
    pub fn update(&mut self, weight: Tensor<1>, gradient: Tensor<1>, by: Update) -> Tensor<1> {
        self.steps += 1;
        // The moments are handed over, so that the update can take place in their memory.
        let zeros = Tensor::zeros([1], &weight.device());
        let m = std::mem::replace(&mut self.m, zeros.clone());
        let v = std::mem::replace(&mut self.v, zeros);
        let step = kernels::AdamW {
            gradient_factor: by.gradient_factor,
            beta1: by.beta1,
            beta2: by.beta2,
            eps: by.eps,
            lr: by.lr,
            decay: 1.0 - by.lr * by.weight_decay,
            correction1: 1.0 - by.beta1.powi(self.steps as i32),
            correction2: 1.0 - by.beta2.powi(self.steps as i32),
        };
        let [weight, m, v] = kernels::adamw(weight, gradient, m, v, step);
        (self.m, self.v) = (m, v);
        weight
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layerwise_decay_by_hand() {
        let cases = [
            ("patch_embed.proj.weight", 24, 0.07178980, 1.0),
            ("cls_token", 24, 0.07178980, 1.0),
            ("register_tokens", 24, 0.07178980, 1.0),
            ("blocks.0.attn.qkv.weight", 24, 0.07976644, 1.0),
            ("blocks.23.attn.qkv.bias", 24, 0.9, 0.0),
            ("blocks.3.ls1.gamma", 24, 0.9f64.powi(21), 0.0),
            ("norm.weight", 24, 1.0, 0.0),
            ("local_cls_norm.weight", 24, 1.0, 0.0),
            ("mlp.0.weight", 0, 1.0, 1.0),
            ("mlp.0.bias", 0, 1.0, 0.0),
        ];
        assert_eq!(cases.len(), 10);
        for (name, depth, lr, decay) in cases {
            let found = group(name, depth, 0.9);
            assert!((found.lr_multiplier - lr).abs() < 1e-7, "{name}: {}", found.lr_multiplier);
            assert_eq!(found.weight_decay_multiplier, decay, "{name}");
            assert!(!found.is_last_layer);
        }
        assert!(group("last_layer.weight_v", 0, 0.9).is_last_layer);
    }

    #[test]
    fn two_updates_by_hand() {
        let device = Device::flex();
        let mut moments = Moments::zeros(1, &device);
        let by = Update { beta1: 0.9, beta2: 0.99, eps: 0.5, gradient_factor: 0.5, lr: 0.1, weight_decay: 0.2 };
        let mut weight = Tensor::<1>::from_floats([2.0], &device);
        for gradient in [4.0f32, -1.0] {
            weight = moments.update(weight, Tensor::from_floats([gradient], &device), by);
        }
        // Of 2 and −0.5: m = 0.2 and 0.13, v = 0.04 and 0.0421; over 1 − 0.9ᵗ and 1 − 0.99ᵗ.
        let first = 2.0 * 0.98 - 0.1 * 2.0 / (2.0 + 0.5);
        let (m, v) = (0.13f64 / 0.19, 0.0421f64 / 0.0199);
        let second = first * 0.98 - 0.1 * m / (v.sqrt() + 0.5);
        let found: f32 = weight.into_scalar();
        assert!((f64::from(found) - second).abs() < 1e-6, "{found} {second}");
        assert_eq!(moments.steps, 2);
    }
}
