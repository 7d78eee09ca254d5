//! How well clusters agree with classes: normalised mutual information, adjusted Rand index, and accuracy after the best
//! matching of clusters with classes.
//!
//! With `n_ij` samples of cluster `i` and class `j`, `a_i` and `b_j` its sums and `n` all samples:
//! - mutual information `Σ n_ij/n · ln(n·n_ij / (a_i·b_j))`, divided by the mean of both entropies;
//! - Rand index of pairs, adjusted for chance (Hubert & Arabie 1985, eq. 5):
//!   `(Σ C(n_ij,2) − E) / (½(Σ C(a_i,2) + Σ C(b_j,2)) − E)`, `E = Σ C(a_i,2)·Σ C(b_j,2) / C(n,2)`;
//! - accuracy: the largest `Σ n_i,m(i) / n` over all one-to-one matchings `m` (Kuhn–Munkres).

use burn::tensor::Device;
use pathfinding::{kuhn_munkres::kuhn_munkres, matrix::Matrix};
use serde::{Deserialize, Serialize};

use crate::{
    error::EvaluationError,
    kmeans::{KMeansConfig, kmeans},
    labels::LabeledFeatures,
    protocol::{FeatureSource, Method, Protocol, Report},
};

/// Agreement of two labellings of the same samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Normalised mutual information, 0 to 1.
    pub nmi: f64,
    /// Adjusted Rand index: 1 when equal, about 0 by chance.
    pub ari: f64,
    /// Samples whose cluster is matched with their class, in percent.
    pub accuracy: f64,
}

/// Result of [`clustering()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusteringScores {
    /// With the classes.
    #[serde(flatten)]
    pub agreement: Agreement,
    /// Number of clusters.
    pub clusters: usize,
    /// Sum of squared distances to the centers.
    pub inertia: f64,
    /// Iterations of the best start.
    pub iterations: usize,
}

/// Clusters the features by k-means and compares the clusters with the classes.
///
/// # Errors
/// Settings out of range, or a single class.
pub fn clustering(
    data: &LabeledFeatures,
    source: &FeatureSource,
    config: &KMeansConfig,
    device: &Device,
) -> Result<Report<ClusteringScores>, EvaluationError> {
    let classes = data.class_counts().iter().filter(|&&count| count > 0).count();
    if classes == 1 {
        return Err(EvaluationError::SingleClass { class: data.labels()[0], samples: data.rows() });
    }
    let clusters = config.validate(data.rows(), classes)?;
    let config = KMeansConfig { clusters: Some(clusters), ..config.clone() };
    let found = kmeans(data.features(), &config, device)?;
    let scores = ClusteringScores {
        agreement: agreement(&found.assignment, data.labels())?,
        clusters,
        inertia: found.inertia,
        iterations: found.iterations,
    };
    let protocol =
        Protocol::new(Method::Clustering(config), vec![source.clone()], None, data.rows(), Some(data.num_classes()));
    Ok(Report { protocol, scores })
}

/// Compares clusters with classes, both numbered from 0.
///
/// # Errors
/// If there is not one cluster per class label, or no sample.
pub fn agreement(clusters: &[u32], classes: &[u32]) -> Result<Agreement, EvaluationError> {
    if clusters.len() != classes.len() || classes.is_empty() {
        let (predictions, labels) = (clusters.len(), classes.len());
        return Err(EvaluationError::PredictionCount { task: "clustering", predictions, labels });
    }
    let table = Contingency::new(clusters, classes);
    Ok(Agreement { nmi: table.nmi(), ari: table.ari(), accuracy: 100.0 * table.matched() / table.total })
}

/// Samples of every cluster and class.
struct Contingency {
    /// Row-major `[clusters, classes]`.
    counts: Vec<f64>,
    by_cluster: Vec<f64>,
    by_class: Vec<f64>,
    total: f64,
}

impl Contingency {
    fn new(clusters: &[u32], classes: &[u32]) -> Self {
        let size = |labels: &[u32]| labels.iter().max().map_or(0, |&most| most as usize + 1);
        let (rows, columns) = (size(clusters), size(classes));
        let (mut counts, mut by_cluster, mut by_class) =
            (vec![0.0; rows * columns], vec![0.0; rows], vec![0.0; columns]);
        for (&cluster, &class) in clusters.iter().zip(classes) {
            counts[cluster as usize * columns + class as usize] += 1.0;
            by_cluster[cluster as usize] += 1.0;
            by_class[class as usize] += 1.0;
        }
        Self { counts, by_cluster, by_class, total: classes.len() as f64 }
    }

    fn nmi(&self) -> f64 {
        let entropy = |counts: &[f64]| -> f64 {
            let shares = counts.iter().filter(|&&count| count > 0.0).map(|count| count / self.total);
            -shares.map(|share| share * share.ln()).sum::<f64>()
        };
        let mean = (entropy(&self.by_cluster) + entropy(&self.by_class)) / 2.0;
        if mean == 0.0 {
            // One cluster and one class: they are equal.
            return 1.0;
        }
        let columns = self.by_class.len();
        let terms = self.counts.iter().enumerate().filter(|(_, count)| **count > 0.0).map(|(i, &count)| {
            let expected = self.by_cluster[i / columns] * self.by_class[i % columns] / self.total;
            count / self.total * (count / expected).ln()
        });
        (terms.sum::<f64>() / mean).clamp(0.0, 1.0)
    }

    fn ari(&self) -> f64 {
        let pairs = |counts: &[f64]| counts.iter().map(|n| n * (n - 1.0) / 2.0).sum::<f64>();
        let (both, by_cluster, by_class) = (pairs(&self.counts), pairs(&self.by_cluster), pairs(&self.by_class));
        let expected = by_cluster * by_class / pairs(&[self.total]).max(1.0);
        let most = (by_cluster + by_class) / 2.0;
        // Both all one, or both all single: they are equal.
        if most == expected { 1.0 } else { (both - expected) / (most - expected) }
    }

    /// Samples on which the best matching agrees.
    fn matched(&self) -> f64 {
        let (rows, columns) = (self.by_cluster.len(), self.by_class.len());
        let count = |cluster: usize, class: usize| self.counts[cluster * columns + class] as i64;
        // The algorithm wants no more rows than columns.
        let weights = if rows <= columns {
            Matrix::from_fn(rows, columns, |(i, j)| count(i, j))
        } else {
            Matrix::from_fn(columns, rows, |(j, i)| count(i, j))
        };
        kuhn_munkres(&weights).0 as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{protocol::test_source, test_data::clustered};
    use serde_json::Value;

    fn labels(value: &Value) -> Vec<u32> {
        value.as_array().unwrap().iter().map(|label| label.as_u64().unwrap() as u32).collect()
    }

    #[test]
    fn equals_scikit_learn_on_random_labellings() {
        // From benches/peer/evaluation/expected.py, which says how they were made.
        let cases: Value = serde_json::from_str(include_str!("expected.json")).unwrap();
        let cases = cases["clustering"].as_array().unwrap();
        for case in cases {
            let found = agreement(&labels(&case["clusters"]), &labels(&case["classes"])).unwrap();
            for (name, ours) in [("nmi", found.nmi), ("ari", found.ari), ("accuracy", found.accuracy)] {
                let expected = case[name].as_f64().unwrap();
                assert!((ours - expected).abs() < 1e-9, "{name}: {ours} {expected} of {case}");
            }
        }
        assert_eq!(cases.len(), 12);
    }

    #[test]
    fn names_of_clusters_do_not_matter() {
        let classes = [0, 0, 1, 1, 2, 2, 2];
        let same = agreement(&[4, 4, 0, 0, 1, 1, 1], &classes).unwrap();
        assert_eq!((same.ari, same.accuracy), (1.0, 100.0));
        assert!((same.nmi - 1.0).abs() < 1e-12);
        assert_eq!(agreement(&[0], &[0]).unwrap(), Agreement { nmi: 1.0, ari: 1.0, accuracy: 100.0 });
        assert!(agreement(&[0, 1], &[0]).is_err() && agreement(&[], &[]).is_err());
    }

    #[test]
    fn separate_classes_are_found_by_clustering() {
        let data = clustered(4, 150, 9, 0.1, 1);
        let config = KMeansConfig { restarts: 5, ..Default::default() };
        let report = clustering(&data, &test_source(), &config, &Device::flex()).unwrap();
        assert_eq!((report.scores.clusters, report.scores.agreement.accuracy), (4, 100.0));
        assert!(matches!(&report.protocol.method, Method::Clustering(config) if config.clusters == Some(4)));
        let single = LabeledFeatures::new(data.features().clone(), vec![2; 150], 4).unwrap();
        let error = clustering(&single, &test_source(), &config, &Device::flex()).unwrap_err();
        assert_eq!(error, EvaluationError::SingleClass { class: 2, samples: 150 });
    }
}
