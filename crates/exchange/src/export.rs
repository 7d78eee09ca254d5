//! From a backbone to a file or folder for another library.
//!
//! What is written is read back before it takes its name: an export that this crate would not load, or that would compute
//! something else, is an error and leaves nothing behind.

use std::fs::{self, File};
use std::path::Path;

use dinoxide_model::config::NormKind;
use dinoxide_model::weights::{
    AssemblyError, Description, WeightFile, assemble, backbone_file, reference_tensors, write_atomically,
};
use dinoxide_model::{Architecture, Backbone, Fingerprint};

use crate::architecture::assumed_norm_eps;
use crate::{ExchangeError, Tensors, hugging_face, load, pytorch, reference, timm};

/// What to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A safetensors file with the references' names and our description: what a training run writes.
    Safetensors,
    /// A folder for Hugging Face `transformers`, read with `AutoModel.from_pretrained`.
    HuggingFace,
    /// A `.pth` file with the references' names, read with `torch.load`.
    Meta,
    /// A safetensors file with `timm`'s names.
    Timm,
}

impl Format {
    /// The name of the format in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::HuggingFace => "hf",
            Self::Meta => "meta",
            Self::Timm => "timm",
        }
    }
}

/// Writes `backbone` to `path` in a format, and gives notes of what the format changes or leaves out.
///
/// # Errors
/// A backbone that the format cannot express, features that are not finite, an output that is in the way, or what the file
/// system says. Nothing is left at `path` then.
pub fn export(
    backbone: &Backbone,
    description: &Description,
    format: Format,
    path: &Path,
) -> Result<Vec<String>, ExchangeError> {
    check_output(format, path)?;
    let inexpressible = |reason: String| ExchangeError::Inexpressible { format: format.name(), reason };
    let mut architecture = backbone.architecture();
    let mut tensors = parameters(backbone);
    let mut notes = Vec::new();
    match format {
        Format::Safetensors => Ok(()),
        Format::HuggingFace => hugging_face::adjust(&mut architecture, &mut tensors, &mut notes),
        Format::Meta => adjust_meta(&mut architecture, &mut tensors),
        Format::Timm => timm::adjust(&mut architecture, &mut tensors, &mut notes),
    }
    .map_err(inexpressible)?;
    if let Format::Meta | Format::Timm = format {
        notes.extend(norm_note(&architecture, format));
    }

    let assembly = |source: AssemblyError| ExchangeError::Assembly { path: path.to_owned(), source };
    let adjusted = assemble(&architecture, tensors, &burn::tensor::Device::flex()).map_err(assembly)?;
    let Some(fingerprint) = Fingerprint::of(&adjusted) else {
        return Err(inexpressible(
            "the backbone's features are not finite; its weights are damaged or diverged".to_owned(),
        ));
    };
    let description =
        Description { architecture: architecture.clone(), fingerprint: Some(fingerprint), ..description.clone() };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let io = ExchangeError::io(path);
    let temporary = tempfile::Builder::new().prefix(".writing-").tempdir_in(parent).map_err(io)?;
    let file = temporary.path().join("weights");
    let metadata = description.metadata();
    match format {
        Format::Safetensors => {
            backbone_file(&adjusted, &description).write(&file).map_err(ExchangeError::io(path))?;
        }
        Format::Timm => {
            let tensors = timm::from_reference(&architecture, parameters(&adjusted));
            WeightFile { tensors, metadata }.write(&file).map_err(ExchangeError::io(path))?;
        }
        Format::Meta => {
            let mut tensors = reference_tensors(&adjusted);
            if matches!(&architecture, Architecture::Vit(vit) if vit.rope.is_none() && vit.layer_scale_init.is_none())
                && let Some(token) = tensors.remove("mask_token")
            {
                tensors.insert("masked_embed".to_owned(), token);
            }
            let to = File::create(&file).map_err(ExchangeError::io(path))?;
            let json = &metadata[dinoxide_model::weights::DESCRIPTION_KEY];
            pytorch::write(&to, &tensors, json).and_then(|()| to.sync_all()).map_err(ExchangeError::io(path))?;
        }
        Format::HuggingFace => {
            fs::create_dir(&file).map_err(ExchangeError::io(path))?;
            let tensors = hugging_face::from_reference(&architecture, parameters(&adjusted));
            let weights = WeightFile { tensors, metadata };
            let write =
                |name: &str, bytes: &[u8]| write_atomically(&file.join(name), bytes).map_err(ExchangeError::io(path));
            weights.write(&file.join("model.safetensors")).map_err(ExchangeError::io(path))?;
            let config = hugging_face::config(&architecture, description.image_size);
            for (name, value) in
                [("config.json", config), ("preprocessor_config.json", hugging_face::preprocessor(&description))]
            {
                let text = serde_json::to_string_pretty(&value).expect("plain data");
                write(name, format!("{text}\n").as_bytes())?;
            }
        }
    }
    load(&file, &burn::tensor::Device::flex())?;
    if path.is_dir() {
        // Empty, as checked; some systems do not rename onto a folder.
        fs::remove_dir(path).map_err(ExchangeError::io(path))?;
    }
    fs::rename(&file, path).map_err(ExchangeError::io(path))?;
    Ok(notes)
}

/// Refuses what would be overwritten by something of another kind, before the work is done.
/// That a file or folder can be written at `path`.
///
/// # Errors
/// [`ExchangeError::Output`]: what is in the way.
pub fn check_output(format: Format, path: &Path) -> Result<(), ExchangeError> {
    let refuse = |reason: &str| Err(ExchangeError::Output { path: path.to_owned(), reason: reason.to_owned() });
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    if parent.is_some_and(|parent| !parent.is_dir()) {
        return refuse("the folder that it would be in does not exist");
    }
    match (format, path.is_dir(), path.exists()) {
        (Format::HuggingFace, true, _) => {
            let mut entries = fs::read_dir(path).map_err(ExchangeError::io(path))?;
            if entries.next().is_some() { refuse("a folder with something in it") } else { Ok(()) }
        }
        (Format::HuggingFace, false, true) => refuse("a file, and this format is a folder"),
        (_, true, _) => refuse("a folder, and this format is a file"),
        _ => Ok(()),
    }
}

/// Parameters under the references' names, without buffers and second names.
fn parameters(backbone: &Backbone) -> Tensors {
    let mut tensors = reference_tensors(backbone);
    tensors
        .retain(|name, _| name != "rope_embed.periods" && !name.ends_with(".bias_mask") && !name.starts_with("norms."));
    tensors
}

/// Files of tensors alone do not say the epsilon of their norms; what to do where it is not the usual one.
fn norm_note(architecture: &Architecture, format: Format) -> Option<String> {
    let (eps, rope) = match architecture {
        Architecture::Vit(config) => (config.norm_eps, config.rope.is_some()),
        Architecture::ConvNext(config) => (config.norm_eps, false),
    };
    let assumed = assumed_norm_eps(rope);
    (eps != assumed).then(|| {
        let argument = match format {
            Format::Timm => format!(": create the model with `norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps:e})`"),
            _ => String::new(),
        };
        format!(
            "the norms have epsilon {eps:e}, which the file does not say and models of this kind build with {assumed:e}{argument}"
        )
    })
}

/// What the repositories cannot express, or express without a mask for the keys' bias.
fn adjust_meta(architecture: &mut Architecture, tensors: &mut Tensors) -> Result<(), String> {
    let Architecture::Vit(config) = architecture else { return Ok(()) };
    if config.rope.is_some() {
        return Ok(());
    }
    if config.norm == NormKind::RmsNorm {
        return Err("with learned positions, the repositories have no RMS normalisation".to_owned());
    }
    if config.untie_cls_and_patch_norms || config.untie_global_and_local_cls_norm {
        return Err("with learned positions, the repositories have one final norm".to_owned());
    }
    if config.mask_k_bias {
        config.mask_k_bias = false;
        reference::fold_buffers(tensors, true)?;
    }
    hugging_face::pack_swiglu(config, tensors)
}
