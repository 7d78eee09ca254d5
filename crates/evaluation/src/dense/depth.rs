//! Monocular depth with a linear head on frozen patch tokens.
//!
//! The protocol of DINOv2 (§7.4) and DINOv3 (§6.1) on NYU: batch norm and a 1×1 convolution to 256 bins between the least
//! and the greatest depth, `d = Σ_k c_k·w_k / Σ_k w_k` with `w = relu(x) + 0.1` (AdaBins, Bhat et al. 2021, with the
//! normalisation of BinsFormer's code), resized bilinearly to the depth map; the loss is the scale-invariant logarithmic one
//! (Eigen et al. 2014, eq. 4, in the form of AdaBins). As for segmentation, tokens are computed once, without augmentation;
//! and the variance is part of the loss from the first step on.

use dinoxide_augmentation::{Resizer, RgbImage};
use dinoxide_data::{AnnotatedSource, Rejected};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Encoder;
use super::bilinear::Bilinear;
use super::head::{HeadConfig, Outputs};
use super::heads::Head;
use super::scratch::{Scratch, Span, StoredGrid};
use super::segmentation::scaled;
use crate::EvaluationError;
use crate::depth::DepthMean;

/// Weight of the squared mean in the loss.
const MEAN_WEIGHT: f64 = 0.15;
/// Added to depths before the logarithm, in metres.
const LOG_OFFSET: f32 = 1e-3;
/// Added to the rectified outputs, so that no place is without a bin.
const BIN_FLOOR: f32 = 0.1;

/// What the head's outputs mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DepthOutput {
    /// Weights of this many bins, evenly spaced from the least to the greatest depth.
    Bins(usize),
    /// The depth above the least one, rectified.
    Regression,
}

/// Depths that are trained on and scored, in metres.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DepthRange {
    /// Depths at or below are not known.
    pub min: f32,
    /// Depths at or above are not scored.
    pub max: f32,
}

impl DepthRange {
    fn contains(&self, depth: f32) -> bool {
        depth > self.min && depth < self.max
    }
}

/// A trained head.
pub struct DepthHead {
    head: Head,
    output: DepthOutput,
    range: DepthRange,
}

/// Tokens of train windows and the depths there.
#[derive(Default)]
struct Stored {
    grids: Vec<StoredGrid>,
    depths: Vec<(Span, (usize, usize))>,
}

impl DepthOutput {
    fn channels(self) -> usize {
        match self {
            Self::Bins(count) => count,
            Self::Regression => 1,
        }
    }

    /// The depth of each place.
    fn depths(self, outputs: &[f32], range: DepthRange) -> Vec<f32> {
        match self {
            Self::Bins(count) => outputs.chunks_exact(count).map(|x| of_bins(x, range).0).collect(),
            Self::Regression => outputs.iter().map(|x| x.max(0.0) + range.min).collect(),
        }
    }

    /// The gradient with respect to the outputs, from the one with respect to the depths.
    fn gradient(self, outputs: &[f32], range: DepthRange, of_depths: &[f32]) -> Vec<f32> {
        match self {
            Self::Bins(count) => {
                let mut gradient = vec![0.0; outputs.len()];
                for ((x, g), &upstream) in
                    outputs.chunks_exact(count).zip(gradient.chunks_exact_mut(count)).zip(of_depths)
                {
                    // ∂d/∂w_k = (c_k − d)/Σw.
                    let (depth, sum) = of_bins(x, range);
                    for (k, (g, &x)) in g.iter_mut().zip(x).enumerate() {
                        if x > 0.0 {
                            *g = upstream * (center(k, count, range) - depth) / sum;
                        }
                    }
                }
                gradient
            }
            Self::Regression => {
                outputs.iter().zip(of_depths).map(|(&x, &upstream)| if x > 0.0 { upstream } else { 0.0 }).collect()
            }
        }
    }
}

/// Depth of bin `k`.
fn center(k: usize, count: usize, range: DepthRange) -> f32 {
    range.min + (range.max - range.min) * k as f32 / (count - 1) as f32
}

/// The weighted mean of the bins, and the sum of the weights.
fn of_bins(x: &[f32], range: DepthRange) -> (f32, f32) {
    let count = x.len();
    let (mut sum, mut weighted) = (0.0, 0.0);
    for (k, x) in x.iter().enumerate() {
        let weight = x.max(0.0) + BIN_FLOOR;
        sum += weight;
        weighted += weight * center(k, count, range);
    }
    (weighted / sum, sum)
}

/// What the validation of a head found.
pub struct Validated {
    /// The metrics of each image, averaged.
    pub mean: DepthMean,
    /// The metrics of always answering the mean depth of the train images; what a head has to beat.
    pub constant: DepthMean,
    /// Images scored.
    pub images: usize,
    /// Images and depth maps that could not be read.
    pub rejected: Vec<Rejected>,
}

/// Images with depth maps, and the factor from the values of the files to metres.
#[derive(Clone, Copy)]
pub struct DepthImages<'a> {
    /// The source.
    pub source: &'a AnnotatedSource,
    /// Metres for a value of 1.
    pub scale: f32,
}

/// An image and the depth of its pixels in metres, row by row.
pub type WithDepth = (RgbImage, Vec<f32>);

impl DepthImages<'_> {
    /// Reads an image and its depth in metres.
    ///
    /// # Errors
    /// `Ok(Err)` if a file cannot be read; an error if the map is of another size.
    pub fn read(&self, index: usize) -> Result<Result<WithDepth, Rejected>, EvaluationError> {
        let rejected = |e: dinoxide_data::ReadError| Rejected { index, id: e.id, reason: e.reason.to_string() };
        let image = match self.source.image(index) {
            Ok(image) => image,
            Err(e) => return Ok(Err(rejected(e))),
        };
        let (width, height, depth) = match self.source.depth(index, self.scale) {
            Ok(depth) => depth,
            Err(e) => return Ok(Err(rejected(e))),
        };
        if (width, height) != image.dimensions() {
            let (w, h) = image.dimensions();
            let message = format!(
                "the image is {w}x{h}, its depth map {width}x{height}\n\nhint: a map has a value for each pixel of its \
                 image; resize maps without interpolation"
            );
            return Err(EvaluationError::Annotation { id: self.source.id(index), message });
        }
        Ok(Ok((image, depth)))
    }
}

impl DepthHead {
    /// Trains a head. Images and maps that cannot be read are left out and given back; the mean of the train depths comes
    /// with the head.
    ///
    /// `progress` is called with the stage (`tokens` or `head`), what is done, and of how many.
    ///
    /// # Errors
    /// Settings out of range, maps that do not fit or have no depth within the range, or nothing that can be read.
    pub fn train(
        encoder: &Encoder<'_>,
        images: DepthImages<'_>,
        (output, range): (DepthOutput, DepthRange),
        config: &HeadConfig,
        progress: &mut dyn FnMut(&'static str, usize, usize),
    ) -> Result<(Self, f32, Vec<Rejected>), EvaluationError> {
        check(output, range, images.scale)?;
        let (mut scratch, mut stored, mut rejected) = (Scratch::new()?, Stored::default(), Vec::new());
        let (mut sum, mut count, mut largest) = (0.0, 0u64, 0.0f32);
        let mut resizer = Resizer::default();
        for index in 0..images.source.len() {
            match images.read(index)? {
                Err(why) => rejected.push(why),
                Ok((image, depth)) => {
                    for &depth in &depth {
                        largest = largest.max(depth);
                        if range.contains(depth) {
                            (sum, count) = (sum + f64::from(depth), count + 1);
                        }
                    }
                    let fitted = encoder.fitted(&image, &mut resizer);
                    for window in encoder.windows(&fitted, encoder.config().window_px) {
                        let area = scaled(window, fitted.dimensions(), image.dimensions());
                        let rows = depth.chunks(image.width() as usize);
                        let rows = rows.skip(area.top as usize).take(area.height as usize);
                        let columns = area.left as usize..(area.left + area.width) as usize;
                        let part: Vec<f32> = rows
                            .flat_map(|row| &row[columns.clone()])
                            .map(|&depth| if range.contains(depth) { depth } else { 0.0 })
                            .collect();
                        // Windows without a depth have nothing to teach.
                        if part.iter().all(|&depth| depth == 0.0) {
                            continue;
                        }
                        let size = (area.height as usize, area.width as usize);
                        stored.depths.push((scratch.push_floats(&part)?, size));
                        let tokens = encoder.window_tokens(&fitted, window, &mut resizer)?;
                        stored.grids.push(scratch.push_grid(&tokens)?);
                    }
                }
            }
            progress("tokens", index + 1, images.source.len());
        }
        if stored.grids.is_empty() {
            if rejected.len() == images.source.len() {
                return Err(EvaluationError::NothingReadable { rejected });
            }
            return Err(EvaluationError::NoDepth {
                maps: images.source.len(),
                largest,
                min: range.min,
                max: range.max,
            });
        }
        let loss = |parts: &[Outputs<'_>]| batch_loss(parts, &scratch, &stored.depths, output, range);
        let total = config.iterations;
        let mut report = |done: usize, _: f64| progress("head", done, total);
        let tokens = (&scratch, &stored.grids[..]);
        let head = Head::train("depth", tokens, output.channels(), config, encoder, &loss, &mut report)?;
        Ok((Self { head, output, range }, (sum / count as f64) as f32, rejected))
    }

    /// The depth of each pixel of an image in metres, within the range, `height · width` values: outputs of overlapping
    /// windows are averaged as depths and resized to the image.
    ///
    /// # Errors
    /// Tokens that are not finite.
    pub fn predict(&self, encoder: &Encoder<'_>, image: &RgbImage) -> Result<Vec<f32>, EvaluationError> {
        let mut resizer = Resizer::default();
        let fitted = encoder.fitted(image, &mut resizer);
        let (height, width) = (fitted.height() as usize, fitted.width() as usize);
        let (mut sum, mut seen) = (vec![0.0; height * width], vec![0.0f32; height * width]);
        for window in encoder.windows(&fitted, encoder.overlapping_step()) {
            let tokens = encoder.window_tokens(&fitted, window, &mut resizer)?;
            let (outputs, grid) = self.head.outputs(&tokens)?;
            let depths = self.output.depths(&outputs, self.range);
            let (at, to) =
                ((window.top as usize, window.left as usize), (window.height as usize, window.width as usize));
            let bilinear = Bilinear::new(grid, to, 1);
            bilinear.add_to(&depths, &mut sum, width, at);
            bilinear.add_to(&vec![1.0; depths.len()], &mut seen, width, at);
        }
        sum.iter_mut().zip(&seen).for_each(|(sum, seen)| *sum /= seen);
        let to = (image.height() as usize, image.width() as usize);
        let range = self.range;
        Ok(Bilinear::new((height, width), to, 1).map(&sum, |depth| depth[0].clamp(range.min, range.max)))
    }
}

/// Scores a head. `mean` is the depth that the constant answer gives.
///
/// # Errors
/// Maps that do not fit or have no depth within the range, or nothing that can be read.
pub fn validate(
    head: &DepthHead,
    encoder: &Encoder<'_>,
    images: DepthImages<'_>,
    mean: f32,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Validated, EvaluationError> {
    let mut found =
        Validated { mean: DepthMean::default(), constant: DepthMean::default(), images: 0, rejected: Vec::new() };
    let mut largest = 0.0f32;
    for index in 0..images.source.len() {
        match images.read(index)? {
            Err(why) => found.rejected.push(why),
            Ok((image, depth)) => {
                let valid: Vec<bool> = depth.iter().map(|&depth| head.range.contains(depth)).collect();
                largest = depth.iter().copied().fold(largest, f32::max);
                found.mean.add(&head.predict(encoder, &image)?, &depth, &valid)?;
                found.constant.add(&vec![mean; depth.len()], &depth, &valid)?;
                found.images += 1;
            }
        }
        progress(index + 1, images.source.len());
    }
    if found.images == 0 {
        return Err(EvaluationError::NothingReadable { rejected: found.rejected });
    }
    if found.mean.skipped() == found.images {
        let DepthRange { min, max } = head.range;
        return Err(EvaluationError::NoDepth { maps: found.images, largest, min, max });
    }
    Ok(found)
}

/// Checks settings.
///
/// # Errors
/// The first that is out of range.
pub fn check(output: DepthOutput, range: DepthRange, scale: f32) -> Result<(), EvaluationError> {
    let setting = |key, value: String, expected| Err(EvaluationError::Setting { task: "depth", key, value, expected });
    if !(range.min > 0.0 && range.max > range.min && range.max <= 65_504.0) {
        return setting("range", format!("{} to {} m", range.min, range.max), "above 0, rising, and at most 65504 m");
    }
    if !(scale > 0.0 && scale.is_finite()) {
        return setting("scale", scale.to_string(), "above 0 and finite");
    }
    match output {
        DepthOutput::Bins(count) if count < 2 => setting("bins", count.to_string(), "at least 2"),
        _ => Ok(()),
    }
}

/// `√(Var(g) + 0.15·mean(g)²)` over the known pixels of a batch, `g = ln(p + 0.001) − ln(t + 0.001)`, and its gradient.
fn batch_loss(
    parts: &[Outputs<'_>],
    scratch: &Scratch,
    stored: &[(Span, (usize, usize))],
    output: DepthOutput,
    range: DepthRange,
) -> Result<(f64, Vec<Vec<f32>>), EvaluationError> {
    struct Image {
        bilinear: Bilinear,
        coarse: Vec<f32>,
        predicted: Vec<f32>,
        /// `g` at known pixels, NaN elsewhere.
        difference: Vec<f32>,
    }
    let images: Vec<Image> = parts
        .par_iter()
        .map(|part| {
            let (span, to) = stored[part.image];
            let truth = scratch.get_floats(span)?;
            let bilinear = Bilinear::new(part.grid, to, 1);
            let coarse = output.depths(part.values, range);
            let predicted = bilinear.map(&coarse, |depth| depth[0]);
            let log = |depth: f32| (depth + LOG_OFFSET).ln();
            let difference =
                predicted.iter().zip(&truth).map(|(&p, &t)| if t > 0.0 { log(p) - log(t) } else { f32::NAN }).collect();
            Ok(Image { bilinear, coarse, predicted, difference })
        })
        .collect::<Result<_, EvaluationError>>()?;
    let known = || images.iter().flat_map(|image| &image.difference).filter(|g| !g.is_nan()).map(|&g| f64::from(g));
    let count = known().count() as f64;
    let mean = known().sum::<f64>() / count;
    let variance = known().map(|g| (g - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    // A perfect prediction has no direction to go in.
    let loss = (variance + MEAN_WEIGHT * mean * mean).sqrt().max(1e-6);
    let gradients = images
        .par_iter()
        .zip(parts)
        .map(|(image, part)| {
            let of_coarse = image.bilinear.gradient(&image.coarse, |pixel, _, gradient| {
                let g = f64::from(image.difference[pixel]);
                let slope = ((g - mean) / (count - 1.0).max(1.0) + MEAN_WEIGHT * mean / count) / loss;
                let p = image.predicted[pixel];
                gradient[0] = if g.is_nan() { 0.0 } else { slope as f32 / (p + LOG_OFFSET) };
            });
            output.gradient(part.values, range, &of_coarse)
        })
        .collect();
    Ok((loss, gradients))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::encoder::tests::{backbone, config};
    use burn::tensor::Device;
    use dinoxide_data::{DecodeLimits, MapKind, Pairing};

    const RANGE: DepthRange = DepthRange { min: 0.5, max: 8.0 };

    /// The loss of everything at once, in double precision, with loops.
    fn naive(
        values: &[Vec<f64>],
        grids: &[(usize, usize)],
        truth: &[Vec<f32>],
        sizes: &[(usize, usize)],
        bins: usize,
    ) -> f64 {
        let mut differences = Vec::new();
        for (i, values) in values.iter().enumerate() {
            let ((h, w), (height, width)) = (grids[i], sizes[i]);
            let depth = |y: usize, x: usize| {
                let x = &values[(y * w + x) * bins..][..bins];
                if bins == 1 {
                    return x[0].max(0.0) + 0.5;
                }
                let weights: Vec<f64> = x.iter().map(|x| x.max(0.0) + 0.1).collect();
                let centers = (0..bins).map(|k| 0.5 + 7.5 * k as f64 / (bins - 1) as f64);
                weights.iter().zip(centers).map(|(w, c)| w * c).sum::<f64>() / weights.iter().sum::<f64>()
            };
            let tap = |i: usize, from: usize, to: usize| {
                let at = ((i as f64 + 0.5) * from as f64 / to as f64 - 0.5).clamp(0.0, (from - 1) as f64);
                (at as usize, (at as usize + 1).min(from - 1), at - at.floor())
            };
            for y in 0..height {
                for x in 0..width {
                    let t = f64::from(truth[i][y * width + x]);
                    if t == 0.0 {
                        continue;
                    }
                    let ((y0, y1, v), (x0, x1, u)) = (tap(y, h, height), tap(x, w, width));
                    let row = |y| depth(y, x0) * (1.0 - u) + depth(y, x1) * u;
                    differences.push((row(y0) * (1.0 - v) + row(y1) * v + 1e-3).ln() - (t + 1e-3).ln());
                }
            }
        }
        let n = differences.len() as f64;
        let mean = differences.iter().sum::<f64>() / n;
        let variance = differences.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / (n - 1.0);
        (variance + 0.15 * mean * mean).sqrt()
    }

    #[test]
    fn the_loss_equals_loops_and_its_gradient_finite_differences() {
        let (grids, sizes) = ([(2, 3), (3, 1)], [(5, 4), (2, 6)]);
        let mut cases = 0;
        for (output, bins) in [(DepthOutput::Bins(4), 4), (DepthOutput::Regression, 1)] {
            let values: Vec<Vec<f32>> = grids
                .iter()
                .map(|(h, w)| (0..h * w * bins).map(|i| ((i * i) as f32 * 0.9 + *h as f32).sin() * 2.0 + 0.3).collect())
                .collect();
            let truth: Vec<Vec<f32>> = sizes
                .iter()
                .map(|(h, w)| (0..h * w).map(|i| [1.0, 0.0, 2.5, 7.0, 4.0][(i * i / 2) % 5]).collect())
                .collect();
            let mut scratch = Scratch::new().unwrap();
            let stored: Vec<_> =
                truth.iter().zip(sizes).map(|(truth, size)| (scratch.push_floats(truth).unwrap(), size)).collect();
            let parts: Vec<Outputs<'_>> =
                (0..2).map(|image| Outputs { image, grid: grids[image], values: &values[image] }).collect();
            let (loss, gradients) = batch_loss(&parts, &scratch, &stored, output, RANGE).unwrap();
            let wide: Vec<Vec<f64>> = values.iter().map(|v| v.iter().map(|&v| f64::from(v)).collect()).collect();
            assert!((loss - naive(&wide, &grids, &truth, &sizes, bins)).abs() < 1e-5);
            for (image, gradient) in gradients.iter().enumerate() {
                for (i, &found) in gradient.iter().enumerate() {
                    let moved = |by: f64| {
                        let mut wide = wide.clone();
                        wide[image][i] += by;
                        naive(&wide, &grids, &truth, &sizes, bins)
                    };
                    let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    assert!((f64::from(found) - expected).abs() < 1e-5, "{output:?} {image} {i}: {found} {expected}");
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, (6 + 3) * (4 + 1));
    }

    #[test]
    fn a_head_beats_the_mean_on_built_in_images() {
        let pairing = Pairing { images: "synthetic:images=24,size=32x40".into(), ..Pairing::default() };
        let source = AnnotatedSource::open(&pairing, MapKind::Depth, &DecodeLimits::default()).unwrap();
        let (backbone, device) = (backbone(), Device::flex());
        let images = DepthImages { source: &source, scale: 1.0 };
        let range = DepthRange { min: 0.001, max: 10.5 };
        let mut seen = 0;
        for (output, window) in
            [(DepthOutput::Bins(32), 64), (DepthOutput::Bins(32), 16), (DepthOutput::Regression, 64)]
        {
            let encoder = Encoder::new(&backbone, &config(window), &device).unwrap();
            let head_config =
                HeadConfig { iterations: 120, batch_size: 6, learning_rate: 0.02, ..HeadConfig::default() };
            let (head, mean, rejected) =
                DepthHead::train(&encoder, images, (output, range), &head_config, &mut |_, _, _| ()).unwrap();
            assert!(rejected.is_empty() && (1.0..8.0).contains(&mean), "{mean}");
            let found = validate(&head, &encoder, images, mean, &mut |_, _| ()).unwrap();
            let (ours, constant) = (found.mean.scores().unwrap(), found.constant.scores().unwrap());
            assert!(ours.silog < constant.silog, "{output:?} {window}: {} {}", ours.silog, constant.silog);
            seen += 1;
        }
        assert_eq!(seen, 3);
    }

    #[test]
    fn maps_without_a_depth_and_settings_out_of_range_are_refused() {
        let pairing = Pairing { images: "synthetic:images=3,size=32".into(), ..Pairing::default() };
        let source = AnnotatedSource::open(&pairing, MapKind::Depth, &DecodeLimits::default()).unwrap();
        let backbone = backbone();
        let encoder = Encoder::new(&backbone, &config(32), &Device::flex()).unwrap();
        let refused = |output, range, scale| {
            let source = source.select(&[0, 2]);
            let images = DepthImages { source: &source, scale };
            let trained =
                DepthHead::train(&encoder, images, (output, range), &HeadConfig::default(), &mut |_, _, _| ());
            trained.err().expect("refused").to_string()
        };
        let far = DepthRange { min: 20.0, max: 30.0 };
        let message = refused(DepthOutput::Regression, far, 1.0);
        assert!(
            message.contains("none of the 2 depth map(s)") && message.contains("20") && message.contains("30"),
            "{message}"
        );
        assert!(refused(DepthOutput::Bins(1), RANGE, 1.0).contains("`bins` is 1"));
        assert!(refused(DepthOutput::Regression, RANGE, 0.0).contains("`scale` is 0"));
        assert!(refused(DepthOutput::Regression, DepthRange { min: 2.0, max: 1.0 }, 1.0).contains("2 to 1 m"));
    }
}
