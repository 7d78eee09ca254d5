//! Finding recipes by name, and following `extends` from file to file.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{ConfigError, Hint, quoted};
use crate::keys::nearest_names;
use crate::text::{Home, Text};

/// A list of recipes in a hint stops here, and says so.
const MAX_LISTED: usize = 30;

/// The folder of recipes that serve others as a base, and are not listed among those to be named.
const BASES: &str = "base/";

/// Where recipes are looked for.
#[derive(Clone, Copy)]
pub(crate) struct Library<'a> {
    pub(crate) search: &'a [PathBuf],
    pub(crate) built_in: &'a [(&'a str, &'a str)],
}

/// The text and everything it extends: the text itself first, the base of all last.
///
/// # Errors
/// A file that is missing, unreadable, not UTF-8 or not TOML; an `extends` that is not a string; a circle.
pub(crate) fn chain(first: Text, library: Library<'_>) -> Result<Vec<Text>, ConfigError> {
    let mut chain = vec![first];
    while let Some(last) = chain.last()
        && let Some((name, offset)) = last.extends()?
    {
        let next = library.find(&name, Some((last, offset)))?;
        let circular = chain.iter().any(|text| text.is_same(&next));
        chain.push(next);
        if circular {
            let labels: Vec<&str> = chain.iter().map(|text| text.label.as_str()).collect();
            return Err(ConfigError::Circular { chain: labels.join(" extends ") });
        }
    }
    Ok(chain)
}

impl Library<'_> {
    /// The recipe called `name`: beside the text that extends it, as a path, in the search directories, built in.
    pub(crate) fn find(&self, name: &str, extended_by: Option<(&Text, usize)>) -> Result<Text, ConfigError> {
        let mut tried = Tried::default();
        match extended_by.map(|(text, _)| &text.home) {
            Some(Home::File { path, .. }) => {
                if let Some(found) = tried.files(&path.with_file_name(name))? {
                    return Ok(found);
                }
            }
            Some(Home::BuiltIn(own)) => {
                let folder = own.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
                if let Some(found) = self.find_built_in(&format!("{folder}{name}")).or_else(|| self.find_built_in(name))
                {
                    return Ok(found);
                }
            }
            Some(Home::Nowhere) | None => {}
        }
        if let Some(found) = tried.files(Path::new(name))? {
            return Ok(found);
        }
        for folder in self.search {
            if let Some(found) = tried.files(&folder.join(name))? {
                return Ok(found);
            }
        }
        self.find_built_in(name).ok_or_else(|| {
            let at = extended_by.map(|(text, offset)| text.place(offset));
            match tried.directory {
                Some(directory) => ConfigError::Directory {
                    at,
                    path: directory.display().to_string(),
                    hint: listed("files in it", &toml_files(&directory)),
                },
                None => self.not_found(at, name, &tried.missing),
            }
        })
    }

    fn find_built_in(&self, name: &str) -> Option<Text> {
        let with_extension = format!("{name}.toml");
        let (name, content) = self.built_in.iter().find(|(known, _)| *known == name || *known == with_extension)?;
        Some(Text::built_in(name, content))
    }

    fn not_found(&self, at: Option<String>, name: &str, missing: &[String]) -> ConfigError {
        let mut known: Vec<String> = self.built_in.iter().map(|(name, _)| (*name).to_owned()).collect();
        known.extend(self.search.iter().flat_map(|folder| toml_files(folder)).map(|path| file_name(&path)));
        let mut known: Vec<String> = known.iter().map(|name| without_extension(name).to_owned()).collect();
        known.sort();
        known.dedup();
        let looked = match self.built_in.len() {
            0 => quoted(missing),
            1 => format!("{} and 1 built-in recipe", quoted(missing)),
            count => format!("{} and {count} built-in recipes", quoted(missing)),
        };
        let similar = nearest_names(without_extension(&file_name(name)), &known);
        known.retain(|name| !name.starts_with(BASES));
        let hint = Hint::names("similar recipes", &similar).or(|| listed("known recipes", &known));
        ConfigError::NotFound { at, name: name.to_owned(), looked, hint }
    }
}

/// What was tried in vain.
#[derive(Default)]
struct Tried {
    missing: Vec<String>,
    directory: Option<PathBuf>,
}

impl Tried {
    /// The file at `path`, or at `path` with `.toml` added.
    fn files(&mut self, path: &Path) -> Result<Option<Text>, ConfigError> {
        let mut with_extension = path.as_os_str().to_owned();
        with_extension.push(".toml");
        let is_complete = path.extension().is_some_and(|extension| extension == "toml");
        for candidate in [Some(path.to_owned()), (!is_complete).then(|| with_extension.into())].into_iter().flatten() {
            if let Some(text) = self.file(&candidate)? {
                return Ok(Some(text));
            }
        }
        Ok(None)
    }

    fn file(&mut self, path: &Path) -> Result<Option<Text>, ConfigError> {
        let label = path.display().to_string();
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                self.directory.get_or_insert_with(|| path.to_owned());
            }
            Ok(_) => return Text::read(path).map(Some),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            Err(source) => return Err(ConfigError::Unreadable { path: label, source }),
        }
        if !self.missing.contains(&label) {
            self.missing.push(label);
        }
        Ok(None)
    }
}

/// The TOML files of a folder, sorted; none where it cannot be listed, since they only serve as hints.
fn toml_files(folder: &Path) -> Vec<String> {
    let mut files: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .map(|path| path.display().to_string())
        .collect();
    files.sort();
    files
}

/// ``intro: `a`, `b` and 3 more``, or nothing when there are no names.
fn listed(intro: &str, names: &[String]) -> Hint {
    match names.len().saturating_sub(MAX_LISTED) {
        0 => Hint::names(intro, names),
        more => Hint::new(format!("{intro}: {} and {more} more", quoted(&names[..MAX_LISTED]))),
    }
}

fn file_name(path: &str) -> String {
    Path::new(path).file_name().map_or(path.to_owned(), |name| name.to_string_lossy().into_owned())
}

fn without_extension(name: &str) -> &str {
    name.strip_suffix(".toml").unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{Folder, Recipe};
    use crate::{Request, Resolved, load};

    const BUILT_IN: &[(&str, &str)] = &[
        ("vitb14.toml", "extends = 'base/dinov2.toml'\nmodel.depth = 12\n"),
        ("base/dinov2.toml", "extends = 'common.toml'\noptim.base_lr = 0.5\nmodel.depth = 1\n"),
        ("base/common.toml", "run.seed = 3\n"),
        ("from_root.toml", "extends = 'base/leaf'\n"),
        ("base/leaf.toml", "extends = 'vitb14'\n"),
        ("circle.toml", "extends = 'circle'\n"),
    ];

    fn load_from(folder: &Folder, name: &str) -> Result<Resolved<Recipe>, String> {
        let search = [PathBuf::from(folder.path("one")), PathBuf::from(folder.path("two"))];
        let request = Request { name, search: &search, built_in: BUILT_IN, ..Request::default() };
        load(&request).map_err(|error| folder.shorten(&error.to_string()))
    }

    #[test]
    fn a_name_is_a_path_then_in_the_search_directories_then_built_in() {
        let folder = Folder::new(&[
            ("one/both.toml", "run.seed = 1\n"),
            ("two/both.toml", "run.seed = 2\n"),
            ("two/second.toml", "run.seed = 22\n"),
            ("two/plain", "run.seed = 222\n"),
            ("two/vitb14.toml", "run.seed = 2222\n"),
            ("elsewhere/both.toml", "run.seed = 33\n"),
        ]);
        let cases = [
            (folder.path("elsewhere/both.toml"), "elsewhere/both.toml", 33),
            (folder.path("elsewhere/both"), "elsewhere/both.toml", 33),
            ("both".to_owned(), "one/both.toml", 1),
            ("both.toml".to_owned(), "one/both.toml", 1),
            ("second".to_owned(), "two/second.toml", 22),
            ("plain".to_owned(), "two/plain", 222),
            ("vitb14".to_owned(), "two/vitb14.toml", 2222),
            ("base/dinov2".to_owned(), "built-in base/dinov2.toml", 3),
            ("base/common.toml".to_owned(), "built-in base/common.toml", 3),
        ];
        assert_eq!(cases.len(), 9);
        for (name, source, seed) in cases {
            let resolved = load_from(&folder, &name).unwrap();
            assert_eq!((folder.shorten(&resolved.source).as_str(), resolved.value.run.seed), (source, seed), "{name}");
        }
    }

    #[test]
    fn a_built_in_extends_others_beside_it_or_by_their_full_name() {
        let resolved = load_from(&Folder::new(&[]), "from_root").unwrap();
        let value = &resolved.value;
        assert_eq!((value.model.depth, value.optim.base_lr, value.run.seed), (12, 0.5, 3));
        assert_eq!(resolved.source, "built-in from_root.toml");
        assert_eq!(resolved.origins.get("optim.base_lr").unwrap().to_string(), "built-in base/dinov2.toml:2");
    }

    #[test]
    fn a_file_extends_one_beside_it_before_any_other() {
        let folder = Folder::new(&[
            ("one/base.toml", "run.seed = 1\n"),
            ("mine/base.toml", "run.seed = 5\n"),
            ("mine/near.toml", "extends = 'base'\n"),
            ("mine/deep/up.toml", "extends = '../base.toml'\n"),
            ("other/far.toml", "extends = 'base'\n"),
            ("other/built_in.toml", "extends = 'vitb14'\n"),
        ]);
        for (name, seed) in
            [("mine/near.toml", 5), ("mine/deep/up.toml", 5), ("other/far.toml", 1), ("other/built_in.toml", 3)]
        {
            assert_eq!(load_from(&folder, &folder.path(name)).unwrap().value.run.seed, seed, "{name}");
        }
    }

    #[test]
    fn a_name_that_is_not_found_is_answered_with_what_was_tried_and_the_nearest() {
        let folder = Folder::new(&[("one/vits14.toml", "")]);
        assert_eq!(
            load_from(&folder, "vitb41").unwrap_err(),
            "recipe `vitb41` not found; looked at `vitb41`, `vitb41.toml`, `one/vitb41`, `one/vitb41.toml`, \
             `two/vitb41`, `two/vitb41.toml` and 6 built-in recipes\n\nhint: similar recipes: `vitb14`, `vits14`"
        );
        let message = load_from(&folder, "zzz.toml").unwrap_err();
        let hint = "\n\nhint: known recipes: `circle`, `from_root`, `vitb14`, `vits14`";
        assert!(message.ends_with(hint), "{message}");
        assert!(message.starts_with("recipe `zzz.toml` not found; looked at `zzz.toml`, `one/zzz.toml`,"), "{message}");
    }

    #[test]
    fn a_long_list_says_how_much_of_it_is_missing() {
        let folder = Folder::new(&[]);
        for i in 10..43 {
            folder.write(&format!("many/{i}.toml"), b"");
        }
        let message = folder.message("many");
        assert!(message.contains("files in it: `many/10.toml`, `many/11.toml`, "), "{message}");
        assert!(message.ends_with("`many/39.toml` and 3 more"), "{message}");
    }

    #[test]
    fn a_circle_is_shown_as_a_whole() {
        let folder = Folder::new(&[
            ("self.toml", "extends = './self.toml'\n"),
            ("x.toml", "extends = 'a'\n"),
            ("a.toml", "extends = 'b.toml'\n"),
            ("b.toml", "extends = 'sub/../c.toml'\n"),
            ("c.toml", "extends = 'a.toml'\n"),
            ("sub/empty.toml", ""),
        ]);
        assert_eq!(folder.message("self.toml"), "self.toml extends ./self.toml: circular `extends`");
        assert_eq!(
            folder.message("a.toml"),
            "a.toml extends b.toml extends sub/../c.toml extends sub/../a.toml: circular `extends`"
        );
        assert!(folder.message("x.toml").starts_with("x.toml extends a.toml extends b.toml extends"));
        let built_in = load_from(&folder, "circle").unwrap_err();
        assert_eq!(built_in, "built-in circle.toml extends built-in circle.toml: circular `extends`");
    }

    #[test]
    fn a_missing_base_is_reported_where_it_is_named() {
        let folder = Folder::new(&[("sub/a.toml", "# comment\nextends = 'nope.toml'\n")]);
        let message = folder.message("sub/a.toml");
        assert_eq!(message, "sub/a.toml:2:11: recipe `nope.toml` not found; looked at `sub/nope.toml`, `nope.toml`");
    }

    #[test]
    fn a_directory_is_not_a_recipe_but_does_not_hide_one() {
        let folder = Folder::new(&[("runs/first/config.toml", "run.seed = 4\n"), ("runs.toml", "run.seed = 5\n")]);
        let message = folder.message("runs/first");
        assert_eq!(
            message,
            "`runs/first` is a directory, not a recipe file\n\nhint: files in it: `runs/first/config.toml`"
        );
        assert_eq!(folder.load("runs", &[]).unwrap().value.run.seed, 5);
        folder.write("a.toml", b"extends = 'runs/first'\n");
        assert!(folder.message("a.toml").starts_with("a.toml:1:11: `runs/first` is a directory"));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_cannot_be_read_is_reported() {
        let folder = Folder::new(&[]);
        std::os::unix::fs::symlink("loop.toml", folder.path("loop.toml")).unwrap();
        let message = folder.message("loop.toml");
        assert!(message.starts_with("loop.toml: cannot read the file: "), "{message}");
    }
}
