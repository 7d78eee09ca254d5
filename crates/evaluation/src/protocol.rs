//! What a score was measured on and how: the stamp that every result carries.
//!
//! Two scores can be compared when their protocols agree; a score whose protocol is unknown cannot be compared at all.

use serde::{Deserialize, Serialize};

use crate::{
    copies::CopiesConfig,
    dense::{keypoints::PointConfig, propagation::PropagationConfig, transfer::PairConfig},
    finetune::FinetuneConfig,
    kmeans::KMeansConfig,
    knn::KnnConfig,
    linear::LinearConfig,
    logistic::LogisticConfig,
    retrieval::RetrievalConfig,
};

/// Where a feature vector comes from in the backbone's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Token {
    /// The CLS token.
    Cls,
    /// The mean over the patch tokens.
    PatchMean,
    /// The generalised mean over the patch tokens.
    PatchGem,
    /// The patch tokens, one feature vector each.
    Patches,
}

/// How features were extracted. The caller that ran the backbone fills this in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureSource {
    /// The backbone, with its weights: for example `vit_small/16, runs/a/checkpoints/step-000500, teacher`.
    pub backbone: String,
    /// The data that classifiers are made from; empty if the evaluation trains nothing.
    pub train_data: String,
    /// The data that is scored.
    pub val_data: String,
    /// The tokens used, in the order of concatenation.
    pub tokens: Vec<Token>,
    /// The blocks whose tokens are used, counted from 0, oldest first.
    pub layers: Vec<usize>,
    /// Whether the backbone's final norm was applied.
    pub final_norm: bool,
    /// Length of the shorter image side after resizing, in pixels; 0 where images keep their size.
    pub resize_px: usize,
    /// Side of the central crop, or of the windows of a dense task, in pixels.
    pub crop_px: usize,
    /// The resizing filter, for example `bicubic, antialias`.
    pub interpolation: String,
    /// Augmentation of the train images, `none` for cached features of central crops.
    pub augmentation: String,
}

/// The evaluation and all its settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "snake_case")]
pub enum Method {
    /// Weighted k-nearest neighbours.
    Knn(KnnConfig),
    /// Linear classifiers trained by SGD.
    Linear(LinearConfig),
    /// The whole backbone trained with a linear classifier.
    Finetune(FinetuneConfig),
    /// Multinomial logistic regression.
    Logistic(LogisticConfig),
    /// Rankings of a gallery by similarity.
    Retrieval(RetrievalConfig),
    /// Rankings with easy, hard and junk images.
    Revisited,
    /// Originals of copies among many images.
    Copies(CopiesConfig),
    /// k-means, compared with classes.
    Clustering(KMeansConfig),
    /// Effective rank and signs of collapse.
    Spectrum {
        /// Whether the mean feature was subtracted before the singular values were taken.
        centered: bool,
    },
    /// Semantic segmentation.
    Segmentation {
        /// The head that made the predictions, and how it was trained.
        head: String,
        /// The label that is not scored.
        ignored: u32,
        /// How images were fed: for example `short side 512, window 512, stride 341`.
        inference: String,
    },
    /// Monocular depth.
    Depth {
        /// The head that made the predictions, and how it was trained.
        head: String,
        /// Depths outside this range, in metres, are not scored.
        range: (f32, f32),
        /// How images were fed: for example `full image, mean of both flips`.
        inference: String,
    },
    /// Label propagation through videos.
    Video {
        /// How labels were carried on.
        propagation: PropagationConfig,
        /// How frames were fed.
        inference: String,
    },
    /// Silhouettes carried from image to image.
    Silhouettes {
        /// Which images are paired.
        pairs: PairConfig,
        /// The label that is not scored.
        ignored: u32,
        /// How images were fed.
        inference: String,
    },
    /// Keypoints carried from image to image.
    Keypoints {
        /// Which images are paired, or the file that says it.
        pairs: String,
        /// How points are found between patches.
        points: PointConfig,
        /// What distances are measured by: the image, or boxes.
        extent: String,
        /// How images were fed.
        inference: String,
    },
    /// Figure and ground.
    Foreground {
        /// The linear classifier, and how it was trained.
        head: String,
        /// Attention that a figure holds.
        attention_mass: f32,
        /// The label that is not scored.
        ignored: u32,
        /// How images were fed.
        inference: String,
    },
}

/// The conditions of a measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protocol {
    /// The evaluation and all its settings, its seed among them.
    pub method: Method,
    /// How the features were extracted, one entry per feature set.
    pub features: Vec<FeatureSource>,
    /// Samples that classifiers were made from, if any.
    pub train_samples: Option<usize>,
    /// Samples (or pixels) that were scored.
    pub val_samples: usize,
    /// Number of classes, if there are any.
    pub num_classes: Option<usize>,
    /// Name and version of this software.
    pub software: String,
}

impl Protocol {
    /// A protocol stamped with this software's version.
    pub fn new(
        method: Method,
        features: Vec<FeatureSource>,
        train_samples: Option<usize>,
        val_samples: usize,
        num_classes: Option<usize>,
    ) -> Self {
        let software = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).to_owned();
        Self { method, features, train_samples, val_samples, num_classes, software }
    }
}

/// A result: scores and the protocol they were measured under.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report<S> {
    /// The conditions.
    pub protocol: Protocol,
    /// The outcome.
    pub scores: S,
}

#[cfg(test)]
pub(crate) fn test_source() -> FeatureSource {
    FeatureSource {
        backbone: "vit_tiny/8".to_owned(),
        train_data: "toy/train".to_owned(),
        val_data: "toy/val".to_owned(),
        tokens: vec![Token::Cls, Token::PatchMean],
        layers: vec![10, 11],
        final_norm: true,
        resize_px: 256,
        crop_px: 224,
        interpolation: "bicubic, antialias".to_owned(),
        augmentation: "none".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segmentation::SegmentationScores;

    #[test]
    fn every_method_survives_a_round_trip_through_json_and_names_its_task() {
        let methods = [
            (Method::Knn(KnnConfig::default()), "knn"),
            (Method::Linear(LinearConfig::default()), "linear"),
            (Method::Finetune(FinetuneConfig::default()), "finetune"),
            (Method::Logistic(LogisticConfig::default()), "logistic"),
            (Method::Retrieval(RetrievalConfig::default()), "retrieval"),
            (Method::Revisited, "revisited"),
            (Method::Copies(CopiesConfig { whitening: Some(("toy".into(), 3)), ..Default::default() }), "copies"),
            (Method::Clustering(KMeansConfig::default()), "clustering"),
            (Method::Spectrum { centered: true }, "spectrum"),
            (
                Method::Segmentation { head: "linear".into(), ignored: 255, inference: "whole image".into() },
                "segmentation",
            ),
            (Method::Depth { head: "linear".into(), range: (0.001, 10.0), inference: "whole image".into() }, "depth"),
            (Method::Video { propagation: PropagationConfig::default(), inference: "whole frames".into() }, "video"),
            (
                Method::Silhouettes { pairs: PairConfig::default(), ignored: 255, inference: "whole image".into() },
                "silhouettes",
            ),
            (
                Method::Keypoints {
                    pairs: "pairs.csv".into(),
                    points: PointConfig::default(),
                    extent: "image".into(),
                    inference: "whole image".into(),
                },
                "keypoints",
            ),
            (
                Method::Foreground {
                    head: "linear".into(),
                    attention_mass: 0.6,
                    ignored: 255,
                    inference: "whole image".into(),
                },
                "foreground",
            ),
        ];
        assert_eq!(methods.len(), 15);
        for (method, task) in methods {
            let protocol = Protocol::new(method, vec![test_source()], Some(70), 30, Some(5));
            let json = serde_json::to_value(&protocol).unwrap();
            assert_eq!(json["method"]["task"], task);
            assert_eq!(json["features"][0]["tokens"], serde_json::json!(["cls", "patch_mean"]));
            assert!(json["software"].as_str().unwrap().starts_with("dinoxide-evaluation "));
            assert_eq!(serde_json::from_value::<Protocol>(json).unwrap(), protocol);
        }
    }

    #[test]
    fn unknown_settings_are_refused() {
        assert!(serde_json::from_str::<KnnConfig>(r#"{"k": [3], "temprature": 0.1}"#).is_err());
        assert!(serde_json::from_str::<Method>(r#"{"task": "knn", "k": [3], "temprature": 0.1}"#).is_err());
        assert_eq!(serde_json::from_str::<KnnConfig>(r#"{"k": [3]}"#).unwrap().temperature, 0.07);
    }

    #[test]
    fn reports_are_plain_json() {
        let scores = SegmentationScores { mean_iou: 12.5, ..Default::default() };
        let method = Method::Segmentation { head: "linear".into(), ignored: 255, inference: "whole image".into() };
        let report = Report { protocol: Protocol::new(method, vec![test_source()], None, 99, Some(4)), scores };
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.contains(r#""mean_iou":12.5"#), "{json}");
        assert_eq!(serde_json::from_str::<Report<SegmentationScores>>(&json).unwrap(), report);
    }
}
