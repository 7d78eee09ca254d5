//! What a data set is to the rest of the program, and how one is opened.

use std::path::Path;
use std::sync::Arc;

use image::{GrayImage, RgbImage};

use crate::synthetic::{self, SyntheticSource};
use crate::{DataError, DecodeLimits, FolderSource, ReadError};

/// A finite set of images, known by index. Reading is a pure function of the index, from any thread.
///
/// # Panics
/// Implementations may panic on an index that is not below [`len`](Self::len).
pub trait Source: Send + Sync {
    /// How many images there are, readable or not.
    fn len(&self) -> usize;

    /// Whether there are none. [`open`] never returns such a source.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A stable name of an image, for lists and messages: for a folder, the path below its root with `/` between names.
    fn id(&self, index: usize) -> String;

    /// Reads an image: 8 bits per channel, sRGB values as stored, upright.
    ///
    /// # Errors
    /// [`ReadError`] when it is damaged, of an unknown format or outside the limits.
    fn read(&self, index: usize) -> Result<RgbImage, ReadError>;

    /// The class of an image: an index into [`classes`](Self::classes), or `None` when the set is not labelled.
    fn label(&self, index: usize) -> Option<u32>;

    /// The names of the classes; empty when the set is not labelled.
    fn classes(&self) -> &[String];

    /// What is known about each pixel. Only synthetic images have it.
    fn ground_truth(&self, _index: usize) -> Option<GroundTruth> {
        None
    }
}

/// Labels for each pixel of an image, of the image's own size.
#[derive(Clone, Debug, PartialEq)]
pub struct GroundTruth {
    /// 0 for background, otherwise the class plus 1.
    pub mask: GrayImage,
    /// Distance in metres, row by row: `height · width` values.
    pub depth: Vec<f32>,
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
}

/// Opens a data set from its spec:
///
/// - a path: every image below that folder, see [`FolderSource`];
/// - `synthetic`, or `synthetic:` and a list such as `split=val,images=2000,size=64,seed=0`: images drawn on the fly,
///   see [`SyntheticConfig`](crate::SyntheticConfig). A folder of that name is reached as `./synthetic`.
///
/// # Errors
/// [`DataError`] when the folder is missing, is a file, cannot be listed or has no images; when the list has an unknown
/// key or a value out of range.
pub fn open(spec: &str, limits: &DecodeLimits) -> Result<Arc<dyn Source>, DataError> {
    limits.validate()?;
    if let Some(config) = synthetic::parse_spec(spec)? {
        return Ok(Arc::new(SyntheticSource::new(config)?));
    }
    Ok(Arc::new(FolderSource::open(Path::new(spec), limits)?))
}
