//! From a request to a resolved recipe: the layers are read, checked one by one, merged, and read as a whole.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::de::DeTable;

use crate::error::ConfigError;
use crate::fault::{is_leaf, read};
use crate::find::{Library, chain};
use crate::keys::probe_table;
use crate::layer::{Places, lay_over, line_and_column, mark, walk, walk_leaves};
use crate::origin::{Origin, Origins};
use crate::overrides;
use crate::text::Text;

/// Which recipe to load, and what to change in it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// The recipe's name. Tried as a path, then in each of `search`, then among `built_in`; each time also with `.toml`
    /// added.
    pub name: &'a str,
    /// Directories in which a name is looked up.
    pub search: &'a [PathBuf],
    /// Recipes built into the binary: names such as `vitb14.toml` or `base/dinov2.toml`, and their texts.
    pub built_in: &'a [(&'a str, &'a str)],
    /// Overrides `key=value`, applied in order, the last one winning. The key is dotted; the value is TOML, and what is
    /// not valid TOML is a plain string, so that `data.train=/some/dir` and `model.arch=vit_small` need no quotes. (A
    /// string that looks like TOML does: `run.name="2024"`.) An array is replaced as a whole.
    pub overrides: &'a [String],
}

/// A recipe with all its values.
///
/// Made by [`load`] or [`Resolved::from_text`]. `origins` describes `value` as it was loaded: to change a value and keep
/// a true record of it, use an override.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved<T> {
    /// The values.
    pub value: T,
    /// What was loaded: `configs/vitb14.toml`, `built-in vitb14.toml`.
    pub source: String,
    /// Where each value was set.
    pub origins: Origins,
}

/// Finds a recipe, follows its `extends`, applies the overrides, and reads the whole as a `T`.
///
/// # Errors
/// See [`ConfigError`]. Every file and override is checked against `T` before anything is merged; the named file is
/// checked first, its base last.
pub fn load<T>(request: &Request<'_>) -> Result<Resolved<T>, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    let library = Library { search: request.search, built_in: request.built_in };
    let named = library.find(request.name, None)?;
    resolve(&chain(named, library)?, request.overrides)
}

impl<T> Resolved<T>
where
    T: DeserializeOwned + Serialize + Default,
{
    /// Reads a recipe from text, such as one that [`to_annotated_toml`](Self::to_annotated_toml) wrote. `label` stands for
    /// the text in messages and origins.
    ///
    /// # Errors
    /// As [`load`]; and the text must not have `extends`.
    pub fn from_text(label: &str, text: &str) -> Result<Self, ConfigError> {
        let library = Library { search: &[], built_in: &[] };
        resolve(&chain(Text::given(label, text), library)?, &[])
    }

    /// This recipe with further texts laid over it, each with the label that stands for it in messages and origins.
    ///
    /// # Errors
    /// As [`from_text`](Self::from_text).
    pub fn laid_over(&self, layers: &[(String, String)]) -> Result<Self, ConfigError> {
        let mut texts: Vec<Text> = layers.iter().rev().map(|(label, text)| Text::given(label, text)).collect();
        texts.push(Text::given(&self.source, &self.to_annotated_toml()));
        let resolved = resolve(&texts, &[])?;
        Ok(Self { source: self.source.clone(), ..resolved })
    }
}

/// `texts` from the named one to its base.
fn resolve<T>(texts: &[Text], override_texts: &[String]) -> Result<Resolved<T>, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    let source = texts.first().map_or(String::new(), |text| text.label.clone());
    let mut places = Places::new(Origin::File { path: source.clone(), line: 1, column: 1 });

    let mut layers = Vec::with_capacity(texts.len());
    for text in texts {
        layers.push(check::<T>(marked_file(text, &mut places)?, &places)?);
    }
    let defaults = Text::given("default", &toml::to_string(&T::default())?);
    let mut merged = mark(defaults.parse()?, "", &|_| Origin::Default, &mut places);
    for layer in layers.into_iter().rev() {
        lay_over(&mut merged, layer, &mut Vec::new(), &probe_table::<T>);
    }
    for text in override_texts {
        let origin = Origin::Override(text.clone());
        let table = mark(overrides::parse(text)?, "", &|_| origin.clone(), &mut places);
        lay_over(&mut merged, check::<T>(table, &places)?, &mut Vec::new(), &probe_table::<T>);
    }

    let value = read::<T>(&merged, &places).map_err(|fault| fault.explain_merged::<T>())?;
    let origins = origins(&value, &merged, &places)?;
    Ok(Resolved { value, source, origins })
}

/// A file's keys, without `extends`.
fn marked_file<'t>(text: &'t Text, places: &mut Places) -> Result<DeTable<'t>, ConfigError> {
    let mut table = text.parse()?;
    table.remove("extends");
    let origin_of = |offset| {
        let (line, column) = line_and_column(&text.content, offset);
        Origin::File { path: text.label.clone(), line, column }
    };
    Ok(mark(table, "", &origin_of, places))
}

/// Reads a layer on its own, as a `T`. What a layer may lack, another may supply: that is left to the merged recipe.
fn check<'t, T: DeserializeOwned>(layer: DeTable<'t>, places: &Places) -> Result<DeTable<'t>, ConfigError> {
    match read::<T>(&layer, places) {
        Err(fault) if !fault.is_missing_field() => Err(fault.explain::<T>()),
        _ => Ok(layer),
    }
}

/// The origin of every leaf of `value`. A leaf that `merged` does not have was filled in by serde, unless it is part of
/// one that `merged` has as a whole.
fn origins<T: Serialize>(value: &T, merged: &DeTable<'_>, places: &Places) -> Result<Origins, ConfigError> {
    let mut set = HashMap::new();
    walk(merged, "", &mut |key, value| {
        set.insert(key.to_owned(), (&places.at(value.span().start).origin, is_leaf(value.get_ref())));
    });
    let origin_of = |key: &str| {
        let above = std::iter::successors(key.rfind(['.', '[']), |end| key[..*end].rfind(['.', '[']));
        let whole = above.filter_map(|end| set.get(&key[..end])).find(|(_, is_leaf)| *is_leaf);
        set.get(key).or(whole).map_or(Origin::Default, |(origin, _)| (*origin).clone())
    };
    let text = toml::to_string(value)?;
    let written = Text::given("resolved recipe", &text);
    let mut list = Vec::new();
    walk_leaves(&written.parse()?, "", &mut |key, _, _| list.push((key.to_owned(), origin_of(key))));
    Ok(Origins(list))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Folder, Head, Model, Optim, Probe, Recipe, Run, Schedule, Stage, layered};

    #[test]
    fn layers_merge_over_the_default() {
        let (_, resolved) = layered();
        let stage =
            |steps, hidden_dim| Stage { steps, head: Head { hidden_dim, ..Head::default() }, ..Stage::default() };
        let default = Recipe::default();
        let expected = Recipe {
            run: Run { name: "third".to_owned(), note: None, seed: 1 },
            model: Model { head: Head { hidden_dim: 8, bottleneck_dim: 256 }, ..default.model },
            optim: Optim { base_lr: 0.001, weight_decay: 0.2, betas: [0.8, 0.9] },
            schedule: Schedule::Constant { value: 3.0 },
            stages: vec![stage(3, 1), stage(10, 4)],
            probe: None,
            lr_scale: [("blocks.0".to_owned(), 0.5)].into(),
        };
        assert_eq!(resolved.value, expected);
    }

    #[test]
    fn every_leaf_has_its_origin() {
        let (folder, resolved) = layered();
        let expected = [
            ("run.name", "--set run.name=third"),
            ("run.seed", "base/b.toml:1"),
            ("model.arch", "default"),
            ("model.patch_size", "default"),
            ("model.depth", "default"),
            ("model.head.hidden_dim", "top.toml:5"),
            ("model.head.bottleneck_dim", "default"),
            ("optim.base_lr", "base/b.toml:4"),
            ("optim.weight_decay", "top.toml:3"),
            ("optim.betas", "base/b.toml:6"),
            ("schedule.kind", "base/b.toml:11"),
            ("schedule.value", "--set schedule.value=3"),
            ("stages", "top.toml:6"),
            ("stages[0].steps", "top.toml:7"),
            ("stages[0].crop_px", "default"),
            ("stages[0].head.hidden_dim", "default"),
            ("stages[0].head.bottleneck_dim", "default"),
            ("stages[1].steps", "default"),
            ("stages[1].crop_px", "default"),
            ("stages[1].head.hidden_dim", "top.toml:9"),
            ("stages[1].head.bottleneck_dim", "default"),
            ("lr_scale.\"blocks.0\"", "base/b.toml:14"),
        ];
        let origins: Vec<(String, String)> = resolved
            .origins
            .iter()
            .map(|(key, origin)| (key.to_owned(), folder.shorten(&origin.to_string())))
            .collect();
        assert_eq!(origins, expected.map(|(key, origin)| (key.to_owned(), origin.to_owned())));
        assert_eq!(resolved.origins.get("run.note"), None);
        let at = Origin::File { path: folder.path("top.toml"), line: 3, column: 16 };
        assert_eq!(resolved.origins.get("optim.weight_decay"), Some(&at));
    }

    #[test]
    fn a_variant_on_top_replaces_another_and_merges_with_its_own() {
        let constant = "[schedule]\nkind = 'constant'\nvalue = 2.0\n";
        let folder = Folder::new(&[
            ("constant.toml", constant),
            ("cosine.toml", "extends = 'constant.toml'\n[schedule]\nkind = 'cosine'\nstart = 5.0\nend = 4.0\n"),
            ("mixed.toml", "extends = 'constant.toml'\nschedule.end = 4.0\n"),
            ("empty.toml", ""),
        ]);
        let schedule = |name, overrides: &[&str]| folder.load(name, overrides).map(|resolved| resolved.value.schedule);
        assert_eq!(schedule("constant.toml", &[]), Ok(Schedule::Constant { value: 2.0 }));
        assert_eq!(schedule("cosine.toml", &["schedule.end=3"]), Ok(Schedule::Cosine { start: 5.0, end: 3.0 }));
        assert_eq!(schedule("empty.toml", &["schedule.end=3"]), Ok(Schedule::Cosine { start: 1.0, end: 3.0 }));
        assert_eq!(
            schedule("mixed.toml", &[]).unwrap_err(),
            "mixed.toml:2:10: unknown key `schedule.end`\n\nhint: each part of the recipe is valid alone, the parts \
             together are not; see which keys of this table the others set"
        );
    }

    #[test]
    fn what_is_laid_over_a_recipe_wins_and_is_checked() {
        let (_, resolved) = layered();
        let over = |text: &str| resolved.laid_over(&[("stage".to_owned(), text.to_owned())]);
        let changed = over("[optim]\nweight_decay = 0.7\n").unwrap();
        assert_eq!((changed.value.optim.weight_decay, changed.value.optim.base_lr), (0.7, 0.001));
        assert_eq!(changed.origins.get("optim.weight_decay").unwrap().to_string(), "stage:2");
        assert_eq!(changed.source, resolved.source);
        let error = over("[optim]\nweight_decat = 0.7\n").unwrap_err().to_string();
        assert!(error.starts_with("stage:2:1: unknown key `optim.weight_decat`"), "{error}");
    }

    #[test]
    fn an_option_is_set_by_a_part_of_its_table() {
        let folder = Folder::new(&[("a.toml", "[probe]\n")]);
        assert_eq!(folder.load("a.toml", &[]).unwrap().value.probe, Some(Probe { crop_px: 0 }));
        assert_eq!(folder.load("a.toml", &["probe.crop_px=98"]).unwrap().value.probe, Some(Probe { crop_px: 98 }));
    }

    #[test]
    fn an_empty_file_is_the_default() {
        let resolved = Resolved::<Recipe>::from_text("empty", "").unwrap();
        assert_eq!(resolved.value, Recipe::default());
        assert!(resolved.origins.iter().all(|(_, origin)| *origin == Origin::Default));
        assert_eq!(resolved.origins.iter().count(), 14);
    }

    #[test]
    fn a_type_that_toml_cannot_express_is_an_error() {
        #[derive(Debug, Default, serde::Deserialize, Serialize)]
        #[serde(default, deny_unknown_fields)]
        struct Unwritable {
            nothing: (),
        }
        let error = Resolved::<Unwritable>::from_text("empty", "").unwrap_err();
        assert!(matches!(error, ConfigError::Unwritable(_)), "{error}");
        assert!(error.to_string().starts_with("the recipe cannot be written as TOML: "), "{error}");
    }
}
