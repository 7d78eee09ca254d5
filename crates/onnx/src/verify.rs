//! Running a written file and comparing what it gives with the backbone that it was made from.
//!
//! The runtime is another implementation of every operator, written against ONNX's specification alone.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use dinoxide_model::{
    Backbone,
    weights::{Description, host},
};
use dinoxide_random::{Purpose, stream};
use rand::RngExt;
use rten::{Model, ModelOptions, op_registry};

use crate::{Check, ImageSize, Input, OnnxError, Options, TOLERANCE};

/// Runs the file on random images of two batch sizes, and of two sizes where it takes any.
///
/// `path` is the file's final name, for messages.
pub(crate) fn compare(
    file: &Path,
    path: &Path,
    backbone: &Backbone,
    description: &Description,
    options: &Options,
) -> Result<Vec<Check>, OnnxError> {
    let model = load(file).map_err(|reason| OnnxError::Runtime { path: path.to_owned(), reason })?;
    let architecture = &description.architecture;
    let sizes = match options.size {
        ImageSize::Fixed { height, width } => [(height, width); 2],
        ImageSize::Dynamic => {
            let (sides, stride) = (architecture.sides(), architecture.stride());
            let trained = (description.image_size / sides.step * sides.step).max(sides.least);
            // The size that it was trained on, and one with more rows and fewer columns of patches, beside which as much is
            // left over as can be.
            let rest = stride - sides.step;
            let (height, width) = (trained + 2 * stride + rest, (trained + rest).saturating_sub(stride));
            [(trained, trained), (height, width.max(sides.least))]
        }
    };
    let mut checks = Vec::new();
    for (batch, (height, width)) in [1, 2].into_iter().zip(sizes) {
        let shape = [batch, architecture.in_channels(), height, width];
        checks.push(compare_on(&model, path, backbone, description, options, shape)?);
    }
    Ok(checks)
}

/// The file, to be run as it stands: no operation is fused with another, and none but those that a graph may have is known.
pub(crate) fn load(file: &Path) -> Result<Model, String> {
    let operators = op_registry!(
        Abs,
        Add,
        And,
        Cast,
        Concat,
        Conv,
        Cos,
        Div,
        Equal,
        Erf,
        Expand,
        Gather,
        LayerNormalization,
        Less,
        MatMul,
        Max,
        Min,
        Mul,
        Neg,
        Range,
        ReduceMean,
        ReduceSum,
        Reshape,
        Shape,
        Sigmoid,
        Sin,
        Slice,
        Softmax,
        Split,
        Sqrt,
        Sub,
        Transpose,
        Where
    );
    ModelOptions::with_ops(operators).enable_optimization(false).load_file(file).map_err(|e| e.to_string())
}

/// Random images, as the file takes them and as the backbone does.
fn images(description: &Description, input: Input, shape: [usize; 4]) -> (Vec<f32>, Vec<f32>) {
    let [batch, channels, height, width] = shape;
    let mut rng = stream(0, Purpose::Evaluation, batch as u64, (height * width) as u64);
    let rgb: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random::<f32>()).collect();
    let mut normalized = rgb.clone();
    for (i, plane) in normalized.chunks_exact_mut(height * width).enumerate() {
        // A model of other images than RGB has no mean and deviation: its images are on (−2, 2).
        let (mean, std) = if channels == 3 { (description.mean[i % 3], description.std[i % 3]) } else { (0.5, 0.25) };
        plane.iter_mut().for_each(|value| *value = (*value - mean) / std);
    }
    match input {
        Input::Rgb => (rgb, normalized),
        Input::Normalized => (normalized.clone(), normalized),
    }
}

pub(crate) fn compare_on(
    model: &Model,
    path: &Path,
    backbone: &Backbone,
    description: &Description,
    options: &Options,
    shape: [usize; 4],
) -> Result<Check, OnnxError> {
    let [batch, _, height, width] = shape;
    let (given, normalized) = images(description, options.input, shape);
    let device = backbone.devices().into_iter().next().expect("a backbone has parameters");
    let features = backbone.forward(Tensor::from_data(TensorData::new(normalized, shape), &device), None);
    let mut expected = vec![
        ("cls", features.cls.dims().to_vec(), host(features.cls.reshape([-1]))),
        ("patches", features.patches.dims().to_vec(), host(features.patches.reshape([-1]))),
    ];
    if let Some(registers) = features.registers {
        expected.push(("registers", registers.dims().to_vec(), host(registers.reshape([-1]))));
    }
    if expected.iter().any(|(_, _, values)| values.iter().any(|value| !value.is_finite())) {
        return Err(OnnxError::NotFinite);
    }

    let runtime = |reason: String| OnnxError::Runtime { path: path.to_owned(), reason };
    let node = |name: &str| model.node_id(name).map_err(|e| runtime(e.to_string()));
    let outputs = expected.iter().map(|(name, ..)| node(name)).collect::<Result<Vec<_>, _>>()?;
    let given = rten_tensor::Tensor::from_data(&shape, given);
    let found = model
        .run(vec![(node(options.input.name())?, given.into())], &outputs, None)
        .map_err(|e| runtime(format!("on images of {height}×{width} pixels: {e}")))?;

    let mut worst = 0.0;
    for ((output, shape, expected), found) in expected.into_iter().zip(found) {
        let found: rten_tensor::Tensor<f32> = found.try_into().map_err(|e| runtime(format!("`{output}`: {e}")))?;
        let found_shape = rten_tensor::prelude::Layout::shape(&found).to_vec();
        if found_shape != shape {
            return Err(runtime(format!("`{output}` is {found_shape:?}, expected {shape:?}")));
        }
        let deviation = deviation(&expected, &found.into_data());
        if deviation > TOLERANCE {
            return Err(OnnxError::Deviates { path: path.to_owned(), output, batch, height, width, deviation });
        }
        worst = deviation.max(worst);
    }
    Ok(Check { batch, height, width, deviation: worst })
}

/// The largest difference between the values, over the root mean square of the expected ones where that is above 1;
/// infinite if a difference is no finite number. Both are of one length.
fn deviation(expected: &[f32], found: &[f32]) -> f32 {
    let mean_square = expected.iter().map(|&e| f64::from(e).powi(2)).sum::<f64>() / expected.len() as f64;
    let mut largest = 0f32;
    for (&expected, &found) in expected.iter().zip(found) {
        let difference = (expected - found).abs();
        // `max` would pass over a difference that is no number.
        if !difference.is_finite() {
            return f32::INFINITY;
        }
        largest = largest.max(difference);
    }
    largest / mean_square.sqrt().max(1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_by_hand() {
        assert_eq!(deviation(&[0.5, -0.5], &[0.5, -0.25]), 0.25);
        assert_eq!(deviation(&[4.0, -4.0, 4.0], &[4.0, -4.0, 6.0]), 0.5);
        assert_eq!(deviation(&[1.0, 1.0], &[f32::NAN, 1.0]), f32::INFINITY);
    }
}
