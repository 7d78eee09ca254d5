//! The file of a suite: which evaluations, with which flags.

use clap::{Parser, Subcommand};

use crate::eval::dense::DenseTask;
use crate::eval::frozen::Frozen;
use crate::eval::measurement::Task;
use crate::eval::outcome::Outcome;
use crate::eval::{
    clustering, copies, correspondence, depth, finetune, foreground, knn, linear, logistic, retrieval, segmentation,
    video,
};

/// A line of arguments like that of `dinoxide eval`, which a table of the file stands for.
#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true, disable_help_subcommand = true)]
struct Line {
    #[command(subcommand)]
    task: Evaluation,
}

#[derive(Subcommand)]
pub(super) enum Evaluation {
    Knn(knn::Task),
    Linear(linear::Task),
    Finetune(finetune::Task),
    Logistic(logistic::Task),
    Retrieval(retrieval::Task),
    Clustering(clustering::Task),
    Copies(copies::Task),
    Segmentation(segmentation::Task),
    Depth(depth::Task),
    Video(video::Task),
    Foreground(foreground::Task),
    Correspondence(correspondence::Task),
}

impl Evaluation {
    /// What the file calls it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Knn(_) => "knn",
            Self::Linear(_) => "linear",
            Self::Finetune(_) => "finetune",
            Self::Logistic(_) => "logistic",
            Self::Retrieval(_) => "retrieval",
            Self::Clustering(_) => "clustering",
            Self::Copies(_) => "copies",
            Self::Segmentation(_) => "segmentation",
            Self::Depth(_) => "depth",
            Self::Video(_) => "video",
            Self::Foreground(_) => "foreground",
            Self::Correspondence(_) => "correspondence",
        }
    }

    /// Last blocks whose CLS tokens it needs; none where images are seen at a task's own size.
    pub(super) fn blocks(&self) -> Option<usize> {
        match self {
            Self::Knn(_) => Some(knn::Task::BLOCKS),
            Self::Linear(_) => Some(linear::Task::BLOCKS),
            Self::Finetune(_) => Some(finetune::Task::BLOCKS),
            Self::Logistic(_) => Some(logistic::Task::BLOCKS),
            Self::Retrieval(_) => Some(retrieval::Task::BLOCKS),
            Self::Clustering(_) => Some(clustering::Task::BLOCKS),
            Self::Copies(_) => Some(copies::Task::BLOCKS),
            Self::Segmentation(_) | Self::Depth(_) | Self::Video(_) | Self::Foreground(_) | Self::Correspondence(_) => {
                None
            }
        }
    }

    pub(super) fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        match self {
            Self::Knn(task) => task.run(frozen),
            Self::Linear(task) => task.run(frozen),
            Self::Finetune(task) => task.run(frozen),
            Self::Logistic(task) => task.run(frozen),
            Self::Retrieval(task) => task.run(frozen),
            Self::Clustering(task) => task.run(frozen),
            Self::Copies(task) => task.run(frozen),
            Self::Segmentation(task) => task.run(&frozen.given),
            Self::Depth(task) => task.run(&frozen.given),
            Self::Video(task) => task.run(&frozen.given),
            Self::Foreground(task) => task.run(&frozen.given),
            Self::Correspondence(task) => task.run(&frozen.given),
        }
    }
}

/// The tasks of a file.
pub(super) fn parse(text: &str) -> Result<Vec<Evaluation>, String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_stands_for_a_line_of_arguments() {
        let text = "[[task]]\ntask = \"knn\"\ntrain = \"a b\"\nval = \"v\"\nk = [3, 5]\ntemperature = 0.1\n\
                    [[task]]\ntask = \"linear\"\ntrain = \"t\"\nval = \"v\"\nselect_on_val = true\n";
        let tasks = parse(text).unwrap();
        assert!(matches!(tasks[..], [Evaluation::Knn(_), Evaluation::Linear(_)]));
        assert_eq!(tasks.iter().map(Evaluation::blocks).collect::<Vec<_>>(), [Some(1), Some(4)]);
        let file: toml::Table = text.parse().unwrap();
        let expected = ["knn", "--train=a b", "--val=v", "--k=3", "--k=5", "--temperature=0.1"];
        assert_eq!(words(file["task"][0].as_table().unwrap()).unwrap(), expected);
    }

    #[test]
    fn every_evaluation_is_called_by_its_name() {
        let of_classes = "train = \"t\"\nval = \"v\"\n";
        let of_data = "data = \"d\"\n";
        let all = [
            ("knn", of_classes),
            ("linear", of_classes),
            ("logistic", of_classes),
            ("retrieval", of_data),
            ("clustering", of_data),
            ("copies", "originals = \"o\"\n"),
            ("segmentation", of_classes),
            ("depth", of_classes),
            ("video", of_data),
            ("foreground", of_classes),
            ("correspondence", of_data),
        ];
        let text: String = all.iter().map(|(name, keys)| format!("[[task]]\ntask = \"{name}\"\n{keys}")).collect();
        let tasks = parse(&text).unwrap();
        assert_eq!(tasks.iter().map(Evaluation::name).collect::<Vec<_>>(), all.map(|(name, _)| name));
        assert_eq!(tasks.iter().filter(|task| task.blocks().is_none()).count(), 5);
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
                "task 1: invalid value 'x' for '--k <K,K,…>'",
            ),
            ("[[task]]\ntask = \"knn\"\nval = { a = 1 }", "task 1: `val` holds a table"),
            ("[[task]\n", "TOML parse error"),
        ] {
            let error = parse(text).err().unwrap();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
