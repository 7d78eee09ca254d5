//! Block masks for masked image modelling (BEiT, arXiv:2106.08254, Algorithm 1; iBOT, arXiv:2111.07832): rectangles of
//! patches, hidden from the student, until a target share of the crop is covered.

use rand::Rng;
use rand::RngExt;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::config::{AugmentationError, check_probability, check_range};
use crate::{happens, uniform};

/// How many patches of which crops are masked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MaskConfig {
    /// Share of the global crops of a batch that are masked; with style `per_image` the probability that a crop is.
    pub probability: f64,
    /// Range of the masked share of a masked crop's patches.
    pub ratio: [f64; 2],
    /// How shares are spread over the crops, and whether they are reached exactly.
    pub style: MaskStyle,
    /// Whether each mask is rolled by a random number of rows and columns, so that every patch is masked equally often.
    pub random_circular_shift: bool,
}

impl Default for MaskConfig {
    fn default() -> Self {
        Self { probability: 0.5, ratio: [0.1, 0.5], style: MaskStyle::Exact, random_circular_shift: false }
    }
}

/// How the masked share is chosen. The first two split `ratio` into as many equal parts as there are masked crops and
/// give one part to each, so that a batch always has the whole range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskStyle {
    /// The upper bound of the crop's part, reached exactly: what blocks leave over is masked patch by patch. The number
    /// of masked patches of a batch is always the same. DINOv3.
    #[default]
    Exact,
    /// Uniform within the crop's part; blocks that no longer fit leave the count a little short. DINOv2.
    AtMost,
    /// Each crop on its own: masked with `probability`, with a share uniform in `ratio`. Blocks are larger and may fall
    /// short. iBOT (its ratios 0 and 0.3 ± 0.2 are probability 0.5 and ratio [0.1, 0.5]).
    PerImage,
}

impl MaskConfig {
    /// Checks every value against its range.
    ///
    /// # Errors
    /// The first value that is out of range, by its key.
    pub fn validate(&self) -> Result<(), AugmentationError> {
        check_probability("mask.probability", self.probability)?;
        check_range("mask.ratio", self.ratio, "between 0 and 1", |v| (0.0..=1.0).contains(&v))
    }
}

/// The masks of a batch of crops, as a table and as a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Masks {
    /// Number of crops.
    pub crops: usize,
    /// Patches per crop.
    pub patches: usize,
    /// Whether a patch is masked; `[crops · patches]`, crop by crop.
    pub mask: Vec<bool>,
    /// Positions of the masked patches in `mask`, ascending.
    pub indices: Vec<usize>,
    /// For each of `indices`, 1 over the number of masked patches of its crop: sums to the number of masked crops.
    pub weights: Vec<f32>,
}

/// Draws the masks of a batch of `crops` crops of `grid = (h, w)` patches.
///
/// # Panics
/// If the config is not valid (see [`MaskConfig::validate`]).
pub fn batch_masks(crops: usize, grid: (usize, usize), config: &MaskConfig, rng: &mut impl Rng) -> Masks {
    if let Err(error) = config.validate() {
        panic!("{error}");
    }
    let patches = grid.0 * grid.1;
    let blocks = match config.style {
        MaskStyle::Exact | MaskStyle::AtMost => BlockMasks::new(grid),
        MaskStyle::PerImage => BlockMasks::large(grid),
    };
    let mut masks: Vec<Vec<bool>> = shares(crops, patches, config, rng)
        .into_iter()
        .map(|target| {
            let BlockMask { mask, .. } = match config.style {
                MaskStyle::Exact => blocks.draw_exact(target as usize, rng),
                MaskStyle::AtMost | MaskStyle::PerImage => blocks.draw(target, rng),
            };
            if config.random_circular_shift { rolled(&mask, grid, rng) } else { mask }
        })
        .collect();
    masks.resize(crops, vec![false; patches]);
    masks.shuffle(rng);
    Masks::from_rows(patches, &masks)
}

/// How many patches the masked crops shall have masked; the crops not listed get none.
fn shares(crops: usize, patches: usize, config: &MaskConfig, rng: &mut impl Rng) -> Vec<f64> {
    // Counts are products in single precision, cut to an integer, as in the reference systems.
    let count = |share: f32| (patches as f32 * share).trunc().into();
    let [low, high] = config.ratio;
    match config.style {
        MaskStyle::Exact => {
            let masked = (crops as f64 * config.probability) as usize;
            linspace(low, high, masked + 1).into_iter().skip(1).map(count).collect()
        }
        MaskStyle::AtMost => {
            let masked = (crops as f64 * config.probability) as usize;
            let bounds = linspace(low, high, masked + 1);
            bounds.windows(2).map(|part| count(part[0] + (part[1] - part[0]) * rng.random::<f32>())).collect()
        }
        MaskStyle::PerImage => (0..crops)
            .filter_map(|_| {
                let target = uniform(config.ratio, rng) * patches as f64;
                happens(config.probability, rng).then_some(target)
            })
            .collect(),
    }
}

/// `count` equally spaced numbers in single precision, as PyTorch computes them: the first half from the start, the
/// second from the end.
fn linspace(start: f64, end: f64, count: usize) -> Vec<f32> {
    if count == 1 {
        return vec![start as f32];
    }
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (count - 1) as f32;
    (0..count)
        .map(|i| if i < count / 2 { start + step * i as f32 } else { end - step * (count - 1 - i) as f32 })
        .collect()
}

/// The mask moved down and right by random distances, what leaves on one side entering on the other.
fn rolled(mask: &[bool], (h, w): (usize, usize), rng: &mut impl Rng) -> Vec<bool> {
    if mask.is_empty() {
        return Vec::new();
    }
    let (down, right) = (rng.random_range(0..h), rng.random_range(0..w));
    (0..h * w).map(|i| mask[(i / w + h - down) % h * w + (i % w + w - right) % w]).collect()
}

impl Masks {
    fn from_rows(patches: usize, rows: &[Vec<bool>]) -> Self {
        let mask = rows.concat();
        let indices = (0..mask.len()).filter(|&i| mask[i]).collect();
        let counts = rows.iter().map(|row| row.iter().filter(|&&masked| masked).count());
        let weights = counts.flat_map(|count| std::iter::repeat_n(1.0 / count as f32, count)).collect();
        Self { crops: rows.len(), patches, mask, indices, weights }
    }
}

/// The mask of one crop.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockMask {
    /// Whether a patch is masked; `[h · w]`, row by row.
    pub mask: Vec<bool>,
    /// Number of masked patches.
    pub masked: usize,
    /// Number of rectangles that masked them.
    pub blocks: usize,
}

/// Draws masks made of rectangles on a grid of patches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockMasks {
    /// Rows and columns of patches.
    pub grid: (usize, usize),
    /// Smallest area drawn for a rectangle, in patches (unless less than this is missing).
    pub min_patches: f64,
    /// Largest area of a rectangle, in patches.
    pub max_patches: f64,
}

impl BlockMasks {
    /// Blocks as in DINOv2 and DINOv3: from 4 patches to half of the grid, `⌊h/2⌋·w`.
    pub fn new(grid: (usize, usize)) -> Self {
        Self { grid, min_patches: 4.0, max_patches: (grid.0 / 2 * grid.1) as f64 }
    }

    /// Blocks as in iBOT: from `⌊min(h, w)/3⌋²` patches, without an upper bound.
    pub fn large(grid: (usize, usize)) -> Self {
        let third = grid.0.min(grid.1) / 3;
        Self { grid, min_patches: (third * third) as f64, max_patches: f64::INFINITY }
    }

    /// Adds rectangles until `target` patches are masked or none fits any more.
    ///
    /// Each rectangle has an area of `U(min_patches, m)` with m the patches still missing, or `max_patches` if that is
    /// less, and a log aspect ratio of `U(ln 0.3, ln 1/0.3)`. It must be smaller than the grid on both axes and mask at
    /// least one new patch, and no more than m. Ten failures in a row end the mask.
    pub fn draw(&self, target: f64, rng: &mut impl Rng) -> BlockMask {
        let mut result = BlockMask { mask: vec![false; self.grid.0 * self.grid.1], masked: 0, blocks: 0 };
        while (result.masked as f64) < target {
            let most = (target - result.masked as f64).min(self.max_patches);
            let Some(added) = (0..10).find_map(|_| self.try_block(&mut result.mask, most, rng)) else { break };
            result.masked += added;
            result.blocks += 1;
        }
        result
    }

    /// As [`draw`](Self::draw), then masks single patches, uniformly among those left, until exactly `target` are masked.
    ///
    /// # Panics
    /// If the grid has fewer than `target` patches.
    pub fn draw_exact(&self, target: usize, rng: &mut impl Rng) -> BlockMask {
        let mut result = self.draw(target as f64, rng);
        assert!(target <= result.mask.len(), "{target} masked patches do not fit on {:?}", self.grid);
        let mut free: Vec<usize> = (0..result.mask.len()).filter(|&i| !result.mask[i]).collect();
        for &mut i in free.partial_shuffle(rng, target - result.masked).0 {
            result.mask[i] = true;
        }
        result.masked = target;
        result
    }

    /// One rectangle, if it fits: the number of patches that it newly masked.
    fn try_block(&self, mask: &mut [bool], most: f64, rng: &mut impl Rng) -> Option<usize> {
        const LOG_ASPECT: f64 = 1.203_972_804_325_936; // −ln 0.3
        let (h, w) = self.grid;
        let area = uniform([self.min_patches, most], rng);
        let aspect = uniform([-LOG_ASPECT, LOG_ASPECT], rng).exp();
        let block_h = (area * aspect).sqrt().round_ties_even() as usize;
        let block_w = (area / aspect).sqrt().round_ties_even() as usize;
        if block_h >= h || block_w >= w {
            return None;
        }
        let top = rng.random_range(0..=h - block_h);
        let left = rng.random_range(0..=w - block_w);
        let rows = |i: usize| (top + i) * w + left..(top + i) * w + left + block_w;
        let added: usize = (0..block_h).map(|i| mask[rows(i)].iter().filter(|&&masked| !masked).count()).sum();
        if added == 0 || added as f64 > most {
            return None;
        }
        (0..block_h).for_each(|i| mask[rows(i)].fill(true));
        Some(added)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::ChaCha8Rng;

    fn rng(seed: u64) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(seed)
    }

    fn counts(masks: &Masks) -> Vec<usize> {
        masks.mask.chunks_exact(masks.patches).map(|row| row.iter().filter(|&&m| m).count()).collect()
    }

    #[test]
    fn exact_totals_are_those_of_the_published_recipes() {
        for (crops, grid, total) in [
            (128, (14, 14), 3771),
            (32, (16, 16), 1274),
            (64, (16, 16), 2496),
            (16, (48, 48), 5987),
            (8, (4, 4), 21),
            (8, (2, 8), 21),
        ] {
            for seed in 0..3 {
                let masks = batch_masks(crops, grid, &MaskConfig::default(), &mut rng(seed));
                assert_eq!(masks.indices.len(), total, "{crops} crops of {grid:?}");
                assert_eq!(counts(&masks).iter().filter(|&&n| n > 0).count(), crops / 2);
            }
        }
        let mut found = counts(&batch_masks(8, (4, 4), &MaskConfig::default(), &mut rng(5)));
        found.sort_unstable();
        assert_eq!(found, [0, 0, 0, 0, 3, 4, 6, 8]);
    }

    #[test]
    fn at_most_gives_each_masked_crop_a_part_of_the_ratio() {
        let config = MaskConfig { style: MaskStyle::AtMost, ..Default::default() };
        let bounds = [(19, 39), (39, 58), (58, 78), (78, 98)];
        let mut sums = [0.0; 4];
        for seed in 0..500 {
            let targets = shares(8, 196, &config, &mut rng(seed));
            assert_eq!(targets.len(), 4);
            for ((&target, (low, high)), sum) in targets.iter().zip(bounds).zip(&mut sums) {
                assert!(target.fract() == 0.0 && (f64::from(low)..=f64::from(high)).contains(&target));
                *sum += target / 500.0;
            }
        }
        // Uniform over 19.6 patches, cut to integers.
        for (mean, expected) in sums.into_iter().zip([28.9, 48.5, 68.1, 87.7]) {
            assert!((mean - expected).abs() < 5.0 * 19.6 / (12.0 * 500.0_f64).sqrt(), "{mean} for {expected}");
        }
    }

    #[test]
    fn largest_block_is_half_of_the_grid_rounded_down() {
        let largest = |grid| BlockMasks::new(grid).max_patches;
        assert_eq!(
            [(14, 14), (16, 16), (7, 7), (32, 32), (48, 48), (7, 10)].map(largest),
            [98.0, 128.0, 21.0, 512.0, 1152.0, 30.0]
        );
    }

    #[test]
    fn a_mask_is_made_of_the_blocks_it_counts() {
        let (mut several, mut one) = (0, 0);
        for seed in 0..200 {
            let drawn = BlockMasks::new((9, 13)).draw(40.0, &mut rng(seed));
            assert_eq!(drawn.masked, drawn.mask.iter().filter(|&&m| m).count());
            assert!(drawn.masked <= 40 && drawn.blocks >= 1);
            several += usize::from(drawn.blocks > 1);
            if drawn.blocks == 1 {
                one += 1;
                let rows: Vec<_> = drawn.mask.chunks_exact(13).filter(|row| row.contains(&true)).collect();
                assert!(rows.iter().all(|row| row == &rows[0]), "one block is a rectangle");
            }
        }
        assert!(several > 100 && one > 3, "{several} {one}");
    }

    #[test]
    fn nothing_is_masked_when_nothing_is_asked_for() {
        assert_eq!(BlockMasks::new((5, 6)).draw(0.0, &mut rng(0)).masked, 0);
        for style in [MaskStyle::Exact, MaskStyle::AtMost, MaskStyle::PerImage] {
            for config in [
                MaskConfig { probability: 0.0, style, ..Default::default() },
                MaskConfig { ratio: [0.0, 0.0], style, ..Default::default() },
            ] {
                let masks = batch_masks(6, (5, 7), &config, &mut rng(1));
                assert_eq!((masks.crops, masks.patches, masks.mask.len()), (6, 35, 210));
                assert!(masks.indices.is_empty() && masks.weights.is_empty());
            }
        }
    }

    #[test]
    fn grids_without_room_for_a_block_are_masked_patch_by_patch_or_not_at_all() {
        for grid in [(1, 1), (1, 20), (20, 1), (2, 2)] {
            let config = MaskConfig { probability: 1.0, ratio: [0.5, 0.5], ..Default::default() };
            let masks = batch_masks(4, grid, &config, &mut rng(2));
            assert_eq!(counts(&masks), [grid.0 * grid.1 / 2; 4], "{grid:?}");
            let at_most = MaskConfig { style: MaskStyle::AtMost, ..config };
            let masks = batch_masks(4, grid, &at_most, &mut rng(2));
            assert!(counts(&masks).iter().all(|&count| count <= grid.0 * grid.1 / 2));
        }
        for (crops, grid) in [(0, (4, 4)), (3, (0, 5)), (3, (5, 0))] {
            let config = MaskConfig { random_circular_shift: true, ..Default::default() };
            assert!(batch_masks(crops, grid, &config, &mut rng(2)).mask.is_empty());
        }
    }

    #[test]
    fn everything_can_be_masked() {
        let config = MaskConfig { probability: 1.0, ratio: [1.0, 1.0], ..Default::default() };
        assert_eq!(counts(&batch_masks(5, (6, 9), &config, &mut rng(3))), [54; 5]);
    }

    #[test]
    fn the_roll_keeps_the_count_and_evens_out_the_corners() {
        let corner_frequency = |random_circular_shift| {
            let config = MaskConfig { probability: 1.0, random_circular_shift, ..Default::default() };
            let mut corner = 0;
            for seed in 0..300 {
                let masks = batch_masks(8, (10, 12), &config, &mut rng(seed));
                assert_eq!(masks.indices.len(), 312, "the same targets with and without the roll");
                corner += masks.mask.chunks_exact(120).filter(|row| row[0]).count();
            }
            f64::from(corner as u32) / 2400.0
        };
        let mean = 312.0 / 960.0;
        // Five standard deviations of 2400 independent masks.
        assert!((corner_frequency(true) - mean).abs() < 5.0 * (mean * (1.0 - mean) / 2400.0_f64).sqrt());
        assert!(corner_frequency(false) < 0.6 * mean);
    }

    #[test]
    fn masked_crops_are_anywhere_in_the_batch() {
        let mut masked = [0; 6];
        for seed in 0..600 {
            for (count, masked) in
                counts(&batch_masks(6, (5, 7), &MaskConfig::default(), &mut rng(seed))).iter().zip(&mut masked)
            {
                *masked += u32::from(*count > 0);
            }
        }
        assert!(masked.iter().all(|&n| (300 - 62..300 + 62).contains(&n)), "{masked:?}");
    }

    #[test]
    fn per_image_masks_follow_the_probability_and_the_ratio() {
        let config =
            MaskConfig { probability: 0.5, ratio: [0.1, 0.5], style: MaskStyle::PerImage, ..Default::default() };
        let masks = batch_masks(4000, (14, 14), &config, &mut rng(4));
        let counts: Vec<usize> = counts(&masks).into_iter().filter(|&n| n > 0).collect();
        assert!((counts.len() as f64 - 2000.0).abs() < 5.0 * 1000_f64.sqrt(), "{}", counts.len());
        assert!(counts.iter().all(|&n| n <= 98));
        // Uniform on 19.6…98 patches has mean 58.8 and standard deviation 22.6; blocks fall a little short of it.
        let mean = counts.iter().sum::<usize>() as f64 / counts.len() as f64;
        assert!((53.0..60.0).contains(&mean), "{mean}");
    }

    #[test]
    #[should_panic(expected = "`mask.probability` is 2, must be a probability between 0 and 1")]
    fn an_invalid_config_is_a_bug_of_the_caller() {
        batch_masks(4, (4, 4), &MaskConfig { probability: 2.0, ..Default::default() }, &mut rng(0));
    }

    #[test]
    fn invalid_ratios_are_named() {
        for ratio in [[0.5, 0.1], [-0.1, 0.5], [0.1, 1.5], [f64::NAN, 0.5]] {
            let message = MaskConfig { ratio, ..Default::default() }.validate().unwrap_err().to_string();
            assert!(message.contains("`mask.ratio`"), "{message}");
        }
    }

    #[test]
    fn table_list_and_weights_agree() {
        for seed in 0..500 {
            let draw = &mut rng(seed);
            let (crops, h, w) = (draw.random_range(0..12), draw.random_range(1..12), draw.random_range(1..12));
            // The ends are what a recipe may say, too.
            let probability = [0.0, draw.random(), 1.0][draw.random_range(0..3)];
            let low = draw.random_range(0.0..0.6);
            let high = low + draw.random_range(0.0..0.4);
            let style = [MaskStyle::Exact, MaskStyle::AtMost, MaskStyle::PerImage][draw.random_range(0..3)];
            let random_circular_shift = draw.random();
            let config = MaskConfig { probability, ratio: [low, high], style, random_circular_shift };
            let masks = batch_masks(crops, (h, w), &config, draw);
            let case = format!("seed {seed}: {crops} crops of {h}x{w}, {config:?}");
            assert_eq!(masks.mask.len(), crops * h * w, "{case}");
            assert!(masks.indices.is_sorted_by(|a, b| a < b), "{case}");
            assert_eq!(masks.indices.len(), masks.mask.iter().filter(|&&m| m).count(), "{case}");
            assert!(masks.indices.iter().all(|&i| masks.mask[i]), "{case}");
            let counts = counts(&masks);
            assert_eq!(masks.weights.len(), masks.indices.len(), "{case}");
            for (&i, &weight) in masks.indices.iter().zip(&masks.weights) {
                assert_eq!(weight, 1.0 / counts[i / (h * w)] as f32, "{case}");
            }
            assert!(counts.iter().all(|&n| n as f64 <= high * (h * w) as f64 + 1e-3), "{case}");
        }
    }
}
