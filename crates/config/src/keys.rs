//! The keys of a recipe's type, found by asking serde, and the known names nearest to one that is not known.
//!
//! The keys of `T::default()` are not all keys of `T`: an `Option` that is `None` is not written. A struct that refuses
//! unknown fields names its known ones in doing so, so every table is asked with a key that no struct has.

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

use crate::layer::join;

/// How many similar names a hint offers.
const SUGGESTIONS: usize = 3;

/// A name this much less similar than the best one is left out.
const MARGIN: f64 = 0.1;

/// The score from which a name counts as similar; unrelated names of this length reach about 0.6.
const SIMILAR: f64 = 0.8;

/// Recursive types (`Option<Box<Self>>`) are followed no deeper than this.
const MAX_DEPTH: usize = 8;

/// A key that no struct has.
const STRANGER: &str = "\u{0}";

/// The variants of the enum at `path`; `None` where there is none.
pub(crate) fn variants<T: DeserializeOwned>(path: &[String]) -> Option<Vec<String>> {
    let message = probe::<T>(path, DeValue::String(STRANGER.into())).err()?;
    message.starts_with("unknown variant").then(|| expected_names(&message))
}

/// Every dotted key of `T`: tables and leaves, except those inside arrays and enums with data.
pub(crate) fn all_keys<T: DeserializeOwned>() -> Vec<String> {
    let mut found = Vec::new();
    collect_keys::<T>(&mut Vec::new(), "", &mut found);
    found
}

fn collect_keys<T: DeserializeOwned>(path: &mut Vec<String>, dotted: &str, found: &mut Vec<String>) {
    for field in fields::<T>(path) {
        let key = join(dotted, &field);
        found.push(key.clone());
        if path.len() < MAX_DEPTH {
            path.push(field);
            collect_keys::<T>(path, &key, found);
            path.pop();
        }
    }
}

fn fields<T: DeserializeOwned>(path: &[String]) -> Vec<String> {
    let mut table = DeTable::new();
    table.insert(Spanned::new(0..0, STRANGER.into()), Spanned::new(0..0, DeValue::Boolean(true)));
    match probe_table::<T>(path, table) {
        Err(message) if message.starts_with("unknown field") => expected_names(&message),
        _ => Vec::new(),
    }
}

/// Reads a document that holds nothing but `table` at `path` as a `T`; an error is serde's message. A struct may be
/// empty, an enum with data may not.
pub(crate) fn probe_table<T: DeserializeOwned>(path: &[String], table: DeTable<'_>) -> Result<(), String> {
    probe::<T>(path, DeValue::Table(table))
}

fn probe<T: DeserializeOwned>(path: &[String], mut value: DeValue<'_>) -> Result<(), String> {
    for key in path.iter().rev() {
        let mut table = DeTable::new();
        table.insert(Spanned::new(0..0, key.clone().into()), Spanned::new(0..0, value));
        value = DeValue::Table(table);
    }
    let DeValue::Table(root) = value else { return Ok(()) };
    T::deserialize(Deserializer::from(Spanned::new(0..0, root))).map(drop).map_err(|error| error.message().to_owned())
}

/// The names that serde lists after `expected`: ``unknown field `x`, expected one of `a`, `b` ``.
pub(crate) fn expected_names(message: &str) -> Vec<String> {
    let Some((_, list)) = message.rsplit_once(", expected ") else { return Vec::new() };
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The known dotted keys most like `unknown`, best first: alike in the whole path, or in the last part alone (the right
/// key in the wrong table). Of two that are equally alike, the one in the same table comes first.
pub(crate) fn nearest_keys(unknown: &str, known: &[String]) -> Vec<String> {
    let (table, last) = split_last(unknown);
    nearest(known, |candidate| {
        let (candidate_table, candidate_last) = split_last(candidate);
        let alike = similarity(last, candidate_last);
        // A last part that is merely similar says little about another table.
        if candidate_table == table {
            alike + 0.05
        } else if alike > 0.9 {
            alike
        } else {
            similarity(table, candidate_table).min(alike)
        }
    })
}

/// The known names most like `unknown`, best first.
pub(crate) fn nearest_names(unknown: &str, known: &[String]) -> Vec<String> {
    nearest(known, |candidate| similarity(unknown, candidate))
}

fn nearest(known: &[String], score: impl Fn(&str) -> f64) -> Vec<String> {
    let mut scored: Vec<_> = known.iter().map(|name| (score(name), name)).filter(|(s, _)| *s >= SIMILAR).collect();
    scored.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    let mut names: Vec<String> = Vec::new();
    let best = scored.first().map_or(0.0, |(score, _)| *score);
    for (_, name) in scored.iter().filter(|(score, _)| *score > best - MARGIN) {
        if names.len() < SUGGESTIONS && !names.contains(*name) {
            names.push((*name).clone());
        }
    }
    names
}

fn split_last(key: &str) -> (&str, &str) {
    key.rsplit_once('.').unwrap_or(("", key))
}

/// From 0 to 1: 1 for the same name; Jaro–Winkler for misspelt ones; 0.9 where the words of one name are among those of
/// the other, a word also counting as the initials it stands for (`learning_rate` and `base_lr`).
fn similarity(a: &str, b: &str) -> f64 {
    if a == b {
        return 1.0;
    }
    let by_words: f64 = if shares_words(a, b) || shares_words(b, a) { 0.9 } else { 0.0 };
    by_words.max(strsim::jaro_winkler(a, b))
}

/// Whether every word of `a`, or the word made of its initials, is a word of `b`.
fn shares_words(a: &str, b: &str) -> bool {
    let words = |name: &str| name.split(['_', '-']).map(str::to_owned).collect::<Vec<_>>();
    let (a, b) = (words(a), words(b));
    let initials: String = a.iter().filter_map(|word| word.chars().next()).collect();
    a.iter().all(|word| b.contains(word)) || (a.len() > 1 && b.contains(&initials))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Recipe;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn keys_include_tables_and_options_that_are_not_set() {
        let keys = all_keys::<Recipe>();
        for key in
            ["run", "run.name", "run.note", "model.head.hidden_dim", "probe", "probe.crop_px", "stages", "schedule"]
        {
            assert!(keys.contains(&key.to_owned()), "{key} not in {keys:?}");
        }
        assert_eq!(keys.len(), 20, "{keys:?}");
    }

    #[test]
    fn a_struct_may_be_empty_and_an_enum_with_data_may_not() {
        for path in [&["model", "head"][..], &["probe"], &["lr_scale"]] {
            assert_eq!(probe_table::<Recipe>(&names(path), DeTable::new()), Ok(()), "{path:?}");
        }
        assert_eq!(
            probe_table::<Recipe>(&names(&["schedule"]), DeTable::new()),
            Err("missing field `kind`".to_owned())
        );
        let complete = DeTable::parse("kind = 'constant'\nvalue = 2.0").unwrap().into_inner();
        assert_eq!(probe_table::<Recipe>(&names(&["schedule"]), complete), Ok(()));
    }

    #[test]
    fn variants_are_those_of_enums_only() {
        assert_eq!(variants::<Recipe>(&names(&["model", "arch"])), Some(names(&["vit_small", "vit_base"])));
        assert_eq!(variants::<Recipe>(&names(&["model", "depth"])), None);
        assert_eq!(variants::<Recipe>(&names(&["run", "name"])), None);
    }

    #[test]
    fn nearest_key_per_kind_of_mistake() {
        let known = all_keys::<Recipe>();
        let cases = [
            ("optim.base_lrr", "optim.base_lr"),
            ("optim.learning_rate", "optim.base_lr"),
            ("optim.wd", "optim.weight_decay"),
            ("optim.decay", "optim.weight_decay"),
            ("optim.patch_size", "model.patch_size"),
            ("patch_size", "model.patch_size"),
            ("model.hidden_dim", "model.head.hidden_dim"),
            ("optimizer", "optim"),
            ("run.seeed", "run.seed"),
        ];
        for (unknown, nearest) in cases {
            assert_eq!(nearest_keys(unknown, &known).first().map(String::as_str), Some(nearest), "{unknown}");
        }
        assert_eq!(nearest_keys("optim.zzz", &known), Vec::<String>::new());
    }
}
