//! A file or folder of weights before anyone knows what they are of: tensors by name, their values not yet read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::rc::Rc;

use dinoxide_model::weights::{DESCRIPTION_KEY, Weight};
use half::{bf16, f16};
use serde_json::Value;

use crate::{ExchangeError, pytorch, safetensors_file};

/// The file with tensors in a checkpoint of a run.
const STATE: &str = "state.safetensors";

/// Largest configuration file read; they have a few kilobytes.
const MAX_CONFIG: u64 = 1 << 20;

/// Largest index of a sharded checkpoint read; that of 7 B parameters has 50 kB.
const MAX_INDEX: u64 = 1 << 24;

/// The type of a tensor's elements.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Element {
    F64,
    F32,
    F16,
    Bf16,
    /// Not a floating-point type, or one that nobody trains in.
    Other(String),
}

/// Where a tensor's bytes are.
pub(crate) enum Bytes {
    /// In a file that is open.
    File { file: Rc<File>, start: u64, length: usize },
    /// In a PyTorch file.
    PyTorch(pytorch_reader::Tensor),
}

/// A tensor whose values are not yet read.
pub(crate) struct Stored {
    pub(crate) shape: Vec<usize>,
    pub(crate) element: Element,
    pub(crate) bytes: Bytes,
}

impl Stored {
    /// Bytes that reading it takes.
    pub(crate) fn length(&self) -> usize {
        match &self.bytes {
            Bytes::File { length, .. } => *length,
            Bytes::PyTorch(tensor) => tensor.byte_len(),
        }
    }

    /// The values in single precision.
    pub(crate) fn read(&self) -> std::io::Result<Weight> {
        let bytes = match &self.bytes {
            Bytes::File { file, start, length } => {
                let mut file: &File = file;
                let mut bytes = vec![0; *length];
                file.seek(SeekFrom::Start(*start))?;
                file.read_exact(&mut bytes)?;
                bytes
            }
            Bytes::PyTorch(tensor) => tensor.read()?,
        };
        let values = match self.element {
            Element::F64 => bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
            Element::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Element::F16 => bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Element::Bf16 => bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Element::Other(_) => Vec::new(),
        };
        Ok(Weight { shape: self.shape.clone(), values })
    }
}

/// A file or folder of weights.
pub(crate) struct Source {
    /// What holds the tensors, in words.
    pub(crate) container: String,
    /// By name.
    pub(crate) tensors: BTreeMap<String, Stored>,
    /// The description that our own files carry, as JSON.
    pub(crate) description: Option<String>,
    /// `config.json` of a folder.
    pub(crate) config: Option<Value>,
    /// `preprocessor_config.json` of a folder.
    pub(crate) preprocessor: Option<Value>,
    /// Length of all files with tensors: what a reader may allocate for them.
    pub(crate) bytes: u64,
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self, ExchangeError> {
        if path.is_dir() {
            return Self::open_folder(path);
        }
        let mut source = Self::open_file(path)?;
        // A file of a downloaded folder, named by itself.
        let named = path.file_name().is_some_and(|name| name == "model.safetensors" || name == "pytorch_model.bin");
        if let Some(folder) = path.parent().filter(|_| named) {
            source.configure(folder)?;
        }
        Ok(source)
    }

    fn open_file(path: &Path) -> Result<Self, ExchangeError> {
        let mut file = File::open(path).map_err(ExchangeError::io(path))?;
        let bytes = file.metadata().map_err(ExchangeError::io(path))?.len();
        let mut start = [0; 4];
        let short = (&mut file).take(4).read(&mut start).map_err(ExchangeError::io(path))? < 4;
        let (container, tensors, description) = if !short && pytorch::is_zip(start) {
            let (tensors, description) = pytorch::read(path, bytes)?;
            ("PyTorch file", tensors, description)
        } else if !short && pytorch::is_legacy(start) {
            return Err(ExchangeError::unreadable(path, pytorch::LEGACY));
        } else {
            let (tensors, mut metadata) = safetensors_file::read(file, bytes).map_err(|reason| {
                ExchangeError::unreadable(path, format!("not a readable safetensors file: {reason}"))
            })?;
            ("safetensors", tensors, metadata.remove(DESCRIPTION_KEY))
        };
        let container = container.to_owned();
        Ok(Self { container, tensors, description, config: None, preprocessor: None, bytes })
    }

    fn open_folder(folder: &Path) -> Result<Self, ExchangeError> {
        let index = folder.join("model.safetensors.index.json");
        let single = ["model.safetensors", "pytorch_model.bin", STATE].map(|name| folder.join(name));
        let teacher = folder.join("teacher.safetensors");
        let mut source = if let Some(path) = single.iter().find(|path| path.is_file()) {
            let mut source = Self::open_file(path)?;
            source.container = format!("folder with {}", source.container);
            source
        } else if index.is_file() {
            Self::open_shards(folder, &index)?
        } else if teacher.is_file() {
            let mut source = Self::open_file(&teacher)?;
            source.container = format!("run directory with {}", source.container);
            source
        } else {
            return Err(ExchangeError::NoWeights { folder: folder.to_owned() });
        };
        source.configure(folder)?;
        Ok(source)
    }

    fn open_shards(folder: &Path, index: &Path) -> Result<Self, ExchangeError> {
        let value = json(index, MAX_INDEX)?;
        let bad = |reason: String| ExchangeError::unreadable(index, reason);
        let map = value.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| bad("no `weight_map` says which file a tensor is in".into()))?;
        let mut names = BTreeSet::new();
        for (tensor, file) in map {
            let file = file.as_str().unwrap_or_default();
            if file.is_empty() || Path::new(file).file_name().is_none_or(|name| name != file) {
                return Err(bad(format!("`{tensor}` is in `{file}`, which is not the name of a file in the folder")));
            }
            names.insert(file.to_owned());
        }
        let mut tensors = BTreeMap::new();
        let (mut description, mut bytes) = (None, 0);
        for name in &names {
            let shard = Self::open_file(&folder.join(name))?;
            bytes += shard.bytes;
            description = description.or(shard.description);
            for (tensor, stored) in shard.tensors {
                if map.get(&tensor).and_then(Value::as_str) != Some(name.as_str()) {
                    return Err(bad(format!("`{tensor}` is in `{name}`, the index has it elsewhere or not at all")));
                }
                tensors.insert(tensor, stored);
            }
        }
        if let Some(missing) = map.keys().find(|tensor| !tensors.contains_key(*tensor)) {
            return Err(bad(format!("`{missing}` is not in the file that the index names")));
        }
        let container = format!("folder with safetensors in {} files", names.len());
        Ok(Self { container, tensors, description, config: None, preprocessor: None, bytes })
    }

    /// Reads the configuration files beside the weights.
    fn configure(&mut self, folder: &Path) -> Result<(), ExchangeError> {
        let read = |name: &str| {
            let path = folder.join(name);
            path.is_file().then(|| json(&path, MAX_CONFIG)).transpose()
        };
        self.config = read("config.json")?;
        self.preprocessor = read("preprocessor_config.json")?;
        Ok(())
    }
}

fn json(path: &Path, limit: u64) -> Result<Value, ExchangeError> {
    let file = File::open(path).map_err(ExchangeError::io(path))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(ExchangeError::io(path))?;
    if bytes.len() as u64 > limit {
        return Err(ExchangeError::unreadable(
            path,
            format!("longer than {limit} bytes, too long to be what it is called"),
        ));
    }
    serde_json::from_slice(&bytes).map_err(|e| ExchangeError::unreadable(path, format!("not readable JSON: {e}")))
}
