//! Where exports are refused before anything is read or written.

use crate::support::Workplace;

#[test]
fn an_export_neither_overwrites_its_weights_nor_goes_where_it_cannot_be() {
    let place = Workplace::new();
    place.train("run", &["--length", "2 steps"]).succeeded();
    let weights = place.read("run/teacher.safetensors");
    let export = |format: &str, output: &str| {
        place.run(&["export", "--weights", "run/teacher.safetensors", "--format", format, "--output", output])
    };
    let mut cases = 0;
    for format in ["safetensors", "meta", "onnx"] {
        // Also by another way.
        for output in ["run/teacher.safetensors", "run/../run/teacher.safetensors"] {
            export(format, output).failed(2, &["is what `--weights` names", "hint: give another `--output`"]);
            assert!(place.read("run/teacher.safetensors") == weights, "{format} to {output}");
        }
        export(format, "nowhere/out").failed(2, &["nowhere/out: the folder that it would be in does not exist"]);
        export(format, "run").failed(2, &["run: a folder, and this format is a file"]);
        cases += 1;
    }
    assert_eq!(cases, 3);
    // A run directory stands for its weights.
    place.run(&["export", "--weights", "run", "--format", "safetensors", "--output", "out"]).succeeded();
    place.run(&["inspect", "run"]).succeeded();
    std::fs::create_dir(place.path("empty")).expect("a folder");
    place.run(&["inspect", "empty"]).failed(2, &["empty: a folder without `model.safetensors`"]);
}

#[test]
fn a_run_goes_on_from_the_state_of_runs_alone() {
    let place = Workplace::new();
    place.train("first", &["--length", "2 steps"]).succeeded();
    let take = ["--init", "first/teacher.safetensors", "--set", "init.take='state'"];
    place.train("second", &take).failed(2, &["`init.take`: \"state\"", "first/teacher.safetensors", "hint: "]);
    assert!(!place.path("second").exists());
}
