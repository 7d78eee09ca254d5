//! Features of images from a frozen backbone: what every evaluation starts from.

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_augmentation::{EvalTransform, Resizer, RgbImage, normalize};
use dinoxide_data::{Rejected, Source};
use dinoxide_kernels::run_on;
use dinoxide_model::{Architecture, Backbone, LayerFeatures, weights::host};
use rayon::prelude::*;

use crate::{EvaluationError, Features, LabeledFeatures, Token};

/// How features are extracted.
#[derive(Clone, Debug, PartialEq)]
pub struct Extraction {
    /// Length of the shorter image side after resizing, in pixels.
    pub resize_px: usize,
    /// Side of the central crop, in pixels.
    pub crop_px: usize,
    /// Mean of the colour channels.
    pub mean: [f32; 3],
    /// Their standard deviation.
    pub std: [f32; 3],
    /// CLS tokens of this many last blocks; of a ConvNeXt, stages.
    pub last_blocks: usize,
    /// Images in one forward.
    pub batch: usize,
}

/// Features of a set of images, row by row in the order asked for.
#[derive(Clone, Debug)]
pub struct Extracted {
    /// CLS tokens of the last blocks after the final norm, oldest block first; each `[n, D]`. A ConvNeXt's are the mean
    /// patches of its last stages, each of that stage's width, and only the last after the norm.
    pub cls: Vec<Features>,
    /// Mean patch token of the last block after the final norm, `[n, D]`.
    pub patch_mean: Features,
    /// The index in the source of each row.
    pub indices: Vec<usize>,
    /// Images that could not be read and have no row.
    pub rejected: Vec<Rejected>,
}

impl Extracted {
    /// The CLS tokens of the last block.
    ///
    /// # Panics
    /// Never: [`extract`] refuses to extract no block.
    pub fn last_cls(&self) -> &Features {
        self.cls.last().expect("at least one block")
    }

    /// One feature vector per image: the CLS token of the last block, the mean patch token, or several of them side by side,
    /// each divided by its norm, so that none outweighs the others in a cosine.
    ///
    /// # Shapes
    /// `[n, D]` for one token, `[n, tokens·D]` for several.
    ///
    /// # Errors
    /// If no token is asked for, or one that is not extracted here.
    pub fn image_features(&self, tokens: &[Token]) -> Result<Features, EvaluationError> {
        let of = |token: &Token| match token {
            Token::Cls => Ok(self.last_cls()),
            Token::PatchMean => Ok(&self.patch_mean),
            Token::PatchGem | Token::Patches => Err(EvaluationError::Extraction {
                message: format!("an image is described by `cls` and `patch_mean`, not by {token:?}"),
            }),
        };
        match tokens {
            [token] => of(token).cloned(),
            several => {
                let parts: Result<Vec<Features>, _> =
                    several.iter().map(|t| of(t).map(Features::l2_normalized)).collect();
                Features::concat(&parts?.iter().collect::<Vec<_>>())
            }
        }
    }

    /// `features`, which must be of these rows, with the labels of the source.
    ///
    /// # Errors
    /// If the source is not labelled.
    pub fn labeled(&self, features: &Features, source: &dyn Source) -> Result<LabeledFeatures, EvaluationError> {
        let labels: Option<Vec<u32>> = self.indices.iter().map(|&index| source.label(index)).collect();
        LabeledFeatures::new(features.clone(), labels.ok_or(EvaluationError::Unlabelled)?, source.classes().len())
    }
}

/// Tokens of the readable images of one forward.
#[derive(Debug)]
pub struct Batch {
    /// The index in the source of each row.
    pub indices: Vec<usize>,
    /// Tokens of the last blocks after the final norm, oldest block first. Not checked to be finite.
    pub layers: Vec<LayerFeatures>,
}

/// Runs `backbone` over the images `indices` of `source` and collects their features. Images that cannot be read are left
/// out and listed.
///
/// `progress` is called with the number of images done.
///
/// # Errors
/// Sizes that do not fit, no readable image, or features that are not finite.
pub fn extract(
    backbone: &Backbone,
    source: &dyn Source,
    indices: &[usize],
    how: &Extraction,
    device: &Device,
    progress: &mut dyn FnMut(usize),
) -> Result<Extracted, EvaluationError> {
    let mut cls = vec![Vec::new(); how.last_blocks];
    let mut patch_mean = Vec::new();
    let mut rows = Vec::with_capacity(indices.len());
    let rejected = for_each_batch(backbone, source, indices, how, device, progress, &mut |batch| {
        for (into, layer) in cls.iter_mut().zip(&batch.layers) {
            into.extend(host(layer.cls.clone().reshape([-1])));
        }
        let last = batch.layers.into_iter().next_back().expect("at least one block");
        patch_mean.extend(host(last.patches.mean_dim(1).reshape([-1])));
        rows.extend(batch.indices);
        Ok(())
    })?;
    if rows.is_empty() {
        return Err(EvaluationError::NothingReadable { rejected });
    }
    let features = |values: Vec<f32>| {
        Features::new(rows.len(), values.len() / rows.len(), values).map_err(|error| match error {
            EvaluationError::NonFinite { row, value, rows_affected, .. } => {
                EvaluationError::NonFiniteImage { image: source.id(rows[row]), value, images_affected: rows_affected }
            }
            other => other,
        })
    };
    Ok(Extracted {
        cls: cls.into_iter().map(features).collect::<Result<_, _>>()?,
        patch_mean: features(patch_mean)?,
        indices: rows.clone(),
        rejected,
    })
}

/// Runs `backbone` over the images `indices` of `source`, batch by batch, so that only one batch of tokens exists at a time.
/// Images that cannot be read are left out and returned.
///
/// `progress` is called with the number of images done.
///
/// # Errors
/// Sizes that do not fit, or whatever `visit` returns.
pub fn for_each_batch<E: From<EvaluationError>>(
    backbone: &Backbone,
    source: &dyn Source,
    indices: &[usize],
    how: &Extraction,
    device: &Device,
    progress: &mut dyn FnMut(usize),
    visit: &mut dyn FnMut(Batch) -> Result<(), E>,
) -> Result<Vec<Rejected>, E> {
    let (transform, layers) = how.check(&backbone.architecture())?;
    let (mut done, mut rejected) = (0, Vec::new());
    for chunk in indices.chunks(how.batch) {
        let read: Vec<Result<RgbImage, Rejected>> = chunk
            .par_iter()
            .map(|&index| match source.read(index) {
                Ok(image) => Ok(transform.apply(&image, &mut Resizer::default())),
                Err(e) => Err(Rejected { index, id: e.id, reason: e.reason.to_string() }),
            })
            .collect();
        let mut images = Vec::with_capacity(chunk.len());
        let mut rows = Vec::with_capacity(chunk.len());
        for (&index, outcome) in chunk.iter().zip(read) {
            match outcome {
                Ok(image) => {
                    rows.push(index);
                    images.push(image);
                }
                Err(why) => rejected.push(why),
            }
        }
        if !images.is_empty() {
            let crops = pixels(&images, how, device);
            let layers = run_on(device, || backbone.forward_layers(crops, &layers, true));
            visit(Batch { indices: rows, layers })?;
        }
        done += chunk.len();
        progress(done);
    }
    Ok(rejected)
}

/// Crops as the backbone sees them, `[B, 3, crop, crop]`.
pub(crate) fn pixels(crops: &[RgbImage], how: &Extraction, device: &Device) -> Tensor<4> {
    let side = how.crop_px;
    let values = normalize(crops.iter(), (side as u32, side as u32), how.mean, how.std);
    Tensor::from_data(TensorData::new(values, [crops.len(), 3, side, side]), device)
}

impl Extraction {
    /// Checks that a backbone can take what is asked for, before any image is read: the transform, and the layers.
    pub(crate) fn check(&self, architecture: &Architecture) -> Result<(EvalTransform, Vec<usize>), EvaluationError> {
        let depth = architecture.layers();
        let extraction = |message: String| EvaluationError::Extraction { message };
        let transform = EvalTransform::new(self.resize_px, self.crop_px).map_err(|e| extraction(e.to_string()))?;
        architecture.grid(self.crop_px, self.crop_px).map_err(|e| extraction(e.to_string()))?;
        if self.last_blocks == 0 || self.last_blocks > depth {
            return Err(EvaluationError::BlockCount { asked: self.last_blocks, available: depth });
        }
        let channels = architecture.in_channels();
        if channels != 3 {
            return Err(extraction(format!("the backbone takes images of {channels} channels, these have 3")));
        }
        if self.batch == 0 {
            return Err(extraction("a forward of 0 images".into()));
        }
        Ok((transform, (depth - self.last_blocks..depth).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_tokens_are_each_of_length_one_and_side_by_side() {
        let of = |values: &[f32]| Features::new(2, values.len() / 2, values.to_vec()).unwrap();
        let found = Extracted {
            cls: vec![of(&[9.0, 9.0, 9.0, 9.0]), of(&[3.0, 4.0, 0.0, 0.5])],
            patch_mean: of(&[0.0, 0.0, 2.0, -6.0, 0.0, 8.0]),
            indices: vec![5, 2],
            rejected: Vec::new(),
        };
        // One alone stays as it is: a cosine does not see its length, a regression may.
        assert_eq!(found.image_features(&[Token::Cls]).unwrap(), of(&[3.0, 4.0, 0.0, 0.5]));
        assert_eq!(found.image_features(&[Token::PatchMean]).unwrap(), found.patch_mean);
        let both = found.image_features(&[Token::Cls, Token::PatchMean]).unwrap();
        assert_eq!(both, of(&[0.6, 0.8, 0.0, 0.0, 1.0, 0.0, 1.0, -0.6, 0.0, 0.8]));
        let turned = found.image_features(&[Token::PatchMean, Token::Cls]).unwrap();
        assert_eq!(turned.row(0), [0.0, 0.0, 1.0, 0.6, 0.8]);
        for tokens in [&[][..], &[Token::Cls, Token::Patches], &[Token::PatchGem]] {
            assert!(found.image_features(tokens).is_err(), "{tokens:?}");
        }
    }
}
