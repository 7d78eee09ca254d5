//! The graph of a backbone: what [`Backbone::forward`] computes, in operators of ONNX's standard domain.
//!
//! Here is what all backbones have: input, outputs, linear layers, norms and residual connections. `vit.rs` and
//! `convnext.rs` put them together.

use std::collections::BTreeMap;

use dinoxide_model::{
    Architecture, Backbone, Sides, parameters,
    weights::{Description, Weight, host},
};

use crate::graph::{Axis, GraphBuilder, Value, float, int, ints};
use crate::{ImageSize, Input, OnnxError, Options, proto};

/// The graph of `backbone`, which `description` describes.
pub(crate) fn build(
    backbone: &Backbone,
    description: &Description,
    options: &Options,
) -> Result<proto::Graph, OnnxError> {
    let architecture = &description.architecture;
    let grid = match options.size {
        ImageSize::Fixed { height, width } => Some(architecture.grid(height, width)?),
        ImageSize::Dynamic => None,
    };
    let mut weights = BTreeMap::new();
    parameters::visit(backbone, |name, shape, value| {
        weights.insert(name.to_owned(), Weight { shape: shape.to_vec(), values: host(value) });
    });
    let mut g = GraphBuilder::default();
    let images = images(&mut g, description, options);
    let features = match backbone {
        Backbone::Vit(vit) => Network::new(&mut g, weights, vit, vit.config().norm_eps).features(&images, grid),
        Backbone::ConvNext(convnext) => {
            Network::new(&mut g, weights, convnext, convnext.config().norm_eps).features(&images)
        }
    };
    outputs(&mut g, &features, architecture, grid);
    Ok(g.finish("backbone"))
}

/// The input, normalised; of any size, only if the backbone takes it.
fn images(g: &mut GraphBuilder, description: &Description, options: &Options) -> Value {
    let architecture = &description.architecture;
    let (height, width) = match options.size {
        ImageSize::Fixed { height, width } => (Axis::Known(height), Axis::Known(width)),
        ImageSize::Dynamic => (Axis::Named("height"), Axis::Named("width")),
    };
    let axes = [Axis::Named("batch"), Axis::Known(architecture.in_channels()), height, width];
    let images = g.input(options.input.name(), &axes, &options.input.doc(description));
    let images = match options.input {
        Input::Normalized => images,
        Input::Rgb => {
            let mean = g.floats("mean", &[3, 1, 1], &description.mean);
            let std = g.floats("std", &[3, 1, 1], &description.std);
            let centred = g.op("images.centred", "Sub", &[&images, &mean], vec![]);
            g.op("images.normalized", "Div", &[&centred, &std], vec![])
        }
    };
    match options.size {
        ImageSize::Fixed { .. } => images,
        ImageSize::Dynamic => require_sides(g, &images, architecture.sides()),
    }
}

/// The images, unchanged. A running graph fails here if the backbone does not take their sides, instead of cutting off the
/// rest; the name of the operation says which it takes.
fn require_sides(g: &mut GraphBuilder, images: &Value, sides: Sides) -> Value {
    let front = g.op("sides.front", "Shape", &[images], vec![int("start", 0), int("end", 2)]);
    let pixels = g.op("sides.pixels", "Shape", &[images], vec![int("start", 2)]);
    // Up to the next that it takes: then a side that it does not take makes the shape too large, whatever the other side
    // is. Downwards could be to 0, which `Reshape` takes for "as it is".
    let rest = g.int("sides.largest_rest", sides.step as i64 - 1);
    let step = g.int("sides.step", sides.step as i64);
    let least = g.int("sides.least", sides.least as i64);
    let up = g.op("sides.plus_rest", "Add", &[&pixels, &rest], vec![]);
    let up = g.op("sides.steps", "Div", &[&up, &step], vec![]);
    let up = g.op("sides.rounded_up", "Mul", &[&up, &step], vec![]);
    let up = g.op("sides.taken", "Max", &[&up, &least], vec![]);
    let shape = g.op("sides.shape", "Concat", &[&front, &up], vec![int("axis", 0)]);
    let name = format!("sides.are_height_and_width_{}", sides.to_string().replace(' ', "_"));
    g.op(&name, "Reshape", &[images, &shape], vec![])
}

/// Tokens after the final norm, each called by its name as an output.
pub(crate) struct Features {
    pub(crate) cls: Value,
    pub(crate) patches: Value,
    /// With how many there are.
    pub(crate) registers: Option<(usize, Value)>,
}

fn outputs(g: &mut GraphBuilder, features: &Features, architecture: &Architecture, grid: Option<(usize, usize)>) {
    let (batch, dim) = (Axis::Named("batch"), Axis::Known(architecture.embed_dim()));
    let patches = grid.map_or(Axis::Named("patches"), |(rows, columns)| Axis::Known(rows * columns));
    g.output(&features.cls, &[batch, dim], "The CLS token after the final norm: the feature of the whole image.");
    let doc = "The patch tokens after the final norm, row by row from the upper left.";
    g.output(&features.patches, &[batch, patches, dim], doc);
    if let Some((count, registers)) = &features.registers {
        g.output(registers, &[batch, Axis::Known(*count), dim], "The register tokens after the final norm.");
    }
}

/// What is put into the graph, and the backbone that it is read from.
pub(crate) struct Network<'a, B> {
    pub(crate) g: &'a mut GraphBuilder,
    pub(crate) weights: BTreeMap<String, Weight>,
    pub(crate) backbone: &'a B,
    norm_eps: f32,
}

impl<'a, B> Network<'a, B> {
    fn new(g: &'a mut GraphBuilder, weights: BTreeMap<String, Weight>, backbone: &'a B, norm_eps: f64) -> Self {
        Self { g, weights, backbone, norm_eps: norm_eps as f32 }
    }

    /// `x + gamma·branch`, or `x + branch` in a backbone without layer scale; `gamma` is under `name`.
    pub(crate) fn residual(&mut self, x: &Value, branch: &Value, name: &str) -> Value {
        let (gamma, sum) = (format!("{name}.gamma"), format!("{name}.residual"));
        if !self.weights.contains_key(&gamma) {
            return self.g.op(&sum, "Add", &[x, branch], vec![]);
        }
        let gamma = self.constant(&gamma);
        let scaled = self.g.op(&format!("{name}.out"), "Mul", &[branch, &gamma], vec![]);
        self.g.op(&sum, "Add", &[x, &scaled], vec![])
    }

    /// The exact GELU, `x/2·(1 + erf(x/√2))`, in the order that runtimes know and fuse.
    pub(crate) fn gelu(&mut self, x: &Value, name: &str, Gelu { sqrt_two, one, half }: &Gelu) -> Value {
        let of = |part: &str| format!("{name}.{part}");
        let erf = self.g.op(&of("scaled"), "Div", &[x, sqrt_two], vec![]);
        let erf = self.g.op(&of("erf"), "Erf", &[&erf], vec![]);
        let erf = self.g.op(&of("plus_one"), "Add", &[&erf, one], vec![]);
        let doubled = self.g.op(&of("doubled"), "Mul", &[x, &erf], vec![]);
        self.g.op(&of("out"), "Mul", &[&doubled, half], vec![])
    }

    /// `x·Wᵀ + b`; the weight is stored as `MatMul` needs it, `[in, out]`.
    pub(crate) fn linear(&mut self, x: &Value, name: &str) -> Value {
        let Weight { shape, values } = self.take(&format!("{name}.weight"));
        let (outputs, inputs) = (shape[0], shape[1]);
        let mut transposed = vec![0f32; values.len()];
        for (out, row) in values.chunks_exact(inputs).enumerate() {
            for (input, &value) in row.iter().enumerate() {
                transposed[input * outputs + out] = value;
            }
        }
        let weight = self.g.floats(&format!("{name}.weight.transposed"), &[inputs, outputs], &transposed);
        let bias = format!("{name}.bias");
        if !self.weights.contains_key(&bias) {
            return self.g.op(name, "MatMul", &[x, &weight], vec![]);
        }
        let product = self.g.op(&format!("{name}.product"), "MatMul", &[x, &weight], vec![]);
        let bias = self.constant(&bias);
        self.g.op(name, "Add", &[&product, &bias], vec![])
    }

    /// Layer or RMS normalisation with the parameters under `name`; the value is called `out`.
    pub(crate) fn norm(&mut self, out: &str, x: &Value, name: &str) -> Value {
        let weight = self.constant(&format!("{name}.weight"));
        let bias = format!("{name}.bias");
        if self.weights.contains_key(&bias) {
            let bias = self.constant(&bias);
            return self.layer_norm(out, x, &weight, &bias);
        }
        let eps = self.g.float(&format!("{name}.eps"), self.norm_eps);
        let square = self.g.op(&format!("{name}.square"), "Mul", &[x, x], vec![]);
        let axes = proto::Attribute { ints: vec![-1], ..ints("axes", &[]) };
        let mean = self.g.op(&format!("{name}.mean"), "ReduceMean", &[&square], vec![axes]);
        let mean = self.g.op(&format!("{name}.mean_eps"), "Add", &[&mean, &eps], vec![]);
        let root = self.g.op(&format!("{name}.root"), "Sqrt", &[&mean], vec![]);
        let unit = self.g.op(&format!("{name}.unit"), "Div", &[x, &root], vec![]);
        self.g.op(out, "Mul", &[&unit, &weight], vec![])
    }

    /// Layer normalisation over the last axis.
    pub(crate) fn layer_norm(&mut self, out: &str, x: &Value, weight: &Value, bias: &Value) -> Value {
        let attributes = vec![int("axis", -1), float("epsilon", self.norm_eps)];
        self.g.op(out, "LayerNormalization", &[x, weight, bias], attributes)
    }

    /// The parameter `name` as a constant of the graph, shaped as it is.
    pub(crate) fn constant(&mut self, name: &str) -> Value {
        let Weight { shape, values } = self.take(name);
        self.g.floats(name, &shape, &values)
    }

    /// The parameter `name`, which is then gone: a model's weights are never held twice.
    pub(crate) fn take(&mut self, name: &str) -> Weight {
        self.weights.remove(name).unwrap_or_else(|| panic!("the backbone has no parameter `{name}`"))
    }
}

/// The constants of [`Network::gelu`].
pub(crate) struct Gelu {
    sqrt_two: Value,
    one: Value,
    half: Value,
}

impl Gelu {
    pub(crate) fn new(g: &mut GraphBuilder) -> Self {
        let mut constant = |name: &str, value: f32| g.float(&format!("gelu.{name}"), value);
        let (sqrt_two, one, half) =
            (constant("sqrt_two", std::f32::consts::SQRT_2), constant("one", 1.0), constant("half", 0.5));
        Self { sqrt_two, one, half }
    }
}
