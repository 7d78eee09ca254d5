//! Checkpoints: all of a run's state, written so that a crash or a full disk never costs the previous one.
//!
//! `checkpoints/step-000500/` holds `state.safetensors` (weights of student and teacher, moments, centers, by name; in its
//! header the description of the teacher's backbone, so that it can be evaluated like any weight file) and `manifest.json`
//! (counters, the list of unreadable images, the state file's length and CRC-32). The folder is written under another name,
//! synced and renamed. Loading takes the newest one that is whole.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use dinoxide_data::BadImages;
use dinoxide_model::parameters;
use dinoxide_model::weights::{
    Description, Weight, WeightFile, host, write_atomically, write_atomically_with, write_tensors,
};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::network::Network;
use crate::step::TrainState;

/// What a run knows besides tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps taken.
    pub step: u64,
    /// Images seen.
    pub images: u64,
    /// Images in the data: the order of a run depends on it.
    pub samples: usize,
    /// Seconds spent training, over all sessions.
    pub seconds: f64,
    /// The first k-NN accuracy, in percent, measured before step 0.
    pub first_knn: Option<f64>,
    /// Images that could not be read so far.
    pub bad_images: BadImages,
    /// Images that evaluations could not read so far, by path.
    #[serde(default)]
    pub bad_eval_images: BTreeSet<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    progress: Progress,
    optimizer_steps: BTreeMap<String, u64>,
    bytes: u64,
    crc32: u32,
}

const PREFIX: &str = "step-";
/// Prefix of the Gram teacher's tensors.
const GRAM_TEACHER: &str = "gram_teacher.backbone.";
const UNFINISHED: &str = ".writing-";

fn name(step: u64) -> String {
    format!("{PREFIX}{step:06}")
}

/// Writes the state as `folder/step-NNNNNN`, with the description of the teacher's backbone, and removes all but the newest
/// `keep` checkpoints. Those of later steps go too: the run would have gone on from them had they been whole.
///
/// # Errors
/// Whatever the file system says. Earlier checkpoints are untouched then, and nothing half-written stays.
pub fn save(
    folder: &Path,
    state: &TrainState,
    teacher: &Description,
    progress: &Progress,
    keep: usize,
) -> Result<PathBuf, TrainError> {
    fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
    let unfinished = folder.join(format!("{UNFINISHED}{}", name(progress.step)));
    let target = folder.join(name(progress.step));
    let written = write(&unfinished, state, teacher, progress).and_then(|()| {
        if target.exists() {
            fs::remove_dir_all(&target)?;
        }
        fs::rename(&unfinished, &target)?;
        sync_folder(folder)
    });
    if let Err(error) = written {
        // The error to report is the first one; this is tidying up.
        let _ = fs::remove_dir_all(&unfinished);
        return Err(TrainError::io(&target)(error));
    }
    let (later, known): (Vec<_>, Vec<_>) = list(folder)?.into_iter().partition(|(step, _)| *step > progress.step);
    for (_, old) in later.into_iter().chain(known.into_iter().rev().skip(keep)) {
        fs::remove_dir_all(&old).map_err(TrainError::io(&old))?;
    }
    Ok(target)
}

/// Removes what a session that was killed while writing left in a folder: files and folders named `.writing-…`.
///
/// # Errors
/// Whatever the file system says; a missing folder has none.
pub fn remove_unfinished(folder: &Path) -> Result<(), TrainError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(TrainError::io(folder)(e)),
    };
    for entry in entries {
        let path = entry.map_err(TrainError::io(folder))?.path();
        if path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(UNFINISHED)) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(TrainError::io(&path))?;
        }
    }
    Ok(())
}

fn write(folder: &Path, state: &TrainState, teacher: &Description, progress: &Progress) -> std::io::Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir(folder)?;
    let tensors = tensors(state);
    let shapes = tensors.iter().map(|(name, (shape, _))| (name.as_str(), shape.as_slice())).collect();
    let (mut bytes, mut checksum) = (0, crc32fast::Hasher::new());
    write_atomically_with(&folder.join("state.safetensors"), |out| {
        let mut out = Counted { out, bytes: &mut bytes, checksum: &mut checksum };
        // One tensor at a time on the host: copies of all of them would be the largest memory of a run.
        write_tensors(&mut out, &teacher.metadata(), &shapes, |name| Cow::Owned(host(tensors[name].1.clone())))
    })?;
    let manifest = Manifest {
        progress: progress.clone(),
        optimizer_steps: state.optimizer.moments.iter().map(|(name, m)| (name.clone(), m.steps)).collect(),
        bytes,
        crc32: checksum.finalize(),
    };
    let manifest = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
    write_atomically(&folder.join("manifest.json"), &manifest)?;
    sync_folder(folder)
}

/// Makes a folder's entries outlast a power failure, where the system lets a folder be opened.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    if cfg!(unix) { fs::File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Counts what is written, and forms its checksum.
struct Counted<'a> {
    out: &'a mut dyn Write,
    bytes: &'a mut u64,
    checksum: &'a mut crc32fast::Hasher,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        *self.bytes += written as u64;
        self.checksum.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// All tensors of a state by name, flattened, each with its shape. They share the memory of the state.
fn tensors(state: &TrainState) -> BTreeMap<String, (Vec<usize>, Tensor<1>)> {
    let mut tensors = BTreeMap::new();
    for (prefix, network) in [("student", &state.student), ("teacher", &state.teacher)] {
        parameters::visit(network, |name, shape, value| {
            tensors.insert(format!("{prefix}.{name}"), (shape.to_vec(), value));
        });
    }
    if let Some(backbone) = &state.gram_teacher {
        parameters::visit(backbone, |name, shape, value| {
            tensors.insert(format!("{GRAM_TEACHER}{name}"), (shape.to_vec(), value));
        });
    }
    let mut flat = |name: String, value: Tensor<1>| {
        tensors.insert(name, (value.dims().to_vec(), value));
    };
    for (name, moments) in &state.optimizer.moments {
        flat(format!("adam_m.{name}"), moments.m.clone());
        flat(format!("adam_v.{name}"), moments.v.clone());
    }
    flat("dino_loss.center".into(), state.cls_center.value.clone().reshape([-1]));
    flat("ibot_patch_loss.center".into(), state.patch_center.value.clone().reshape([-1]));
    tensors
}

/// The checkpoints in a folder, oldest first.
///
/// # Errors
/// Whatever the file system says; a missing folder has none.
pub fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>, TrainError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(TrainError::io(folder)(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(TrainError::io(folder))?.path();
        let step =
            path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix(PREFIX)).and_then(|n| n.parse().ok());
        if let Some(step) = step {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// The outcome of looking for a checkpoint.
#[derive(Debug)]
pub struct Loaded {
    /// The state's counters; the state itself is in place.
    pub progress: Progress,
    /// Newer checkpoints that are damaged, each with what is wrong.
    pub damaged: Vec<(PathBuf, String)>,
}

/// Puts the newest whole checkpoint of `folder` into `state`. `None` if there is no checkpoint at all.
///
/// Only a checkpoint whose content proves that it is damaged is passed over (a file that is missing or cut short, a
/// checksum that does not fit): the run would go on to replace it.
///
/// # Errors
/// If there are checkpoints and none of them is whole; if a file is there and the system does not let it be read; if a
/// whole checkpoint is not of this recipe.
pub fn load_newest(folder: &Path, state: &mut TrainState, device: &Device) -> Result<Option<Loaded>, TrainError> {
    let mut damaged = Vec::new();
    for (_, path) in list(folder)?.into_iter().rev() {
        match read(&path) {
            Ok((manifest, file)) => {
                put(state, &manifest, file, device).map_err(|reason| TrainError::NotResumable { path, reason })?;
                return Ok(Some(Loaded { progress: manifest.progress, damaged }));
            }
            Err(Fault::Damaged(reason)) => damaged.push((path, reason)),
            Err(Fault::Unreadable(path, source)) => return Err(TrainError::UnreadableCheckpoint { path, source }),
        }
    }
    if damaged.is_empty() {
        return Ok(None);
    }
    let list: Vec<String> = damaged.iter().map(|(path, reason)| format!("  {}: {reason}", path.display())).collect();
    let reason = format!("none of its checkpoints is whole\n{}", list.join("\n"));
    Err(TrainError::NotResumable { path: folder.to_owned(), reason })
}

/// Whether there are checkpoints in a folder, whole or not.
///
/// # Errors
/// Whatever the file system says.
pub fn any(folder: &Path) -> Result<bool, TrainError> {
    Ok(!list(folder)?.is_empty())
}

/// The teacher of the newest whole checkpoint of a run, by parameter name.
///
/// # Errors
/// If there is no checkpoint, none is whole, or a file is there and the system does not let it be read.
pub fn teacher(folder: &Path) -> Result<BTreeMap<String, Weight>, TrainError> {
    let (_, file) = newest(folder)?;
    let of_teacher = |(name, weight): (String, Weight)| Some((name.strip_prefix("teacher.")?.to_owned(), weight));
    Ok(file.tensors.into_iter().filter_map(of_teacher).collect())
}

/// Puts everything of a run's newest whole checkpoint but its step into `state`: another run goes on from there.
///
/// # Errors
/// As [`teacher`]; and if the checkpoint is not of a state with these parameters.
pub fn continue_from(folder: &Path, state: &mut TrainState, device: &Device) -> Result<(), TrainError> {
    let (manifest, mut file) = newest(folder)?;
    // Whose similarities are kept is the new run's own affair.
    file.tensors.retain(|name, _| !name.starts_with(GRAM_TEACHER));
    let gram_teacher = state.gram_teacher.take();
    let put = put(state, &manifest, file, device);
    state.gram_teacher = gram_teacher;
    state.step = 0;
    put.map_err(|reason| TrainError::NotResumable {
        path: folder.to_owned(),
        reason: format!("{reason}\n\nhint: `init.take = \"weights\"` takes the teacher's weights alone"),
    })
}

fn newest(folder: &Path) -> Result<(Manifest, WeightFile), TrainError> {
    let mut damaged = Vec::new();
    for (_, path) in list(folder)?.into_iter().rev() {
        match read(&path) {
            Ok(found) => return Ok(found),
            Err(Fault::Damaged(reason)) => damaged.push(format!("  {}: {reason}", path.display())),
            Err(Fault::Unreadable(path, source)) => return Err(TrainError::UnreadableCheckpoint { path, source }),
        }
    }
    let reason = match damaged.is_empty() {
        true => "there is no checkpoint here".to_owned(),
        false => format!("none of its checkpoints is whole\n{}", damaged.join("\n")),
    };
    Err(TrainError::NotResumable { path: folder.to_owned(), reason })
}

/// Why a checkpoint cannot be had.
enum Fault {
    /// Its content is not what was written.
    Damaged(String),
    /// The system does not let this file be read, which says nothing about its content.
    Unreadable(PathBuf, std::io::Error),
}

fn read(path: &Path) -> Result<(Manifest, WeightFile), Fault> {
    let bytes = |name: &str| {
        let path = path.join(name);
        fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Fault::Damaged(format!("`{name}` is missing")),
            _ => Fault::Unreadable(path, error),
        })
    };
    let manifest = bytes("manifest.json")?;
    let manifest: Manifest =
        serde_json::from_slice(&manifest).map_err(|e| Fault::Damaged(format!("`manifest.json`: {e}")))?;
    let bytes = bytes("state.safetensors")?;
    let damaged = |what: String| Err(Fault::Damaged(format!("`state.safetensors` {what}")));
    if bytes.len() as u64 != manifest.bytes {
        return damaged(format!("has {} bytes, {} were written", bytes.len(), manifest.bytes));
    }
    let crc32 = crc32fast::hash(&bytes);
    if crc32 != manifest.crc32 {
        return damaged(format!("has checksum {crc32:08x}, {:08x} was written", manifest.crc32));
    }
    match WeightFile::from_bytes(&bytes) {
        Ok(file) => Ok((manifest, file)),
        Err(reason) => damaged(format!("is not a readable safetensors file: {reason}")),
    }
}

/// Puts tensors into a state of the same shape. On an error the state is unchanged.
fn put(state: &mut TrainState, manifest: &Manifest, mut file: WeightFile, device: &Device) -> Result<(), String> {
    if state.gram_teacher.is_none() && file.tensors.keys().any(|name| name.starts_with(GRAM_TEACHER)) {
        // A copy that was taken after the start of the run.
        let mut with_copy = state.clone();
        with_copy.gram_teacher = Some(state.teacher.backbone.clone());
        put(&mut with_copy, manifest, file, device)?;
        *state = with_copy;
        return Ok(());
    }
    // Shapes alone: the tensors are to make room for those of the file one by one.
    let expected: BTreeMap<_, _> = tensors(state).into_iter().map(|(name, (shape, _))| (name, shape)).collect();
    for (name, shape) in &expected {
        match file.tensors.get(name) {
            None => return Err(format!("`{name}` is missing")),
            Some(found) if found.shape != *shape => {
                return Err(format!("`{name}` is {:?}, the recipe's is {shape:?}", found.shape));
            }
            Some(_) => {}
        }
    }
    if let Some(extra) = file.tensors.keys().find(|name| !expected.contains_key(*name)) {
        return Err(format!("`{extra}` does not belong to the recipe"));
    }
    if let Some(name) = state.optimizer.moments.keys().find(|name| !manifest.optimizer_steps.contains_key(*name)) {
        return Err(format!("the optimizer's steps of `{name}` are missing"));
    }
    let mut take = |name: String| {
        let weight = file.tensors.remove(&name).expect("coverage was checked");
        let length = weight.values.len();
        Tensor::<1>::from_data(TensorData::new(weight.values, [length]), device)
    };
    let mut network = |prefix: &str, network: &Network| {
        parameters::replace(network.clone(), |name, _| take(format!("{prefix}.{name}")))
    };
    state.student = network("student", &state.student);
    state.teacher = network("teacher", &state.teacher);
    if let Some(backbone) = state.gram_teacher.take() {
        state.gram_teacher = Some(parameters::replace(backbone, |name, _| take(format!("{GRAM_TEACHER}{name}"))));
    }
    for (name, moments) in &mut state.optimizer.moments {
        moments.m = take(format!("adam_m.{name}"));
        moments.v = take(format!("adam_v.{name}"));
        moments.steps = manifest.optimizer_steps[name];
    }
    state.cls_center.value = take("dino_loss.center".into()).unsqueeze();
    state.patch_center.value = take("ibot_patch_loss.center".into()).unsqueeze();
    state.step = manifest.progress.step;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use dinoxide_model::weights::Provenance;
    use dinoxide_model::{HeadConfig, ModelConfig};
    use dinoxide_random::{Purpose, stream};

    use crate::loss::LossConfig;
    use crate::optimizer::OptimConfig;

    fn state() -> TrainState {
        let config = ModelConfig {
            embed_dim: Some(8),
            depth: Some(1),
            num_heads: Some(2),
            patch_size: 4,
            ..ModelConfig::default()
        };
        let head = HeadConfig { prototypes: 5, bottleneck_dim: 3, hidden_dim: 7, ..HeadConfig::default() };
        let mut rng = stream(0, Purpose::Init, 0, 0);
        let (optim, loss) = (OptimConfig::default(), LossConfig::default());
        TrainState::new(&config.resolve(16).expect("sizes fit"), &head, None, &optim, &loss, &Device::flex(), &mut rng)
    }

    fn description() -> Description {
        let architecture = state().teacher.backbone.architecture();
        let provenance = Provenance::default();
        Description { architecture, image_size: 16, mean: [0.5; 3], std: [0.5; 3], provenance, fingerprint: None }
    }

    fn save_at(folder: &Path, step: u64, keep: usize) -> PathBuf {
        save(folder, &state(), &description(), &Progress { step, ..Progress::default() }, keep).expect("a checkpoint")
    }

    fn steps(folder: &Path) -> Vec<u64> {
        list(folder).expect("a folder").into_iter().map(|(step, _)| step).collect()
    }

    #[test]
    fn damaged_checkpoints_never_take_the_place_of_whole_ones() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        for step in [4, 8, 12] {
            save_at(folder, step, 2);
        }
        assert_eq!(steps(folder), [8, 12]);
        fs::write(folder.join(name(12)).join("state.safetensors"), "half").expect("written");
        let loaded = load_newest(folder, &mut state(), &Device::flex()).expect("a whole one").expect("a checkpoint");
        assert_eq!((loaded.progress.step, loaded.damaged.len()), (8, 1));
        // Stopped before it came to step 12 again.
        save_at(folder, 10, 1);
        assert_eq!(steps(folder), [10]);
    }

    /// A folder in the place of a file stands for every error of the system but that there is no such file.
    #[test]
    fn a_checkpoint_that_cannot_be_read_is_an_error_and_not_passed_over() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        for step in [4, 8] {
            save_at(folder, step, 3);
        }
        let mut cases = 0;
        for file in ["state.safetensors", "manifest.json"] {
            let path = folder.join(name(8)).join(file);
            let whole = fs::read(&path).expect("bytes");
            fs::remove_file(&path).expect("removed");
            let loaded = load_newest(folder, &mut state(), &Device::flex()).expect("4 is whole").expect("a checkpoint");
            assert_eq!((loaded.progress.step, loaded.damaged[0].1.clone()), (4, format!("`{file}` is missing")));
            fs::create_dir(&path).expect("a folder");
            let error = load_newest(folder, &mut state(), &Device::flex()).expect_err("unreadable").to_string();
            assert!(error.starts_with(&format!("{}: ", path.display())), "{error}");
            assert!(error.ends_with(&format!("remove `{}`", folder.join(name(8)).display())), "{error}");
            fs::remove_dir(&path).expect("removed");
            fs::write(&path, whole).expect("written");
            cases += 1;
        }
        assert_eq!(cases, 2);
        assert_eq!(steps(folder), [4, 8]);
    }

    #[test]
    fn a_whole_checkpoint_of_another_network_is_an_error_and_not_damage() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        let mut other = state();
        other.cls_center.value = Tensor::zeros([1, 6], &Device::flex());
        // The one before it would fit.
        save(folder, &other, &description(), &Progress { step: 4, ..Progress::default() }, 3).expect("a checkpoint");
        save_at(folder, 8, 3);
        let error = load_newest(folder, &mut other, &Device::flex()).expect_err("another shape").to_string();
        assert!(error.ends_with("step-000008: `dino_loss.center` is [5], the recipe's is [6]"), "{error}");
    }

    #[test]
    fn unfinished_files_and_folders_are_removed_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        fs::create_dir(folder.join(".writing-step-000004")).expect("a folder");
        fs::write(folder.join(".writing-step-000004").join("state.safetensors"), "half").expect("written");
        fs::write(folder.join(".writing-a1"), "half").expect("written");
        fs::write(folder.join("writing-a1"), "whole").expect("written");
        save_at(folder, 3, 1);
        remove_unfinished(folder).expect("removed");
        remove_unfinished(&folder.join("nowhere")).expect("nothing to remove");
        assert_eq!(fs::read_dir(folder).expect("a folder").count(), 2);
    }
}
