//! Dense tasks: what patch tokens say of the place they stand for.
//!
//! Images keep their proportions and differ in size; see [`Encoder`]. The tokens of a train set are never all in memory:
//! they go through a temporary file in half precision. Heads ([`HeadConfig`]) are linear or [`dpt`],
//! the backbone stays as it is.
//!
//! - [`segmentation`]: a class for each pixel, mIoU (DINOv2, §7.4; DINOv3, §6.1).
//! - [`mod@depth`]: metres for each pixel, RMSE (the same sections).
//! - [`propagation`]: masks carried through a video without any training (DINO, §4.2.2); [`boundary`] has its measures.
//! - [`foreground`]: what is object and what is ground, by a classifier, by attention, by the first principal component.
//! - [`silhouettes`], [`keypoints`]: carried from image to image by similar tokens ([`transfer`]).
//! - [`pca`]: principal components of tokens, for that and for pictures.

mod bilinear;
pub mod boundary;
pub mod depth;
pub mod dpt;
mod encoder;
pub mod foreground;
mod head;
mod heads;
pub mod keypoints;
pub mod pca;
pub mod propagation;
mod scratch;
pub mod segmentation;
pub mod silhouettes;
pub mod transfer;

pub use encoder::{Encoder, TokenGrid, TokenGridConfig};
pub use head::HeadConfig;
pub use heads::HeadKind;
