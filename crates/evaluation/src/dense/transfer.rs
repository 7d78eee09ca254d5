//! What correspondence between two images is made of: the most similar places by cosine of patch tokens, and points between
//! places.
//!
//! Points are in patches: the place in row `i` and column `j` covers `[j, j+1) × [i, i+1)`, its middle is at `(j + ½, i + ½)`.

use std::collections::BTreeMap;

use dinoxide_random::{Purpose, stream};
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::TokenGrid;
use super::propagation::dot;
use crate::EvaluationError;
use crate::selection::draws;

/// Which images are sources of which others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PairConfig {
    /// Images whose first folders are the same, this many, are paired; with 0, all are.
    pub folders: usize,
    /// Only images whose next folder differs: other objects of a class.
    pub across: bool,
    /// Sources of each group of images, drawn at random; every other image of the group is a target of each.
    pub sources: usize,
    /// Seed of the draw.
    pub seed: u64,
}

impl Default for PairConfig {
    fn default() -> Self {
        Self { folders: 1, across: false, sources: 5, seed: 0 }
    }
}

/// Images that are paired with each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// The folders that they have in common.
    pub name: String,
    /// Images that something is carried from.
    pub sources: Vec<usize>,
    /// Each image that something is carried to, with the sources it comes from: positions in `sources`.
    pub targets: Vec<(usize, Vec<usize>)>,
}

impl PairConfig {
    /// The groups of images with these names, `/` between folders.
    ///
    /// # Errors
    /// A name with too few folders, no source, or no pair.
    pub fn groups(&self, ids: &[String]) -> Result<Vec<Group>, EvaluationError> {
        let setting = |key, value: String, expected| {
            Err(EvaluationError::Setting { task: "correspondence", key, value, expected })
        };
        if self.sources == 0 {
            return setting("sources", "0".into(), "at least 1");
        }
        let needed = self.folders + usize::from(self.across);
        if let Some(id) = ids.iter().find(|id| id.matches('/').count() < needed) {
            let value = format!("{} with `{id}` in {} folder(s)", self.folders, id.matches('/').count());
            return setting(
                "instance_depth",
                value,
                "at most the number of folders that images lie in, and below it with `across`",
            );
        }
        let first = |id: &str, count: usize| id.split('/').take(count).collect::<Vec<_>>().join("/");
        let mut members: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, id) in ids.iter().enumerate() {
            members.entry(first(id, self.folders)).or_default().push(index);
        }
        let object = |index: usize| first(&ids[index], needed);
        let groups: Vec<Group> = members
            .into_iter()
            .enumerate()
            .map(|(number, (name, members))| {
                let mut sources = members.clone();
                sources.shuffle(&mut stream(self.seed, Purpose::Evaluation, draws::PAIRS, number as u64));
                sources.truncate(self.sources);
                let allowed = |target: usize, source: usize| {
                    source != target && !(self.across && object(source) == object(target))
                };
                let of = |target: usize| -> Vec<usize> {
                    (0..sources.len()).filter(|&at| allowed(target, sources[at])).collect()
                };
                let targets: Vec<(usize, Vec<usize>)> =
                    members.iter().map(|&target| (target, of(target))).filter(|(_, of)| !of.is_empty()).collect();
                Group { name, sources, targets }
            })
            .filter(|group| !group.targets.is_empty())
            .collect();
        if groups.is_empty() {
            let value = format!("{} for {} image(s)", self.folders, ids.len());
            return setting("instance_depth", value, "such that two images have the same folders up to there");
        }
        Ok(groups)
    }
}

/// For each place of `target`, the place of `source` whose token is most similar; tokens are of unit length.
pub(super) fn nearest(target: &TokenGrid, source: &TokenGrid) -> Vec<usize> {
    target.values.par_chunks(target.dim).map(|token| highest(&similarities(token, source))).collect()
}

/// Cosine of a token with each place; all are of unit length.
pub(super) fn similarities(token: &[f32], grid: &TokenGrid) -> Vec<f32> {
    grid.values.chunks_exact(grid.dim).map(|other| dot(token, other)).collect()
}

/// The place of the highest value, the first of several.
fn highest(values: &[f32]) -> usize {
    let mut best = 0;
    for (place, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = place;
        }
    }
    best
}

/// The token at a point, bilinear between middles of places and constant beyond the outermost, of unit length.
pub(super) fn token_at(grid: &TokenGrid, [x, y]: [f64; 2]) -> Vec<f32> {
    let along = |at: f64, count: usize| {
        let at = (at - 0.5).clamp(0.0, (count - 1) as f64);
        (at.floor() as usize, (at.floor() as usize + 1).min(count - 1), (at - at.floor()) as f32)
    };
    let ((left, right, across), (top, bottom, down)) = (along(x, grid.columns), along(y, grid.rows));
    let token = |row: usize, column: usize| &grid.values[(row * grid.columns + column) * grid.dim..][..grid.dim];
    let mut out = vec![0.0; grid.dim];
    for (token, weight) in [
        (token(top, left), (1.0 - across) * (1.0 - down)),
        (token(top, right), across * (1.0 - down)),
        (token(bottom, left), (1.0 - across) * down),
        (token(bottom, right), across * down),
    ] {
        out.iter_mut().zip(token).for_each(|(out, value)| *out += weight * value);
    }
    let norm = dot(&out, &out).sqrt().max(1e-12);
    out.iter_mut().for_each(|value| *value /= norm);
    out
}

/// The point that is most similar: the mean of the places at most `window` from the highest along each axis, weighted by
/// `exp(s/T)` (a soft argmax, which may lie between middles of places).
pub(super) fn locate(
    similarities: &[f32],
    (rows, columns): (usize, usize),
    window: usize,
    temperature: f32,
) -> [f64; 2] {
    let best = highest(similarities);
    let around = |at: usize, count: usize| at.saturating_sub(window)..(at + window + 1).min(count);
    let (mut total, mut x, mut y) = (0.0, 0.0, 0.0);
    for row in around(best / columns, rows) {
        for column in around(best % columns, columns) {
            let weight = f64::from((similarities[row * columns + column] - similarities[best]) / temperature).exp();
            total += weight;
            x += weight * (column as f64 + 0.5);
            y += weight * (row as f64 + 0.5);
        }
    }
    [x / total, y / total]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::gaussian;

    pub(super) fn grid(rows: usize, columns: usize, dim: usize, seed: u64) -> TokenGrid {
        let values = gaussian(rows * columns, dim, seed).l2_normalized().values().to_vec();
        TokenGrid { rows, columns, dim, values }
    }

    #[test]
    fn the_nearest_places_equal_a_loop_in_double_precision() {
        let (target, source) = (grid(3, 5, 21, 1), grid(4, 2, 21, 2));
        let found = nearest(&target, &source);
        assert_eq!(found.len(), 15);
        for (place, found) in found.iter().enumerate() {
            let cosine = |other: usize| -> f64 {
                (0..21)
                    .map(|d| f64::from(target.values[place * 21 + d]) * f64::from(source.values[other * 21 + d]))
                    .sum()
            };
            let best = (0..8).max_by(|&a, &b| cosine(a).total_cmp(&cosine(b))).unwrap();
            assert_eq!(*found, best, "place {place}");
        }
    }

    #[test]
    fn tokens_between_places_are_their_mean() {
        let grid = grid(2, 3, 7, 5);
        let token = |row: usize, column: usize| grid.values[(row * 3 + column) * 7..][..7].to_vec();
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(near(&token_at(&grid, [1.5, 0.5]), &token(0, 1)));
        // Outside the outermost middles: theirs.
        assert!(near(&token_at(&grid, [0.1, 2.0]), &token(1, 0)));
        let (a, b) = (token(0, 1), token(1, 1));
        let mean: Vec<f32> = a.iter().zip(&b).map(|(a, b)| 0.25 * a + 0.75 * b).collect();
        let norm = mean.iter().map(|v| v * v).sum::<f32>().sqrt();
        let expected: Vec<f32> = mean.iter().map(|v| v / norm).collect();
        assert!(near(&token_at(&grid, [1.5, 1.25]), &expected));
    }

    #[test]
    fn a_soft_argmax_by_hand() {
        let mut map = [0.0; 12];
        map[6] = 1.0;
        assert_eq!(locate(&map, (3, 4), 0, 0.1), [2.5, 1.5]);
        // Its neighbour to the right half as likely: a third of a place towards it.
        map[7] = 1.0 - 0.1 * 2.0f32.ln();
        let far = |map: &[f32]| locate(map, (3, 4), 1, 0.1);
        let [x, y] = far(&map);
        assert!((x - (2.5 + 1.0 / 3.0)).abs() < 1e-3 && (y - 1.5).abs() < 1e-3, "{x} {y}");
        // What lies outside the window has no say.
        map[0] = 0.99;
        assert_eq!(far(&map), [x, y]);
        // At the border the window is cut.
        assert_eq!(locate(&[3.0, 3.0, 3.0], (1, 3), 1, 1.0), [1.0, 0.5]);
    }

    #[test]
    fn pairs_are_within_folders_and_across_the_next() {
        let ids: Vec<String> =
            ["cup/1/a", "cup/1/b", "cup/2/a", "cup/2/b", "pear/1/a", "pear/1/b", "dog/1/a"].map(str::to_owned).to_vec();
        let pairs = |config: &PairConfig| -> Vec<(usize, usize)> {
            let groups = config.groups(&ids).unwrap();
            let of = |group: &Group| {
                let pairs = group.targets.iter().flat_map(|(target, from)| from.iter().map(move |at| (*at, *target)));
                pairs.map(|(at, target)| (group.sources[at], target)).collect::<Vec<_>>()
            };
            let mut pairs: Vec<_> = groups.iter().flat_map(of).collect();
            pairs.sort_unstable();
            pairs
        };
        let all = PairConfig { folders: 2, sources: 9, ..Default::default() };
        assert_eq!(pairs(&all), [(0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)]);
        let across = PairConfig { across: true, folders: 1, sources: 9, ..Default::default() };
        assert_eq!(pairs(&across), [(0, 2), (0, 3), (1, 2), (1, 3), (2, 0), (2, 1), (3, 0), (3, 1)]);
        assert_eq!(pairs(&PairConfig { folders: 0, sources: 1, ..all.clone() }).len(), 6);
        assert_eq!(pairs(&PairConfig { folders: 0, sources: 99, ..all.clone() }).len(), 42);
        let drawn = |seed| PairConfig { folders: 0, sources: 2, seed, ..all.clone() }.groups(&ids).unwrap();
        assert_eq!(drawn(1), drawn(1));
        assert!((2..9).any(|seed| drawn(seed) != drawn(1)));
        let refused = |config: &PairConfig| config.groups(&ids).unwrap_err().to_string();
        assert!(refused(&PairConfig { sources: 0, ..all.clone() }).contains("`sources` is 0"));
        let deep = refused(&PairConfig { folders: 2, across: true, ..all.clone() });
        assert!(deep.contains("`instance_depth` is 2 with `cup/1/a` in 2 folder(s)"), "{deep}");
        let alone = all.groups(&ids[6..]).unwrap_err().to_string();
        assert!(alone.contains("`instance_depth` is 2 for 1 image(s)"), "{alone}");
    }
}
