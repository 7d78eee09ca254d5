//! k-NN during training: what the teacher's features are worth, on images whose classes are known.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use dinoxide_augmentation::AugmentationConfig;
use dinoxide_data::{DecodeLimits, Rejected, Source, open};
use dinoxide_evaluation::{
    EvaluationError, Extraction, FeatureSource, KnnConfig, Protocol, Token, extract, knn, spectrum,
};
use dinoxide_model::Backbone;

use crate::error::TrainError;
use crate::metrics::KnnLine;
use crate::recipe::{EvalConfig, Recipe};

/// A k-NN evaluation that a run repeats.
pub struct Monitor {
    train: Arc<dyn Source>,
    val: Arc<dyn Source>,
    train_indices: Vec<usize>,
    val_indices: Vec<usize>,
    extraction: Extraction,
    config: EvalConfig,
    /// What a report calls the two sets.
    names: (String, String),
    /// Where their images are.
    specs: (String, String),
}

/// What a [`Monitor`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// Accuracies.
    pub knn: KnnLine,
    /// Effective rank of the features of the classified images.
    pub effective_rank: f64,
    /// Width of the features.
    pub embed_dim: usize,
    /// The conditions of the measurement.
    pub protocol: Protocol,
}

/// Every how many images one is held out, where no images to classify are given.
const HELD_OUT: usize = 10;
/// Images in one forward of the teacher.
const BATCH: usize = 64;

/// Indices by class, then by index.
fn by_class(source: &dyn Source, mut indices: Vec<usize>) -> Vec<usize> {
    indices.sort_by_key(|&index| (source.label(index), index));
    indices
}

/// All images of a source, less every tenth of each class; and those.
fn hold_out(source: &dyn Source) -> (Vec<usize>, Vec<usize>) {
    let (mut kept, mut held) = (Vec::new(), Vec::new());
    let (mut class, mut place) = (None, 0);
    for index in by_class(source, (0..source.len()).collect()) {
        if class != Some(source.label(index)) {
            (class, place) = (Some(source.label(index)), 0);
        }
        place += 1;
        if place % HELD_OUT == 0 { &mut held } else { &mut kept }.push(index);
    }
    (kept, held)
}

/// `keep` of the indices, evenly from all classes, and at least one of each.
fn spread(source: &dyn Source, indices: Vec<usize>, keep: usize) -> Vec<usize> {
    let sorted = by_class(source, indices);
    let mut chosen: Vec<usize> = (0..keep).map(|i| sorted[i * sorted.len() / keep]).collect();
    // A class so small that the stride passed over it still needs an example.
    let known: BTreeSet<Option<u32>> = chosen.iter().map(|&index| source.label(index)).collect();
    let mut missing = sorted;
    missing.retain(|&index| !known.contains(&source.label(index)));
    missing.dedup_by_key(|index| source.label(*index));
    chosen.extend(missing);
    chosen
}

impl Monitor {
    /// The evaluation of a recipe that trains on `source`; `None` if there are no classes to tell apart, or too few images.
    ///
    /// # Errors
    /// Images that cannot be opened, or sets whose classes differ.
    pub fn new(recipe: &Recipe, source: &Arc<dyn Source>, limits: &DecodeLimits) -> Result<Option<Self>, TrainError> {
        let config = &recipe.eval;
        let (train, train_name) = match config.train.as_str() {
            "" => (source.clone(), recipe.data.source.clone()),
            spec => (open(spec, limits)?, spec.to_owned()),
        };
        if train.classes().len() < 2 {
            return match config.val.as_str() {
                "" => Ok(None),
                val => Err(TrainError::Recipe(format!(
                    "`eval.val` is \"{val}\", and `{train_name}` has no classes to classify it by\n\nhint: set `eval.train` to \
                     a folder with a folder for each class, or leave `eval.val` empty"
                ))),
            };
        }
        let all: Vec<usize> = (0..train.len()).collect();
        let (val, val_name, mut train_indices, val_indices) = match config.val.as_str() {
            "" => {
                let (kept, held) = hold_out(&*train);
                (train.clone(), format!("{train_name} (every tenth)"), kept, held)
            }
            spec => {
                let val = open(spec, limits)?;
                if val.classes() != train.classes() {
                    return Err(TrainError::Recipe(format!(
                        "`eval.val` \"{spec}\" has {} classes and `{train_name}` {}, or their names differ",
                        val.classes().len(),
                        train.classes().len()
                    )));
                }
                let indices = (0..val.len()).collect();
                (val, spec.to_owned(), all, indices)
            }
        };
        if config.max_train > 0 && train_indices.len() > config.max_train {
            train_indices = spread(&*train, train_indices, config.max_train);
        }
        // The effective rank takes two images.
        if val_indices.len() < 2 || train_indices.len() < config.k {
            return Ok(None);
        }
        let AugmentationConfig { mean, std, .. } = recipe.augmentation;
        let size = recipe.eval_size();
        let extraction = Extraction { resize_px: size, crop_px: size, mean, std, last_blocks: 1, batch: BATCH };
        let config = config.clone();
        let val_spec = if config.val.is_empty() { train_name.clone() } else { config.val.clone() };
        let (names, specs) = ((train_name.clone(), val_name), (train_name, val_spec));
        Ok(Some(Self { train, val, train_indices, val_indices, extraction, config, names, specs }))
    }

    /// The same evaluation with a full forward of training images and a few to classify: what one costs, in small.
    pub(crate) fn sample(mut self) -> Self {
        let thin = |indices: &mut Vec<usize>, count: usize| {
            let all = std::mem::take(indices);
            let count = count.min(all.len());
            *indices = (0..count).map(|i| all[i * all.len() / count]).collect();
        };
        thin(&mut self.train_indices, BATCH.max(self.config.k));
        thin(&mut self.val_indices, BATCH / 4);
        self
    }

    /// Images that each evaluation runs the backbone on.
    pub fn images(&self) -> usize {
        self.train_indices.len() + self.val_indices.len()
    }

    /// Evaluates a backbone. `progress` is called with the number of images done; images that cannot be read are left out
    /// and added to `rejected`, each under its path.
    ///
    /// # Errors
    /// Features that are not finite, or too few readable images.
    pub fn run(
        &self,
        backbone: &Backbone,
        device: &Device,
        progress: &mut dyn FnMut(usize),
        rejected: &mut Vec<Rejected>,
    ) -> Result<Finding, EvaluationError> {
        let mut features = |source: &dyn Source, indices: &[usize], spec: &str, done: usize| {
            let found = extract(backbone, source, indices, &self.extraction, device, &mut |n| progress(done + n));
            let bad = match &found {
                Ok(found) => &found.rejected[..],
                Err(EvaluationError::NothingReadable { rejected }) => rejected,
                Err(_) => &[],
            };
            let path = |id: &str| Path::new(spec).join(id).display().to_string();
            rejected.extend(bad.iter().map(|one| Rejected { id: path(&one.id), ..one.clone() }));
            found
        };
        let train = features(&*self.train, &self.train_indices, &self.specs.0, 0)?;
        let val = features(&*self.val, &self.val_indices, &self.specs.1, self.train_indices.len())?;
        let source = FeatureSource {
            backbone: "teacher".into(),
            train_data: self.names.0.clone(),
            val_data: self.names.1.clone(),
            tokens: vec![Token::Cls],
            layers: vec![backbone.architecture().layers() - 1],
            final_norm: true,
            resize_px: self.extraction.resize_px,
            crop_px: self.extraction.crop_px,
            interpolation: "bicubic, antialias".into(),
            augmentation: "none".into(),
        };
        let config = KnnConfig { k: vec![self.config.k], temperature: self.config.temperature, ..KnnConfig::default() };
        let train = train.labeled(train.last_cls(), &*self.train)?;
        let labeled = val.labeled(val.last_cls(), &*self.val)?;
        let report = knn(&train, &labeled, &source, &config, device)?;
        let accuracy = &report.scores.by_k[0].accuracy;
        let spectrum = spectrum(val.last_cls(), &source, false)?.scores;
        Ok(Finding {
            knn: KnnLine {
                top1: accuracy.top1,
                top5: accuracy.top5,
                k: self.config.k,
                chance: 100.0 / train.num_classes() as f64,
            },
            effective_rank: spectrum.effective_rank,
            embed_dim: spectrum.dim,
            protocol: report.protocol.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_keep_their_shares_whatever_their_order() {
        // Class i mod 12: a plain stride would miss classes.
        let source = open("synthetic:images=1200,size=16", &DecodeLimits::default()).expect("a source");
        let (kept, held) = hold_out(&*source);
        assert_eq!((kept.len(), held.len()), (1080, 120));
        let some = spread(&*source, kept, 240);
        for (indices, share) in [(held, 10), (some, 20)] {
            for class in 0..12 {
                assert_eq!(indices.iter().filter(|&&i| source.label(i) == Some(class)).count(), share);
            }
        }
    }
}
