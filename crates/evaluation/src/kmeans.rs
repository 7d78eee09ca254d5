//! k-means of features of length 1: Lloyd's iterations from k-means++ centers (Arthur & Vassilvitskii 2007), the best of
//! several restarts.

use burn::tensor::{DType, Device, Tensor, TensorData};
use dinoxide_random::{Purpose, stream};
use rand::{Rng, RngExt};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    error::EvaluationError,
    features::Features,
    neighbors::{floats, read},
    selection::draws,
};

/// Rows whose similarities to the centers exist at a time.
const BLOCK: usize = 4096;
/// Parts whose sums are accumulated side by side and then added in order, so that the number of threads changes no bit.
const PARTS: usize = 16;

/// Settings of [`kmeans()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KMeansConfig {
    /// Number of clusters; `None`: as many as there are classes.
    pub clusters: Option<usize>,
    /// Starts from other centers, of which the one with the lowest inertia counts.
    pub restarts: usize,
    /// Most iterations of a start, which ends earlier when no sample changes its cluster.
    pub max_iterations: usize,
    /// Seed of the first centers.
    pub seed: u64,
}

impl Default for KMeansConfig {
    fn default() -> Self {
        Self { clusters: None, restarts: 10, max_iterations: 300, seed: 0 }
    }
}

/// Result of [`kmeans()`].
#[derive(Clone, Debug, PartialEq)]
pub struct Clusters {
    /// The cluster of every row, the one with the nearest center.
    pub assignment: Vec<u32>,
    /// Row-major `[clusters, D]`.
    pub centers: Vec<f32>,
    /// Sum of the squared distances of the rows of length 1 to their centers.
    pub inertia: f64,
    /// Iterations of the best start.
    pub iterations: usize,
}

impl KMeansConfig {
    /// Checks the settings for `rows` samples of `classes` classes, before any feature is extracted, and gives the number
    /// of clusters.
    ///
    /// # Errors
    /// Settings out of range, or more clusters than samples.
    pub fn validate(&self, rows: usize, classes: usize) -> Result<usize, EvaluationError> {
        let refuse =
            |key, value: String, expected| Err(EvaluationError::Setting { task: "clustering", key, value, expected });
        let clusters = self.clusters.unwrap_or(classes);
        if clusters < 2 || clusters > rows {
            let expected = "at least 2 and at most the number of samples";
            return refuse("clusters", format!("{clusters} for {rows} samples"), expected);
        }
        if self.restarts == 0 {
            return refuse("restarts", "0".into(), "at least 1");
        }
        if self.max_iterations == 0 {
            return refuse("max_iterations", "0".into(), "at least 1");
        }
        Ok(clusters)
    }
}

/// Clusters the rows, each divided by its norm first. Ties go to the lower cluster; a cluster without a row takes the row
/// that is farthest from its center.
///
/// # Errors
/// Settings out of range (see [`KMeansConfig::validate`]; `clusters` must be given), or a device that fails.
pub fn kmeans(features: &Features, config: &KMeansConfig, device: &Device) -> Result<Clusters, EvaluationError> {
    let clusters = config.validate(features.rows(), 0)?;
    let points = Points::new(features.l2_normalized(), device);
    let mut best: Option<Clusters> = None;
    for restart in 0..config.restarts {
        let mut rng = stream(config.seed, Purpose::Evaluation, draws::KMEANS, restart as u64);
        let centers = points.first_centers(clusters, &mut rng);
        let found = points.lloyd(centers, config.max_iterations)?;
        if best.as_ref().is_none_or(|best| found.inertia < best.inertia) {
            best = Some(found);
        }
    }
    Ok(best.expect("at least one restart"))
}

/// Rows of length 1, on the host and in blocks on the device.
struct Points {
    host: Features,
    blocks: Vec<Tensor<2>>,
    device: Device,
    squared: Vec<f64>,
}

impl Points {
    fn new(host: Features, device: &Device) -> Self {
        let dim = host.dim();
        let load = |rows: &[f32]| {
            let data = TensorData::new(rows.to_vec(), [rows.len() / dim, dim]);
            Tensor::from_data(data, (device, DType::F32))
        };
        let blocks = host.values().chunks(BLOCK * dim).map(load).collect();
        let squared = host.values().par_chunks(dim).map(|row| dot(row, row)).collect();
        Self { host, blocks, device: device.clone(), squared }
    }

    /// k-means++: each next center is a row drawn with a probability in proportion to its squared distance to the nearest
    /// center so far.
    fn first_centers(&self, clusters: usize, rng: &mut impl Rng) -> Vec<f32> {
        let (rows, dim) = (self.host.rows(), self.host.dim());
        let mut chosen = rng.random_range(0..rows as u32) as usize;
        let mut nearest = vec![f64::INFINITY; rows];
        let mut centers = Vec::with_capacity(clusters * dim);
        for _ in 1..clusters {
            let center = self.host.row(chosen);
            centers.extend_from_slice(center);
            let own = self.squared[chosen];
            nearest.par_iter_mut().enumerate().for_each(|(row, nearest)| {
                let distance = self.squared[row] + own - 2.0 * dot(self.host.row(row), center);
                *nearest = nearest.min(distance.max(0.0));
            });
            let total: f64 = nearest.iter().sum();
            let mut left = rng.random::<f64>() * total;
            // With fewer different rows than clusters nothing is left, and some row is taken twice.
            let drawn = nearest.iter().position(|&weight| {
                left -= weight;
                left < 0.0
            });
            chosen = drawn.unwrap_or(rows - 1);
        }
        centers.extend_from_slice(self.host.row(chosen));
        centers
    }

    fn lloyd(&self, mut centers: Vec<f32>, max_iterations: usize) -> Result<Clusters, EvaluationError> {
        let mut assignment = Vec::new();
        for iterations in 1..=max_iterations {
            let (next, distances) = self.assign(&centers)?;
            let settled = next == assignment;
            assignment = next;
            if settled || iterations == max_iterations {
                let inertia = distances.iter().sum();
                return Ok(Clusters { assignment, centers, inertia, iterations });
            }
            centers = self.means(&mut assignment, distances, centers.len() / self.host.dim());
        }
        unreachable!("at least one iteration")
    }

    /// The nearest center of every row, and the squared distance to it.
    fn assign(&self, centers: &[f32]) -> Result<(Vec<u32>, Vec<f64>), EvaluationError> {
        let dim = self.host.dim();
        let clusters = centers.len() / dim;
        let squared: Vec<f64> = centers.chunks(dim).map(|center| dot(center, center)).collect();
        let data = TensorData::new(centers.to_vec(), [clusters, dim]);
        let keys = Tensor::<2>::from_data(data, (&self.device, DType::F32)).transpose();
        let mut nearest = Vec::with_capacity(self.host.rows());
        for block in &self.blocks {
            let products = read(block.clone().matmul(keys.clone()))?;
            nearest.par_extend(floats(&products)?.par_chunks(clusters).map(|products| {
                let distances = products.iter().zip(&squared).map(|(&product, own)| own - 2.0 * f64::from(product));
                let better = |best: (u32, f64), next: (u32, f64)| if next.1 < best.1 { next } else { best };
                (0..).zip(distances).reduce(better).expect("at least two clusters")
            }));
        }
        let distances = nearest.iter().zip(&self.squared).map(|((_, d), own)| (d + own).max(0.0)).collect();
        Ok((nearest.into_iter().map(|(cluster, _)| cluster).collect(), distances))
    }

    /// The mean row of every cluster.
    fn means(&self, assignment: &mut [u32], mut distances: Vec<f64>, clusters: usize) -> Vec<f32> {
        let dim = self.host.dim();
        let mut counts = vec![0usize; clusters];
        assignment.iter().for_each(|&cluster| counts[cluster as usize] += 1);
        for empty in 0..clusters {
            if counts[empty] > 0 {
                continue;
            }
            let farthest = (0..distances.len()).fold(0, |far, i| if distances[i] > distances[far] { i } else { far });
            distances[farthest] = 0.0;
            // The last row of a cluster stays, lest that one be empty next.
            if counts[assignment[farthest] as usize] > 1 {
                counts[assignment[farthest] as usize] -= 1;
                assignment[farthest] = empty as u32;
                counts[empty] = 1;
            }
        }
        let assignment = &*assignment;
        let part = assignment.len().div_ceil(PARTS);
        let sums: Vec<Vec<f64>> = assignment
            .par_chunks(part)
            .zip(self.host.values().par_chunks(part * dim))
            .map(|(assignment, rows)| {
                let mut sums = vec![0.0; clusters * dim];
                for (&cluster, row) in assignment.iter().zip(rows.chunks(dim)) {
                    let sum = &mut sums[cluster as usize * dim..][..dim];
                    sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
                }
                sums
            })
            .collect();
        (0..clusters * dim)
            .map(|i| {
                let sum: f64 = sums.iter().map(|part| part[i]).sum();
                (sum / counts[i / dim].max(1) as f64) as f32
            })
            .collect()
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::{clustered, gaussian};

    fn config(clusters: usize) -> KMeansConfig {
        KMeansConfig { clusters: Some(clusters), restarts: 4, ..Default::default() }
    }

    /// The squared distance of a row to a center.
    fn distance(row: &[f32], center: &[f32]) -> f64 {
        row.iter().zip(center).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum()
    }

    #[test]
    fn the_result_is_a_fixed_point_of_assignment_and_mean() {
        let features = gaussian(BLOCK + 300, 6, 1);
        let found = kmeans(&features, &config(7), &Device::flex()).unwrap();
        assert!(found.iterations > 3 && found.iterations < 300);
        let unit = features.l2_normalized();
        let centers: Vec<&[f32]> = found.centers.chunks(6).collect();
        assert_eq!(centers.len(), 7);
        let mut inertia = 0.0;
        for (row, &cluster) in found.assignment.iter().enumerate() {
            let own = distance(unit.row(row), centers[cluster as usize]);
            assert!(centers.iter().all(|center| own <= distance(unit.row(row), center) + 1e-6));
            inertia += own;
        }
        assert!((found.inertia - inertia).abs() < 1e-3 * inertia, "{} {inertia}", found.inertia);
        for (cluster, center) in centers.iter().enumerate() {
            let members: Vec<usize> =
                (0..unit.rows()).filter(|&row| found.assignment[row] as usize == cluster).collect();
            assert!(!members.is_empty());
            for d in 0..6 {
                let mean = members.iter().map(|&row| f64::from(unit.row(row)[d])).sum::<f64>() / members.len() as f64;
                assert!((f64::from(center[d]) - mean).abs() < 1e-6);
            }
        }
        assert_eq!(kmeans(&features, &config(7), &Device::flex()).unwrap(), found, "seeded");
    }

    #[test]
    fn separate_groups_are_found_and_more_restarts_are_never_worse() {
        let data = clustered(5, 200, 8, 0.05, 1);
        let found = kmeans(data.features(), &config(5), &Device::flex()).unwrap();
        for i in 0..200 {
            for j in 0..i {
                let together = found.assignment[i] == found.assignment[j];
                assert_eq!(together, data.labels()[i] == data.labels()[j], "{i} {j}");
            }
        }
        let features = gaussian(300, 4, 2);
        let inertia = |restarts, seed| {
            let config = KMeansConfig { restarts, seed, ..config(12) };
            kmeans(&features, &config, &Device::flex()).unwrap().inertia
        };
        let gains: Vec<f64> = (0..4).map(|seed| inertia(1, seed) - inertia(5, seed)).collect();
        assert!(gains.iter().all(|&gain| gain >= 0.0) && gains.iter().any(|&gain| gain > 0.1), "{gains:?}");
    }

    #[test]
    fn fewer_different_rows_than_clusters_are_no_obstacle() {
        let values = (0..20).flat_map(|i| if i % 2 == 0 { [1.0, 0.0] } else { [0.0, 3.0] }).collect();
        let features = Features::new(20, 2, values).unwrap();
        let found = kmeans(&features, &config(4), &Device::flex()).unwrap();
        assert!(found.inertia < 1e-9 && found.assignment[0] != found.assignment[1]);
    }

    #[test]
    fn an_empty_cluster_takes_the_farthest_row() {
        let features = Features::new(4, 2, vec![1.0, 0.0, 1.0, 0.1, 1.0, -0.1, 0.0, 1.0]).unwrap();
        let points = Points::new(features.l2_normalized(), &Device::flex());
        // Nothing is near the second center.
        let found = points.lloyd(vec![1.0, 0.0, -9.0, -9.0], 10).unwrap();
        assert_eq!(found.assignment, [0, 0, 0, 1]);
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let features = gaussian(9, 3, 1);
        for (key, config) in [
            ("clusters", config(1)),
            ("clusters", config(10)),
            ("clusters", KMeansConfig { clusters: None, ..config(2) }),
            ("restarts", KMeansConfig { restarts: 0, ..config(2) }),
            ("max_iterations", KMeansConfig { max_iterations: 0, ..config(2) }),
        ] {
            let error = kmeans(&features, &config, &Device::flex()).unwrap_err().to_string();
            assert!(error.starts_with(&format!("clustering: `{key}` is ")), "{error}");
        }
    }
}
