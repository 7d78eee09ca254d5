//! One evaluation of one backbone, from arguments to result.

use std::process::ExitCode;

use super::frozen::{Frozen, Network};
use super::outcome::{Outcome, Output};

/// One evaluation of one backbone.
#[derive(clap::Args)]
pub(crate) struct Measurement<T: clap::Args> {
    #[command(flatten)]
    network: Network,
    #[command(flatten)]
    task: T,
    #[command(flatten)]
    output: Output,
}

/// An evaluation: its data and settings.
pub(crate) trait Task {
    /// Last blocks whose CLS tokens it needs.
    const BLOCKS: usize;

    /// Measures, taking features from `frozen`.
    fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome>;
}

impl<T: clap::Args + Task> Measurement<T> {
    pub(super) fn run(&self) -> anyhow::Result<ExitCode> {
        self.output.check()?;
        let mut frozen = Frozen::new(&self.network, T::BLOCKS)?;
        let outcome = self.task.run(&mut frozen)?;
        self.output.deliver(&frozen.given.result(&outcome), &outcome.text())
    }
}
