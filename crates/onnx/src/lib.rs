//! Backbones as ONNX files, for runtimes that know nothing of this project.
//!
//! [`export`] writes a [`Backbone`] in operators of the standard domain, version 17. Before the file is given its name it
//! is loaded and run by another runtime, on random images of two batch sizes; if it does not give what the backbone gives,
//! there is an error and no file.
//!
//! | | name | shape |
//! |---|---|---|
//! | input | `images`, or `normalized_images` | `[batch, C, H, W]`, single precision |
//! | output | `cls` | `[batch, D]` |
//! | output | `patches` | `[batch, P, D]`, row by row from the upper left |
//! | output | `registers`, if the backbone has any | `[batch, R, D]` |
//!
//! The outputs are those of [`Backbone::forward`] without a mask, after the final norm.

mod convnext;
mod graph;
mod network;
mod positions;
mod proto;
mod verify;
mod vit;

use std::io::Write;
use std::path::{Path, PathBuf};

use dinoxide_model::weights::{Description, temporary_beside};
use dinoxide_model::{Architecture, Backbone, ModelError, parameters};
use prost::Message;

/// The version of the standard operators that graphs are written in.
pub const OPSET: i64 = 17;

/// The version of the file format that came with [`OPSET`].
const IR_VERSION: i64 = 8;

/// How far a file's outputs may be from the backbone's: the largest difference of an output, over the root mean square of
/// that output where it is above 1.
pub const TOLERANCE: f32 = 1e-4;

/// Most patches of an image of a fixed size. The file is run on one before it is kept, and runtimes keep whole maps of
/// attention: a gigabyte for each head at this number.
const MOST_PATCHES: usize = 1 << 14;

/// No protobuf message may be longer, so no ONNX file without data beside it.
const LONGEST_FILE: u64 = i32::MAX as u64;

/// Which images a graph takes. The batch size is free in either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageSize {
    /// Of one size in pixels, which the backbone takes. Positions are constants: the simplest graph.
    Fixed {
        /// Height in pixels.
        height: usize,
        /// Width in pixels.
        width: usize,
    },
    /// Of any size that the backbone takes ([`Architecture::sides`]); others are an error when the graph runs.
    Dynamic,
}

/// What the values of the input are.
///
/// The input's name tells them apart, so that feeding one to a graph that wants the other is an error and not a worse
/// feature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Input {
    /// Red, green and blue on [0, 1], called `images`; the graph normalises them. The default: whoever runs the file cannot
    /// get mean and deviation wrong.
    #[default]
    Rgb,
    /// Values from which the mean was subtracted and which were divided by the deviation, called `normalized_images`.
    Normalized,
}

impl Input {
    /// The name of the graph's input.
    pub fn name(self) -> &'static str {
        match self {
            Input::Rgb => "images",
            Input::Normalized => "normalized_images",
        }
    }

    /// What the input is, for the file.
    fn doc(self, Description { mean, std, .. }: &Description) -> String {
        match self {
            Input::Rgb => {
                format!("Red, green and blue on [0, 1]. The graph subtracts {mean:?} and divides by {std:?}.")
            }
            Input::Normalized => format!(
                "Normalised images: for red, green and blue on [0, 1], subtract {mean:?} and divide by {std:?}. The graph \
                 does not."
            ),
        }
    }
}

/// How a backbone is exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Which images the graph takes.
    pub size: ImageSize,
    /// What their values are.
    pub input: Input,
}

impl Options {
    /// For images of `size`, RGB on [0, 1], which the graph normalises.
    pub fn new(size: ImageSize) -> Self {
        Self { size, input: Input::default() }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Length of the file in bytes.
    pub bytes: u64,
    /// Operations of the graph.
    pub nodes: usize,
    /// The comparisons that the file has passed.
    pub checks: Vec<Check>,
}

impl Report {
    /// The largest deviation of all comparisons, at most [`TOLERANCE`].
    pub fn max_deviation(&self) -> f32 {
        self.checks.iter().map(|check| check.deviation).fold(0.0, f32::max)
    }
}

/// A comparison of the file's outputs with the backbone's, on random images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Check {
    /// Images in the batch.
    pub batch: usize,
    /// Their height in pixels.
    pub height: usize,
    /// Their width in pixels.
    pub width: usize,
    /// The largest deviation of an output, as [`TOLERANCE`] counts it.
    pub deviation: f32,
}

/// Why a backbone was not exported. There is no file then, or the one that was there before.
#[derive(Debug, thiserror::Error)]
pub enum OnnxError {
    /// An image size that the backbone does not take.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A description of another backbone.
    #[error("onnx: the description is of another architecture than the backbone's")]
    OtherArchitecture,
    /// Normalisation inside the graph is for three channels.
    #[error(
        "onnx: the backbone takes images of {channels} channels, and a graph can normalise RGB only\n\n\
         hint: export it with normalised input"
    )]
    Channels {
        /// Channels of the backbone's images.
        channels: usize,
    },
    /// A mean or deviation that nothing can be normalised with.
    #[error("onnx: images cannot be normalised with mean {mean:?} and deviation {std:?}")]
    Normalization {
        /// Of the description.
        mean: [f32; 3],
        /// Of the description.
        std: [f32; 3],
    },
    /// More than the format can hold.
    #[error(
        "onnx: the file would have {bytes} bytes, and an ONNX file holds at most {LONGEST_FILE}\n\n\
         hint: a backbone of up to about 530 million parameters fits"
    )]
    TooLarge {
        /// Length of the file, or of its weights alone.
        bytes: u64,
    },
    /// The file system.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The backbone itself does not work.
    #[error(
        "onnx: the backbone's features of random images are not finite, so there is nothing to compare a file with"
    )]
    NotFinite,
    /// An image of more patches than attention can be computed for.
    #[error(
        "onnx: an image of {height}×{width} px has {patches} patches, at most {MOST_PATCHES} are possible\n\n\
         hint: give a smaller `--image-size`, or `dynamic`"
    )]
    TooManyPatches {
        /// Height in pixels.
        height: usize,
        /// Width in pixels.
        width: usize,
        /// Their number.
        patches: usize,
    },
    /// The file cannot be run.
    #[error("{}: the graph does not run: {reason}", path.display())]
    Runtime {
        /// The file, which was not kept.
        path: PathBuf,
        /// What the runtime said.
        reason: String,
    },
    /// The file does not compute what the backbone does.
    #[error(
        "{}: `{output}` of {batch} images of {height}×{width} pixels deviates by {deviation:.1e} from the backbone's, at \
         most {TOLERANCE:.0e} is allowed; the file was not kept\n\n\
         hint: export on the CPU, where the backbone runs in full single precision", path.display()
    )]
    Deviates {
        /// The file, which was not kept.
        path: PathBuf,
        /// Which output.
        output: &'static str,
        /// Images in the batch.
        batch: usize,
        /// Their height in pixels.
        height: usize,
        /// Their width in pixels.
        width: usize,
        /// As [`TOLERANCE`] counts it.
        deviation: f32,
    },
}

impl OnnxError {
    /// Whether the request is at fault, rather than the weights or the system.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Model(_) | Self::Channels { .. } | Self::TooManyPatches { .. })
    }
}

/// Writes `backbone` to `path` as an ONNX file that has been run and compared with it. A file that was there is replaced.
///
/// The metadata has, as text: `dinoxide`, the whole `description` as JSON; `input` (`rgb` or `normalized`), `mean` and
/// `std`; `image_size`, height and width, or what they must be multiples of.
///
/// # Errors
/// Options that do not fit the backbone, a backbone too large for the format, the file system, or a file that does not
/// compute what the backbone does. No new file is left then.
///
/// # Panics
/// If a parameter cannot be read back from the device.
pub fn export(
    backbone: &Backbone,
    description: &Description,
    options: &Options,
    path: &Path,
) -> Result<Report, OnnxError> {
    let model = model(backbone, description, options)?;
    let nodes = model.graph.as_ref().map_or(0, |graph| graph.node.len());
    let bytes = encode(model)?;
    let length = bytes.len() as u64;
    let checks = keep_if_equal(bytes, path, backbone, description, options)?;
    Ok(Report { bytes: length, nodes, checks })
}

/// The whole message.
fn model(backbone: &Backbone, description: &Description, options: &Options) -> Result<proto::Model, OnnxError> {
    let architecture = backbone.architecture();
    if description.architecture != architecture {
        return Err(OnnxError::OtherArchitecture);
    }
    let Description { mean, std, .. } = *description;
    if options.input == Input::Rgb {
        if architecture.in_channels() != 3 {
            return Err(OnnxError::Channels { channels: architecture.in_channels() });
        }
        if !mean.iter().all(|m| m.is_finite()) || !std.iter().all(|s| s.is_finite() && *s > 0.0) {
            return Err(OnnxError::Normalization { mean, std });
        }
    }
    if let ImageSize::Fixed { height, width } = options.size {
        let (rows, columns) = architecture.grid(height, width)?;
        let patches = rows.saturating_mul(columns);
        if patches > MOST_PATCHES {
            return Err(OnnxError::TooManyPatches { height, width, patches });
        }
    }
    let parameters: usize = parameters::shapes(backbone).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    fits(4 * parameters as u64)?;

    let image_size = match options.size {
        ImageSize::Fixed { height, width } => format!("{height}x{width}"),
        ImageSize::Dynamic => architecture.sides().to_string(),
    };
    let list = |values: [f32; 3]| values.map(|value| value.to_string()).join(",");
    let metadata = [
        ("dinoxide", serde_json::to_string(description).expect("a description is plain data")),
        ("input", if options.input == Input::Rgb { "rgb" } else { "normalized" }.to_owned()),
        ("mean", list(mean)),
        ("std", list(std)),
        ("image_size", image_size.clone()),
    ];
    let family = match architecture {
        Architecture::Vit(_) => "vision transformer",
        Architecture::ConvNext(_) => "ConvNeXt",
    };
    Ok(proto::Model {
        ir_version: Some(IR_VERSION),
        producer_name: Some("dinoxide".to_owned()),
        producer_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        doc_string: Some(format!(
            "Features of a {family}. Images, height and width in pixels: {image_size}; any number in a batch. Input `{}`: {}",
            options.input.name(),
            options.input.doc(description)
        )),
        graph: Some(network::build(backbone, description, options)?),
        opset_import: vec![proto::OperatorSet { domain: Some(String::new()), version: Some(OPSET) }],
        metadata_props: metadata
            .into_iter()
            .map(|(key, value)| proto::Entry { key: Some(key.to_owned()), value: Some(value) })
            .collect(),
    })
}

/// An error for what no ONNX file can hold.
fn fits(bytes: u64) -> Result<(), OnnxError> {
    if bytes > LONGEST_FILE { Err(OnnxError::TooLarge { bytes }) } else { Ok(()) }
}

fn encode(model: proto::Model) -> Result<Vec<u8>, OnnxError> {
    fits(model.encoded_len() as u64)?;
    Ok(model.encode_to_vec())
}

/// Writes the bytes under another name, compares that file with the backbone, and gives it its name.
fn keep_if_equal(
    bytes: Vec<u8>,
    path: &Path,
    backbone: &Backbone,
    description: &Description,
    options: &Options,
) -> Result<Vec<Check>, OnnxError> {
    let io = |source| OnnxError::Io { path: path.to_owned(), source };
    let mut file = temporary_beside(path, ".onnx").map_err(io)?;
    file.write_all(&bytes).and_then(|()| file.as_file().sync_all()).map_err(io)?;
    // The runtime reads the file itself, and a large backbone need not be in memory once more.
    drop(bytes);
    let checks = verify::compare(file.path(), path, backbone, description, options)?;
    file.persist(path).map_err(|e| io(e.error))?;
    Ok(checks)
}

#[cfg(test)]
mod tests;
