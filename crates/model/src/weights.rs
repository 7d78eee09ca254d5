//! Weight files: safetensors with the references' parameter names, and what is needed to use them without a recipe.
//!
//! The header's metadata carries the backbone's complete [`Architecture`], the run it came from and its [`Fingerprint`], so
//! that evaluation needs the file alone. [`assemble`] covers every tensor or is an error that lists what is missing, extra,
//! or of another shape. Reading files, ours and others', is the crate `exchange`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tempfile::NamedTempFile;

use crate::{Architecture, Backbone, ConvNextConfig, Fingerprint, ModelError, VitConfig, layers, parameters};

/// Why tensors do not make up a backbone.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    /// An architecture that cannot be built.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An architecture far larger than what there is for it.
    #[error("the architecture has at least {needed} parameters, and there are {found}")]
    TooLarge {
        /// A lower bound of the parameters.
        needed: usize,
        /// Values in the tensors.
        found: usize,
    },
    /// Tensors that do not cover the model exactly, a line for each.
    #[error("the tensors do not cover the model exactly\n{}", .0.join("\n"))]
    Coverage(Vec<String>),
}

/// One tensor of a weight file, in single precision.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Vec<f32>,
}

/// Tensors by name, and the metadata of the header.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WeightFile {
    /// By name.
    pub tensors: BTreeMap<String, Weight>,
    /// Free text by key.
    pub metadata: BTreeMap<String, String>,
}

impl WeightFile {
    /// Reads the bytes of a file of single-precision tensors.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.iter() {
            if view.dtype() != Dtype::F32 {
                return Err(format!("`{name}` is {:?}, expected F32", view.dtype()));
            }
            let values = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            tensors.insert(name.to_owned(), Weight { shape: view.shape().to_vec(), values });
        }
        let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok(Self { tensors, metadata })
    }

    /// The file's bytes; the same contents give the same bytes.
    ///
    /// # Panics
    /// If a tensor's values do not fill its shape.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes).expect("memory takes whatever is written");
        bytes
    }

    /// Writes the file so that a crash or a full disk leaves either the old file or the new one.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        write_atomically_with(path, |out| self.write_to(out))
    }

    fn write_to(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let shapes = self.tensors.iter().map(|(name, weight)| (name.as_str(), weight.shape.as_slice())).collect();
        write_tensors(out, &self.metadata, &shapes, |name| Cow::Borrowed(&self.tensors[name].values))
    }
}

/// Writes tensors of these shapes as a safetensors file, asking for the values of one at a time, in the order of their
/// names: no more than one of them has to be on the host.
///
/// # Errors
/// Whatever `out` says.
///
/// # Panics
/// If a tensor's values do not fill its shape.
pub fn write_tensors<'a>(
    out: &mut dyn Write,
    metadata: &BTreeMap<String, String>,
    shapes: &BTreeMap<&str, &[usize]>,
    mut values: impl FnMut(&str) -> Cow<'a, [f32]>,
) -> std::io::Result<()> {
    // Not written by the safetensors crate, which takes the metadata as a hash map, in an order that changes.
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), json!(metadata));
    }
    let length = |shape: &[usize]| shape.iter().product::<usize>();
    let mut end = 0;
    for (name, shape) in shapes {
        let start = end;
        end += size_of::<f32>() * length(shape);
        header.insert((*name).to_owned(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] }));
    }
    let mut header = serde_json::to_vec(&header).expect("a header is plain data");
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let mut bytes = Vec::new();
    for (name, shape) in shapes {
        let values = values(name);
        assert_eq!(length(shape), values.len(), "values of `{name}` {shape:?}");
        for block in values.chunks(WRITTEN_AT_ONCE) {
            bytes.clear();
            bytes.extend(block.iter().flat_map(|value| value.to_le_bytes()));
            out.write_all(&bytes)?;
        }
    }
    Ok(())
}

/// Values of a tensor that are turned into bytes at once.
const WRITTEN_AT_ONCE: usize = 1 << 16;

/// Writes to a temporary file beside `path`, syncs it, and renames it into place.
///
/// # Errors
/// Whatever the file system says; the temporary file is removed then.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    write_atomically_with(path, |out| out.write_all(bytes))
}

/// As [`write_atomically`], with what `write` writes.
///
/// # Errors
/// Whatever the file system or `write` says; the temporary file is removed then.
pub fn write_atomically_with(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut file = temporary_beside(path, "")?;
    write(&mut file)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

/// A file in the folder of `path` whose name ends in `suffix`, to be renamed to `path` when it is whole; removed otherwise.
///
/// # Errors
/// Whatever the file system says.
pub fn temporary_beside(path: &Path, suffix: &str) -> std::io::Result<NamedTempFile> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    // Temporary files are their owner's alone unless told otherwise; this one is to be like any other.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.prefix(".writing-").suffix(suffix).tempfile_in(folder)
}

/// What a weight file says of itself under the metadata key `dinoxide`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// The backbone.
    pub architecture: Architecture,
    /// Side of the global crops it was trained on, in pixels: the size at which to evaluate it by default.
    pub image_size: usize,
    /// Mean of the colour channels that images were normalised with, on [0, 1].
    pub mean: [f32; 3],
    /// Their standard deviation.
    pub std: [f32; 3],
    /// Where the weights come from.
    pub provenance: Provenance,
    /// What the weights must compute; filled in when the file is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
}

impl Description {
    /// With the fingerprint of this backbone.
    #[must_use]
    pub fn of(&self, backbone: &Backbone) -> Self {
        Self { fingerprint: Fingerprint::of(backbone), ..self.clone() }
    }

    /// The metadata of a file with this description.
    ///
    /// # Panics
    /// Never: a description is plain data.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let json = serde_json::to_string(self).expect("a description is plain data");
        // PyTorch's loaders ask for a format.
        [(DESCRIPTION_KEY.to_owned(), json), ("format".to_owned(), "pt".to_owned())].into()
    }
}

/// Where weights come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// The recipe, as the run named it.
    pub recipe: String,
    /// Optimisation steps behind these weights; 0 for untrained ones.
    pub steps: u64,
    /// Images seen.
    pub images: u64,
    /// The training data, as the run named it.
    pub data: String,
    /// The version of this software.
    pub software: String,
    /// What they scored, each with the conditions of its measurement.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<Score>,
}

/// A score of weights, as measured while they were trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// What was measured: `k-NN top-1`.
    pub name: String,
    /// Percent.
    pub value: f64,
    /// Optimisation steps behind the weights when it was.
    pub steps: u64,
    /// The protocol of the evaluation, as its command writes it.
    pub protocol: serde_json::Value,
}

impl Provenance {
    /// Whether anything is known of it, as nothing is of others' files.
    pub fn is_known(&self) -> bool {
        *self != Self::default()
    }
}

/// The metadata key of the [`Description`].
pub const DESCRIPTION_KEY: &str = "dinoxide";

/// The name a parameter has in the reference's checkpoints; they differ from ours for one token.
pub fn reference_name(architecture: &Architecture, name: &str) -> String {
    match architecture {
        Architecture::Vit(config) if config.rope.is_some() && name == "register_tokens" => "storage_tokens".to_owned(),
        _ => name.to_owned(),
    }
}

/// Second names of tensors in the reference's checkpoints, each with the first. DINOv3 lists the norm of each stage of a
/// ConvNeXt, and that of the last is the final norm.
fn aliases(architecture: &Architecture) -> &'static [(&'static str, &'static str)] {
    match architecture {
        Architecture::Vit(_) => &[],
        Architecture::ConvNext(_) => &[("norms.3.weight", "norm.weight"), ("norms.3.bias", "norm.bias")],
    }
}

/// Buffers that DINOv3's checkpoints carry: computed, not trained.
fn buffers(backbone: &Backbone) -> Vec<(String, Vec<f32>)> {
    let mut buffers = Vec::new();
    let Backbone::Vit(vit) = backbone else { return buffers };
    let config = vit.config();
    if let Some(rope) = vit.rope() {
        buffers.push(("rope_embed.periods".to_owned(), rope.periods()));
    }
    if config.mask_k_bias && config.qkv_bias {
        buffers.extend(
            (0..config.depth).map(|i| (format!("blocks.{i}.attn.qkv.bias_mask"), layers::bias_mask(config.embed_dim))),
        );
    }
    buffers
}

/// A backbone's weights under the references' names: parameters, their second names, and buffers.
///
/// # Panics
/// If a parameter cannot be read back from the device.
pub fn reference_tensors(backbone: &Backbone) -> BTreeMap<String, Weight> {
    let mut tensors = BTreeMap::new();
    let architecture = backbone.architecture();
    parameters::visit(backbone, |name, shape, value| {
        let weight = Weight { shape: shape.to_vec(), values: host(value) };
        tensors.insert(reference_name(&architecture, name), weight);
    });
    for (alias, name) in aliases(&architecture) {
        let weight: Weight = tensors[*name].clone();
        tensors.insert((*alias).to_owned(), weight);
    }
    for (name, values) in buffers(backbone) {
        tensors.insert(name, Weight { shape: vec![values.len()], values });
    }
    tensors
}

/// A weight file of a backbone: its tensors under the references' names, with its description and its fingerprint.
///
/// # Panics
/// If a parameter cannot be read back from the device.
pub fn backbone_file(backbone: &Backbone, description: &Description) -> WeightFile {
    WeightFile { tensors: reference_tensors(backbone), metadata: description.of(backbone).metadata() }
}

/// The values of a flat tensor on the host.
///
/// # Panics
/// If they cannot be read back from the device as single precision.
pub fn host(value: Tensor<1>) -> Vec<f32> {
    value.into_data().try_into_vec().expect("single-precision values can be read back from their device")
}

/// The backbone that `tensors`, under the references' names, make up.
///
/// # Errors
/// An architecture that cannot be built, or tensors that do not cover it exactly.
pub fn assemble(
    architecture: &Architecture,
    mut tensors: BTreeMap<String, Weight>,
    device: &Device,
) -> Result<Backbone, AssemblyError> {
    architecture.check()?;
    let (needed, found) = (parameter_count(architecture), tensors.values().map(|w| w.values.len()).sum::<usize>());
    if needed > found.saturating_mul(2).saturating_add(1 << 12) {
        return Err(AssemblyError::TooLarge { needed, found });
    }
    // Every value is replaced below; the stream only fills memory.
    let mut rng = dinoxide_random::stream(0, dinoxide_random::Purpose::Init, 0, 0);
    let backbone = Backbone::new(architecture, device, &mut rng);

    let mut differences = Vec::new();
    for (alias, name) in aliases(architecture) {
        // A file may lack the second name, but not contradict the first.
        if let Some(found) = tensors.remove(*alias)
            && tensors.get(*name).is_some_and(|first| *first != found)
        {
            differences.push(format!("  `{alias}` is not equal to `{name}`, of which it is another name"));
        }
    }
    for (name, values) in buffers(&backbone) {
        // A buffer is computed from the description; a file may lack it, but not contradict it.
        if let Some(found) = tensors.remove(&name)
            && (found.values.len() != values.len()
                || found.values.iter().zip(&values).any(|(a, b)| (a - b).abs() > 1e-3 * b.abs().max(1.0)))
        {
            differences.push(format!("  `{name}` does not hold what the description implies"));
        }
    }
    for (name, shape) in parameters::shapes(&backbone) {
        let name = reference_name(architecture, &name);
        match tensors.get(&name) {
            None => differences.push(format!("  missing: `{name}` {shape:?}")),
            Some(found) if found.shape != shape => {
                differences.push(format!("  `{name}` is {:?}, the model expects {shape:?}", found.shape));
            }
            Some(_) => {}
        }
    }
    let expected: Vec<String> =
        parameters::shapes(&backbone).iter().map(|(n, _)| reference_name(architecture, n)).collect();
    differences.extend(tensors.keys().filter(|n| !expected.contains(n)).map(|n| format!("  extra: `{n}`")));
    if !differences.is_empty() {
        return Err(AssemblyError::Coverage(differences));
    }
    Ok(parameters::replace(backbone, |name, _| {
        let weight = tensors.remove(&reference_name(architecture, name)).expect("coverage was checked");
        let length = weight.values.len();
        Tensor::from_data(TensorData::new(weight.values, [length]), device)
    }))
}

/// A lower bound of a backbone's parameters, from its description alone: what a hostile file must be checked against
/// before anything of that size is allocated.
pub fn parameter_count(architecture: &Architecture) -> usize {
    match architecture {
        Architecture::Vit(config) => vit_parameters(config),
        Architecture::ConvNext(config) => convnext_parameters(config),
    }
}

fn convnext_parameters(config: &ConvNextConfig) -> usize {
    let stages = config.dims.iter().zip(config.depths);
    let stages = stages.map(|(dim, depth)| dim.saturating_mul(dim.saturating_mul(8) + 49).saturating_mul(depth));
    let transitions = config.dims.windows(2).map(|pair| pair[0].saturating_mul(pair[1]).saturating_mul(4));
    let stem = config.dims[0].saturating_mul(config.in_channels).saturating_mul(16);
    stages.chain(transitions).fold(stem, usize::saturating_add)
}

fn vit_parameters(config: &VitConfig) -> usize {
    let block =
        config.embed_dim.saturating_mul(config.embed_dim.saturating_mul(4) + config.ffn_hidden.saturating_mul(2));
    let patch =
        config.embed_dim.saturating_mul(config.in_channels * config.patch_size).saturating_mul(config.patch_size);
    let positions = config.learned.as_ref().map_or(0, |l| config.embed_dim.saturating_mul(l.grid * l.grid));
    let registers = config.embed_dim.saturating_mul(config.register_tokens);
    config.depth.saturating_mul(block).saturating_add(patch).saturating_add(positions).saturating_add(registers)
}
