//! Which backbone: the `[model]` table of a recipe, and the complete description that it resolves to.
//!
//! A recipe names an architecture of the papers and may override single numbers. [`ModelConfig::resolve`] turns that into
//! an [`Architecture`] in which nothing is implied: it is what a weight file carries, so that evaluation needs no recipe.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Arch, Architecture, ConvNextConfig, ModelError, arch::Sizes};

/// How a block's feed-forward layer is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FfnKind {
    /// Two linear layers with an exact GELU between them.
    Mlp,
    /// SwiGLU as DINOv2 packs it: `w12` (gate and value together) and `w3`; two thirds of the width, rounded up to 8.
    SwigluFused,
    /// SwiGLU as in DINOv3: `w1`, `w2`, `w3`; two thirds of the width, rounded up to 8.
    Swiglu,
    /// As `swiglu`, rounded up to 32.
    Swiglu32,
    /// As `swiglu`, rounded up to 64.
    Swiglu64,
    /// As `swiglu`, rounded up to 128.
    Swiglu128,
}

/// The kind of normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Layer normalisation.
    LayerNorm,
    /// Root-mean-square normalisation, without a bias.
    RmsNorm,
}

/// Where a patch is: a learned table or rotations of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Position {
    /// A learned table for one grid, interpolated to others (DINO, iBOT, DINOv2).
    Learned,
    /// Axial rotary embedding (DINOv3).
    Rope,
}

/// What patch coordinates are divided by before they are mapped to (−1, 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeNormalize {
    /// Height and width each by itself.
    Separate,
    /// Both by the larger.
    Max,
    /// Both by the smaller.
    Min,
}

/// How stochastic depth drops a residual branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropPathKind {
    /// The branch runs on a random subset of the batch, at the same rate in every block (DINOv2, DINOv3): saves compute.
    Subset,
    /// Each sample's branch is dropped by a coin, with the rate rising linearly over the blocks (DINO, iBOT).
    PerSample,
}

/// The `[model]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// The named size; the next six keys override single numbers of it. A ConvNeXt takes only `dims`, `depths`,
    /// `patch_size`, `in_channels`, `layer_scale_init`, `norm_eps`, `drop_path_rate` and `drop_path`, and refuses other
    /// values than the defaults elsewhere; it has no `mask_token` either way.
    pub arch: Arch,
    /// Width of the tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embed_dim: Option<usize>,
    /// Number of blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
    /// Attention heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_heads: Option<usize>,
    /// Hidden width of the feed-forward layer over `embed_dim`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ffn_ratio: Option<f64>,
    /// ConvNeXt: channels of the four stages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dims: Option<[usize; 4]>,
    /// ConvNeXt: blocks of the four stages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depths: Option<[usize; 4]>,
    /// Side of a patch in pixels. A ConvNeXt has none: there it is the grid to which the outputs of single stages are
    /// resized, and 0 leaves them as they are.
    pub patch_size: usize,
    /// Colour channels of the images.
    pub in_channels: usize,
    /// Feed-forward layer.
    pub ffn: FfnKind,
    /// Bias of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention output projection.
    pub proj_bias: bool,
    /// Biases of the feed-forward layer.
    pub ffn_bias: bool,
    /// Holds the key third of the qkv bias at zero (DINOv3).
    pub mask_k_bias: bool,
    /// Initial value of the layer scale; 0 leaves layer scale out (DINO, iBOT). ConvNeXts had 1e-6.
    pub layer_scale_init: f64,
    /// Normalisation.
    pub norm: NormKind,
    /// Its epsilon.
    pub norm_eps: f64,
    /// Register tokens between CLS and the patches ("storage tokens" in DINOv3).
    pub register_tokens: usize,
    /// Whether the backbone has a mask token (every ViT but DINO's; a ConvNeXt never has one).
    pub mask_token: bool,
    /// Position embedding.
    pub position: Position,
    /// Offset added to the target grid when a learned table is interpolated: 0.1 in DINO, iBOT and DINOv2 without
    /// registers, 0 with registers.
    pub interpolate_offset: f64,
    /// Antialiased interpolation of a learned table (DINOv2 with registers).
    pub interpolate_antialias: bool,
    /// RoPE: the longest period is near this many half-widths of the image.
    pub rope_base: f64,
    /// RoPE: shortest period; with `rope_max_period` it replaces `rope_base`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_min_period: Option<f64>,
    /// RoPE: longest period.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_max_period: Option<f64>,
    /// RoPE: normalisation of the coordinates.
    pub rope_normalize: RopeNormalize,
    /// RoPE, in training: coordinates are shifted by up to this much per axis; 0 is off.
    pub rope_shift: f64,
    /// RoPE, in training: each axis is stretched or shrunk by up to this factor; 1 is off.
    pub rope_jitter: f64,
    /// RoPE, in training: both axes are stretched or shrunk by up to this factor; 1 is off, released DINOv3 models used 2.
    pub rope_rescale: f64,
    /// Stochastic depth of the student.
    pub drop_path_rate: f64,
    /// Its form.
    pub drop_path: DropPathKind,
    /// A final norm of its own for CLS and registers.
    pub untie_cls_and_patch_norms: bool,
    /// A final norm of its own for CLS and registers of local crops in training (DINOv3 7B).
    pub untie_global_and_local_cls_norm: bool,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            arch: Arch::VitSmall,
            embed_dim: None,
            depth: None,
            num_heads: None,
            ffn_ratio: None,
            dims: None,
            depths: None,
            patch_size: 16,
            in_channels: 3,
            ffn: FfnKind::Mlp,
            qkv_bias: true,
            proj_bias: true,
            ffn_bias: true,
            mask_k_bias: false,
            layer_scale_init: 1e-5,
            norm: NormKind::LayerNorm,
            norm_eps: 1e-6,
            register_tokens: 0,
            mask_token: true,
            position: Position::Learned,
            interpolate_offset: 0.1,
            interpolate_antialias: false,
            rope_base: 100.0,
            rope_min_period: None,
            rope_max_period: None,
            rope_normalize: RopeNormalize::Separate,
            rope_shift: 0.0,
            rope_jitter: 1.0,
            rope_rescale: 1.0,
            drop_path_rate: 0.0,
            drop_path: DropPathKind::Subset,
            untie_cls_and_patch_norms: false,
            untie_global_and_local_cls_norm: false,
        }
    }
}

/// RoPE's geometry: periods and coordinates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeConfig {
    /// Periods of the `d/4` frequencies of an axis.
    pub periods: RopePeriods,
    /// Normalisation of the coordinates.
    pub normalize: RopeNormalize,
    /// Training: shift of up to this much per axis; 0 is off.
    pub shift: f64,
    /// Training: stretch of each axis; 1 is off.
    pub jitter: f64,
    /// Training: stretch of both axes; 1 is off.
    pub rescale: f64,
}

/// The two ways of giving RoPE's periods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopePeriods {
    /// `base^(i/(d/4))`.
    Base(f64),
    /// Geometric from min to max, both included.
    Range {
        /// Shortest period.
        min: f64,
        /// Longest period.
        max: f64,
    },
}

/// A learned position table: its grid and how it is interpolated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearnedConfig {
    /// Rows and columns of the stored grid; equal in every released model.
    pub grid: usize,
    /// Offset added to the target grid, see [`ModelConfig::interpolate_offset`].
    pub offset: f64,
    /// Antialiased interpolation.
    pub antialias: bool,
}

/// The complete description of a ViT; nothing in it is implied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VitConfig {
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Colour channels.
    pub in_channels: usize,
    /// Width of the tokens.
    pub embed_dim: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Hidden width of the feed-forward layer, after SwiGLU's reduction.
    pub ffn_hidden: usize,
    /// Feed-forward layer.
    pub ffn: FfnKind,
    /// Bias of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention output projection.
    pub proj_bias: bool,
    /// Biases of the feed-forward layer.
    pub ffn_bias: bool,
    /// Holds the key third of the qkv bias at zero.
    pub mask_k_bias: bool,
    /// Initial value of the layer scale; `None`: no layer scale.
    pub layer_scale_init: Option<f64>,
    /// Normalisation.
    pub norm: NormKind,
    /// Its epsilon.
    pub norm_eps: f64,
    /// Register tokens.
    pub register_tokens: usize,
    /// Whether there is a mask token.
    pub mask_token: bool,
    /// The learned table, when positions are learned.
    pub learned: Option<LearnedConfig>,
    /// RoPE, when positions are rotary.
    pub rope: Option<RopeConfig>,
    /// Stochastic depth of the student.
    pub drop_path_rate: f64,
    /// Its form.
    pub drop_path: DropPathKind,
    /// A final norm of its own for CLS and registers.
    pub untie_cls_and_patch_norms: bool,
    /// A final norm of its own for CLS and registers of local crops in training.
    pub untie_global_and_local_cls_norm: bool,
}

/// Hidden width of a feed-forward layer of nominal width `hidden`.
pub fn ffn_hidden(kind: FfnKind, hidden: usize) -> usize {
    // Two thirds keep SwiGLU's parameter count at that of the MLP (Shazeer 2020, §2).
    let reduced = (hidden as f64 * 2.0 / 3.0) as usize;
    match kind {
        FfnKind::Mlp => hidden,
        FfnKind::SwigluFused | FfnKind::Swiglu => reduced.div_ceil(8) * 8,
        FfnKind::Swiglu32 => reduced.div_ceil(32) * 32,
        FfnKind::Swiglu64 => reduced.div_ceil(64) * 64,
        FfnKind::Swiglu128 => reduced.div_ceil(128) * 128,
    }
}

impl ModelConfig {
    /// The backbone for images of `image_size` pixels a side (the global crops), which sets a learned table's grid.
    ///
    /// # Errors
    /// Sizes that do not fit together, each named with both values; values for what the architecture does not have.
    pub fn resolve(&self, image_size: usize) -> Result<Architecture, ModelError> {
        match self.arch.sizes() {
            Sizes::Vit { .. } => self.vit(image_size).map(Architecture::Vit),
            Sizes::ConvNext { dims, depths } => self.convnext(dims, depths, image_size).map(Architecture::ConvNext),
        }
    }

    /// Keys and values; keys without a value are left out.
    fn table(&self) -> serde_json::Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(table)) => table,
            other => panic!("a configuration is a table of plain data, not {other:?}"),
        }
    }

    fn convnext(&self, dims: [usize; 4], depths: [usize; 4], image_size: usize) -> Result<ConvNextConfig, ModelError> {
        const OURS: [&str; 9] = [
            "arch",
            "dims",
            "depths",
            "patch_size",
            "in_channels",
            "layer_scale_init",
            "norm_eps",
            "drop_path_rate",
            "drop_path",
        ];
        // Unless a recipe says otherwise there is a mask token: that is no wish for one.
        let meant = |key: &str| !OURS.contains(&key) && key != "mask_token";
        let (table, default) = (self.table(), Self::default().table());
        let foreign: Vec<&String> =
            table.keys().filter(|key| meant(key) && table.get(*key) != default.get(*key)).collect();
        if !foreign.is_empty() {
            let list = |of: &dyn Fn(&str) -> String| foreign.iter().map(|key| of(key)).collect::<Vec<_>>().join(", ");
            let given = list(&|key| format!("`model.{key} = {}`", table[key]));
            let plain = list(&|key| match default.get(key) {
                Some(value) => format!("`{key} = {value}`"),
                None => format!("no `{key}`"),
            });
            return Err(ModelError::config(format!(
                "{given}: only vision transformers have this, `model.arch` is {}\n\nhint: a ConvNeXt needs {plain} in \
                 `[model]`",
                table["arch"]
            )));
        }
        let config = ConvNextConfig {
            in_channels: self.in_channels,
            dims: self.dims.unwrap_or(dims),
            depths: self.depths.unwrap_or(depths),
            layer_scale_init: (self.layer_scale_init != 0.0).then_some(self.layer_scale_init),
            norm_eps: self.norm_eps,
            patch_size: (self.patch_size > 0).then_some(self.patch_size),
            drop_path_rate: self.drop_path_rate,
            drop_path: self.drop_path,
        };
        config.check()?;
        config.grid(image_size, image_size)?;
        Ok(config)
    }

    /// As [`resolve`](Self::resolve), where the named size must be a vision transformer's.
    ///
    /// # Errors
    /// As there.
    pub fn vit(&self, image_size: usize) -> Result<VitConfig, ModelError> {
        let Sizes::Vit { embed_dim, depth, num_heads, ffn_ratio } = self.arch.sizes() else {
            let arch = &self.table()["arch"];
            return Err(ModelError::config(format!("`model.arch` is {arch}, not a vision transformer")));
        };
        let table = self.table();
        if let Some(key) = ["dims", "depths"].into_iter().find(|key| table.contains_key(*key)) {
            return Err(ModelError::config(format!(
                "`model.{key} = {}`: only ConvNeXts have stages, `model.arch` is {}\n\nhint: leave it out; the numbers of a \
                 vision transformer are `embed_dim` and `depth`",
                table[key], table["arch"]
            )));
        }
        let other = match self.position {
            Position::Learned => "rope_",
            Position::Rope => "interpolate_",
        };
        let default = Self::default().table();
        if let Some((key, value)) =
            table.iter().find(|(key, value)| key.starts_with(other) && default.get(*key) != Some(value))
        {
            return Err(ModelError::config(format!(
                "`model.{key} = {value}` has no effect with `model.position = {}`\n\nhint: leave it out",
                table["position"]
            )));
        }
        let embed_dim = self.embed_dim.unwrap_or(embed_dim);
        let ratio = self.ffn_ratio.unwrap_or(ffn_ratio);
        let rope = match self.position {
            Position::Learned => None,
            Position::Rope => Some(RopeConfig {
                periods: match (self.rope_min_period, self.rope_max_period) {
                    (None, None) => RopePeriods::Base(self.rope_base),
                    (Some(min), Some(max)) => RopePeriods::Range { min, max },
                    _ => {
                        return Err(ModelError::config(
                            "`model.rope_min_period` and `model.rope_max_period` go together: give both or neither",
                        ));
                    }
                },
                normalize: self.rope_normalize,
                shift: self.rope_shift,
                jitter: self.rope_jitter,
                rescale: self.rope_rescale,
            }),
        };
        if self.patch_size == 0 || !image_size.is_multiple_of(self.patch_size) {
            return Err(ModelError::NotAMultiple { what: "crop size", size: image_size, patch: self.patch_size });
        }
        let config = VitConfig {
            patch_size: self.patch_size,
            in_channels: self.in_channels,
            embed_dim,
            depth: self.depth.unwrap_or(depth),
            num_heads: self.num_heads.unwrap_or(num_heads),
            ffn_hidden: ffn_hidden(self.ffn, (embed_dim as f64 * ratio) as usize),
            ffn: self.ffn,
            qkv_bias: self.qkv_bias,
            proj_bias: self.proj_bias,
            ffn_bias: self.ffn_bias,
            mask_k_bias: self.mask_k_bias,
            layer_scale_init: (self.layer_scale_init != 0.0).then_some(self.layer_scale_init),
            norm: self.norm,
            norm_eps: self.norm_eps,
            register_tokens: self.register_tokens,
            mask_token: self.mask_token,
            learned: (self.position == Position::Learned).then(|| LearnedConfig {
                grid: image_size / self.patch_size,
                offset: self.interpolate_offset,
                antialias: self.interpolate_antialias,
            }),
            rope,
            drop_path_rate: self.drop_path_rate,
            drop_path: self.drop_path,
            untie_cls_and_patch_norms: self.untie_cls_and_patch_norms,
            untie_global_and_local_cls_norm: self.untie_global_and_local_cls_norm,
        };
        config.check()?;
        Ok(config)
    }
}

impl VitConfig {
    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.embed_dim / self.num_heads
    }

    /// The grid of patches `(rows, columns)` of an image of `height × width` pixels.
    ///
    /// # Errors
    /// A side that is zero or no multiple of the patch size.
    pub fn grid(&self, height: usize, width: usize) -> Result<(usize, usize), ModelError> {
        for (what, size) in [("image height", height), ("image width", width)] {
            if size == 0 || !size.is_multiple_of(self.patch_size) {
                return Err(ModelError::NotAMultiple { what, size, patch: self.patch_size });
            }
        }
        Ok((height / self.patch_size, width / self.patch_size))
    }

    /// Checks that the numbers fit together. A configuration read from a file must pass before anything is built.
    ///
    /// # Errors
    /// The first relation that does not hold, with both values.
    pub fn check(&self) -> Result<(), ModelError> {
        let positive = [
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("embed_dim", self.embed_dim),
            ("depth", self.depth),
            ("num_heads", self.num_heads),
            ("ffn_hidden", self.ffn_hidden),
        ];
        for (name, value) in positive {
            if value == 0 || value > 1 << 20 {
                return Err(ModelError::config(format!("`model.{name}` is {value}, not a usable size")));
            }
        }
        if self.register_tokens > 1 << 12 {
            return Err(ModelError::config(format!(
                "`model.register_tokens` is {}, at most 4096 are possible",
                self.register_tokens
            )));
        }
        if self.layer_scale_init.is_some_and(|init| !init.is_finite()) {
            return Err(ModelError::config("`model.layer_scale_init` is not a finite number"));
        }
        if !self.embed_dim.is_multiple_of(self.num_heads) {
            let (dim, heads) = (self.embed_dim, self.num_heads);
            return Err(ModelError::config(format!(
                "`model.embed_dim` {dim} is not a multiple of `model.num_heads` {heads}"
            )));
        }
        if self.rope.is_some() && !self.head_dim().is_multiple_of(4) {
            let dim = self.head_dim();
            return Err(ModelError::config(format!(
                "rotary positions need a head width that is a multiple of 4, and `embed_dim / num_heads` is {dim}"
            )));
        }
        if self.rope.is_some() == self.learned.is_some() {
            return Err(ModelError::config("positions must be either learned or rotary"));
        }
        if let Some(rope) = &self.rope {
            let bad = |value: f64, least: f64| !(value.is_finite() && value >= least);
            let periods_bad = match rope.periods {
                RopePeriods::Base(base) => bad(base, 1.0),
                RopePeriods::Range { min, max } => bad(min, f64::MIN_POSITIVE) || bad(max, min),
            };
            if periods_bad || bad(rope.shift, 0.0) || bad(rope.jitter, 1.0) || bad(rope.rescale, 1.0) {
                return Err(ModelError::config(
                    "RoPE needs a base ≥ 1 (or 0 < min period ≤ max period), a shift ≥ 0, and a jitter and rescale ≥ 1",
                ));
            }
        }
        if let Some(learned) = &self.learned
            && (learned.grid == 0 || learned.grid > 1 << 12 || !(0.0..1.0).contains(&learned.offset))
        {
            return Err(ModelError::config(format!(
                "a learned position table of {0}×{0} patches, interpolated with offset {1}, is not usable",
                learned.grid, learned.offset
            )));
        }
        if !(0.0..1.0).contains(&self.drop_path_rate) {
            return Err(ModelError::config(format!(
                "`model.drop_path_rate` is {}, outside [0, 1)",
                self.drop_path_rate
            )));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(ModelError::config(format!("`model.norm_eps` is {}, outside (0, 1)", self.norm_eps)));
        }
        Ok(())
    }
}
