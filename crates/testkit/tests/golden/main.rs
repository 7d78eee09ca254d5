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

/// Compares every tensor of a fixture; with its name.
struct Entry(&'static str, fn(&mut Check));

macro_rules! compared {
    ($function:path) => {
        Entry(stringify!($function), $function)
    };
}

const TABLE: &[(&str, Entry)] = &[
    ("augment", compared!(augmentation::all)),
    ("convnext_v3", compared!(convnext::all)),
    ("droppath", compared!(droppath::all)),
    ("eval", compared!(evaluation::all)),
    ("heads", compared!(heads::all)),
    ("losses", compared!(losses::all)),
    ("losses_dist", compared!(distributed::all)),
    ("masking", compared!(masking::all)),
    ("param_groups", compared!(groups::all)),
    ("rope_v3", compared!(rope::tables)),
    ("schedules", compared!(schedules::all)),
    ("train_ibot", compared!(trajectory::arguments)),
    ("train_v1", compared!(trajectory::arguments)),
    ("train_v2_centering", compared!(trajectory::v2)),
    ("train_v2_sinkhorn", compared!(trajectory::v2)),
    ("train_v3_distill", compared!(trajectory::v3)),
    ("train_v3_gram", compared!(trajectory::v3)),
    ("train_v3_highres", compared!(trajectory::v3)),
    ("train_v3_plain", compared!(trajectory::v3)),
    ("vit_v2_a", compared!(vit::v2)),
    ("vit_v2_b", compared!(vit::v2)),
    ("vit_v2_c", compared!(vit::v2)),
    ("vit_v3_a", compared!(vit::v3)),
    ("vit_v3_b", compared!(vit::v3)),
    ("vit_v3_c", compared!(vit::v3)),
];

/// Comparisons that the committed fixtures give.
const COMMITTED_CASES: usize = 27088;

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
    for (name, Entry(_, compare)) in TABLE.iter().filter(|(name, _)| found.contains(*name)) {
        one(&golden, name, *compare, &mut report);
    }
    if golden.is_committed() && report.cases() != COMMITTED_CASES {
        report.failure("all", &format!("{} comparisons, not {COMMITTED_CASES}", report.cases()));
    }

    let table = table(&report);
    println!("{}", table.join("\n"));
    if golden.is_committed() {
        check_documented(&table, &mut report);
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

/// The table of `docs/numerics.md`: what was compared, how often, and where the deviation is largest for its tolerance.
fn table(report: &Report) -> Vec<String> {
    let files = report.files();
    let mut lines = vec![
        "| fixture | compared by | cases | largest deviation / tolerance | deviation | tolerance | where |".to_owned(),
        "|---|---|---|---|---|---|---|".to_owned(),
    ];
    for (name, Entry(function, _)) in TABLE {
        if let Some(of) = files.get(name) {
            lines.push(format!(
                "| `{name}` | `{}` | {} | {:.3} | {:.1e} | {:.1e} | {} |",
                function.replace(' ', ""),
                of.cases,
                of.worst,
                of.deviation,
                of.tolerance,
                if of.deviation > 0.0 { &of.worst_case } else { "" }
            ));
        }
    }
    lines
}

/// Fails when a fixture is not in the documented table with the number of its cases. Deviations depend on the machine.
fn check_documented(table: &[String], report: &mut Report) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/numerics.md");
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("`{path}`: {e}"));
    let first_cells = |line: &str| line.split('|').take(4).collect::<Vec<_>>().join("|");
    let documented: BTreeSet<String> = text.lines().map(first_cells).collect();
    for line in table.iter().map(|line| first_cells(line)).filter(|line| !documented.contains(line)) {
        report.failure("docs/numerics.md", &format!("does not have `{line}|…`: replace its table by the one above"));
    }
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
