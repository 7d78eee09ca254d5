//! `metrics.jsonl`: one self-describing object per line, for scripts.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::loss::LossValues;
use crate::targets::TargetEntropy;

/// Values of the schedules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleLine {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Momentum of the teacher.
    pub teacher_momentum: f64,
    /// Temperature of the teacher.
    pub teacher_temp: f64,
}

/// k-NN accuracies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KnnLine {
    /// Percent.
    pub top1: f64,
    /// Percent; absent with fewer than five classes.
    pub top5: Option<f64>,
    /// Neighbours.
    pub k: usize,
    /// Percent that guessing gives.
    pub chance: f64,
}

/// One line. `step` is the number of steps taken, `images` the images seen, `seconds` the time spent training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Line {
    /// A step's losses.
    Step {
        /// Steps taken.
        step: u64,
        /// Images seen.
        images: u64,
        /// Passes over the data.
        epoch: f64,
        /// Seconds spent training, over all sessions.
        seconds: f64,
        /// Since the last such line.
        images_per_second: f64,
        /// Share of that time spent waiting for images.
        data_wait: f64,
        /// Losses of this step.
        losses: LossValues,
        /// Gradient norms before clipping.
        gradient_norms: std::collections::BTreeMap<String, f64>,
        /// Schedule values of this step.
        schedule: ScheduleLine,
        /// Resident memory of the process now, in bytes.
        memory_bytes: u64,
    },
    /// What the teacher's targets look like at a step, and what does not work.
    Health {
        /// Steps taken.
        step: u64,
        /// Images seen.
        images: u64,
        /// Entropy of the targets of CLS tokens, in nats; `null` without a DINO loss, and on a line that is there for
        /// `evaluation_error`.
        target_entropy: Option<TargetEntropy>,
        /// ln K, the ceiling of both.
        ln_prototypes: f64,
        /// Images that could not be read so far.
        bad_images: usize,
        /// Images that evaluations could not read so far.
        #[serde(default)]
        bad_eval_images: usize,
        /// Why the evaluation at this step failed.
        evaluation_error: Option<String>,
    },
    /// An evaluation of the teacher.
    Eval {
        /// Steps taken; 0 before training.
        step: u64,
        /// Images seen.
        images: u64,
        /// Seconds spent training, over all sessions.
        seconds: f64,
        /// k-NN on labelled images.
        knn: KnnLine,
        /// Effective rank of the features that were classified (RankMe).
        effective_rank: f64,
        /// Their width, its ceiling.
        embed_dim: usize,
    },
    /// The end of the run.
    End {
        /// Steps taken.
        step: u64,
        /// Images seen.
        images: u64,
        /// Seconds spent training, over all sessions.
        seconds: f64,
        /// Over the whole run.
        images_per_second: f64,
        /// Highest resident memory of the process, in bytes.
        peak_memory_bytes: u64,
    },
}

impl Line {
    /// Steps taken when the line was written.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step { step, .. } | Self::Health { step, .. } | Self::Eval { step, .. } | Self::End { step, .. } => {
                *step
            }
        }
    }
}

/// The file.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens the file for a run that stands at `step`: what a session wrote after that step, before it was killed, is
    /// removed, since it will be written again; with `evaluates_again`, so is the evaluation at that step.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn open(path: &Path, step: u64, evaluates_again: bool) -> Result<Self, TrainError> {
        let io = TrainError::io;
        let mut kept = Vec::new();
        if path.exists() {
            let reader = BufReader::new(File::open(path).map_err(io(path))?);
            for line in reader.lines() {
                let line = line.map_err(io(path))?;
                // A line that was cut short by the kill is no line.
                let known = serde_json::from_str::<Line>(&line);
                let is_kept = |known: &Line| match known {
                    Line::End { .. } => false,
                    Line::Eval { .. } | Line::Health { evaluation_error: Some(_), .. } if evaluates_again => {
                        known.step() < step
                    }
                    _ => known.step() <= step,
                };
                if known.as_ref().is_ok_and(is_kept) {
                    kept.extend_from_slice(line.as_bytes());
                    kept.push(b'\n');
                }
            }
        }
        dinoxide_model::weights::write_atomically(path, &kept).map_err(io(path))?;
        let file = OpenOptions::new().append(true).open(path).map_err(io(path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Whether a file's last line says that its run is at its end; a missing file has none.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn has_end(path: &Path) -> Result<bool, TrainError> {
        if !path.exists() {
            return Ok(false);
        }
        let text = std::fs::read_to_string(path).map_err(TrainError::io(path))?;
        let last = text.lines().last().map(serde_json::from_str::<Line>);
        Ok(matches!(last, Some(Ok(Line::End { .. }))))
    }

    /// Adds a line.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn write(&mut self, line: &Line) -> Result<(), TrainError> {
        let mut json = serde_json::to_vec(line).expect("a line is plain data");
        json.push(b'\n');
        self.file.write_all(&json).map_err(TrainError::io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_drops_what_it_will_write_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let line = |step| Line::End { step, images: step, seconds: 1.5, images_per_second: 2.5, peak_memory_bytes: 0 };
        let health = |step| Line::Health {
            step,
            images: step,
            target_entropy: Some(TargetEntropy { conditional: 1.0, marginal: 2.0 }),
            ln_prototypes: 3.0,
            bad_images: 0,
            bad_eval_images: 0,
            evaluation_error: None,
        };
        let mut file = MetricsFile::open(&path, 0, true).expect("a file");
        for step in [1, 2, 3] {
            file.write(&health(step)).expect("written");
        }
        file.write(&line(3)).expect("written");
        file.file.write_all(b"{\"kind\":\"hea").expect("written");
        drop(MetricsFile::open(&path, 2, false).expect("a file"));
        assert_eq!(steps(&path), [1, 2]);
    }

    #[test]
    fn an_evaluation_that_is_made_again_is_written_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let knn = KnnLine { top1: 1.5, top5: None, k: 5, chance: 8.0 };
        let line = |step| {
            let knn = knn.clone();
            Line::Eval { step, images: step, seconds: 1.5, knn, effective_rank: 2.5, embed_dim: 3 }
        };
        let failed = Line::Health {
            step: 8,
            images: 8,
            target_entropy: None,
            ln_prototypes: 3.0,
            bad_images: 0,
            bad_eval_images: 2,
            evaluation_error: Some("nothing to read".into()),
        };
        let mut file = MetricsFile::open(&path, 0, true).expect("a file");
        for line in [line(0), line(4), failed] {
            file.write(&line).expect("written");
        }
        drop(MetricsFile::open(&path, 8, false).expect("a file"));
        assert_eq!(steps(&path), [0, 4, 8]);
        drop(MetricsFile::open(&path, 8, true).expect("a file"));
        assert_eq!(steps(&path), [0, 4]);
        drop(MetricsFile::open(&path, 0, true).expect("a file"));
        assert!(steps(&path).is_empty());
    }

    fn steps(path: &Path) -> Vec<u64> {
        let text = std::fs::read_to_string(path).expect("text");
        text.lines().map(|l| serde_json::from_str::<Line>(l).expect("a line").step()).collect()
    }
}
