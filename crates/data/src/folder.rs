//! Any folder of images, at any depth, without side files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use image::RgbImage;
use walkdir::{DirEntry, WalkDir};

use crate::decode::decode_file;
use crate::{DataError, DecodeLimits, ReadError, Source};

/// Extensions of files that are taken for images, in lower case; the case of a file's own does not matter. Only the choice
/// of files goes by name: what a file is, is told by its content.
const EXTENSIONS: &[&str] = &["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif"];

/// Folders that hold parts of a data set rather than classes.
const SPLITS: &[&str] =
    &["train", "training", "val", "valid", "validation", "test", "testing", "unlabeled", "unlabelled"];

/// Every image file below a folder, in the order of their relative paths.
///
/// Links are followed, except those that lead back into a folder they are in. Files and folders whose name starts with a
/// dot are left out. A link to nowhere that is named as an image counts as an image, which cannot be read.
///
/// # Labels
/// A set is labelled as ImageNet is: when no image lies directly in the root and at least two folders of the first level
/// have images (at any depth), these folders are the classes, numbered from 0 in the order of their names. Otherwise, or
/// when all of them are named as splits are (`train`, `val`, …), the set has no labels.
#[derive(Debug)]
pub struct FolderSource {
    root: PathBuf,
    /// Relative to the root.
    images: Vec<PathBuf>,
    classes: Vec<String>,
    /// One for each image, or none at all.
    labels: Vec<u32>,
    limits: DecodeLimits,
}

impl FolderSource {
    /// Lists a folder. No image is opened.
    ///
    /// # Errors
    /// [`DataError`] when the folder is missing, is a file or has no images, or when a folder below it cannot be listed:
    /// a class that is silently absent would be worse.
    pub fn open(root: &Path, limits: &DecodeLimits) -> Result<Self, DataError> {
        check_root(root)?;
        let mut images = Vec::new();
        let mut others = BTreeMap::<String, usize>::new();
        let walk = WalkDir::new(root).follow_links(true).into_iter();
        for entry in walk.filter_entry(|entry| entry.depth() == 0 || !is_hidden(entry.path())) {
            let path = match entry {
                Ok(entry) if is_file(&entry) => entry.into_path(),
                Ok(_) => continue,
                Err(error) => match broken_link(root, error)? {
                    Some(path) => path,
                    None => continue,
                },
            };
            let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
            match extension {
                Some(extension) if EXTENSIONS.contains(&extension.as_str()) => {
                    images.push(path.strip_prefix(root).expect("the walk stays below its root").to_path_buf());
                }
                other => *others.entry(other.map_or("no extension".into(), |e| format!(".{e}"))).or_default() += 1,
            }
        }
        if images.is_empty() {
            let files = others.values().sum();
            let mut extensions: Vec<_> = others.into_iter().collect();
            extensions.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
            return Err(DataError::NoImages { path: root.into(), files, extensions, known: EXTENSIONS });
        }
        // By path components, which is the same order on every system.
        images.sort_unstable();
        let (classes, labels) = classes_of(&images);
        Ok(Self { root: root.into(), images, classes, labels, limits: limits.clone() })
    }

    /// The file of an image.
    pub fn path(&self, index: usize) -> PathBuf {
        self.root.join(&self.images[index])
    }
}

impl Source for FolderSource {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn id(&self, index: usize) -> String {
        let names: Vec<_> = self.images[index].iter().map(|name| name.to_string_lossy()).collect();
        names.join("/")
    }

    fn read(&self, index: usize) -> Result<RgbImage, ReadError> {
        decode_file(&self.path(index), &self.limits).map_err(|reason| ReadError { id: self.id(index), reason })
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.labels.get(index).copied()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }
}

fn check_root(root: &Path) -> Result<(), DataError> {
    let metadata = match root.metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let first = root.to_string_lossy();
            let first = first.split([':', ',']).next().unwrap_or_default();
            let hint = (strsim::damerau_levenshtein(first, "synthetic") <= 2).then(|| {
                "the built-in images are `synthetic`, or `synthetic:` and a list such as `size=64,seed=1`".into()
            });
            return Err(DataError::MissingFolder { path: root.into(), hint });
        }
        Err(error) => return Err(DataError::Unreadable { path: root.into(), reason: error.to_string() }),
    };
    if metadata.is_dir() {
        return Ok(());
    }
    let hint = match root.extension().map(|extension| extension.to_string_lossy().to_lowercase()).as_deref() {
        Some("zip" | "tar" | "gz" | "tgz" | "7z" | "rar" | "xz" | "zst") => Some("unpack the archive first".into()),
        _ => root
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .map(|p| format!("its folder is `{}`", p.display())),
    };
    Err(DataError::NotAFolder { path: root.into(), hint })
}

/// A regular file; pipes and devices are not opened.
fn is_file(entry: &DirEntry) -> bool {
    entry.file_type().is_file()
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
}

/// What to do with an entry that the walk failed on: the path of a link that leads nowhere but is named as a file is, or
/// nothing for a link that closes a loop.
fn broken_link(root: &Path, error: walkdir::Error) -> Result<Option<PathBuf>, DataError> {
    let path = error.path().unwrap_or(root).to_path_buf();
    if error.loop_ancestor().is_some() || is_hidden(&path) {
        return Ok(None);
    }
    if path.is_symlink() && path.extension().is_some() {
        return Ok(Some(path));
    }
    let reason = error.io_error().map_or_else(|| error.to_string(), ToString::to_string);
    Err(DataError::Unreadable { path, reason })
}

/// The classes and the label of each image, both empty for a set without labels. The images are sorted.
fn classes_of(images: &[PathBuf]) -> (Vec<String>, Vec<u32>) {
    let mut classes = Vec::<String>::new();
    let mut labels = Vec::with_capacity(images.len());
    let mut last = None;
    for image in images {
        let mut names = image.iter();
        let (Some(first), Some(_)) = (names.next(), names.next()) else {
            return (Vec::new(), Vec::new());
        };
        if last != Some(first) {
            classes.push(first.to_string_lossy().into_owned());
            last = Some(first);
        }
        labels.push(classes.len() as u32 - 1);
    }
    let splits = classes.iter().all(|name| SPLITS.contains(&name.to_lowercase().as_str()));
    if classes.len() < 2 || splits { (Vec::new(), Vec::new()) } else { (classes, labels) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, encode, picture};
    use crate::{DecodeError, open};
    use image::ImageFormat;
    use std::fs;

    /// A folder with a small PNG at each path.
    fn folder(paths: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let png = encode(&picture(5, 3).into(), ImageFormat::Png);
        for path in paths {
            write(root.path(), path, &png);
        }
        root
    }

    fn write(root: &Path, path: &str, bytes: &[u8]) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn ids(source: &dyn Source) -> Vec<String> {
        (0..source.len()).map(|index| source.id(index)).collect()
    }

    fn open_folder(root: &Path) -> Result<FolderSource, DataError> {
        FolderSource::open(root, &DecodeLimits::default())
    }

    #[test]
    fn images_are_found_at_any_depth_in_sorted_order() {
        let root =
            folder(&["z.PNG", "b/2.png", "b/10.Jpg", "a/deep/er/x.tiff", "b.gif", ".hidden.png", "a/.git/y.png"]);
        write(root.path(), "notes.txt", b"");
        write(root.path(), "a/labels.csv", b"");
        let source = open_folder(root.path()).unwrap();
        assert_eq!(ids(&source), ["a/deep/er/x.tiff", "b/10.Jpg", "b/2.png", "b.gif", "z.PNG"]);
        for index in 0..source.len() {
            assert_eq!(source.read(index).unwrap(), picture(5, 3));
            assert_eq!(source.label(index), None);
        }
        assert!(source.classes().is_empty());
    }

    #[test]
    fn a_root_that_is_hidden_or_ends_in_a_slash_is_still_listed() {
        let root = folder(&[".photos/a.png"]);
        let with_slash = format!("{}/.photos/", root.path().display());
        assert_eq!(ids(&*open(&with_slash, &DecodeLimits::default()).unwrap()), ["a.png"]);
    }

    #[test]
    fn first_level_folders_are_classes_when_there_are_two_and_nothing_beside_them() {
        let labels = |paths: &[&str]| {
            let root = folder(paths);
            let source = open_folder(root.path()).unwrap();
            let labels: Vec<_> = (0..source.len()).filter_map(|index| source.label(index)).collect();
            (source.classes().to_vec(), labels)
        };
        let (classes, found) = labels(&["dog/1.png", "cat/x/1.png", "cat/2.png", "ape/3.png"]);
        assert_eq!(classes, ["ape", "cat", "dog"]);
        assert_eq!(found, [0, 1, 1, 2]);
        let unlabelled: [&[&str]; 4] = [
            &["cat/1.png", "cat/2.png"],
            &["cat/1.png", "dog/1.png", "root.png"],
            &["1.png"],
            &["train/1.png", "Val/2.png"],
        ];
        for paths in unlabelled {
            assert_eq!(labels(paths), (vec![], vec![]), "{paths:?}");
        }
        assert_eq!(labels(&["train/1.png", "tram/2.png"]).0, ["train", "tram"]);
    }

    #[test]
    fn folders_without_images_are_no_classes() {
        let root = folder(&["cat/1.png", "dog/1.png"]);
        write(root.path(), "annotations/a.xml", b"");
        assert_eq!(open_folder(root.path()).unwrap().classes(), ["cat", "dog"]);
    }

    #[test]
    fn every_kind_of_file_is_read_or_refused_with_its_name() {
        let root = tempfile::tempdir().unwrap();
        let mut readable = 0;
        for (name, bytes) in testing::zoo() {
            write(root.path(), &format!("good/{name}"), &bytes);
            write(root.path(), &format!("bad/cut-{name}"), &bytes[..bytes.len() / 2]);
            readable += 1;
        }
        let zoo = testing::zoo();
        write(root.path(), "good/misnamed.png", &zoo[0].1);
        write(root.path(), "good/misnamed.jpg", &zoo[6].1);
        write(root.path(), "bad/zero.jpg", b"");
        write(root.path(), "bad/text.png", b"<html>404</html>");
        write(root.path(), "bad/bomb.png", &testing::png_header(10_000, 10_000));
        write(root.path(), "bad/dot.bmp", &encode(&picture(1, 1).into(), ImageFormat::Bmp));
        let source = open_folder(root.path()).unwrap();
        assert_eq!(source.classes(), ["bad", "good"]);
        let (mut good, mut bad) = (0, 0);
        for index in 0..source.len() {
            let (id, outcome) = (source.id(index), source.read(index));
            if id.starts_with("good/") {
                let rotated = id == "good/rotated.jpeg";
                let expected = if id == "good/cmyk.jpg" {
                    (8, 8)
                } else if rotated {
                    (9, 12)
                } else {
                    (12, 9)
                };
                assert_eq!(outcome.unwrap_or_else(|e| panic!("{e}")).dimensions(), expected, "{id}");
                good += 1;
            } else {
                let error = outcome.expect_err(&id);
                assert_eq!(error.id, id);
                assert!(error.to_string().starts_with(&format!("`{id}`: ")), "{error}");
                bad += 1;
            }
        }
        assert_eq!((good, bad), (readable + 2, readable + 4));
    }

    #[test]
    fn a_missing_folder_a_file_and_an_empty_folder_are_told_apart() {
        let root = folder(&["only.png"]);
        let error = |path: &str| open(path, &DecodeLimits::default()).err().unwrap().to_string();
        let missing = error(&root.path().join("nope").display().to_string());
        assert!(missing.contains("no such folder") && !missing.contains("hint"), "{missing}");
        assert!(error("synthetc:size=64").contains("built-in images are `synthetic`"));
        let file = error(&root.path().join("only.png").display().to_string());
        assert!(file.contains("is a file, not a folder") && file.contains("hint: its folder is"), "{file}");
        write(root.path(), "set.tar", b"");
        assert!(error(&root.path().join("set.tar").display().to_string()).contains("unpack the archive"));

        let root = tempfile::tempdir().unwrap();
        let path = root.path().display().to_string();
        assert!(error(&path).contains("no images among 0 file(s)\n\nhint: an image is a file named *.jpg, *.jpeg"));
        for name in ["a.txt", "b.TXT", "c/d.npy", "README"] {
            write(root.path(), name, b"");
        }
        let none = error(&path);
        assert!(none.contains("no images among 4 file(s) (.txt ×2, .npy ×1, no extension ×1)"), "{none}");
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_loops_are_not() {
        use std::os::unix::fs::symlink;
        let elsewhere = folder(&["far/away.png"]);
        let root = folder(&["here/1.png"]);
        symlink(elsewhere.path().join("far"), root.path().join("there")).unwrap();
        symlink(root.path(), root.path().join("here/loop")).unwrap();
        symlink("1.png", root.path().join("here/again.png")).unwrap();
        symlink("gone.png", root.path().join("here/dangling.png")).unwrap();
        symlink("gone.txt", root.path().join("here/dangling.txt")).unwrap();
        symlink("gone", root.path().join("here/.dangling")).unwrap();
        let source = open_folder(root.path()).unwrap();
        assert_eq!(ids(&source), ["here/1.png", "here/again.png", "here/dangling.png", "there/away.png"]);
        assert_eq!(source.classes(), ["here", "there"]);
        assert!(matches!(source.read(2).unwrap_err().reason, DecodeError::Io(_)));
        assert_eq!(source.read(1).unwrap(), source.read(0).unwrap());
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_that_cannot_be_listed_is_an_error() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let root = folder(&["a/1.png", "b/1.png"]);
        symlink("c", root.path().join("c")).unwrap();
        let error = open_folder(root.path()).unwrap_err().to_string();
        assert!(error.contains("/c`: cannot be listed"), "{error}");
        fs::remove_file(root.path().join("c")).unwrap();
        let locked = root.path().join("b");
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o000)).unwrap();
        // The superuser may list it all the same.
        let superuser = fs::read_dir(&locked).is_ok();
        let outcome = open_folder(root.path());
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o755)).unwrap();
        match outcome {
            Ok(source) => assert!(superuser && source.len() == 2),
            Err(error) => assert!(!superuser && error.to_string().contains("/b`: cannot be listed"), "{error}"),
        }
    }

    #[cfg(unix)]
    #[test]
    fn names_that_are_not_unicode_are_read() {
        use std::os::unix::ffi::OsStrExt;
        let root = tempfile::tempdir().unwrap();
        let name = std::ffi::OsStr::from_bytes(b"caf\xe9.png");
        fs::write(root.path().join(name), encode(&picture(4, 4).into(), ImageFormat::Png)).unwrap();
        let source = open_folder(root.path()).unwrap();
        assert_eq!(source.id(0), "caf\u{fffd}.png");
        assert_eq!(source.read(0).unwrap(), picture(4, 4));
    }
}
