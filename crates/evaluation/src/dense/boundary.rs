//! How well a mask fits: region similarity J and boundary accuracy F (Perazzi et al. 2016, DAVIS, §4).

/// Share of the image diagonal by which a boundary may be off, rounded up to whole pixels.
const TOLERANCE: f64 = 0.008;

/// A set of pixels.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    /// Row by row, `rows · columns` of them.
    pub pixels: &'a [bool],
    /// Columns.
    pub width: usize,
}

impl Mask<'_> {
    fn height(&self) -> usize {
        self.pixels.len() / self.width
    }
}

/// J: intersection over union, 1 where both masks are empty.
///
/// # Panics
/// If the masks are of different sizes.
pub fn region_similarity(predicted: Mask<'_>, truth: Mask<'_>) -> f64 {
    assert_eq!(predicted.pixels.len(), truth.pixels.len(), "masks of different sizes");
    let pairs = || predicted.pixels.iter().zip(truth.pixels);
    let union = pairs().filter(|(p, t)| **p || **t).count();
    let both = pairs().filter(|(p, t)| **p && **t).count();
    if union == 0 { 1.0 } else { both as f64 / union as f64 }
}

/// F: harmonic mean of the shares of the predicted boundary that is near the true one and of the true one that is near the
/// predicted one; near is within 0.8 % of the image diagonal. 1 where neither mask has a boundary, 0 where one has none.
///
/// # Panics
/// If the masks are of different sizes.
pub fn boundary_accuracy(predicted: Mask<'_>, truth: Mask<'_>) -> f64 {
    assert_eq!((predicted.pixels.len(), predicted.width), (truth.pixels.len(), truth.width), "different sizes");
    let (width, height) = (truth.width, truth.height());
    let radius = (TOLERANCE * ((width * width + height * height) as f64).sqrt()).ceil() as isize;
    let (predicted, truth) = (boundary(predicted), boundary(truth));
    let count = |boundary: &[bool]| boundary.iter().filter(|on| **on).count();
    let near = |boundary: &[bool], other: &[bool]| {
        let thick = dilated(other, width, radius);
        boundary.iter().zip(&thick).filter(|(on, thick)| **on && **thick).count() as f64
    };
    let (precision, recall) = match (count(&predicted), count(&truth)) {
        (0, 0) => (1.0, 1.0),
        (0, _) => (1.0, 0.0),
        (_, 0) => (0.0, 1.0),
        (p, t) => (near(&predicted, &truth) / p as f64, near(&truth, &predicted) / t as f64),
    };
    if precision + recall == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) }
}

/// Pixels that differ from the one to the right, below, or to the lower right; at the right and lower borders, from the one
/// that is there.
fn boundary(mask: Mask<'_>) -> Vec<bool> {
    let (width, height) = (mask.width, mask.height());
    let at = |x: usize, y: usize| mask.pixels[y.min(height - 1) * width + x.min(width - 1)];
    (0..height)
        .flat_map(|y| (0..width).map(move |x| (x, y)))
        .map(|(x, y)| [(1, 0), (0, 1), (1, 1)].into_iter().any(|(dx, dy)| at(x, y) != at(x + dx, y + dy)))
        .collect()
}

/// Pixels within `radius` of one that is on.
fn dilated(mask: &[bool], width: usize, radius: isize) -> Vec<bool> {
    let height = mask.len() / width;
    let disk: Vec<(isize, isize)> = (-radius..=radius)
        .flat_map(|dy| (-radius..=radius).map(move |dx| (dx, dy)))
        .filter(|(dx, dy)| dx * dx + dy * dy <= radius * radius)
        .collect();
    let mut out = vec![false; mask.len()];
    for (i, _) in mask.iter().enumerate().filter(|(_, on)| **on) {
        for (dx, dy) in &disk {
            let (x, y) = ((i % width) as isize + dx, (i / width) as isize + dy);
            if (0..width as isize).contains(&x) && (0..height as isize).contains(&y) {
                out[y as usize * width + x as usize] = true;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ellipse on 90 × 60 pixels.
    fn ellipse(x: f64, y: f64, a: f64, b: f64) -> Vec<bool> {
        (0..60 * 90)
            .map(|i| {
                let (dx, dy) = ((i % 90) as f64 - x, (i / 90) as f64 - y);
                (dx / a).powi(2) + (dy / b).powi(2) <= 1.0
            })
            .collect()
    }

    fn both(predicted: &[bool], truth: &[bool]) -> (f64, f64) {
        let mask = |pixels| Mask { pixels, width: 90 };
        (region_similarity(mask(predicted), mask(truth)), boundary_accuracy(mask(predicted), mask(truth)))
    }

    #[test]
    fn equals_values_computed_with_scikit_image() {
        // J and F by NumPy and skimage.morphology (binary_dilation with disk(1)), of ellipses (x, y, a, b).
        let cases = [
            ([40.0, 30.0, 20.0, 11.0], [41.0, 31.0, 19.0, 12.0], 0.8711409395973154, 0.7109375),
            ([40.0, 30.0, 20.0, 11.0], [46.0, 28.0, 22.0, 9.0], 0.6204744069912609, 0.29666940789473684),
            ([80.0, 52.0, 16.0, 14.0], [82.0, 50.0, 15.0, 14.0], 0.8388349514563107, 0.33027522935779813),
            ([10.0, 10.0, 8.0, 8.0], [60.0, 40.0, 8.0, 8.0], 0.0, 0.0),
            ([3.0, 30.0, 12.0, 25.0], [2.0, 31.0, 12.0, 26.0], 0.916030534351145, 0.9285714285714286),
        ];
        for (p, t, j, f) in cases {
            let (found_j, found_f) = both(&ellipse(p[0], p[1], p[2], p[3]), &ellipse(t[0], t[1], t[2], t[3]));
            assert!((found_j - j).abs() < 1e-9, "{p:?} {t:?}: J {found_j}, expected {j}");
            assert!((found_f - f).abs() < 1e-9, "{p:?} {t:?}: F {found_f}, expected {f}");
        }
        assert_eq!(cases.len(), 5);
    }

    #[test]
    fn empty_masks_are_right_where_there_is_nothing() {
        let (none, some) = (vec![false; 5400], ellipse(40.0, 30.0, 9.0, 7.0));
        assert_eq!(both(&none, &none), (1.0, 1.0));
        assert_eq!(both(&none, &some), (0.0, 0.0));
        assert_eq!(both(&some, &none), (0.0, 0.0));
        assert_eq!(both(&some, &some), (1.0, 1.0));
    }
}
