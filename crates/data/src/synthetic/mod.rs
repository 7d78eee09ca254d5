//! A labelled data set that is drawn on the fly: images, classes, masks and depth maps from a seed and an index.
//!
//! It is there so that everything can be tried, tested and measured without a download. Twelve classes are told apart by
//! the shape of an object and the pattern on it; colours, position, size, rotation, light, background and noise are drawn
//! at random for each image and say nothing about the class. Features that survive cropping, flipping, blurring and colour
//! jitter tell the classes apart; colour does not, and raw pixels do in part, by outlines and patterns.

mod pattern;
mod scene;
mod shape;

use image::{GrayImage, Luma, RgbImage};

use crate::{DataError, GroundTruth, ReadError, Source};
use pattern::Pattern;
use scene::Scene;
use shape::Shape;

/// The classes: each pattern once, each shape twice, and patterns that resemble each other on different shapes.
const CLASSES: [(&str, Shape, Pattern); 12] = [
    ("striped disc", Shape::Disc, Pattern::Stripes),
    ("speckled disc", Shape::Disc, Pattern::Speckle),
    ("checkered ring", Shape::Ring, Pattern::Checker),
    ("dotted ring", Shape::Ring, Pattern::Dots),
    ("brick triangle", Shape::Triangle, Pattern::Bricks),
    ("looped triangle", Shape::Triangle, Pattern::Loops),
    ("zigzag square", Shape::Square, Pattern::Zigzag),
    ("sunburst square", Shape::Square, Pattern::Sunburst),
    ("blotched star", Shape::Star, Pattern::Blotches),
    ("barred star", Shape::Star, Pattern::Grid),
    ("rippled cross", Shape::Cross, Pattern::Ripples),
    ("woven cross", Shape::Cross, Pattern::Weave),
];

/// Which part of the synthetic images. The two never share an image, whatever their sizes and seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// To train on.
    Train,
    /// To evaluate with.
    Val,
}

/// What to draw. Written as `synthetic:split=val,images=2000,size=64,seed=0`; `size` is one side, or height and width as
/// in `size=48x80`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyntheticConfig {
    /// Train or val.
    pub split: Split,
    /// How many images. The class of image `i` is `i mod 12`.
    pub images: u32,
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
    /// Images of different seeds have nothing in common.
    pub seed: u64,
}

impl SyntheticConfig {
    const KEYS: &[&str] = &["split", "images", "size", "seed"];
    /// Patterns need a few pixels, and a mistyped size should not take the memory of the machine.
    const SIDES: std::ops::RangeInclusive<u32> = 16..=2048;

    /// A split at its usual size: 12,000 images to train on or 1,200 to evaluate with, of 64x64 pixels.
    pub fn new(split: Split) -> Self {
        let images = match split {
            Split::Train => 12_000,
            Split::Val => 1_200,
        };
        Self { split, images, height: 64, width: 64, seed: 0 }
    }

    fn parse(spec: &str, list: &str) -> Result<Self, DataError> {
        let bad = |part: &str, expected| DataError::BadSpec { spec: spec.into(), part: part.into(), expected };
        let (mut split, mut images, mut size, mut seed) = (None, None, None, None);
        for part in list.split(',') {
            let (key, value) = part.split_once('=').ok_or_else(|| bad(part, "of the form `key=value`"))?;
            let twice = match key {
                "split" => {
                    let value = match value {
                        "train" => Split::Train,
                        "val" => Split::Val,
                        _ => return Err(bad(part, "`split=train` or `split=val`")),
                    };
                    split.replace(value).is_some()
                }
                "images" => {
                    let value = value.parse().ok().filter(|&images: &u32| images > 0);
                    images.replace(value.ok_or_else(|| bad(part, "`images=` and a number from 1 on"))?).is_some()
                }
                "size" => {
                    let (height, width) = value.split_once('x').unwrap_or((value, value));
                    let side = |text: &str| text.parse().ok().filter(|side| Self::SIDES.contains(side));
                    let sides = side(height).zip(side(width));
                    let expected = "`size=` and one side or HEIGHTxWIDTH, each from 16 to 2048";
                    size.replace(sides.ok_or_else(|| bad(part, expected))?).is_some()
                }
                "seed" => {
                    seed.replace(value.parse().map_err(|_| bad(part, "`seed=` and a number from 0 on"))?).is_some()
                }
                _ => {
                    let distance = |known: &&&str| strsim::damerau_levenshtein(known, key);
                    let nearest = Self::KEYS.iter().min_by_key(distance).filter(|known| distance(known) <= 3).copied();
                    return Err(DataError::UnknownKey {
                        spec: spec.into(),
                        key: key.into(),
                        nearest,
                        known: Self::KEYS,
                    });
                }
            };
            if twice {
                return Err(bad(part, "the only value of its key"));
            }
        }
        let default = Self::new(split.unwrap_or(Split::Train));
        let (height, width) = size.unwrap_or((default.height, default.width));
        Ok(Self {
            images: images.unwrap_or(default.images),
            height,
            width,
            seed: seed.unwrap_or(default.seed),
            ..default
        })
    }

    fn validate(&self) -> Result<(), DataError> {
        let sides = Self::SIDES.contains(&self.height) && Self::SIDES.contains(&self.width);
        if sides && self.images > 0 {
            return Ok(());
        }
        Err(DataError::Config {
            key: "source",
            value: format!("synthetic, {} images of {}x{}", self.images, self.height, self.width),
            expected: "at least one image, with sides from 16 to 2048",
        })
    }
}

/// The settings that a spec asks for, or `None` when it is not about synthetic images.
pub(crate) fn parse_spec(spec: &str) -> Result<Option<SyntheticConfig>, DataError> {
    match spec.strip_prefix("synthetic") {
        Some("") => Ok(Some(SyntheticConfig::new(Split::Train))),
        Some(rest) => rest.strip_prefix(':').map(|list| SyntheticConfig::parse(spec, list)).transpose(),
        None => Ok(None),
    }
}

/// Whether a spec, as [`open`](crate::open) takes it, is about synthetic images, whatever it says of them.
pub fn is_synthetic(spec: &str) -> bool {
    !matches!(parse_spec(spec), Ok(None))
}

/// Images drawn on the fly: see the head of this file.
#[derive(Clone, Debug)]
pub struct SyntheticSource {
    config: SyntheticConfig,
    classes: Vec<String>,
}

impl SyntheticSource {
    /// A source that draws what `config` says. Takes no time and no memory.
    ///
    /// # Errors
    /// [`DataError::Config`] when there are no images, or a side is not within 16 to 2048.
    pub fn new(config: SyntheticConfig) -> Result<Self, DataError> {
        config.validate()?;
        let classes = CLASSES.iter().map(|(name, ..)| (*name).to_owned()).collect();
        Ok(Self { config, classes })
    }

    fn class(&self, index: usize) -> usize {
        assert!(index < self.len(), "image {index} of {}", self.len());
        index % CLASSES.len()
    }

    fn scene(&self, index: usize) -> Scene {
        let (_, shape, pattern) = CLASSES[self.class(index)];
        // The number of images fits in 32 bits, so the two splits cannot meet.
        let sample = match self.config.split {
            Split::Train => index as u64,
            Split::Val => (1 << 32) + index as u64,
        };
        Scene::new(self.config.seed, sample, shape, pattern, self.config.height, self.config.width)
    }
}

impl Source for SyntheticSource {
    fn len(&self) -> usize {
        self.config.images as usize
    }

    fn id(&self, index: usize) -> String {
        let split = match self.config.split {
            Split::Train => "train",
            Split::Val => "val",
        };
        format!("synthetic/{split}/{index:06}")
    }

    fn read(&self, index: usize) -> Result<RgbImage, ReadError> {
        let scene = self.scene(index);
        let mut image = RgbImage::new(self.config.width, self.config.height);
        for (x, y, pixel) in image.enumerate_pixels_mut() {
            *pixel = scene.pixel(x, y).color;
        }
        Ok(image)
    }

    fn label(&self, index: usize) -> Option<u32> {
        Some(self.class(index) as u32)
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The object counts as its class where it covers at least half of a pixel. Depth is that of the wall, the floor or
    /// the rounded front of the object, between 0.5 and 10 m.
    fn ground_truth(&self, index: usize) -> Option<GroundTruth> {
        let (height, width) = (self.config.height, self.config.width);
        let scene = self.scene(index);
        let id = Luma([self.class(index) as u8 + 1]);
        let mut mask = GrayImage::new(width, height);
        let mut depth = Vec::with_capacity(height as usize * width as usize);
        for (x, y, pixel) in mask.enumerate_pixels_mut() {
            let drawn = scene.pixel(x, y);
            if drawn.is_object {
                *pixel = id;
            }
            depth.push(drawn.depth);
        }
        Some(GroundTruth { mask, depth, height, width })
    }
}

#[cfg(test)]
mod tests;
