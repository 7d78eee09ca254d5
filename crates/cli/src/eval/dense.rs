//! What evaluations of patch tokens begin with: the arguments, the backbone, images with their maps.

use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

use dinoxide_data::{AnnotatedSource, DecodeLimits, MapKind, Pairing, Rejected, is_synthetic};
use dinoxide_evaluation::dense::{Encoder, HeadConfig, HeadKind, TokenGridConfig, dpt};
use dinoxide_evaluation::{FeatureSource, Token};

use super::given::{Given, Weights};
use super::outcome::{Outcome, Output};
use crate::Usage;
use crate::terminal::Log;

/// Side of the windows of large images, unless the patch size asks for a little less.
const WINDOW_PX: usize = 512;

/// The size at which images are seen.
#[derive(clap::Args)]
pub(crate) struct Seen {
    /// Length of the shorter image side, in pixels, before both are rounded to whole patches; default: images keep theirs
    #[arg(long, value_name = "PX")]
    resize: Option<usize>,
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
    seen: Seen,
    #[command(flatten)]
    layers: Layers,
    /// Images with a longer side are seen in windows of this side, in pixels; default: 512, in whole patches
    #[arg(long, value_name = "PX")]
    window: Option<usize>,
}

/// An evaluation of patch tokens: its data and settings.
pub(crate) trait DenseTask {
    /// Measures. Images are seen at sizes of the task's own.
    fn run(&self, given: &Rc<Given>) -> anyhow::Result<Outcome>;
}

/// One evaluation of one backbone's patch tokens.
#[derive(clap::Args)]
pub(crate) struct Scored<T: clap::Args> {
    #[command(flatten)]
    given: Weights,
    #[command(flatten)]
    task: T,
    #[command(flatten)]
    output: Output,
}

impl<T: clap::Args + DenseTask> Scored<T> {
    pub(super) fn run(&self) -> anyhow::Result<ExitCode> {
        self.output.check()?;
        let given = self.given.load()?;
        let outcome = self.task.run(&given)?;
        self.output.deliver(&given.result(&outcome), &outcome.text())
    }
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
    #[arg(long, value_name = "DIR", requires = "val")]
    pub(crate) val_maps: Option<PathBuf>,
    /// Text file with the names to use of `--train`, a line each, without extension
    #[arg(long, value_name = "FILE")]
    pub(crate) train_list: Option<PathBuf>,
    /// Text file with the names to use of `--val`
    #[arg(long, value_name = "FILE", requires = "val")]
    pub(crate) val_list: Option<PathBuf>,
    /// End of the images' names that their maps lack, such as `_leftImg8bit`; files without it are not used
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) image_suffix: String,
    /// End of the maps' names that their images lack, such as `_gtFine_labelTrainIds`; files without it are not used
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) map_suffix: String,
}

impl PairArgs {
    /// Refuses flags about files of images that are in none.
    fn check_built_in(&self) -> anyhow::Result<()> {
        let train = is_synthetic(&self.train);
        let val = self.val.as_deref().is_some_and(is_synthetic);
        // Both sets have the suffixes.
        let all = train && (val || self.val.is_none());
        let flags = [
            (train && self.train_maps.is_some(), "--train-maps"),
            (train && self.train_list.is_some(), "--train-list"),
            (val && self.val_maps.is_some(), "--val-maps"),
            (val && self.val_list.is_some(), "--val-list"),
            (all && !self.image_suffix.is_empty(), "--image-suffix"),
            (all && !self.map_suffix.is_empty(), "--map-suffix"),
        ];
        match flags.iter().find(|(is_idle, _)| *is_idle) {
            Some((_, flag)) => Err(Usage(anyhow::anyhow!(
                "`{flag}` is about files, and the built-in images are in none\n\nhint: leave it out, or give a folder of \
                 images"
            ))
            .into()),
            None => Ok(()),
        }
    }

    /// Opens the train images.
    pub(crate) fn open_train(&self, kind: MapKind, log: &mut Log) -> anyhow::Result<AnnotatedSource> {
        self.check_built_in()?;
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

/// What a head is made of.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum HeadChoice {
    /// Batch normalisation and a 1×1 convolution
    Linear,
    /// Convolutions on four blocks, evenly from all (Ranftl et al. 2021): slower, and finer than patches
    Dpt,
}

/// Which head.
#[derive(clap::Args)]
pub(crate) struct HeadArg {
    /// What the head is made of
    #[arg(long, value_enum, default_value = "linear")]
    head: HeadChoice,
}

impl HeadArg {
    pub(crate) fn kind(&self) -> HeadKind {
        match self.head {
            HeadChoice::Linear => HeadKind::Linear,
            HeadChoice::Dpt => HeadKind::Dpt,
        }
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

/// A backbone, and how images are fed to it.
pub(crate) struct DenseSetup {
    pub(crate) given: Rc<Given>,
    pub(crate) config: TokenGridConfig,
    pub(crate) log: Log,
}

impl DenseSetup {
    /// For heads: large images in windows.
    pub(crate) fn windowed(given: &Rc<Given>, common: &DenseCommon, head: HeadKind) -> anyhow::Result<Self> {
        let layers = &common.layers;
        match head {
            HeadKind::Linear => Self::new(given, &common.seen, common.window, (layers.layers, false)),
            HeadKind::Dpt if layers.layers > 1 => Err(Usage(anyhow::anyhow!(
                "`--head dpt` takes {} blocks, evenly from all; `--layers` is {}",
                dpt::BLOCKS,
                layers.layers
            ))
            .into()),
            HeadKind::Dpt => Self::new(given, &common.seen, common.window, (dpt::BLOCKS, true)),
        }
    }

    /// For what sees images whole.
    pub(crate) fn whole(given: &Rc<Given>, seen: &Seen, layers: &Layers) -> anyhow::Result<Self> {
        Self::new(given, seen, None, (layers.layers, false))
    }

    /// For the last block, seeing images whole.
    pub(crate) fn last_block(given: &Rc<Given>, seen: &Seen) -> anyhow::Result<Self> {
        Self::new(given, seen, None, (1, false))
    }

    fn new(
        given: &Rc<Given>,
        seen: &Seen,
        window: Option<usize>,
        (last_blocks, spread): (usize, bool),
    ) -> anyhow::Result<Self> {
        let description = &given.description;
        let stride = description.architecture.stride();
        let config = TokenGridConfig {
            short_px: seen.resize,
            window_px: window.unwrap_or((WINDOW_PX / stride).max(1) * stride),
            last_blocks,
            spread,
            mean: description.mean,
            std: description.std,
        };
        Encoder::new(&given.backbone, &config, &given.device).map_err(|e| Usage(e.into()))?;
        Ok(Self { given: Rc::clone(given), config, log: Log::new(None)? })
    }

    /// The encoder. The settings have been checked.
    pub(crate) fn encoder(&self) -> anyhow::Result<Encoder<'_>> {
        Ok(Encoder::new(&self.given.backbone, &self.config, &self.given.device)?)
    }

    /// Where features come from, for a protocol.
    pub(crate) fn source(&self, train_data: &str, val_data: &str) -> FeatureSource {
        let depth = self.given.backbone.architecture().layers();
        FeatureSource {
            backbone: self.given.name(),
            train_data: train_data.to_owned(),
            val_data: val_data.to_owned(),
            tokens: vec![Token::Patches],
            layers: self.config.layers(depth),
            final_norm: true,
            resize_px: self.config.short_px.unwrap_or(0),
            crop_px: self.config.window_px,
            interpolation: "bicubic, antialias".into(),
            augmentation: "none".into(),
        }
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
