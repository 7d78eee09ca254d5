//! The `[augmentation]` table: what crops are cut from an image and how they are distorted.

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use crate::blur::BlurKind;

/// One choice of `[[augmentation.sizes]]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CropSizes {
    /// Side of the global crops, in pixels.
    pub global: usize,
    /// Side of the local crops, in pixels.
    pub local: usize,
    /// Side of the Gram teacher's crops, in pixels; 0: as the student's.
    pub gram: usize,
    /// Share of the steps, relative to the other choices'.
    pub share: f64,
}

/// The multi-crop recipe. Stages come in the order of the fields; the defaults are those of DINOv2 and DINOv3.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AugmentationConfig {
    /// Side of the two global crops, in pixels.
    pub global_crop_size: usize,
    /// Range of a global crop's area, as a fraction of the image's.
    pub global_crop_scale: [f64; 2],
    /// Number of local crops per image; may be 0.
    pub local_crops: usize,
    /// Side of the local crops, in pixels.
    pub local_crop_size: usize,
    /// Range of a local crop's area, as a fraction of the image's.
    pub local_crop_scale: [f64; 2],
    /// Side in pixels at which the Gram teacher sees the two global crops, same box and flip; 0: as the student does.
    pub gram_crop_size: usize,
    /// With a `gram_crop_size`: whether the Gram teacher's crops have the colours, blur and solarization of the student's.
    pub gram_crop_distorted: bool,
    /// Crop sizes to draw from, one of them for each step; empty: those above. DINOv3's high-resolution stage mixes five.
    pub sizes: Vec<CropSizes>,
    /// Range of the aspect ratio (width/height) of the box that becomes a square crop; log-uniform.
    pub crop_ratio: [f64; 2],
    /// Probability that a crop is mirrored left to right.
    pub horizontal_flip: f64,
    /// Probability that a crop is colour jittered: the four operations below, in random order.
    pub color_jitter: f64,
    /// Brightness factor is `U(1 − x, 1 + x)`, not below 0; at 0 the operation is left out.
    pub brightness: f64,
    /// Contrast factor is `U(1 − x, 1 + x)`, not below 0; at 0 the operation is left out.
    pub contrast: f64,
    /// Saturation factor is `U(1 − x, 1 + x)`, not below 0; at 0 the operation is left out.
    pub saturation: f64,
    /// Hue shift is `U(−x, x)` turns of the colour circle, x ≤ 0.5; at 0 the operation is left out.
    pub hue: f64,
    /// Probability that a crop is turned to grayscale.
    pub grayscale: f64,
    /// Probability that global crop 1, global crop 2 and a local crop are blurred.
    ///
    /// The default is what DINOv2 and DINOv3 effectively train with: their configs say `[1.0, 0.1, 0.5]`, but their
    /// blur applies with the complementary probability, and the published weights come from that. DINO and iBOT blur
    /// with `[1.0, 0.1, 0.5]` indeed.
    pub blur: [f64; 3],
    /// Which approximation of the Gaussian is used.
    pub blur_kind: BlurKind,
    /// Range of the blur's standard deviation, in pixels of the crop; uniform.
    pub blur_sigma: [f64; 2],
    /// Probability that global crop 2 is solarized. The other crops never are.
    pub solarize: f64,
    /// Values from this one on are inverted by solarize.
    pub solarize_threshold: u8,
    /// Mean of each channel, of values in 0…1, subtracted when a crop becomes a tensor.
    pub mean: [f32; 3],
    /// Standard deviation of each channel, of values in 0…1, divided by when a crop becomes a tensor.
    pub std: [f32; 3],
}

impl Default for AugmentationConfig {
    fn default() -> Self {
        Self {
            global_crop_size: 224,
            global_crop_scale: [0.32, 1.0],
            local_crops: 8,
            local_crop_size: 96,
            local_crop_scale: [0.05, 0.32],
            gram_crop_size: 0,
            gram_crop_distorted: true,
            sizes: Vec::new(),
            crop_ratio: [3.0 / 4.0, 4.0 / 3.0],
            horizontal_flip: 0.5,
            color_jitter: 0.8,
            brightness: 0.4,
            contrast: 0.4,
            saturation: 0.2,
            hue: 0.1,
            grayscale: 0.2,
            blur: [0.0, 0.9, 0.5],
            blur_kind: BlurKind::Gaussian9,
            blur_sigma: [0.1, 2.0],
            solarize: 0.2,
            solarize_threshold: 128,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
        }
    }
}

/// A config value that no crop, mask or evaluation transform can be made from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AugmentationError {
    /// A number outside the range that its key allows.
    #[error("augmentation: `{key}` is {value}, must be {allowed}")]
    OutOfRange {
        /// The config key.
        key: &'static str,
        /// The number found.
        value: f64,
        /// What the key allows.
        allowed: &'static str,
    },
    /// A range `[low, high]` that is reversed or exceeds what its key allows.
    #[error("augmentation: `{key}` is [{low}, {high}], must be two ascending numbers {allowed}")]
    Range {
        /// The config key.
        key: &'static str,
        /// The lower bound found.
        low: f64,
        /// The upper bound found.
        high: f64,
        /// What the key allows of both bounds.
        allowed: &'static str,
    },
    /// The lengths of an evaluation transform.
    #[error(
        "evaluation transform: a crop of {crop} px out of {resize} px is not possible\n\nhint: choose 1 ≤ crop ≤ resize ≤ 65535"
    )]
    EvalSize {
        /// Shorter side after the resize.
        resize: usize,
        /// Side of the crop.
        crop: usize,
    },
}

impl AugmentationConfig {
    /// This config once for each choice of sizes; itself if there is none.
    pub fn choices(&self) -> Vec<Self> {
        if self.sizes.is_empty() {
            return vec![self.clone()];
        }
        let of = |sizes: &CropSizes| Self {
            global_crop_size: sizes.global,
            local_crop_size: sizes.local,
            gram_crop_size: sizes.gram,
            sizes: Vec::new(),
            ..self.clone()
        };
        self.sizes.iter().map(of).collect()
    }

    /// Which of the [`choices`](Self::choices) falls to a draw, in proportion to their shares.
    pub fn choose(&self, rng: &mut impl Rng) -> usize {
        let all: f64 = self.sizes.iter().map(|sizes| sizes.share).sum();
        let mut left = rng.random::<f64>() * all;
        let found = self.sizes.iter().position(|sizes| {
            left -= sizes.share;
            left < 0.0
        });
        found.unwrap_or(self.sizes.len().saturating_sub(1))
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// The first value that is out of range, by its key.
    pub fn validate(&self) -> Result<(), AugmentationError> {
        for (key, size) in [("global_crop_size", self.global_crop_size), ("local_crop_size", self.local_crop_size)] {
            check(key, size as f64, "between 1 and 65535 px", |v| (1.0..=65535.0).contains(&v))?;
        }
        check("gram_crop_size", self.gram_crop_size as f64, "at most 65535 px", |v| v <= 65535.0)?;
        for sizes in &self.sizes {
            for (key, size) in [("sizes.global", sizes.global), ("sizes.local", sizes.local)] {
                check(key, size as f64, "between 1 and 65535 px", |v| (1.0..=65535.0).contains(&v))?;
            }
            check("sizes.gram", sizes.gram as f64, "at most 65535 px", |v| v <= 65535.0)?;
            check("sizes.share", sizes.share, "above 0", |v| v > 0.0 && v.is_finite())?;
        }
        check_range("global_crop_scale", self.global_crop_scale, "in (0, 1]", |v| v > 0.0 && v <= 1.0)?;
        check_range("local_crop_scale", self.local_crop_scale, "in (0, 1]", |v| v > 0.0 && v <= 1.0)?;
        check_range("crop_ratio", self.crop_ratio, "above 0", |v| v > 0.0 && v.is_finite())?;
        let [blur_global_1, blur_global_2, blur_local] = self.blur;
        for (key, probability) in [
            ("horizontal_flip", self.horizontal_flip),
            ("color_jitter", self.color_jitter),
            ("grayscale", self.grayscale),
            ("blur[0]", blur_global_1),
            ("blur[1]", blur_global_2),
            ("blur[2]", blur_local),
            ("solarize", self.solarize),
        ] {
            check_probability(key, probability)?;
        }
        for (key, strength) in
            [("brightness", self.brightness), ("contrast", self.contrast), ("saturation", self.saturation)]
        {
            check(key, strength, "0 or more", |v| v >= 0.0 && v.is_finite())?;
        }
        check("hue", self.hue, "between 0 and 0.5", |v| (0.0..=0.5).contains(&v))?;
        check_range("blur_sigma", self.blur_sigma, "above 0 and at most 100 px", |v| v > 0.0 && v <= 100.0)?;
        for value in self.mean {
            check("mean", value.into(), "a finite number", f64::is_finite)?;
        }
        for value in self.std {
            check("std", value.into(), "above 0", |v| v > 0.0 && v.is_finite())?;
        }
        Ok(())
    }
}

pub(crate) fn check_probability(key: &'static str, value: f64) -> Result<(), AugmentationError> {
    check(key, value, "a probability between 0 and 1", |v| (0.0..=1.0).contains(&v))
}

pub(crate) fn check_range(
    key: &'static str,
    [low, high]: [f64; 2],
    allowed: &'static str,
    holds: impl Fn(f64) -> bool,
) -> Result<(), AugmentationError> {
    if holds(low) && holds(high) && low <= high {
        Ok(())
    } else {
        Err(AugmentationError::Range { key, low, high, allowed })
    }
}

fn check(
    key: &'static str,
    value: f64,
    allowed: &'static str,
    holds: impl Fn(f64) -> bool,
) -> Result<(), AugmentationError> {
    if holds(value) { Ok(()) } else { Err(AugmentationError::OutOfRange { key, value, allowed }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_valid_and_survives_serialisation() {
        let config = AugmentationConfig::default();
        config.validate().unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<AugmentationConfig>(&text).unwrap(), config);
        assert!(text.contains(r#""blur_kind":"gaussian9""#), "{text}");
    }

    #[test]
    fn missing_keys_take_defaults_and_unknown_keys_are_refused() {
        let config: AugmentationConfig = serde_json::from_str(r#"{"local_crops": 0, "blur_kind": "pil"}"#).unwrap();
        let expected = AugmentationConfig { local_crops: 0, blur_kind: BlurKind::Pil, ..AugmentationConfig::default() };
        assert_eq!(config, expected);
        assert!(serde_json::from_str::<AugmentationConfig>(r#"{"local_crop": 0}"#).is_err());
    }

    #[test]
    fn sizes_are_drawn_in_proportion_to_their_shares() {
        let sizes = |global, share| CropSizes { global, local: 8, gram: 0, share };
        let config = AugmentationConfig { sizes: vec![sizes(16, 3.0), sizes(24, 1.0)], ..Default::default() };
        let mut rng = <rand::rngs::ChaCha8Rng as rand::SeedableRng>::seed_from_u64(1);
        let second: usize = (0..4000).map(|_| config.choose(&mut rng)).sum();
        assert!((900..1100).contains(&second), "{second} of 4000");
        let choices: Vec<usize> = config.choices().iter().map(|choice| choice.global_crop_size).collect();
        assert_eq!(choices, [16, 24]);
        let single = AugmentationConfig::default();
        assert_eq!((single.choices(), single.choose(&mut rng)), (vec![single.clone()], 0));
    }

    #[test]
    fn each_value_out_of_range_is_named_with_what_it_must_be() {
        type Change = fn(&mut AugmentationConfig);
        let cases: [(Change, &str); 21] = [
            (|c| c.global_crop_size = 0, "`global_crop_size` is 0,"),
            (|c| c.local_crop_size = 70_000, "`local_crop_size` is 70000,"),
            (|c| c.global_crop_scale = [0.5, 0.2], "`global_crop_scale` is [0.5, 0.2],"),
            (|c| c.global_crop_scale = [0.5, 1.2], "`global_crop_scale` is [0.5, 1.2],"),
            (|c| c.local_crop_scale = [0.0, 0.2], "`local_crop_scale` is [0, 0.2],"),
            (|c| c.crop_ratio = [-1.0, 1.0], "`crop_ratio` is [-1, 1],"),
            (|c| c.crop_ratio = [1.0, f64::INFINITY], "`crop_ratio` is [1, inf],"),
            (|c| c.horizontal_flip = 1.5, "`horizontal_flip` is 1.5,"),
            (|c| c.color_jitter = f64::NAN, "`color_jitter` is NaN,"),
            (|c| c.grayscale = -0.1, "`grayscale` is -0.1,"),
            (|c| c.blur = [0.0, 0.9, 5.0], "`blur[2]` is 5,"),
            (|c| c.solarize = 2.0, "`solarize` is 2,"),
            (|c| c.contrast = -0.4, "`contrast` is -0.4,"),
            (|c| c.saturation = f64::INFINITY, "`saturation` is inf,"),
            (|c| c.hue = 0.6, "`hue` is 0.6,"),
            (|c| c.blur_sigma = [0.0, 2.0], "`blur_sigma` is [0, 2],"),
            (|c| c.std = [0.2, 0.0, 0.2], "`std` is 0,"),
            (|c| c.gram_crop_size = 70_000, "`gram_crop_size` is 70000,"),
            (|c| c.sizes = vec![CropSizes { global: 8, share: 1.0, ..Default::default() }], "`sizes.local` is 0,"),
            (|c| c.sizes = vec![CropSizes { global: 8, local: 8, ..Default::default() }], "`sizes.share` is 0,"),
            (|c| c.mean[2] = f32::NAN, "`mean` is NaN,"),
        ];
        for (change, expected) in cases {
            let mut config = AugmentationConfig::default();
            change(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with("augmentation: ") && message.contains(expected), "{message}");
            assert!(message.contains("must be "), "{message}");
        }
    }
}
