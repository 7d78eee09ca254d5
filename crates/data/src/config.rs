//! The `[data]` part of a recipe.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{DataError, DecodeLimits, Source, open};

/// Which images to train on, and what to do with those that cannot be read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// A folder of images, or `synthetic` with optional settings: see [`open`].
    pub source: String,
    /// A run stops when more than this share of the images cannot be read: see [`BadImages`](crate::BadImages).
    pub max_bad_share: f64,
    /// What an image file may be.
    pub decode: DecodeLimits,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { source: "synthetic".into(), max_bad_share: 0.1, decode: DecodeLimits::default() }
    }
}

impl DataConfig {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// [`DataError::Config`] when a share is outside `0..=1` or a limit lets no image through.
    pub fn validate(&self) -> Result<(), DataError> {
        if !(0.0..=1.0).contains(&self.max_bad_share) {
            return Err(DataError::Config {
                key: "max_bad_share",
                value: self.max_bad_share.to_string(),
                expected: "a share between 0 and 1",
            });
        }
        self.decode.validate()
    }

    /// Opens the source.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate) and [`open`].
    pub fn open(&self) -> Result<Arc<dyn Source>, DataError> {
        self.validate()?;
        open(&self.source, &self.decode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_table_is_the_default_and_unknown_keys_are_refused() {
        assert_eq!(toml::from_str::<DataConfig>("").unwrap(), DataConfig::default());
        let partial: DataConfig = toml::from_str("source = \"photos\"\n[decode]\nmin_side = 32").unwrap();
        assert_eq!((partial.source.as_str(), partial.decode.min_side, partial.max_bad_share), ("photos", 32, 0.1));
        assert_eq!(partial.decode.max_pixels, DecodeLimits::default().max_pixels);
        for wrong in ["sorce = \"x\"", "[decode]\nmin_sides = 3"] {
            assert!(toml::from_str::<DataConfig>(wrong).unwrap_err().to_string().contains("unknown field"));
        }
        let text = toml::to_string(&partial).unwrap();
        assert_eq!(toml::from_str::<DataConfig>(&text).unwrap(), partial);
    }

    #[test]
    fn values_out_of_range_are_named() {
        for share in [-0.1, 1.5, f64::NAN] {
            let error = DataConfig { max_bad_share: share, ..Default::default() }.validate().unwrap_err();
            assert!(error.to_string().contains("max_bad_share"), "{error}");
        }
        let decode = DecodeLimits { min_side: 100, max_pixels: 99 * 100 };
        let error = DataConfig { decode, ..Default::default() }.open().err().unwrap();
        assert!(error.to_string().contains("max_pixels"), "{error}");
        DataConfig::default().validate().unwrap();
    }
}
