//! Lengths of training: `"100 epochs"`, `"5000 steps"`, `"2M images"`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A length as a recipe writes it. Which of the three is written is the one truth; the others follow from the batch size
/// and the number of images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Duration {
    /// Passes over the data, possibly a fraction.
    Epochs(f64),
    /// Optimisation steps.
    Steps(u64),
    /// Images shown, each with all its crops.
    Images(u64),
}

impl Duration {
    /// No time at all.
    pub const ZERO: Self = Self::Steps(0);

    /// The number of steps, to the nearest, with batches of `batch` images from `samples` images.
    pub fn steps(self, batch: usize, samples: usize) -> u64 {
        match self {
            Self::Epochs(epochs) => (epochs * samples as f64 / batch as f64).round() as u64,
            Self::Steps(steps) => steps,
            Self::Images(images) => (images as f64 / batch as f64).round() as u64,
        }
    }
}

impl FromStr for Duration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "`{text}` is not a duration: write a number and a unit, as in \"100 epochs\", \"5000 steps\" or \"2M images\""
            )
        };
        let (number, unit) = text.trim().split_once(char::is_whitespace).ok_or_else(bad)?;
        let (digits, scale) = match number.char_indices().last() {
            Some((at, 'k' | 'K')) => (&number[..at], 1e3),
            Some((at, 'm' | 'M')) => (&number[..at], 1e6),
            Some((at, 'b' | 'B')) => (&number[..at], 1e9),
            _ => (number, 1.0),
        };
        let value = digits.replace('_', "").parse::<f64>().map_err(|_| bad())? * scale;
        if !value.is_finite() || !(0.0..=1e15).contains(&value) {
            return Err(format!("`{text}`: a duration lies between 0 and 10^15"));
        }
        let whole = || {
            if value.fract() == 0.0 {
                Ok(value as u64)
            } else {
                Err(format!("`{text}`: only epochs may be a fraction"))
            }
        };
        match unit.trim() {
            "epoch" | "epochs" => Ok(Self::Epochs(value)),
            "step" | "steps" => Ok(Self::Steps(whole()?)),
            "image" | "images" => Ok(Self::Images(whole()?)),
            _ => Err(bad()),
        }
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Epochs(n) => write!(f, "{n} epochs"),
            Self::Steps(n) => write!(f, "{n} steps"),
            Self::Images(n) => write!(f, "{n} images"),
        }
    }
}

impl Serialize for Duration {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_unit_gives_its_steps_and_survives_a_round_trip() {
        let cases = [
            ("100 epochs", 100 * 1000 / 64 + 1),
            ("0.5 epochs", 8),
            ("5000 steps", 5000),
            ("2M images", 31_250),
            ("64k images", 1000),
            ("1_000 steps", 1000),
            ("1 epoch", 16),
        ];
        for (text, steps) in cases {
            let duration: Duration = text.parse().expect(text);
            assert_eq!(duration.steps(64, 1000), steps, "{text}");
            assert_eq!(duration.to_string().parse::<Duration>(), Ok(duration));
        }
    }

    #[test]
    fn what_is_no_duration_says_what_one_is() {
        for text in ["", "100", "epochs", "ten epochs", "1.5 steps", "-1 epochs", "nan epochs", "3 days", "1e99 images"]
        {
            assert!(text.parse::<Duration>().is_err(), "{text}");
        }
    }
}
