//! Stopping a run in every way there is, and going on.

use std::fs;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use serde_json::Value;

use crate::support::{Workplace, names};

/// Long enough to be stopped in the middle.
const LONG: [&str; 6] =
    ["--length", "240 steps", "--set", "run.checkpoint_every='7 steps'", "--set", "eval.every='40 steps'"];

/// Metrics without what depends on the clock and the machine.
fn comparable(place: &Workplace, run: &str) -> Vec<Value> {
    let mut metrics = place.metrics(run);
    metrics.retain(|line| line["kind"] != "end");
    for line in &mut metrics {
        let line = line.as_object_mut().expect("an object");
        for key in ["seconds", "images_per_second", "data_wait", "memory_bytes"] {
            line.remove(key);
        }
    }
    metrics
}

#[track_caller]
pub(crate) fn assert_same_run(place: &Workplace, expected: &str, found: &str) {
    let (left, right) = (comparable(place, expected), comparable(place, found));
    assert_eq!(left.len(), right.len(), "lines of metrics");
    for (left, right) in left.iter().zip(&right) {
        assert_eq!(left, right);
    }
    let teacher = |run: &str| place.read(&format!("{run}/teacher.safetensors"));
    assert!(teacher(expected) == teacher(found), "the teachers differ");
    assert_eq!(place.checkpoints(expected), place.checkpoints(found));
    for checkpoint in place.checkpoints(expected) {
        let state = |run: &str| place.read(&format!("{run}/checkpoints/{checkpoint}/state.safetensors"));
        assert!(state(expected) == state(found), "{checkpoint} differs");
    }
    assert_eq!(names(&place.path(expected)), names(&place.path(found)));
}

/// Waits until a run has written so many lines of metrics.
fn wait_for_lines(place: &Workplace, run: &str, child: &mut Child, lines: usize) {
    let start = Instant::now();
    loop {
        let metrics = fs::read(place.path(run).join("metrics.jsonl")).unwrap_or_default();
        if metrics.iter().filter(|byte| **byte == b'\n').count() >= lines {
            return;
        }
        assert!(child.try_wait().expect("a child").is_none(), "the run ended before it had {lines} lines");
        assert!(start.elapsed() < Duration::from_secs(60), "no {lines} lines within a minute");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn spawn(place: &Workplace, args: &[&str]) -> Child {
    place.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary starts")
}

fn kill(mut child: Child) -> ExitStatus {
    child.kill().expect("a running child");
    child.wait().expect("a child")
}

#[test]
fn a_run_killed_five_times_equals_an_uninterrupted_one() {
    let place = Workplace::new();
    place.train("straight", &LONG).succeeded();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let start = [&["train", "--config", "tiny.toml", "--run", "killed"], &LONG[..]].concat();
    for session in 0..5 {
        // Two lines a step. The first session ends before its first checkpoint.
        let lines = if session == 0 { rng.random_range(1..12) } else { 80 * session + rng.random_range(0..70) };
        let resume = ["train", "--resume", "killed"];
        let mut child = spawn(&place, if session % 2 == 1 { &resume } else { &start });
        wait_for_lines(&place, "killed", &mut child, lines);
        assert!(!kill(child).success(), "session {session} was not killed");
    }
    let resumed = place.run(&["train", "--resume", "killed"]).succeeded();
    assert!(resumed.stderr.contains("resumed    after step "), "{}", resumed.stderr);
    assert_same_run(&place, "straight", "killed");
}

#[test]
fn a_run_in_bfloat16_that_was_killed_equals_an_uninterrupted_one_and_no_run_in_single_precision() {
    let place = Workplace::new();
    let half = [&LONG[..], &["--set", "train.precision='bf16'"]].concat();
    place.train("single", &LONG).succeeded();
    place.train("straight", &half).succeeded();
    let start = [&["train", "--config", "tiny.toml", "--run", "killed"], &half[..]].concat();
    for lines in [60, 250] {
        let mut child = spawn(&place, &start);
        wait_for_lines(&place, "killed", &mut child, lines);
        assert!(!kill(child).success(), "the run was not killed");
    }
    place.run(&["train", "--resume", "killed"]).succeeded();
    assert_same_run(&place, "straight", "killed");

    let (single, half) = (place.metrics("single"), place.metrics("straight"));
    let losses = |metrics: &[Value]| -> Vec<f64> {
        let steps = metrics.iter().filter(|line| line["kind"] == "step");
        steps.map(|line| line["losses"]["total"].as_f64().expect("a loss")).collect()
    };
    let (of_single, of_half) = (losses(&single), losses(&half));
    assert_eq!(of_single.len(), 240);
    assert!(of_single.iter().zip(&of_half).all(|(a, b)| a != b), "a step does not depend on the precision");
    // Before the first step the weights are the same, and whatever they are trained in they are evaluated in the same way.
    let first = |metrics: &[Value]| metrics.iter().find(|line| line["kind"] == "eval").expect("an evaluation").clone();
    let (single, half) = (first(&single), first(&half));
    assert_eq!((&single["knn"], &single["effective_rank"]), (&half["knn"], &half["effective_rank"]));
}

#[test]
fn results_do_not_depend_on_the_number_of_loader_threads() {
    let place = Workplace::new();
    place.train("one", &["--loader-threads", "1"]).succeeded();
    place.train("four", &["--loader-threads", "4"]).succeeded();
    assert_same_run(&place, "one", "four");
}

#[test]
fn a_finished_run_that_is_resumed_stays_as_it_is() {
    let place = Workplace::new();
    place.train("run", &[]).succeeded();
    place.copy("run", "again");
    let resumed = place.run(&["train", "--resume", "again"]).succeeded();
    assert!(resumed.stdout.starts_with("k-NN accuracy: "), "{}", resumed.stdout);
    assert_same_run(&place, "run", "again");
    let ends = place.metrics("again").iter().filter(|line| line["kind"] == "end").count();
    assert_eq!(ends, 1);
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_a_checkpoint_and_says_how_to_go_on() {
    let place = Workplace::new();
    place.train("straight", &LONG).succeeded();
    let args = [&["train", "--config", "tiny.toml", "--run", "stopped"], &LONG[..]].concat();
    let mut child =
        place.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    wait_for_lines(&place, "stopped", &mut child, 50);
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    assert!(sent.success());
    let output = child.wait_with_output().expect("a child");
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(output.stdout.is_empty());
    assert!(stderr.contains("\nstopping after this step; Ctrl-C again ends at once\n"), "{stderr}");
    assert!(
        stderr.contains("\nstopped   ") && stderr.contains("go on with `dinoxide train --resume stopped`"),
        "{stderr}"
    );
    let steps = place.metrics("stopped").last().expect("a line")["step"].as_u64().expect("a step");
    assert!((25..240).contains(&steps), "stopped after {steps}");
    assert_eq!(place.checkpoints("stopped").last(), Some(&format!("step-{steps:06}")));
    let resumed = place.run(&["train", "--resume", "stopped"]).succeeded();
    assert!(resumed.stderr.contains(&format!("resumed    after step {steps}\n")), "{}", resumed.stderr);
    assert_same_run(&place, "straight", "stopped");
}

#[test]
fn an_evaluation_set_that_vanishes_during_a_run_does_not_end_it() {
    let place = Workplace::new();
    for (folder, count) in [("known", 5), ("val", 4)] {
        place.write_classes(folder, &["cat", "dog"], count);
    }
    let sets = ["--set", "eval.train='known'", "--set", "eval.val='val'"];
    let args = [&["train", "--config", "tiny.toml", "--run", "run"], &LONG[..], &sets].concat();
    let mut child =
        place.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    wait_for_lines(&place, "run", &mut child, 20);
    fs::remove_dir_all(place.path("val")).expect("removed");
    let output = child.wait_with_output().expect("a child");
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(output.status.success(), "{stderr}");
    assert!(
        stderr.contains("warning: k-NN could not be measured after 240 steps: features: none of the 8 "),
        "{stderr}"
    );
    assert!(output.stdout.is_empty(), "what was measured before is not the accuracy after training");
    let metrics = place.metrics("run");
    let count = |kind: &str| metrics.iter().filter(|line| line["kind"] == kind).count();
    assert_eq!((count("step"), metrics[0]["kind"].as_str(), count("end")), (240, Some("eval"), 1));
}

/// What is done to a file's bytes.
type Damage = fn(Vec<u8>) -> Vec<u8>;

/// Ways to damage a file.
fn damages() -> [(&'static str, Damage); 3] {
    [
        ("truncated", |bytes| bytes[..bytes.len() / 2].to_vec()),
        ("emptied", |_| Vec::new()),
        ("one bit flipped", |mut bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            bytes
        }),
    ]
}

#[test]
fn a_damaged_checkpoint_costs_a_warning_and_the_steps_since_the_one_before() {
    let place = Workplace::new();
    place.train("straight", &[]).succeeded();
    let mut cases = 0;
    for (damage, change) in damages() {
        let run = format!("run {cases}");
        place.copy("straight", &run);
        let state = format!("{run}/checkpoints/step-000010/state.safetensors");
        place.write(&state, change(place.read(&state)));
        let resumed = place.run(&["train", "--resume", &run]).succeeded();
        let warning = format!("warning: {run}/checkpoints/step-000010 is damaged (`state.safetensors` has ");
        assert!(resumed.stderr.contains(&warning), "{damage}: {}", resumed.stderr);
        assert!(resumed.stderr.contains("falling back to the one before it"), "{damage}: {}", resumed.stderr);
        assert!(resumed.stderr.contains("resumed    after step 9\n"), "{damage}: {}", resumed.stderr);
        let log = String::from_utf8(place.read(&format!("{run}/log.txt"))).expect("UTF-8");
        assert!(log.contains(&warning), "{damage}: {log}");
        assert_same_run(&place, "straight", &run);
        cases += 1;
    }
    for manifest in ["", "{}", "{\"progress\": {\"step\""] {
        let run = format!("run {cases}");
        place.copy("straight", &run);
        place.write(&format!("{run}/checkpoints/step-000010/manifest.json"), manifest);
        let resumed = place.run(&["train", "--resume", &run]).succeeded();
        assert!(resumed.stderr.contains("step-000010 is damaged (`manifest.json`: "), "{}", resumed.stderr);
        assert_same_run(&place, "straight", &run);
        cases += 1;
    }
    assert_eq!(cases, 6);
}

/// A folder in the place of a file stands for every error of the system but that there is no such file.
#[test]
fn a_checkpoint_that_cannot_be_read_stops_the_run_and_nothing_is_lost() {
    let place = Workplace::new();
    place.train("run", &[]).succeeded();
    let path = "run/checkpoints/step-000010/state.safetensors";
    let state = place.read(path);
    fs::remove_file(place.path(path)).expect("removed");
    fs::create_dir(place.path(path)).expect("a folder");
    let metrics = place.read("run/metrics.jsonl");
    let failed = place.run(&["train", "--resume", "run"]);
    failed.failed(1, &[&format!("error: {path}: "), "hint: make it readable", "remove `run/checkpoints/step-000010`"]);
    assert_eq!(place.checkpoints("run"), ["step-000006", "step-000009", "step-000010"]);
    assert_eq!(place.read("run/metrics.jsonl"), metrics);
    fs::remove_dir(place.path(path)).expect("removed");
    place.write(path, state);
    place.run(&["train", "--resume", "run"]).succeeded();
}

#[test]
fn a_run_without_a_whole_checkpoint_is_not_started_anew() {
    let place = Workplace::new();
    place.train("run", &[]).succeeded();
    for (checkpoint, (_, change)) in place.checkpoints("run").iter().zip(damages()) {
        let state = format!("run/checkpoints/{checkpoint}/state.safetensors");
        place.write(&state, change(place.read(&state)));
    }
    let metrics = place.read("run/metrics.jsonl");
    let failed = place.run(&["train", "--resume", "run"]);
    let parts =
        ["run/checkpoints: none of its checkpoints is whole", "step-000006: ", "step-000009: ", "step-000010: "];
    failed.failed(1, &parts);
    assert_eq!(place.read("run/metrics.jsonl"), metrics);
}

#[test]
fn what_a_kill_left_half_written_is_removed() {
    let place = Workplace::new();
    place.train("straight", &[]).succeeded();
    place.copy("straight", "run");
    place.write("run/.writing-x1", "half");
    place.write("run/checkpoints/.writing-step-000013/state.safetensors", "half");
    place.run(&["train", "--resume", "run"]).succeeded();
    assert_same_run(&place, "straight", "run");
}

#[test]
fn a_run_directory_belongs_to_its_configuration() {
    let place = Workplace::new();
    place.train("run", &[]).succeeded();
    let before = place.read("run/config.toml");
    let failed = place.train("run", &["--seed", "5", "--set", "loss.koleo_weight=0.25"]);
    failed.failed(2, &["run: this run was started with another configuration", "`train.seed`: 0 and 5", "hint: "]);
    failed.failed(2, &["`loss.koleo_weight`: 0.1 and 0.25"]);
    let failed = place.train("run", &["--set", "train.precision='bf16'"]);
    failed.failed(2, &["another configuration", "`train.precision`: \"fp32\" and \"bf16\""]);
    assert_eq!(place.read("run/config.toml"), before);
    // How it is run is not what is run.
    place.train("run", &["--loader-threads", "1", "--set", "run.keep_checkpoints=5"]).succeeded();
}

#[test]
fn only_a_run_can_be_resumed() {
    let place = Workplace::new();
    place.write("photos/note.txt", "no run");
    place.run(&["train", "--resume", "photos"]).failed(2, &["photos: no `config.toml` here", "hint: start one with"]);
    place.run(&["train", "--resume", "nowhere"]).failed(2, &["nowhere: no `config.toml` here"]);
    assert!(!place.path("nowhere").exists());
}

#[cfg(unix)]
#[test]
fn a_full_disk_costs_no_checkpoint() {
    let place = Workplace::new();
    place.train("straight", &[]).succeeded();
    place.copy("straight", "run");
    for checkpoint in ["step-000009", "step-000010"] {
        fs::remove_dir_all(place.path("run/checkpoints").join(checkpoint)).expect("removed");
    }
    let state = place.read("run/checkpoints/step-000006/state.safetensors");
    // Files end after 100 blocks of 512 or 1024 bytes, depending on the shell.
    assert!(state.len() > 100 * 1024);
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_dinoxide")]);
    limited.args(["train", "--resume", "run"]).current_dir(place.path("."));
    let failed = crate::support::finish(&mut limited);
    failed.failed(1, &["error: run/checkpoints/step-000009: "]);
    assert_eq!(place.checkpoints("run"), ["step-000006"]);
    assert!(place.read("run/checkpoints/step-000006/state.safetensors") == state);
    place.run(&["train", "--resume", "run"]).succeeded();
    assert_same_run(&place, "straight", "run");
}

#[test]
fn two_processes_never_train_in_one_directory() {
    let place = Workplace::new();
    place.train("run", &[]).succeeded();
    let lock = fs::File::open(place.path("run/.lock")).expect("a lock");
    lock.lock().expect("locked");
    place.run(&["train", "--resume", "run"]).failed(1, &["run: another process is training in this directory"]);
    lock.unlock().expect("unlocked");
    place.run(&["train", "--resume", "run"]).succeeded();
}

#[test]
fn the_speed_after_a_resume_counts_no_image_of_before() {
    let place = Workplace::new();
    let args = ["--length", "202 steps", "--set", "run.checkpoint_every='200 steps'"];
    place.train("straight", &args).succeeded();
    place.copy("straight", "stopped");
    let last = place.checkpoints("stopped").pop().expect("a checkpoint");
    fs::remove_dir_all(place.path(&format!("stopped/checkpoints/{last}"))).expect("removed");
    place.run(&["train", "--resume", "stopped"]).succeeded();
    let rates = |run: &str| -> Vec<f64> {
        let steps = place.metrics(run).into_iter().filter(|line| line["kind"] == "step");
        steps.map(|line| line["images_per_second"].as_f64().expect("a rate")).collect()
    };
    let fastest = rates("straight").into_iter().fold(0.0, f64::max);
    let stopped = rates("stopped");
    assert_eq!(stopped.len(), 202, "the recipe logs every step");
    // The first step after the resume, in the time of one: with those before, it would be 200 times as fast.
    let resumed = stopped[200];
    assert!(resumed < 8.0 * fastest, "{resumed} images/s, and never more than {fastest} before");
}
