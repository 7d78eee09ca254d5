//! From a file or folder to a backbone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::Device;
use dinoxide_model::weights::{AssemblyError, Description, Provenance, Weight, assemble, reference_name};
use dinoxide_model::{Architecture, Backbone, Fingerprint};
use serde_json::Value;

use crate::architecture::{self, Hints};
use crate::source::{Element, Source};
use crate::{ExchangeError, Tensors, hugging_face, reference, timm};

/// What a file's fingerprint said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The backbone computes what it did when the file was written, and its parameters are those that were written.
    Exact,
    /// It computes what it did, from weights that were stored in less than single precision since.
    Near,
    /// There is none, as in every file of others.
    Absent,
}

/// A backbone from a file.
#[derive(Debug)]
pub struct Loaded {
    /// The backbone.
    pub backbone: Backbone,
    /// What is known of it; of foreign files, what their format implies.
    pub description: Description,
    /// What was found, in words: `Hugging Face names in a folder with safetensors`.
    pub format: String,
    /// What was assumed, and what was left out.
    pub notes: Vec<String>,
    /// What the fingerprint said.
    pub verdict: Verdict,
}

/// Whose names the tensors have, and of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Names {
    ReferenceVit,
    ReferenceConvNext,
    HuggingFaceVit,
    HuggingFaceConvNext,
    TimmVit,
    TimmConvNext,
}

/// A tensor that only one kind of names has, and whose path ends where the backbone's own names begin. `timm`'s ViTs are
/// told from the reference's later.
const ANCHORS: [(&str, Names); 5] = [
    ("embeddings.cls_token", Names::HuggingFaceVit),
    ("stages.0.downsample_layers.0.weight", Names::HuggingFaceConvNext),
    ("downsample_layers.0.0.weight", Names::ReferenceConvNext),
    ("stem.0.weight", Names::TimmConvNext),
    ("cls_token", Names::ReferenceVit),
];

/// Path segments that wrappers put in: data parallelism, compilation, recomputation.
const WRAPPERS: [&str; 4] = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// Modules beside the blocks that are not part of a backbone.
const HEADS: [&str; 6] = ["head.", "head_dist.", "dino_head.", "ibot_head.", "fc.", "classifier."];

/// Normalisation of ImageNet images, which every reference trains with.
const IMAGENET: ([f32; 3], [f32; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);

/// Side of the images that the papers evaluate on.
const IMAGE_SIZE: usize = 224;

/// Most colour channels: hyperspectral images have some hundreds.
const MAX_CHANNELS: usize = 1024;

/// Loads the backbone in a file or folder, whatever library wrote it.
///
/// # Errors
/// What cannot be read, is no backbone, does not cover one exactly, or does not agree with its fingerprint.
pub fn load(path: &Path, device: &Device) -> Result<Loaded, ExchangeError> {
    let source = Source::open(path)?;
    let bad = |reason: String| ExchangeError::unreadable(path, reason);
    let Selection { names, inner, of_run, mut notes } = select(&source).map_err(bad)?;
    let exact = inner.values().all(|name| source.tensors[name].element == Element::F32);
    let tensors = read(&source, &inner).map_err(bad)?;

    let timm_config = source.config.as_ref().and_then(|config| config.get("architecture")).is_some();
    let names = match names {
        Names::ReferenceVit if timm::is_vit(&tensors, timm_config) => Names::TimmVit,
        names => names,
    };
    let config = source.config.as_ref();
    let (mut tensors, hints) = match names {
        Names::ReferenceVit => reference::normalise(tensors),
        Names::ReferenceConvNext => Ok((tensors, Hints::default())),
        Names::HuggingFaceVit => hugging_face::vit(tensors, config),
        Names::HuggingFaceConvNext => hugging_face::convnext(tensors, config),
        Names::TimmVit => timm::vit(tensors),
        Names::TimmConvNext => Ok((timm::convnext(tensors), Hints::default())),
    }
    .map_err(bad)?;

    let description: Description = match &source.description {
        Some(json) => serde_json::from_str(json)
            .map_err(|e| bad(format!("its description of the backbone is not readable: {e}")))?,
        None => {
            let (architecture, assumed) = architecture::derive(&tensors, &hints).map_err(bad)?;
            notes.extend(assumed);
            describe(architecture, &source, &mut notes)
        }
    };
    if source.description.is_none()
        && let Architecture::Vit(config) = &description.architecture
    {
        reference::fold_buffers(&mut tensors, config.mask_k_bias).map_err(bad)?;
    }
    if of_run {
        let renamed = |(name, weight): (String, Weight)| (reference_name(&description.architecture, &name), weight);
        tensors = tensors.into_iter().map(renamed).collect();
    }
    let channels = description.architecture.in_channels();
    if channels > MAX_CHANNELS {
        return Err(bad(format!("its images would have {channels} channels, at most {MAX_CHANNELS} are supported")));
    }
    let assembly = |source: AssemblyError| ExchangeError::Assembly { path: path.to_owned(), source };
    let backbone = assemble(&description.architecture, tensors, device).map_err(assembly)?;
    let verdict = match &description.fingerprint {
        None => {
            notes.push(
                "no fingerprint: whether the backbone computes what it did where it comes from is not checked".into(),
            );
            Verdict::Absent
        }
        Some(recorded) => {
            let found = Fingerprint::of(&backbone)
                .ok_or_else(|| bad("its features are not finite, although they were when it was written".to_owned()))?;
            let wrong = |source| ExchangeError::Fingerprint { path: path.to_owned(), source };
            recorded.check(&found, exact).map_err(wrong)?;
            if exact { Verdict::Exact } else { Verdict::Near }
        }
    };
    let whose = match names {
        Names::ReferenceVit | Names::ReferenceConvNext => "reference",
        Names::HuggingFaceVit | Names::HuggingFaceConvNext => "Hugging Face",
        Names::TimmVit | Names::TimmConvNext => "timm",
    };
    let format = format!("{whose} names, {}", source.container);
    Ok(Loaded { backbone, description, format, notes, verdict })
}

/// The backbone among the tensors of a file.
struct Selection {
    /// Whose names its tensors have.
    names: Names,
    /// Their names without what is around them, each with the name in the file.
    inner: BTreeMap<String, String>,
    /// Whether it is a checkpoint of ours, whose names are those of the parameters.
    of_run: bool,
    /// What is left out.
    notes: Vec<String>,
}

/// Finds the backbone among the tensors.
fn select(source: &Source) -> Result<Selection, String> {
    let mut clean = BTreeMap::new();
    for name in source.tensors.keys() {
        let short: Vec<&str> = name.split('.').filter(|segment| !WRAPPERS.contains(segment)).collect();
        if let Some(other) = clean.insert(short.join("."), name.clone()) {
            return Err(format!("`{other}` and `{name}` are the same tensor but for wrappers around it"));
        }
    }
    let of_run = clean.keys().any(|name| name.starts_with("adam_m."));
    if of_run && source.description.is_none() {
        return Err(
            "the state of a training run, of a version that did not describe its backbone\n\nhint: the newest \
            backbone is `teacher.safetensors` in the run directory"
                .to_owned(),
        );
    }
    let mut candidates: Vec<(usize, String, Names)> = Vec::new();
    for (anchor, names) in ANCHORS {
        for name in clean.keys() {
            let Some(prefix) = name.strip_suffix(anchor).filter(|p| p.is_empty() || p.ends_with('.')) else { continue };
            // `embeddings.` is no wrapper, and a ConvNeXt's stages are no backbones of their own.
            if prefix.ends_with("embeddings.") || names == Names::ReferenceConvNext && prefix.contains("stages.") {
                continue;
            }
            let mut prefix = prefix.to_owned();
            if names == Names::HuggingFaceConvNext {
                // Current versions have the final norm outside of `model`.
                let outer = prefix.strip_suffix("model.").unwrap_or(&prefix);
                if clean.contains_key(&format!("{outer}layer_norm.weight")) {
                    prefix = outer.to_owned();
                }
            }
            candidates.push((rank(&prefix), prefix, names));
        }
    }
    candidates.sort_by(|a, b| (a.0, a.1.len(), &a.1).cmp(&(b.0, b.1.len(), &b.1)));
    let Some((_, prefix, names)) = candidates.into_iter().next() else {
        let some: Vec<String> = source.tensors.keys().take(5).map(|name| format!("`{name}`")).collect();
        return Err(format!(
            "no ViT or ConvNeXt of a kind that is known here is in it; its {} tensors begin with {}",
            source.tensors.len(),
            if some.is_empty() { "nothing".to_owned() } else { some.join(", ") }
        ));
    };
    let mut inner = BTreeMap::new();
    let mut left_out: BTreeMap<String, usize> = BTreeMap::new();
    for (short, name) in clean {
        match short.strip_prefix(&prefix) {
            Some(rest) if rest.starts_with("head.norm.") && names == Names::TimmConvNext => {
                inner.insert(rest.to_owned(), name);
            }
            Some(rest) if HEADS.iter().all(|head| !rest.starts_with(head)) => {
                inner.insert(rest.to_owned(), name);
            }
            _ => {
                let segments: Vec<&str> = short.split('.').take(2).collect();
                *left_out.entry(segments.join(".")).or_default() += 1;
            }
        }
    }
    let note = |(what, count): (String, usize)| {
        let tensors = if count == 1 { "1 tensor".to_owned() } else { format!("{count} tensors") };
        format!("left out: `{what}`, {tensors}")
    };
    let notes = match of_run {
        true => vec!["a run's checkpoint: its teacher; left out: student, heads and optimizer".to_owned()],
        false => left_out.into_iter().map(note).collect(),
    };
    Ok(Selection { names, inner, of_run, notes })
}

/// Which of several backbones is meant: the teacher, then the one that is there alone, and the student last.
fn rank(prefix: &str) -> usize {
    match prefix.split('.').next() {
        Some("teacher") => 0,
        Some("model_ema" | "teacher_ema" | "ema") => 1,
        Some("") => 2,
        Some("student") => 4,
        Some("gram_teacher") => 5,
        _ => 3,
    }
}

/// Reads the values of a backbone's tensors.
fn read(source: &Source, inner: &BTreeMap<String, String>) -> Result<Tensors, String> {
    let mut foreign = BTreeSet::new();
    let mut length = 0u64;
    for name in inner.values() {
        let stored = &source.tensors[name];
        if let Element::Other(element) = &stored.element {
            foreign.insert(format!("  `{name}` is {element}"));
        }
        length = length.saturating_add(stored.length() as u64);
    }
    if !foreign.is_empty() {
        let list: Vec<String> = foreign.into_iter().collect();
        return Err(format!("tensors that are not of a floating-point type\n{}", list.join("\n")));
    }
    // Tensors may share storage, but hardly any do.
    if length > source.bytes.saturating_mul(2) {
        return Err(format!("its tensors would take {length} bytes, and there are {}: they overlap", source.bytes));
    }
    inner
        .iter()
        .map(|(short, name)| {
            let weight = source.tensors[name].read().map_err(|e| format!("`{name}`: {e}"))?;
            Ok((short.clone(), weight))
        })
        .collect()
}

/// The description of a backbone that came without one.
fn describe(architecture: Architecture, source: &Source, notes: &mut Vec<String>) -> Description {
    let numbers = |value: Option<&Value>| -> Option<[f32; 3]> {
        let list: Vec<f32> = value?.as_array()?.iter().map(|v| v.as_f64().unwrap_or(f64::NAN) as f32).collect();
        list.try_into().ok().filter(|list: &[f32; 3]| list.iter().all(|v| v.is_finite()))
    };
    let timm = source.config.as_ref().and_then(|config| config.get("pretrained_cfg"));
    let from = |processor: &str, timm_key: &str| {
        let value = source.preprocessor.as_ref().and_then(|config| config.get(processor));
        numbers(value).or_else(|| numbers(timm?.get(timm_key)))
    };
    let (mean, std) =
        match (from("image_mean", "mean"), from("image_std", "std").filter(|std| std.iter().all(|v| *v > 0.0))) {
            (Some(mean), Some(std)) => (mean, std),
            _ => {
                notes.push("mean and standard deviation of ImageNet images".to_owned());
                IMAGENET
            }
        };
    let image_size = match &architecture {
        Architecture::Vit(config) => {
            let trained = config.learned.as_ref().map(|learned| learned.grid.saturating_mul(config.patch_size));
            let size = trained.unwrap_or(IMAGE_SIZE).min(IMAGE_SIZE);
            (size / config.patch_size * config.patch_size).max(config.patch_size)
        }
        Architecture::ConvNext(_) => IMAGE_SIZE,
    };
    Description { architecture, image_size, mean, std, provenance: Provenance::default(), fingerprint: None }
}
