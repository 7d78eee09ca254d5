//! How fast the training step of a recipe is on this machine: steps on noise, without a loader and without a run directory.

use std::time::Instant;

use burn::tensor::Device;
use dinoxide_augmentation::{Crops, RgbImage, batch_masks};
use dinoxide_random::{Purpose, stream};
use rand::Rng;

use crate::batch::Batch;
use crate::clock::peak_bytes;
use crate::error::TrainError;
use crate::pretrained::Pretrained;
use crate::recipe::Recipe;
use crate::samples::step_draws;
use crate::start::{Initial, initial};
use crate::step::{Timings, train_step};

/// Images that the durations of the measured recipe refer to.
const SAMPLES: usize = 1_000_000;

/// What was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Seconds of each step, and where they went.
    pub steps: Vec<(f64, Timings)>,
    /// Images of a step.
    pub batch_size: usize,
    /// Parameters of the backbone and of all heads.
    pub parameters: usize,
    /// Highest resident memory of the process so far, in bytes.
    pub peak_memory_bytes: u64,
    /// What the device's allocator holds after the steps, in bytes; it gives little back, so this is about its peak. `None`
    /// on the CPU.
    pub device_memory_bytes: Option<u64>,
}

/// Takes `steps` training steps of the recipe, after `warmup` steps that are not counted. `watch` is told after each.
///
/// # Errors
/// A recipe that does not fit together, or a step that is not finite.
pub fn measure(
    recipe: &Recipe,
    device: &Device,
    warmup: usize,
    steps: usize,
    watch: &mut dyn FnMut(f64),
) -> Result<Measured, TrainError> {
    let mut recipe = recipe.clone();
    // No cache has what a teacher says of noise.
    recipe.distillation.cache.clear();
    let (recipe, seed, batch_size) = (&recipe, recipe.train.seed, recipe.train.batch_size);
    // A run directory without checkpoints to go on from.
    let directory = tempfile::tempdir().map_err(TrainError::io(&std::env::temp_dir()))?;
    let teacher = Pretrained::teacher(recipe, device)?;
    let plan = recipe.plan(SAMPLES)?;
    let Initial { mut state, plan, .. } = initial(recipe, plan, teacher.as_ref(), directory.path(), device)?;
    let shapes = dinoxide_model::parameters::shapes(&state.teacher);
    let parameters = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    // Of several crop sizes the first.
    let crops = recipe.augmentation.choices().swap_remove(0);
    let mut rng = stream(seed, Purpose::Synthetic, 0, 0);
    let grid = plan.backbone.grid(crops.global_crop_size, crops.global_crop_size).expect("the plan has checked it");
    let samples: Vec<(String, Crops)> = (0..batch_size)
        .map(|i| {
            let mut noise = |side: usize| {
                let mut pixels = vec![0; side * side * 3];
                rng.fill_bytes(&mut pixels);
                RgbImage::from_raw(side as u32, side as u32, pixels).expect("three bytes for each pixel")
            };
            let global = [noise(crops.global_crop_size), noise(crops.global_crop_size)];
            let local = (0..crops.local_crops).map(|_| noise(crops.local_crop_size)).collect();
            let gram = (crops.gram_crop_size > 0).then(|| [noise(crops.gram_crop_size), noise(crops.gram_crop_size)]);
            (format!("noise {i}"), Crops { global, local, gram })
        })
        .collect();
    let mut taken = Vec::with_capacity(steps);
    for step in 0..(warmup + steps) as u64 {
        let start = Instant::now();
        let masks = batch_masks(2 * batch_size, grid, &recipe.mask, &mut stream(seed, Purpose::Mask, step, 0));
        let batch = Batch::new(&samples, masks, crops.mean, crops.std, device);
        let draws = step_draws(recipe, &plan.backbone, step);
        let losses = plan.schedule.losses_at(&recipe.loss, step);
        train_step(&mut state, &batch, &draws, &losses, plan.schedule.at(step))?;
        let seconds = start.elapsed().as_secs_f64();
        if step >= warmup as u64 {
            taken.push((seconds, state.timings));
        }
        watch(seconds);
    }
    let device_memory_bytes = device.memory_pool_usage().map(|usage| usage.bytes_reserved);
    Ok(Measured { steps: taken, batch_size, parameters, peak_memory_bytes: peak_bytes(), device_memory_bytes })
}
