//! Typed TOML with `extends`, overrides, origins and nearest-key messages; knows no vision.
//!
//! A recipe is any serde struct `T`. Its value is built from layers, each laid over the one before:
//!
//! 1. `T::default()`,
//! 2. the chain of files joined by a top-level `extends = "base/dinov2.toml"`, from the base to the file that was named,
//! 3. overrides such as `optim.base_lr=0.002`, in the order given.
//!
//! Tables merge key by key; scalars and arrays replace. Each file is read as a `T` of its own before any merging, so a
//! mistake is reported in the file and line where it stands. What comes out knows where each of its keys was set.
//!
//! # What `T` must be
//!
//! - Every struct in it has `#[serde(default, deny_unknown_fields)]`: a partial file is then valid, a misspelt key is not.
//! - No `flatten` (serde does not combine it with `deny_unknown_fields`), no `alias` (the second name of a key would be
//!   a second key), and no top-level field named `extends`.
//! - Serializing and reading back gives the same value.
//!
//! A table may also stand for an enum with data. It is merged like any other (`schedule.end = 0.1` changes one key of
//! the variant below); where that would mix two variants, the one on top replaces the one below.
//!
//! # Example
//!
//! ```
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Debug, Default, Deserialize, Serialize)]
//! #[serde(default, deny_unknown_fields)]
//! struct Recipe {
//!     optim: Optim,
//! }
//!
//! #[derive(Debug, Default, Deserialize, Serialize)]
//! #[serde(default, deny_unknown_fields)]
//! struct Optim {
//!     base_lr: f64,
//!     clip_norm: f64,
//! }
//!
//! let request = dinoxide_config::Request {
//!     name: "small",
//!     built_in: &[("small.toml", "[optim]\nbase_lr = 0.004\n")],
//!     overrides: &["optim.clip_norm=3".to_owned()],
//!     ..Default::default()
//! };
//! let resolved = dinoxide_config::load::<Recipe>(&request)?;
//! assert_eq!(resolved.value.optim.clip_norm, 3.0);
//! assert_eq!(
//!     resolved.to_annotated_toml(),
//!     "[optim]\n\
//!      base_lr = 0.004  # built-in small.toml:2\n\
//!      clip_norm = 3.0  # --set optim.clip_norm=3\n"
//! );
//! # Ok::<(), dinoxide_config::ConfigError>(())
//! ```

mod annotated;
mod difference;
mod error;
mod fault;
mod find;
mod keys;
mod layer;
mod origin;
mod overrides;
mod resolve;
mod text;

pub use difference::{Difference, difference};
pub use error::{ConfigError, Hint};
pub use origin::{Origin, Origins};
pub use resolve::{Request, Resolved, load};

#[cfg(test)]
mod sample;
