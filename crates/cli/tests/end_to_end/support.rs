//! A folder to work in, a recipe whose runs take milliseconds, and the binary.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use image::{Rgb, RgbImage};
use serde_json::Value;

/// Ten steps of a backbone with one block, on synthetic images.
const TINY: &str = r#"extends = "base/dinov3.toml"

[data]
source = "synthetic:images=48,size=16"

[train]
length = "10 steps"
batch_size = 4

[model]
arch = "vit_tiny"
embed_dim = 32
depth = 1
num_heads = 2
patch_size = 4
register_tokens = 0
mask_k_bias = false
rope_rescale = 1.0
norm_eps = 1e-6
layer_scale_init = 0.0

[augmentation]
global_crop_size = 16
local_crops = 2
local_crop_size = 8

[dino_head]
prototypes = 16
bottleneck_dim = 8
hidden_dim = 16
norm = "weight_fixed"

[ibot_head]
prototypes = 16
bottleneck_dim = 8
hidden_dim = 16

[optim]
layerwise_decay = 1.0
patch_embed_lr_mult = 1.0

[schedule]
lr = { start = 0.0, peak = 1e-3, end = 1e-6, warmup = "2 steps" }
lr_scaling = "none"
weight_decay = { start = 0.04, peak = 0.04, end = 0.04, warmup = "0 steps" }
teacher_momentum = { start = 0.98, peak = 0.98, end = 1.0, warmup = "0 steps" }
teacher_temp = { start = 0.04, peak = 0.07, end = 0.07, warmup = "2 steps" }
freeze_last_layer = "0 steps"

[run]
log_every = "1 steps"
checkpoint_every = "3 steps"

[eval]
val = "synthetic:split=val,images=24,size=16"
max_train = 6000
every = "0 steps"
k = 5
"#;

/// A temporary folder with the recipe `tiny.toml`, in which the binary runs.
pub(crate) struct Workplace(tempfile::TempDir);

impl Workplace {
    pub(crate) fn new() -> Self {
        let folder = Self(tempfile::tempdir().expect("a folder"));
        folder.write("tiny.toml", TINY);
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file, and the folders it is in.
    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        fs::write(path, contents).expect("written");
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Writes an image in the format of its extension.
    pub(crate) fn write_image(&self, name: &str, image: &RgbImage) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        image.save(path).expect("an image");
    }

    /// Writes `count` images of each class into `folder/<class>/`, told apart by their colour.
    pub(crate) fn write_classes(&self, folder: &str, classes: &[&str], count: u32) {
        for (class, name) in classes.iter().enumerate() {
            for i in 0..count {
                self.write_image(&format!("{folder}/{name}/{i}.png"), &picture(20, 17, class, i));
            }
        }
    }

    /// The binary, to be run here.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dinoxide"));
        command.args(args).current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    /// Runs the binary to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Finished {
        finish(&mut self.command(args))
    }

    /// Trains `tiny.toml` in the run directory `run`.
    pub(crate) fn train(&self, run: &str, args: &[&str]) -> Finished {
        self.run(&[&["train", "--config", "tiny.toml", "--run", run], args].concat())
    }

    /// The lines of a run's metrics.
    pub(crate) fn metrics(&self, run: &str) -> Vec<Value> {
        let text = String::from_utf8(self.read(&format!("{run}/metrics.jsonl"))).expect("UTF-8");
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"))).collect()
    }

    /// The names of a run's checkpoints, oldest first.
    pub(crate) fn checkpoints(&self, run: &str) -> Vec<String> {
        names(&self.path(run).join("checkpoints"))
    }

    /// A copy of a run directory.
    pub(crate) fn copy(&self, from: &str, to: &str) {
        copy(&self.path(from), &self.path(to));
    }
}

/// The files and folders in a folder, sorted, hidden ones too.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for name in names(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(from, to).expect("copied");
        }
    }
}

/// An image of a class: stripes of its colour, shifted by `i`.
pub(crate) fn picture(width: u32, height: u32, class: usize, i: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let shade = (20 * ((x + 2 * y + i) % 8)) as u8;
        let mut color = [shade; 3];
        color[class % 3] = 255 - shade / 2;
        Rgb(color)
    })
}

/// What a finished process said.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command to its end. Whatever happens to the program, it must not panic.
pub(crate) fn finish(command: &mut Command) -> Finished {
    let output = command.output().expect("the binary starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    let finished = Finished { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
    assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
    finished
}

impl Finished {
    #[track_caller]
    pub(crate) fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        assert!(!self.stderr.contains("error:"), "{}", self.stderr);
        self
    }

    /// Asserts an exit code, and that the one error on stderr contains every part.
    #[track_caller]
    pub(crate) fn failed(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{}", self.stderr);
        assert_eq!(self.stderr.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{}", self.stderr);
        assert_eq!(self.stdout, "", "data of a command that failed");
        let error = &self.stderr[self.stderr.find("error: ").expect("an error")..];
        for part in parts {
            assert!(error.contains(part), "`{part}` is not in\n{error}");
        }
    }
}
