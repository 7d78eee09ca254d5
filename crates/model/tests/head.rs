//! Projection heads at their edges.

use burn::tensor::{Device, Tensor};
use dinoxide_model::weights::host;
use dinoxide_model::{HeadConfig, ProjectionHead};
use dinoxide_random::{Purpose, stream};

#[test]
fn a_token_of_zeros_has_a_bottleneck_and_a_gradient_that_are_numbers() {
    let device = Device::flex().autodiff();
    let config = HeadConfig { prototypes: 5, bottleneck_dim: 3, hidden_dim: 4, ..HeadConfig::default() };
    let head = ProjectionHead::new(6, &config, &device, &mut stream(1, Purpose::Init, 0, 0));
    let x = Tensor::<2>::zeros([2, 6], &device).require_grad();
    let y = head.bottleneck(x.clone());
    assert_eq!(host(y.clone().inner().flatten(0, 1)), [0.0; 6]);
    let gradient = host(x.grad(&y.sum().backward()).expect("a gradient").flatten(0, 1));
    assert!(gradient.iter().all(|v| v.is_finite()), "{gradient:?}");
}
