//! One vector for an image, made to find copies: CLS beside patch tokens under a generalised mean, and whitening.
//!
//! `GeM(x)_c = (1/P · Σ_p max(x_pc, ε)^q)^(1/q)` (Radenović et al. 2018, eq. 3) with `q = 4`, as in DINO (Caron et al. 2021,
//! §4.2.2). Whitening turns descriptors by the principal directions of other images and divides each coordinate by its
//! standard deviation there (Jégou & Chum 2012), so that what most images share counts for little.

use burn::tensor::{Device, Tensor};
use dinoxide_data::{Rejected, Source};
use dinoxide_model::{Backbone, weights::host};

use crate::dense::pca::{Components, Moments};
use crate::{EvaluationError, Extraction, Features, for_each_batch};

/// The exponent `q` of the generalised mean.
pub const GEM_EXPONENT: f32 = 4.0;
/// What negative tokens are taken as.
const GEM_FLOOR: f32 = 1e-6;
/// Coordinates with a smaller share of the variance are noise of rounding, and are left out.
const LEAST_SHARE: f64 = 1e-9;

/// Descriptors of a set of images.
#[derive(Clone, Debug)]
pub struct Described {
    /// CLS and pooled patch tokens of the last block after the final norm, `[n, 2D]`.
    pub features: Features,
    /// The index in the source of each row.
    pub indices: Vec<usize>,
    /// Images that could not be read and have no row.
    pub rejected: Vec<Rejected>,
}

/// Patch tokens `[B, P, D]` under the generalised mean: `[B, D]`.
pub fn gem(patches: Tensor<3>) -> Tensor<2> {
    let powered = patches.clamp_min(GEM_FLOOR).powf_scalar(GEM_EXPONENT);
    powered.mean_dim(1).squeeze_dim::<2>(1).powf_scalar(1.0 / GEM_EXPONENT)
}

/// Descriptors of the images `indices` of `source`. Images that cannot be read are left out and listed.
///
/// `progress` is called with the number of images done.
///
/// # Errors
/// Sizes that do not fit, no readable image, or features that are not finite.
pub fn describe(
    backbone: &Backbone,
    source: &dyn Source,
    indices: &[usize],
    how: &Extraction,
    device: &Device,
    progress: &mut dyn FnMut(usize),
) -> Result<Described, EvaluationError> {
    let (mut values, mut rows) = (Vec::new(), Vec::with_capacity(indices.len()));
    let rejected = for_each_batch(backbone, source, indices, how, device, progress, &mut |batch| {
        let last = batch.layers.into_iter().next_back().expect("at least one block");
        values.extend(host(Tensor::cat(vec![last.cls, gem(last.patches)], 1).reshape([-1])));
        rows.extend(batch.indices);
        Ok::<(), EvaluationError>(())
    })?;
    if rows.is_empty() {
        return Err(EvaluationError::NothingReadable { rejected });
    }
    let features = Features::new(rows.len(), values.len() / rows.len(), values).map_err(|error| match error {
        EvaluationError::NonFinite { row, value, rows_affected, .. } => {
            EvaluationError::NonFiniteImage { image: source.id(rows[row]), value, images_affected: rows_affected }
        }
        other => other,
    })?;
    Ok(Described { features, indices: rows, rejected })
}

/// A whitening that was learned.
#[derive(Clone, Debug)]
pub struct Whitening {
    components: Components,
    /// One over the standard deviation of each coordinate.
    scales: Vec<f32>,
}

impl Whitening {
    /// Learned from descriptors divided by their norms, with the `dims` leading coordinates, or fewer if others hardly vary.
    ///
    /// # Errors
    /// Fewer than two rows, more coordinates than there are, or none that varies.
    pub fn learn(features: &Features, dims: usize) -> Result<Self, EvaluationError> {
        let most = features.dim().min(features.rows() - 1);
        if dims == 0 || dims > most {
            return Err(EvaluationError::Setting {
                task: "copies",
                key: "whiten_dims",
                value: format!("{dims} with {} images of {} dimensions", features.rows(), features.dim()),
                expected: "from 1 to the dimensions, and less than the number of images to learn from",
            });
        }
        let mut moments = Moments::new(features.dim());
        let unit = features.l2_normalized();
        unit.values().chunks(1024 * features.dim()).for_each(|part| moments.add(part));
        let mut components = moments.components(dims)?;
        components.keep(|share| share > LEAST_SHARE);
        if components.variances.is_empty() {
            let rows = features.rows();
            return Err(EvaluationError::Setting {
                task: "copies",
                key: "whiten",
                value: format!("{rows} images with the same descriptor"),
                expected: "images that differ",
            });
        }
        let scales = components.variances.iter().map(|variance| (1.0 / variance.sqrt()) as f32).collect();
        Ok(Self { components, scales })
    }

    /// Coordinates that are left.
    pub fn dims(&self) -> usize {
        self.scales.len()
    }

    /// The whitened descriptors.
    ///
    /// # Errors
    /// Descriptors of another width.
    pub fn apply(&self, features: &Features) -> Result<Features, EvaluationError> {
        let mut values = self.components.project(features.l2_normalized().values());
        for row in values.chunks_mut(self.dims()) {
            row.iter_mut().zip(&self.scales).for_each(|(value, scale)| *value *= scale);
        }
        Features::new(features.rows(), self.dims(), values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::gaussian;
    use burn::tensor::TensorData;

    #[test]
    fn the_generalised_mean_equals_a_loop() {
        let (batch, patches, dim) = (3, 5, 4);
        let values = gaussian(batch * patches, dim, 4);
        let data = TensorData::new(values.values().to_vec(), [batch, patches, dim]);
        let found = gem(Tensor::from_data(data, &Device::flex()));
        assert_eq!(found.dims(), [batch, dim]);
        let found = host(found.reshape([-1]));
        for b in 0..batch {
            for c in 0..dim {
                let sum: f64 = (0..patches).map(|p| f64::from(values.row(b * patches + p)[c]).max(1e-6).powi(4)).sum();
                let expected = (sum / patches as f64).powf(0.25);
                assert!((f64::from(found[b * dim + c]) - expected).abs() < 1e-5, "{b} {c}");
            }
        }
    }

    #[test]
    fn whitened_descriptors_are_uncorrelated_with_variance_one() {
        // Columns of unequal spread that depend on each other.
        let plain = gaussian(200, 5, 8);
        let values = (0..200).flat_map(|i| {
            let row = plain.row(i);
            [3.0 + row[0], 2.0 * row[0] + 0.1 * row[1], 0.5 * row[2], row[3] + row[2], 4.0 * row[4]]
        });
        let features = Features::new(200, 5, values.collect()).unwrap();
        let whitening = Whitening::learn(&features, 5).unwrap();
        let white = whitening.apply(&features).unwrap();
        assert_eq!((white.rows(), white.dim()), (200, 5));
        let column = |c: usize| (0..200).map(move |i| i * 5 + c);
        for a in 0..5 {
            let mean = column(a).map(|at| f64::from(white.values()[at])).sum::<f64>() / 200.0;
            assert!(mean.abs() < 1e-4, "{mean}");
            for b in 0..5 {
                let products = column(a).zip(column(b));
                let sum: f64 = products.map(|(i, j)| f64::from(white.values()[i]) * f64::from(white.values()[j])).sum();
                let expected = if a == b { 1.0 } else { 0.0 };
                assert!((sum / 200.0 - expected).abs() < 1e-3, "{a} {b} {sum}");
            }
        }
        assert_eq!(Whitening::learn(&features, 2).unwrap().apply(&plain).unwrap().dim(), 2);
    }

    #[test]
    fn what_cannot_be_learned_from_is_refused() {
        let features = gaussian(4, 6, 1);
        for dims in [0, 4, 7] {
            let message = Whitening::learn(&features, dims).unwrap_err().to_string();
            assert!(message.contains(&format!("`whiten_dims` is {dims} with 4 images of 6 dimensions")), "{message}");
        }
        let same = Features::new(3, 2, [1.0, 2.0].repeat(3)).unwrap();
        let message = Whitening::learn(&same, 1).unwrap_err().to_string();
        assert!(message.contains("3 images with the same descriptor"), "{message}");
    }
}
