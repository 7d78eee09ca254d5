//! `dinoxide embed`: the features of images, written in files of bounded size.
//!
//! A large set is cut into shards of a fixed number of images. A shard is `<name>.safetensors` with its tokens and labels
//! and `<name>.csv` with the images, a line for each row; the tensors are renamed into place last. A shard that is there,
//! made under the same settings, is not made again: that is how an interrupted run goes on.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::Tensor;
use dinoxide_data::{Rejected, Source};
use dinoxide_evaluation::{Batch, EvaluationError, for_each_batch};
use dinoxide_model::weights::{host, write_atomically};
use dinoxide_model::{Architecture, Fingerprint};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::eval::frozen::{Frozen, Network};
use crate::eval::sets::Set;
use crate::eval::{check_writable, header_entry};
use crate::table::count;
use crate::{Usage, terminal};

/// Bytes of tokens in a shard, unless told otherwise.
const SHARD_BYTES: usize = 256 << 20;
/// Key of the header's metadata under which the settings are kept, with the number of images in the file.
const STAMP: &str = "dinoxide.embed";
/// Key of that number. It is no setting: images that cannot be read are left out.
const IMAGES: &str = "images";

/// Tokens that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Kind {
    /// The CLS token, `[images, D]`
    Cls,
    /// The mean of the patch tokens, `[images, D]`
    Mean,
    /// The patch tokens row by row, `[images, patches, D]`
    Patches,
    /// The register tokens, `[images, registers, D]`
    Registers,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    network: Network,
    /// Images: a folder, or `synthetic`. Those of a folder per class get labels
    #[arg(long, value_name = "DIR")]
    data: String,
    /// Leave out images whose file name matches, or with a slash in it, whose path; may be given several times
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Tokens to write, after the final norm
    #[arg(long, value_name = "TOKENS,TOKENS,…", value_delimiter = ',', default_value = "cls")]
    tokens: Vec<Kind>,
    /// Divide each token by its norm: the product of two is then their cosine
    #[arg(long)]
    normalize: bool,
    /// The file to write; a large set becomes F-00001-of-00012.safetensors and so on. Killed: run again, it goes on
    #[arg(long, value_name = "F.safetensors")]
    output: PathBuf,
    /// Images in a file; default: as many as make 256 MB
    #[arg(long, value_name = "N")]
    shard_images: Option<usize>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let usage = |message: String| anyhow::Error::from(Usage(anyhow::anyhow!(message)));
    if args.output.extension().is_none_or(|extension| extension != "safetensors") {
        return Err(usage(format!("{}: give `--output` a name that ends in .safetensors", args.output.display())));
    }
    check_writable(&args.output)?;
    if args.shard_images == Some(0) {
        return Err(usage("`--shard-images` is 0, must be at least 1".into()));
    }
    let mut frozen = Frozen::new(&args.network, 1)?;
    let kinds = Kinds::new(&args.tokens, args.normalize, &frozen)?;
    let set = Set::open(&args.data, &args.exclude)?;
    let images = set.source.len();
    let per_shard = args.shard_images.unwrap_or((SHARD_BYTES / kinds.bytes_per_image()).max(1)).min(images);
    let shards = images.div_ceil(per_shard);
    let paths: Vec<PathBuf> = (1..=shards).map(|number| shard_path(&args.output, number, shards)).collect();
    refuse_other_shards(&args.output, &paths)?;
    let stamp = stamp(&frozen, &set, &kinds, per_shard);
    let (mut missing, mut written) = (Vec::new(), 0);
    for (number, path) in paths.iter().enumerate() {
        match images_in(path, &stamp)? {
            Some(images) => written += images,
            None => missing.push(number),
        }
    }
    if (1..shards).contains(&missing.len()) {
        terminal::plain(&format!("{} of {shards} files are there already", shards - missing.len()));
    }
    let total: usize = missing.iter().map(|&number| per_shard.min(images - number * per_shard)).sum();
    frozen.log.bar(total as u64, 0, "{bar:28} features of {pos}/{len} images, {eta} left");
    let mut done = 0;
    for &number in &missing {
        let indices: Vec<usize> = (number * per_shard..images.min((number + 1) * per_shard)).collect();
        let (shard, rejected) = kinds.shard(&frozen, &*set.source, &indices, done)?;
        for rejected in &rejected {
            frozen.log.line(&format!("warning: {}: {}; left out", rejected.id, rejected.reason));
        }
        written += shard.rows.len() as u64;
        shard.write(&paths[number], &*set.source, &stamp)?;
        done += indices.len();
    }
    frozen.log.clear();
    let names = match &paths[..] {
        [one] => one.display().to_string(),
        all => format!("{} to {}", all[0].display(), all[all.len() - 1].display()),
    };
    let what = match missing.len() {
        0 if shards == 1 => format!("{names} is there already, nothing was written"),
        0 => format!("{names} are there already, nothing was written"),
        all if all == shards => format!("wrote {names}"),
        some => format!("wrote {some} of {shards} files, {names}"),
    };
    let left_out = match (images as u64).saturating_sub(written) {
        0 => String::new(),
        left_out => format!(", {} left out", count(left_out)),
    };
    terminal::plain(&format!("{what}: {} of {} images{left_out}", kinds.described(), count(written)));
    Ok(ExitCode::SUCCESS)
}

/// `F.safetensors`, or `F-00002-of-00012.safetensors`.
fn shard_path(output: &Path, number: usize, shards: usize) -> PathBuf {
    if shards == 1 {
        return output.to_path_buf();
    }
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    output.with_file_name(format!("{stem}-{number:05}-of-{shards:05}.safetensors"))
}

/// Refuses files of the same name that another number of shards has left: whoever reads all of them would read images twice.
fn refuse_other_shards(output: &Path, paths: &[PathBuf]) -> anyhow::Result<()> {
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let stem = output.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let is_shard = |name: &str| {
        let numbers = name.strip_prefix(&stem).and_then(|rest| rest.strip_suffix(".safetensors"));
        numbers.is_some_and(|numbers| {
            let pattern = numbers.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect::<String>();
            numbers.is_empty() || pattern == "-00000-of-00000"
        })
    };
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        let ours = paths.iter().any(|path| path.file_name() == Some(&name));
        if !ours && is_shard(&name.to_string_lossy()) {
            return Err(Usage(anyhow::anyhow!(
                "{}: is of the same name, but of another number of files than {}\n\nhint: give another `--output`, or delete it",
                folder.join(&name).display(),
                paths.len()
            ))
            .into());
        }
    }
    Ok(())
}

/// What the features of a file depend on.
fn stamp(frozen: &Frozen, set: &Set, kinds: &Kinds, per_shard: usize) -> Value {
    let mut names = crc32fast::Hasher::new();
    (0..set.source.len()).for_each(|index| {
        names.update(set.source.id(index).as_bytes());
        names.update(b"\n");
    });
    let extraction = &frozen.extraction;
    json!({
        "weights": frozen.given.weights,
        "parameters": Fingerprint::of(&frozen.given.backbone).map(|fingerprint| fingerprint.parameters),
        "data": set.name,
        "images_found": set.source.len(),
        "image_names": names.finalize(),
        "images_per_file": per_shard,
        "tokens": kinds.tokens.iter().map(|kind| kind.name()).collect::<Vec<_>>(),
        "grid": [kinds.grid.0, kinds.grid.1],
        "normalized": kinds.normalize,
        "resize_px": extraction.resize_px,
        "crop_px": extraction.crop_px,
        // As text, which reads back as it was written.
        "mean": format!("{:?}", extraction.mean),
        "std": format!("{:?}", extraction.std),
        "classes": set.source.classes(),
    })
}

/// The number of images in a file, if it is there; it must have been made under these settings.
fn images_in(path: &Path, stamp: &Value) -> anyhow::Result<Option<u64>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => anyhow::bail!("{}: {error}", path.display()),
    };
    let hint = "hint: give another `--output`, or delete it";
    let found = header_entry(file, STAMP).unwrap_or_default();
    let Some(images) = found[IMAGES].as_u64() else {
        return Err(
            Usage(anyhow::anyhow!("{}: is there and was not written by `embed`\n\n{hint}", path.display())).into()
        );
    };
    let settings = stamp.as_object().expect("an object");
    match settings.iter().find(|(key, value)| found[key.as_str()] != **value) {
        Some((key, value)) => {
            let (path, other) = (path.display(), &found[key.as_str()]);
            Err(Usage(anyhow::anyhow!(
                "{path}: is there with other settings: `{key}` is {other}, now {value}\n\n{hint}"
            ))
            .into())
        }
        None => Ok(Some(images)),
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Cls => "cls",
            Self::Mean => "mean",
            Self::Patches => "patches",
            Self::Registers => "registers",
        }
    }
}

/// The tokens to write, and their sizes.
struct Kinds {
    tokens: Vec<Kind>,
    normalize: bool,
    dim: usize,
    grid: (usize, usize),
    registers: usize,
}

impl Kinds {
    fn new(asked: &[Kind], normalize: bool, frozen: &Frozen) -> anyhow::Result<Self> {
        let architecture = frozen.given.backbone.architecture();
        let mut tokens = asked.to_vec();
        tokens.sort_unstable();
        tokens.dedup();
        let registers = match &architecture {
            Architecture::Vit(config) => config.register_tokens,
            Architecture::ConvNext(_) => 0,
        };
        if registers == 0 && tokens.contains(&Kind::Registers) {
            let message = "`--tokens registers`: the backbone has no register tokens";
            return Err(Usage(anyhow::anyhow!(message)).into());
        }
        let side = frozen.extraction.crop_px;
        let grid = architecture.grid(side, side).map_err(|e| EvaluationError::Extraction { message: e.to_string() })?;
        // A ConvNeXt may be told to give the tokens of a finer grid than its own.
        let grid = match &architecture {
            Architecture::ConvNext(config) => config.patch_size.map_or(grid, |patch| (side / patch, side / patch)),
            Architecture::Vit(_) => grid,
        };
        Ok(Self { tokens, normalize, dim: architecture.embed_dim(), grid, registers })
    }

    /// Tokens of a kind in an image; `None` where there is one by nature.
    fn tokens_of(&self, kind: Kind) -> Option<usize> {
        match kind {
            Kind::Cls | Kind::Mean => None,
            Kind::Patches => Some(self.grid.0 * self.grid.1),
            Kind::Registers => Some(self.registers),
        }
    }

    fn bytes_per_image(&self) -> usize {
        let tokens: usize = self.tokens.iter().map(|&kind| self.tokens_of(kind).unwrap_or(1)).sum();
        tokens * self.dim * size_of::<f32>()
    }

    /// `cls [192], patches [64, 192]`.
    fn described(&self) -> String {
        let described = |&kind: &Kind| match self.tokens_of(kind) {
            Some(tokens) => format!("{} [{tokens}, {}]", kind.name(), self.dim),
            None => format!("{} [{}]", kind.name(), self.dim),
        };
        self.tokens.iter().map(described).collect::<Vec<_>>().join(", ")
    }

    /// The features of some images; `before` images are done.
    fn shard(
        &self,
        frozen: &Frozen,
        source: &dyn Source,
        indices: &[usize],
        before: usize,
    ) -> anyhow::Result<(Shard<'_>, Vec<Rejected>)> {
        let mut shard = Shard { rows: Vec::new(), tensors: vec![Vec::new(); self.tokens.len()], kinds: self };
        let mut progress = |done: usize| frozen.log.set((before + done) as u64, String::new());
        let Frozen { given, extraction, device, .. } = frozen;
        let mut visit = |batch: Batch| shard.add(batch, source);
        let rejected = for_each_batch::<EvaluationError>(
            &given.backbone,
            source,
            indices,
            extraction,
            device,
            &mut progress,
            &mut visit,
        )?;
        if shard.rows.is_empty() {
            return Err(EvaluationError::NothingReadable { rejected }.into());
        }
        Ok((shard, rejected))
    }
}

/// The features of one file.
struct Shard<'a> {
    kinds: &'a Kinds,
    /// Indices in the source.
    rows: Vec<usize>,
    /// One for each kind.
    tensors: Vec<Vec<f32>>,
}

impl Shard<'_> {
    fn add(&mut self, batch: Batch, source: &dyn Source) -> Result<(), EvaluationError> {
        let layer = batch.layers.into_iter().next_back().expect("one block was asked for");
        let dim = self.kinds.dim;
        for (kind, into) in self.kinds.tokens.iter().zip(&mut self.tensors) {
            let flat = |tokens: Tensor<3>| host(tokens.reshape([-1]));
            let mut values = match kind {
                Kind::Cls => host(layer.cls.clone().reshape([-1])),
                Kind::Mean => flat(layer.patches.clone().mean_dim(1)),
                Kind::Patches => flat(layer.patches.clone()),
                Kind::Registers => flat(layer.registers.clone().expect("the backbone has registers")),
            };
            let per_image = values.len() / batch.indices.len();
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                let affected = values.chunks(per_image).filter(|image| image.iter().any(|v| !v.is_finite())).count();
                return Err(EvaluationError::NonFiniteImage {
                    image: source.id(batch.indices[at / per_image]),
                    value: values[at],
                    images_affected: affected,
                });
            }
            if self.kinds.normalize {
                values.par_chunks_mut(dim).for_each(normalize);
            }
            into.extend(values);
        }
        self.rows.extend(batch.indices);
        Ok(())
    }

    /// Writes the images first and the tensors last, each whole or not at all.
    fn write(self, path: &Path, source: &dyn Source, stamp: &Value) -> anyhow::Result<()> {
        let failed = |path: &Path, e: &dyn std::fmt::Display| anyhow::anyhow!("{}: {e}", path.display());
        let csv_path = path.with_extension("csv");
        write_atomically(&csv_path, self.csv(source).as_bytes()).map_err(|e| failed(&csv_path, &e))?;
        let images = self.rows.len();
        let floats: Vec<Vec<u8>> =
            self.tensors.into_iter().map(|values| values.into_iter().flat_map(f32::to_le_bytes).collect()).collect();
        let labels: Option<Vec<i64>> = self.rows.iter().map(|&row| source.label(row).map(i64::from)).collect();
        let labels: Option<Vec<u8>> = labels.map(|labels| labels.into_iter().flat_map(i64::to_le_bytes).collect());
        let mut views = Vec::new();
        for (&kind, bytes) in self.kinds.tokens.iter().zip(&floats) {
            let shape = [Some(images), self.kinds.tokens_of(kind), Some(self.kinds.dim)];
            views.push((kind.name(), TensorView::new(Dtype::F32, shape.into_iter().flatten().collect(), bytes)?));
        }
        if let Some(labels) = &labels {
            views.push(("labels", TensorView::new(Dtype::I64, vec![images], labels)?));
        }
        let mut stamp = stamp.clone();
        stamp[IMAGES] = json!(images);
        let metadata = HashMap::from([(STAMP.to_owned(), stamp.to_string())]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| failed(path, &e))?;
        write_atomically(path, &bytes).map_err(|e| failed(path, &e))
    }

    /// A line for each row: the image, its label and class, empty without.
    fn csv(&self, source: &dyn Source) -> String {
        let mut text = String::from("row,image,label,class\n");
        for (row, &index) in self.rows.iter().enumerate() {
            let label = source.label(index);
            let class = label.map_or("", |label| &source.classes()[label as usize]);
            let label = label.map_or(String::new(), |label| label.to_string());
            text.push_str(&format!("{row},{},{label},{}\n", quoted(&source.id(index)), quoted(class)));
        }
        text
    }
}

/// A field of a CSV line (RFC 4180).
fn quoted(text: &str) -> String {
    if text.contains(['"', ',', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}

/// Divides a token by its norm.
fn normalize(token: &mut [f32]) {
    let squared: f64 = token.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    let scale = (1.0 / squared.sqrt().max(dinoxide_evaluation::features::NORM_EPS)) as f32;
    token.iter_mut().for_each(|value| *value *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_numbered_only_when_there_are_several() {
        let path = |number, shards| shard_path(Path::new("out/f.safetensors"), number, shards);
        assert_eq!(path(1, 1), Path::new("out/f.safetensors"));
        assert_eq!(path(2, 12), Path::new("out/f-00002-of-00012.safetensors"));
    }

    #[test]
    fn names_with_commas_and_quotes_are_quoted() {
        assert_eq!(["a/b c.png", "a,b", "say \"x\""].map(quoted), ["a/b c.png", "\"a,b\"", "\"say \"\"x\"\"\""]);
    }
}
