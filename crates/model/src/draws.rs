//! The random draws of one training forward, made by the caller.
//!
//! The model draws nothing itself: stochastic depth and RoPE augmentation come in as values, so a forward is a function
//! of its arguments and a resumed run repeats it.

use rand::{Rng, RngExt, seq::SliceRandom};

use crate::{
    ConvNextConfig,
    config::{DropPathKind, VitConfig},
    rope::RopeDraw,
};

/// Stochastic depth of one residual branch (Huang et al. 2016; the subset form is DINOv2 §5).
#[derive(Clone, Debug, PartialEq)]
pub enum BranchDraw {
    /// The branch runs on every sample.
    Keep,
    /// It runs on these samples of the batch and is scaled by `batch / subset`, which keeps its expectation.
    Subset(Vec<usize>),
    /// Each sample's output is multiplied by its entry: 0, for which it need not run, or a factor that is the same for all the
    /// others (1 / keep probability).
    Scale(Vec<f32>),
}

impl BranchDraw {
    /// The subset form at a drop rate: of a random order of the batch, the first `max(⌊batch·(1 − rate)⌋, 1)` run.
    pub fn subset(rate: f64, mut order: Vec<usize>) -> Self {
        let kept = ((order.len() as f64 * (1.0 - rate)) as usize).max(1);
        order.truncate(kept);
        Self::Subset(order)
    }

    /// The per-sample form at a drop rate: a sample is dropped where its draw, uniform in [0, 1), is less than the rate.
    pub fn per_sample(rate: f64, uniform: impl IntoIterator<Item = f64>) -> Self {
        let scale = (1.0 / (1.0 - rate)) as f32;
        Self::Scale(uniform.into_iter().map(|u| if u < rate { 0.0 } else { scale }).collect())
    }

    /// The samples of a batch that the branch runs on, in ascending order, and the factor of its output there; `None` if it
    /// runs on all as it is.
    ///
    /// # Panics
    /// If the factors of a [`Scale`](Self::Scale) differ, or are not as many as samples.
    pub(crate) fn kept(&self, batch: usize) -> Option<(Vec<usize>, f64)> {
        match self {
            Self::Keep => None,
            Self::Subset(kept) => {
                let mut kept = kept.clone();
                kept.sort_unstable();
                let factor = batch as f64 / kept.len() as f64;
                Some((kept, factor))
            }
            Self::Scale(factors) => {
                assert_eq!(factors.len(), batch, "stochastic depth: a factor for each sample");
                let kept: Vec<usize> = (0..batch).filter(|&sample| factors[sample] != 0.0).collect();
                let factor = kept.first().map_or(1.0, |&sample| factors[sample]);
                assert!(
                    kept.iter().all(|&sample| factors[sample] == factor),
                    "stochastic depth: one factor for all samples that are kept"
                );
                Some((kept, f64::from(factor)))
            }
        }
    }

    /// The draw of a list of tokens, each a sample of its own: every token has what its sample of the `batch` drew.
    pub(crate) fn of_tokens(&self, samples: impl Iterator<Item = usize>, batch: usize) -> Self {
        match self {
            Self::Keep => Self::Keep,
            Self::Subset(kept) => {
                let scale = (batch as f64 / kept.len() as f64) as f32;
                Self::Scale(samples.map(|sample| if kept.contains(&sample) { scale } else { 0.0 }).collect())
            }
            Self::Scale(factors) => Self::Scale(samples.map(|sample| factors[sample]).collect()),
        }
    }
}

/// The draws of one crop group in one forward.
#[derive(Clone, Debug, PartialEq)]
pub struct StochasticDraws {
    /// The residual branches in the order in which they are computed: two in a block of a ViT, attention and feed-forward;
    /// one in a block of a ConvNeXt.
    pub branches: Vec<BranchDraw>,
    /// Coordinate augmentation of each block; empty without RoPE.
    pub rope: Vec<RopeDraw>,
}

impl StochasticDraws {
    /// Draws for a vision transformer on a batch of `batch` crops.
    pub fn draw(config: &VitConfig, batch: usize, rng: &mut impl Rng) -> Self {
        let mut branches = Vec::with_capacity(2 * config.depth);
        let mut rope = Vec::new();
        for block in 0..config.depth {
            let rate = rate(config.drop_path, config.drop_path_rate, block, config.depth);
            branches.extend([(); 2].map(|()| branch(config.drop_path, rate, batch, rng)));
            if let Some(geometry) = &config.rope {
                rope.push(RopeDraw::draw(geometry, rng));
            }
        }
        Self { branches, rope }
    }

    /// Draws for a ConvNeXt on a batch of `batch` crops.
    pub fn draw_convnext(config: &ConvNextConfig, batch: usize, rng: &mut impl Rng) -> Self {
        let blocks = config.depths.iter().sum();
        let branches = (0..blocks).map(|block| {
            let rate = rate(config.drop_path, config.drop_path_rate, block, blocks);
            branch(config.drop_path, rate, batch, rng)
        });
        Self { branches: branches.collect(), rope: Vec::new() }
    }
}

/// The drop rate of one of `blocks` blocks.
fn rate(kind: DropPathKind, rate: f64, block: usize, blocks: usize) -> f64 {
    match kind {
        DropPathKind::Subset => rate,
        DropPathKind::PerSample => rate * block as f64 / (blocks.max(2) - 1) as f64,
    }
}

fn branch(kind: DropPathKind, rate: f64, batch: usize, rng: &mut impl Rng) -> BranchDraw {
    if rate == 0.0 {
        return BranchDraw::Keep;
    }
    match kind {
        // The references round down and keep one at least, which turns a rate of 0.1 into 0.5 where two crops make a
        // micro-batch, and into 0 where one does. Rounded at random, and drawn for each sample where a subset would be empty,
        // the rate is right on average however a batch is divided.
        DropPathKind::Subset if batch as f64 * (1.0 - rate) >= 1.0 => {
            let mut order: Vec<usize> = (0..batch).collect();
            order.shuffle(rng);
            let kept = batch as f64 * (1.0 - rate);
            let up = usize::from(rng.random::<f64>() < kept.fract());
            order.truncate(kept as usize + up);
            BranchDraw::Subset(order)
        }
        _ => BranchDraw::per_sample(rate, (0..batch).map(|_| rng.random())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dinoxide_random::{Purpose, stream};

    #[test]
    fn a_subset_is_as_large_on_average_as_the_rate_says_however_small_the_batch() {
        let mut rng = stream(3, Purpose::Forward, 0, 0);
        let mut cases = 0;
        for (batch, rate) in [(1, 0.3), (2, 0.6), (2, 0.1), (5, 0.3), (7, 0.9)] {
            let draws = 4000;
            let (mut samples, mut scales) = (0, 0.0);
            for _ in 0..draws {
                let (kept, factor) = branch(DropPathKind::Subset, rate, batch, &mut rng).kept(batch).expect("a draw");
                samples += kept.len();
                scales += factor * kept.len() as f64;
            }
            let share = samples as f64 / (draws * batch) as f64;
            // The mean of what a sample's branch is multiplied by.
            let scale = scales / (draws * batch) as f64;
            assert!((share - (1.0 - rate)).abs() < 0.02, "{batch} {rate}: {share} are kept");
            assert!((scale - 1.0).abs() < 0.1, "{batch} {rate}: {scale}");
            cases += 1;
        }
        assert_eq!(cases, 5);
    }
}
