//! `dinoxide eval suite`: several evaluations of one backbone from a file, in one table.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde_json::{Value, json};

use super::common::{Frozen, Network, Outcome, Task};
use super::{check_writable, clustering, knn, linear, logistic, retrieval, write};
use crate::{Usage, terminal};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The evaluations, in TOML: a table `[[task]]` for each, with its name as `task` and its flags as keys
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    #[command(flatten)]
    network: Network,
    /// Also write all results here as JSON, to be compared with those of another backbone
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Also write the table here as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Print one JSON object on stdout and nothing else there
    #[arg(long)]
    json: bool,
}

/// A line of arguments like that of `dinoxide eval`, which a table of the file stands for.
#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_help_subcommand = true)]
struct Line {
    #[command(subcommand)]
    task: Evaluation,
}

#[derive(Subcommand)]
enum Evaluation {
    Knn(knn::Task),
    Linear(linear::Task),
    Logistic(logistic::Task),
    Retrieval(retrieval::Task),
    Clustering(clustering::Task),
}

impl Evaluation {
    fn blocks(&self) -> usize {
        match self {
            Self::Knn(_) => knn::Task::BLOCKS,
            Self::Linear(_) => linear::Task::BLOCKS,
            Self::Logistic(_) => logistic::Task::BLOCKS,
            Self::Retrieval(_) => retrieval::Task::BLOCKS,
            Self::Clustering(_) => clustering::Task::BLOCKS,
        }
    }

    fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        match self {
            Self::Knn(task) => task.run(frozen),
            Self::Linear(task) => task.run(frozen),
            Self::Logistic(task) => task.run(frozen),
            Self::Retrieval(task) => task.run(frozen),
            Self::Clustering(task) => task.run(frozen),
        }
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let usage = |e: &dyn std::fmt::Display| Usage(anyhow::anyhow!("{}: {e}", args.config.display()));
    let text = std::fs::read_to_string(&args.config).map_err(|e| usage(&e))?;
    let tasks = parse(&text).map_err(|e| usage(&e))?;
    for path in [&args.output, &args.markdown].into_iter().flatten() {
        check_writable(path)?;
    }
    let blocks = tasks.iter().map(Evaluation::blocks).max().expect("at least one task");
    let mut frozen = Frozen::new(&args.network, blocks)?;
    let mut outcomes = Vec::with_capacity(tasks.len());
    for (number, task) in (1..).zip(&tasks) {
        let outcome = task.run(&mut frozen)?;
        terminal::plain(&format!("{number}/{}  {}: {}", tasks.len(), outcome.task, outcome.data));
        outcomes.push(outcome);
    }
    let results: Vec<Value> = outcomes.iter().map(|outcome| frozen.result(outcome)).collect();
    let all = json!({ "task": "suite", "weights": results[0]["weights"], "results": results });
    let pretty = serde_json::to_string_pretty(&all)?;
    let markdown = table(&args.network.weights, &outcomes);
    for (path, contents) in [(&args.output, &pretty), (&args.markdown, &markdown)] {
        if let Some(path) = path {
            write(path, contents)?;
        }
    }
    terminal::data(if args.json { &pretty } else { markdown.trim_end() });
    Ok(ExitCode::SUCCESS)
}

/// The tasks of a file.
fn parse(text: &str) -> Result<Vec<Evaluation>, String> {
    let file: toml::Table = text.parse().map_err(|e: toml::de::Error| e.to_string().trim_end().to_owned())?;
    if let Some(key) = file.keys().find(|key| *key != "task") {
        return Err(format!("unknown key `{key}`\n\nhint: the file is a list of tables `[[task]]`"));
    }
    let tables = match file.get("task") {
        Some(toml::Value::Array(tables)) if !tables.is_empty() => tables,
        _ => {
            return Err(
                "no task\n\nhint: write a table `[[task]]` for each, with `task = \"knn\"` and its flags".into()
            );
        }
    };
    let parse_one = |(number, table): (usize, &toml::Value)| {
        let table = table.as_table().ok_or_else(|| format!("task {number} is not a table"))?;
        let words = words(table).map_err(|e| format!("task {number}: {e}"))?;
        let line = Line::try_parse_from(words).map_err(|e| {
            let message = e.to_string();
            let first = message.split("\n\nUsage").next().unwrap_or(&message).trim_start_matches("error: ");
            format!("task {number}: {}", first.trim_end())
        })?;
        Ok(line.task)
    };
    (1..).zip(tables).map(parse_one).collect()
}

/// The arguments that a table stands for: `task` first, then a flag for each key.
fn words(table: &toml::Table) -> Result<Vec<String>, String> {
    let task = table.get("task").and_then(toml::Value::as_str).ok_or("`task` must name the evaluation")?;
    let mut words = vec![task.to_owned()];
    for (key, value) in table.iter().filter(|(key, _)| *key != "task") {
        let flag = format!("--{}", key.replace('_', "-"));
        let values = match value {
            toml::Value::Boolean(true) => {
                words.push(flag);
                continue;
            }
            toml::Value::Boolean(false) => continue,
            toml::Value::Array(values) => values.as_slice(),
            one => std::slice::from_ref(one),
        };
        for value in values {
            let text = match value {
                toml::Value::String(text) => text.clone(),
                toml::Value::Integer(_) | toml::Value::Float(_) => value.to_string(),
                other => return Err(format!("`{key}` holds a {}, which no flag takes", other.type_str())),
            };
            words.push(format!("{flag}={text}"));
        }
    }
    Ok(words)
}

/// All figures as a Markdown table.
fn table(weights: &Path, outcomes: &[Outcome]) -> String {
    let mut text = format!(
        "`{}`\n\n| task | metric | score | 95 % interval | images |\n|---|---|---|---|---|\n",
        weights.display()
    );
    for outcome in outcomes {
        for (i, metric) in outcome.metrics.iter().enumerate() {
            let (task, data) = if i == 0 { (outcome.task, outcome.data.as_str()) } else { ("", "") };
            let interval = metric.interval_shown();
            let row = format!("| {task} | {} | {} | {interval} | {data} |", metric.name, metric.shown());
            writeln!(text, "{row}").expect("a string takes all");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_stands_for_a_line_of_arguments() {
        let text = "[[task]]\ntask = \"knn\"\ntrain = \"a b\"\nval = \"v\"\nk = [3, 5]\ntemperature = 0.1\n\
                    [[task]]\ntask = \"linear\"\ntrain = \"t\"\nval = \"v\"\nselect_on_val = true\n";
        let tasks = parse(text).unwrap();
        assert!(matches!(tasks[..], [Evaluation::Knn(_), Evaluation::Linear(_)]));
        assert_eq!(tasks.iter().map(Evaluation::blocks).collect::<Vec<_>>(), [1, 4]);
        let file: toml::Table = text.parse().unwrap();
        let expected = ["knn", "--train=a b", "--val=v", "--k=3", "--k=5", "--temperature=0.1"];
        assert_eq!(words(file["task"][0].as_table().unwrap()).unwrap(), expected);
    }

    #[test]
    fn what_a_file_gets_wrong_is_named_with_its_place() {
        for (text, message) in [
            ("", "no task"),
            ("tasks = 3", "unknown key `tasks`"),
            ("[[task]]\ntrain = \"t\"", "task 1: `task` must name the evaluation"),
            ("[[task]]\ntask = \"kn\"", "task 1: unrecognized subcommand 'kn'"),
            ("[[task]]\ntask = \"knn\"\ntrain = \"t\"", "task 1: the following required arguments were not provided"),
            (
                "[[task]]\ntask = \"knn\"\ntrain = \"t\"\nval = \"v\"\nkk = 3",
                "task 1: unexpected argument '--kk' found",
            ),
            (
                "[[task]]\ntask = \"knn\"\ntrain = \"t\"\nval = \"v\"\nk = \"x\"",
                "task 1: invalid value 'x' for '--k <K>'",
            ),
            ("[[task]]\ntask = \"knn\"\nval = { a = 1 }", "task 1: `val` holds a table"),
            ("[[task]\n", "TOML parse error"),
        ] {
            let error = parse(text).err().unwrap();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
