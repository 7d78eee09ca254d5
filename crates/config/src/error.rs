//! What can be wrong with a recipe.

use std::fmt;

/// A recipe that cannot be used. The text names the place, says what is wrong, and ends with a hint where there is one.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No file and no built-in recipe has the name that was given.
    #[error("{}recipe `{name}` not found; looked at {looked}{hint}", Prefix(.at))]
    NotFound {
        /// Where the name is written, when it is in an `extends`.
        at: Option<String>,
        /// The name that was looked up.
        name: String,
        /// Everything that was tried.
        looked: String,
        /// The nearest known names.
        hint: Hint,
    },
    /// The name is that of a directory.
    #[error("{}`{path}` is a directory, not a recipe file{hint}", Prefix(.at))]
    Directory {
        /// Where the name is written, when it is in an `extends`.
        at: Option<String>,
        /// The directory.
        path: String,
        /// The file in it that may be meant.
        hint: Hint,
    },
    /// The file exists and cannot be read.
    #[error("{path}: cannot read the file: {source}")]
    Unreadable {
        /// The file.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is not text.
    #[error("{at}: not valid UTF-8")]
    NotUtf8 {
        /// `path:line:column` of the first wrong byte.
        at: String,
    },
    /// The file is not TOML.
    #[error("{at}: {problem}")]
    Syntax {
        /// `path:line:column`.
        at: String,
        /// What the TOML parser says.
        problem: String,
    },
    /// `extends` is not a string, or stands where there is nothing to extend.
    #[error("{at}: `extends`: {problem}{hint}")]
    Extends {
        /// `path:line:column`, or the override.
        at: String,
        /// What is wrong.
        problem: String,
        /// What to write instead.
        hint: Hint,
    },
    /// A file extends itself, directly or through others.
    #[error("{chain}: circular `extends`")]
    Circular {
        /// `a.toml extends b.toml extends a.toml`.
        chain: String,
    },
    /// A key that the recipe does not have.
    #[error("{at}: unknown key `{key}`{hint}")]
    UnknownKey {
        /// `path:line:column`, or the override.
        at: String,
        /// The dotted key.
        key: String,
        /// The nearest keys, or all keys of that table.
        hint: Hint,
    },
    /// A value of the wrong type, outside its range, or not among those allowed.
    #[error("{at}: {}{problem}{hint}", Key(.key))]
    Value {
        /// `path:line:column`, or the override.
        at: String,
        /// The dotted key; empty when the whole recipe is meant.
        key: String,
        /// What was expected and what was found.
        problem: String,
        /// What to write instead.
        hint: Hint,
    },
    /// An override that is not of the form `key=value`.
    #[error("--set {text}: {problem}{hint}")]
    Override {
        /// The override as it was written.
        text: String,
        /// What is wrong.
        problem: String,
        /// How to write it.
        hint: Hint,
    },
    /// The recipe's type holds something that TOML cannot express: a mistake in the struct, not in a file.
    #[error("the recipe cannot be written as TOML: {0}")]
    Unwritable(#[from] toml::ser::Error),
}

/// One thing to do about an error; shown after a blank line, or nothing at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hint(Option<String>);

impl Hint {
    pub(crate) fn none() -> Self {
        Self(None)
    }

    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(Some(text.into()))
    }

    /// `intro: `a`, `b``, or nothing when there are no names.
    pub(crate) fn names(intro: &str, names: &[String]) -> Self {
        if names.is_empty() { Self::none() } else { Self::new(format!("{intro}: {}", quoted(names))) }
    }

    pub(crate) fn or(self, other: impl FnOnce() -> Self) -> Self {
        if self.0.is_some() { self } else { other() }
    }

    /// The hint itself, without the word `hint`.
    pub fn text(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |text| write!(f, "\n\nhint: {text}"))
    }
}

/// `` `a`, `b`, `c` ``
pub(crate) fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

struct Prefix<'a>(&'a Option<String>);

impl fmt::Display for Prefix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |at| write!(f, "{at}: "))
    }
}

struct Key<'a>(&'a str);

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "`{}`: ", self.0) }
    }
}
