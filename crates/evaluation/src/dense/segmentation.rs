//! Semantic segmentation with a linear head on frozen patch tokens, and mIoU on the pixels of the masks.
//!
//! The protocol of DINOv2 (§7.4, "linear") and DINOv3 (§6.1): batch norm and a 1×1 convolution on the tokens of the last
//! layer, outputs resized bilinearly to the mask, cross-entropy averaged over all pixels (those that are ignored count in
//! the denominator). It differs from the references in what a CPU can do: the tokens of the train images are computed once,
//! without augmentation.

use dinoxide_augmentation::{CropBox, Resizer, RgbImage};
use dinoxide_data::{AnnotatedSource, IntegerMap, Rejected};
use rayon::prelude::*;

use super::Encoder;
use super::bilinear::Bilinear;
use super::head::{HeadConfig, Outputs};
use super::heads::Head;
use super::scratch::{Scratch, Span, StoredGrid};
use crate::EvaluationError;
use crate::segmentation::ConfusionMatrix;

/// What the ids of a mask mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Classes {
    /// Classes; their ids are 0 and up.
    pub count: usize,
    /// The id, in the files, of pixels that are neither trained on nor scored.
    pub void: u32,
    /// How ids are read.
    pub ids: Ids,
}

/// How the ids of a mask become classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// As they are.
    Classes,
    /// 0 is no class, and classes begin at 1, as in ADE20K.
    FromOne,
    /// 0 is ground, everything else is figure: two classes.
    FigureGround,
}

impl Classes {
    /// What [`read`](Self::read) gives for pixels of no class, whatever their ids: those of `void`, and of 0 where classes
    /// begin at 1.
    pub const VOID: u32 = u16::MAX as u32;

    /// The class of an id, if it has one.
    pub fn class(&self, id: u32) -> Option<u32> {
        match self.ids {
            _ if id == self.void => None,
            Ids::Classes => Some(id),
            Ids::FromOne => id.checked_sub(1),
            Ids::FigureGround => Some(id.min(1)),
        }
    }

    /// The mask of an image of `size = (width, height)`, its ids checked: a class for each pixel, or [`VOID`](Self::VOID).
    ///
    /// # Errors
    /// `Ok(Err)` if the file cannot be read; an error if its size is another or an id is no class.
    pub fn read(
        &self,
        source: &AnnotatedSource,
        index: usize,
        size: (u32, u32),
    ) -> Result<Result<Vec<u32>, Rejected>, EvaluationError> {
        let mask = match source.mask(index) {
            Ok(mask) => mask,
            Err(e) => return Ok(Err(Rejected { index, id: e.id, reason: e.reason.to_string() })),
        };
        let wrong = |message: String| EvaluationError::Annotation { id: source.id(index), message };
        same_size(&mask, size).map_err(wrong)?;
        let known = |class: u32| class != Self::VOID && (class as usize) < self.count;
        let class = |&id: &u16| self.class(u32::from(id));
        if let Some(at) = mask.values.iter().position(|id| class(id).is_some_and(|class| !known(class))) {
            let (x, y) = (at % size.0 as usize, at / size.0 as usize);
            let few = if self.ids == Ids::FromOne { " after 0, which is none" } else { "" };
            let (count, void, id) = (self.count, self.void, mask.values[at]);
            return Err(wrong(format!(
                "the mask has id {id} at column {x}, row {y}; there are {count} classes{few}, and void is {void}\n\n\
                 hint: if {id} is void, say so with `--void {id}`; if it is a class, with `--classes`"
            )));
        }
        let labels = mask.values.iter().map(|id| class(id).unwrap_or(Self::VOID)).collect();
        Ok(Ok(labels))
    }

    /// How many classes the masks of a source have: the highest, plus one. Masks that cannot be read
    /// are passed over, they are reported when they are used.
    ///
    /// # Errors
    /// If no pixel has a class.
    pub fn count_in(source: &AnnotatedSource, void: u32, ids: Ids) -> Result<usize, EvaluationError> {
        let classes = Self { count: 0, void, ids };
        let highest = (0..source.len())
            .into_par_iter()
            .filter_map(|index| {
                source.mask(index).ok()?.values.into_iter().filter_map(|id| classes.class(id.into())).max()
            })
            .max();
        highest.map(|class| class as usize + 1).ok_or(EvaluationError::NoPixels { task: "segmentation" })
    }
}

/// That a map has the size of its image, or what to say.
pub(crate) fn same_size(map: &IntegerMap, (width, height): (u32, u32)) -> Result<(), String> {
    if (map.width, map.height) == (width, height) {
        return Ok(());
    }
    Err(format!(
        "the image is {width}x{height}, its map {}x{}\n\nhint: a map has a value for each pixel of its image; resize maps \
         without interpolation",
        map.width, map.height
    ))
}

/// A trained head.
pub struct SegmentationHead {
    head: Head,
}

/// Tokens of train windows and what is true there.
#[derive(Default)]
struct Stored {
    grids: Vec<StoredGrid>,
    labels: Vec<(Span, (usize, usize))>,
}

impl SegmentationHead {
    /// Trains a head on all images of a source. Images and masks that cannot be read are left out and given back.
    ///
    /// `progress` is called with the stage (`tokens` or `head`), what is done, and of how many.
    ///
    /// # Errors
    /// Masks that do not fit, or nothing that can be read.
    pub fn train(
        encoder: &Encoder<'_>,
        source: &AnnotatedSource,
        classes: Classes,
        config: &HeadConfig,
        progress: &mut dyn FnMut(&'static str, usize, usize),
    ) -> Result<(Self, Vec<Rejected>), EvaluationError> {
        let (mut scratch, mut stored, mut rejected) = (Scratch::new()?, Stored::default(), Vec::new());
        let mut resizer = Resizer::default();
        for index in 0..source.len() {
            match read(source, index, classes)? {
                Err(why) => rejected.push(why),
                Ok((image, labels)) => {
                    let fitted = encoder.fitted(&image, &mut resizer);
                    for window in encoder.windows(&fitted, encoder.config().window_px) {
                        let area = scaled(window, fitted.dimensions(), image.dimensions());
                        let part = cut(&labels, image.width(), area);
                        // Windows without a class have nothing to teach.
                        if part.iter().all(|&label| u32::from(label) == Classes::VOID) {
                            continue;
                        }
                        stored.labels.push((scratch.push(&part)?, (area.height as usize, area.width as usize)));
                        let tokens = encoder.window_tokens(&fitted, window, &mut resizer)?;
                        stored.grids.push(scratch.push_grid(&tokens)?);
                    }
                }
            }
            progress("tokens", index + 1, source.len());
        }
        if stored.grids.is_empty() {
            return Err(if rejected.len() == source.len() {
                EvaluationError::NothingReadable { rejected }
            } else {
                EvaluationError::NoPixels { task: "segmentation" }
            });
        }
        let loss = |parts: &[Outputs<'_>]| batch_loss(parts, &scratch, &stored.labels, classes);
        let total = config.iterations;
        let mut report = |done: usize, _: f64| progress("head", done, total);
        let tokens = (&scratch, &stored.grids[..]);
        let head = Head::train("segmentation", tokens, classes.count, config, encoder, &loss, &mut report)?;
        Ok((Self { head }, rejected))
    }

    /// The class of each pixel of an image, `height · width` values: outputs of overlapping windows are averaged, resized
    /// to the image, and the largest is taken.
    ///
    /// # Errors
    /// Tokens that are not finite.
    pub fn predict(&self, encoder: &Encoder<'_>, image: &RgbImage) -> Result<Vec<u32>, EvaluationError> {
        let (scores, from) = dense_outputs(&self.head, encoder, image)?;
        let to = (image.height() as usize, image.width() as usize);
        Ok(Bilinear::new(from, to, self.head.channels()).map(&scores, |scores| largest(scores) as u32))
    }
}

/// What the validation of a head found.
pub struct Validated {
    /// True and predicted classes of all pixels.
    pub confusion: ConfusionMatrix,
    /// Images scored.
    pub images: usize,
    /// Images and masks that could not be read.
    pub rejected: Vec<Rejected>,
}

/// Scores a head on all images of a source.
///
/// # Errors
/// Masks that do not fit, or nothing that can be read.
pub fn validate(
    head: &SegmentationHead,
    encoder: &Encoder<'_>,
    source: &AnnotatedSource,
    classes: Classes,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Validated, EvaluationError> {
    let mut confusion = ConfusionMatrix::new(classes.count, Classes::VOID);
    let (mut images, mut rejected) = (0, Vec::new());
    for index in 0..source.len() {
        match read(source, index, classes)? {
            Err(why) => rejected.push(why),
            Ok((image, labels)) => {
                confusion.add(&head.predict(encoder, &image)?, &labels)?;
                images += 1;
            }
        }
        progress(index + 1, source.len());
    }
    if images == 0 {
        return Err(EvaluationError::NothingReadable { rejected });
    }
    Ok(Validated { confusion, images, rejected })
}

type Labeled = (RgbImage, Vec<u32>);

fn read(
    source: &AnnotatedSource,
    index: usize,
    classes: Classes,
) -> Result<Result<Labeled, Rejected>, EvaluationError> {
    let image = match source.image(index) {
        Ok(image) => image,
        Err(e) => return Ok(Err(Rejected { index, id: e.id, reason: e.reason.to_string() })),
    };
    Ok(classes.read(source, index, image.dimensions())?.map(|labels| (image, labels)))
}

/// The outputs of a head for a fitted image, averaged over overlapping windows, and their size `(height, width)`.
pub(crate) fn dense_outputs(
    head: &Head,
    encoder: &Encoder<'_>,
    image: &RgbImage,
) -> Result<(Vec<f32>, (usize, usize)), EvaluationError> {
    let mut resizer = Resizer::default();
    let fitted = encoder.fitted(image, &mut resizer);
    let (height, width) = (fitted.height() as usize, fitted.width() as usize);
    let channels = head.channels();
    let mut sum = vec![0.0; height * width * channels];
    let mut seen = vec![0u16; height * width];
    for window in encoder.windows(&fitted, encoder.overlapping_step()) {
        let tokens = encoder.window_tokens(&fitted, window, &mut resizer)?;
        let (outputs, grid) = head.outputs(&tokens)?;
        let (top, left) = (window.top as usize, window.left as usize);
        let to = (window.height as usize, window.width as usize);
        Bilinear::new(grid, to, channels).add_to(&outputs, &mut sum, width, (top, left));
        for row in seen.chunks_mut(width).skip(top).take(to.0) {
            row[left..left + to.1].iter_mut().for_each(|times| *times += 1);
        }
    }
    for (sum, &times) in sum.chunks_mut(channels).zip(&seen) {
        sum.iter_mut().for_each(|sum| *sum /= f32::from(times));
    }
    Ok((sum, (height, width)))
}

/// A window of one size of an image, in the pixels of another size.
pub(crate) fn scaled(window: CropBox, from: (u32, u32), to: (u32, u32)) -> CropBox {
    let at = |position: u32, from: u32, to: u32| {
        (f64::from(position) * f64::from(to) / f64::from(from)).round().clamp(0.0, f64::from(to)) as u32
    };
    let span = |start: u32, length: u32, from: u32, to: u32| {
        let first = at(start, from, to).min(to - 1);
        (first, at(start + length, from, to).max(first + 1) - first)
    };
    let (left, width) = span(window.left, window.width, from.0, to.0);
    let (top, height) = span(window.top, window.height, from.1, to.1);
    CropBox { left, top, width, height }
}

/// The labels in a box.
fn cut(labels: &[u32], width: u32, area: CropBox) -> Vec<u16> {
    let rows = labels.chunks(width as usize).skip(area.top as usize).take(area.height as usize);
    rows.flat_map(|row| row[area.left as usize..(area.left + area.width) as usize].iter().map(|&label| label as u16))
        .collect()
}

/// Mean cross-entropy over all pixels of a batch, and its gradient.
fn batch_loss(
    parts: &[Outputs<'_>],
    scratch: &Scratch,
    labels: &[(Span, (usize, usize))],
    classes: Classes,
) -> Result<(f64, Vec<Vec<f32>>), EvaluationError> {
    let pixels: usize = parts.iter().map(|part| labels[part.image].1).map(|(height, width)| height * width).sum();
    let of_images: Vec<(f64, Vec<f32>)> = parts
        .par_iter()
        .map(|part| {
            let (span, to) = labels[part.image];
            let truth = scratch.get(span)?;
            let (mut loss, scale) = (0.0, 1.0 / pixels as f32);
            let bilinear = Bilinear::new(part.grid, to, classes.count);
            let gradient = bilinear.gradient(part.values, |pixel, scores, gradient| {
                let label = u32::from(truth[pixel]);
                if label == Classes::VOID {
                    gradient.fill(0.0);
                    return;
                }
                let peak = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let mut sum = 0.0;
                for (g, &score) in gradient.iter_mut().zip(scores) {
                    *g = (score - peak).exp();
                    sum += *g;
                }
                loss += f64::from(sum.ln() + peak - scores[label as usize]);
                let factor = scale / sum;
                gradient.iter_mut().for_each(|g| *g *= factor);
                gradient[label as usize] -= scale;
            });
            Ok((loss, gradient))
        })
        .collect::<Result<_, EvaluationError>>()?;
    let loss = of_images.iter().map(|(loss, _)| loss).sum::<f64>() / pixels as f64;
    Ok((loss, of_images.into_iter().map(|(_, gradient)| gradient).collect()))
}

/// The first of the largest.
fn largest(scores: &[f32]) -> usize {
    let mut best = 0;
    for (i, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::encoder::tests::{backbone, config, image};
    use burn::tensor::{Device, Int, Tensor, TensorData, activation::log_softmax};
    use dinoxide_data::{DecodeLimits, MapKind, Pairing};
    use dinoxide_model::interpolation::{Filter, resize_tokens};
    use dinoxide_model::weights::host;

    const CLASSES: Classes = Classes { count: 3, void: 7, ids: Ids::Classes };

    #[test]
    fn the_loss_and_its_gradient_are_those_of_autodiff() {
        let device = Device::flex().autodiff();
        let grids = [(2, 3), (3, 2)];
        let sizes = [(5, 7), (6, 2)];
        let values: Vec<Vec<f32>> = grids
            .iter()
            .map(|(h, w)| (0..h * w * 3).map(|i| ((i * i) as f32 * 0.7 + *h as f32).sin() * 3.0).collect())
            .collect();
        let truth: Vec<Vec<u16>> = sizes
            .iter()
            .map(|(h, w)| (0..h * w).map(|i| [0, 2, Classes::VOID as u16, 1][(i * i / 3 + h) % 4]).collect())
            .collect();
        let mut scratch = Scratch::new().unwrap();
        let labels: Vec<(Span, (usize, usize))> =
            truth.iter().zip(sizes).map(|(truth, size)| (scratch.push(truth).unwrap(), size)).collect();
        let parts: Vec<Outputs<'_>> =
            [1, 0].into_iter().map(|image| Outputs { image, grid: grids[image], values: &values[image] }).collect();
        let (loss, gradients) = batch_loss(&parts, &scratch, &labels, CLASSES).unwrap();

        let pixels = (5 * 7 + 6 * 2) as f64;
        let mut expected = 0.0;
        for (part, gradient) in parts.iter().zip(&gradients) {
            let ((h, w), (height, width)) = (part.grid, sizes[part.image]);
            let leaf =
                Tensor::<3>::from_data(TensorData::new(part.values.to_vec(), [1, h * w, 3]), &device).require_grad();
            let scores = resize_tokens(leaf.clone(), (h, w), (height, width), Filter::Bilinear, false);
            let truth = &truth[part.image];
            let chosen: Vec<i32> = truth.iter().map(|&label| i32::from(label % 5)).collect();
            let weight: Vec<f32> =
                truth.iter().map(|&label| f32::from(u8::from(u32::from(label) != Classes::VOID))).collect();
            let chosen = Tensor::<3, Int>::from_data(TensorData::new(chosen, [1, height * width, 1]), &device);
            let weight = Tensor::<3>::from_data(TensorData::new(weight, [1, height * width, 1]), &device);
            let loss = (log_softmax(scores, 2).gather(2, chosen) * weight).sum().neg().div_scalar(pixels);
            expected += f64::from(host(loss.clone().inner().reshape([1]))[0]);
            let grad = host(leaf.grad(&loss.backward()).expect("a gradient").reshape([-1]));
            for (found, expected) in gradient.iter().zip(&grad) {
                assert!((found - expected).abs() < 1e-6, "{found} {expected}");
            }
        }
        assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");
    }

    #[test]
    fn windows_of_another_size_cover_the_labels() {
        let window = |left, top, width, height| CropBox { left, top, width, height };
        assert_eq!(scaled(window(16, 0, 16, 8), (32, 8), (30, 7)), window(15, 0, 15, 7));
        assert_eq!(scaled(window(0, 4, 8, 4), (8, 8), (3, 3)), window(0, 2, 3, 1));
        let labels: Vec<u32> = (0..12).collect();
        assert_eq!(cut(&labels, 4, window(1, 1, 2, 2)), [5, 6, 9, 10]);
    }

    /// Six images of two sizes with a bright rectangle, and its mask; the lowest row of the masks is void.
    fn rectangles() -> (tempfile::TempDir, AnnotatedSource) {
        let root = tempfile::tempdir().unwrap();
        for folder in ["img", "mask"] {
            std::fs::create_dir(root.path().join(folder)).unwrap();
        }
        for i in 0..6u32 {
            let (width, height) = if i % 2 == 0 { (40, 24) } else { (28, 36) };
            let inside = |x: u32, y: u32| (4 + 4 * (i % 3)..24).contains(&x) && (8..16 + 4 * (i % 2)).contains(&y);
            let shade = |x: u32, y: u32| ((x * 7 + y * 3 + i * 5) % 40) as u8;
            let image = RgbImage::from_fn(width, height, |x, y| {
                image::Rgb(if inside(x, y) { [200, 180 + shade(x, y), 60] } else { [40, 40 + shade(x, y), 90] })
            });
            let mask = image::GrayImage::from_fn(width, height, |x, y| {
                image::Luma([if y + 1 == height { 7 } else { u8::from(inside(x, y)) }])
            });
            image.save(root.path().join(format!("img/{i}.png"))).unwrap();
            mask.save(root.path().join(format!("mask/{i}.png"))).unwrap();
        }
        let pairing = Pairing { images: root.path().display().to_string(), ..Pairing::default() };
        let source = AnnotatedSource::open(&pairing, MapKind::Mask, &DecodeLimits::default()).unwrap();
        (root, source)
    }

    #[test]
    fn a_head_finds_rectangles_whole_and_by_windows() {
        let (_root, source) = rectangles();
        let classes =
            Classes { count: Classes::count_in(&source, 7, Ids::Classes).unwrap(), void: 7, ids: Ids::Classes };
        assert_eq!(classes.count, 2);
        let (backbone, device) = (backbone(), Device::flex());
        let mut seen = 0;
        for window in [48, 16] {
            let encoder = Encoder::new(&backbone, &config(window), &device).unwrap();
            let head_config =
                HeadConfig { iterations: 80, batch_size: 6, learning_rate: 0.05, ..HeadConfig::default() };
            let mut stages = Vec::new();
            let mut progress = |stage, done, of| stages.push((stage, done, of));
            let (head, rejected) =
                SegmentationHead::train(&encoder, &source, classes, &head_config, &mut progress).unwrap();
            assert_eq!((rejected.len(), stages.len()), (0, 6 + 80));
            let found = validate(&head, &encoder, &source, classes, &mut |_, _| ()).unwrap();
            let scores = found.confusion.scores().unwrap();
            let pixels: u64 = found.confusion.areas().iter().map(|[_, _, label]| label).sum();
            assert_eq!((found.images, pixels), (6, 3 * 40 * 23 + 3 * 28 * 35));
            assert!(scores.mean_iou > 80.0, "window {window}: {}", scores.mean_iou);
            seen += 1;
        }
        assert_eq!(seen, 2);
    }

    #[test]
    fn files_that_cannot_be_read_are_left_out_and_listed() {
        let (root, source) = rectangles();
        std::fs::write(root.path().join("img/2.png"), "no image").unwrap();
        std::fs::write(root.path().join("mask/4.png"), "no mask").unwrap();
        let classes = Classes { count: 2, void: 7, ids: Ids::Classes };
        let backbone = backbone();
        let encoder = Encoder::new(&backbone, &config(48), &Device::flex()).unwrap();
        let head_config = HeadConfig { iterations: 1, batch_size: 1, ..HeadConfig::default() };
        let (head, rejected) =
            SegmentationHead::train(&encoder, &source, classes, &head_config, &mut |_, _, _| ()).unwrap();
        let found = validate(&head, &encoder, &source, classes, &mut |_, _| ()).unwrap();
        assert_eq!((found.images, &found.rejected), (4, &rejected));
        assert!(rejected.len() == 2 && rejected[1].id.ends_with("mask/4.png"), "{rejected:?}");
        let void = Classes { void: 0, ..classes };
        assert!(SegmentationHead::train(&encoder, &source, void, &head_config, &mut |_, _, _| ()).is_err());
    }

    #[test]
    fn overlapping_windows_are_averaged() {
        let (backbone, device, image) = (backbone(), Device::flex(), image(24, 16));
        let encoder = Encoder::new(&backbone, &config(16), &device).unwrap();
        let pairing = Pairing { images: "synthetic:images=2,size=16".into(), ..Pairing::default() };
        let source = AnnotatedSource::open(&pairing, MapKind::Mask, &DecodeLimits::default()).unwrap();
        let classes = Classes { count: 3, void: 255, ids: Ids::Classes };
        let config = HeadConfig { iterations: 1, batch_size: 1, ..HeadConfig::default() };
        let (head, _) = SegmentationHead::train(&encoder, &source, classes, &config, &mut |_, _, _| ()).unwrap();
        let (found, size) = dense_outputs(&head.head, &encoder, &image).unwrap();
        assert_eq!(size, (16, 24));
        // Windows begin at columns 0 and 8 (10, moved to the border).
        let mut resizer = Resizer::default();
        let parts: Vec<Vec<f32>> = [0, 8]
            .into_iter()
            .map(|left| {
                let window = CropBox { left, top: 0, width: 16, height: 16 };
                let tokens = encoder.window_tokens(&image, window, &mut resizer).unwrap();
                let (outputs, grid) = head.head.outputs(&tokens).unwrap();
                Bilinear::new(grid, (16, 16), 3).map(&outputs, <[f32]>::to_vec).concat()
            })
            .collect();
        let at = |part: &[f32], x: usize| part[(5 * 16 + x) * 3 + 1];
        for (x, expected) in
            [(3, at(&parts[0], 3)), (12, (at(&parts[0], 12) + at(&parts[1], 4)) / 2.0), (20, at(&parts[1], 12))]
        {
            assert!((found[(5 * 24 + x) * 3 + 1] - expected).abs() < 1e-6, "column {x}");
        }
    }

    #[test]
    fn ids_become_classes_and_none_is_taken_for_void() {
        let classes = |void, ids| Classes { count: 9, void, ids };
        let mut cases = 0;
        for (classes, id, class) in [
            (classes(255, Ids::Classes), 0, Some(0)),
            (classes(255, Ids::Classes), 255, None),
            (classes(255, Ids::FromOne), 0, None),
            (classes(255, Ids::FromOne), 1, Some(0)),
            (classes(255, Ids::FromOne), 255, None),
            // The class that is called as void is, once classes begin at 0.
            (classes(5, Ids::FromOne), 6, Some(5)),
            (classes(5, Ids::FromOne), 5, None),
            (classes(70_000, Ids::FromOne), 0, None),
            (classes(7, Ids::FigureGround), 7, None),
            (classes(7, Ids::FigureGround), 0, Some(0)),
            (classes(7, Ids::FigureGround), 200, Some(1)),
        ] {
            assert_eq!(classes.class(id), class, "{classes:?} {id}");
            cases += 1;
        }
        assert_eq!(cases, 11);
    }

    #[test]
    fn masks_that_do_not_fit_are_refused_with_their_place() {
        let pairing = Pairing { images: "synthetic:images=14,size=16x24".into(), ..Pairing::default() };
        let source = AnnotatedSource::open(&pairing, MapKind::Mask, &DecodeLimits::default()).unwrap();
        let message = CLASSES.read(&source, 0, (24, 15)).unwrap_err().to_string();
        assert!(message.contains("the image is 24x15, its map 24x16"), "{message}");
        // Image 3 has ids 0 and 4.
        let message = CLASSES.read(&source, 3, (24, 16)).unwrap_err().to_string();
        assert!(message.contains("the mask has id 4 at column") && message.contains("3 classes"), "{message}");
        let reduced = Classes { count: 12, void: 255, ids: Ids::FromOne };
        let labels = reduced.read(&source, 3, (24, 16)).unwrap().unwrap();
        assert!(labels.contains(&3) && labels.contains(&Classes::VOID) && !labels.contains(&0));
        assert_eq!(Classes::count_in(&source, 255, Ids::FromOne).unwrap(), 12);
        assert_eq!(Classes::count_in(&source, 12, Ids::Classes).unwrap(), 12);
    }
}
