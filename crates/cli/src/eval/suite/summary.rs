//! What a suite found, as one Markdown table and one JSON object.

use std::fmt::Write;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::rc::Rc;

use serde_json::{Value, json};

use crate::eval::given::Given;
use crate::eval::outcome::{Metric, Outcome};

/// What the head of a table begins with.
const HEAD: &str = "| task | metric |";

/// What was measured of a backbone: an outcome for each task.
pub(super) struct Column {
    pub(super) given: Rc<Given>,
    pub(super) outcomes: Vec<Result<Outcome, Failure>>,
}

/// An evaluation that came to nothing.
pub(super) struct Failure {
    /// The task's number and name.
    pub(super) place: String,
    pub(super) message: String,
    /// Whether what was asked for is at fault.
    pub(super) usage: bool,
}

impl Failure {
    pub(super) fn first_line(&self) -> &str {
        self.message.lines().next().unwrap_or_default()
    }
}

impl Column {
    /// The failures of the backbone `index` of `count`, a line each.
    pub(super) fn failures(&self, index: usize, count: usize) -> Vec<String> {
        let whose = if count > 1 { format!(", {}", letter(index)) } else { String::new() };
        let failures = self.outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
        failures.map(|failure| format!("{}{whose}: {}", failure.place, failure.first_line())).collect()
    }

    /// The results, of which `dinoxide eval compare` reads those that there are.
    pub(super) fn json(&self) -> Value {
        let results: Vec<Value> = self.outcomes.iter().flatten().map(|outcome| self.given.result(outcome)).collect();
        let mut all = json!({ "weights": self.given.weights, "results": results });
        let failed = self.outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
        let failed: Vec<Value> =
            failed.map(|failure| json!({ "task": failure.place, "error": failure.message })).collect();
        if !failed.is_empty() {
            all["failed"] = json!(failed);
        }
        all
    }
}

/// What a table calls the backbone `index`: A, B and so on.
pub(super) fn letter(index: usize) -> char {
    char::from(b'A' + index as u8)
}

/// All figures as a Markdown table: of one backbone with a column for the intervals, of several with a column for each.
pub(super) fn markdown(tasks: &[&str], columns: &[Column], notes: &[String]) -> String {
    let mut text = String::new();
    let mut line = |line: String| writeln!(text, "{line}").expect("a string takes all");
    let scores: Vec<String> = match columns {
        [one] => {
            line(format!("`{}`\n", one.given.weights));
            ["score", "95 % interval"].map(str::to_owned).to_vec()
        }
        several => {
            let letters: Vec<String> = (0..several.len()).map(|i| letter(i).to_string()).collect();
            for (letter, column) in letters.iter().zip(several) {
                line(format!("- {letter}: `{}`", column.given.weights));
            }
            line(String::new());
            letters
        }
    };
    line(format!("{HEAD} {} | images |", scores.join(" | ")));
    line(format!("|---|---|{}---|", "---|".repeat(scores.len())));
    for (number, task) in tasks.iter().enumerate() {
        let found: Vec<Option<&Outcome>> = columns.iter().map(|column| column.outcomes[number].as_ref().ok()).collect();
        let images = found.iter().flatten().next().map_or("-", |outcome| outcome.data.as_str());
        // A metric that one backbone has and another lacks, as a ConvNeXt the attention, still has its row.
        let mut names: Vec<&str> = Vec::new();
        for metric in found.iter().flatten().flat_map(|outcome| &outcome.metrics) {
            if !names.contains(&metric.name.as_str()) {
                names.push(&metric.name);
            }
        }
        if names.is_empty() {
            names.push("-");
        }
        for (row, name) in names.iter().enumerate() {
            let (task, images) = if row == 0 { (*task, images) } else { ("", "") };
            let cells: Vec<String> = match found[..] {
                [one] => one.map_or_else(
                    || ["failed", "-"].map(str::to_owned).to_vec(),
                    |outcome| vec![outcome.metrics[row].shown(), outcome.metrics[row].interval_shown()],
                ),
                _ => found.iter().map(|outcome| cell(*outcome, name)).collect(),
            };
            line(format!("| {task} | {name} | {} | {images} |", cells.join(" | ")));
        }
    }
    let failures = columns.iter().enumerate().flat_map(|(i, column)| column.failures(i, columns.len()));
    let remarks: Vec<String> = notes.iter().cloned().chain(failures).collect();
    if !remarks.is_empty() {
        line(String::new());
    }
    remarks.into_iter().for_each(|remark| line(format!("- {remark}")));
    text
}

/// Whether a file has such a table.
pub(super) fn is_table(file: File) -> bool {
    BufReader::new(file).lines().map_while(Result::ok).any(|line| line.starts_with(HEAD))
}

/// A score and its interval, beside those of other backbones.
fn cell(outcome: Option<&Outcome>, name: &str) -> String {
    let Some(outcome) = outcome else { return "failed".into() };
    let shown = |metric: &Metric| match metric.interval {
        Some(_) => format!("{} ({})", metric.shown(), metric.interval_shown()),
        None => metric.shown(),
    };
    outcome.metrics.iter().find(|metric| metric.name == name).map_or("-".into(), shown)
}
