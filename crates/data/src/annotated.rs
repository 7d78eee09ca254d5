//! Images with a number for each pixel: masks for segmentation, depth maps.
//!
//! An image and its map are two files whose names agree. How they are laid out differs from data set to data set, see
//! [`Pairing`]; the built-in images have both kinds of maps as well.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use image::RgbImage;

use crate::{
    DataError, DecodeError, DecodeLimits, FolderSource, IntegerMap, ReadError, Source, SyntheticSource, decode_file,
    read_integer_map, synthetic,
};

/// What the maps are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// Ids of classes or objects.
    Mask,
    /// Distances.
    Depth,
}

impl MapKind {
    /// Folders of maps, beside a folder of images.
    fn folders(self) -> &'static [&'static str] {
        match self {
            Self::Mask => &["mask", "masks", "label", "labels", "annotations", "semseg", "SegmentationClass"],
            Self::Depth => &["depth", "depths"],
        }
    }

    /// Ends of the names of maps that lie beside their images.
    fn endings(self) -> &'static [&'static str] {
        match self {
            Self::Mask => &["-mask", "_mask", ".mask"],
            Self::Depth => &["-depth", "_depth", ".depth"],
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Mask => "mask",
            Self::Depth => "depth map",
        }
    }
}

/// Folders of images, beside a folder of maps.
const IMAGE_FOLDERS: &[&str] = &["img", "imgs", "image", "images", "rgb", "JPEGImages"];

/// Where images and their maps are.
///
/// Without `maps`, the layout is found by content: a folder of images beside a folder of maps (`img/` and `mask/`, with
/// other usual names), or maps beside their images (`a.jpg` and `a-mask.png` or `a.depth.png`). With `maps`, the two
/// folders are these, and may have folders inside. Files belong together when their paths agree up to the extension and
/// the suffixes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pairing {
    /// The folder of the images, or one from which they can be found, or `synthetic` with or without a list.
    pub images: String,
    /// The folder of the maps.
    pub maps: Option<PathBuf>,
    /// A text file with the names to use, a line each, without extension: `ImageSets/Segmentation/train.txt` of VOC.
    pub list: Option<PathBuf>,
    /// What the names of images end in, as `_leftImg8bit` in Cityscapes; others are not used.
    pub image_suffix: String,
    /// What the names of maps end in, as `_gtFine_labelTrainIds` in Cityscapes; others are not used.
    pub map_suffix: String,
}

/// An image and its map.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pair {
    id: String,
    image: PathBuf,
    map: PathBuf,
}

/// Images with maps, known by index.
#[derive(Clone, Debug)]
pub struct AnnotatedSource {
    found: Found,
    /// The images of `found` that are meant.
    chosen: Vec<usize>,
    limits: DecodeLimits,
    images_without_map: usize,
}

#[derive(Clone, Debug)]
enum Found {
    Pairs(Vec<Pair>),
    Synthetic(SyntheticSource),
}

impl AnnotatedSource {
    /// Finds the pairs. No file is opened but the list.
    ///
    /// # Errors
    /// [`DataError`] when a folder is missing or no image has a map, or when the list names something that is not there.
    pub fn open(pairing: &Pairing, kind: MapKind, limits: &DecodeLimits) -> Result<Self, DataError> {
        limits.validate()?;
        if let Some(config) = synthetic::parse_spec(&pairing.images)? {
            let source = SyntheticSource::new(config)?;
            let chosen = (0..source.len()).collect();
            return Ok(Self { found: Found::Synthetic(source), chosen, limits: limits.clone(), images_without_map: 0 });
        }
        let root = Path::new(&pairing.images);
        let (mut images, mut maps) = match &pairing.maps {
            Some(maps) => {
                let images = named(&FolderSource::open(root, limits)?, &pairing.image_suffix)?;
                (images, named(&FolderSource::open(maps, limits)?, &pairing.map_suffix)?)
            }
            None => match (subfolder(root, IMAGE_FOLDERS), subfolder(root, kind.folders())) {
                (Some(images), Some(maps)) => {
                    let images = named(&FolderSource::open(&images, limits)?, &pairing.image_suffix)?;
                    (images, named(&FolderSource::open(&maps, limits)?, &pairing.map_suffix)?)
                }
                _ => side_by_side(&FolderSource::open(root, limits)?, kind, pairing)?,
            },
        };
        if let Some(list) = &pairing.list {
            let wanted = read_list(list)?;
            let missing: Vec<&String> =
                wanted.iter().filter(|name| !(images.contains_key(*name) && maps.contains_key(*name))).collect();
            if let Some(first) = missing.first() {
                return Err(DataError::ListedButMissing {
                    list: list.clone(),
                    name: (*first).clone(),
                    missing: missing.len(),
                    listed: wanted.len(),
                    noun: kind.noun(),
                });
            }
            images.retain(|name, _| wanted.contains(name));
            maps.retain(|name, _| wanted.contains(name));
        }
        let (all_images, all_maps) = (images.len(), maps.len());
        let pairs: Vec<Pair> =
            images.into_iter().filter_map(|(id, image)| maps.remove(&id).map(|map| Pair { id, image, map })).collect();
        if pairs.is_empty() {
            return Err(DataError::NoPairs {
                path: root.into(),
                images: all_images,
                maps: all_maps,
                noun: kind.noun(),
                folder: kind.folders()[0],
                ending: kind.endings()[0],
            });
        }
        let images_without_map = all_images - pairs.len();
        let chosen = (0..pairs.len()).collect();
        Ok(Self { found: Found::Pairs(pairs), chosen, limits: limits.clone(), images_without_map })
    }

    /// The images of these indices, in this order.
    pub fn select(&self, indices: &[usize]) -> Self {
        Self { chosen: indices.iter().map(|&index| self.chosen[index]).collect(), ..self.clone() }
    }

    /// How many images have a map.
    pub fn len(&self) -> usize {
        self.chosen.len()
    }

    /// Whether there are none; never, of a source that could be opened and of which some are meant.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many images were left out because they have no map.
    pub fn images_without_map(&self) -> usize {
        self.images_without_map
    }

    /// The name of an image, without extension and suffix.
    pub fn id(&self, index: usize) -> String {
        let index = self.chosen[index];
        match &self.found {
            Found::Pairs(pairs) => pairs[index].id.clone(),
            Found::Synthetic(source) => source.id(index),
        }
    }

    /// Reads an image.
    ///
    /// # Errors
    /// [`ReadError`] when it cannot be read.
    pub fn image(&self, index: usize) -> Result<RgbImage, ReadError> {
        let index = self.chosen[index];
        match &self.found {
            Found::Pairs(pairs) => {
                decode_file(&pairs[index].image, &self.limits).map_err(|e| named_error(&pairs[index].image, e))
            }
            Found::Synthetic(source) => source.read(index),
        }
    }

    /// Reads the mask of an image. Of a built-in image: 0 for background, otherwise the class plus 1.
    ///
    /// # Errors
    /// [`ReadError`] when it cannot be read.
    pub fn mask(&self, index: usize) -> Result<IntegerMap, ReadError> {
        let index = self.chosen[index];
        match &self.found {
            Found::Pairs(pairs) => {
                read_integer_map(&pairs[index].map, &self.limits).map_err(|e| named_error(&pairs[index].map, e))
            }
            Found::Synthetic(source) => {
                let truth = source.ground_truth(index).expect("built-in images have masks");
                let values = truth.mask.as_raw().iter().map(|&id| u16::from(id)).collect();
                Ok(IntegerMap { width: truth.width, height: truth.height, values })
            }
        }
    }

    /// Reads the depth of an image in metres, 0 where it is not known: columns, rows and `rows · columns` values, which
    /// are those of the file times `scale`. Built-in images are in metres already.
    ///
    /// # Errors
    /// [`ReadError`] when it cannot be read.
    pub fn depth(&self, index: usize, scale: f32) -> Result<(u32, u32, Vec<f32>), ReadError> {
        match &self.found {
            Found::Pairs(_) => {
                let map = self.mask(index)?;
                Ok((map.width, map.height, map.values.iter().map(|&value| f32::from(value) * scale).collect()))
            }
            Found::Synthetic(source) => {
                let truth = source.ground_truth(self.chosen[index]).expect("built-in images have depth");
                Ok((truth.width, truth.height, truth.depth))
            }
        }
    }
}

fn named_error(path: &Path, reason: DecodeError) -> ReadError {
    ReadError { id: path.display().to_string(), reason }
}

type Named = BTreeMap<String, PathBuf>;

/// Files by their path below the folder, without extension and `suffix`; those without the suffix are left out.
fn named(folder: &FolderSource, suffix: &str) -> Result<Named, DataError> {
    let mut found = Named::new();
    for index in 0..folder.len() {
        if let Some(name) = stem(&folder.id(index)).strip_suffix(suffix) {
            add(&mut found, name, folder.path(index))?;
        }
    }
    Ok(found)
}

/// Adds a file, of which there must be one of each name: which of two is meant, nobody can tell.
fn add(files: &mut Named, name: &str, path: PathBuf) -> Result<(), DataError> {
    match files.insert(name.to_owned(), path.clone()) {
        None => Ok(()),
        Some(first) => Err(DataError::Ambiguous { name: name.to_owned(), first, second: path }),
    }
}

fn stem(id: &str) -> String {
    id.rsplit_once('.').map_or(id, |(stem, _)| stem).to_owned()
}

fn subfolder(root: &Path, names: &[&str]) -> Option<PathBuf> {
    names.iter().map(|name| root.join(name)).find(|path| path.is_dir())
}

/// Images and maps of one folder, told apart by the ends of their names.
fn side_by_side(folder: &FolderSource, kind: MapKind, pairing: &Pairing) -> Result<(Named, Named), DataError> {
    let given = [pairing.map_suffix.as_str()];
    let endings = if pairing.map_suffix.is_empty() { kind.endings() } else { &given };
    let (mut images, mut maps) = (Named::new(), Named::new());
    for index in 0..folder.len() {
        let (stem, path) = (stem(&folder.id(index)), folder.path(index));
        match endings.iter().find_map(|ending| stem.strip_suffix(ending)) {
            Some(name) => add(&mut maps, name, path)?,
            None => {
                if let Some(name) = stem.strip_suffix(&pairing.image_suffix) {
                    add(&mut images, name, path)?;
                }
            }
        }
    }
    Ok((images, maps))
}

fn read_list(path: &Path) -> Result<BTreeSet<String>, DataError> {
    let wrong = |reason: String| DataError::List { path: path.into(), reason };
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    let names: BTreeSet<String> =
        text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect();
    if names.is_empty() { Err(wrong("no name in it".into())) } else { Ok(names) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{encode, picture};
    use image::{GrayImage, ImageFormat};
    use std::fs;

    fn folder(paths: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for path in paths {
            let bytes = if path.contains("mask") || path.contains("depth") || path.contains("gt") {
                encode(&GrayImage::from_raw(5, 3, (0..15).collect()).unwrap().into(), ImageFormat::Png)
            } else {
                encode(&picture(5, 3).into(), ImageFormat::Png)
            };
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        root
    }

    fn pairing(root: &tempfile::TempDir, images: &str) -> Pairing {
        Pairing { images: root.path().join(images).display().to_string(), ..Pairing::default() }
    }

    fn open(pairing: &Pairing, kind: MapKind) -> Result<AnnotatedSource, DataError> {
        AnnotatedSource::open(pairing, kind, &DecodeLimits::default())
    }

    fn ids(source: &AnnotatedSource) -> Vec<String> {
        (0..source.len()).map(|index| source.id(index)).collect()
    }

    #[test]
    fn two_folders_are_found_by_their_names() {
        let mut seen = 0;
        for (img, mask) in [("img", "mask"), ("images", "masks")] {
            let files = [
                format!("{img}/b.png"),
                format!("{img}/a.jpg"),
                format!("{mask}/a.png"),
                format!("{mask}/b.png"),
                format!("{img}/c.png"),
            ];
            let root = folder(&files.each_ref().map(String::as_str));
            let source = open(&pairing(&root, ""), MapKind::Mask).unwrap();
            assert_eq!((ids(&source), source.images_without_map()), (vec!["a".to_owned(), "b".to_owned()], 1));
            assert_eq!(source.image(0).unwrap(), picture(5, 3));
            assert_eq!(source.mask(1).unwrap().values, (0..15).collect::<Vec<u16>>());
            seen += 1;
        }
        assert_eq!(seen, 2);
    }

    #[test]
    fn maps_beside_their_images_are_found_by_the_ends_of_their_names() {
        let root = folder(&["cat/1.jpg", "cat/1-mask.png", "dog/1.jpg", "dog/1-mask.png", "dog/2.jpg"]);
        assert_eq!(ids(&open(&pairing(&root, ""), MapKind::Mask).unwrap()), ["cat/1", "dog/1"]);
        let root = folder(&["frame-000005.jpg", "frame-000005.depth.png"]);
        let source = open(&pairing(&root, ""), MapKind::Depth).unwrap();
        assert_eq!(ids(&source), ["frame-000005"]);
        let (width, height, depth) = source.depth(0, 0.5).unwrap();
        assert_eq!((width, height, depth[3]), (5, 3, 1.5));
    }

    #[test]
    fn layouts_of_voc_ade20k_and_cityscapes_are_given_by_folders_suffixes_and_lists() {
        let root = folder(&["JPEGImages/1.jpg", "JPEGImages/2.jpg", "gt/1.png", "gt/2.png"]);
        fs::write(root.path().join("train.txt"), "2\n\n").unwrap();
        let mut voc = pairing(&root, "JPEGImages");
        voc.maps = Some(root.path().join("gt"));
        voc.list = Some(root.path().join("train.txt"));
        assert_eq!(ids(&open(&voc, MapKind::Mask).unwrap()), ["2"]);
        fs::write(root.path().join("train.txt"), "2\n7\n").unwrap();
        let message = open(&voc, MapKind::Mask).unwrap_err().to_string();
        assert!(message.contains("`7` is listed") && message.contains("1 of 2"), "{message}");
        fs::write(root.path().join("train.txt"), "\n").unwrap();
        let error = open(&voc, MapKind::Mask).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains("train.txt`: no name in it\n\nhint: "), "{error}");
        fs::remove_file(root.path().join("train.txt")).unwrap();
        let error = open(&voc, MapKind::Mask).unwrap_err();
        assert!(error.is_usage() && error.to_string().starts_with("data: list `"), "{error}");

        let root = folder(&[
            "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png",
            "gtFine/train/ulm/ulm_0_gtFine_labelTrainIds.png",
            "gtFine/train/ulm/ulm_0_gtFine_color.png",
        ]);
        let mut cityscapes = pairing(&root, "leftImg8bit/train");
        cityscapes.maps = Some(root.path().join("gtFine/train"));
        cityscapes.image_suffix = "_leftImg8bit".into();
        cityscapes.map_suffix = "_gtFine_labelTrainIds".into();
        assert_eq!(ids(&open(&cityscapes, MapKind::Mask).unwrap()), ["ulm/ulm_0"]);
    }

    #[test]
    fn no_pairs_is_an_error_that_counts_what_is_there() {
        let root = folder(&["img/a.png", "img/b.png", "mask/c.png"]);
        let message = open(&pairing(&root, ""), MapKind::Mask).unwrap_err().to_string();
        assert!(message.contains("2 image(s) and 1 mask(s), no name in common"), "{message}");
        let root = folder(&["a.png"]);
        let message = open(&pairing(&root, ""), MapKind::Depth).unwrap_err().to_string();
        assert!(message.contains("1 image(s) and 0 depth map(s)") && message.contains("`NAME-depth.png`"), "{message}");
        assert!(open(&pairing(&root, "nowhere"), MapKind::Mask).unwrap_err().is_usage());
    }

    #[test]
    fn two_files_of_one_name_are_an_error_that_names_both() {
        let mut seen = 0;
        for (files, first, second) in [
            (["img/a.jpg", "img/a.png", "mask/a.png"], "img/a.jpg", "img/a.png"),
            (["img/a.jpg", "mask/a.png", "mask/a.tif"], "mask/a.png", "mask/a.tif"),
            (["a.jpg", "a.png", "a-mask.png"], "a.jpg", "a.png"),
        ] {
            let root = folder(&files);
            let error = open(&pairing(&root, ""), MapKind::Mask).unwrap_err();
            let message = error.to_string();
            let has = |part: &str| message.contains(&root.path().join(part).display().to_string());
            assert!(error.is_usage() && has(first) && has(second), "{message}");
            seen += 1;
        }
        assert_eq!(seen, 3);
    }

    #[test]
    fn built_in_images_have_masks_and_depth() {
        let pairing = Pairing { images: "synthetic:images=14,size=16x24".into(), ..Pairing::default() };
        let source = open(&pairing, MapKind::Mask).unwrap();
        let mask = source.mask(13).unwrap();
        assert_eq!((source.len(), mask.width, mask.height), (14, 24, 16));
        // Image 13 is of class 1.
        assert_eq!(mask.values.iter().copied().collect::<BTreeSet<u16>>(), BTreeSet::from([0, 2]));
        let (width, height, depth) = source.depth(13, 0.001).unwrap();
        assert!((width, height) == (24, 16) && depth.iter().all(|depth| (0.5..=10.0).contains(depth)));
        let two = source.select(&[13, 4]);
        assert_eq!((two.len(), two.id(0), two.mask(0).unwrap()), (2, source.id(13), mask));
        assert_eq!(two.select(&[1]).depth(0, 1.0).unwrap(), source.depth(4, 1.0).unwrap());
        assert_eq!(two.image(1).unwrap(), source.image(4).unwrap());
    }
}
