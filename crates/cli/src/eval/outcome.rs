//! What comes of an evaluation, and where it goes.

use std::path::PathBuf;
use std::process::ExitCode;

use dinoxide_evaluation::{Interval, Report};
use serde::Serialize;
use serde_json::Value;

use super::{check_result, write};
use crate::table::table;
use crate::terminal;

/// One figure of a result.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Metric {
    /// What it is: `top-1, k = 20`.
    pub(crate) name: String,
    pub(crate) value: f64,
    /// `%`, `m`, or nothing.
    pub(crate) unit: &'static str,
    /// With 95 % confidence, from resampled val images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) interval: Option<Interval>,
}

impl Metric {
    /// A score in percent.
    pub(crate) fn percent(name: impl Into<String>, value: f64, interval: impl Into<Option<Interval>>) -> Self {
        Self { name: name.into(), value, unit: "%", interval: interval.into() }
    }

    /// A score from 0 to 1.
    pub(crate) fn plain(name: impl Into<String>, value: f64) -> Self {
        Self::of(name, value, "")
    }

    /// A score without an interval, in a unit.
    pub(crate) fn of(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value, unit, interval: None }
    }

    pub(crate) fn shown(&self) -> String {
        show(self.value, self.unit)
    }

    pub(crate) fn interval_shown(&self) -> String {
        self.interval.map_or("-".into(), |interval| between(interval, self.unit))
    }
}

/// A figure with its unit.
pub(crate) fn show(value: f64, unit: &str) -> String {
    match unit {
        "%" => format!("{value:.2} %"),
        "" => format!("{value:.4}"),
        unit => format!("{value:.4} {unit}"),
    }
}

/// The ends of an interval.
pub(crate) fn between(interval: Interval, unit: &str) -> String {
    if unit == "%" {
        format!("{:.1}–{:.1} %", interval.low, interval.high)
    } else {
        format!("{:.3}–{:.3}", interval.low, interval.high)
    }
}

/// What an evaluation found.
pub(crate) struct Outcome {
    pub(crate) task: &'static str,
    /// The images, in a few words: `9 val images, 24 train images`.
    pub(crate) data: String,
    pub(crate) protocol: Value,
    pub(crate) scores: Value,
    /// The figures to compare, most important first.
    pub(crate) metrics: Vec<Metric>,
    /// Further entries of the JSON result.
    pub(crate) more: Vec<(&'static str, Value)>,
    /// A sentence or table in place of the metrics' own table.
    pub(crate) shown: Option<String>,
}

impl Outcome {
    pub(crate) fn new(task: &'static str, data: String, report: &Report<impl Serialize>) -> anyhow::Result<Self> {
        Ok(Self {
            task,
            data,
            protocol: serde_json::to_value(&report.protocol)?,
            scores: serde_json::to_value(&report.scores)?,
            metrics: Vec::new(),
            more: Vec::new(),
            shown: None,
        })
    }

    /// For a terminal.
    pub(crate) fn text(&self) -> String {
        self.shown.clone().unwrap_or_else(|| {
            let rows: Vec<Vec<String>> =
                self.metrics.iter().map(|m| vec![m.name.clone(), m.shown(), m.interval_shown()]).collect();
            format!("{}: {}\n{}", self.task, self.data, table(&["metric", "value", "95 % interval"], &rows))
        })
    }
}

/// Where results go.
#[derive(clap::Args)]
pub(crate) struct Output {
    /// Also write the result here as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Print one JSON object on stdout and nothing else there
    #[arg(long)]
    pub(crate) json: bool,
}

impl Output {
    /// That the result can be written, before anything is measured.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.output.as_deref().map_or(Ok(()), check_result)
    }

    /// Prints a result as text or JSON, and writes it where asked.
    pub(crate) fn deliver(&self, result: &Value, text: &str) -> anyhow::Result<ExitCode> {
        let pretty = serde_json::to_string_pretty(result)?;
        if let Some(path) = &self.output {
            write(path, &pretty)?;
        }
        terminal::data(if self.json { &pretty } else { text });
        Ok(ExitCode::SUCCESS)
    }
}
