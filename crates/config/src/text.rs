//! The text of a recipe: reading it, parsing it, and what it says about the one that it extends.

use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use crate::error::{ConfigError, Hint};
use crate::layer::line_and_column;

/// One file's text.
#[derive(Clone, Debug)]
pub(crate) struct Text {
    /// The file as it is shown to people: `configs/vitb14.toml`, `built-in vitb14.toml`.
    pub(crate) label: String,
    pub(crate) content: String,
    pub(crate) home: Home,
}

/// What a relative `extends` in the text refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Home {
    /// A file, by its canonical path: two ways to one file are the same file.
    File {
        /// The path by which it was found.
        path: PathBuf,
        /// The path that identifies it.
        canonical: PathBuf,
    },
    /// A built-in recipe, by its name.
    BuiltIn(String),
    /// Text that was handed over; it can extend nothing.
    Nowhere,
}

impl Text {
    /// Text that is not looked up; `label` stands for it in messages and origins.
    pub(crate) fn given(label: &str, content: &str) -> Self {
        Self { label: label.to_owned(), content: without_bom(content), home: Home::Nowhere }
    }

    /// A recipe built into the binary.
    pub(crate) fn built_in(name: &str, content: &str) -> Self {
        Self { label: format!("built-in {name}"), content: without_bom(content), home: Home::BuiltIn(name.to_owned()) }
    }

    /// The file at `path`.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        let label = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|source| ConfigError::Unreadable { path: label.clone(), source })?;
        // A pipe has no canonical path, and cannot be extended either.
        let canonical = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let home = Home::File { path: path.to_owned(), canonical };
        match String::from_utf8(bytes) {
            Ok(content) => Ok(Self { label, content: without_bom(&content), home }),
            Err(error) => {
                let valid = error.utf8_error().valid_up_to();
                let content = String::from_utf8_lossy(&error.as_bytes()[..valid]).into_owned();
                Err(ConfigError::NotUtf8 { at: Self { label, content, home }.place(valid) })
            }
        }
    }

    /// `label:line:column` of a byte offset.
    pub(crate) fn place(&self, offset: usize) -> String {
        let (line, column) = line_and_column(&self.content, offset);
        format!("{}:{line}:{column}", self.label)
    }

    /// The parsed text, byte spans as the parser sets them.
    pub(crate) fn parse(&self) -> Result<DeTable<'_>, ConfigError> {
        DeTable::parse(&self.content).map(toml::Spanned::into_inner).map_err(|error| {
            let span = error.span().unwrap_or_default();
            let mut problem = error.message().to_owned();
            if problem == "duplicate key"
                && let Some(key) = self.content.get(span.clone())
            {
                problem = format!("{problem} `{key}`");
            }
            ConfigError::Syntax { at: self.place(span.start), problem }
        })
    }

    /// What the text extends, with the byte offset at which that is written.
    pub(crate) fn extends(&self) -> Result<Option<(String, usize)>, ConfigError> {
        let table = self.parse()?;
        let Some(value) = table.get("extends") else { return Ok(None) };
        let wrong = |problem: String, hint: &str| ConfigError::Extends {
            at: self.place(value.span().start),
            problem,
            hint: Hint::new(hint),
        };
        match value.get_ref() {
            DeValue::String(_) if self.home == Home::Nowhere => Err(wrong(
                "this text was not read from a file, so there is nothing to extend".to_owned(),
                "load it by its name",
            )),
            DeValue::String(name) => Ok(Some((name.to_string(), value.span().start))),
            other => Err(wrong(
                format!("expected the name of one recipe as a string, found {}", kind(other)),
                "a file extends one other: `extends = \"base.toml\"`; for more, let that one extend the next",
            )),
        }
    }

    /// The same text, whichever way it was found.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (&self.home, &other.home) {
            (Home::File { canonical: a, .. }, Home::File { canonical: b, .. }) => a == b,
            (a, b) => a == b,
        }
    }
}

/// The parser would skip a byte order mark as well, but count it as a column.
fn without_bom(content: &str) -> String {
    content.strip_prefix('\u{feff}').unwrap_or(content).to_owned()
}

/// A TOML type in the words of the messages.
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

#[cfg(test)]
mod tests {
    use crate::Resolved;
    use crate::sample::{Folder, Recipe};

    #[test]
    fn extends_is_one_string() {
        let hint =
            "\n\nhint: a file extends one other: `extends = \"base.toml\"`; for more, let that one extend the next";
        for (value, found) in
            [("['b.toml', 'c.toml']", "an array"), ("3", "an integer"), ("true", "a boolean"), ("{ a = 1 }", "a table")]
        {
            let folder = Folder::new(&[("a.toml", &format!("extends = {value}\n"))]);
            let what = format!("expected the name of one recipe as a string, found {found}");
            assert_eq!(folder.message("a.toml"), format!("a.toml:1:11: `extends`: {what}{hint}"));
        }
    }

    #[test]
    fn a_file_that_is_not_toml_is_reported_with_line_and_column() {
        let cases = [
            ("[optim]\nbase_lr = 1\nbase_lr = 2\n", "3:1: duplicate key `base_lr`"),
            ("[optim]\n[run]\n[optim]\n", "3:2: duplicate key `optim`"),
            ("run.seed = 1\nrun.name = \"open\n", "2:1"),
            ("run.seed 1\n", "1:10: "),
        ];
        for (content, expected) in cases {
            for content in [content.to_owned(), content.replace('\n', "\r\n"), format!("\u{feff}{content}")] {
                let message = Folder::new(&[("a.toml", &content)]).message("a.toml");
                assert!(message.starts_with(&format!("a.toml:{expected}")), "{content:?}: {message}");
            }
        }
    }

    #[test]
    fn a_file_that_is_not_text_is_reported_with_line_and_column() {
        let folder = Folder::new(&[]);
        folder.write("latin.toml", b"# caf\xc3\xa9\nrun.name = 'caf\xe9'\n");
        folder.write("tensor.safetensors", b"\xff\xfe\x00");
        assert_eq!(folder.message("latin.toml"), "latin.toml:2:16: not valid UTF-8");
        assert_eq!(folder.message("tensor.safetensors"), "tensor.safetensors:1:1: not valid UTF-8");
    }

    #[test]
    fn given_text_extends_nothing() {
        let message = Resolved::<Recipe>::from_text("saved", "\nextends = 'vitb14'\n").unwrap_err().to_string();
        assert!(message.starts_with("saved:2:11: `extends`: this text was not read from a file"), "{message}");
    }
}
