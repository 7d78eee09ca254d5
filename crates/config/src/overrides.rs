//! Overrides: `optim.base_lr=0.002` on top of all files.

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use crate::error::{ConfigError, Hint};

/// Parses one override into the table that sets it.
///
/// The value is TOML (`3`, `true`, `"text"`, `[1, 2]`, `{ start = 1.0 }`); what is not TOML is a plain string, so paths
/// and names need no quotes. White space around key and value is dropped.
///
/// # Errors
/// [`ConfigError::Override`] when there is no `=` or the key is not a dotted TOML key, [`ConfigError::Extends`] for
/// `extends`, which is a matter of files.
pub(crate) fn parse(text: &str) -> Result<DeTable<'_>, ConfigError> {
    let wrong = |problem: &str| ConfigError::Override {
        text: text.to_owned(),
        problem: problem.to_owned(),
        hint: Hint::new("write `table.key=value`, for instance `--set schedule.lr.peak=0.002`"),
    };
    let (key, value) = text.split_once('=').ok_or_else(|| wrong("no `=`"))?;
    let path = parse_key(key).ok_or_else(|| wrong(&format!("`{}` is not a dotted key", key.trim())))?;
    if path == ["extends"] {
        return Err(ConfigError::Extends {
            at: format!("--set {text}"),
            problem: "only a file can extend another".to_owned(),
            hint: Hint::new("name the other recipe itself, or write a file that extends it"),
        });
    }
    let value = value.trim();
    let mut tree =
        DeValue::parse(value).map(Spanned::into_inner).unwrap_or_else(|_| DeValue::String(DeString::Borrowed(value)));
    for key in path.into_iter().rev() {
        let mut table = DeTable::new();
        table.insert(Spanned::new(0..0, DeString::Owned(key)), Spanned::new(0..0, tree));
        tree = DeValue::Table(table);
    }
    match tree {
        DeValue::Table(table) => Ok(table),
        _ => Err(wrong("the key is empty")),
    }
}

/// The parts of a dotted key. Parsed inside an inline table, where no other syntax can slip in: `key` has no `=`.
fn parse_key(key: &str) -> Option<Vec<String>> {
    let document = format!("{{ {} = 0 }}", key.trim());
    let mut level = DeValue::parse(&document).ok()?.into_inner();
    let mut path = Vec::new();
    while let DeValue::Table(table) = level {
        let (key, value) = table.into_iter().next()?;
        path.push(key.into_inner().into_owned());
        level = value.into_inner();
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The override's key, and its value's TOML type and Rust form.
    fn parsed(text: &str) -> (String, String) {
        let table = parse(text).unwrap();
        let mut found = Vec::new();
        crate::layer::walk_leaves(&table, "", &mut |key, value, _| {
            let shown = match value.get_ref() {
                DeValue::String(text) => format!("string {text}"),
                DeValue::Integer(number) => format!("integer {number}"),
                DeValue::Float(number) => format!("float {number}"),
                DeValue::Boolean(value) => format!("boolean {value}"),
                DeValue::Array(elements) => format!("array of {}", elements.len()),
                other => format!("{other:?}"),
            };
            found.push((key.to_owned(), shown));
        });
        assert_eq!(found.len(), 1, "{text}");
        found.remove(0)
    }

    #[test]
    fn values_are_toml_or_else_plain_strings() {
        let cases = [
            ("a.b=3", "a.b", "integer 3"),
            ("a.b = 3 ", "a.b", "integer 3"),
            ("a=2e-4", "a", "float 2e-4"),
            ("a=-inf", "a", "float -inf"),
            ("a=true", "a", "boolean true"),
            ("a=[1, 2, 3]", "a", "array of 3"),
            ("a=\"x y\"", "a", "string x y"),
            ("a='3'", "a", "string 3"),
            ("a={ b = 5 }", "a.b", "integer 5"),
            ("data.train=/some/dir", "data.train", "string /some/dir"),
            ("model.arch=vit_small", "model.arch", "string vit_small"),
            ("run.name=two words", "run.name", "string two words"),
            ("run.name=3 words here", "run.name", "string 3 words here"),
            ("run.name=true story", "run.name", "string true story"),
            ("run.name=x # y", "run.name", "string x # y"),
            ("run.name=C:\\data", "run.name", "string C:\\data"),
            ("run.note=a=b", "run.note", "string a=b"),
            ("run.name=", "run.name", "string "),
            ("lr_scale.\"blocks.0\"=1.5", "lr_scale.\"blocks.0\"", "float 1.5"),
        ];
        assert_eq!(cases.len(), 19);
        for (text, key, value) in cases {
            assert_eq!(parsed(text), (key.to_owned(), value.to_owned()), "{text}");
        }
    }

    #[test]
    fn a_key_that_is_not_one_is_refused() {
        for text in ["=3", "a..b=3", ".a=3", "a b=3", "[a]\nb=3", "# a=3", "a, b=3", "a }\n=3", "a\nb=3"] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.starts_with(&format!("--set {text}: `")), "{message}");
            assert!(message.contains("is not a dotted key\n\nhint: write `table.key=value`"), "{message}");
        }
    }

    #[test]
    fn a_missing_equals_sign_is_named() {
        assert_eq!(
            parse("optim.base_lr").unwrap_err().to_string(),
            "--set optim.base_lr: no `=`\n\nhint: write `table.key=value`, for instance `--set schedule.lr.peak=0.002`"
        );
    }

    #[test]
    fn extends_is_not_for_overrides() {
        let message = parse("extends=vitb14").unwrap_err().to_string();
        assert!(message.starts_with("--set extends=vitb14: `extends`: only a file can extend another"), "{message}");
    }
}
