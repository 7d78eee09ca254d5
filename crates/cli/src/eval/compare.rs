//! `dinoxide eval compare`: two results side by side, if they were measured alike.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dinoxide_evaluation::Interval;
use serde_json::{Value, json};

use super::outcome::{between, show};
use crate::table::table;
use crate::{Usage, terminal};

/// Fields of a protocol that may differ: the backbone is what is compared. Of layers their number counts, since the same
/// last blocks have other numbers in a backbone of another depth.
const COMPARED: &str = "backbone";
const LAYERS: &str = "layers";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A result, or the results of a suite, written with `--output`
    first: PathBuf,
    /// Another one of the same evaluation
    second: PathBuf,
    /// Fields of the protocol that may differ all the same, as the error names them
    #[arg(long, value_name = "FIELD,FIELD,…", value_delimiter = ',')]
    allow: Vec<String>,
    /// Print one JSON object on stdout and nothing else there
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (first, second) = (results(&args.first)?, results(&args.second)?);
    let tasks = |results: &[Value]| results.iter().map(|result| text(&result["task"])).collect::<Vec<_>>().join(", ");
    if tasks(&first) != tasks(&second) {
        return Err(Usage(anyhow::anyhow!(
            "{} holds {}, {} holds {}: not the same evaluation",
            args.first.display(),
            tasks(&first),
            args.second.display(),
            tasks(&second)
        ))
        .into());
    }
    check_allowed(&args.allow, first.iter().chain(&second))?;
    let pairs = first.iter().zip(&second);
    let unlike: Vec<String> =
        pairs.flat_map(|(a, b)| unlike(&text(&a["task"]), &a["protocol"], &b["protocol"], &args.allow)).collect();
    if !unlike.is_empty() {
        return Err(Usage(anyhow::anyhow!(
            "{} and {} were not measured alike\n{}\n\nhint: measure both under one protocol; `--allow FIELD` compares all the same",
            args.first.display(),
            args.second.display(),
            unlike.join("\n")
        ))
        .into());
    }
    let rows = first.iter().zip(&second).map(|(a, b)| metrics(a, b)).collect::<anyhow::Result<Vec<_>>>()?.concat();
    if rows.is_empty() {
        return Err(Usage(anyhow::anyhow!(
            "{} and {} have no metric in common: {}, and {}",
            args.first.display(),
            args.second.display(),
            metric_names(&first),
            metric_names(&second)
        ))
        .into());
    }
    if args.json {
        let rows: Vec<Value> = rows.iter().map(Row::json).collect();
        let result =
            json!({ "task": "compare", "first": first[0]["weights"], "second": second[0]["weights"], "metrics": rows });
        terminal::data(&serde_json::to_string_pretty(&result)?);
    } else {
        let cells: Vec<Vec<String>> = rows.iter().map(Row::cells).collect();
        let header = ["metric", "A", "95 % interval", "B", "95 % interval", "B − A"];
        let (a, b) = (text(&first[0]["weights"]), text(&second[0]["weights"]));
        terminal::data(&format!("A: {a}\nB: {b}\n{}", table(&header, &cells)));
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses fields that no protocol has: one that is misspelled would allow nothing.
fn check_allowed<'a>(allowed: &[String], results: impl Iterator<Item = &'a Value>) -> anyhow::Result<()> {
    let mut known = Vec::new();
    results.for_each(|result| fields("", &result["protocol"], &mut known));
    known.sort_unstable();
    known.dedup();
    match allowed.iter().find(|field| !known.contains(field)) {
        Some(field) => Err(Usage(anyhow::anyhow!(
            "`--allow {field}`: neither protocol has a field of this name\n\nhint: the fields are {}",
            known.join(", ")
        ))
        .into()),
        None => Ok(()),
    }
}

/// The names of the metrics of several results.
fn metric_names(results: &[Value]) -> String {
    let metrics = results.iter().filter_map(|result| result["metrics"].as_array()).flatten();
    metrics.map(|metric| format!("`{}`", text(&metric["name"]))).collect::<Vec<_>>().join(", ")
}

/// The fields in which two protocols of a task differ, but for those that may, with both values.
pub(super) fn unlike(task: &str, a: &Value, b: &Value, allowed: &[String]) -> Vec<String> {
    let mut differences = Vec::new();
    differ("", a, b, &mut differences);
    differences.retain(|one| !allowed.contains(&one.field));
    differences.into_iter().map(|one| format!("{task}: {} is {}, and {}", one.field, one.a, one.b)).collect()
}

/// The results in a file: one, or those of a suite.
fn results(path: &Path) -> anyhow::Result<Vec<Value>> {
    let usage = |e: &dyn std::fmt::Display| Usage(anyhow::anyhow!("{}: {e}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| usage(&e))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| usage(&e))?;
    if value["backbones"].is_array() {
        let message = "holds several backbones, which its table already shows side by side\n\nhint: give the results of one backbone, from a suite with one `--weights`";
        return Err(usage(&message).into());
    }
    let results = match value["results"].as_array() {
        Some(results) => results.clone(),
        None => vec![value],
    };
    if results.is_empty() || !results.iter().all(is_whole) {
        return Err(usage(&"is not a result of `dinoxide eval`, which has `task`, `protocol` and `metrics`").into());
    }
    Ok(results)
}

/// Whether a value has the fields of one result.
fn is_whole(one: &Value) -> bool {
    one["task"].is_string() && one["protocol"].is_object() && one["metrics"].is_array()
}

/// Whether a value is what `--output` writes: a result, or those of a suite.
pub(super) fn is_written(value: &Value) -> bool {
    let is_suite = value["task"] == "suite" && (value["results"].is_array() || value["backbones"].is_array());
    is_suite || is_whole(value)
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// A field of two protocols, with both values.
#[derive(Debug, PartialEq)]
struct Difference {
    field: String,
    a: String,
    b: String,
}

/// The name of a field within another.
fn within(field: &str, name: &str) -> String {
    if field.is_empty() { name.to_owned() } else { format!("{field}.{name}") }
}

/// Collects the names of the fields of a protocol, as differences name them.
fn fields(field: &str, value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(inner) => {
            for (name, value) in inner {
                let name = within(field, name);
                fields(&name, value, found);
                found.push(name);
            }
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| fields(&format!("{field}[{i}]"), item, found));
        }
        _ => {}
    }
}

/// Collects the fields in which two protocols differ.
fn differ(field: &str, a: &Value, b: &Value, found: &mut Vec<Difference>) {
    let missing = Value::Null;
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let names = x.keys().chain(y.keys().filter(|name| !x.contains_key(*name)));
            for name in names.filter(|name| *name != COMPARED) {
                let (a, b) = (x.get(name).unwrap_or(&missing), y.get(name).unwrap_or(&missing));
                let alike = name == LAYERS && a.as_array().map(Vec::len) == b.as_array().map(Vec::len);
                if !alike {
                    differ(&within(field, name), a, b, found);
                }
            }
        }
        (Value::Array(x), Value::Array(y)) if x.len() == y.len() && x.iter().any(Value::is_object) => {
            x.iter().zip(y).enumerate().for_each(|(i, (a, b))| differ(&format!("{field}[{i}]"), a, b, found));
        }
        _ if a != b => found.push(Difference { field: field.to_owned(), a: a.to_string(), b: b.to_string() }),
        _ => {}
    }
}

/// A figure of both results.
#[derive(Clone)]
struct Row {
    name: String,
    unit: String,
    values: [f64; 2],
    intervals: [Option<Interval>; 2],
}

/// The figures that both results have.
fn metrics(a: &Value, b: &Value) -> anyhow::Result<Vec<Row>> {
    let task = text(&a["task"]);
    let empty = Vec::new();
    let list = |result: &Value| result["metrics"].as_array().unwrap_or(&empty).clone();
    let mut rows = Vec::new();
    for one in list(a) {
        let Some(other) = list(b).into_iter().find(|other| other["name"] == one["name"]) else { continue };
        let value = |metric: &Value| {
            metric["value"].as_f64().ok_or_else(|| anyhow::anyhow!("{task}: {} has no value", text(&metric["name"])))
        };
        let interval = |metric: &Value| serde_json::from_value(metric["interval"].clone()).ok();
        rows.push(Row {
            name: format!("{task}: {}", text(&one["name"])),
            unit: text(&one["unit"]),
            values: [value(&one)?, value(&other)?],
            intervals: [interval(&one), interval(&other)],
        });
    }
    Ok(rows)
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let [a, b] = self.values;
        let [x, y] = self.intervals.map(|one| one.map_or("-".into(), |one| between(one, &self.unit)));
        let difference = if self.unit == "%" { format!("{:+.2}", b - a) } else { format!("{:+.4}", b - a) };
        vec![self.name.clone(), show(a, &self.unit), x, show(b, &self.unit), y, difference]
    }

    fn json(&self) -> Value {
        let [a, b] = self.values;
        json!({ "name": self.name, "unit": self.unit, "first": a, "second": b, "difference": b - a })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_that_differs_is_named_and_backbone_and_layer_numbers_may() {
        let a = json!({
            "method": {"task": "knn", "k": [10, 20], "temperature": 0.07},
            "features": [{"backbone": "a", "layers": [11], "crop_px": 224, "tokens": ["cls"]}],
            "val_samples": 30
        });
        let mut b = a.clone();
        b["features"][0]["backbone"] = json!("b");
        b["features"][0]["layers"] = json!([3]);
        let found = |b: &Value| {
            let mut found = Vec::new();
            differ("", &a, b, &mut found);
            found.into_iter().map(|one| format!("{} {} {}", one.field, one.a, one.b)).collect::<Vec<_>>()
        };
        assert!(found(&b).is_empty());
        b["features"][0]["layers"] = json!([2, 3]);
        b["features"][0]["crop_px"] = json!(448);
        b["method"]["k"] = json!([20]);
        b["method"]["few_shot"] = json!({"draws": 5});
        assert_eq!(
            found(&b),
            [
                "method.k [10,20] [20]",
                "method.few_shot null {\"draws\":5}",
                "features[0].layers [11] [2,3]",
                "features[0].crop_px 224 448"
            ]
        );
    }
}
