//! Label propagation through a video: the masks of the first frame are carried on by the similarity of patch tokens.
//!
//! The protocol of DINO (§4.2.2) on DAVIS, after Jabri et al. 2020: the tokens of a frame take the labels of the `top_k`
//! most similar tokens among the first frame and the `context` frames before, within a square of `radius` patches, weighted
//! by `exp(cos/T)`. Labels stay soft from frame to frame. Nothing is trained.

use dinoxide_augmentation::{Resizer, RgbImage};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::bilinear::Bilinear;
use super::boundary::{Mask, boundary_accuracy, region_similarity};
use super::{Encoder, TokenGrid};
use crate::EvaluationError;

/// How labels are carried on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PropagationConfig {
    /// Frames before the one at hand that labels come from, besides the first.
    pub context: usize,
    /// Patches by which a place may move from one of these frames, along each axis.
    pub radius: usize,
    /// Tokens that give their labels.
    pub top_k: usize,
    /// Temperature of their weights.
    pub temperature: f32,
}

impl Default for PropagationConfig {
    fn default() -> Self {
        Self { context: 7, radius: 12, top_k: 5, temperature: 0.1 }
    }
}

impl PropagationConfig {
    /// Checks the settings.
    ///
    /// # Errors
    /// The first that is out of range.
    pub fn check(&self) -> Result<(), EvaluationError> {
        let setting =
            |key, value: String, expected| Err(EvaluationError::Setting { task: "video", key, value, expected });
        if self.top_k == 0 {
            return setting("top_k", "0".into(), "at least 1");
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return setting("temperature", self.temperature.to_string(), "above 0 and finite");
        }
        Ok(())
    }
}

/// Tokens of a frame, of unit length, and the soft labels of its places, `[rows · columns, labels]`.
struct Labeled {
    tokens: TokenGrid,
    labels: Vec<f32>,
}

/// Carries masks through a video, frame after frame.
pub struct Propagation<'a> {
    encoder: &'a Encoder<'a>,
    config: PropagationConfig,
    labels: usize,
    first: Labeled,
    recent: std::collections::VecDeque<Labeled>,
    resizer: Resizer,
}

impl<'a> Propagation<'a> {
    /// Begins with the first frame and its mask: `0..labels` for each pixel, 0 the background.
    ///
    /// # Errors
    /// Tokens that are not finite.
    ///
    /// # Panics
    /// If the mask has another size or label.
    pub fn new(
        encoder: &'a Encoder<'a>,
        config: &PropagationConfig,
        image: &RgbImage,
        mask: &[u16],
        labels: usize,
    ) -> Result<Self, EvaluationError> {
        let (width, height) = (image.width() as usize, image.height() as usize);
        assert_eq!(mask.len(), width * height, "a mask of {width}x{height} pixels");
        let mut resizer = Resizer::default();
        let tokens = unit_tokens(encoder, image, &mut resizer)?;
        let mut soft = vec![0.0; tokens.rows * tokens.columns * labels];
        for (place, soft) in soft.chunks_exact_mut(labels).enumerate() {
            let (row, column) = (place / tokens.columns, place % tokens.columns);
            let middle = |i: usize, count: usize, length: usize| (2 * i + 1) * length / (2 * count);
            let (y, x) = (middle(row, tokens.rows, height), middle(column, tokens.columns, width));
            soft[usize::from(mask[y * width + x])] = 1.0;
        }
        let first = Labeled { tokens, labels: soft };
        let config = config.clone();
        Ok(Self { encoder, config, labels, first, recent: std::collections::VecDeque::new(), resizer })
    }

    /// The mask of the next frame.
    ///
    /// # Errors
    /// Tokens that are not finite, or a frame of another size.
    pub fn next(&mut self, image: &RgbImage) -> Result<Vec<u16>, EvaluationError> {
        let tokens = unit_tokens(self.encoder, image, &mut self.resizer)?;
        let grid = (tokens.rows, tokens.columns);
        if grid != (self.first.tokens.rows, self.first.tokens.columns) {
            let message = format!("a frame of {}x{}, the first one has another size", image.width(), image.height());
            return Err(EvaluationError::Extraction { message });
        }
        let context: Vec<&Labeled> = std::iter::once(&self.first).chain(&self.recent).collect();
        let labels = carried(&self.config, &tokens, &context, self.labels);
        let fitted = self.encoder.fitted_size(image.dimensions());
        let mask = hardened(&labels, grid, self.labels, fitted, image.dimensions());
        if self.config.context > 0 {
            if self.recent.len() == self.config.context {
                self.recent.pop_front();
            }
            self.recent.push_back(Labeled { tokens, labels });
        }
        Ok(mask)
    }
}

/// The tokens of an image, each of unit length.
pub(super) fn unit_tokens(
    encoder: &Encoder<'_>,
    image: &RgbImage,
    resizer: &mut Resizer,
) -> Result<TokenGrid, EvaluationError> {
    let mut grid = encoder.tokens(&encoder.fitted(image, resizer))?;
    for token in grid.values.chunks_exact_mut(grid.dim) {
        let norm = token.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-12);
        token.iter_mut().for_each(|v| *v /= norm);
    }
    Ok(grid)
}

/// The soft labels of a frame's places.
fn carried(config: &PropagationConfig, target: &TokenGrid, context: &[&Labeled], labels: usize) -> Vec<f32> {
    let (rows, columns, dim) = (target.rows, target.columns, target.dim);
    let mut out = vec![0.0; rows * columns * labels];
    out.par_chunks_exact_mut(labels).enumerate().for_each(|(place, out)| {
        let (row, column) = (place / columns, place % columns);
        let token = &target.values[place * dim..][..dim];
        let around = |at: usize, count: usize| at.saturating_sub(config.radius)..(at + config.radius + 1).min(count);
        // The best so far, best first: similarity, frame, place.
        let mut best: Vec<(f32, usize, usize)> = Vec::with_capacity(config.top_k + 1);
        for (frame, labeled) in context.iter().enumerate() {
            for y in around(row, rows) {
                for x in around(column, columns) {
                    let other = y * columns + x;
                    let cosine = dot(token, &labeled.tokens.values[other * dim..][..dim]);
                    if best.len() == config.top_k && best.last().is_some_and(|last| cosine <= last.0) {
                        continue;
                    }
                    let at = best.partition_point(|one| one.0 >= cosine);
                    best.insert(at, (cosine, frame, other));
                    best.truncate(config.top_k);
                }
            }
        }
        // Relative to the best, which cannot overflow.
        let weight = |cosine: f32| ((cosine - best[0].0) / config.temperature).exp();
        let total: f32 = best.iter().map(|&(cosine, ..)| weight(cosine)).sum();
        for &(cosine, frame, other) in &best {
            let share = weight(cosine) / total;
            let from = &context[frame].labels[other * labels..][..labels];
            out.iter_mut().zip(from).for_each(|(out, label)| *out += share * label);
        }
    });
    out
}

/// The inner product.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a_whole, a_rest) = a.as_chunks::<16>();
    let (b_whole, b_rest) = b.as_chunks::<16>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(lane, (a, b))| *lane += a * b);
    }
    lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// The label of each pixel: soft labels are resized to the pixels of the fitted frame, each label's are stretched to 0..1
/// over the frame, the largest wins, and the frame gets its own size by nearest neighbours.
fn hardened(
    soft: &[f32],
    grid: (usize, usize),
    labels: usize,
    fitted: (u32, u32),
    (width, height): (u32, u32),
) -> Vec<u16> {
    let fitted = (fitted.1 as usize, fitted.0 as usize);
    let resize = Bilinear::new(grid, fitted, labels);
    let rows: Vec<Vec<f32>> = resize.map(soft, <[f32]>::to_vec);
    let range: Vec<(f32, f32)> = (0..labels)
        .map(|label| {
            let values = || rows.iter().map(|pixel| pixel[label]);
            let (least, most) = (values().fold(f32::INFINITY, f32::min), values().fold(f32::NEG_INFINITY, f32::max));
            // A label that is nowhere, or everywhere the same, is left as it is.
            if most > least { (least, most - least) } else { (0.0, 1.0) }
        })
        .collect();
    let winner = |pixel: &[f32]| {
        let stretched = pixel.iter().zip(&range).map(|(value, (least, span))| (value - least) / span);
        let mut best = (0, f32::NEG_INFINITY);
        for (label, value) in stretched.enumerate() {
            if value > best.1 {
                best = (label, value);
            }
        }
        best.0 as u16
    };
    let (width, height) = (width as usize, height as usize);
    (0..height * width)
        .map(|i| {
            let nearest = |i: usize, count: usize, of: usize| (2 * i + 1) * of / (2 * count);
            let (y, x) = (nearest(i / width, height, fitted.0), nearest(i % width, width, fitted.1));
            winner(&rows[y * fitted.1 + x])
        })
        .collect()
}

/// How well the masks of a video fit, in percent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ObjectScores {
    /// Mean region similarity over the frames.
    pub j_mean: f64,
    /// Share of the frames with a region similarity above 0.5.
    pub j_recall: f64,
    /// Mean boundary accuracy over the frames.
    pub f_mean: f64,
    /// Share of the frames with a boundary accuracy above 0.5.
    pub f_recall: f64,
}

impl ObjectScores {
    /// Mean of `j_mean` and `f_mean`.
    pub fn j_and_f(&self) -> f64 {
        (self.j_mean + self.f_mean) / 2.0
    }

    /// The mean over objects.
    pub fn mean(of: &[Self]) -> Self {
        let mean = |value: fn(&Self) -> f64| of.iter().map(value).sum::<f64>() / of.len() as f64;
        Self {
            j_mean: mean(|one| one.j_mean),
            j_recall: mean(|one| one.j_recall),
            f_mean: mean(|one| one.f_mean),
            f_recall: mean(|one| one.f_recall),
        }
    }
}

/// Scores the object `label` over frames of `(predicted, truth)` masks. Pixels of the label `void` in the truth count for
/// neither. As in DAVIS, the caller leaves out the first frame, which is given, and the last.
///
/// # Errors
/// If there is no frame.
pub fn score_object(
    frames: &[(&[u16], &[u16])],
    width: usize,
    label: u16,
    void: Option<u16>,
) -> Result<ObjectScores, EvaluationError> {
    if frames.is_empty() {
        return Err(EvaluationError::NoPixels { task: "video" });
    }
    let scores: Vec<(f64, f64)> = frames
        .par_iter()
        .map(|(predicted, truth)| {
            let is = |mask: &[u16]| -> Vec<bool> {
                mask.iter().zip(*truth).map(|(&own, &truth)| own == label && Some(truth) != void).collect()
            };
            let (predicted, truth) = (is(predicted), is(truth));
            let (predicted, truth) = (Mask { pixels: &predicted, width }, Mask { pixels: &truth, width });
            (region_similarity(predicted, truth), boundary_accuracy(predicted, truth))
        })
        .collect();
    let mean = |value: &dyn Fn(&(f64, f64)) -> f64| 100.0 * scores.iter().map(value).sum::<f64>() / scores.len() as f64;
    Ok(ObjectScores {
        j_mean: mean(&|s| s.0),
        j_recall: mean(&|s| f64::from(u8::from(s.0 > 0.5))),
        f_mean: mean(&|s| s.1),
        f_recall: mean(&|s| f64::from(u8::from(s.1 > 0.5))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::encoder::tests::{backbone, config};
    use burn::tensor::Device;

    fn grid(rows: usize, columns: usize, phase: f32) -> TokenGrid {
        let dim = 19;
        let mut values: Vec<f32> = (0..rows * columns * dim).map(|i| ((i * i) as f32 * 0.13 + phase).sin()).collect();
        for token in values.chunks_exact_mut(dim) {
            let norm = token.iter().map(|v| v * v).sum::<f32>().sqrt();
            token.iter_mut().for_each(|v| *v /= norm);
        }
        TokenGrid { rows, columns, dim, values }
    }

    #[test]
    fn labels_are_carried_as_by_a_whole_affinity_matrix() {
        // Every pair of places, masked, sorted, cut off at the k-th, exponentiated and normalised, in double precision.
        let (rows, columns, labels) = (5, 6, 3);
        let target = grid(rows, columns, 0.3);
        let frames: Vec<Labeled> = (0..3)
            .map(|i| Labeled {
                tokens: grid(rows, columns, 1.0 + i as f32),
                labels: (0..rows * columns * labels).map(|j| ((j * 7 + i) % 11) as f32 / 11.0).collect(),
            })
            .collect();
        let context: Vec<&Labeled> = frames.iter().collect();
        let config = PropagationConfig { context: 2, radius: 2, top_k: 4, temperature: 0.2 };
        let found = carried(&config, &target, &context, labels);
        let mut seen = 0;
        for place in 0..rows * columns {
            let mut all: Vec<(f64, usize, usize)> = Vec::new();
            for (f, frame) in frames.iter().enumerate() {
                for other in 0..rows * columns {
                    let near = |a: usize, b: usize| a.abs_diff(b) <= 2;
                    if near(place / columns, other / columns) && near(place % columns, other % columns) {
                        let pairs =
                            target.values[place * 19..][..19].iter().zip(&frame.tokens.values[other * 19..][..19]);
                        let cosine: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        all.push(((cosine / 0.2).exp(), f, other));
                    }
                }
            }
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            all.truncate(4);
            let total: f64 = all.iter().map(|one| one.0).sum();
            for label in 0..labels {
                let expected: f64 = all
                    .iter()
                    .map(|&(w, f, other)| w / total * f64::from(frames[f].labels[other * labels + label]))
                    .sum();
                assert!((f64::from(found[place * labels + label]) - expected).abs() < 1e-5);
                seen += 1;
            }
        }
        assert_eq!(seen, 90);
    }

    #[test]
    fn a_still_video_keeps_its_mask() {
        let backbone = backbone();
        let encoder = Encoder::new(&backbone, &config(64), &Device::flex()).unwrap();
        let image = crate::dense::encoder::tests::image(40, 28);
        // Two objects in whole patches.
        let mask: Vec<u16> = (0..28 * 40)
            .map(|i| match (i % 40 / 4, i / 40 / 4) {
                (1..=3, 1..=4) => 1,
                (6..=8, 2..=5) => 2,
                _ => 0,
            })
            .collect();
        let config = PropagationConfig { context: 2, radius: 3, top_k: 1, temperature: 0.1 };
        let mut video = Propagation::new(&encoder, &config, &image, &mask, 3).unwrap();
        for _ in 0..4 {
            let found = video.next(&image).unwrap();
            let frames = [(&found[..], &mask[..])];
            for label in [1, 2] {
                let scores = score_object(&frames, 40, label, None).unwrap();
                assert!(scores.j_mean > 85.0 && scores.f_mean > 85.0, "{label}: {scores:?}");
            }
        }
        let other = crate::dense::encoder::tests::image(40, 24);
        assert!(video.next(&other).unwrap_err().to_string().contains("a frame of 40x24"));
    }

    #[test]
    fn scores_are_means_over_frames_and_objects_and_void_is_left_out() {
        let truth: Vec<u16> = (0..100)
            .map(|i| {
                if i < 40 {
                    1
                } else if i < 50 {
                    9
                } else {
                    0
                }
            })
            .collect();
        let half: Vec<u16> = (0..100).map(|i| u16::from(i < 20 || (40..50).contains(&i))).collect();
        let of = score_object(&[(&truth, &truth), (&half, &truth)], 10, 1, Some(9)).unwrap();
        // 40 of 40 pixels, then 20 of 40; the ten void ones are not counted against the second.
        assert!((of.j_mean - 75.0).abs() < 1e-9 && (of.j_recall - 50.0).abs() < 1e-9, "{of:?}");
        let mean = ObjectScores::mean(&[of.clone(), ObjectScores::default()]);
        assert!((mean.j_mean - 37.5).abs() < 1e-9 && (mean.j_and_f() - (37.5 + of.f_mean / 2.0) / 2.0).abs() < 1e-9);
        assert!(score_object(&[], 10, 1, None).is_err());
        assert!(PropagationConfig { top_k: 0, ..Default::default() }.check().is_err());
        assert!(PropagationConfig { temperature: 0.0, ..Default::default() }.check().is_err());
    }
}
