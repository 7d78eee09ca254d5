//! A backbone that is not trained, how whole images get into it, and the features it gave.

use std::rc::Rc;
use std::sync::Arc;

use dinoxide_data::Rejected;
use dinoxide_evaluation::copies::descriptor::{Described, describe};
use dinoxide_evaluation::{Extracted, Extraction, FeatureSource, Token, extract, readable};

use super::given::{Given, Weights};
use super::sets::Set;
use crate::Usage;
use crate::terminal::Log;

/// A backbone, and how whole images get into it.
#[derive(clap::Args)]
pub(crate) struct Network {
    #[command(flatten)]
    pub(crate) given: Weights,
    #[command(flatten)]
    pub(crate) crops: Crops,
}

/// How whole images get into a backbone.
#[derive(clap::Args)]
pub(crate) struct Crops {
    /// Side of the crop that the backbone sees, in pixels; default: the size it was trained at
    #[arg(long, value_name = "PX")]
    pub(crate) crop: Option<usize>,
    /// Length of the shorter image side before cropping, in pixels; default: the crop
    #[arg(long, value_name = "PX")]
    pub(crate) resize: Option<usize>,
    /// Images in one forward. Out of memory: lower
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) batch_size: usize,
}

impl Crops {
    /// Side of the crop that a backbone sees.
    pub(crate) fn crop_px(&self, given: &Given) -> usize {
        self.crop.unwrap_or(given.description.image_size)
    }
}

/// What stands for an image.
#[derive(clap::Args)]
pub(crate) struct Tokens {
    /// What stands for an image; with several, each is divided by its norm and they are put side by side
    #[arg(long, value_name = "TOKENS,TOKENS,…", value_delimiter = ',', default_value = "cls")]
    tokens: Vec<ImageToken>,
}

/// A token that can stand for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum ImageToken {
    /// The CLS token
    Cls,
    /// The mean of the patch tokens
    Mean,
}

impl Tokens {
    /// In one order, each once.
    pub(crate) fn chosen(&self) -> Vec<Token> {
        let mut chosen = self.tokens.clone();
        chosen.sort_unstable();
        chosen.dedup();
        let token = |token| match token {
            ImageToken::Cls => Token::Cls,
            ImageToken::Mean => Token::PatchMean,
        };
        chosen.into_iter().map(token).collect()
    }
}

/// A backbone that is not trained, and the features it gave so far.
pub(crate) struct Frozen {
    pub(crate) given: Rc<Given>,
    /// That of `given`.
    pub(crate) device: burn::tensor::Device,
    pub(crate) extraction: Extraction,
    pub(crate) log: Log,
    seen: Vec<(String, Arc<Extracted>)>,
}

impl Frozen {
    pub(crate) fn new(network: &Network, last_blocks: usize) -> anyhow::Result<Self> {
        Self::of(network.given.load()?, &network.crops, last_blocks)
    }

    /// Of a backbone that is loaded.
    pub(crate) fn of(given: Rc<Given>, crops: &Crops, last_blocks: usize) -> anyhow::Result<Self> {
        if crops.batch_size == 0 {
            return Err(Usage(anyhow::anyhow!("`--batch-size` is 0, must be at least 1")).into());
        }
        let crop_px = crops.crop_px(&given);
        let description = &given.description;
        let extraction = Extraction {
            resize_px: crops.resize.unwrap_or(crop_px),
            crop_px,
            mean: description.mean,
            std: description.std,
            last_blocks: last_blocks.min(description.architecture.layers()),
            batch: crops.batch_size,
        };
        Ok(Self { device: given.device.clone(), given, extraction, log: Log::new(None)?, seen: Vec::new() })
    }

    /// The features of a set; a set of the same name is not looked at again.
    pub(crate) fn features(&mut self, set: &Set) -> anyhow::Result<Arc<Extracted>> {
        if let Some((_, found)) = self.seen.iter().find(|(name, _)| *name == set.name) {
            return Ok(Arc::clone(found));
        }
        let indices: Vec<usize> = (0..set.source.len()).collect();
        let log = &mut self.log;
        log.bar(indices.len() as u64, 0, "{bar:28} features of {pos}/{len} images, {eta} left");
        let mut progress = |done: usize| log.set(done as u64, String::new());
        let found =
            extract(&self.given.backbone, &*set.source, &indices, &self.extraction, &self.device, &mut progress);
        log.clear();
        let found = Arc::new(found?);
        self.warn(&found.rejected);
        self.seen.push((set.name.clone(), Arc::clone(&found)));
        Ok(found)
    }

    /// Descriptors of the images `indices` of a set.
    pub(crate) fn descriptors(&mut self, set: &Set, indices: &[usize]) -> anyhow::Result<Described> {
        let log = &mut self.log;
        log.bar(indices.len() as u64, 0, "{bar:28} descriptors of {pos}/{len} images, {eta} left");
        let mut progress = |done: usize| log.set(done as u64, String::new());
        let found =
            describe(&self.given.backbone, &*set.source, indices, &self.extraction, &self.device, &mut progress);
        log.clear();
        let found = found?;
        self.warn(&found.rejected);
        Ok(found)
    }

    /// The images of a set that can be read. What cannot be is left out with a warning.
    pub(crate) fn readable(&mut self, set: &Set) -> anyhow::Result<Vec<usize>> {
        let log = &mut self.log;
        log.bar(set.source.len() as u64, 0, "{bar:28} {pos}/{len} images read once, {eta} left");
        let found = readable(&*set.source, &mut |done| log.set(done as u64, String::new()));
        log.clear();
        let (indices, rejected) = found?;
        self.warn(&rejected);
        Ok(indices)
    }

    /// Lists images that could not be read.
    fn warn(&mut self, rejected: &[Rejected]) {
        for rejected in rejected {
            self.log.line(&format!("warning: {}: {}; left out", rejected.id, rejected.reason));
        }
    }

    /// How features of the last `blocks` blocks come to be; `train` is empty where nothing is trained.
    pub(crate) fn source(&self, train: &str, val: &str, tokens: Vec<Token>, blocks: usize) -> FeatureSource {
        let depth = self.given.backbone.architecture().layers();
        FeatureSource {
            backbone: self.given.name(),
            train_data: train.to_owned(),
            val_data: val.to_owned(),
            tokens,
            layers: (depth - blocks..depth).collect(),
            final_norm: true,
            resize_px: self.extraction.resize_px,
            crop_px: self.extraction.crop_px,
            interpolation: "bicubic, antialias".into(),
            augmentation: "none".into(),
        }
    }
}
