//! What a person sees. Everything but data goes to stderr.

#![allow(clippy::print_stderr, clippy::print_stdout, reason = "this module is where the program prints")]

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::LazyLock;

use indicatif::MultiProgress;

/// All bars that are on the screen at once: there is one screen.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Prints an error with its hint.
pub(crate) fn error(error: &anyhow::Error) {
    eprintln!("error: {error}");
}

/// Prints a line for a person who watches no progress bar.
pub(crate) fn plain(text: &str) {
    eprintln!("{text}");
}

/// Prints a line above all bars, from any thread. A screen that is gone must not end a run.
pub(crate) fn above(text: &str) {
    let mut screen = std::io::stderr();
    let _ = if screen.is_terminal() { BARS.println(text) } else { writeln!(screen, "{text}") };
}

/// Prints what was found out about a file, a line each.
pub(crate) fn notes(path: &Path, notes: &[String]) {
    notes.iter().for_each(|note| plain(&format!("note: {}: {note}", path.display())));
}

/// Prints data.
pub(crate) fn data(text: &str) {
    // A closed pipe is the reader's choice, not a failure.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Lines for a person, kept in the run's log as well.
pub(crate) struct Log {
    file: Option<File>,
    bar: indicatif::ProgressBar,
}

impl Log {
    /// A log that also writes to `path`, if given.
    pub(crate) fn new(path: Option<&Path>) -> anyhow::Result<Self> {
        let file = path.map(|path| {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
        });
        Ok(Self { file: file.transpose()?, bar: indicatif::ProgressBar::hidden() })
    }

    /// One line above the progress bar.
    pub(crate) fn line(&mut self, text: &str) {
        BARS.suspend(|| eprintln!("{text}"));
        self.keep(text);
    }

    /// One line that a progress bar already shows.
    pub(crate) fn keep(&mut self, text: &str) {
        if let Some(file) = &mut self.file {
            // A log that cannot be written must not end a run.
            let _ = writeln!(file, "{text}");
        }
    }

    /// Whether a person is watching: bars are drawn then, and plain lines otherwise.
    pub(crate) fn is_interactive(&self) -> bool {
        std::io::stderr().is_terminal()
    }

    /// Shows a bar of `length` from `position` on in the place of the last one.
    pub(crate) fn bar(&mut self, length: u64, position: u64, template: &str) {
        self.bar.finish_and_clear();
        if self.is_interactive() {
            let style = indicatif::ProgressStyle::with_template(template).expect("a template of ours");
            let bar = indicatif::ProgressBar::new(length).with_position(position);
            self.bar = BARS.add(bar.with_style(style.progress_chars("━╸ ")));
        }
    }

    /// Moves the bar.
    pub(crate) fn set(&self, position: u64, message: String) {
        self.bar.set_position(position);
        self.bar.set_message(message);
    }

    /// Removes the bar.
    pub(crate) fn clear(&mut self) {
        self.bar.finish_and_clear();
        self.bar = indicatif::ProgressBar::hidden();
    }
}
