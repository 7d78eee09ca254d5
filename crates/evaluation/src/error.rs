//! The crate's error type.

use dinoxide_data::{Rejected, first_of};
use thiserror::Error;

/// What can be wrong with the inputs of an evaluation, or go wrong during one.
///
/// Every message names the place, what happened and the values involved; where one step would help, it ends with a hint.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum EvaluationError {
    /// Features that could not be extracted.
    #[error("features: {message}")]
    Extraction {
        /// Why.
        message: String,
    },
    /// An image whose mask or depth map does not fit.
    #[error("`{id}`: {message}")]
    Annotation {
        /// The image.
        id: String,
        /// What is wrong, with what to do.
        message: String,
    },
    /// Depth maps without a single depth that counts.
    #[error(
        "depth: none of the {maps} depth map(s) has a depth between {min} and {max} m; the largest is {largest} m\n\n\
         hint: 0 is read as missing; `--depth-scale` says how many metres a value of 1 is (0.001 for millimetres)"
    )]
    NoDepth {
        /// How many maps.
        maps: usize,
        /// The largest depth, in metres.
        largest: f32,
        /// The least that counts.
        min: f32,
        /// The greatest that counts.
        max: f32,
    },
    /// The temporary file failed.
    #[error("temporary file: {message}\n\nhint: the environment variable `TMPDIR` names the folder that it is in")]
    Scratch {
        /// The system's words.
        message: String,
    },
    /// A head whose loss is not finite.
    #[error(
        "{task}: the loss is not finite at iteration {iteration}\n\nhint: lower the learning rate, {learning_rate:e}"
    )]
    HeadDiverged {
        /// The evaluation.
        task: &'static str,
        /// The iteration.
        iteration: usize,
        /// The highest learning rate.
        learning_rate: f64,
    },
    /// Nothing to extract features from.
    #[error("features: none of the {} image(s) can be read{}", rejected.len(), first_of(rejected))]
    NothingReadable {
        /// The images.
        rejected: Vec<Rejected>,
    },
    /// An image that was read before and no longer can be.
    #[error("`{image}` could be read before, and now cannot: {reason}")]
    Unreadable {
        /// The image.
        image: String,
        /// Why.
        reason: String,
    },
    /// Images without classes where classes are scored.
    #[error(
        "evaluation: the images have no classes\n\nhint: put each class into a folder of its own, `DIR/<class>/<image>`"
    )]
    Unlabelled,
    /// A matrix whose sizes do not describe its values.
    #[error("features: {rows} rows of {dim} values need {} values, got {values}", rows * dim)]
    FeatureShape {
        /// Stated rows.
        rows: usize,
        /// Stated row length.
        dim: usize,
        /// Values given.
        values: usize,
    },
    /// A matrix without rows or without columns.
    #[error("features: the matrix is empty ({rows} rows of {dim} values)")]
    EmptyFeatures {
        /// Stated rows.
        rows: usize,
        /// Stated row length.
        dim: usize,
    },
    /// Rows are numbered in 32 bits.
    #[error("features: {rows} rows, at most {} are supported", u32::MAX)]
    TooManyRows {
        /// Stated rows.
        rows: usize,
    },
    /// NaN or infinity among the features.
    #[error(
        "features: row {row}, column {column} is {value} ({rows_affected} of {rows} rows have a value that is not finite)\n\n\
         hint: the backbone produced it; check its weights and the image of that row"
    )]
    NonFinite {
        /// First row with such a value.
        row: usize,
        /// First such column of that row.
        column: usize,
        /// The value.
        value: f32,
        /// Rows with at least one such value.
        rows_affected: usize,
        /// All rows.
        rows: usize,
    },
    /// NaN or infinity among the features of an image.
    #[error(
        "features: a value of `{image}` is {value} ({})\n\nhint: the backbone produced it; check its weights, and that image",
        plural(*images_affected, "image is affected", "images are affected")
    )]
    NonFiniteImage {
        /// The first such image.
        image: String,
        /// The value.
        value: f32,
        /// Images with such a value.
        images_affected: usize,
    },
    /// Feature matrices to be concatenated describe different numbers of samples.
    #[error("features: cannot concatenate part {part} of {rows} rows with part 0 of {expected} rows")]
    ConcatRows {
        /// Index of the part.
        part: usize,
        /// Its rows.
        rows: usize,
        /// Rows of the first part.
        expected: usize,
    },
    /// More blocks asked for than given, or none.
    #[error("features: the last {asked} blocks were asked for, {available} are given")]
    BlockCount {
        /// Blocks asked for.
        asked: usize,
        /// Blocks given.
        available: usize,
    },
    /// One label per row is needed.
    #[error("labels: {labels} labels for {rows} feature rows")]
    LabelCount {
        /// Labels given.
        labels: usize,
        /// Feature rows.
        rows: usize,
    },
    /// A label that is no class.
    #[error("labels: label {label} of sample {sample} is out of range, there are {num_classes} classes (0 to {})", .num_classes.wrapping_sub(1))]
    LabelOutOfRange {
        /// The sample's row.
        sample: usize,
        /// Its label.
        label: u32,
        /// Number of classes.
        num_classes: usize,
    },
    /// Train and val features are of different widths.
    #[error(
        "evaluation: train features have {train} dimensions, val features {val}\n\nhint: extract both with the same backbone, tokens and layers"
    )]
    DimMismatch {
        /// Width of the train features.
        train: usize,
        /// Width of the val features.
        val: usize,
    },
    /// Train and val number their classes differently.
    #[error("evaluation: train has {train} classes, val {val}\n\nhint: give both splits the same list of classes")]
    ClassCountMismatch {
        /// Classes of train.
        train: usize,
        /// Classes of val.
        val: usize,
    },
    /// Nothing to tell apart.
    #[error(
        "evaluation: all {samples} train samples are of class {class}, so there is nothing to tell apart\n\nhint: check that the labels were read"
    )]
    SingleClass {
        /// The class.
        class: u32,
        /// Train samples.
        samples: usize,
    },
    /// Classes that no classifier can predict.
    #[error(
        "evaluation: val has {} that train lacks: {}\n\nhint: leave those samples out of val, or add train samples",
        plural(classes.len(), "class", "classes"),
        listed(classes)
    )]
    UnseenClasses {
        /// Their numbers, ascending.
        classes: Vec<u32>,
    },
    /// More neighbours asked for than there are.
    #[error(
        "knn: k = {k}, but train has only {available} samples to choose from\n\nhint: lower `k` to at most {available}, or add train samples"
    )]
    TooFewNeighbors {
        /// Neighbours asked for.
        k: usize,
        /// Train samples that may be neighbours.
        available: usize,
    },
    /// A class with fewer samples than are to be drawn.
    #[error(
        "few-shot: class {class} has {available} train samples, {shots} are to be drawn\n\nhint: ask for at most {available}, or add train samples"
    )]
    TooFewShots {
        /// The class.
        class: u32,
        /// Its train samples.
        available: usize,
        /// Samples to draw.
        shots: usize,
    },
    /// No query has an image to be found.
    #[error(
        "retrieval: none of the {queries} queries has a relevant image among the {gallery} images to search\n\n         hint: check what makes an image relevant: the class, or the folders it lies in"
    )]
    NothingRelevant {
        /// Queries.
        queries: usize,
        /// Images to search.
        gallery: usize,
    },
    /// A ground-truth file that does not fit itself or the images.
    #[error("ground truth: {message}")]
    GroundTruth {
        /// What does not fit.
        message: String,
    },
    /// A setting outside its range.
    #[error("{task}: `{key}` is {value}, it must be {expected}")]
    Setting {
        /// The evaluation.
        task: &'static str,
        /// The setting.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        expected: &'static str,
    },
    /// No class has a sample to spare.
    #[error(
        "selection: no sample can be held out, each of the {classes} train classes has a single sample\n\n\
         hint: select on val (`selection = \"val\"`), or give more samples per class"
    )]
    NothingToHoldOut {
        /// Classes of train.
        classes: usize,
    },
    /// Feature sets that are not the same samples.
    #[error(
        "linear: feature set `{name}` has {rows} {split} rows, `{first}` has {expected}\n\nhint: all feature sets must describe the same samples in the same order"
    )]
    FeatureSetRows {
        /// The set that differs.
        name: String,
        /// `train` or `val`.
        split: &'static str,
        /// Its rows.
        rows: usize,
        /// The first set.
        first: String,
        /// Its rows.
        expected: usize,
    },
    /// Feature sets that are labelled differently.
    #[error("linear: the {split} labels of feature set `{name}` differ from those of `{first}` at sample {sample}")]
    FeatureSetLabels {
        /// The set that differs.
        name: String,
        /// `train` or `val`.
        split: &'static str,
        /// The first set.
        first: String,
        /// First sample that differs.
        sample: usize,
    },
    /// No learning rate gave finite weights.
    #[error("linear: all {classifiers} classifiers diverged\n\nhint: add learning rates below {smallest}")]
    Diverged {
        /// Classifiers trained.
        classifiers: usize,
        /// Smallest learning rate tried.
        smallest: f64,
    },
    /// Predictions and labels of different sizes.
    #[error("{task}: {predictions} predictions for {labels} labels")]
    PredictionCount {
        /// The metric.
        task: &'static str,
        /// Predictions given.
        predictions: usize,
        /// Labels given.
        labels: usize,
    },
    /// A predicted or true pixel class that is no class.
    #[error(
        "segmentation: pixel {pixel} has {what} {class}, there are {num_classes} classes and the ignored label is {ignored}"
    )]
    PixelClass {
        /// Index of the pixel in the given slice.
        pixel: usize,
        /// `label` or `prediction`.
        what: &'static str,
        /// Its value.
        class: u32,
        /// Number of classes.
        num_classes: usize,
        /// The label that is skipped.
        ignored: u32,
    },
    /// A depth of which no logarithm exists.
    #[error(
        "depth: prediction {value} at valid pixel {pixel} is not a positive depth\n\nhint: clamp predictions to the depth range first"
    )]
    DepthPrediction {
        /// Index of the pixel in the given slice.
        pixel: usize,
        /// The prediction.
        value: f32,
    },
    /// A true depth that is not a number.
    #[error("depth: true depth {value} at valid pixel {pixel} is not finite\n\nhint: mark such pixels as not valid")]
    DepthLabel {
        /// Index of the pixel in the given slice.
        pixel: usize,
        /// The true depth.
        value: f32,
    },
    /// Nothing to average over.
    #[error("{task}: no valid pixel was scored")]
    NoPixels {
        /// The metric.
        task: &'static str,
    },
    /// Statistics over pairs need a pair.
    #[error("spectrum: {rows} feature row, at least 2 are needed")]
    TooFewRows {
        /// Rows given.
        rows: usize,
    },
    /// An eigenvalue iteration that did not settle.
    #[error("spectrum: the eigenvalues of the {size}×{size} Gram matrix did not converge")]
    Eigenvalues {
        /// Side of the matrix.
        size: usize,
    },
    /// The compute device failed.
    #[error("evaluation: the device failed: {message}")]
    Device {
        /// Its own words.
        message: String,
    },
}

impl EvaluationError {
    /// Whether what was asked for is at fault: settings, or sets that the evaluation cannot be made of.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Extraction { .. }
                | Self::Unlabelled
                | Self::BlockCount { .. }
                | Self::ClassCountMismatch { .. }
                | Self::SingleClass { .. }
                | Self::UnseenClasses { .. }
                | Self::TooFewNeighbors { .. }
                | Self::TooFewShots { .. }
                | Self::NothingRelevant { .. }
                | Self::GroundTruth { .. }
                | Self::Setting { .. }
                | Self::NothingToHoldOut { .. }
        )
    }
}

fn plural(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// The first ten, and how many more.
fn listed(classes: &[u32]) -> String {
    let shown: Vec<String> = classes.iter().take(10).map(u32::to_string).collect();
    let rest = classes.len().saturating_sub(10);
    if rest == 0 { shown.join(", ") } else { format!("{} and {rest} more", shown.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_of_classes_are_cut_and_counted() {
        let message = EvaluationError::UnseenClasses { classes: (3..15).collect() }.to_string();
        assert!(
            message.starts_with(
                "evaluation: val has 12 classes that train lacks: 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 2 more\n\nhint: "
            ),
            "{message}"
        );
        let message = EvaluationError::UnseenClasses { classes: vec![7] }.to_string();
        assert!(message.starts_with("evaluation: val has 1 class that train lacks: 7\n\nhint: "), "{message}");
    }

    #[test]
    fn too_few_neighbours_names_both_numbers_and_a_remedy() {
        let message = EvaluationError::TooFewNeighbors { k: 200, available: 120 }.to_string();
        assert!(
            message.contains("k = 200") && message.contains("120 samples") && message.contains("hint: lower `k`"),
            "{message}"
        );
    }
}
