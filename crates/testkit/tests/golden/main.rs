//! Golden tests of the numerical core: one table, a fixture per line.
//!
//! The committed fixtures are tiny; others of the same names and schema can be given in the directory that the environment
//! variable `DINOXIDE_GOLDEN` names. Shapes, depths, options and hyper-parameters all come from the files.

mod augmentation;
mod comparison;
mod convnext;
mod distributed;
mod droppath;
mod evaluation;
mod gram;
mod groups;
mod heads;
mod losses;
mod masking;
mod recipes;
mod rope;
mod schedules;
mod statistics;
mod tensors;
mod trajectory;
mod vit;

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
};

use dinoxide_testkit::{Check, Golden, Report};

/// What is done about a fixture.
enum Entry {
    /// It is compared, every tensor of it.
    Compared(fn(&mut Check)),
    /// Not yet, for this reason.
    Pending(&'static str),
}
use Entry::{Compared, Pending};

const GRAM: &str = "the training step has no Gram loss yet";

const TABLE: &[(&str, Entry)] = &[
    ("augment", Compared(augmentation::all)),
    ("convnext_v3", Compared(convnext::all)),
    ("droppath", Compared(droppath::all)),
    ("eval", Compared(evaluation::all)),
    ("heads", Compared(heads::all)),
    ("losses", Compared(losses::all)),
    ("losses_dist", Compared(distributed::all)),
    ("masking", Compared(masking::all)),
    ("param_groups", Compared(groups::all)),
    ("rope_v3", Compared(rope::tables)),
    ("schedules", Compared(schedules::all)),
    ("train_ibot", Compared(trajectory::arguments)),
    ("train_v1", Compared(trajectory::arguments)),
    ("train_v2_centering", Compared(trajectory::v2)),
    ("train_v2_sinkhorn", Compared(trajectory::v2)),
    ("train_v3_distill", Pending("the training step has no frozen teacher yet")),
    ("train_v3_gram", Pending(GRAM)),
    ("train_v3_highres", Pending(GRAM)),
    ("train_v3_plain", Compared(trajectory::v3)),
    ("vit_v2_a", Compared(vit::v2)),
    ("vit_v2_b", Compared(vit::v2)),
    ("vit_v2_c", Compared(vit::v2)),
    ("vit_v3_a", Compared(vit::v3)),
    ("vit_v3_b", Compared(vit::v3)),
    ("vit_v3_c", Compared(vit::v3)),
];

/// Comparisons that the committed fixtures give.
const COMMITTED_CASES: usize = 20077;

#[test]
#[allow(clippy::print_stdout, reason = "the table and the closing line are what a reader of the run looks for")]
fn golden() {
    let golden = Golden::open();
    let mut report = Report::default();

    let found = golden.names();
    let known: BTreeSet<String> = TABLE.iter().map(|(name, _)| (*name).to_owned()).collect();
    for name in found.symmetric_difference(&known) {
        report.failure(
            name,
            if known.contains(name) { "the fixture is missing" } else { "the fixture is not in the table" },
        );
    }
    for (name, entry) in TABLE.iter().filter(|(name, _)| found.contains(*name)) {
        match entry {
            Pending(reason) => report.pending(name, reason),
            Compared(compare) => one(&golden, name, *compare, &mut report),
        }
    }
    if golden.is_committed() && report.cases() != COMMITTED_CASES {
        report.failure("all", &format!("{} comparisons, not {COMMITTED_CASES}", report.cases()));
    }

    for (file, summary) in report.files() {
        println!("{file}: {} cases, worst {:.3} ({})", summary.cases, summary.worst, summary.worst_case);
    }
    for entry in report.pending_entries() {
        println!("pending: {entry}");
    }
    for failure in report.failures() {
        println!("FAILED: {failure}");
    }
    println!("{}", report.closing_line());
    assert!(
        report.failures().is_empty(),
        "{} golden failures:\n{}",
        report.failures().len(),
        report.failures().join("\n")
    );
}

/// Compares one fixture; a panic is a failure of that fixture alone.
fn one(golden: &Golden, name: &str, compare: fn(&mut Check), report: &mut Report) {
    let before = report.cases();
    let result = catch_unwind(AssertUnwindSafe(|| {
        let fixture = golden.fixture(name);
        compare(&mut Check::new(&fixture, report));
        let unread = fixture.unread();
        if !unread.is_empty() {
            report.failure(name, &format!("nothing compares {}", unread.join(", ")));
        }
    }));
    if let Err(panic) = result {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        report.failure(name, &format!("panicked: {}", text.unwrap_or("without a message")));
    }
    if report.cases() == before {
        report.failure(name, "nothing was compared");
    }
}
