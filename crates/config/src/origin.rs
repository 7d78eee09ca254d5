//! Where a value was set, and the list of it for every key of a resolved recipe.

use std::fmt;

/// Where a value was set last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it: it is the default of the struct.
    Default,
    /// A file, or a recipe built into the binary.
    File {
        /// The file as it is shown to people: `configs/vitb14.toml`, `built-in vitb14.toml`.
        path: String,
        /// Line, counted from 1.
        line: usize,
        /// Column in characters, counted from 1.
        column: usize,
    },
    /// An override, as it was written: `optim.base_lr=0.002`.
    Override(String),
}

impl Origin {
    /// The place as error messages give it, which is with the column.
    pub(crate) fn to_place(&self) -> String {
        match self {
            Self::File { path, line, column } => format!("{path}:{line}:{column}"),
            other => other.to_string(),
        }
    }
}

/// `default`, `configs/vitb14.toml:31` or `--set optim.base_lr=0.002`.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line, .. } => write!(f, "{path}:{line}"),
            Self::Override(text) => write!(f, "--set {text}"),
        }
    }
}

/// The origin of every leaf key of a resolved value, in the order of the resolved file.
///
/// Keys are dotted (`optim.base_lr`). An array of tables has a key of its own (`stages`) and one for every leaf inside
/// (`stages[0].steps`); any other array is one leaf.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins(pub(crate) Vec<(String, Origin)>);

impl Origins {
    /// The origin of a dotted key; `None` when the resolved value has no such leaf.
    pub fn get(&self, key: &str) -> Option<&Origin> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, origin)| origin)
    }

    /// All keys with their origins.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Origin)> {
        self.0.iter().map(|(key, origin)| (key.as_str(), origin))
    }
}
