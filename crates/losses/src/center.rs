//! Softmax centering: a running mean of the teacher's logits is subtracted before they are sharpened (DINO eq. 4).

use burn::tensor::{Device, Tensor, activation};

/// The running mean of the teacher's logits.
#[derive(Clone, Debug)]
pub struct Center {
    /// `[1, K]`, plain.
    pub value: Tensor<2>,
    /// Share of the old value that an update keeps.
    pub momentum: f64,
}

impl Center {
    /// A center at zero.
    pub fn new(prototypes: usize, momentum: f64, device: &Device) -> Self {
        Self { value: Tensor::zeros([1, prototypes], device), momentum }
    }

    /// Targets `softmax((logits − center) / temperature)`: `[B, K]` → `[B, K]`.
    pub fn targets(&self, logits: Tensor<2>, temperature: f64) -> Tensor<2> {
        activation::softmax((logits - self.value.clone()) / temperature, 1)
    }

    /// Moves towards the mean of a batch's logits `[B, K]`; to be called after the batch's targets were taken, so that a
    /// step's targets depend on earlier batches only. An empty batch changes nothing.
    pub fn update(&mut self, logits: Tensor<2>) {
        if logits.dims()[0] > 0 {
            self.value = self.value.clone() * self.momentum + logits.mean_dim(0) * (1.0 - self.momentum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_use_the_center_of_earlier_batches() {
        let device = Device::flex();
        let mut center = Center::new(2, 0.9, &device);
        let logits = Tensor::<2>::from_data([[1.0f32, 0.0], [3.0, 0.0], [2.0, 3.0]], &device);
        let before: Vec<f32> = center.targets(logits.clone(), 1.0).into_data().try_to_vec().expect("f32");
        assert!((before[0] - 0.731_058_6).abs() < 1e-6, "a fresh center is zero");
        center.update(logits.clone());
        assert_eq!(center.value.clone().into_data().try_to_vec::<f32>().expect("f32"), [0.2, 0.1]);
        let after: Vec<f32> = center.targets(logits, 1.0).into_data().try_to_vec().expect("f32");
        assert!((after[0] - 0.710_949_5).abs() < 1e-6, "softmax of (0.8, −0.1), not {}", after[0]);
    }
}
