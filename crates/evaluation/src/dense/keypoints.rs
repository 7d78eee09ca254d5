//! Keypoints carried from one image to another by patch tokens, and the share that arrives (PCK). Nothing is trained.
//!
//! The token at a keypoint of the source, interpolated between patches, is compared with all places of the target; the point
//! is the soft argmax around the most similar place ([`super::transfer`]). It is right if it lies within `α` times the longer
//! side of the target's box, or of the image, from the keypoint of the same name (PCK, Yang & Ramanan 2013; for tokens of
//! frozen backbones as in Amir et al. 2021, on SPair-71k of Min et al. 2019). Points are pixels: the middle of the pixel in
//! column `x` and row `y` is `(x, y)`.

use std::collections::BTreeMap;

use dinoxide_augmentation::Resizer;
use dinoxide_data::{Rejected, Source};
use serde::{Deserialize, Serialize};

use super::propagation::unit_tokens;
use super::silhouettes::GroupScore;
use super::transfer::{Group, locate, similarities, token_at};
use super::{Encoder, TokenGrid};
use crate::EvaluationError;
use crate::bootstrap::{Interval, mean_intervals};

/// Shares of the box within which a point is right.
pub const ALPHAS: [f64; 2] = [0.1, 0.05];

/// How points are found between patches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PointConfig {
    /// Places around the most similar one that have a say in where the point is, along each axis; 0: the middle of its patch.
    pub window: usize,
    /// Temperature of their weights.
    pub temperature: f32,
}

impl Default for PointConfig {
    fn default() -> Self {
        Self { window: 1, temperature: 0.05 }
    }
}

impl PointConfig {
    /// Checks the settings.
    ///
    /// # Errors
    /// A temperature that is none.
    pub fn check(&self) -> Result<(), EvaluationError> {
        if self.temperature > 0.0 && self.temperature.is_finite() {
            return Ok(());
        }
        let (value, expected) = (self.temperature.to_string(), "above 0 and finite");
        Err(EvaluationError::Setting { task: "correspondence", key: "temperature", value, expected })
    }
}

/// What is known of an image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Points {
    /// Points by name, in pixels: column, row.
    pub named: BTreeMap<String, [f64; 2]>,
    /// The longer side of the object's box, in pixels; that of the image where there is none.
    pub extent_px: Option<f64>,
}

/// Shares of keypoints that arrive, in percent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PointScores {
    /// For each of [`ALPHAS`]: the mean over pairs of the share of their points.
    pub by_pair: Vec<f64>,
    /// Over other pairs.
    pub intervals: Vec<Interval>,
    /// For each of [`ALPHAS`]: the share of all points.
    pub by_point: Vec<f64>,
    /// `by_pair` of points left where they are, in proportion to the image.
    pub still: Vec<f64>,
    /// Pairs of source and target.
    pub pairs: usize,
    /// Pairs without a point of the same name, which are not scored.
    pub without_points: usize,
    /// Points that were carried.
    pub points: usize,
    /// PCK at the first of [`ALPHAS`] of each group, by pair.
    pub by_group: Vec<GroupScore>,
}

/// An image that was seen.
struct Seen {
    tokens: TokenGrid,
    size: (u32, u32),
}

impl Seen {
    /// A point in pixels as one in patches.
    fn to_patches(&self, [x, y]: [f64; 2]) -> [f64; 2] {
        let along = |at: f64, length: u32, count: usize| (at + 0.5) * count as f64 / f64::from(length);
        [along(x, self.size.0, self.tokens.columns), along(y, self.size.1, self.tokens.rows)]
    }

    /// A point in patches as one in pixels.
    fn to_pixels(&self, [x, y]: [f64; 2]) -> [f64; 2] {
        let along = |at: f64, length: u32, count: usize| at * f64::from(length) / count as f64 - 0.5;
        [along(x, self.size.0, self.tokens.columns), along(y, self.size.1, self.tokens.rows)]
    }
}

/// Carries keypoints from the sources of each group to its targets; `points` has an entry for each image of `images`. Images
/// that cannot be read are left out and listed.
///
/// `progress` is called with the number of images seen, and of how many.
///
/// # Errors
/// Tokens that are not finite, a point outside its image, or no pair with a point of the same name.
pub fn keypoints(
    encoder: &Encoder<'_>,
    images: &dyn Source,
    points: &[Points],
    groups: &[Group],
    config: &PointConfig,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(PointScores, Vec<Rejected>), EvaluationError> {
    let mut reader = Reader { encoder, images, points, resizer: Resizer::default(), rejected: Vec::new() };
    let all = groups.iter().map(|group| group.sources.len() + group.targets.len()).sum();
    let mut done = 0;
    let columns = 2 * ALPHAS.len();
    // Of each pair: the share of points that arrive at each α, and of those that stay.
    let mut values: Vec<f32> = Vec::new();
    let (mut right, mut carried, mut without_points) = ([0usize; ALPHAS.len()], 0, 0);
    let mut by_group = Vec::new();
    for group in groups {
        let mut sources = Vec::new();
        for &index in &group.sources {
            sources.push(reader.read(index)?);
            done += 1;
            progress(done, all);
        }
        let from = values.len();
        for (target_index, of) in &group.targets {
            done += 1;
            progress(done, all);
            let Some(target) = reader.read(*target_index)? else { continue };
            let truth = &points[*target_index];
            let extent = truth.extent_px.unwrap_or(f64::from(target.size.0.max(target.size.1)));
            for &at in of {
                let Some(source) = &sources[at] else { continue };
                let known = &points[group.sources[at]].named;
                let common: Vec<([f64; 2], [f64; 2])> =
                    known.iter().filter_map(|(name, &from)| Some((from, *truth.named.get(name)?))).collect();
                if common.is_empty() {
                    without_points += 1;
                    continue;
                }
                let mut hits = [[0usize; ALPHAS.len()]; 2];
                for &(point, expected) in &common {
                    let still = target.to_pixels(scaled(source.to_patches(point), source, &target));
                    let found = arrival(source, point, &target, config);
                    for (hits, found) in hits.iter_mut().zip([found, still]) {
                        let apart = (found[0] - expected[0]).hypot(found[1] - expected[1]);
                        hits.iter_mut()
                            .zip(ALPHAS)
                            .for_each(|(hits, alpha)| *hits += usize::from(apart <= alpha * extent));
                    }
                }
                carried += common.len();
                right.iter_mut().zip(hits[0]).for_each(|(sum, hits)| *sum += hits);
                values.extend(hits.as_flattened().iter().map(|&hits| 100.0 * hits as f32 / common.len() as f32));
            }
        }
        let own = &values[from..];
        if !own.is_empty() {
            let targets = own.len() / columns;
            by_group.push(GroupScore { group: group.name.clone(), score: means(own, columns)[0], targets });
        }
    }
    if values.is_empty() {
        if reader.rejected.len() >= images.len() {
            return Err(EvaluationError::NothingReadable { rejected: reader.rejected });
        }
        let value = format!("names of which no two images have one in common, in {without_points} pairs");
        let expected = "the same for the same part of an object";
        return Err(EvaluationError::Setting { task: "correspondence", key: "keypoints", value, expected });
    }
    let means = means(&values, columns);
    let scores = PointScores {
        by_pair: means[..ALPHAS.len()].to_vec(),
        intervals: mean_intervals(&values, columns)[..ALPHAS.len()].to_vec(),
        by_point: right.iter().map(|&hits| 100.0 * hits as f64 / carried as f64).collect(),
        still: means[ALPHAS.len()..].to_vec(),
        pairs: values.len() / columns,
        without_points,
        points: carried,
        by_group,
    };
    Ok((scores, reader.rejected))
}

/// Where a keypoint of the source arrives in the target, in pixels.
fn arrival(source: &Seen, point: [f64; 2], target: &Seen, config: &PointConfig) -> [f64; 2] {
    let token = token_at(&source.tokens, source.to_patches(point));
    let similarities = similarities(&token, &target.tokens);
    let grid = (target.tokens.rows, target.tokens.columns);
    target.to_pixels(locate(&similarities, grid, config.window, config.temperature))
}

/// A point in the source's patches at the same share of the target's.
fn scaled([x, y]: [f64; 2], source: &Seen, target: &Seen) -> [f64; 2] {
    let (from, to) = (&source.tokens, &target.tokens);
    [x * to.columns as f64 / from.columns as f64, y * to.rows as f64 / from.rows as f64]
}

/// The means of the columns.
fn means(values: &[f32], columns: usize) -> Vec<f64> {
    let rows = values.len() / columns;
    let sum = |column: usize| values.iter().skip(column).step_by(columns).map(|&value| f64::from(value)).sum::<f64>();
    (0..columns).map(|column| sum(column) / rows as f64).collect()
}

/// Reads images, and lists once each that cannot be read.
struct Reader<'a> {
    encoder: &'a Encoder<'a>,
    images: &'a dyn Source,
    points: &'a [Points],
    resizer: Resizer,
    rejected: Vec<Rejected>,
}

impl Reader<'_> {
    fn read(&mut self, index: usize) -> Result<Option<Seen>, EvaluationError> {
        let image = match self.images.read(index) {
            Ok(image) => image,
            Err(e) => {
                if !self.rejected.iter().any(|known| known.index == index) {
                    self.rejected.push(Rejected { index, id: e.id, reason: e.reason.to_string() });
                }
                return Ok(None);
            }
        };
        let (width, height) = image.dimensions();
        let inside = |[x, y]: [f64; 2]| {
            (-0.5..=f64::from(width) - 0.5).contains(&x) && (-0.5..=f64::from(height) - 0.5).contains(&y)
        };
        if let Some((name, [x, y])) = self.points[index].named.iter().find(|(_, point)| !inside(**point)) {
            let message = format!("keypoint `{name}` at column {x}, row {y} is outside the image of {width}x{height}");
            return Err(EvaluationError::Annotation { id: self.images.id(index), message });
        }
        let tokens = unit_tokens(self.encoder, &image, &mut self.resizer)?;
        Ok(Some(Seen { tokens, size: (width, height) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::encoder::tests::{backbone, config};
    use crate::dense::silhouettes::tests::{rolled, with_positions, without_positions};
    use crate::dense::transfer::PairConfig;
    use burn::tensor::Device;
    use dinoxide_data::{DecodeLimits, Subset, open};
    use std::sync::Arc;

    /// Images that are rolled by whole patches, without their masks, and points that move along.
    fn moved(folder: &std::path::Path, moves: &[(u32, u32)]) -> (Arc<dyn Source>, Vec<Points>) {
        rolled(folder, moves);
        let all = open(&folder.display().to_string(), &DecodeLimits::default()).unwrap();
        let images: Arc<dyn Source> = Arc::new(Subset::excluding(all, &["*-mask.png".to_owned()]).unwrap());
        // Middles of patches.
        let still = [("ear", [9.5, 5.5]), ("eye", [5.5, 1.5]), ("tail", [13.5, 9.5])];
        let points = moves.iter().map(|(right, down)| {
            let at = |[x, y]: [f64; 2]| [x + 4.0 * f64::from(*right), y + 4.0 * f64::from(*down)];
            Points { named: still.iter().map(|(name, p)| ((*name).to_owned(), at(*p))).collect(), extent_px: None }
        });
        (images, points.collect())
    }

    fn groups(images: &dyn Source) -> Vec<Group> {
        let ids: Vec<String> = (0..images.len()).map(|index| images.id(index)).collect();
        PairConfig { folders: 0, sources: 9, ..Default::default() }.groups(&ids).unwrap()
    }

    fn score(
        backbone: &dinoxide_model::Backbone,
        images: &dyn Source,
        points: &[Points],
        how: &PointConfig,
    ) -> PointScores {
        let encoder = Encoder::new(backbone, &config(64), &Device::flex()).unwrap();
        let (scores, rejected) = keypoints(&encoder, images, points, &groups(images), how, &mut |_, _| {}).unwrap();
        assert!(rejected.is_empty());
        scores
    }

    #[test]
    fn points_that_move_with_their_patches_all_arrive() {
        let folder = tempfile::tempdir().unwrap();
        let (images, points) = moved(folder.path(), &[(0, 0), (2, 1), (1, 3)]);
        let found = score(&without_positions(), &*images, &points, &PointConfig { window: 0, temperature: 0.1 });
        assert_eq!((found.pairs, found.points, found.without_points), (6, 18, 0));
        assert_eq!((found.by_pair, found.by_point), (vec![100.0, 100.0], vec![100.0, 100.0]));
        // They move by 8.9, 12.6 and 8.9 pixels, of 3.2 allowed.
        assert_eq!(found.still, [0.0, 0.0]);
        let with = score(&with_positions(), &*images, &points, &PointConfig { window: 0, temperature: 0.1 });
        assert!(with.by_pair[0] < 100.0, "{:?}", with.by_pair);
    }

    #[test]
    fn shares_are_counted_as_loops_over_pairs_and_points_count_them() {
        let folder = tempfile::tempdir().unwrap();
        let (images, mut points) = moved(folder.path(), &[(0, 0), (2, 1), (1, 3), (0, 1)]);
        // Boxes, a point that only some images have, one that is off by a little, and an image with others altogether.
        points[1].extent_px = Some(0.5);
        points[0].named.remove("eye");
        points[2].named.insert("tail".into(), [18.5, 20.5]);
        points[3].named = BTreeMap::from([("wing".to_owned(), [3.0, 4.0])]);
        let how = PointConfig { window: 1, temperature: 0.2 };
        let backbone = backbone();
        let found = score(&backbone, &*images, &points, &how);

        let encoder = Encoder::new(&backbone, &config(64), &Device::flex()).unwrap();
        let seen: Vec<Seen> = (0..4)
            .map(|i| {
                let image = images.read(i).unwrap();
                let tokens = unit_tokens(&encoder, &image, &mut Resizer::default()).unwrap();
                Seen { tokens, size: image.dimensions() }
            })
            .collect();
        let (mut shares, mut hits, mut all, mut without) = (vec![], 0, 0, 0);
        for s in 0..4 {
            for t in (0..4).filter(|t| *t != s) {
                let names: Vec<&String> = points[s].named.keys().filter(|n| points[t].named.contains_key(*n)).collect();
                let limit = 0.1 * if t == 1 { 0.5 } else { 32.0 };
                let near = names.iter().filter(|name| {
                    let [x, y] = arrival(&seen[s], points[s].named[**name], &seen[t], &how);
                    let [a, b] = points[t].named[**name];
                    ((x - a).powi(2) + (y - b).powi(2)).sqrt() <= limit
                });
                let near = near.count();
                if names.is_empty() {
                    without += 1;
                } else {
                    shares.push(100.0 * near as f64 / names.len() as f64);
                    hits += near;
                    all += names.len();
                }
            }
        }
        assert_eq!((found.pairs, found.points, found.without_points), (6, all, without));
        assert_eq!((all, without), (2 + 2 + 3 + 3 + 2 + 2, 6));
        let mean = shares.iter().sum::<f64>() / 6.0;
        assert!((found.by_pair[0] - mean).abs() < 1e-4, "{:?} {mean}", found.by_pair);
        assert!((found.by_point[0] - 100.0 * hits as f64 / all as f64).abs() < 1e-9);
        assert!(found.by_pair[1] <= found.by_pair[0] && found.by_pair[0] < 100.0);
        assert!((found.by_group[0].score - mean).abs() < 1e-4);
        // Half a pixel is less than the soft argmax comes near.
        points[1].extent_px = None;
        assert!(score(&backbone, &*images, &points, &how).by_pair[0] > found.by_pair[0]);
    }

    #[test]
    fn points_keep_their_place_through_sizes_that_are_no_whole_patches() {
        let seen = Seen { tokens: TokenGrid { rows: 3, columns: 5, dim: 1, values: vec![1.0; 15] }, size: (50, 21) };
        // The middle of column 4 of 50 is at 4.5, of which a patch covers 10.
        assert_eq!(seen.to_patches([4.0, 20.0]), [0.45, 20.5 / 7.0]);
        for point in [[0.0, 0.0], [49.0, 20.0], [12.25, 3.5]] {
            let back = seen.to_pixels(seen.to_patches(point));
            assert!((back[0] - point[0]).abs() < 1e-9 && (back[1] - point[1]).abs() < 1e-9, "{back:?}");
        }
        let larger = Seen { tokens: TokenGrid { rows: 6, columns: 4, dim: 1, values: vec![1.0; 24] }, size: (40, 42) };
        assert_eq!(scaled([2.5, 1.5], &seen, &larger), [2.0, 3.0]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (images, mut points) = moved(folder.path(), &[(0, 0), (1, 1)]);
        let backbone = backbone();
        let encoder = Encoder::new(&backbone, &config(64), &Device::flex()).unwrap();
        let failed = |points: &[Points]| {
            let all = keypoints(&encoder, &*images, points, &groups(&*images), &PointConfig::default(), &mut |_, _| {});
            all.unwrap_err().to_string()
        };
        points[1].named.insert("nose".into(), [32.0, 3.0]);
        let message = failed(&points);
        assert!(message.contains("keypoint `nose` at column 32, row 3 is outside the image of 32x24"), "{message}");
        points[1].named = BTreeMap::from([("nose".to_owned(), [1.0, 3.0])]);
        assert!(failed(&points).contains("no two images have one in common, in 2 pairs"));
        let error = PointConfig { temperature: f32::NAN, ..Default::default() }.check().unwrap_err();
        assert!(error.to_string().contains("`temperature` is NaN"), "{error}");
    }
}
