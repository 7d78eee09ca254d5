//! Reading a tree as a typed recipe, and turning what serde says about it into the place, the key and a hint.

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

use crate::error::{ConfigError, Hint, quoted};
use crate::keys::{all_keys, expected_names, nearest_keys, nearest_names, variants};
use crate::layer::{Place, Places, is_all_tables, join, walk};
use crate::origin::Origin;

/// What serde says about a tree, and where.
pub(crate) struct Fault {
    message: String,
    place: Place,
}

/// Reads a marked table as a `T`.
pub(crate) fn read<T: DeserializeOwned>(table: &DeTable<'_>, places: &Places) -> Result<T, Fault> {
    T::deserialize(Deserializer::from(Spanned::new(0..1, table.clone()))).map_err(|error| {
        let number = error.span().map_or(0, |span| span.start);
        let message = error.message().to_owned();
        let place = narrow(&message, number, table, places).unwrap_or_else(|| places.at(number).clone());
        Fault { message, place }
    })
}

/// Serde reads an enum with data as a whole before it looks inside, and then speaks of the whole. This finds the part.
fn narrow(message: &str, number: usize, table: &DeTable<'_>, places: &Places) -> Option<Place> {
    let name = message.split('`').nth(1)?;
    let mut whole = None;
    walk(table, "", &mut |_, value| {
        if value.span().start == number {
            whole = value.get_ref().as_table();
        }
    });
    let inside = whole.filter(|_| !places.at(number).is_key)?;
    let span = if message.starts_with("unknown field") {
        inside.get_key_value(name)?.0.span()
    } else if message.starts_with("unknown variant") {
        inside.values().find(|value| value.get_ref().as_str() == Some(name))?.span()
    } else {
        return None;
    };
    Some(places.at(span.start).clone())
}

impl Fault {
    /// Whether only a required key is missing, which a file that is extended may still supply.
    pub(crate) fn is_missing_field(&self) -> bool {
        self.message.starts_with("missing field")
    }

    /// The fault of one file or override.
    pub(crate) fn explain<T: DeserializeOwned>(self) -> ConfigError {
        let at = self.place.origin.to_place();
        if self.message.starts_with("unknown field") {
            return self.unknown_key::<T>(at);
        }
        let Place { key, origin, .. } = self.place;
        let (problem, hint) = describe::<T>(&self.message, &key, &origin);
        ConfigError::Value { at, key, problem, hint }
    }

    /// The fault of a merged recipe, all parts of which are valid alone.
    pub(crate) fn explain_merged<T: DeserializeOwned>(self) -> ConfigError {
        let together = "each part of the recipe is valid alone, the parts together are not; \
                        see which keys of this table the others set";
        match self.explain::<T>() {
            ConfigError::UnknownKey { at, key, .. } => ConfigError::UnknownKey { at, key, hint: Hint::new(together) },
            ConfigError::Value { at, key, problem, hint } => {
                ConfigError::Value { at, key, problem, hint: hint.or(|| Hint::new(together)) }
            }
            other => other,
        }
    }

    fn unknown_key<T: DeserializeOwned>(self, at: String) -> ConfigError {
        let key = self.place.key;
        let table = key.rsplit_once('.').map_or("", |(table, _)| table);
        let siblings: Vec<String> = expected_names(&self.message).iter().map(|name| join(table, name)).collect();
        let mut known = siblings.clone();
        known.extend(all_keys::<T>());
        if matches!(self.place.origin, Origin::File { .. }) {
            known.push("extends".to_owned());
        }
        let whose = if table.is_empty() { "top-level keys".to_owned() } else { format!("keys of `{table}`") };
        let hint = Hint::names("similar keys", &nearest_keys(&key, &known)).or(|| Hint::names(&whose, &siblings));
        ConfigError::UnknownKey { at, key, hint }
    }
}

/// The problem and the hint for a value that serde refuses.
fn describe<T: DeserializeOwned>(message: &str, key: &str, origin: &Origin) -> (String, Hint) {
    if message.starts_with("unknown variant") {
        let found = message.split('`').nth(1).unwrap_or_default();
        let allowed = expected_names(message);
        let hint = Hint::names("similar values", &nearest_names(found, &allowed));
        return (format!("`{found}` is not one of {}", quoted(&allowed)), hint);
    }
    let mismatch = message.strip_prefix("invalid type: ").or_else(|| message.strip_prefix("invalid value: "));
    if let Some((found, expected)) = mismatch.and_then(|rest| rest.rsplit_once(", expected ")) {
        let hint = match origin {
            Origin::Override(text) if expected == "a string" => quote_override(text),
            _ => Hint::none(),
        };
        return (format!("expected {}, found {}", name_expected(expected), name_found(found)), hint);
    }
    // What the toml crate says to a number in place of an enum, without the names that are allowed.
    if message == "wanted string or table" {
        let path: Vec<String> = key.split('.').map(str::to_owned).collect();
        if let Some(allowed) = variants::<T>(&path) {
            return (format!("expected one of {}", quoted(&allowed)), Hint::none());
        }
    }
    (message.to_owned(), Hint::none())
}

/// `run.name=2024` is a number to TOML; a string of digits needs its quotes.
fn quote_override(text: &str) -> Hint {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    Hint::new(format!("for a string, quote the value: --set '{}=\"{}\"'", key.trim(), value.trim()))
}

/// Serde's name of an expected type, in the words of a TOML file.
fn name_expected(expected: &str) -> String {
    let whole = |low: i128, high: i128| format!("a whole number from {low} to {high}");
    match expected {
        "f32" | "f64" => "a number".to_owned(),
        "u8" => whole(0, u8::MAX.into()),
        "u16" => whole(0, u16::MAX.into()),
        "u32" => whole(0, u32::MAX.into()),
        "u64" | "usize" => "a whole number that is not negative".to_owned(),
        "i8" => whole(i8::MIN.into(), i8::MAX.into()),
        "i16" => whole(i16::MIN.into(), i16::MAX.into()),
        "i32" => whole(i32::MIN.into(), i32::MAX.into()),
        "i64" | "isize" => "a whole number".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        "a sequence" => "an array".to_owned(),
        "a map" => "a table".to_owned(),
        other if other.starts_with("struct ") || other.starts_with("internally tagged enum ") => "a table".to_owned(),
        other => other.to_owned(),
    }
}

/// Serde's name of what it found, in the words of a TOML file.
fn name_found(found: &str) -> String {
    match found {
        "map" => "a table".to_owned(),
        "sequence" => "an array".to_owned(),
        other => match other.strip_prefix("floating point ") {
            Some(number) => format!("number {number}"),
            None => other.to_owned(),
        },
    }
}

/// Whether the origin of this value speaks for everything inside it, defaults that serde filled in included.
pub(crate) fn is_leaf(value: &DeValue<'_>) -> bool {
    match value {
        DeValue::Table(_) => false,
        DeValue::Array(elements) => !is_all_tables(elements),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use crate::sample::Folder;

    /// The message for one file, `a.toml`, with this content.
    fn message(content: &str) -> String {
        Folder::new(&[("a.toml", content)]).message("a.toml")
    }

    /// The message for one override of an empty recipe.
    fn override_message(text: &str) -> String {
        Folder::new(&[("a.toml", "")]).load("a.toml", &[text]).unwrap_err()
    }

    #[test]
    fn unknown_keys_are_reported_with_line_and_nearest_key() {
        let cases = [
            // Misspelt, in a table and in a nested one, however the table is written.
            ("# head\n[optim]\nbase_lrr = 1\n", "3:1: unknown key `optim.base_lrr`", "similar keys: `optim.base_lr`"),
            (
                "[optim]\n  learning_rate = 1\n",
                "2:3: unknown key `optim.learning_rate`",
                "similar keys: `optim.base_lr`",
            ),
            (
                "[model]\ndepth = 3\n[model.head]\nhiden_dim = 1\n",
                "4:1: unknown key `model.head.hiden_dim`",
                "similar keys: `model.head.hidden_dim`",
            ),
            (
                "model.head.hiden_dim = 1\n",
                "1:12: unknown key `model.head.hiden_dim`",
                "similar keys: `model.head.hidden_dim`",
            ),
            (
                "model = { depth = 3, head = { hiden_dim = 1 } }\n",
                "1:31: unknown key `model.head.hiden_dim`",
                "similar keys: `model.head.hidden_dim`",
            ),
            // A misspelt table.
            ("\n[optimizer]\nbase_lr = 1\n", "2:2: unknown key `optimizer`", "similar keys: `optim`"),
            // The right key in the wrong table.
            ("[optim]\npatch_size = 14\n", "2:1: unknown key `optim.patch_size`", "similar keys: `model.patch_size`"),
            ("crop_px = 14\n", "1:1: unknown key `crop_px`", "similar keys: `probe.crop_px`"),
            ("extend = 'b.toml'\n", "1:1: unknown key `extend`", "similar keys: `extends`"),
            // In an array of tables, and in an enum with data.
            (
                "[[stages]]\n[[stages]]\nstep = 3\n",
                "3:1: unknown key `stages[1].step`",
                "similar keys: `stages[1].steps`",
            ),
            (
                "[schedule]\nkind = 'cosine'\nstart = 1.0\nend = 0.0\nstrt = 2.0\n",
                "5:1: unknown key `schedule.strt`",
                "similar keys: `schedule.start`",
            ),
            // Nothing is near.
            (
                "[optim]\nzzz = 1\n",
                "2:1: unknown key `optim.zzz`",
                "keys of `optim`: `optim.base_lr`, `optim.weight_decay`, `optim.betas`",
            ),
            (
                "zzz = 1\n",
                "1:1: unknown key `zzz`",
                "top-level keys: `run`, `model`, `optim`, `schedule`, `stages`, `probe`, `lr_scale`",
            ),
        ];
        assert_eq!(cases.len(), 13);
        for (content, what, hint) in cases {
            assert_eq!(message(content), format!("a.toml:{what}\n\nhint: {hint}"), "{content}");
        }
    }

    #[test]
    fn wrong_values_are_reported_with_what_was_expected_and_found() {
        let cases = [
            ("[optim]\nbase_lr = 'fast'\n", "2:11: `optim.base_lr`: expected a number, found string \"fast\""),
            (
                "model.depth = 1.5\n",
                "1:15: `model.depth`: expected a whole number that is not negative, found number `1.5`",
            ),
            (
                "[model]\npatch_size = 300\n",
                "2:14: `model.patch_size`: expected a whole number from 0 to 255, found integer `300`",
            ),
            (
                "model.depth = -1\n",
                "1:15: `model.depth`: expected a whole number that is not negative, found integer `-1`",
            ),
            ("run.name = 3\n", "1:12: `run.name`: expected a string, found integer `3`"),
            ("[run.name]\n", "1:1: `run.name`: expected a string, found a table"),
            ("optim = 3\n", "1:9: `optim`: expected a table, found integer `3`"),
            ("stages = 3\n", "1:10: `stages`: expected an array, found integer `3`"),
            (
                "[[stages]]\n[[stages]]\nsteps = true\n",
                "3:9: `stages[1].steps`: expected a whole number from 0 to 4294967295, found boolean `true`",
            ),
            ("optim.betas = [0.9, 'x']\n", "1:21: `optim.betas[1]`: expected a number, found string \"x\""),
            ("optim.betas = [0.9]\n", "1:15: `optim.betas`: invalid length 1, expected an array of length 2"),
            ("model.arch = 3\n", "1:14: `model.arch`: expected one of `vit_small`, `vit_base`"),
            (
                "model.arch = 'vit_smal'\n",
                "1:14: `model.arch`: `vit_smal` is not one of `vit_small`, `vit_base`\n\nhint: similar values: `vit_small`",
            ),
            ("model.arch = 'resnet'\n", "1:14: `model.arch`: `resnet` is not one of `vit_small`, `vit_base`"),
            (
                "[schedule]\nkind = 'cosinus'\n",
                "2:8: `schedule.kind`: `cosinus` is not one of `constant`, `cosine`\n\nhint: similar values: `cosine`",
            ),
        ];
        assert_eq!(cases.len(), 15);
        for (content, expected) in cases {
            assert_eq!(message(content), format!("a.toml:{expected}"), "{content}");
        }
    }

    #[test]
    fn a_mistake_in_a_base_is_reported_in_the_base() {
        let folder = Folder::new(&[
            ("top.toml", "extends = 'base/b.toml'\n[optim]\nbase_lr = 1.0\n"),
            ("base/b.toml", "extends = 'c.toml'\n"),
            ("base/c.toml", "# a base\n[optim]\nweight_decy = 0.1\n"),
        ]);
        assert_eq!(
            folder.message("top.toml"),
            "base/c.toml:3:1: unknown key `optim.weight_decy`\n\nhint: similar keys: `optim.weight_decay`"
        );
    }

    #[test]
    fn a_mistake_that_the_file_on_top_would_hide_is_still_reported() {
        let folder = Folder::new(&[
            ("top.toml", "extends = 'b.toml'\noptim.base_lr = 1.0\n"),
            ("b.toml", "optim.base_lr = 'fast'\n"),
        ]);
        assert_eq!(
            folder.message("top.toml"),
            "b.toml:1:17: `optim.base_lr`: expected a number, found string \"fast\""
        );
    }

    #[test]
    fn a_required_key_that_no_file_sets_is_reported_in_the_table_that_lacks_it() {
        assert_eq!(
            message("[run]\nseed = 1\n[schedule]\nkind = 'constant'\n"),
            "a.toml:3:1: `schedule`: missing field `value`\n\nhint: each part of the recipe is valid alone, the parts \
             together are not; see which keys of this table the others set"
        );
    }

    #[test]
    fn overrides_are_checked_like_files() {
        let cases = [
            ("optim.lr=3", "unknown key `optim.lr`\n\nhint: similar keys: `optim.base_lr`"),
            ("patch_size=3", "unknown key `patch_size`\n\nhint: similar keys: `model.patch_size`"),
            ("optim.base_lr=fast", "`optim.base_lr`: expected a number, found string \"fast\""),
            ("optim.base_lr.x=3", "`optim.base_lr`: expected a number, found a table"),
            ("stages.0.steps=3", "`stages`: expected an array, found a table"),
            ("optim.betas=[0.9, ", "`optim.betas`: expected an array of length 2, found string \"[0.9,\""),
            (
                "model.arch=vit_bas",
                "`model.arch`: `vit_bas` is not one of `vit_small`, `vit_base`\n\nhint: similar values: `vit_base`",
            ),
            (
                "run.name=2024",
                "`run.name`: expected a string, found integer `2024`\n\nhint: for a string, quote the value: --set 'run.name=\"2024\"'",
            ),
        ];
        assert_eq!(cases.len(), 8);
        for (text, expected) in cases {
            assert_eq!(override_message(text), format!("--set {text}: {expected}"));
        }
    }
}
