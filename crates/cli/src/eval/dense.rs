//! What evaluations of patch tokens begin with: the arguments, the backbone, images with their maps.

use std::path::PathBuf;

use dinoxide_data::{AnnotatedSource, DecodeLimits, MapKind, Pairing, Rejected};
use dinoxide_evaluation::dense::{Encoder, HeadConfig, TokenGridConfig};
use dinoxide_evaluation::{FeatureSource, Report, Token};
use dinoxide_exchange::{Loaded, load};
use dinoxide_model::Backbone;
use dinoxide_model::weights::Description;
use serde::Serialize;
use serde_json::json;

use super::common::{Output, named};
use crate::terminal::{self, Log};
use crate::{Usage, device};

/// Side of the windows of large images, unless the patch size asks for a little less.
const WINDOW_PX: usize = 512;

/// A backbone, and the size at which it sees images.
#[derive(clap::Args)]
pub(crate) struct Seen {
    /// Weights: a run's `teacher.safetensors`, a `.pth` file of the DINO repositories, a Hugging Face folder, a timm file
    #[arg(long, value_name = "PATH")]
    pub(crate) weights: PathBuf,
    /// Length of the shorter image side, in pixels, before both are rounded to whole patches; default: images keep theirs
    #[arg(long, value_name = "PX")]
    resize: Option<usize>,
    /// Where to compute: `cpu`, `cuda:0`, `vulkan:0`, `metal`
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
}

/// How many blocks' tokens are used.
#[derive(clap::Args)]
pub(crate) struct Layers {
    /// Tokens of this many last blocks side by side; of a ConvNeXt, stages
    #[arg(long, value_name = "N", default_value_t = 1)]
    layers: usize,
}

/// What heads on patch tokens share.
#[derive(clap::Args)]
pub(crate) struct DenseCommon {
    #[command(flatten)]
    pub(crate) seen: Seen,
    #[command(flatten)]
    layers: Layers,
    /// Images with a longer side are seen in windows of this side, in pixels; default: 512, in whole patches
    #[arg(long, value_name = "PX")]
    window: Option<usize>,
}

/// A task with a head, trained and scored.
#[derive(clap::Args)]
pub(crate) struct Scored<T: clap::Args> {
    #[command(flatten)]
    pub(super) task: T,
    #[command(flatten)]
    pub(super) output: Output,
}

/// Two sets of images with a mask or depth map each.
#[derive(clap::Args)]
pub(crate) struct PairArgs {
    /// Images to train the head on: a folder with `img/` and `mask/` (or `depth/`), or with `NAME.jpg` and `NAME-mask.png`
    /// (or `NAME.depth.png`), or `synthetic`
    #[arg(long, value_name = "DIR")]
    pub(crate) train: String,
    /// Images to score; the same layouts
    #[arg(long, value_name = "DIR")]
    pub(crate) val: Option<String>,
    /// Folder of the masks or depth maps of `--train`, where the layout is another
    #[arg(long, value_name = "DIR")]
    pub(crate) train_maps: Option<PathBuf>,
    /// Folder of the masks or depth maps of `--val`
    #[arg(long, value_name = "DIR")]
    pub(crate) val_maps: Option<PathBuf>,
    /// Text file with the names to use of `--train`, a line each, without extension
    #[arg(long, value_name = "FILE")]
    pub(crate) train_list: Option<PathBuf>,
    /// Text file with the names to use of `--val`
    #[arg(long, value_name = "FILE")]
    pub(crate) val_list: Option<PathBuf>,
    /// End of the images' names that their maps lack, such as `_leftImg8bit`; files without it are not used
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) image_suffix: String,
    /// End of the maps' names that their images lack, such as `_gtFine_labelTrainIds`; files without it are not used
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) map_suffix: String,
}

impl PairArgs {
    /// Opens the train images.
    pub(crate) fn open_train(&self, kind: MapKind, log: &mut Log) -> anyhow::Result<AnnotatedSource> {
        self.open(&self.train, &self.train_maps, &self.train_list, kind, log)
    }

    /// Opens the val images.
    pub(crate) fn open_val(&self, kind: MapKind, log: &mut Log) -> anyhow::Result<AnnotatedSource> {
        let Some(val) = &self.val else {
            return Err(Usage(anyhow::anyhow!("`--val` is missing: images to score, with their maps")).into());
        };
        self.open(val, &self.val_maps, &self.val_list, kind, log)
    }

    fn open(
        &self,
        images: &str,
        maps: &Option<PathBuf>,
        list: &Option<PathBuf>,
        kind: MapKind,
        log: &mut Log,
    ) -> anyhow::Result<AnnotatedSource> {
        let pairing = Pairing {
            images: images.to_owned(),
            maps: maps.clone(),
            list: list.clone(),
            image_suffix: self.image_suffix.clone(),
            map_suffix: self.map_suffix.clone(),
        };
        let source = AnnotatedSource::open(&pairing, kind, &DecodeLimits::default())?;
        if source.images_without_map() > 0 {
            let (without, with) = (source.images_without_map(), source.len());
            log.line(&format!("note: {images}: {without} images have no map and are left out, {with} have one"));
        }
        Ok(source)
    }
}

/// How a head is trained.
#[derive(clap::Args)]
pub(crate) struct HeadArgs {
    /// AdamW iterations
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) iterations: usize,
    /// Images, or windows of large ones, in an iteration
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) samples: usize,
    /// Highest learning rate
    #[arg(long, value_name = "RATE", default_value_t = 1e-3)]
    pub(crate) learning_rate: f64,
    /// Seed of initial weights, order of images and dropout
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

impl HeadArgs {
    /// The configuration, checked.
    pub(crate) fn config(&self, task: &'static str, defaults: HeadConfig) -> anyhow::Result<HeadConfig> {
        let config = HeadConfig {
            iterations: self.iterations,
            batch_size: self.samples,
            learning_rate: self.learning_rate,
            seed: self.seed,
            ..defaults
        };
        config.check(task).map_err(|e| Usage(e.into()))?;
        Ok(config)
    }
}

/// A backbone from a file, and how images are fed to it.
pub(crate) struct DenseSetup {
    weights: String,
    pub(crate) backbone: Backbone,
    pub(crate) description: Description,
    pub(crate) config: TokenGridConfig,
    pub(crate) device: burn::tensor::Device,
    pub(crate) log: Log,
}

impl DenseSetup {
    /// For heads: large images in windows.
    pub(crate) fn windowed(common: &DenseCommon) -> anyhow::Result<Self> {
        Self::new(&common.seen, common.window, common.layers.layers)
    }

    /// For what sees images whole.
    pub(crate) fn whole(seen: &Seen, layers: &Layers) -> anyhow::Result<Self> {
        Self::new(seen, None, layers.layers)
    }

    /// For the last block, seeing images whole.
    pub(crate) fn last_block(seen: &Seen) -> anyhow::Result<Self> {
        Self::new(seen, None, 1)
    }

    fn new(seen: &Seen, window: Option<usize>, last_blocks: usize) -> anyhow::Result<Self> {
        let device = device::parse(&seen.device)?;
        let Loaded { backbone, description, notes, .. } = load(&seen.weights, &device)?;
        terminal::notes(&seen.weights, &notes);
        let stride = description.architecture.stride();
        let config = TokenGridConfig {
            short_px: seen.resize,
            window_px: window.unwrap_or((WINDOW_PX / stride).max(1) * stride),
            last_blocks,
            mean: description.mean,
            std: description.std,
        };
        Encoder::new(&backbone, &config, &device).map_err(|e| Usage(e.into()))?;
        let weights = seen.weights.display().to_string();
        Ok(Self { weights, backbone, description, config, device, log: Log::new(None)? })
    }

    /// The encoder. The settings have been checked.
    pub(crate) fn encoder(&self) -> anyhow::Result<Encoder<'_>> {
        Ok(Encoder::new(&self.backbone, &self.config, &self.device)?)
    }

    /// Where features come from, for a protocol.
    pub(crate) fn source(&self, train_data: &str, val_data: &str) -> FeatureSource {
        let depth = self.backbone.architecture().layers();
        FeatureSource {
            backbone: named(&self.weights, &self.description.provenance),
            train_data: train_data.to_owned(),
            val_data: val_data.to_owned(),
            tokens: vec![Token::Patches],
            layers: (depth - self.config.last_blocks..depth).collect(),
            final_norm: true,
            resize_px: self.config.short_px.unwrap_or(0),
            crop_px: self.config.window_px,
            interpolation: "bicubic, antialias".into(),
            augmentation: "none".into(),
        }
    }

    /// The JSON result of an evaluation; it may have further entries.
    pub(crate) fn result(&self, task: &str, report: &Report<impl Serialize>) -> serde_json::Value {
        json!({
            "task": task,
            "weights": self.weights,
            "provenance": self.description.provenance,
            "protocol": report.protocol,
            "scores": report.scores,
        })
    }
}

/// Lists what could not be read.
pub(crate) fn warn(log: &mut Log, rejected: &[Rejected]) {
    for rejected in rejected {
        log.line(&format!("warning: {}: {}; left out", rejected.id, rejected.reason));
    }
}

/// Shows the stages of a head's training as bars.
pub(crate) fn stages(log: &mut Log) -> impl FnMut(&'static str, usize, usize) + '_ {
    let mut last = "";
    move |stage, done, of| {
        if last != stage {
            last = stage;
            log.bar(
                of as u64,
                0,
                match stage {
                    "tokens" => "{bar:28} tokens of {pos}/{len} train images, {eta} left",
                    "choice" => "{bar:28} attention and components of {pos}/{len} train images, {eta} left",
                    "scoring" => "{bar:28} scoring {pos}/{len} val images, {eta} left",
                    _ => "{bar:28} head {pos}/{len} iterations, {eta} left",
                },
            );
        }
        log.set(done as u64, String::new());
    }
}
