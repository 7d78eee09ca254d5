//! Silhouettes, as distances.

/// The outline of an object, about two units across.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Disc,
    Ring,
    Triangle,
    Square,
    Star,
    Cross,
}

impl Shape {
    /// Distance to the outline at a point, negative inside. Exact near straight edges and arcs, which is what smoothing
    /// the edge needs; a bound elsewhere. Every shape is its own mirror image.
    pub(super) fn distance(self, x: f32, y: f32) -> f32 {
        match self {
            Self::Disc => (x * x + y * y).sqrt() - 0.93,
            Self::Ring => ((x * x + y * y).sqrt() - 0.71).abs() - 0.32,
            Self::Square => x.abs().max(y.abs()) - 0.84,
            Self::Cross => {
                let (long, short) = (x.abs().max(y.abs()), x.abs().min(y.abs()));
                (long - 1.05).max(short - 0.4)
            }
            // Three half-planes.
            Self::Triangle => (y - 0.65).max(0.866_025_4 * x.abs() - 0.5 * y - 0.65),
            // A pentagram is where at most one of the five half-planes of its pentagon is left.
            Self::Star => {
                const NORMALS: [(f32, f32); 5] = [
                    (0.0, 1.0),
                    (0.951_056_5, 0.309_017),
                    (0.587_785_25, -0.809_017),
                    (-0.587_785_25, -0.809_017),
                    (-0.951_056_5, 0.309_017),
                ];
                let (mut first, mut second) = (f32::MIN, f32::MIN);
                for (nx, ny) in NORMALS {
                    let along = nx * x + ny * y;
                    second = second.max(along.min(first));
                    first = first.max(along);
                }
                second - 0.4
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_mirror_symmetric_of_like_size_and_distinct() {
        let all = [Shape::Disc, Shape::Ring, Shape::Triangle, Shape::Square, Shape::Star, Shape::Cross];
        let grid = |shape: Shape, sign: f32| -> Vec<bool> {
            (0..160 * 160)
                .map(|i| ((i % 160) as f32 / 60.0 - 1.325, (i / 160) as f32 / 60.0 - 1.325))
                .map(|(x, y)| shape.distance(sign * x, y) < 0.0)
                .collect()
        };
        for (i, shape) in all.into_iter().enumerate() {
            let inside = grid(shape, 1.0);
            assert_eq!(inside, grid(shape, -1.0), "{shape:?}");
            let area = inside.iter().filter(|&&inside| inside).count() as f32 / 3600.0;
            assert!((1.7..3.0).contains(&area), "{shape:?} has area {area}");
            for other in &all[..i] {
                let differ = inside.iter().zip(grid(*other, 1.0)).filter(|(a, b)| **a != *b).count();
                assert!(differ > 1000, "{shape:?} and {other:?} differ in {differ} points");
            }
        }
    }
}
