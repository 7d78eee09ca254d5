//! Figure and ground: whether patch tokens tell an object from what is behind it.
//!
//! Three answers, from the one that is told most to the one that is told least: a linear classifier on patch tokens; the
//! attention of CLS in the last block (DINO, §4.2.2: the smallest set of patches with 60 % of a head's attention is the
//! figure, and the best head counts); the first principal component of patch tokens, cut at a threshold (DINOv2, §7.6).
//! Which head, which side of the component and which threshold is chosen on train images. The score is the mean over val
//! images of the figure's intersection over union.

use dinoxide_augmentation::{Resizer, RgbImage};
use dinoxide_data::{AnnotatedSource, Rejected};
use dinoxide_model::{Backbone, weights::host};
use dinoxide_random::{Purpose, stream};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::bilinear::Bilinear;
use super::pca::Moments;
use super::segmentation::{Classes, Ids, SegmentationHead};
use super::{Encoder, HeadConfig};
use crate::EvaluationError;
use crate::selection::draws;

/// Attention that a figure holds.
pub const ATTENTION_MASS: f32 = 0.6;
/// Train images on which head, side and threshold are chosen, at most.
const CHOICE_IMAGES: usize = 200;
/// Thresholds tried on each side of the component.
const THRESHOLDS: usize = 40;

/// Mean intersection over union of the figure on val images, in percent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForegroundScores {
    /// Of a linear classifier on patch tokens.
    pub linear: f64,
    /// Of the attention of CLS; a ConvNeXt has none.
    pub attention: Option<AttentionChoice>,
    /// Of the first principal component of patch tokens.
    pub component: ComponentChoice,
    /// Of calling everything figure.
    pub everything: f64,
    /// Images scored.
    pub images: usize,
}

/// The attention head that was chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionChoice {
    /// Its number.
    pub head: usize,
    /// Intersection over union, in percent.
    pub iou: f64,
}

/// The side of the first component that was chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComponentChoice {
    /// Whether the figure is above the threshold.
    pub above: bool,
    /// The threshold.
    pub threshold: f32,
    /// The share of the variance that the component has.
    pub variance_share: f64,
    /// Intersection over union, in percent.
    pub iou: f64,
}

/// Divides images so that those of one folder are on one side: `(train, val)` indices, ascending. `None` if there are fewer
/// than two folders.
pub fn split_by_folder(source: &AnnotatedSource, val_share: f64, seed: u64) -> Option<(Vec<usize>, Vec<usize>)> {
    let folder = |index: usize| {
        let id = source.id(index);
        id.rsplit_once('/').map_or(String::new(), |(folder, _)| folder.to_owned())
    };
    let folders: Vec<String> = (0..source.len()).map(folder).collect();
    let mut names: Vec<&String> = folders.iter().collect();
    names.sort_unstable();
    names.dedup();
    if names.len() < 2 {
        return None;
    }
    names.shuffle(&mut stream(seed, Purpose::Evaluation, draws::GROUPS, 0));
    let count = ((names.len() as f64 * val_share).round() as usize).clamp(1, names.len() - 1);
    let held_out: std::collections::BTreeSet<&String> = names.into_iter().take(count).collect();
    Some((0..source.len()).partition(|&index| !held_out.contains(&folders[index])))
}

/// Trains and scores. Images are seen whole by attention and components, in windows by the classifier.
///
/// `progress` is called with the stage, what is done, and of how many.
///
/// # Errors
/// Masks that do not fit, or nothing that can be read.
pub fn foreground(
    encoder: &Encoder<'_>,
    train: &AnnotatedSource,
    val: &AnnotatedSource,
    void: u32,
    config: &HeadConfig,
    progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<(ForegroundScores, Vec<Rejected>), EvaluationError> {
    let classes = Classes { count: 2, void, ids: Ids::FigureGround };
    let (head, mut rejected) = SegmentationHead::train(encoder, train, classes, config, progress)?;
    let chosen = Choice::make(encoder, train, classes, progress)?;

    let (mut linear, mut attention, mut component, mut everything, mut images) = (0.0, 0.0, 0.0, 0.0, 0);
    let mut resizer = Resizer::default();
    for index in 0..val.len() {
        let image = match val.image(index) {
            Ok(image) => image,
            Err(e) => {
                rejected.push(Rejected { index, id: e.id, reason: e.reason.to_string() });
                continue;
            }
        };
        let truth = match classes.read(val, index, image.dimensions())? {
            Ok(truth) => truth,
            Err(why) => {
                rejected.push(why);
                continue;
            }
        };
        let iou = |figure: &[bool]| iou(figure, &truth);
        let predicted: Vec<bool> = head.predict(encoder, &image)?.iter().map(|&class| class == 1).collect();
        linear += iou(&predicted);
        everything += iou(&vec![true; truth.len()]);
        let fitted = encoder.fitted(&image, &mut resizer);
        component += iou(&chosen.by_component(encoder, &fitted, image.dimensions())?);
        if let Some(head) = chosen.head {
            attention += iou(&by_attention(encoder, &fitted, head, image.dimensions()));
        }
        images += 1;
        progress("scoring", index + 1, val.len());
    }
    if images == 0 {
        return Err(EvaluationError::NothingReadable { rejected });
    }
    let percent = |sum: f64| 100.0 * sum / images as f64;
    let scores = ForegroundScores {
        linear: percent(linear),
        attention: chosen.head.map(|head| AttentionChoice { head, iou: percent(attention) }),
        component: ComponentChoice {
            above: chosen.sign > 0.0,
            threshold: chosen.sign * chosen.threshold,
            variance_share: chosen.components.shares[0],
            iou: percent(component),
        },
        everything: percent(everything),
        images,
    };
    Ok((scores, rejected))
}

/// What is chosen on train images.
struct Choice {
    head: Option<usize>,
    components: super::pca::Components,
    /// The figure is where `sign · coordinate > threshold`.
    sign: f32,
    threshold: f32,
}

impl Choice {
    fn make(
        encoder: &Encoder<'_>,
        train: &AnnotatedSource,
        classes: Classes,
        progress: &mut dyn FnMut(&'static str, usize, usize),
    ) -> Result<Self, EvaluationError> {
        let count = train.len().min(CHOICE_IMAGES);
        let indices: Vec<usize> = (0..count).map(|i| i * train.len() / count).collect();
        let mut resizer = Resizer::default();
        let mut moments: Option<Moments> = None;
        // The figure's patches of each image that can be read.
        let mut truths: Vec<(usize, Vec<u32>)> = Vec::new();
        let mut of_heads: Vec<f64> = Vec::new();
        for (done, &index) in indices.iter().enumerate() {
            progress("choice", done + 1, count);
            let Ok(image) = train.image(index) else { continue };
            let Ok(labels) = classes.read(train, index, image.dimensions())? else { continue };
            let fitted = encoder.fitted(&image, &mut resizer);
            let grid = encoder.tokens(&fitted)?;
            moments.get_or_insert_with(|| Moments::new(grid.dim)).add(&grid.values);
            let truth = at_patches(&labels, image.dimensions(), (grid.rows, grid.columns));
            for (head, attention) in attention_of(encoder, &fitted).into_iter().enumerate() {
                of_heads.resize(of_heads.len().max(head + 1), 0.0);
                of_heads[head] += iou(&holding(&attention, ATTENTION_MASS), &truth);
            }
            truths.push((index, truth));
        }
        let components = moments.ok_or(EvaluationError::NoPixels { task: "foreground" })?.components(1)?;
        let mut coordinates: Vec<Vec<f32>> = Vec::new();
        for (index, _) in &truths {
            let Ok(image) = train.image(*index) else { continue };
            coordinates.push(components.project(&encoder.tokens(&encoder.fitted(&image, &mut resizer))?.values));
        }
        let mut all: Vec<f32> = coordinates.concat();
        all.sort_by(f32::total_cmp);
        let mut best = (f64::NEG_INFINITY, 1.0, 0.0);
        for sign in [1.0, -1.0] {
            for i in 0..THRESHOLDS {
                let threshold = sign * all[(2 * i + 1) * all.len() / (2 * THRESHOLDS)];
                let of = coordinates.iter().zip(&truths).map(|(coordinates, (_, truth))| {
                    let figure: Vec<bool> = coordinates.iter().map(|c| sign * c > threshold).collect();
                    iou(&figure, truth)
                });
                let score = of.sum::<f64>();
                if score > best.0 {
                    best = (score, sign, threshold);
                }
            }
        }
        let head = (0..of_heads.len()).max_by(|&a, &b| of_heads[a].total_cmp(&of_heads[b]));
        Ok(Self { head, components, sign: best.1, threshold: best.2 })
    }

    fn by_component(
        &self,
        encoder: &Encoder<'_>,
        fitted: &RgbImage,
        (width, height): (u32, u32),
    ) -> Result<Vec<bool>, EvaluationError> {
        let grid = encoder.tokens(fitted)?;
        let coordinates = self.components.project(&grid.values);
        let resize = Bilinear::new((grid.rows, grid.columns), (height as usize, width as usize), 1);
        Ok(resize.map(&coordinates, |c| self.sign * c[0] > self.threshold))
    }
}

/// The attention of CLS on the patches of a fitted image, for each head; nothing for a ConvNeXt.
pub fn attention_of(encoder: &Encoder<'_>, fitted: &RgbImage) -> Vec<Vec<f32>> {
    match encoder.backbone() {
        Backbone::Vit(vit) => {
            let attention = vit.cls_attention(encoder.pixels(fitted), vit.blocks.len() - 1);
            let [_, _, patches] = attention.dims();
            host(attention.reshape([-1])).chunks_exact(patches).map(<[f32]>::to_vec).collect()
        }
        Backbone::ConvNext(_) => Vec::new(),
    }
}

fn by_attention(encoder: &Encoder<'_>, fitted: &RgbImage, head: usize, (width, height): (u32, u32)) -> Vec<bool> {
    let attention = attention_of(encoder, fitted).swap_remove(head);
    let (width, height) = (width as usize, height as usize);
    let stride = encoder.stride() as u32;
    let (rows, columns) = ((fitted.height() / stride) as usize, (fitted.width() / stride) as usize);
    let figure = holding(&attention, ATTENTION_MASS);
    (0..width * height).map(|i| figure[(i / width) * rows / height * columns + (i % width) * columns / width]).collect()
}

/// The smallest set of places that holds more than `mass` of the attention on all places.
pub fn holding(attention: &[f32], mass: f32) -> Vec<bool> {
    let mut order: Vec<usize> = (0..attention.len()).collect();
    order.sort_by(|&a, &b| attention[b].total_cmp(&attention[a]));
    let total: f32 = attention.iter().sum();
    let (mut held, mut figure) = (0.0, vec![false; attention.len()]);
    for place in order {
        if held > mass * total {
            break;
        }
        held += attention[place];
        figure[place] = true;
    }
    figure
}

/// The labels at the middles of patches.
fn at_patches(labels: &[u32], (width, height): (u32, u32), (rows, columns): (usize, usize)) -> Vec<u32> {
    let middle = |i: usize, count: usize, length: u32| (2 * i + 1) * length as usize / (2 * count);
    (0..rows * columns)
        .map(|i| {
            let (y, x) = (middle(i / columns, rows, height), middle(i % columns, columns, width));
            labels[y * width as usize + x]
        })
        .collect()
}

/// Intersection over union of a figure with the places of label 1; those of no class do not count. 1 if both are empty.
pub(super) fn iou(figure: &[bool], truth: &[u32]) -> f64 {
    let pairs = || figure.iter().zip(truth).filter(|(_, truth)| **truth != Classes::VOID);
    let both = pairs().filter(|(figure, truth)| **figure && **truth == 1).count();
    let union = pairs().filter(|(figure, truth)| **figure || **truth == 1).count();
    if union == 0 { 1.0 } else { both as f64 / union as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::encoder::tests::{backbone, config};
    use burn::tensor::Device;
    use dinoxide_data::{DecodeLimits, MapKind, Pairing};

    fn synthetic(spec: &str) -> AnnotatedSource {
        let pairing = Pairing { images: spec.into(), ..Pairing::default() };
        AnnotatedSource::open(&pairing, MapKind::Mask, &DecodeLimits::default()).unwrap()
    }

    #[test]
    fn the_smallest_set_that_holds_the_mass_is_the_figure() {
        assert_eq!(holding(&[0.1, 0.4, 0.2, 0.3], 0.6), [false, true, false, true]);
        assert_eq!(holding(&[0.1, 0.4, 0.2, 0.3], 0.75), [false, true, true, true]);
        assert_eq!(holding(&[2.0, 1.0], 0.1), [true, false]);
    }

    #[test]
    fn overlap_by_hand() {
        assert_eq!(iou(&[true, true, false, true], &[1, 0, 1, Classes::VOID]), 1.0 / 3.0);
        assert_eq!(iou(&[false, true], &[0, Classes::VOID]), 1.0);
        assert_eq!(at_patches(&[0, 1, 2, 3, 4, 5, 6, 7], (4, 2), (1, 2)), [5, 7]);
    }

    #[test]
    fn images_of_a_folder_stay_together() {
        let root = tempfile::tempdir().unwrap();
        for object in ["a/1", "a/2", "b/1", "b/2", "b/3"] {
            std::fs::create_dir_all(root.path().join(object)).unwrap();
            for view in 0..3 {
                let image = RgbImage::new(8, 8);
                image.save(root.path().join(format!("{object}/{view}.png"))).unwrap();
                let mask = image::GrayImage::new(8, 8);
                mask.save(root.path().join(format!("{object}/{view}-mask.png"))).unwrap();
            }
        }
        let source = synthetic(&root.path().display().to_string());
        let (train, val) = split_by_folder(&source, 0.4, 3).unwrap();
        assert_eq!((train.len(), val.len()), (9, 6));
        let folder = |index: &usize| source.id(*index)[..3].to_owned();
        assert!(val.iter().all(|v| train.iter().all(|t| folder(t) != folder(v))));
        assert_ne!(split_by_folder(&source, 0.4, 4).unwrap().1, val);
        assert_eq!(split_by_folder(&source.select(&[0, 1]), 0.4, 3), None);
    }

    #[test]
    fn the_three_answers_are_scored_on_built_in_images() {
        let (train, val) =
            (synthetic("synthetic:images=20,size=32x40"), synthetic("synthetic:split=val,images=7,size=32x40"));
        let backbone = backbone();
        let encoder = Encoder::new(&backbone, &config(64), &Device::flex()).unwrap();
        let head = HeadConfig { iterations: 60, batch_size: 5, learning_rate: 0.02, ..HeadConfig::default() };
        let mut stages = Vec::new();
        let mut progress = |stage, _, _| {
            if stages.last() != Some(&stage) {
                stages.push(stage);
            }
        };
        let (scores, rejected) = foreground(&encoder, &train, &val, 255, &head, &mut progress).unwrap();
        assert!(rejected.is_empty());
        assert_eq!((scores.images, stages), (7, vec!["tokens", "head", "choice", "scoring"]));
        // What calling everything figure comes to, from the masks alone.
        let shares = (0..7).map(|index| {
            let mask = val.mask(index).unwrap().values;
            mask.iter().filter(|id| **id > 0).count() as f64 / mask.len() as f64
        });
        assert!((scores.everything - 100.0 * shares.sum::<f64>() / 7.0).abs() < 1e-9);
        for iou in [scores.linear, scores.attention.unwrap().iou, scores.component.iou] {
            assert!((1.0..100.0).contains(&iou), "{iou}");
        }
    }
}
