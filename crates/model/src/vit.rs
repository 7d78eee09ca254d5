//! The vision transformer of DINO, iBOT, DINOv2 and DINOv3.
//!
//! Tokens are ordered CLS, registers, patches (row by row). With learned positions (DINO … DINOv2) the table is added
//! after masking and before the registers are put in; with RoPE (DINOv3) every block turns its queries and keys.

use burn::module::{Module, Param};
use burn::tensor::{Bool, Device, Tensor};
use dinoxide_kernels as kernels;
use dinoxide_kernels::Precision;
use rand::Rng;

use crate::{
    config::VitConfig,
    draws::{BranchDraw, StochasticDraws},
    init::Init,
    interpolation::{self, Filter},
    layers::{Block, Norm, select_rows},
    rope::{Rope, RopeDraw},
};

/// No stochastic depth in either branch of a block.
const KEEP: &[BranchDraw] = &[BranchDraw::Keep, BranchDraw::Keep];

/// The convolution of stride = kernel = patch, computed as a linear layer on unfolded patches.
#[derive(Module, Debug)]
pub struct PatchEmbed {
    /// The kernel and bias.
    pub proj: PatchProjection,
}

/// Parameters of the patch projection in the layout of a convolution.
#[derive(Module, Debug)]
pub struct PatchProjection {
    /// `[D, C, p, p]`.
    pub weight: Param<Tensor<4>>,
    /// `[D]`.
    pub bias: Param<Tensor<1>>,
    /// Of its product.
    #[module(skip)]
    precision: Precision,
}

impl PatchEmbed {
    /// `images [B, C, H, W]` → `[B, P, D]`, rows of patches first.
    fn forward(&self, images: Tensor<4>) -> Tensor<3> {
        let weight = self.proj.weight.val();
        let [dim, channels, patch, _] = weight.dims();
        let [batch, _, height, width] = images.dims();
        let (rows, columns) = (height / patch, width / patch);
        let unfolded = images
            .reshape([batch, channels, rows, patch, columns, patch])
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([batch * rows * columns, channels * patch * patch]);
        let weight = weight.reshape([dim, channels * patch * patch]);
        let tokens = kernels::linear(unfolded, weight, Some(self.proj.bias.val()), self.proj.precision);
        tokens.reshape([batch, rows * columns, dim])
    }
}

/// Which crops a training forward sees; local crops may have a final norm of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CropGroup {
    /// Global crops, or any image outside training.
    Global,
    /// Local crops of the student in training.
    Local,
}

/// What a forward gives.
#[derive(Clone, Debug)]
pub struct Features {
    /// CLS after the final norm, `[B, D]`.
    pub cls: Tensor<2>,
    /// Registers after the final norm, `[B, R, D]`; `None` when there are none.
    pub registers: Option<Tensor<3>>,
    /// Patch tokens after the final norm, `[B, P, D]`.
    pub patches: Tensor<3>,
    /// All tokens before the final norm, `[B, N, D]`; of a ConvNeXt the patch tokens, `[B, P, D]`.
    pub prenorm: Tensor<3>,
}

/// Tokens after the final norm of which a caller looks at no others.
#[derive(Clone, Debug)]
pub struct SelectedFeatures {
    /// CLS, `[B, D]`.
    pub cls: Tensor<2>,
    /// The patch tokens that were asked for, in this order, `[M, D]`.
    pub patches: Tensor<2>,
}

/// Tokens of one intermediate block or stage, `D` being its width.
#[derive(Clone, Debug)]
pub struct LayerFeatures {
    /// `[B, D]`.
    pub cls: Tensor<2>,
    /// `[B, R, D]`; `None` when there are none.
    pub registers: Option<Tensor<3>>,
    /// `[B, P, D]`.
    pub patches: Tensor<3>,
}

/// The backbone.
#[derive(Module, Debug)]
pub struct Vit {
    /// `[1, 1, D]`.
    pub cls_token: Param<Tensor<3>>,
    /// `[1, 1 + grid², D]`, slot 0 for CLS; with learned positions.
    pub pos_embed: Option<Param<Tensor<3>>>,
    /// `[1, R, D]`; written as `storage_tokens` in weight files of models with RoPE, as DINOv3 names them.
    pub register_tokens: Option<Param<Tensor<3>>>,
    /// `[1, D]`, put in the place of masked patches.
    pub mask_token: Option<Param<Tensor<2>>>,
    /// Patches to tokens.
    pub patch_embed: PatchEmbed,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// Final norm.
    pub norm: Norm,
    /// Final norm of CLS and registers, when untied.
    pub cls_norm: Option<Norm>,
    /// Final norm of CLS and registers of local crops in training, when untied.
    pub local_cls_norm: Option<Norm>,
    #[module(skip)]
    rope: Option<Rope>,
    #[module(skip)]
    config: VitConfig,
}

impl Vit {
    /// A backbone with fresh weights, initialised as the reference with the same kind of positions does.
    ///
    /// `config` must have passed [`VitConfig::check`].
    pub fn new(config: &VitConfig, device: &Device, rng: &mut impl Rng) -> Self {
        let dim = config.embed_dim;
        let mut init = Init { rng, device };
        // DINO and iBOT (no layer scale, no registers): 0.02; DINOv2: 1e-6; DINOv3: 0.02.
        let v2 = config.learned.is_some() && config.layer_scale_init.is_some();
        let token_std = if v2 { 1e-6 } else { 0.02 };
        let bound = (1.0 / (config.in_channels * config.patch_size * config.patch_size) as f64).sqrt();
        let norm = |init: &mut Init<_>| Norm::new(dim, config.norm, config.norm_eps, init);
        Self {
            cls_token: init.normal([1, 1, dim], token_std),
            pos_embed: config.learned.as_ref().map(|l| init.normal([1, 1 + l.grid * l.grid, dim], 0.02)),
            register_tokens: (config.register_tokens > 0)
                .then(|| init.normal([1, config.register_tokens, dim], token_std)),
            mask_token: config.mask_token.then(|| init.constant([1, dim], 0.0)),
            patch_embed: PatchEmbed {
                proj: PatchProjection {
                    weight: init.uniform([dim, config.in_channels, config.patch_size, config.patch_size], bound),
                    bias: init.uniform([dim], bound),
                    precision: Precision::Fp32,
                },
            },
            blocks: (0..config.depth).map(|_| Block::new(config, &mut init)).collect(),
            norm: norm(&mut init),
            cls_norm: config.untie_cls_and_patch_norms.then(|| norm(&mut init)),
            local_cls_norm: config.untie_global_and_local_cls_norm.then(|| norm(&mut init)),
            rope: config.rope.clone().map(|rope| Rope::new(rope, config.head_dim())),
            config: config.clone(),
        }
    }

    pub(crate) fn set_precision(&mut self, precision: Precision) {
        self.patch_embed.proj.precision = precision;
        self.blocks.iter_mut().flat_map(Block::linears).for_each(|linear| linear.precision = precision);
    }

    /// What this backbone is.
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// Its rotary embedding, when positions are rotary.
    pub fn rope(&self) -> Option<&Rope> {
        self.rope.as_ref()
    }

    /// Features of `images`, as the teacher and every evaluation compute them.
    ///
    /// # Shapes
    /// `images [B, C, H, W]`, both sides multiples of the patch size; `mask [B, P]`, true = masked.
    pub fn forward(&self, images: Tensor<4>, mask: Option<Tensor<2, Bool>>) -> Features {
        self.forward_with(images, mask, CropGroup::Global, None)
    }

    /// The student's forward: under given draws of stochastic depth and RoPE augmentation, made for this batch size.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward).
    pub fn forward_train(
        &self,
        images: Tensor<4>,
        mask: Option<Tensor<2, Bool>>,
        group: CropGroup,
        draws: &StochasticDraws,
    ) -> Features {
        self.forward_with(images, mask, group, Some(draws))
    }

    /// CLS and some patch tokens of [`forward`](Self::forward), or with draws of [`forward_train`](Self::forward_train). What
    /// the last block would make of the other tokens, beyond their keys and values, is left out.
    ///
    /// # Shapes
    /// `images` and `mask` as there; `patches` are places in the flattened list `[B·P]`, in ascending order.
    pub fn forward_selected(
        &self,
        images: Tensor<4>,
        mask: Option<Tensor<2, Bool>>,
        group: CropGroup,
        draws: Option<&StochasticDraws>,
        patches: &[usize],
    ) -> SelectedFeatures {
        let (batch, grid) = (images.dims()[0], self.grid(&images));
        let (prefix, count) = (1 + self.config.register_tokens, grid.0 * grid.1);
        // The tokens of each image in their order, and where in this list CLS and patches are.
        let (mut rows, mut of_cls, mut of_patches) = (Vec::new(), Vec::new(), Vec::new());
        let mut rest = patches.iter().copied().peekable();
        for image in 0..batch {
            of_cls.push(rows.len());
            rows.push(image * (prefix + count));
            while let Some(patch) = rest.next_if(|patch| patch / count == image) {
                of_patches.push(rows.len());
                rows.push(image * (prefix + count) + prefix + patch % count);
            }
        }
        assert_eq!(rest.next(), None, "patches of {batch} images of {count}: not in ascending order, or outside");
        let mut last = None;
        self.run_blocks(images, mask, draws, Some(&rows), |_, x| last = Some(x.clone()));
        let tokens = last.expect("a backbone has at least one block");
        let dim = tokens.dims()[2];
        let tokens = tokens.reshape([rows.len(), dim]);
        let cls_norm = self.cls_norm(group, draws.is_some());
        SelectedFeatures {
            cls: cls_norm.forward(select_rows(tokens.clone(), &of_cls)),
            patches: self.norm.forward(select_rows(tokens, &of_patches)),
        }
    }

    /// The final norm of CLS tokens and registers.
    fn cls_norm(&self, group: CropGroup, training: bool) -> &Norm {
        match (group, &self.local_cls_norm, &self.cls_norm) {
            (CropGroup::Local, Some(local), _) if training => local,
            (_, _, Some(cls)) => cls,
            _ => &self.norm,
        }
    }

    fn forward_with(
        &self,
        images: Tensor<4>,
        mask: Option<Tensor<2, Bool>>,
        group: CropGroup,
        draws: Option<&StochasticDraws>,
    ) -> Features {
        let mut last = None;
        self.run_blocks(images, mask, draws, None, |_, x| last = Some(x.clone()));
        let prenorm = last.expect("a backbone has at least one block");
        let cls_norm = self.cls_norm(group, draws.is_some());
        let LayerFeatures { cls, registers, patches } = self.split(prenorm.clone(), Some((cls_norm, &self.norm)));
        Features { cls, registers, patches, prenorm }
    }

    /// Tokens after the given blocks (indices from 0), in ascending block order; with `norm`, after the final norm.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward).
    pub fn forward_layers(&self, images: Tensor<4>, layers: &[usize], norm: bool) -> Vec<LayerFeatures> {
        let mut found = Vec::with_capacity(layers.len());
        self.run_blocks(images, None, None, None, |block, x| {
            if layers.contains(&block) {
                let norms = norm.then(|| (self.cls_norm.as_ref().unwrap_or(&self.norm), &self.norm));
                found.push(self.split(x.clone(), norms));
            }
        });
        found
    }

    /// What CLS attends to among the patches in a block (index from 0): the probabilities of each head. What it gives to
    /// itself and to registers is left out, so rows sum to less than 1.
    ///
    /// # Shapes
    /// `images` as in [`forward`](Self::forward) → `[B, heads, P]`.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn cls_attention(&self, images: Tensor<4>, block: usize) -> Tensor<3> {
        let (grid, device) = (self.grid(&images), images.device());
        let prefix = 1 + self.config.register_tokens;
        let table = self.rope.as_ref().map(|rope| rope.table(grid, prefix, &RopeDraw::NONE, &device));
        let mut x = self.tokens(images, None, grid);
        for earlier in &self.blocks[..block] {
            x = earlier.forward(x, table.as_ref(), KEEP);
        }
        let attention = self.blocks[block].first_token_attention(x, table.as_ref());
        attention.narrow(2, prefix, grid.0 * grid.1)
    }

    /// Patches of an image along its height and width.
    fn grid(&self, images: &Tensor<4>) -> (usize, usize) {
        let [_, _, height, width] = images.dims();
        let patch = self.config.patch_size;
        assert!(
            height % patch == 0 && width % patch == 0,
            "{height}×{width} pixels are not tiled by patches of {patch}"
        );
        (height / patch, width / patch)
    }

    /// Runs the blocks, showing each one's output. With `rows`, ascending places in the flattened list of tokens, the last
    /// block's is that of these tokens alone, `[rows, 1, D]`.
    fn run_blocks(
        &self,
        images: Tensor<4>,
        mask: Option<Tensor<2, Bool>>,
        draws: Option<&StochasticDraws>,
        rows: Option<&[usize]>,
        mut after: impl FnMut(usize, &Tensor<3>),
    ) {
        let grid = self.grid(&images);
        let device = images.device();
        let prefix = 1 + self.config.register_tokens;
        let table = |draw: &RopeDraw| self.rope.as_ref().map(|rope| rope.table(grid, prefix, draw, &device));
        let still = if draws.is_none() { table(&RopeDraw::NONE) } else { None };
        let mut x = self.tokens(images, mask, grid);
        for (i, block) in self.blocks.iter().enumerate() {
            let turned = draws.and_then(|draws| draws.rope.get(i).and_then(table));
            let rope = still.as_ref().or(turned.as_ref());
            let branches = draws.map_or(KEEP, |draws| &draws.branches[2 * i..2 * i + 2]);
            x = match rows {
                Some(rows) if i + 1 == self.blocks.len() => block.forward_rows(x, rope, branches, rows),
                _ => block.forward(x, rope, branches),
            };
            after(i, &x);
        }
    }

    /// `[B, N, D]`: patches embedded, masked and positioned, with CLS and registers in front.
    fn tokens(&self, images: Tensor<4>, mask: Option<Tensor<2, Bool>>, grid: (usize, usize)) -> Tensor<3> {
        let mut patches = self.patch_embed.forward(images);
        let [batch, count, dim] = patches.dims();
        if let Some(mask) = mask {
            let token = self.mask_token.as_ref().expect("a masked forward needs a model with a mask token").val();
            let mask = mask.reshape([batch, count, 1]).expand([batch, count, dim]);
            patches = patches.mask_where(mask, token.reshape([1, 1, dim]).expand([batch, count, dim]));
        }
        let mut cls = self.cls_token.val();
        if let Some(table) = &self.pos_embed {
            let table = self.positions(table.val(), grid);
            cls = cls + table.clone().slice([0..1, 0..1]);
            patches = patches + table.slice([0..1, 1..1 + count]);
        }
        let mut parts = vec![cls.expand([batch, 1, dim])];
        if let Some(registers) = &self.register_tokens {
            let registers = registers.val();
            let count = registers.dims()[1];
            parts.push(registers.expand([batch, count, dim]));
        }
        parts.push(patches);
        Tensor::cat(parts, 1)
    }

    /// The learned table for another grid: CLS's slot as it is, the patches' slots interpolated.
    ///
    /// # Shapes
    /// `[1, 1 + M², D]` → `[1, 1 + rows·columns, D]`.
    pub fn positions(&self, table: Tensor<3>, grid: (usize, usize)) -> Tensor<3> {
        let learned = self.config.learned.as_ref().expect("a learned table has its description");
        let side = learned.grid;
        if grid == (side, side) {
            return table;
        }
        let dim = self.config.embed_dim;
        // With an offset, PyTorch is given a scale factor and samples at its inverse, not at the ratio of the sizes.
        let matrix = |size: usize| {
            let step = side as f64 / (size as f64 + learned.offset);
            interpolation::weights(Filter::Bicubic, side, size, step, learned.antialias)
        };
        let cls = table.clone().slice([0..1, 0..1]);
        let patches = table.slice([0..1, 1..1 + side * side]).reshape([1, side, side, dim]);
        let patches = interpolation::resize(patches, matrix(grid.0), matrix(grid.1));
        Tensor::cat(vec![cls, patches.reshape([1, grid.0 * grid.1, dim])], 1)
    }

    /// CLS, registers and patches of `[B, N, D]`, each after its norm.
    fn split(&self, x: Tensor<3>, norms: Option<(&Norm, &Norm)>) -> LayerFeatures {
        let [batch, tokens, dim] = x.dims();
        let prefix = 1 + self.config.register_tokens;
        let front = x.clone().slice([0..batch, 0..prefix]);
        let patches = x.slice([0..batch, prefix..tokens]);
        let (front, patches) = match norms {
            None => (front, patches),
            Some((front_norm, patch_norm)) => (front_norm.forward_tokens(front), patch_norm.forward_tokens(patches)),
        };
        LayerFeatures {
            cls: front.clone().slice([0..batch, 0..1]).reshape([batch, dim]),
            registers: (prefix > 1).then(|| front.slice([0..batch, 1..prefix])),
            patches,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::config::Position;
    use crate::weights::host;
    use crate::{Arch, Architecture, Backbone, ModelConfig};

    #[test]
    fn attention_of_cls_equals_a_softmax_over_dot_products_in_loops() {
        let device = Device::flex();
        let mut cases = 0;
        for (position, register_tokens) in [(Position::Rope, 3), (Position::Learned, 0)] {
            let config = ModelConfig {
                arch: Arch::VitTiny,
                patch_size: 4,
                embed_dim: Some(24),
                depth: Some(3),
                num_heads: Some(3),
                register_tokens,
                position,
                ..ModelConfig::default()
            };
            let architecture = config.resolve(16).expect("a model");
            let mut rng = dinoxide_random::stream(5, dinoxide_random::Purpose::Init, 0, 0);
            let Backbone::Vit(mut vit) = Backbone::new(&architecture, &device, &mut rng) else { panic!("a ViT") };
            // Weights as they are after training, not as they begin: attention is far from uniform.
            for block in &mut vit.blocks {
                block.attn.qkv.weight = block.attn.qkv.weight.clone().map(|w| w * 12.0);
            }
            let (rows, columns) = (3, 5);
            let pixels = (0..2 * 3 * 12 * 20).map(|i| ((i * i) as f32 * 0.37).sin()).collect::<Vec<_>>();
            let images = Tensor::<4>::from_data(TensorData::new(pixels, [2, 3, 12, 20]), &device);
            for block in [0, 2] {
                let found = host(vit.cls_attention(images.clone(), block).reshape([-1]));
                // The block's input, token by token.
                let input = if block == 0 {
                    vit.tokens(images.clone(), None, (rows, columns))
                } else {
                    let before = vit.forward_layers(images.clone(), &[block - 1], false).remove(0);
                    let [batch, dim] = before.cls.dims();
                    let mut parts = vec![before.cls.reshape([batch, 1, dim])];
                    parts.extend(before.registers);
                    parts.push(before.patches);
                    Tensor::cat(parts, 1)
                };
                let prefix = 1 + register_tokens;
                let tokens = prefix + rows * columns;
                let input = host(input.reshape([-1]));
                let layer = &vit.blocks[block];
                let qkv = host(layer.attn.qkv.weight.val().reshape([-1]));
                let bias = layer.attn.qkv.bias.as_ref().map(|bias| host(bias.val()));
                let mask = layer.attn.bias_mask();
                let rope = vit.rope().map(|rope| rope.table((rows, columns), prefix, &RopeDraw::NONE, &device));
                let rope = rope.map(|t| (host(t.cos.reshape([-1])), host(t.sin.reshape([-1]))));
                for (image, input) in input.chunks(tokens * 24).enumerate() {
                    for head in 0..3 {
                        // Part 0 is the query, 1 the key.
                        let projected = |token: usize, part: usize| -> Vec<f64> {
                            let x: Vec<f64> = input[token * 24..][..24].iter().map(|&v| f64::from(v)).collect();
                            let mean = x.iter().sum::<f64>() / 24.0;
                            let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 24.0;
                            let eps = vit.config().norm_eps;
                            let x: Vec<f64> = x.iter().map(|v| (v - mean) / (variance + eps).sqrt()).collect();
                            let y: Vec<f64> = (0..8)
                                .map(|i| {
                                    let row = part * 24 + head * 8 + i;
                                    let kept = mask.as_ref().map_or(1.0, |mask| f64::from(mask[row]));
                                    let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias[row])) * kept;
                                    let weights = &qkv[row * 24..][..24];
                                    bias + weights.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum::<f64>()
                                })
                                .collect();
                            let Some((cos, sin)) = &rope else { return y };
                            let at = |table: &[f32], i: usize| f64::from(table[token * 8 + i]);
                            (0..8)
                                .map(|i| {
                                    let other = if i < 4 { -y[i + 4] } else { y[i - 4] };
                                    y[i] * at(cos, i) + other * at(sin, i)
                                })
                                .collect()
                        };
                        let query = projected(0, 0);
                        let scores: Vec<f64> = (0..tokens)
                            .map(|token| {
                                let key = projected(token, 1);
                                (query.iter().zip(&key).map(|(q, k)| q * k).sum::<f64>() / 8f64.sqrt()).exp()
                            })
                            .collect();
                        let total: f64 = scores.iter().sum();
                        let row = &found[(image * 3 + head) * rows * columns..][..rows * columns];
                        for (patch, found) in row.iter().enumerate() {
                            let expected = scores[prefix + patch] / total;
                            assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
                            cases += 1;
                        }
                        let (least, most) = row.iter().fold((1f32, 0f32), |(a, b), &v| (a.min(v), b.max(v)));
                        assert!(most > 1.2 * least, "attention that is uniform would hide mistakes: {least} {most}");
                    }
                }
            }
            assert!(matches!(architecture, Architecture::Vit(_)));
        }
        assert_eq!(cases, 2 * 2 * 2 * 3 * 15);
    }
}
