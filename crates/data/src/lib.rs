//! Image sources, decoding, sampling order and the parallel loader. Host memory only: no tensors here.
//!
//! The way of a sample: a [`Source`] knows its images by index ([`FolderSource`], [`SyntheticSource`], or whatever
//! [`open`] finds behind a spec); [`SampleOrder`] says which index stands at which position of an endless, shuffled run;
//! [`SampleReader`] reads the image of a position, drawing another one where it cannot be decoded; [`Loader`] does that
//! (and the caller's augmentation) on several threads and hands results out in order; [`BadImages`] keeps the list of what
//! could not be read, and stops a run in which that is too much. [`AnnotatedSource`] is for evaluations: images with a mask or
//! a depth map each.
//!
//! Everything is a function of (seed, position). Neither the number of threads nor a resume changes a sample.

mod annotated;
mod config;
mod decode;
mod draw;
mod error;
mod folder;
mod integer_map;
mod loader;
mod order;
mod source;
mod subset;
mod synthetic;

pub use annotated::{AnnotatedSource, MapKind, Pairing};
pub use config::DataConfig;
pub use decode::{DecodeError, DecodeLimits, decode, decode_file};
pub use draw::{BadImages, Drawn, Rejected, SampleReader};
pub use error::{DataError, ReadError, first_of};
pub use folder::FolderSource;
pub use integer_map::{IntegerMap, decode_integer_map, read_integer_map};
pub use loader::{Loader, LoaderError};
pub use order::SampleOrder;
pub use source::{GroundTruth, Source, open};
pub use subset::Subset;
pub use synthetic::{Split, SyntheticConfig, SyntheticSource, is_synthetic};

#[cfg(test)]
mod testing;
