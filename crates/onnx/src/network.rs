//! The graph of a backbone: what [`Vit::forward`] computes, in operators of ONNX's standard domain.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use dinoxide_model::{
    RopeDraw, Vit, VitConfig,
    config::FfnKind,
    parameters,
    weights::{Description, Weight, host},
};

use crate::graph::{Axis, GraphBuilder, Value, float, int, ints};
use crate::positions::{Grid, Rotation};
use crate::{ImageSize, Input, OnnxError, Options, proto};

/// The graph of `backbone`, which `description` describes.
pub(crate) fn build(backbone: &Vit, description: &Description, options: &Options) -> Result<proto::Graph, OnnxError> {
    let config = backbone.config();
    let grid = match options.size {
        ImageSize::Fixed { height, width } => Some(config.grid(height, width)?),
        ImageSize::Dynamic => None,
    };
    let mut weights = BTreeMap::new();
    parameters::visit(backbone, |name, shape, value| {
        weights.insert(name.to_owned(), Weight { shape: shape.to_vec(), values: host(value) });
    });
    let network = Network { g: GraphBuilder::default(), weights, backbone, config };
    Ok(network.build(description, options, grid))
}

struct Network<'a> {
    g: GraphBuilder,
    weights: BTreeMap<String, Weight>,
    backbone: &'a Vit,
    config: &'a VitConfig,
}

impl Network<'_> {
    fn build(mut self, description: &Description, options: &Options, grid: Option<(usize, usize)>) -> proto::Graph {
        let config = self.config;
        let (dim, registers) = (config.embed_dim, config.register_tokens);
        let images = self.images(description, options);
        let (patches, cls_position, rotation) = match grid {
            Some(grid) => {
                let patches = self.patches(&images);
                let (patches, cls) = self.fixed_positions(patches, grid);
                (patches, cls, self.fixed_rotation(grid))
            }
            None => {
                let grid = Grid::of(&mut self.g, &images, config.patch_size);
                let images = self.require_tiling(&images, &grid);
                let patches = self.patches(&images);
                let (patches, cls) = self.dynamic_positions(patches, &grid);
                (patches, cls, self.dynamic_rotation(&grid))
            }
        };
        let mut x = self.with_prefix(&images, &patches, cls_position);
        let constants = BlockConstants::new(&mut self.g, config);
        for i in 0..config.depth {
            x = self.block(&x, &format!("blocks.{i}"), &constants, rotation.as_ref());
        }
        let (front, patches) = self.final_norms(&x);
        let first = self.g.int("cls.index", 0);
        let cls = self.g.op("cls", "Gather", &[&front, &first], vec![int("axis", 1)]);

        let batch = Axis::Named("batch");
        let patch_axis = grid.map_or(Axis::Named("patches"), |(rows, columns)| Axis::Known(rows * columns));
        let dim_axis = Axis::Known(dim);
        self.g.output(&cls, &[batch, dim_axis], "The CLS token after the final norm: the feature of the whole image.");
        let doc = "The patch tokens after the final norm, row by row from the upper left.";
        self.g.output(&patches, &[batch, patch_axis, dim_axis], doc);
        if registers > 0 {
            let tokens = self.slice("registers", &front, 1, 1 + registers as i64);
            let doc = "The register tokens after the final norm.";
            self.g.output(&tokens, &[batch, Axis::Known(registers), dim_axis], doc);
        }
        self.g.finish("backbone")
    }

    /// The input, normalised.
    fn images(&mut self, description: &Description, options: &Options) -> Value {
        let (height, width) = match options.size {
            ImageSize::Fixed { height, width } => (Axis::Known(height), Axis::Known(width)),
            ImageSize::Dynamic => (Axis::Named("height"), Axis::Named("width")),
        };
        let axes = [Axis::Named("batch"), Axis::Known(self.config.in_channels), height, width];
        let images = self.g.input(options.input.name(), &axes, &options.input.doc(description));
        match options.input {
            Input::Normalized => images,
            Input::Rgb => {
                let mean = self.g.floats("mean", &[3, 1, 1], &description.mean);
                let std = self.g.floats("std", &[3, 1, 1], &description.std);
                let centred = self.g.op("images.centred", "Sub", &[&images, &mean], vec![]);
                self.g.op("images.normalized", "Div", &[&centred, &std], vec![])
            }
        }
    }

    /// The images, unchanged. A running graph fails here if patches do not tile them, instead of cutting off the rest.
    fn require_tiling(&mut self, images: &Value, grid: &Grid) -> Value {
        let front = self.g.op("tiling.front", "Shape", &[images], vec![int("start", 0), int("end", 2)]);
        let patch = self.g.int("tiling.patch_size", self.config.patch_size as i64);
        let sides = self.g.op("tiling.sides", "Mul", &[&grid.size, &patch], vec![]);
        let shape = self.g.op("tiling.shape", "Concat", &[&front, &sides], vec![int("axis", 0)]);
        self.g.op("tiling.is_height_or_width_no_multiple_of_the_patch_size", "Reshape", &[images, &shape], vec![])
    }

    /// `[B, C, H, W]` → `[B, P, D]`.
    fn patches(&mut self, images: &Value) -> Value {
        let (patch, dim) = (self.config.patch_size, self.config.embed_dim);
        let weight = self.constant("patch_embed.proj.weight");
        let bias = self.constant("patch_embed.proj.bias");
        let attributes = vec![ints("kernel_shape", &[patch, patch]), ints("strides", &[patch, patch])];
        let grids = self.g.op("patch_embed.proj", "Conv", &[images, &weight, &bias], attributes);
        let flat = self.g.ints("patch_embed.flat", &[0, dim as i64, -1]);
        let columns = self.g.op("patch_embed.columns", "Reshape", &[&grids, &flat], vec![]);
        self.g.op("patch_embed", "Transpose", &[&columns], vec![ints("perm", &[0, 2, 1])])
    }

    /// Patches with the learned positions of one grid, and CLS's position.
    fn fixed_positions(&mut self, patches: Value, grid: (usize, usize)) -> (Value, Option<Vec<f32>>) {
        let Some(table) = &self.backbone.pos_embed else { return (patches, None) };
        self.take("pos_embed");
        let dim = self.config.embed_dim;
        let [one, slots] = [1, 1 + grid.0 * grid.1];
        let table: Tensor<3> = self.backbone.positions(table.val(), grid).reshape([one, slots, dim]);
        let mut values = host(table.reshape([-1]));
        let of_patches = values.split_off(dim);
        let table = self.g.floats("pos_embed", &[1, grid.0 * grid.1, dim], &of_patches);
        (self.g.op("patch_embed.positioned", "Add", &[&patches, &table], vec![]), Some(values))
    }

    /// As [`fixed_positions`](Self::fixed_positions), for the grid of the running graph.
    fn dynamic_positions(&mut self, patches: Value, grid: &Grid) -> (Value, Option<Vec<f32>>) {
        let Some(learned) = &self.config.learned else { return (patches, None) };
        let dim = self.config.embed_dim;
        let mut cls = self.take("pos_embed").values;
        let of_patches = cls.split_off(dim);
        let table = grid.positions(&mut self.g, learned, dim, &of_patches);
        (self.g.op("patch_embed.positioned", "Add", &[&patches, &table], vec![]), Some(cls))
    }

    fn fixed_rotation(&mut self, grid: (usize, usize)) -> Option<Rotation> {
        let prefix = 1 + self.config.register_tokens;
        let device = self.backbone.cls_token.val().device();
        let table = self.backbone.rope()?.table(grid, prefix, &RopeDraw::NONE, &device);
        let shape = table.cos.dims();
        let cos = self.g.floats("rope.cos", &shape, &host(table.cos.reshape([-1])));
        let sin = self.g.floats("rope.sin", &shape, &host(table.sin.reshape([-1])));
        Some(Rotation { cos, sin })
    }

    fn dynamic_rotation(&mut self, grid: &Grid) -> Option<Rotation> {
        let (config, rope) = (self.config.rope.as_ref()?, self.backbone.rope()?);
        Some(grid.rotation(&mut self.g, config, &rope.periods(), 1 + self.config.register_tokens))
    }

    /// CLS and registers in front of the patches: `[B, N, D]`.
    fn with_prefix(&mut self, images: &Value, patches: &Value, cls_position: Option<Vec<f32>>) -> Value {
        let mut prefix = self.take("cls_token").values;
        if let Some(position) = cls_position {
            prefix.iter_mut().zip(position).for_each(|(token, position)| *token += position);
        }
        let registers = self.config.register_tokens;
        if registers > 0 {
            prefix.extend(self.take("register_tokens").values);
        }
        let prefix = self.g.floats("prefix_tokens", &[1, 1 + registers, self.config.embed_dim], &prefix);
        let batch = self.g.op("prefix.batch", "Shape", &[images], vec![int("start", 0), int("end", 1)]);
        let unit = self.g.ints("prefix.unit", &[1, 1]);
        let shape = self.g.op("prefix.shape", "Concat", &[&batch, &unit], vec![int("axis", 0)]);
        let prefix = self.g.op("prefix", "Expand", &[&prefix, &shape], vec![]);
        self.g.op("tokens", "Concat", &[&prefix, patches], vec![int("axis", 1)])
    }

    fn block(&mut self, x: &Value, name: &str, constants: &BlockConstants, rotation: Option<&Rotation>) -> Value {
        let normed = self.norm(&format!("{name}.norm1.out"), x, &format!("{name}.norm1"));
        let attended = self.attention(&normed, &format!("{name}.attn"), constants, rotation);
        let x = self.residual(x, &attended, &format!("{name}.ls1"));
        let normed = self.norm(&format!("{name}.norm2.out"), &x, &format!("{name}.norm2"));
        let fed = self.feed_forward(&normed, &format!("{name}.mlp"), constants);
        self.residual(&x, &fed, &format!("{name}.ls2"))
    }

    /// `x + gamma·branch`.
    fn residual(&mut self, x: &Value, branch: &Value, scale: &str) -> Value {
        let sum = format!("{scale}.residual");
        if self.config.layer_scale_init.is_none() {
            return self.g.op(&sum, "Add", &[x, branch], vec![]);
        }
        let gamma = self.constant(&format!("{scale}.gamma"));
        let scaled = self.g.op(&format!("{scale}.out"), "Mul", &[branch, &gamma], vec![]);
        self.g.op(&sum, "Add", &[x, &scaled], vec![])
    }

    fn attention(&mut self, x: &Value, name: &str, constants: &BlockConstants, rotation: Option<&Rotation>) -> Value {
        let of = |part: &str| format!("{name}.{part}");
        let heads = self.config.num_heads;
        let qkv = self.qkv(x, name);
        // Queries, keys and values of all heads side by side, so that queries and keys can be turned together.
        let apart = self.g.op(&of("apart"), "Reshape", &[&qkv, &constants.apart], vec![]);
        let apart = self.g.op(&of("heads"), "Transpose", &[&apart], vec![ints("perm", &[0, 2, 1, 3])]);
        let (q, k, v) = match rotation {
            None => {
                let [q, k, v] = self.g.split(&of("parts"), &apart, 1, [heads; 3]);
                (q, k, v)
            }
            Some(rotation) => {
                let [qk, v] = self.g.split(&of("parts"), &apart, 1, [2 * heads, heads]);
                let turned = self.rotate(&qk, &of("rope"), rotation);
                let [q, k] = self.g.split(&of("turned"), &turned, 1, [heads; 2]);
                (q, k, v)
            }
        };
        let q = self.g.op(&of("q"), "Mul", &[&q, &constants.scale], vec![]);
        let k = self.g.op(&of("k"), "Transpose", &[&k], vec![ints("perm", &[0, 1, 3, 2])]);
        let scores = self.g.op(&of("scores"), "MatMul", &[&q, &k], vec![]);
        let probabilities = self.g.op(&of("softmax"), "Softmax", &[&scores], vec![int("axis", -1)]);
        let out = self.g.op(&of("weighted"), "MatMul", &[&probabilities, &v], vec![]);
        let out = self.g.op(&of("tokens"), "Transpose", &[&out], vec![ints("perm", &[0, 2, 1, 3])]);
        let out = self.g.op(&of("together"), "Reshape", &[&out, &constants.together], vec![]);
        self.linear(&out, &of("proj"))
    }

    /// Packed queries, keys and values; a key bias that is held at zero is zero in the file.
    fn qkv(&mut self, x: &Value, name: &str) -> Value {
        let bias = format!("{name}.qkv.bias");
        let dim = self.config.embed_dim;
        if self.config.mask_k_bias
            && let Some(bias) = self.weights.get_mut(&bias)
        {
            bias.values[dim..2 * dim].fill(0.0);
        }
        self.linear(x, &format!("{name}.qkv"))
    }

    /// `x·cos + rotate_half(x)·sin`, where `rotate_half([a, b]) = [−b, a]` on the two halves of a head.
    fn rotate(&mut self, x: &Value, name: &str, rotation: &Rotation) -> Value {
        let of = |part: &str| format!("{name}.{part}");
        let half = self.config.head_dim() / 2;
        let [a, b] = self.g.split(&of("halves"), x, 3, [half; 2]);
        let b = self.g.op(&of("minus_b"), "Neg", &[&b], vec![]);
        let swapped = self.g.op(&of("swapped"), "Concat", &[&b, &a], vec![int("axis", 3)]);
        let kept = self.g.op(&of("x_cos"), "Mul", &[x, &rotation.cos], vec![]);
        let turned = self.g.op(&of("swapped_sin"), "Mul", &[&swapped, &rotation.sin], vec![]);
        self.g.op(&of("out"), "Add", &[&kept, &turned], vec![])
    }

    fn feed_forward(&mut self, x: &Value, name: &str, constants: &BlockConstants) -> Value {
        let of = |part: &str| format!("{name}.{part}");
        let (hidden, last) = match self.config.ffn {
            FfnKind::Mlp => {
                let hidden = self.linear(x, &of("fc1"));
                (self.gelu(&hidden, &of("gelu"), constants), "fc2")
            }
            FfnKind::SwigluFused => {
                let both = self.linear(x, &of("w12"));
                let width = self.config.ffn_hidden;
                let [gate, value] = self.g.split(&of("halves"), &both, 2, [width; 2]);
                (self.gated(&gate, &value, name), "w3")
            }
            FfnKind::Swiglu | FfnKind::Swiglu32 | FfnKind::Swiglu64 | FfnKind::Swiglu128 => {
                let (gate, value) = (self.linear(x, &of("w1")), self.linear(x, &of("w2")));
                (self.gated(&gate, &value, name), "w3")
            }
        };
        self.linear(&hidden, &of(last))
    }

    /// `silu(gate)·value`.
    fn gated(&mut self, gate: &Value, value: &Value, name: &str) -> Value {
        let sigmoid = self.g.op(&format!("{name}.sigmoid"), "Sigmoid", &[gate], vec![]);
        let silu = self.g.op(&format!("{name}.silu"), "Mul", &[gate, &sigmoid], vec![]);
        self.g.op(&format!("{name}.gated"), "Mul", &[&silu, value], vec![])
    }

    /// The exact GELU, `x/2·(1 + erf(x/√2))`, in the order that runtimes know and fuse.
    fn gelu(&mut self, x: &Value, name: &str, constants: &BlockConstants) -> Value {
        let of = |part: &str| format!("{name}.{part}");
        let [sqrt_two, one, half] = constants.gelu.as_ref().expect("a model with an MLP has its constants");
        let erf = self.g.op(&of("scaled"), "Div", &[x, sqrt_two], vec![]);
        let erf = self.g.op(&of("erf"), "Erf", &[&erf], vec![]);
        let erf = self.g.op(&of("plus_one"), "Add", &[&erf, one], vec![]);
        let doubled = self.g.op(&of("doubled"), "Mul", &[x, &erf], vec![]);
        self.g.op(&of("out"), "Mul", &[&doubled, half], vec![])
    }

    /// `x·Wᵀ + b`; the weight is stored as `MatMul` needs it, `[in, out]`.
    fn linear(&mut self, x: &Value, name: &str) -> Value {
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

    /// CLS with registers and patches, each after its norm. The patches are called by their name as an output.
    fn final_norms(&mut self, x: &Value) -> (Value, Value) {
        let prefix = 1 + self.config.register_tokens as i64;
        if self.config.untie_cls_and_patch_norms {
            let front = self.slice("front.prenorm", x, 0, prefix);
            let front = self.norm("front", &front, "cls_norm");
            let patches = self.slice("patches.prenorm", x, prefix, i64::MAX);
            (front, self.norm("patches", &patches, "norm"))
        } else {
            let x = self.norm("norm.out", x, "norm");
            let patches = self.slice("patches", &x, prefix, i64::MAX);
            (x, patches)
        }
    }

    /// Layer or RMS normalisation with the parameters under `name`; the value is called `out`.
    fn norm(&mut self, out: &str, x: &Value, name: &str) -> Value {
        let weight = self.constant(&format!("{name}.weight"));
        let eps = self.config.norm_eps as f32;
        let bias = format!("{name}.bias");
        if self.weights.contains_key(&bias) {
            let bias = self.constant(&bias);
            let attributes = vec![int("axis", -1), float("epsilon", eps)];
            return self.g.op(out, "LayerNormalization", &[x, &weight, &bias], attributes);
        }
        let eps = self.g.float(&format!("{name}.eps"), eps);
        let square = self.g.op(&format!("{name}.square"), "Mul", &[x, x], vec![]);
        let axes = proto::Attribute { ints: vec![-1], ..ints("axes", &[]) };
        let mean = self.g.op(&format!("{name}.mean"), "ReduceMean", &[&square], vec![axes]);
        let mean = self.g.op(&format!("{name}.mean_eps"), "Add", &[&mean, &eps], vec![]);
        let root = self.g.op(&format!("{name}.root"), "Sqrt", &[&mean], vec![]);
        let unit = self.g.op(&format!("{name}.unit"), "Div", &[x, &root], vec![]);
        self.g.op(out, "Mul", &[&unit, &weight], vec![])
    }

    /// Tokens `from..to` of `[B, N, D]`.
    fn slice(&mut self, name: &str, x: &Value, from: i64, to: i64) -> Value {
        let from = self.g.ints(&format!("{name}.from"), &[from]);
        let to = self.g.ints(&format!("{name}.to"), &[to]);
        let axis = self.g.ints(&format!("{name}.axis"), &[1]);
        self.g.op(name, "Slice", &[x, &from, &to, &axis], vec![])
    }

    /// The parameter `name` as a constant of the graph, shaped as it is.
    fn constant(&mut self, name: &str) -> Value {
        let Weight { shape, values } = self.take(name);
        self.g.floats(name, &shape, &values)
    }

    /// The parameter `name`, which is then gone: a model's weights are never held twice.
    fn take(&mut self, name: &str) -> Weight {
        self.weights.remove(name).unwrap_or_else(|| panic!("the backbone has no parameter `{name}`"))
    }
}

/// Constants that every block uses.
struct BlockConstants {
    /// `[0, 0, 3·heads, d]`: queries, keys and values of each head.
    apart: Value,
    /// `[0, 0, D]`: heads side by side.
    together: Value,
    /// `1/√d`.
    scale: Value,
    /// `√2`, `1` and `1/2`; in models with an MLP.
    gelu: Option<[Value; 3]>,
}

impl BlockConstants {
    fn new(g: &mut GraphBuilder, config: &VitConfig) -> Self {
        let head_dim = config.head_dim();
        Self {
            apart: g.ints("heads.apart", &[0, 0, 3 * config.num_heads as i64, head_dim as i64]),
            together: g.ints("heads.together", &[0, 0, config.embed_dim as i64]),
            scale: g.float("heads.scale", (1.0 / (head_dim as f64).sqrt()) as f32),
            gelu: (config.ffn == FfnKind::Mlp).then(|| {
                let constants = [("sqrt_two", std::f32::consts::SQRT_2), ("one", 1.0), ("half", 0.5)];
                constants.map(|(name, value)| g.float(&format!("gelu.{name}"), value))
            }),
        }
    }
}
