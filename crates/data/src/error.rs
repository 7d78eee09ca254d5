//! What can go wrong with a data set as a whole, and with one of its images.

use std::path::PathBuf;

use crate::{DecodeError, Rejected};

/// One image could not be read. A run goes on without it: see [`SampleReader`](crate::SampleReader).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{id}`: {reason}")]
pub struct ReadError {
    /// The image, as [`Source::id`](crate::Source::id) names it.
    pub id: String,
    /// Why.
    pub reason: DecodeError,
}

/// A data set cannot be opened, or is not fit to train on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Nothing is at the path.
    #[error("data: `{}`: no such folder{}", .path.display(), paragraph(.hint))]
    MissingFolder {
        /// The path as given.
        path: PathBuf,
        /// What may have been meant.
        hint: Option<String>,
    },
    /// Something other than a folder is at the path.
    #[error("data: `{}` is a file, not a folder{}", .path.display(), paragraph(.hint))]
    NotAFolder {
        /// The path as given.
        path: PathBuf,
        /// What may have been meant.
        hint: Option<String>,
    },
    /// A folder, or a link within one, cannot be followed.
    #[error(
        "data: `{}`: cannot be listed: {reason}\n\n\
         hint: make it readable, or start its name with a dot to leave it out", .path.display()
    )]
    Unreadable {
        /// The entry.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// A folder without images.
    #[error(
        "data: `{}`: no images among {files} file(s){}\n\n\
         hint: an image is a file named *.{}, at any depth", .path.display(), listing(.extensions), .known.join(", *.")
    )]
    NoImages {
        /// The folder.
        path: PathBuf,
        /// How many files were seen, hidden ones aside.
        files: usize,
        /// Their extensions, most frequent first, with counts.
        extensions: Vec<(String, usize)>,
        /// The extensions that would have been taken.
        known: &'static [&'static str],
    },
    /// A synthetic spec has a key that does not exist.
    #[error("data: `{spec}`: unknown key `{key}`\n\nhint: {}", match .nearest {
        Some(nearest) => format!("did you mean `{nearest}`? The keys are {}", .known.join(", ")),
        None => format!("the keys are {}", .known.join(", ")),
    })]
    UnknownKey {
        /// The whole spec.
        spec: String,
        /// The key.
        key: String,
        /// The key that is spelled most like it.
        nearest: Option<&'static str>,
        /// All keys.
        known: &'static [&'static str],
    },
    /// A synthetic spec is not a list of `key=value`, or has a value that its key does not take.
    #[error("data: `{spec}`: `{part}` is not {expected}")]
    BadSpec {
        /// The whole spec.
        spec: String,
        /// The part that is wrong.
        part: String,
        /// What may stand there.
        expected: &'static str,
    },
    /// A pattern that selects images by name.
    #[error("data: pattern `{pattern}`: {reason}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Images and maps of which no two belong together.
    #[error(
        "data: `{}`: {images} image(s) and {maps} {noun}(s), no name in common\n\n\
         hint: put them into `img/` and `{folder}/` under the same names, or `NAME{ending}.png` beside `NAME.jpg`, or name \
         both folders", .path.display()
    )]
    NoPairs {
        /// The folder.
        path: PathBuf,
        /// Images found.
        images: usize,
        /// Maps found.
        maps: usize,
        /// What the maps are called.
        noun: &'static str,
        /// The folder in which they would be found.
        folder: &'static str,
        /// What would be found beside an image.
        ending: &'static str,
    },
    /// Two files of one name, of which only one can be meant.
    #[error(
        "there are two files called `{name}`: {} and {}\n\nhint: which of them is meant cannot be told; keep one, or tell them \
         apart with `--image-suffix` and `--map-suffix`",
        first.display(), second.display()
    )]
    Ambiguous {
        /// Their path below the folder, without extension and suffix.
        name: String,
        /// The one.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// A list of names to use is missing, cannot be read or is empty.
    #[error(
        "data: list `{}`: {reason}\n\nhint: a list is a text file with a name a line, without extension",
        .path.display()
    )]
    List {
        /// The list.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A list of names to use has one that is not there.
    #[error(
        "data: `{}`: `{name}` is listed, but there is no image and {noun} of that name ({missing} of {listed} names)",
        .list.display()
    )]
    ListedButMissing {
        /// The list.
        list: PathBuf,
        /// The first name without a pair.
        name: String,
        /// How many have none.
        missing: usize,
        /// How many are listed.
        listed: usize,
        /// What the maps are called.
        noun: &'static str,
    },
    /// A value in the configuration is out of range.
    #[error("data: `{key}` is {value}, expected {expected}")]
    Config {
        /// The key, within the `[data]` table.
        key: &'static str,
        /// The value found.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// No readable image was found for a position.
    #[error(
        "data: position {position}: none of the {} image(s) tried can be read{}\n\n\
         hint: is this a folder of images?", .rejected.len(), first_of(.rejected)
    )]
    NothingReadable {
        /// The position in the sample order.
        position: u64,
        /// The images tried.
        rejected: Vec<Rejected>,
    },
    /// Too many images cannot be read.
    #[error(
        "data: {} of the {seen} image(s) read so far cannot be read ({:.1} %, `max_bad_share` allows {:.1} %){}\n\n\
         hint: repair or remove them, or raise `max_bad_share`",
        .rejected.len(), 100.0 * .rejected.len() as f64 / *.seen as f64, 100.0 * .max_share, first_of(.rejected)
    )]
    TooManyBad {
        /// How many different images were looked at.
        seen: u64,
        /// The share that is allowed.
        max_share: f64,
        /// Those that cannot be read, in the order in which they were met.
        rejected: Vec<Rejected>,
    },
}

impl DataError {
    /// Whether what was asked for is at fault (a path that leads to no images, a spec or a value that is none) rather than
    /// the images or the system.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::MissingFolder { .. }
            | Self::NotAFolder { .. }
            | Self::NoImages { .. }
            | Self::UnknownKey { .. }
            | Self::BadSpec { .. }
            | Self::Pattern { .. }
            | Self::NoPairs { .. }
            | Self::Ambiguous { .. }
            | Self::List { .. }
            | Self::ListedButMissing { .. }
            | Self::Config { .. } => true,
            Self::Unreadable { .. } | Self::NothingReadable { .. } | Self::TooManyBad { .. } => false,
        }
    }
}

fn paragraph(hint: &Option<String>) -> String {
    hint.as_ref().map_or(String::new(), |text| format!("\n\nhint: {text}"))
}

fn listing(extensions: &[(String, usize)]) -> String {
    if extensions.is_empty() {
        return String::new();
    }
    let list: Vec<_> = extensions.iter().map(|(name, count)| format!("{name} ×{count}")).collect();
    format!(" ({})", list.join(", "))
}

/// The first five, a line each, and how many more there are: what a message shows of a list.
pub fn first_of(rejected: &[Rejected]) -> String {
    const SHOWN: usize = 5;
    let mut text = String::new();
    for one in rejected.iter().take(SHOWN) {
        text += &format!("\n  `{}`: {}", one.id, one.reason);
    }
    if rejected.len() > SHOWN {
        text += &format!("\n  and {} more", rejected.len() - SHOWN);
    }
    text
}
