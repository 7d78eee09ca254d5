//! TOML trees that remember where each of their parts was written, and how they are laid over each other.
//!
//! The parser marks every key and value with a byte span. Spans of two files cannot be told apart once the trees are
//! merged, so each is replaced by a number: the index of a [`Place`] in one list for all files. Merging moves parts
//! around with their numbers, and an error of serde, which carries the span of the part it is about, leads back to the
//! file, line and column even after merging.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use crate::origin::Origin;

/// What a number stands for.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The dotted key: `optim.base_lr`, `stages[0].steps`; empty for the whole recipe.
    pub(crate) key: String,
    /// Where the key or the value is written.
    pub(crate) origin: Origin,
    /// Whether it is the key itself that is marked, not its value.
    pub(crate) is_key: bool,
}

/// All places, of all files.
pub(crate) struct Places(Vec<Place>);

impl Places {
    /// A list that holds only the whole recipe, at number 0.
    pub(crate) fn new(whole: Origin) -> Self {
        Self(vec![Place { key: String::new(), origin: whole, is_key: false }])
    }

    /// The place of a number that [`mark`] gave out.
    pub(crate) fn at(&self, number: usize) -> &Place {
        &self.0[number]
    }

    fn add(&mut self, key: &str, origin: Origin, is_key: bool) -> Range<usize> {
        self.0.push(Place { key: key.to_owned(), origin, is_key });
        self.0.len() - 1..self.0.len()
    }
}

/// Replaces the byte spans of a freshly parsed table by numbers of places. `origin_of` turns a byte offset into an origin.
pub(crate) fn mark<'t>(
    table: DeTable<'t>,
    prefix: &str,
    origin_of: &dyn Fn(usize) -> Origin,
    places: &mut Places,
) -> DeTable<'t> {
    let mut marked = DeTable::new();
    for (key, value) in table {
        let dotted = join(prefix, key.get_ref());
        let key_number = places.add(&dotted, origin_of(key.span().start), true);
        let value = mark_value(value, &dotted, origin_of, places);
        marked.insert(Spanned::new(key_number, key.into_inner()), value);
    }
    marked
}

fn mark_value<'t>(
    value: Spanned<DeValue<'t>>,
    dotted: &str,
    origin_of: &dyn Fn(usize) -> Origin,
    places: &mut Places,
) -> Spanned<DeValue<'t>> {
    let number = places.add(dotted, origin_of(value.span().start), false);
    let inner = match value.into_inner() {
        DeValue::Table(table) => DeValue::Table(mark(table, dotted, origin_of, places)),
        DeValue::Array(array) => {
            let mut marked = DeArray::new();
            for (index, element) in array.into_iter().enumerate() {
                marked.push(mark_value(element, &format!("{dotted}[{index}]"), origin_of, places));
            }
            DeValue::Array(marked)
        }
        scalar => scalar,
    };
    Spanned::new(number, inner)
}

/// Reads a document that holds nothing but a table at a path as the recipe's type; an error is serde's message.
pub(crate) type Probe<'a> = &'a dyn Fn(&[String], DeTable<'_>) -> Result<(), String>;

/// Lays `over` on `under`, both at `path`: tables merge key by key, scalars and arrays replace.
///
/// A table that may not be empty stands for an enum with data. Where merging would mix two of its variants, `over`
/// replaces `under`.
pub(crate) fn lay_over<'t>(under: &mut DeTable<'t>, over: DeTable<'t>, path: &mut Vec<String>, probe: Probe<'_>) {
    for (key, value) in over {
        path.push(key.get_ref().to_string());
        match under.get_mut(key.get_ref().as_ref()) {
            Some(existing) => lay_value_over(existing, value, path, probe),
            None => {
                under.insert(key, value);
            }
        }
        path.pop();
    }
}

fn lay_value_over<'t>(
    under: &mut Spanned<DeValue<'t>>,
    over: Spanned<DeValue<'t>>,
    path: &mut Vec<String>,
    probe: Probe<'_>,
) {
    let (DeValue::Table(under_table), DeValue::Table(over_table)) = (under.get_mut(), over.get_ref()) else {
        *under = over;
        return;
    };
    let mut both = under_table.clone();
    lay_over(&mut both, over_table.clone(), path, probe);
    if probe(path, DeTable::new()).is_err() && is_mixed(&both, over_table, path, probe) {
        *under = over;
    } else {
        *under_table = both;
    }
}

/// Whether `both` holds keys from below that do not belong to the variant on top: `over` is valid without them, or one
/// of them is what makes `both` invalid.
fn is_mixed(both: &DeTable<'_>, over: &DeTable<'_>, path: &[String], probe: Probe<'_>) -> bool {
    let Err(message) = probe(path, both.clone()) else { return false };
    let unknown = message.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next());
    probe(path, over.clone()).is_ok() || unknown.is_some_and(|key| !over.contains_key(key))
}

/// Calls `visit` with every value of a table and its dotted key, tables and elements of arrays included.
pub(crate) fn walk<'a, 't>(
    table: &'a DeTable<'t>,
    prefix: &str,
    visit: &mut dyn FnMut(&str, &'a Spanned<DeValue<'t>>),
) {
    for (key, value) in table {
        walk_value(value, &join(prefix, key.get_ref()), visit);
    }
}

fn walk_value<'a, 't>(
    value: &'a Spanned<DeValue<'t>>,
    dotted: &str,
    visit: &mut dyn FnMut(&str, &'a Spanned<DeValue<'t>>),
) {
    visit(dotted, value);
    match value.get_ref() {
        DeValue::Table(table) => walk(table, dotted, visit),
        DeValue::Array(array) => {
            for (index, element) in array.iter().enumerate() {
                walk_value(element, &format!("{dotted}[{index}]"), visit);
            }
        }
        _ => {}
    }
}

/// How a value takes part in a written recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// A scalar, or an array in one piece.
    Leaf,
    /// An array written as `[[key]]` sections; its leaves follow.
    Sections,
}

/// Calls `visit` with the leaves of a table and the arrays of tables above them, with their dotted keys.
pub(crate) fn walk_leaves<'a, 't>(
    table: &'a DeTable<'t>,
    prefix: &str,
    visit: &mut dyn FnMut(&str, &'a Spanned<DeValue<'t>>, Part),
) {
    for (key, value) in table {
        let dotted = join(prefix, key.get_ref());
        match value.get_ref() {
            DeValue::Table(inner) => walk_leaves(inner, &dotted, visit),
            DeValue::Array(elements) if is_all_tables(elements) => {
                visit(&dotted, value, Part::Sections);
                for (index, element) in elements.iter().enumerate() {
                    if let DeValue::Table(inner) = element.get_ref() {
                        walk_leaves(inner, &format!("{dotted}[{index}]"), visit);
                    }
                }
            }
            _ => visit(&dotted, value, Part::Leaf),
        }
    }
}

/// Whether an array is one of tables, which a serialized recipe always writes as sections.
pub(crate) fn is_all_tables(elements: &DeArray<'_>) -> bool {
    !elements.is_empty() && elements.iter().all(|element| element.get_ref().is_table())
}

/// The dotted key of `key` inside `prefix`; a key that is not a bare TOML key is quoted.
pub(crate) fn join(prefix: &str, key: &str) -> String {
    let bare = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    let key = if bare { key.to_owned() } else { format!("{key:?}") };
    if prefix.is_empty() { key } else { format!("{prefix}.{key}") }
}

/// Line and column, in characters and from 1, of a byte offset.
pub(crate) fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    fn parse(text: &str) -> DeTable<'_> {
        DeTable::parse(text).unwrap().into_inner()
    }

    fn merged(under: &str, over: &str, probe: Probe<'_>) -> toml::Table {
        let mut table = parse(under);
        lay_over(&mut table, parse(over), &mut Vec::new(), probe);
        plain(table)
    }

    fn plain(table: DeTable<'_>) -> toml::Table {
        toml::Table::deserialize(toml::de::Deserializer::from(Spanned::new(0..0, table))).unwrap()
    }

    #[test]
    fn tables_merge_while_scalars_and_arrays_replace() {
        let under =
            "keep = 1\nswap = 2\nlist = [1, 2, 3]\n[a]\nx = 1\n[a.b]\ny = 1\nz = 2\n[[s]]\nn = 1\n[[s]]\nn = 2\n";
        let over = "swap = 'new'\nlist = [9]\nadd = true\n[a]\nw = 5\n[a.b]\nz = 7\n[[s]]\nm = 3\n";
        let expected =
            "keep = 1\nswap = 'new'\nlist = [9]\nadd = true\n[a]\nx = 1\nw = 5\n[a.b]\ny = 1\nz = 7\n[[s]]\nm = 3\n";
        assert_eq!(merged(under, over, &|_, _| Ok(())), plain(parse(expected)));
    }

    #[test]
    fn a_table_replaces_a_scalar_and_the_other_way_round() {
        let result = merged("a = 1\n[b]\nx = 1\n", "b = 2\n[a]\ny = 3\n", &|_, _| Ok(()));
        assert_eq!(result, plain(parse("b = 2\na.y = 3\n")));
    }

    #[test]
    fn a_table_that_is_valid_only_alone_replaces() {
        let single = |path: &[String], table: DeTable<'_>| {
            if path == ["a", "kind"] && table.len() != 1 { Err("not one".to_owned()) } else { Ok(()) }
        };
        let (under, over) = ("[a]\nx = 1\nkind.cosine = 1\n", "[a.kind]\nlinear = 2\n");
        assert_eq!(merged(under, over, &single), plain(parse("[a]\nx = 1\nkind.linear = 2\n")));
        assert_eq!(merged(under, "[a.kind]\ncosine = 2\n", &single), plain(parse("[a]\nx = 1\nkind.cosine = 2\n")));
    }

    #[test]
    fn columns_count_characters() {
        let text = "é = 1\nüü = 'x'\r\nlast";
        assert_eq!(line_and_column(text, 0), (1, 1));
        assert_eq!(line_and_column(text, text.find('=').unwrap()), (1, 3));
        assert_eq!(line_and_column(text, text.find('\'').unwrap()), (2, 6));
        assert_eq!(line_and_column(text, text.len()), (3, 5));
    }

    #[test]
    fn keys_that_are_not_bare_are_quoted() {
        assert_eq!(join("a", "b-c_1"), "a.b-c_1");
        assert_eq!(join("a", "b.c"), "a.\"b.c\"");
        assert_eq!(join("", ""), "\"\"");
    }
}
