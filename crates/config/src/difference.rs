//! What differs between two recipes.

use std::fmt;

use serde::Serialize;
use toml::de::DeTable;

use crate::layer::{Part, walk_leaves};

/// A key with different values in two recipes, each as TOML; `None` where a recipe does not have the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The dotted key: `optim.base_lr`, `stages[1].steps`.
    pub key: String,
    /// The value in the first recipe.
    pub left: Option<String>,
    /// The value in the second recipe.
    pub right: Option<String>,
}

/// `` `optim.base_lr`: 0.004 and 0.002 ``
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |side: &Option<String>| side.clone().unwrap_or_else(|| "(not set)".to_owned());
        write!(f, "`{}`: {} and {}", self.key, shown(&self.left), shown(&self.right))
    }
}

/// The leaf keys in which two recipes differ, in the order of the recipe.
///
/// # Panics
/// If a recipe holds something that TOML cannot express, which [`load`](crate::load) does not let through.
pub fn difference<T: Serialize>(left: &T, right: &T) -> Vec<Difference> {
    let (left, right) = (leaves(left), leaves(right));
    let value_of = |side: &[(String, String)], key: &str| {
        side.iter().find(|(known, _)| known == key).map(|(_, value)| value.clone())
    };
    let only_right = right.iter().filter(|(key, _)| value_of(&left, key).is_none());
    left.iter()
        .chain(only_right)
        .map(|(key, _)| Difference { key: key.clone(), left: value_of(&left, key), right: value_of(&right, key) })
        .filter(|difference| difference.left != difference.right)
        .collect()
}

/// Every leaf with its value as it is written.
fn leaves<T: Serialize>(value: &T) -> Vec<(String, String)> {
    let text = toml::to_string(value).expect("a recipe can be written as TOML");
    let table = DeTable::parse(&text).expect("serialized TOML parses").into_inner();
    let mut found = Vec::new();
    walk_leaves(&table, "", &mut |key, value, part| {
        if part == Part::Leaf {
            found.push((key.to_owned(), text[value.span()].to_owned()));
        }
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Recipe, Stage};

    #[test]
    fn a_recipe_does_not_differ_from_itself() {
        assert_eq!(difference(&Recipe::default(), &Recipe::default()), []);
    }

    #[test]
    fn differing_keys_are_listed_with_both_values() {
        let left = Recipe { stages: vec![Stage::default(), Stage::default()], ..Recipe::default() };
        let mut right = left.clone();
        right.run.note = Some("two\nlines".to_owned());
        right.optim.base_lr = 0.1;
        right.optim.betas = [0.9, 0.95];
        right.stages.pop();
        right.stages[0].head.hidden_dim = 64;
        let shown: Vec<String> = difference(&left, &right).iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "`optim.base_lr`: 0.004 and 0.1",
                "`optim.betas`: [0.9, 0.999] and [0.9, 0.95]",
                "`stages[0].head.hidden_dim`: 1 and 64",
                "`stages[1].steps`: 10 and (not set)",
                "`stages[1].crop_px`: 224 and (not set)",
                "`stages[1].head.hidden_dim`: 1 and (not set)",
                "`stages[1].head.bottleneck_dim`: 2 and (not set)",
                "`run.note`: (not set) and \"\"\"\ntwo\nlines\"\"\"",
            ]
        );
    }
}
