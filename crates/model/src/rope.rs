//! Axial rotary position embedding (DINOv3 §3.2; RoPE is Su et al. 2021).
//!
//! A patch's row and column, mapped to (−1, 1), turn pairs of query and key coordinates by angles of `d/4` frequencies per
//! axis. There are no weights. In training the coordinates may be shifted and stretched, one draw per block and crop group.

use std::f64::consts::TAU;

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_kernels::RopeTable;
use rand::{Rng, RngExt};

use crate::config::{RopeConfig, RopeNormalize, RopePeriods};

/// One draw of the training-time augmentation of coordinates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeDraw {
    /// Added to the row and column coordinates.
    pub shift: [f64; 2],
    /// Multiplied with them afterwards.
    pub stretch: [f64; 2],
}

impl RopeDraw {
    /// No augmentation.
    pub const NONE: Self = Self { shift: [0.0; 2], stretch: [1.0; 2] };

    /// Shift per axis from U(−s, s), stretch per axis from exp(U(−ln j, ln j)), common stretch from exp(U(−ln r, ln r)).
    pub fn draw(config: &RopeConfig, rng: &mut impl Rng) -> Self {
        let mut within = |limit: f64| if limit > 0.0 { rng.random_range(-limit..=limit) } else { 0.0 };
        let shift = [within(config.shift), within(config.shift)];
        let jitter = [within(config.jitter.ln()).exp(), within(config.jitter.ln()).exp()];
        let rescale = within(config.rescale.ln()).exp();
        Self { shift, stretch: jitter.map(|j| j * rescale) }
    }
}

/// The rotary embedding of a backbone with heads of one width.
#[derive(Clone, Debug)]
pub struct Rope {
    config: RopeConfig,
    periods: Vec<f64>,
}

impl Rope {
    /// For heads of width `head_dim`, a multiple of 4.
    pub fn new(config: RopeConfig, head_dim: usize) -> Self {
        let count = head_dim / 4;
        let periods = (0..count)
            .map(|i| match config.periods {
                RopePeriods::Base(base) => base.powf(i as f64 / count as f64),
                RopePeriods::Range { min, max } => {
                    let exponent = if count > 1 { i as f64 / (count - 1) as f64 } else { 0.0 };
                    max * (max / min).powf(exponent - 1.0)
                }
            })
            .collect();
        Self { config, periods }
    }

    /// The periods, which weight files carry as `rope_embed.periods`.
    pub fn periods(&self) -> Vec<f32> {
        self.periods.iter().map(|&p| p as f32).collect()
    }

    /// Angles of a grid, row-major `[rows·columns, d/2]`: row-axis frequencies, then column-axis frequencies.
    fn angles(&self, (rows, columns): (usize, usize), draw: &RopeDraw) -> Vec<f64> {
        let (by_row, by_column) = match self.config.normalize {
            RopeNormalize::Separate => (rows, columns),
            RopeNormalize::Max => (rows.max(columns), rows.max(columns)),
            RopeNormalize::Min => (rows.min(columns), rows.min(columns)),
        };
        let mut angles = Vec::with_capacity(rows * columns * 2 * self.periods.len());
        for r in 0..rows {
            for c in 0..columns {
                for (axis, (at, size)) in [(r, by_row), (c, by_column)].into_iter().enumerate() {
                    let coordinate = 2.0 * (at as f64 + 0.5) / size as f64 - 1.0;
                    let coordinate = (coordinate + draw.shift[axis]) * draw.stretch[axis];
                    angles.extend(self.periods.iter().map(|period| TAU * coordinate / period));
                }
            }
        }
        angles
    }

    /// The tables of a sequence of `prefix` tokens without a position followed by the patches of `grid`.
    ///
    /// # Shapes
    /// `[prefix + rows·columns, d]`.
    pub fn table(&self, grid: (usize, usize), prefix: usize, draw: &RopeDraw, device: &Device) -> RopeTable {
        let half = 2 * self.periods.len();
        let tokens = prefix + grid.0 * grid.1;
        let mut cos = vec![1f32; prefix * 2 * half];
        let mut sin = vec![0f32; prefix * 2 * half];
        for row in self.angles(grid, draw).chunks_exact(half) {
            // Pair k is (k, k + d/2): the angles appear twice.
            for _ in 0..2 {
                cos.extend(row.iter().map(|angle| angle.cos() as f32));
                sin.extend(row.iter().map(|angle| angle.sin() as f32));
            }
        }
        let tensor = |values| Tensor::from_data(TensorData::new(values, [tokens, 2 * half]), device);
        RopeTable { cos: tensor(cos), sin: tensor(sin) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::s;

    fn config(normalize: RopeNormalize) -> RopeConfig {
        RopeConfig { periods: RopePeriods::Base(100.0), normalize, shift: 0.0, jitter: 1.0, rescale: 1.0 }
    }

    #[test]
    fn angles_of_a_two_by_two_grid_by_hand() {
        let angles = Rope::new(config(RopeNormalize::Separate), 8).angles((2, 2), &RopeDraw::NONE);
        let pi = std::f64::consts::PI;
        let expected = [[-pi, -pi / 10.0, -pi, -pi / 10.0], [-pi, -pi / 10.0, pi, pi / 10.0]].concat();
        for (angle, expected) in angles.iter().zip(&expected) {
            assert!((angle - expected).abs() < 1e-12, "{angle} is not {expected}");
        }
    }

    #[test]
    fn periods_of_the_released_head_width() {
        let periods = Rope::new(config(RopeNormalize::Separate), 64).periods();
        assert_eq!(periods.len(), 16);
        assert!((periods[1] - 1.333_521_4).abs() < 1e-6 && (periods[15] - 74.989_42).abs() < 1e-4);
    }

    #[test]
    fn prefix_tokens_are_not_turned() {
        let table = Rope::new(config(RopeNormalize::Max), 8).table((2, 3), 5, &RopeDraw::NONE, &Device::flex());
        assert_eq!(table.cos.dims(), [11, 8]);
        let cos: Vec<f32> = table.cos.slice(s![0..5]).into_data().try_to_vec().expect("f32");
        let sin: Vec<f32> = table.sin.slice(s![0..5]).into_data().try_to_vec().expect("f32");
        assert!(cos.iter().all(|&c| c == 1.0) && sin.iter().all(|&s| s == 0.0));
    }
}
