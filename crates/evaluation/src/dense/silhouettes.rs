//! Silhouettes carried from one image to another by patch tokens: whether a token says which part of an object it is of,
//! and not only that it is of one. Nothing is trained.
//!
//! A place of the target takes the label of the most similar place of the source: the share of figure in its patch. These are
//! resized to the target's pixels, and the figure is where they exceed one half. The score of a target is the mean over its
//! sources of the figure's intersection over union.

use dinoxide_augmentation::Resizer;
use dinoxide_data::{AnnotatedSource, Rejected};
use serde::{Deserialize, Serialize};

use super::bilinear::Bilinear;
use super::foreground::iou;
use super::propagation::unit_tokens;
use super::segmentation::{Classes, Ids};
use super::transfer::{Group, nearest};
use super::{Encoder, TokenGrid};
use crate::EvaluationError;
use crate::bootstrap::{Interval, mean_intervals};

/// Scores of the images of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupScore {
    /// The folders that the images have in common.
    pub group: String,
    /// Mean over its targets, or pairs, in percent.
    pub score: f64,
    /// Targets, or pairs.
    pub targets: usize,
}

/// Mean intersection over union of the figure, in percent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SilhouetteScores {
    /// Of the silhouettes that were carried.
    pub iou: f64,
    /// Over other targets.
    pub interval: Interval,
    /// Of the sources' silhouettes left where they are.
    pub still: f64,
    /// Of calling everything figure.
    pub everything: f64,
    /// Targets.
    pub targets: usize,
    /// Pairs of source and target.
    pub pairs: usize,
    /// Each group.
    pub by_group: Vec<GroupScore>,
}

/// What something is carried from.
struct Carried {
    tokens: TokenGrid,
    /// The share of figure in each place's patch.
    shares: Vec<f32>,
    labels: Vec<u32>,
    size: (u32, u32),
}

/// Carries silhouettes from the sources of each group to its targets. In masks, 0 is ground, `void` is not scored and
/// everything else is figure. Images that cannot be read are left out and listed.
///
/// `progress` is called with the number of images seen, and of how many.
///
/// # Errors
/// Masks that do not fit, or no pair that can be read.
pub fn silhouettes(
    encoder: &Encoder<'_>,
    images: &AnnotatedSource,
    groups: &[Group],
    void: u32,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(SilhouetteScores, Vec<Rejected>), EvaluationError> {
    let mut reader = Reader { encoder, images, void, resizer: Resizer::default(), rejected: Vec::new() };
    let all = groups.iter().map(|group| group.sources.len() + group.targets.len()).sum();
    let mut done = 0;
    // Of each target: carried, left where it is, everything.
    let mut values: Vec<f32> = Vec::new();
    let (mut by_group, mut pairs) = (Vec::new(), 0);
    for group in groups {
        let mut sources = Vec::new();
        for &index in &group.sources {
            sources.push(reader.read(index)?);
            done += 1;
            progress(done, all);
        }
        let from = values.len();
        for (target, of) in &group.targets {
            done += 1;
            progress(done, all);
            let of: Vec<&Carried> = of.iter().filter_map(|&at| sources[at].as_ref()).collect();
            if of.is_empty() {
                continue;
            }
            let Some(target) = reader.read(*target)? else { continue };
            let (mut carried, mut still) = (0.0, 0.0);
            for source in &of {
                carried += iou(&transferred(source, &target), &target.labels);
                still += iou(&left_in_place(source, target.size), &target.labels);
            }
            let everything = iou(&vec![true; target.labels.len()], &target.labels);
            let count = of.len() as f64;
            values.extend([carried / count, still / count, everything].map(|score| 100.0 * score as f32));
            pairs += of.len();
        }
        let own = &values[from..];
        if !own.is_empty() {
            let targets = own.len() / 3;
            by_group.push(GroupScore { group: group.name.clone(), score: mean(own, 0), targets });
        }
    }
    if values.is_empty() {
        return Err(EvaluationError::NothingReadable { rejected: reader.rejected });
    }
    let scores = SilhouetteScores {
        iou: mean(&values, 0),
        interval: mean_intervals(&values, 3)[0],
        still: mean(&values, 1),
        everything: mean(&values, 2),
        targets: values.len() / 3,
        pairs,
        by_group,
    };
    Ok((scores, reader.rejected))
}

/// The mean of a column of `[targets, 3]`.
fn mean(values: &[f32], column: usize) -> f64 {
    let targets = values.len() / 3;
    values.iter().skip(column).step_by(3).map(|&value| f64::from(value)).sum::<f64>() / targets as f64
}

/// Reads images, and lists once each that cannot be read.
struct Reader<'a> {
    encoder: &'a Encoder<'a>,
    images: &'a AnnotatedSource,
    void: u32,
    resizer: Resizer,
    rejected: Vec<Rejected>,
}

impl Reader<'_> {
    fn read(&mut self, index: usize) -> Result<Option<Carried>, EvaluationError> {
        let mut reject = |rejected: Rejected| {
            if !self.rejected.iter().any(|known| known.index == rejected.index) {
                self.rejected.push(rejected);
            }
            Ok(None)
        };
        let image = match self.images.image(index) {
            Ok(image) => image,
            Err(e) => return reject(Rejected { index, id: e.id, reason: e.reason.to_string() }),
        };
        let classes = Classes { count: 2, void: self.void, ids: Ids::FigureGround };
        let labels = match classes.read(self.images, index, image.dimensions())? {
            Ok(labels) => labels,
            Err(why) => return reject(why),
        };
        let tokens = unit_tokens(self.encoder, &image, &mut self.resizer)?;
        let shares = shares_of_figure(&labels, image.dimensions(), (tokens.rows, tokens.columns));
        Ok(Some(Carried { tokens, shares, labels, size: image.dimensions() }))
    }
}

/// The share of pixels of label 1 in each patch. A pixel belongs to the patch that its centre lies in.
fn shares_of_figure(labels: &[u32], (width, height): (u32, u32), (rows, columns): (usize, usize)) -> Vec<f32> {
    let (width, height) = (width as usize, height as usize);
    let (mut figure, mut all) = (vec![0.0f32; rows * columns], vec![0.0f32; rows * columns]);
    for (at, &label) in labels.iter().enumerate() {
        let place = |i: usize, count: usize, length: usize| (2 * i + 1) * count / (2 * length);
        let patch = place(at / width, rows, height) * columns + place(at % width, columns, width);
        all[patch] += 1.0;
        figure[patch] += if label == 1 { 1.0 } else { 0.0 };
    }
    // Patches of enlarged images may have no pixel's centre.
    figure.iter().zip(&all).map(|(figure, all)| figure / all.max(1.0)).collect()
}

/// The target's figure by its nearest places in the source.
fn transferred(source: &Carried, target: &Carried) -> Vec<bool> {
    let labels: Vec<f32> =
        nearest(&target.tokens, &source.tokens).into_iter().map(|place| source.shares[place]).collect();
    let (width, height) = (target.size.0 as usize, target.size.1 as usize);
    let resize = Bilinear::new((target.tokens.rows, target.tokens.columns), (height, width), 1);
    resize.map(&labels, |share| share[0] > 0.5)
}

/// The source's figure, stretched to another size.
fn left_in_place(source: &Carried, (width, height): (u32, u32)) -> Vec<bool> {
    let (width, height) = (width as usize, height as usize);
    let (from_width, from_height) = (source.size.0 as usize, source.size.1 as usize);
    let from = |i: usize, length: usize, own: usize| (2 * i + 1) * own / (2 * length);
    (0..width * height)
        .map(|at| {
            let (y, x) = (from(at / width, height, from_height), from(at % width, width, from_width));
            source.labels[y * from_width + x] == 1
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::dense::encoder::tests::{backbone, config};
    use crate::dense::transfer::PairConfig;
    use burn::tensor::Device;
    use dinoxide_augmentation::RgbImage;
    use dinoxide_data::{DecodeLimits, MapKind, Pairing};
    use dinoxide_model::Backbone;
    use image::{GrayImage, Luma};

    /// A backbone that knows no positions: patches that move by whole patches keep their tokens.
    pub(crate) fn without_positions() -> Backbone {
        let Backbone::Vit(mut vit) = backbone() else { panic!("a transformer") };
        vit.pos_embed = None;
        Backbone::Vit(vit)
    }

    /// One whose tokens hardly say anything but where they are.
    pub(crate) fn with_positions() -> Backbone {
        let Backbone::Vit(mut vit) = backbone() else { panic!("a transformer") };
        vit.pos_embed = vit.pos_embed.map(|table| table.map(|table| table.mul_scalar(1000.0)));
        Backbone::Vit(vit)
    }

    /// Images `0.png`, `1.png` … and masks, each rolled by so many patches of 4 pixels to the right and down.
    pub(crate) fn rolled(folder: &std::path::Path, moves: &[(u32, u32)]) {
        let (width, height) = (32, 24);
        let image = |x: u32, y: u32| {
            let v = (x / 2 * 37 + y / 2 * 101 + x / 4 * y / 4 * 59) % 256;
            image::Rgb([v as u8, (3 * v + x) as u8, (7 * v + y) as u8])
        };
        let mask = |x: u32, y: u32| Luma([if (8..20).contains(&x) && (4..16).contains(&y) { 200 } else { 0 }]);
        std::fs::create_dir_all(folder).unwrap();
        for (i, (right, down)) in moves.iter().enumerate() {
            let from = |x: u32, y: u32| ((x + width - 4 * right) % width, (y + height - 4 * down) % height);
            let moved = RgbImage::from_fn(width, height, |x, y| image(from(x, y).0, from(x, y).1));
            moved.save(folder.join(format!("{i}.png"))).unwrap();
            let moved = GrayImage::from_fn(width, height, |x, y| mask(from(x, y).0, from(x, y).1));
            moved.save(folder.join(format!("{i}-mask.png"))).unwrap();
        }
    }

    fn open(folder: &std::path::Path) -> AnnotatedSource {
        let pairing = Pairing { images: folder.display().to_string(), ..Pairing::default() };
        AnnotatedSource::open(&pairing, MapKind::Mask, &DecodeLimits::default()).unwrap()
    }

    fn groups(images: &AnnotatedSource) -> Vec<Group> {
        let ids: Vec<String> = (0..images.len()).map(|index| images.id(index)).collect();
        PairConfig { folders: 0, sources: 9, ..Default::default() }.groups(&ids).unwrap()
    }

    #[test]
    fn a_silhouette_that_moves_with_its_patches_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        rolled(folder.path(), &[(0, 0), (2, 1), (1, 1)]);
        let images = open(folder.path());
        let device = Device::flex();
        let (with, without) = (with_positions(), without_positions());
        let score = |backbone: &Backbone| {
            let encoder = Encoder::new(backbone, &config(64), &device).unwrap();
            let (scores, rejected) = silhouettes(&encoder, &images, &groups(&images), 255, &mut |_, _| {}).unwrap();
            assert!(rejected.is_empty());
            assert_eq!((scores.targets, scores.pairs, scores.by_group.len()), (3, 6, 1));
            scores
        };
        let found = score(&without);
        // What is lost at the corners, which are rounded between patches.
        let square: Vec<f32> = (0..48)
            .map(|at| if (2..5).contains(&(at % 8)) && (1..4).contains(&(at / 8)) { 1.0 } else { 0.0 })
            .collect();
        let rounded: Vec<bool> = Bilinear::new((6, 8), (24, 32), 1).map(&square, |share| share[0] > 0.5);
        let area = rounded.iter().filter(|inside| **inside).count();
        assert!((100..=144).contains(&area), "{area}");
        assert!((found.iou - 100.0 * area as f64 / 144.0).abs() < 1e-4, "{} {area}", found.iou);
        // Squares of 12 pixels, apart by (8, 4), (4, 4) and (4, 0).
        let apart = |dx: f64, dy: f64| {
            let both = (12.0 - dx) * (12.0 - dy);
            both / (288.0 - both)
        };
        let still = 100.0 * (apart(8.0, 4.0) + apart(4.0, 4.0) + apart(4.0, 0.0)) / 3.0;
        assert!((found.still - still).abs() < 1e-4, "{} {still}", found.still);
        assert!((found.everything - 100.0 * 144.0 / 768.0).abs() < 1e-4);
        assert!(score(&with).iou < found.iou);
    }

    #[test]
    fn shares_of_patches_by_hand_also_of_images_that_are_enlarged() {
        let labels = [1, 1, 0, 0, 1, 255, 0, 1];
        assert_eq!(shares_of_figure(&labels, (4, 2), (1, 2)), [0.75, 0.25]);
        assert_eq!(shares_of_figure(&labels, (4, 2), (1, 4)), [1.0, 0.5, 0.0, 0.5]);
        assert_eq!(shares_of_figure(&[1, 0], (2, 1), (1, 4)), [0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn a_silhouette_left_in_place_is_stretched_by_the_middles_of_pixels() {
        let tokens = TokenGrid { rows: 1, columns: 1, dim: 1, values: vec![1.0] };
        let source = Carried { tokens, shares: vec![0.0], labels: vec![1, 0, 0, 0, 0, 0, 255, 1], size: (4, 2) };
        // Columns 1 and 3 of four, and each row twice.
        let narrow = [false, false, false, false, false, true, false, true];
        assert_eq!(left_in_place(&source, (2, 4)), narrow);
        let wide = [true, true, false, false, false, false, false, false];
        assert_eq!(left_in_place(&source, (8, 2))[..8], wide);
    }

    #[test]
    fn images_that_cannot_be_read_are_left_out_and_listed_once() {
        let folder = tempfile::tempdir().unwrap();
        rolled(folder.path(), &[(0, 0), (2, 1), (1, 2)]);
        std::fs::write(folder.path().join("1.png"), "no image").unwrap();
        let images = open(folder.path());
        let backbone = without_positions();
        let encoder = Encoder::new(&backbone, &config(64), &Device::flex()).unwrap();
        let (scores, rejected) = silhouettes(&encoder, &images, &groups(&images), 255, &mut |_, _| {}).unwrap();
        assert_eq!((scores.targets, scores.pairs, rejected.len()), (2, 2, 1));
        std::fs::write(folder.path().join("0.png"), "no image").unwrap();
        let error = silhouettes(&encoder, &images, &groups(&images), 255, &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, EvaluationError::NothingReadable { ref rejected } if rejected.len() >= 2), "{error}");
    }
}
