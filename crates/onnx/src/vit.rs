//! A vision transformer in operators: what [`Vit::forward`] computes without a mask.

use burn::tensor::Tensor;
use dinoxide_model::{RopeDraw, Vit, VitConfig, config::FfnKind, weights::host};

use crate::graph::{GraphBuilder, Value, int, ints};
use crate::network::{Features, Gelu, Network};
use crate::positions::{Grid, Rotation};

impl Network<'_, Vit> {
    /// What the backbone gives for images `[B, C, H, W]` of this grid; without one, for images of any size.
    pub(crate) fn features(mut self, images: &Value, grid: Option<(usize, usize)>) -> Features {
        let config = self.backbone.config();
        let patches = self.patches(images);
        let (patches, cls_position, rotation) = match grid {
            Some(grid) => {
                let (patches, cls) = self.fixed_positions(patches, grid);
                (patches, cls, self.fixed_rotation(grid))
            }
            None => {
                let grid = Grid::of(self.g, images, config.patch_size);
                let (patches, cls) = self.dynamic_positions(patches, &grid);
                (patches, cls, self.dynamic_rotation(&grid))
            }
        };
        let mut x = self.with_prefix(images, &patches, cls_position);
        let constants = BlockConstants::new(self.g, config);
        for i in 0..config.depth {
            x = self.block(&x, &format!("blocks.{i}"), &constants, rotation.as_ref());
        }
        let (front, patches) = self.final_norms(&x);
        let first = self.g.int("cls.index", 0);
        let cls = self.g.op("cls", "Gather", &[&front, &first], vec![int("axis", 1)]);
        let count = config.register_tokens;
        let registers = (count > 0).then(|| (count, self.slice("registers", &front, 1, 1 + count as i64)));
        Features { cls, patches, registers }
    }

    /// `[B, C, H, W]` → `[B, P, D]`.
    fn patches(&mut self, images: &Value) -> Value {
        let (patch, dim) = (self.backbone.config().patch_size, self.backbone.config().embed_dim);
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
        let dim = self.backbone.config().embed_dim;
        let [one, slots] = [1, 1 + grid.0 * grid.1];
        let table: Tensor<3> = self.backbone.positions(table.val(), grid).reshape([one, slots, dim]);
        let mut values = host(table.reshape([-1]));
        let of_patches = values.split_off(dim);
        let table = self.g.floats("pos_embed", &[1, grid.0 * grid.1, dim], &of_patches);
        (self.g.op("patch_embed.positioned", "Add", &[&patches, &table], vec![]), Some(values))
    }

    /// As [`fixed_positions`](Self::fixed_positions), for the grid of the running graph.
    fn dynamic_positions(&mut self, patches: Value, grid: &Grid) -> (Value, Option<Vec<f32>>) {
        let Some(learned) = &self.backbone.config().learned else { return (patches, None) };
        let dim = self.backbone.config().embed_dim;
        let mut cls = self.take("pos_embed").values;
        let of_patches = cls.split_off(dim);
        let table = grid.positions(self.g, learned, dim, &of_patches);
        (self.g.op("patch_embed.positioned", "Add", &[&patches, &table], vec![]), Some(cls))
    }

    fn fixed_rotation(&mut self, grid: (usize, usize)) -> Option<Rotation> {
        let prefix = 1 + self.backbone.config().register_tokens;
        let device = self.backbone.cls_token.val().device();
        let table = self.backbone.rope()?.table(grid, prefix, &RopeDraw::NONE, &device);
        let shape = table.cos.dims();
        let cos = self.g.floats("rope.cos", &shape, &host(table.cos.reshape([-1])));
        let sin = self.g.floats("rope.sin", &shape, &host(table.sin.reshape([-1])));
        Some(Rotation { cos, sin })
    }

    fn dynamic_rotation(&mut self, grid: &Grid) -> Option<Rotation> {
        let (config, rope) = (self.backbone.config().rope.as_ref()?, self.backbone.rope()?);
        Some(grid.rotation(self.g, config, &rope.periods(), 1 + self.backbone.config().register_tokens))
    }

    /// CLS and registers in front of the patches: `[B, N, D]`.
    fn with_prefix(&mut self, images: &Value, patches: &Value, cls_position: Option<Vec<f32>>) -> Value {
        let mut prefix = self.take("cls_token").values;
        if let Some(position) = cls_position {
            prefix.iter_mut().zip(position).for_each(|(token, position)| *token += position);
        }
        let registers = self.backbone.config().register_tokens;
        if registers > 0 {
            prefix.extend(self.take("register_tokens").values);
        }
        let prefix = self.g.floats("prefix_tokens", &[1, 1 + registers, self.backbone.config().embed_dim], &prefix);
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

    fn attention(&mut self, x: &Value, name: &str, constants: &BlockConstants, rotation: Option<&Rotation>) -> Value {
        let of = |part: &str| format!("{name}.{part}");
        let heads = self.backbone.config().num_heads;
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
        let dim = self.backbone.config().embed_dim;
        if self.backbone.config().mask_k_bias
            && let Some(bias) = self.weights.get_mut(&bias)
        {
            bias.values[dim..2 * dim].fill(0.0);
        }
        self.linear(x, &format!("{name}.qkv"))
    }

    /// `x·cos + rotate_half(x)·sin`, where `rotate_half([a, b]) = [−b, a]` on the two halves of a head.
    fn rotate(&mut self, x: &Value, name: &str, rotation: &Rotation) -> Value {
        let of = |part: &str| format!("{name}.{part}");
        let half = self.backbone.config().head_dim() / 2;
        let [a, b] = self.g.split(&of("halves"), x, 3, [half; 2]);
        let b = self.g.op(&of("minus_b"), "Neg", &[&b], vec![]);
        let swapped = self.g.op(&of("swapped"), "Concat", &[&b, &a], vec![int("axis", 3)]);
        let kept = self.g.op(&of("x_cos"), "Mul", &[x, &rotation.cos], vec![]);
        let turned = self.g.op(&of("swapped_sin"), "Mul", &[&swapped, &rotation.sin], vec![]);
        self.g.op(&of("out"), "Add", &[&kept, &turned], vec![])
    }

    fn feed_forward(&mut self, x: &Value, name: &str, constants: &BlockConstants) -> Value {
        let of = |part: &str| format!("{name}.{part}");
        let (hidden, last) = match self.backbone.config().ffn {
            FfnKind::Mlp => {
                let hidden = self.linear(x, &of("fc1"));
                let gelu = constants.gelu.as_ref().expect("a model with an MLP has its constants");
                (self.gelu(&hidden, &of("gelu"), gelu), "fc2")
            }
            FfnKind::SwigluFused => {
                let both = self.linear(x, &of("w12"));
                let width = self.backbone.config().ffn_hidden;
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

    /// CLS with registers and patches, each after its norm. The patches are called by their name as an output.
    fn final_norms(&mut self, x: &Value) -> (Value, Value) {
        let prefix = 1 + self.backbone.config().register_tokens as i64;
        if self.backbone.config().untie_cls_and_patch_norms {
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

    /// Tokens `from..to` of `[B, N, D]`.
    fn slice(&mut self, name: &str, x: &Value, from: i64, to: i64) -> Value {
        let from = self.g.ints(&format!("{name}.from"), &[from]);
        let to = self.g.ints(&format!("{name}.to"), &[to]);
        let axis = self.g.ints(&format!("{name}.axis"), &[1]);
        self.g.op(name, "Slice", &[x, &from, &to, &axis], vec![])
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
    /// In models with an MLP.
    gelu: Option<Gelu>,
}

impl BlockConstants {
    fn new(g: &mut GraphBuilder, config: &VitConfig) -> Self {
        let head_dim = config.head_dim();
        Self {
            apart: g.ints("heads.apart", &[0, 0, 3 * config.num_heads as i64, head_dim as i64]),
            together: g.ints("heads.together", &[0, 0, config.embed_dim as i64]),
            scale: g.float("heads.scale", (1.0 / (head_dim as f64).sqrt()) as f32),
            gelu: (config.ffn == FfnKind::Mlp).then(|| Gelu::new(g)),
        }
    }
}
