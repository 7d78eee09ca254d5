//! A run in small: a few steps of a recipe, with fewer blocks and micro-batches if need be, on its own images with its own
//! loader, k-NN and checkpoint. What it took is what `forecast` works from.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use dinoxide_config::Resolved;
use dinoxide_model::{Architecture, HeadConfig, weights};
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::clock::peak_bytes;
use crate::duration::Duration;
use crate::error::TrainError;
use crate::event::Event;
use crate::monitor::Monitor;
use crate::pretrained::Pretrained;
use crate::recipe::Recipe;
use crate::run::go;
use crate::running::Run;
use crate::start::initial;

/// How much of a recipe is run. All else stays: heads, crops, the size of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Blocks of a ViT; of a ConvNeXt, those of its deepest stage.
    pub blocks: usize,
    /// Micro-batches of a step.
    pub parts: usize,
}

/// What a trial took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// How much of the recipe was run.
    pub extent: Extent,
    /// Images of a step.
    pub batch_size: usize,
    /// Steps that count: those after the loader's queue has filled.
    pub steps: usize,
    /// Mean seconds of a step.
    pub step_seconds: f64,
    /// Of these, seconds in which it waited for images.
    pub waited_seconds: f64,
    /// Seconds of processor time of a step, loader included, over all cores; 0 where the system does not tell. Far less than
    /// the cores have in that time: other programs took their share, or the step is not computed here.
    pub processor_seconds: f64,
    /// Highest resident memory of the process after the last step, in bytes.
    pub step_peak_bytes: u64,
    /// And after a checkpoint and k-NN.
    pub peak_bytes: u64,
    /// Seconds for a checkpoint and the teacher's file.
    pub checkpoint_seconds: f64,
    /// Bytes of a checkpoint.
    pub checkpoint_bytes: u64,
    /// Bytes of the teacher's file.
    pub teacher_bytes: u64,
    /// Bytes of metrics that a logged step leaves.
    pub metrics_bytes: u64,
    /// Images in the data.
    pub samples: usize,
    /// Images of one evaluation of the recipe; 0 if k-NN is not measured.
    pub evaluated: usize,
    /// Seconds that k-NN takes for each of them.
    pub evaluation_seconds: f64,
}

/// Seconds of processor time of this process so far, where the system tells.
fn processor_seconds() -> Option<f64> {
    /// Linux counts for programs in hundredths of a second on every architecture.
    const TICKS: f64 = 100.0;
    let status = fs::read_to_string("/proc/self/stat").ok()?;
    // The process's name may hold anything, so count from its end: user and system time are the 12th and 13th after it.
    let mut fields = status.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some((next()? + next()?) / TICKS)
}

/// Steps until the loader's queue is full and memory is set aside.
const WARMUP: usize = 2;

impl Extent {
    /// All of a recipe.
    ///
    /// # Errors
    /// A recipe that does not fit together.
    pub fn of(recipe: &Recipe) -> Result<Self, TrainError> {
        let blocks = match architecture(recipe)? {
            Architecture::Vit(config) => config.depth,
            Architecture::ConvNext(config) => config.depths.into_iter().max().expect("four stages"),
        };
        Ok(Self { blocks, parts: recipe.efficiency.micro_batches })
    }
}

fn architecture(recipe: &Recipe) -> Result<Architecture, TrainError> {
    let resolved = recipe.model.resolve(recipe.augmentation.global_crop_size);
    resolved.map_err(|e| TrainError::Recipe(e.to_string()))
}

/// The recipe with this much of it, from fresh weights, which take the same time and memory as any others, and with every step
/// like those that take the most: nothing frozen, every loss there from the start. No weight moves, so nothing can diverge.
///
/// # Errors
/// A recipe that does not fit together, or has no step.
pub fn reduced(recipe: &Resolved<Recipe>, extent: Extent) -> Result<Resolved<Recipe>, TrainError> {
    let (config, whole) = (&recipe.value, Extent::of(&recipe.value)?);
    if config.train.length == Duration::ZERO {
        return Err(TrainError::Recipe("`train.length` is \"0 steps\": there is nothing to plan for".into()));
    }
    let mut text = String::from(
        "stages = []\nstudents = []\ninit = { from = \"\", take = \"weights\" }\nrun.log_every = \"1 steps\"\n\
         run.checkpoint_every = \"1000000000 steps\"\neval.every = \"0 steps\"\n\
         schedule.freeze_last_layer = \"0 steps\"\nschedule.freeze_backbone = \"0 steps\"\n\
         loss.gram = { refresh_from = \"0 steps\", refresh_every = \"0 steps\", max_refreshes = 0 }\n",
    );
    let schedule = &config.schedule;
    let curves = [
        ("lr", Some(&schedule.lr), Some(0.0)),
        ("weight_decay", Some(&schedule.weight_decay), None),
        ("teacher_momentum", Some(&schedule.teacher_momentum), None),
        ("teacher_temp", Some(&schedule.teacher_temp), None),
        ("teacher_patch_temp", schedule.teacher_patch_temp.as_ref(), None),
    ];
    let factors = schedule.loss.named().map(|(name, curve)| (format!("loss.{name}"), Some(curve), Some(1.0)));
    let curves = curves.map(|(name, curve, value)| (name.to_owned(), curve, value)).into_iter().chain(factors);
    for (name, curve, value) in curves.filter_map(|(name, curve, value)| Some((name, curve?, value))) {
        text += &format!("schedule.{name}.warmup = \"0 steps\"\n");
        // A length that is not there is that of the run.
        if curve.cosine.is_some() {
            text += &format!("schedule.{name}.cosine = \"0 steps\"\n");
        }
        for part in ["start", "peak", "end"] {
            text += &value.map_or(String::new(), |value| format!("schedule.{name}.{part} = {value:?}\n"));
        }
    }
    if extent.blocks != whole.blocks {
        text += &match architecture(config)? {
            Architecture::Vit(_) => format!("model.depth = {}\n", extent.blocks),
            Architecture::ConvNext(config) => {
                let deepest =
                    config.depths.iter().position(|depth| *depth == whole.blocks).expect("the largest of them");
                let mut depths = config.depths;
                depths[deepest] = extent.blocks;
                format!("model.depths = {depths:?}\n")
            }
        };
    }
    if extent.parts != whole.parts {
        let batch = config.train.batch_size.div_ceil(whole.parts) * extent.parts;
        // KoLeo's groups need not divide the smaller batch; what they cost is nothing beside the rest.
        text += &format!(
            "train.batch_size = {batch}\nefficiency.micro_batches = {}\nloss.koleo_group = 0\nloss.koleo_neighbours = 1\n",
            extent.parts
        );
    }
    recipe.laid_over(&[("trial".to_owned(), text)]).map_err(|e| TrainError::Recipe(e.to_string()))
}

/// A lower bound of the memory of a step: weights of student and teacher, two moments, gradients.
///
/// # Errors
/// A recipe that does not fit together.
pub fn least_bytes(recipe: &Recipe) -> Result<u64, TrainError> {
    let backbone = architecture(recipe)?;
    let head = |head: &HeadConfig| {
        let hidden = head.hidden_dim;
        let mlp = hidden * (backbone.embed_dim() + head.layers.saturating_sub(2) * hidden + head.bottleneck_dim);
        let prototypes = head.prototypes + head.patch_prototypes.unwrap_or(0);
        if head.layers > 1 { mlp + prototypes * head.bottleneck_dim } else { prototypes * head.bottleneck_dim }
    };
    let heads = head(&recipe.dino_head) + recipe.patch_head().map_or(0, head);
    Ok(5 * 4 * (weights::parameter_count(&backbone) + heads) as u64)
}

/// Runs the recipe to this extent for about `seconds`.
///
/// # Errors
/// As [`train`](crate::train).
pub fn trial(recipe: &Resolved<Recipe>, extent: Extent, seconds: f64, device: &Device) -> Result<Trial, TrainError> {
    let recipe = reduced(recipe, extent)?;
    let config = &recipe.value;
    let folder = tempfile::tempdir().map_err(TrainError::io(&std::env::temp_dir()))?;
    let source = config.data.open()?;
    let teacher = Pretrained::teacher(config, device)?;
    let plan = config.plan(source.len())?;
    let monitor = Monitor::new(config, &source, &config.data.decode)?;
    let evaluated = monitor.as_ref().map_or(0, Monitor::images);
    let monitor = monitor.map(Monitor::sample);
    let sampled = monitor.as_ref().map_or(0, Monitor::images);
    let initial = initial(config, plan, teacher.as_ref(), folder.path(), device)?;
    let cache = Cache::open(config, source.len(), teacher.as_ref(), device)?;
    drop(teacher);
    let mut run = [Run::start(config, initial, source.clone(), monitor, folder.path(), device, &mut |_| ())?];

    let stop = AtomicBool::new(false);
    let begin = Instant::now();
    // When each step ended, and how long it waited for images.
    let (mut ends, mut waits, mut busy) = (Vec::new(), Vec::new(), Vec::new());
    let (mut saved, mut step_peak_bytes) = (None, 0);
    go(config, &source, cache, &mut run, &stop, &mut |_, event| match event {
        Event::Step { data_wait, .. } => {
            let last = ends.last().copied().unwrap_or(begin);
            ends.push(Instant::now());
            busy.push(processor_seconds().unwrap_or(0.0));
            waits.push(data_wait * last.elapsed().as_secs_f64());
            step_peak_bytes = peak_bytes();
            let since = |i: usize| ends.get(i).map_or(0.0, |end| end.elapsed().as_secs_f64());
            let enough = ends.len() >= WARMUP + 3 && since(WARMUP - 1) >= seconds;
            let slow = ends.len() >= 2 && begin.elapsed().as_secs_f64() >= 4.0 * seconds;
            stop.store(enough || slow, Ordering::Relaxed);
        }
        Event::Checkpoint(_) => saved = Some(Instant::now()),
        _ => {}
    })?;
    let since = Instant::now();
    run[0].evaluate(&mut |_| ())?;
    let evaluation_seconds = if sampled > 0 { since.elapsed().as_secs_f64() / sampled as f64 } else { 0.0 };

    let warmup = WARMUP.min(ends.len() - 1);
    let (from, busy_from) = if warmup > 0 { (ends[warmup - 1], busy[warmup - 1]) } else { (begin, 0.0) };
    let (last, steps) = (*ends.last().expect("a run has a step"), ends.len() - warmup);
    let size = |path: &Path| fs::metadata(path).map(|data| data.len()).map_err(TrainError::io(path));
    let mut checkpoint_bytes = 0;
    for (_, checkpoint) in crate::checkpoint::list(&folder.path().join("checkpoints"))? {
        for file in ["state.safetensors", "manifest.json"] {
            checkpoint_bytes += size(&checkpoint.join(file))?;
        }
    }
    Ok(Trial {
        extent,
        batch_size: config.train.batch_size,
        steps,
        step_seconds: (last - from).as_secs_f64() / steps as f64,
        waited_seconds: waits[warmup..].iter().sum::<f64>() / steps as f64,
        processor_seconds: (busy[ends.len() - 1] - busy_from) / steps as f64,
        step_peak_bytes,
        peak_bytes: peak_bytes(),
        checkpoint_seconds: saved.map_or(0.0, |saved| (saved - last).as_secs_f64()),
        checkpoint_bytes,
        teacher_bytes: size(&folder.path().join("teacher.safetensors"))?,
        metrics_bytes: size(&folder.path().join("metrics.jsonl"))? / ends.len() as u64,
        samples: source.len(),
        evaluated,
        evaluation_seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(text: &str) -> Resolved<Recipe> {
        Resolved::from_text("test", text).expect("a recipe")
    }

    #[test]
    fn only_the_extent_of_a_recipe_changes() {
        let vit = recipe(
            "train.batch_size = 30\nefficiency.micro_batches = 4\nrun.log_every = \"1 steps\"\nloss.koleo_group = 5",
        );
        assert_eq!(Extent::of(&vit.value).expect("an extent"), Extent { blocks: 12, parts: 4 });
        let small = reduced(&vit, Extent { blocks: 3, parts: 2 }).expect("a recipe").value;
        let (train, parts) = (&small.train, small.efficiency.micro_batches);
        assert_eq!((small.model.depth, train.batch_size, parts, small.loss.koleo_group), (Some(3), 16, 2, 0));
        small.plan(1000).expect("a recipe that fits together");
        let mut again = small;
        again.model.depth = None;
        (again.train, again.loss) = (vit.value.train.clone(), vit.value.loss.clone());
        again.schedule = vit.value.schedule.clone();
        (again.efficiency, again.run, again.eval) =
            (vit.value.efficiency.clone(), vit.value.run.clone(), vit.value.eval.clone());
        assert_eq!(again, vit.value);

        // Whatever is as long as some epochs fits into a run whose batches are smaller, and every step does all that there is.
        let late = recipe(
            "train = { length = \"40 steps\", batch_size = 30 }\nefficiency.micro_batches = 15\nschedule.form = \"blocks\"\n\
             schedule.lr = { warmup = \"1 epochs\", cosine = \"10 steps\" }\nschedule.teacher_temp.warmup = \"0 steps\"\n\
             schedule.freeze_last_layer = \"20 steps\"\nschedule.loss.gram = { start = 0.0, warmup = \"20 steps\" }\n\
             loss.gram = { weight = 2.0, teacher = \"snapshot\", refresh_from = \"30 steps\", refresh_every = \"5 steps\" }",
        );
        let small = reduced(&late, Extent { blocks: 2, parts: 1 }).expect("a recipe").value;
        let schedule = small.plan(1000).expect("a recipe that fits together").schedule;
        let first = schedule.at(0);
        assert!(!first.last_layer_frozen && first.lr == 0.0 && schedule.gram_refresh.is_due(0));
        assert_eq!(schedule.losses_at(&small.loss, 0).gram.weight, 2.0);
        let none = recipe("train.length = \"0 steps\"");
        assert!(reduced(&none, Extent { blocks: 2, parts: 1 }).is_err());

        let conv = recipe("model = { arch = \"convnext_tiny\", depths = [2, 4, 9, 4] }");
        assert_eq!(Extent::of(&conv.value).expect("an extent").blocks, 9);
        let small = reduced(&conv, Extent { blocks: 5, parts: 1 }).expect("a recipe").value;
        assert_eq!((small.model.depths, small.train.batch_size), (Some([2, 4, 5, 4]), 64));
    }

    #[test]
    fn the_least_memory_is_that_of_every_number_kept_between_steps() {
        let text = "model = { embed_dim = 8, depth = 3, num_heads = 2, patch_size = 4, position = \"rope\" }\n\
                    augmentation.global_crop_size = 16\n\
                    dino_head = { prototypes = 50, hidden_dim = 20, bottleneck_dim = 6, layers = 3 }\n\
                    loss.ibot_weight = 0.0";
        // Blocks 3·(4·64 + 8·32), patches 48·8, head 8·20 + 20·20 + 20·6 + 50·6: all but biases, norms and tokens.
        assert_eq!(least_bytes(&recipe(text).value).expect("bytes"), 20 * (3 * 768 + 384 + 980));
    }
}
