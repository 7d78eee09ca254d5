//! Named sizes of backbones.

use serde::{Deserialize, Serialize};

/// Named sizes: ViT (DINO, DINOv2 table 17, DINOv3 table 2) and ConvNeXt (Liu et al. 2022, §3; DINOv3 §5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arch {
    /// D 192, 12 blocks, 3 heads.
    VitTiny,
    /// D 384, 12 blocks, 6 heads.
    VitSmall,
    /// D 768, 12 blocks, 12 heads.
    VitBase,
    /// D 1024, 24 blocks, 16 heads.
    VitLarge,
    /// D 1152, 27 blocks, 18 heads.
    VitSo400m,
    /// D 1280, 32 blocks, 20 heads.
    VitHuge2,
    /// D 1536, 40 blocks, 24 heads.
    VitGiant2,
    /// D 4096, 40 blocks, 32 heads.
    #[serde(rename = "vit_7b")]
    Vit7b,
    /// 96 to 768 channels, 3, 3, 9, 3 blocks.
    #[serde(rename = "convnext_tiny")]
    ConvNextTiny,
    /// 96 to 768 channels, 3, 3, 27, 3 blocks.
    #[serde(rename = "convnext_small")]
    ConvNextSmall,
    /// 128 to 1024 channels, 3, 3, 27, 3 blocks.
    #[serde(rename = "convnext_base")]
    ConvNextBase,
    /// 192 to 1536 channels, 3, 3, 27, 3 blocks.
    #[serde(rename = "convnext_large")]
    ConvNextLarge,
}

/// What a named size stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sizes {
    /// A vision transformer.
    Vit {
        /// Width of the tokens.
        embed_dim: usize,
        /// Number of blocks.
        depth: usize,
        /// Attention heads.
        num_heads: usize,
        /// Hidden width of the feed-forward layer over `embed_dim`.
        ffn_ratio: f64,
    },
    /// A ConvNeXt.
    ConvNext {
        /// Channels of the four stages.
        dims: [usize; 4],
        /// Blocks of the four stages.
        depths: [usize; 4],
    },
}

impl Arch {
    /// The numbers behind the name.
    pub fn sizes(self) -> Sizes {
        let vit = |embed_dim, depth, num_heads, ffn_ratio| Sizes::Vit { embed_dim, depth, num_heads, ffn_ratio };
        let convnext =
            |width, third| Sizes::ConvNext { dims: [width, 2 * width, 4 * width, 8 * width], depths: [3, 3, third, 3] };
        match self {
            Arch::VitTiny => vit(192, 12, 3, 4.0),
            Arch::VitSmall => vit(384, 12, 6, 4.0),
            Arch::VitBase => vit(768, 12, 12, 4.0),
            Arch::VitLarge => vit(1024, 24, 16, 4.0),
            Arch::VitSo400m => vit(1152, 27, 18, 3.777777778),
            Arch::VitHuge2 => vit(1280, 32, 20, 4.0),
            Arch::VitGiant2 => vit(1536, 40, 24, 4.0),
            Arch::Vit7b => vit(4096, 40, 32, 3.0),
            Arch::ConvNextTiny => convnext(96, 9),
            Arch::ConvNextSmall => convnext(96, 27),
            Arch::ConvNextBase => convnext(128, 27),
            Arch::ConvNextLarge => convnext(192, 27),
        }
    }
}
