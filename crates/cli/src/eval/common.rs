//! What every evaluation of a weight file begins with: the arguments, the backbone and the features of both sets.

use std::path::PathBuf;
use std::sync::Arc;

use dinoxide_data::{DecodeLimits, Source, open};
use dinoxide_evaluation::{Extracted, Extraction, FeatureSource, Token, extract};
use dinoxide_exchange::{Loaded, load};
use dinoxide_model::Backbone;
use dinoxide_model::weights::Description;

use crate::terminal::{self, Log};
use crate::{Usage, device};

#[derive(clap::Args)]
pub(super) struct Common {
    /// Weights: a run's `teacher.safetensors`, a `.pth` file of the DINO repositories, a Hugging Face folder, a timm file
    #[arg(long, value_name = "PATH")]
    pub(super) weights: PathBuf,
    /// Images of known classes: a folder per class, or `synthetic`
    #[arg(long, value_name = "DIR")]
    pub(super) train: String,
    /// Images to classify, of the same classes
    #[arg(long, value_name = "DIR")]
    pub(super) val: String,
    /// Side of the crop that the backbone sees, in pixels; default: the size it was trained at
    #[arg(long, value_name = "PX")]
    pub(super) crop: Option<usize>,
    /// Length of the shorter image side before cropping, in pixels; default: the crop
    #[arg(long, value_name = "PX")]
    pub(super) resize: Option<usize>,
    /// Images in one forward. Out of memory: lower
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(super) batch_size: usize,
    /// Where to compute: `cpu`, `cuda:0`, `vulkan:0`, `metal`
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub(super) device: String,
    /// Also write the result here as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) output: Option<PathBuf>,
    /// Print one JSON object on stdout and nothing else there
    #[arg(long)]
    pub(super) json: bool,
}

/// A backbone with the features of both sets.
pub(super) struct Setup {
    pub(super) backbone: Backbone,
    pub(super) description: Description,
    pub(super) device: burn::tensor::Device,
    pub(super) train: (Arc<dyn Source>, Extracted),
    pub(super) val: (Arc<dyn Source>, Extracted),
    pub(super) extraction: Extraction,
    pub(super) log: Log,
}

impl Setup {
    pub(super) fn new(common: &Common, last_blocks: usize) -> anyhow::Result<Self> {
        let device = device::parse(&common.device)?;
        if common.batch_size == 0 {
            return Err(Usage(anyhow::anyhow!("`--batch-size` is 0, must be at least 1")).into());
        }
        let Loaded { backbone, description, notes, .. } = load(&common.weights, &device)?;
        terminal::notes(&common.weights, &notes);
        let crop_px = common.crop.unwrap_or(description.image_size);
        let extraction = Extraction {
            resize_px: common.resize.unwrap_or(crop_px),
            crop_px,
            mean: description.mean,
            std: description.std,
            last_blocks: last_blocks.min(description.architecture.layers()),
            batch: common.batch_size,
        };
        let limits = DecodeLimits::default();
        let sources = [open(&common.train, &limits)?, open(&common.val, &limits)?];
        check_classes(&sources, common)?;
        let mut log = Log::new(None)?;
        let [train, val] = sources.map(|source| -> anyhow::Result<(Arc<dyn Source>, Extracted)> {
            let indices: Vec<usize> = (0..source.len()).collect();
            log.bar(indices.len() as u64, 0, "{bar:28} features of {pos}/{len} images, {eta} left");
            let mut progress = |done: usize| log.set(done as u64, String::new());
            let found = extract(&backbone, &*source, &indices, &extraction, &device, &mut progress)?;
            log.clear();
            for rejected in &found.rejected {
                log.line(&format!("warning: {}: {}; left out", rejected.id, rejected.reason));
            }
            Ok((source, found))
        });
        Ok(Self { backbone, description, device, train: train?, val: val?, extraction, log })
    }

    pub(super) fn source(&self, common: &Common, tokens: Vec<Token>, blocks: usize) -> FeatureSource {
        let depth = self.backbone.architecture().layers();
        let provenance = &self.description.provenance;
        let backbone = common.weights.display().to_string();
        FeatureSource {
            backbone: if provenance.is_known() {
                format!("{backbone}, after {} steps", provenance.steps)
            } else {
                backbone
            },
            train_data: common.train.clone(),
            val_data: common.val.clone(),
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

fn check_classes(sources: &[Arc<dyn Source>; 2], common: &Common) -> anyhow::Result<()> {
    let [train, val] = sources;
    for (source, spec) in [(train, &common.train), (val, &common.val)] {
        if source.classes().is_empty() {
            anyhow::bail!(
                "{spec}: the images have no classes\n\nhint: put each class into a folder of its own, `{spec}/<class>/<image>`"
            );
        }
    }
    let unknown: Vec<&str> =
        val.classes().iter().filter(|class| !train.classes().contains(class)).map(String::as_str).collect();
    if !unknown.is_empty() {
        anyhow::bail!(
            "{}: {} of its classes are not in {}: {}",
            common.val,
            unknown.len(),
            common.train,
            unknown[..unknown.len().min(5)].join(", ")
        );
    }
    if val.classes() != train.classes() {
        anyhow::bail!(
            "{} has {} classes and {} has {}: labels would not mean the same\n\nhint: give both the same class folders",
            common.val,
            val.classes().len(),
            common.train,
            train.classes().len()
        );
    }
    Ok(())
}
