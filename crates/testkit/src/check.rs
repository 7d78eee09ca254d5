//! Comparing results with a fixture.

use crate::{Array, Fixture, Report};

/// How far a result may be from the reference: `max|x − ref| ≤ atol + rtol_of_max · max|ref|`, both maxima over a tensor.
///
/// Relative to the largest element and not to each one: a small element that is a sum of large ones has their rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Allowed whatever the size of the tensor's elements.
    pub atol: f64,
    /// Allowed for each unit of the tensor's largest element.
    pub rtol_of_max: f64,
}

impl Tolerance {
    /// Nothing is allowed.
    pub const EXACT: Self = Self { atol: 0.0, rtol_of_max: 0.0 };

    /// What a fixture states for a group of its tensors; 2·10⁻⁵ of the largest element where it states nothing.
    pub fn stated(fixture: &Fixture, group: &str) -> Self {
        let stated = &fixture.json()["tolerance"]["groups"][group];
        Self {
            atol: stated["atol"].as_f64().unwrap_or(0.0),
            rtol_of_max: stated["rtol_of_max"].as_f64().unwrap_or(2e-5),
        }
    }
}

/// Results of one fixture on their way into the report.
#[derive(Debug)]
pub struct Check<'a> {
    /// What they are compared with.
    pub fixture: &'a Fixture,
    report: &'a mut Report,
}

impl<'a> Check<'a> {
    /// For one fixture.
    pub fn new(fixture: &'a Fixture, report: &'a mut Report) -> Self {
        Self { fixture, report }
    }

    /// Compares with the tensor `name`, under the tolerance of the group that the name begins with.
    pub fn tensor(&mut self, name: &str, found: &Array) {
        let group = name.split('.').next().expect("a first part");
        let expected = self.fixture.floats(name);
        self.values(name, &expected, found, Tolerance::stated(self.fixture, group));
    }

    /// Compares with the scalar `name`, under the tolerance of the group that the name begins with.
    pub fn scalar(&mut self, name: &str, found: f32) {
        self.tensor(name, &Array { shape: self.fixture.shape(name).to_vec(), values: vec![found] });
    }

    /// Compares two numbers in double precision under a given tolerance.
    pub fn number(&mut self, case: &str, expected: f64, found: f64, tolerance: Tolerance) {
        let allowed = tolerance.atol + tolerance.rtol_of_max * expected.abs();
        self.report.case(self.fixture.name(), case, (found - expected).abs(), allowed);
    }

    /// Compares two arrays under a given tolerance.
    pub fn values(&mut self, case: &str, expected: &Array, found: &Array, tolerance: Tolerance) {
        if expected.shape != found.shape || expected.values.len() != found.values.len() {
            let message = format!("{case}: the shape is {:?}, the reference's {:?}", found.shape, expected.shape);
            return self.report.failure(self.fixture.name(), &message);
        }
        let mut deviation = 0.0f64;
        let mut largest = 0.0f64;
        for (&found, &expected) in found.values.iter().zip(&expected.values) {
            let off = (f64::from(found) - f64::from(expected)).abs();
            // Not `max`, which would drop a value that is not a number.
            deviation = if off.is_nan() || off > deviation { off } else { deviation };
            if deviation.is_nan() {
                break;
            }
            largest = largest.max(f64::from(expected).abs());
        }
        self.report.case(self.fixture.name(), case, deviation, tolerance.atol + tolerance.rtol_of_max * largest);
    }

    /// Records something that is wrong beside the values.
    pub fn failure(&mut self, message: &str) {
        self.report.failure(self.fixture.name(), message);
    }

    /// Leaves out every tensor that `which` selects, for a reason that the report shows.
    ///
    /// # Panics
    /// If there is no such tensor: what is left out must exist.
    pub fn pending(&mut self, which: impl Fn(&str) -> bool, reason: &str) {
        let names: Vec<&str> = self.fixture.names("").filter(|name| which(name)).collect();
        assert!(!names.is_empty(), "{}: nothing to leave out: {reason}", self.fixture.name());
        names.iter().for_each(|name| self.fixture.leave_out(name));
        self.report.pending(self.fixture.name(), &format!("{} tensors: {reason}", names.len()));
    }

    /// Leaves out a part of the JSON file, for a reason that the report shows.
    pub fn pending_part(&mut self, what: &str, reason: &str) {
        self.report.pending(self.fixture.name(), &format!("{what}: {reason}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Golden;

    fn compared(expected: &[f32], found: &[f32], shape: &[usize]) -> Report {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(
            directory.path().join("x.json"),
            r#"{"tolerance":{"groups":{"g":{"atol":0.5,"rtol_of_max":0.1}}}}"#,
        )
        .expect("written");
        let fixture = Golden::at(directory.path()).fixture("x");
        let mut report = Report::default();
        let tolerance = Tolerance::stated(&fixture, "g");
        let array = |values: &[f32], shape: &[usize]| Array { shape: shape.to_vec(), values: values.to_vec() };
        let (expected, found) = (array(expected, &[expected.len()]), array(found, shape));
        Check::new(&fixture, &mut report).values("case", &expected, &found, tolerance);
        report
    }

    #[test]
    fn the_tolerance_counts_the_largest_element_of_the_reference() {
        // 0.5 + 0.1 · 10 = 1.5
        assert!(compared(&[-10.0, 1.0], &[-10.0, 2.4], &[2]).failures().is_empty());
        assert_eq!(compared(&[-10.0, 1.0], &[-10.0, 2.6], &[2]).failures().len(), 1);
    }

    #[test]
    fn values_that_are_not_numbers_and_other_shapes_fail() {
        assert_eq!(compared(&[1.0, 2.0], &[f32::NAN, 2.0], &[2]).failures().len(), 1);
        assert_eq!(compared(&[1.0, 2.0], &[1.0, f32::INFINITY], &[2]).failures().len(), 1);
        assert_eq!(compared(&[1.0, 2.0], &[1.0, 2.0], &[2, 1]).failures().len(), 1);
    }
}
