//! The record of a golden run: every comparison, every failure, everything that is not compared yet and why.

use std::collections::BTreeMap;

#[derive(Clone, Debug)]
struct Case {
    file: String,
    name: String,
    deviation: f64,
    tolerance: f64,
    /// Deviation over tolerance.
    ratio: f64,
}

/// All comparisons of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    cases: Vec<Case>,
    failures: Vec<String>,
    pending: Vec<String>,
}

/// Comparisons of one file.
#[derive(Clone, Debug, PartialEq)]
pub struct FileSummary {
    /// How many comparisons.
    pub cases: usize,
    /// The largest deviation over tolerance.
    pub worst: f64,
    /// The deviation there.
    pub deviation: f64,
    /// The tolerance there.
    pub tolerance: f64,
    /// Where that was.
    pub worst_case: String,
}

impl Report {
    /// Records that a result deviates from the reference by `deviation` where `tolerance` is allowed; more is a failure.
    pub fn case(&mut self, file: &str, name: &str, deviation: f64, tolerance: f64) {
        // A deviation that is not a number is no agreement.
        let ratio = if deviation <= 0.0 { 0.0 } else { deviation / tolerance };
        if ratio.is_nan() || ratio > 1.0 {
            self.failures.push(format!("{file}: {name}: off by {deviation:.3e}, allowed are {tolerance:.3e}"));
        }
        let ratio = if ratio.is_nan() { f64::INFINITY } else { ratio };
        self.cases.push(Case { file: file.to_owned(), name: name.to_owned(), deviation, tolerance, ratio });
    }

    /// Records something that is wrong beside the values: a shape, a missing tensor, a panic.
    pub fn failure(&mut self, file: &str, message: &str) {
        self.failures.push(format!("{file}: {message}"));
    }

    /// Records that a file, or a part of it, is not compared, and why.
    pub fn pending(&mut self, file: &str, reason: &str) {
        self.pending.push(format!("{file}: {reason}"));
    }

    /// How many comparisons there were.
    pub fn cases(&self) -> usize {
        self.cases.len()
    }

    /// All failures, in the order in which they came.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// Everything that is not compared, with its reason.
    pub fn pending_entries(&self) -> &[String] {
        &self.pending
    }

    /// The comparisons of each file that has any.
    pub fn files(&self) -> BTreeMap<&str, FileSummary> {
        let mut files: BTreeMap<&str, FileSummary> = BTreeMap::new();
        for case in &self.cases {
            let file = files.entry(&case.file).or_insert_with(|| FileSummary {
                cases: 0,
                worst: f64::NEG_INFINITY,
                deviation: case.deviation,
                tolerance: case.tolerance,
                worst_case: String::new(),
            });
            file.cases += 1;
            if case.ratio > file.worst {
                let Case { deviation, tolerance, ratio, name, .. } = case.clone();
                *file = FileSummary { cases: file.cases, worst: ratio, deviation, tolerance, worst_case: name };
            }
        }
        files
    }

    /// `golden: F files, C cases, P pending, worst R (file: case)`, where F counts files with comparisons and R is the
    /// largest deviation over its tolerance.
    pub fn closing_line(&self) -> String {
        let files = self.files();
        let worst = files.iter().max_by(|a, b| a.1.worst.total_cmp(&b.1.worst));
        let worst = match worst {
            Some((file, summary)) => format!("{:.3} ({file}: {})", summary.worst, summary.worst_case),
            None => "none".to_owned(),
        };
        format!(
            "golden: {} files, {} cases, {} pending, worst {worst}",
            files.len(),
            self.cases.len(),
            self.pending.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_names_the_worst_case() {
        let mut report = Report::default();
        report.case("a", "small", 1e-6, 1e-4);
        report.case("b", "exact", 0.0, 0.0);
        report.case("b", "large", 0.25, 2.0);
        report.pending("c", "not built yet");
        assert_eq!(report.closing_line(), "golden: 2 files, 3 cases, 1 pending, worst 0.125 (b: large)");
        assert!(report.failures().is_empty());
        assert_eq!(report.files()["b"].cases, 2);
    }

    #[test]
    fn too_large_inexact_and_undefined_deviations_all_fail() {
        let mut report = Report::default();
        report.case("a", "large", 2.0, 1.0);
        report.case("a", "not exact", 1e-9, 0.0);
        report.case("a", "undefined", f64::NAN, 1.0);
        assert_eq!(report.failures().len(), 3);
        assert!(report.closing_line().contains("worst inf"));
    }
}
