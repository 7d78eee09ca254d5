//! Comparing an operation with its definition: the value and every gradient, on inputs that are the same for both.

use burn::tensor::{Device, Tensor, TensorData};

use crate::{Branch, Normalization, Precision, Projection, RopeTable};

/// Numbers in [−1, 1) that depend on the seed only.
pub(crate) fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678_9ABC_DEF1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Input shapes of one comparison, and which of them are tracked.
pub(crate) struct Case {
    shapes: Vec<Vec<usize>>,
    tracked: Vec<bool>,
    scale: f32,
}

impl Case {
    pub(crate) fn new(shapes: &[&[usize]], tracked: &[bool]) -> Self {
        assert_eq!(shapes.len(), tracked.len());
        Self { shapes: shapes.iter().map(|s| s.to_vec()).collect(), tracked: tracked.to_vec(), scale: 1.0 }
    }

    /// The same with inputs in [−scale, scale) instead of [−1, 1).
    pub(crate) fn scaled(self, scale: f32) -> Self {
        Self { scale, ..self }
    }

    fn inputs(&self) -> Inputs {
        // Without a tracked input the device is the plain one, which takes the path without automatic differentiation.
        let device = Device::flex();
        let device = if self.tracked.contains(&true) { device.autodiff() } else { device };
        let tensors = self.shapes.iter().enumerate().map(|(i, shape)| {
            let data: Vec<f32> = numbers(shape.iter().product(), i as u64 + 1).iter().map(|v| v * self.scale).collect();
            let tensor = Tensor::<1>::from_data(TensorData::from(data.as_slice()), &device);
            if self.tracked[i] { tensor.require_grad() } else { tensor }
        });
        Inputs { tensors: tensors.collect(), shapes: self.shapes.clone() }
    }
}

/// The inputs of one run.
pub(crate) struct Inputs {
    tensors: Vec<Tensor<1>>,
    shapes: Vec<Vec<usize>>,
}

impl Inputs {
    fn shaped<const D: usize>(&self, i: usize) -> Tensor<D> {
        let shape: [usize; D] = self.shapes[i].as_slice().try_into().expect("the rank of the case");
        self.tensors[i].clone().reshape(shape)
    }

    pub(crate) fn vector(&self, i: usize) -> Tensor<1> {
        self.shaped(i)
    }

    pub(crate) fn matrix(&self, i: usize) -> Tensor<2> {
        self.shaped(i)
    }

    pub(crate) fn images(&self, i: usize) -> Tensor<4> {
        self.shaped(i)
    }

    pub(crate) fn cube(&self, i: usize) -> Tensor<3> {
        self.shaped(i)
    }
}

/// The shapes of a branch's inputs: `x`; the norm's weight and bias; weights and bias of the first layer, of the last; the layer
/// scale.
pub(crate) fn branch_shapes(x: &[usize], first: usize, inner: usize) -> Vec<Vec<usize>> {
    let width = *x.last().expect("a shape");
    let (weight, w_out) = (vec![first, width], vec![width, inner]);
    vec![x.to_vec(), vec![width], vec![width], weight, vec![first], w_out, vec![width], vec![width]]
}

/// Of an attention branch; the last two inputs are the tables of a rotation, which nobody tracks.
pub(crate) fn attention_case([batch, tokens, heads, head_dim]: [usize; 4], tracked: [bool; 8]) -> Case {
    let width = heads * head_dim;
    let mut shapes = branch_shapes(&[batch, tokens, width], 3 * width, width);
    shapes.extend([vec![tokens, head_dim], vec![tokens, head_dim]]);
    Case { shapes, tracked: tracked.into_iter().chain([false; 2]).collect(), scale: 1.0 }
}

/// Of a feed-forward branch.
pub(crate) fn feed_forward_case([rows, width, inner]: [usize; 3], tracked: [bool; 8]) -> Case {
    Case { shapes: branch_shapes(&[rows, width], inner, inner), tracked: tracked.to_vec(), scale: 1.0 }
}

/// The branch of such inputs, with biases and layer scale or without.
pub(crate) fn branch(t: &Inputs, bias: bool, gamma: bool, precision: Precision) -> Branch {
    Branch {
        norm: Normalization { weight: t.vector(1), bias: t.vector(2), eps: 1e-5 },
        first: Projection { weight: t.matrix(3), bias: bias.then(|| t.vector(4)) },
        last: Projection { weight: t.matrix(5), bias: bias.then(|| t.vector(6)) },
        gamma: gamma.then(|| t.vector(7)),
        precision,
        recompute: false,
    }
}

/// The rotation of an [`attention_case`].
pub(crate) fn rope(t: &Inputs) -> RopeTable {
    RopeTable { cos: t.matrix(8), sin: t.matrix(9) }
}

/// The value, and the gradient of each tracked input for a fixed gradient of the value.
pub(crate) fn run<const D: usize>(case: &Case, f: impl Fn(&Inputs) -> Tensor<D>) -> Vec<Vec<f32>> {
    let inputs = case.inputs();
    let value = f(&inputs);
    let read = |t: TensorData| t.try_to_vec::<f32>().expect("f32");
    let mut results = vec![read(value.to_data())];
    if case.tracked.contains(&true) {
        let weights = numbers(value.shape().num_elements(), 99);
        let weights = Tensor::<1>::from_data(TensorData::from(weights.as_slice()), &value.device());
        let grads = (value.clone() * weights.reshape(value.shape())).sum().backward();
        for (i, tensor) in inputs.tensors.iter().enumerate() {
            let grad = tensor.grad(&grads);
            assert_eq!(grad.is_some(), case.tracked[i], "input {i}");
            results.extend(grad.map(|grad| read(grad.to_data())));
        }
    }
    results
}

/// Asserts that both functions give the same value and gradients to 2e-5 of the largest element, and that the first gives
/// the same bits when it is run again.
pub(crate) fn assert_same<const D: usize>(
    case: &Case,
    fused: impl Fn(&Inputs) -> Tensor<D>,
    defined: impl Fn(&Inputs) -> Tensor<D>,
) {
    let (actual, expected) = (run(case, &fused), run(case, defined));
    assert_eq!(actual.len(), expected.len());
    for (i, (a, e)) in actual.iter().zip(&expected).enumerate() {
        let worst = largest_difference(std::slice::from_ref(a), std::slice::from_ref(e));
        assert!(
            worst <= 2e-5,
            "result {i} of {:?} tracked {:?}: differs by {worst} of its largest element",
            case.shapes,
            case.tracked
        );
    }
    let bits = |results: &[Vec<f32>]| results.iter().flatten().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&run(case, fused)), bits(&actual), "a second run gives other bits");
}

/// The largest difference between elements of two such lists of results, as a share of the largest element of its result.
pub(crate) fn largest_difference(actual: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    let shares = actual.iter().zip(expected).map(|(a, e)| {
        assert_eq!(a.len(), e.len());
        let largest = e.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
        let differences = a.iter().zip(e).map(|(a, e)| (a - e).abs());
        differences.fold(0.0f32, |m, v| if v > m || v.is_nan() { v } else { m }) / largest
    });
    shares.fold(0.0, |m, v| if v > m || v.is_nan() { v } else { m })
}

/// Asserts that the distance of the first function's value and gradients in bfloat16 to single precision is at most so many
/// times that of the definition, which rounds the operands of the same products; how many results there were.
pub(crate) fn assert_as_near<const D: usize>(
    case: &Case,
    ours: impl Fn(&Inputs, Precision) -> Tensor<D>,
    defined: impl Fn(&Inputs, Precision) -> Tensor<D>,
    most: f64,
) -> usize {
    let single = run(case, |t| defined(t, Precision::Fp32));
    let half = [run(case, |t| ours(t, Precision::Bf16)), run(case, |t| defined(t, Precision::Bf16))];
    let [ours, defined] = half.map(|results| distances(&results, &single));
    for (i, (ours, defined)) in ours.iter().zip(&defined).enumerate() {
        assert!(*ours < most * defined + 1e-4, "result {i}: {ours:.1e}, by definition {defined:.1e}");
    }
    ours.len()
}

/// Root of the mean squared difference of each result, as a share of the root of its mean square.
pub(crate) fn distances(actual: &[Vec<f32>], expected: &[Vec<f32>]) -> Vec<f64> {
    let square = |v: f32| f64::from(v).powi(2);
    let of = |(a, e): (&Vec<f32>, &Vec<f32>)| {
        let differences: f64 = a.iter().zip(e).map(|(a, e)| square(a - e)).sum();
        (differences / e.iter().map(|v| square(*v)).sum::<f64>()).sqrt()
    };
    assert_eq!(actual.len(), expected.len());
    actual.iter().zip(expected).map(of).collect()
}
