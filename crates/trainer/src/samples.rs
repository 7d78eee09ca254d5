//! From positions in a run to batches: which images, their crops, their masks, and the draws of the forwards on them.
//!
//! Everything is a function of the recipe and a position or step, so whoever asks later, or from another thread, gets the
//! same.

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::Device;
use dinoxide_augmentation::{AugmentationConfig, Crops, MultiCrop, batch_masks};
use dinoxide_data::{DataError, Drawn, Loader, SampleReader, Source};
use dinoxide_model::Architecture;
use dinoxide_random::{Purpose, epoch_view, stream};

use crate::batch::Batch;
use crate::error::TrainError;
use crate::recipe::Recipe;
use crate::step::StepDraws;

/// One sample of a batch, as a loader thread delivers it.
pub(crate) struct Sample {
    drawn: Drawn,
    /// Its name and its crops.
    pub(crate) cropped: (String, Crops),
}

/// Workers that read and crop the samples of a recipe.
pub(crate) type Samples = Loader<Result<Sample, DataError>>;

/// Reads and crops the samples from position `first` on, at most `window` of them ahead, by `augmentation` in the place of the
/// recipe's.
pub(crate) fn samples(
    config: &Recipe,
    augmentation: AugmentationConfig,
    source: &Arc<dyn Source>,
    first: u64,
    window: usize,
) -> Result<Samples, TrainError> {
    let (seed, batch) = (config.train.seed, config.train.batch_size as u64);
    let reader = SampleReader::new(source.clone(), seed);
    let choices: Result<Vec<_>, _> = augmentation.choices().iter().map(MultiCrop::new).collect();
    let choices = choices.map_err(|e| TrainError::Recipe(e.to_string()))?;
    let work = move |position: u64| {
        let drawn = reader.draw(position)?;
        let (index, epoch) = (drawn.index as u64, drawn.epoch);
        let choice = augmentation.choose(&mut stream(seed, Purpose::CropSizes, position / batch, 0));
        let crops = choices[choice]
            .crops(&drawn.image, |view| stream(seed, Purpose::Crop, index, epoch_view(epoch, view as u64)));
        Ok(Sample { cropped: (reader.source().id(drawn.index), crops), drawn })
    };
    Ok(Loader::new(config.efficiency.loader_threads, window, first, work)?)
}

/// The batches of a run, in order.
pub(crate) struct Batches<'a> {
    config: &'a Recipe,
    samples: Samples,
    step: u64,
}

impl<'a> Batches<'a> {
    /// From step `step` on, with so many local crops.
    pub(crate) fn new(
        config: &'a Recipe,
        locals: usize,
        source: &Arc<dyn Source>,
        step: u64,
    ) -> Result<Self, TrainError> {
        let augmentation = AugmentationConfig { local_crops: locals, ..config.augmentation.clone() };
        let batch = config.train.batch_size;
        let window = batch * config.efficiency.prefetch;
        let samples = samples(config, augmentation, source, step * batch as u64, window)?;
        Ok(Self { config, samples, step })
    }

    /// The batch of the next step, and where its samples are from.
    pub(crate) fn next(&mut self, backbone: &Architecture, device: &Device) -> Result<(Batch, Vec<Drawn>), TrainError> {
        let config = self.config;
        let (mut cropped, mut all_drawn) = (Vec::new(), Vec::new());
        for _ in 0..config.train.batch_size {
            let sample = self.samples.next()??;
            cropped.push(sample.cropped);
            all_drawn.push(sample.drawn);
        }
        let size = cropped[0].1.global[0].width() as usize;
        let grid = backbone.grid(size, size).expect("the plan has checked the size of the crops");
        let mut rng = stream(config.train.seed, Purpose::Mask, self.step, 0);
        let masks = batch_masks(2 * cropped.len(), grid, &config.mask, &mut rng);
        self.step += 1;
        let (mean, std) = (config.augmentation.mean, config.augmentation.std);
        Ok((Batch::new(&cropped, masks, mean, std, device), all_drawn))
    }

    /// How long it was waited for samples so far.
    pub(crate) fn waited(&self) -> Duration {
        self.samples.waited()
    }
}

/// The draws of a step's forwards, made for the sizes of its micro-batches.
pub(crate) fn step_draws(recipe: &Recipe, backbone: &Architecture, step: u64) -> StepDraws {
    let (batch, parts) = (recipe.train.batch_size, recipe.efficiency.micro_batches);
    let locals = recipe.augmentation.local_crops;
    (0..parts)
        .map(|part| {
            let samples = (part + 1) * batch / parts - part * batch / parts;
            [(0, 2), (1, locals)].map(|(group, crops)| {
                let mut rng = stream(recipe.train.seed, Purpose::Forward, step, 2 * part as u64 + group);
                backbone.draw(crops * samples, &mut rng)
            })
        })
        .collect()
}
