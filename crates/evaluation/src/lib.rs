//! Evaluations of a backbone: what its features are worth, measured without changing it.
//!
//! Most of it works on features that are already extracted, held on the host as row-major `f32` matrices
//! ([`Features`]); the large matrix products run on the device that the caller names. A result is a [`Report`]: the
//! scores together with the [`Protocol`] they were obtained under, because a score without its protocol cannot be
//! compared with another.
//!
//! - [`mod@knn`]: weighted k-nearest neighbours, no training.
//! - [`mod@linear`]: linear classifiers trained by SGD, a grid of learning rates at once; on random crops,
//!   [`mod@linear_augmented`].
//! - [`mod@finetune`]: the one evaluation that trains the backbone, a copy of it, with a linear classifier.
//! - [`mod@logistic`]: multinomial logistic regression to convergence, a grid of regularisation strengths.
//! - [`mod@retrieval`], [`mod@revisited`]: rankings of a gallery by similarity.
//! - [`mod@copies`]: originals of edited copies, and the edits.
//! - [`mod@kmeans`], [`mod@clustering`]: clusters without labels, and how they agree with classes.
//! - [`bootstrap`]: confidence intervals of all of these.
//! - [`mod@spectrum`]: effective rank and other signs of collapse, no labels.
//! - [`dense`]: segmentation, depth, video and figure/ground from patch tokens.
//! - [`segmentation`], [`depth`]: the arithmetic of the dense-prediction metrics.

pub mod accuracy;
pub mod bootstrap;
pub mod clustering;
pub mod copies;
pub mod dense;
pub mod depth;
pub mod error;
pub mod extract;
pub mod features;
pub mod few_shot;
pub mod finetune;
mod finetune_network;
mod grid;
pub mod kmeans;
pub mod knn;
pub mod labels;
mod lbfgs;
pub mod linear;
pub mod linear_augmented;
mod linear_probe;
pub mod logistic;
pub mod logistic_model;
pub mod neighbors;
pub mod protocol;
pub mod random_crops;
pub mod retrieval;
pub mod revisited;
pub mod segmentation;
pub mod selection;
pub mod spectrum;
#[cfg(test)]
mod test_data;
mod top_k;

pub use accuracy::Accuracy;
pub use bootstrap::Interval;
pub use clustering::{ClusteringScores, clustering};
pub use error::EvaluationError;
pub use extract::{Batch, Extracted, Extraction, extract, for_each_batch};
pub use features::Features;
pub use few_shot::{FewShot, FewShotScore};
pub use finetune::{EpochScore, FinetuneConfig, FinetuneImages, FinetuneProgress, FinetuneScores, finetune};
pub use kmeans::{KMeansConfig, kmeans};
pub use knn::{KnnConfig, KnnScores, knn};
pub use labels::LabeledFeatures;
pub use linear::{FeatureSet, LinearConfig, LinearProgress, LinearScores, linear};
pub use linear_augmented::{Augmented, FeatureChoice, linear_augmented};
pub use logistic::{LogisticConfig, LogisticScores, logistic};
pub use logistic_model::{LogisticModel, fit_logistic};
pub use neighbors::{Neighbor, nearest_neighbors};
pub use protocol::{FeatureSource, Method, Protocol, Report, Token};
pub use random_crops::{LabeledImages, readable};
pub use retrieval::{RetrievalConfig, RetrievalScores, retrieval};
pub use revisited::{GroundTruth, RevisitedScores, revisited};
pub use segmentation::{ConfusionMatrix, SegmentationScores};
pub use selection::Selection;
pub use spectrum::{SpectrumScores, spectrum};
