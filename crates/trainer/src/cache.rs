//! What a frozen teacher says of a run's crops, written once.
//!
//! Crops are a function of seed, image and epoch, so a teacher's tokens of the global crops can be computed before any
//! student exists. A cache holds them in half precision, by the position of the sample in the run:
//!
//! ```text
//! <cache>/
//!   manifest.json                 what the tokens are of; every student is checked against it
//!   tokens-000000.safetensors     `cls [n, 2, D]` and `patches [n, 2, P, D]` of positions 0 to n − 1, and so on
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_augmentation::{AugmentationConfig, Masks};
use dinoxide_config::Resolved;
use dinoxide_data::Source;
use dinoxide_model::weights::{host, write_atomically};
use dinoxide_model::{Architecture, Precision};
use half::f16;
use half::slice::HalfFloatSliceExt;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, TensorView},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::batch::{Batch, TeacherTokens};
use crate::error::TrainError;
use crate::pretrained::{Pretrained, misfit};
use crate::recipe::Recipe;
use crate::samples::samples;
use crate::start::check_device;
use crate::targets::FrozenTeacher;

/// Positions in one file.
const SHARD: u64 = 256;
/// The recipe's key that names a cache.
const KEY: &str = "distillation.cache";

/// What the tokens of a cache are of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    /// The teacher's backbone, and a checksum of its weights.
    architecture: Architecture,
    teacher_crc32: u32,
    /// The images.
    source: String,
    samples: usize,
    seed: u64,
    /// What the backbone computed in.
    #[serde(default)]
    precision: Precision,
    /// How they are cropped; nothing about local crops, which a teacher does not see.
    crops: AugmentationConfig,
    /// Samples of the run.
    positions: u64,
}

impl Manifest {
    fn of(config: &Recipe, samples: usize, teacher: &Pretrained) -> Result<Self, TrainError> {
        if !config.augmentation.sizes.is_empty() {
            return Err(misfit(
                KEY,
                "`augmentation.sizes` is set, and a cache holds crops of one size\n\nhint: leave it \
                                    out, or `distillation.cache`"
                    .into(),
            ));
        }
        let default = AugmentationConfig::default();
        let crops = AugmentationConfig {
            local_crops: default.local_crops,
            local_crop_size: default.local_crop_size,
            local_crop_scale: default.local_crop_scale,
            // With a larger crop for the Gram teacher, the global crop is made from it.
            gram_crop_distorted: match config.augmentation.gram_crop_size {
                0 => default.gram_crop_distorted,
                _ => config.augmentation.gram_crop_distorted,
            },
            blur: [config.augmentation.blur[0], config.augmentation.blur[1], default.blur[2]],
            ..config.augmentation.clone()
        };
        let steps = config.plan(samples)?.steps;
        Ok(Self {
            architecture: teacher.backbone.architecture(),
            teacher_crc32: teacher.checksum(),
            source: config.data.source.clone(),
            samples,
            seed: config.train.seed,
            precision: config.train.precision,
            crops,
            positions: steps * config.train.batch_size as u64,
        })
    }

    /// What differs from `found`, one line each; a cache may hold more positions than a run needs.
    fn differences(&self, found: &Self) -> Vec<String> {
        let value = |manifest: &Self| serde_json::to_value(manifest).expect("plain data");
        let (wanted, has) = (value(self), value(found));
        let mut differences = Vec::new();
        for (key, wanted) in wanted.as_object().expect("an object") {
            let has = &has[key];
            let enough = key == "positions" && self.positions <= found.positions;
            match (wanted.as_object(), has.as_object()) {
                _ if wanted == has || enough => {}
                (Some(wanted), Some(has)) => differences.extend(
                    // Backbones of two kinds do not have the same keys.
                    wanted.keys().chain(has.keys()).collect::<BTreeSet<_>>().into_iter().filter_map(|inner| {
                        let of = |table: &serde_json::Map<String, Value>| table.get(inner).cloned().unwrap_or_default();
                        let (wanted, has) = (of(wanted), of(has));
                        (wanted != has).then(|| format!("  `{key}.{inner}` is {has} in the cache, {wanted} in the run"))
                    }),
                ),
                _ => differences.push(format!("  `{key}` is {has} in the cache, {wanted} in the run")),
            }
        }
        differences
    }

    fn read(directory: &Path) -> Result<Self, String> {
        let path = directory.join("manifest.json");
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// An error unless `directory` holds a cache of this.
    fn check(&self, directory: &Path) -> Result<(), TrainError> {
        let found = Self::read(directory).map_err(|reason| {
            misfit(KEY, format!("{reason}\n\nhint: `dinoxide cache` writes a teacher's tokens into a folder"))
        })?;
        let differences = self.differences(&found);
        if differences.is_empty() {
            return Ok(());
        }
        Err(misfit(
            KEY,
            format!(
                "{} was made of something else\n{}\n\nhint: write another cache with `dinoxide cache`",
                directory.display(),
                differences.join("\n")
            ),
        ))
    }
}

fn shard_path(directory: &Path, shard: u64) -> PathBuf {
    directory.join(format!("tokens-{shard:06}.safetensors"))
}

/// The positions of a shard, out of so many.
fn positions_of(shard: u64, positions: u64) -> std::ops::Range<u64> {
    shard * SHARD..((shard + 1) * SHARD).min(positions)
}

/// Whether a file is all there: its header says how long it is, and of how many samples. `Err` is in words.
fn check_shard(path: &Path, samples: u64) -> Result<(), String> {
    const LONGEST_HEADER: u64 = 1 << 20;
    let io = |e: std::io::Error| e.to_string();
    let mut file = File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    let mut start = [0; 8];
    file.read_exact(&mut start).map_err(io)?;
    let header = u64::from_le_bytes(start);
    if header > LONGEST_HEADER {
        return Err(format!("its header would have {header} bytes"));
    }
    let mut json = vec![0; header as usize];
    file.read_exact(&mut json).map_err(io)?;
    let metadata: Metadata = serde_json::from_slice(&json).map_err(|e| e.to_string())?;
    let expected = 8 + header + metadata.data_len() as u64;
    if length != expected {
        return Err(format!("it has {length} bytes, its header says {expected}"));
    }
    let found = metadata.info("cls").and_then(|cls| cls.shape.first().copied()).unwrap_or(0) as u64;
    if found < samples { Err(format!("it is of {found} samples, {samples} are needed")) } else { Ok(()) }
}

/// What became of writing a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Whether it was asked to stop before its end.
    pub interrupted: bool,
    /// Samples whose tokens are there.
    pub positions: u64,
    /// Of these, samples whose tokens were there before.
    pub kept: u64,
    /// Size of all of them on the disk.
    pub bytes: u64,
}

/// Writes the tokens of a recipe's teacher for all crops of the run into `directory`, going on where an earlier call was
/// stopped. `progress` is called with the samples done and all samples.
///
/// # Errors
/// A recipe without a teacher, a directory with a cache of something else, and whatever the file system says. What is
/// written stays.
pub fn write(
    recipe: &Resolved<Recipe>,
    directory: &Path,
    device: &Device,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, TrainError> {
    let config = &recipe.value;
    check_device(config, device)?;
    if directory.is_file() {
        return Err(TrainError::Recipe(format!("{} is a file, and a cache is a folder", directory.display())));
    }
    let source = config.data.open()?;
    let Some(teacher) = Pretrained::teacher(config, device)? else {
        return Err(TrainError::Recipe("`distillation.teacher` is empty: there is nothing to write a cache of".into()));
    };
    let manifest = Manifest::of(config, source.len(), &teacher)?;
    let size = config.augmentation.global_crop_size;
    manifest.architecture.grid(size, size).map_err(|e| misfit(Pretrained::TEACHER, e.to_string()))?;
    if directory.join("manifest.json").exists() {
        manifest.check(directory)?;
    } else {
        fs::create_dir_all(directory).map_err(TrainError::io(directory))?;
        let text = serde_json::to_vec_pretty(&manifest).expect("plain data");
        let path = directory.join("manifest.json");
        write_atomically(&path, &text).map_err(TrainError::io(&path))?;
    }
    let shards = manifest.positions.div_ceil(SHARD);
    let mut written = Written { interrupted: false, positions: 0, kept: 0, bytes: 0 };
    let frozen = teacher.frozen(true, config.train.precision);
    for shard in 0..shards {
        let path = shard_path(directory, shard);
        let positions = positions_of(shard, manifest.positions);
        let count = positions.end - positions.start;
        // One that is damaged is written again.
        if check_shard(&path, count).is_ok() {
            written.kept += count;
        } else {
            if stop.load(Ordering::Relaxed) {
                written.interrupted = true;
                break;
            }
            let bytes = tokens_of(config, &source, positions, &frozen, device)?;
            write_atomically(&path, &bytes).map_err(TrainError::io(&path))?;
        }
        written.positions += count;
        written.bytes += fs::metadata(&path).map_err(TrainError::io(&path))?.len();
        progress(written.positions, manifest.positions);
    }
    Ok(written)
}

/// The tokens of consecutive positions as a file.
fn tokens_of(
    config: &Recipe,
    source: &Arc<dyn Source>,
    positions: std::ops::Range<u64>,
    teacher: &FrozenTeacher,
    device: &Device,
) -> Result<Vec<u8>, TrainError> {
    let augmentation = AugmentationConfig { local_crops: 0, ..config.augmentation.clone() };
    let mut loader = samples(config, augmentation, source, positions.start, SHARD as usize)?;
    let (mut cls, mut patches) = (Vec::new(), Vec::new());
    let mut counts = (0, 0);
    let samples = (positions.end - positions.start) as usize;
    let mut left = samples;
    while left > 0 {
        let count = left.min(config.train.batch_size);
        let mut cropped = Vec::with_capacity(count);
        for _ in 0..count {
            cropped.push(loader.next()??.cropped);
        }
        let masks = Masks { crops: 0, patches: 0, mask: Vec::new(), indices: Vec::new(), weights: Vec::new() };
        let batch = Batch::new(&cropped, masks, config.augmentation.mean, config.augmentation.std, device);
        let tokens = teacher.tokens(&batch, 1);
        let [_, _, tokens_count, dim] = tokens.patches.dims();
        counts = (tokens_count, dim);
        // By position first, so that any range of them can be read.
        cls.extend(halves(tokens.cls.swap_dims(0, 1).reshape([-1])));
        patches.extend(halves(tokens.patches.swap_dims(0, 1).reshape([-1])));
        left -= count;
    }
    let (tokens_count, dim) = counts;
    let bytes = |values: &[f16]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let (cls, patches) = (bytes(&cls), bytes(&patches));
    let view = |shape: Vec<usize>, bytes| TensorView::new(Dtype::F16, shape, bytes).expect("sizes agree");
    let views =
        [("cls", view(vec![samples, 2, dim], &cls)), ("patches", view(vec![samples, 2, tokens_count, dim], &patches))];
    Ok(safetensors::serialize(views, None).expect("two tensors"))
}

/// Values in half precision; what is larger than it can hold becomes its largest.
fn halves(values: Tensor<1>) -> Vec<f16> {
    let largest = f16::MAX.to_f32();
    host(values).into_iter().map(|value| f16::from_f32(value.clamp(-largest, largest))).collect()
}

fn damaged(path: &Path, reason: &str) -> TrainError {
    misfit(KEY, format!("{}: {reason}\n\nhint: `dinoxide cache` writes what is missing or damaged", path.display()))
}

/// A cache that is being read, in the order in which it was written.
pub(crate) struct Cache {
    directory: PathBuf,
    device: Device,
    /// The file that was read last.
    shard: Option<(u64, Shard)>,
}

/// One file's tokens.
struct Shard {
    cls: Vec<f32>,
    patches: Vec<f32>,
    tokens: usize,
    dim: usize,
}

impl Cache {
    /// The recipe's cache, if it names one. `teacher` is the one that it also names.
    ///
    /// # Errors
    /// A cache of something else.
    pub(crate) fn open(
        config: &Recipe,
        samples: usize,
        teacher: Option<&Pretrained>,
        device: &Device,
    ) -> Result<Option<Self>, TrainError> {
        let Some(teacher) = teacher.filter(|_| !config.distillation.cache.is_empty()) else { return Ok(None) };
        let directory = PathBuf::from(&config.distillation.cache);
        let manifest = Manifest::of(config, samples, teacher)?;
        manifest.check(&directory)?;
        for shard in 0..manifest.positions.div_ceil(SHARD) {
            let (path, positions) = (shard_path(&directory, shard), positions_of(shard, manifest.positions));
            check_shard(&path, positions.end - positions.start).map_err(|reason| damaged(&path, &reason))?;
        }
        Ok(Some(Self { directory, device: device.clone(), shard: None }))
    }

    /// The tokens of the batch that starts at a position.
    ///
    /// # Errors
    /// A file that is missing or damaged.
    pub(crate) fn tokens(&mut self, start: u64, samples: usize) -> Result<TeacherTokens, TrainError> {
        let (mut cls, mut patches) = (Vec::new(), Vec::new());
        let (mut tokens, mut dim) = (0, 0);
        for position in start..start + samples as u64 {
            let shard = self.shard(position / SHARD)?;
            (tokens, dim) = (shard.tokens, shard.dim);
            let i = (position % SHARD) as usize;
            let row = |values: &[f32], length: usize| values.get(i * length..(i + 1) * length).map(<[f32]>::to_vec);
            match (row(&shard.cls, 2 * dim), row(&shard.patches, 2 * tokens * dim)) {
                (Some(of_cls), Some(of_patches)) => {
                    cls.extend(of_cls);
                    patches.extend(of_patches);
                }
                _ => {
                    let path = shard_path(&self.directory, position / SHARD);
                    return Err(misfit(KEY, format!("{}: has no tokens of sample {position}", path.display())));
                }
            }
        }
        let cls = Tensor::<3>::from_data(TensorData::new(cls, [samples, 2, dim]), &self.device);
        let patches = Tensor::<4>::from_data(TensorData::new(patches, [samples, 2, tokens, dim]), &self.device);
        Ok(TeacherTokens { cls: cls.swap_dims(0, 1), patches: patches.swap_dims(0, 1) })
    }

    fn shard(&mut self, number: u64) -> Result<&Shard, TrainError> {
        if self.shard.as_ref().is_none_or(|(known, _)| *known != number) {
            let path = shard_path(&self.directory, number);
            let read = fs::read(&path).map_err(|e| e.to_string()).and_then(|bytes| Shard::read(&bytes));
            let shard = read.map_err(|reason| damaged(&path, &reason))?;
            self.shard = Some((number, shard));
        }
        Ok(&self.shard.as_ref().expect("it was read").1)
    }
}

impl Shard {
    fn read(bytes: &[u8]) -> Result<Self, String> {
        let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let tensor = |name: &str| {
            let view = file.tensor(name).map_err(|e| e.to_string())?;
            if view.dtype() != Dtype::F16 {
                return Err(format!("`{name}` is not in half precision"));
            }
            let halves: Vec<f16> = view.data().chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
            Ok((view.shape().to_vec(), halves.to_f32_vec()))
        };
        let ((_, cls), (shape, patches)) = (tensor("cls")?, tensor("patches")?);
        let &[_, 2, tokens, dim] = shape.as_slice() else {
            return Err(format!("`patches` is {shape:?}, not [samples, 2, patches, width]"));
        };
        Ok(Self { cls, patches, tokens, dim })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dinoxide_model::ModelConfig;

    #[test]
    fn backbones_of_two_kinds_differ_in_keys_that_one_of_them_lacks() {
        let manifest = |arch: &str| {
            let model: ModelConfig =
                toml::from_str(&format!("arch = \"{arch}\"\nmask_token = false")).expect("a table");
            Manifest {
                architecture: model.resolve(224).expect("a backbone"),
                teacher_crc32: 7,
                source: "photos".into(),
                samples: 9,
                seed: 0,
                precision: Precision::Fp32,
                crops: AugmentationConfig::default(),
                positions: 40,
            }
        };
        let (vit, convnext) = (manifest("vit_tiny"), manifest("convnext_tiny"));
        assert_eq!(vit.differences(&manifest("vit_tiny")), [""; 0]);
        for (wanted, has) in [(&vit, &convnext), (&convnext, &vit)] {
            let differences = wanted.differences(has).join("\n");
            for key in ["architecture.family", "architecture.depths", "architecture.num_heads"] {
                assert!(differences.contains(&format!("`{key}` is ")), "{differences}");
            }
        }
    }
}
