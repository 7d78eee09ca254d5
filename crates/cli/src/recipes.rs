//! The recipes built into the binary, how one is loaded, and what the command line changes in it.

use std::path::PathBuf;
use std::process::ExitCode;

use dinoxide_config::{Origin, Request, Resolved, difference, load};
use dinoxide_trainer::Recipe;
use dinoxide_trainer::stages::Stage;

use crate::{Usage, terminal};

/// `configs/`, by file name.
const BUILT_IN: &[(&str, &str)] = &[
    ("quickstart.toml", include_str!("../../../configs/quickstart.toml")),
    ("dino_vits16.toml", include_str!("../../../configs/dino_vits16.toml")),
    ("ibot_vits16.toml", include_str!("../../../configs/ibot_vits16.toml")),
    ("vits14.toml", include_str!("../../../configs/vits14.toml")),
    ("vitb14.toml", include_str!("../../../configs/vitb14.toml")),
    ("vitl14.toml", include_str!("../../../configs/vitl14.toml")),
    ("vits16_dinov3.toml", include_str!("../../../configs/vits16_dinov3.toml")),
    ("vitl16_dinov3.toml", include_str!("../../../configs/vitl16_dinov3.toml")),
    ("vit7b16_dinov3.toml", include_str!("../../../configs/vit7b16_dinov3.toml")),
    ("distill_vits16_from_vitl16.toml", include_str!("../../../configs/distill_vits16_from_vitl16.toml")),
    ("distill_convnext_tiny.toml", include_str!("../../../configs/distill_convnext_tiny.toml")),
    ("multidistill_vit_s_b.toml", include_str!("../../../configs/multidistill_vit_s_b.toml")),
    ("vitt8_64px.toml", include_str!("../../../configs/vitt8_64px.toml")),
    ("vit6_64px.toml", include_str!("../../../configs/vit6_64px.toml")),
    ("small_64px.toml", include_str!("../../../configs/small_64px.toml")),
    ("stages_64px.toml", include_str!("../../../configs/stages_64px.toml")),
    ("distill_vitt8_64px.toml", include_str!("../../../configs/distill_vitt8_64px.toml")),
    ("distill_convnext_64px.toml", include_str!("../../../configs/distill_convnext_64px.toml")),
    ("multidistill_64px.toml", include_str!("../../../configs/multidistill_64px.toml")),
    ("base/dino.toml", include_str!("../../../configs/base/dino.toml")),
    ("base/ibot.toml", include_str!("../../../configs/base/ibot.toml")),
    ("base/dinov2.toml", include_str!("../../../configs/base/dinov2.toml")),
    ("base/dinov3.toml", include_str!("../../../configs/base/dinov3.toml")),
];

/// The recipe called `name` with overrides.
fn resolve(name: &str, overrides: &[String]) -> anyhow::Result<Resolved<Recipe>> {
    let search = [PathBuf::from("configs")];
    let request = Request { name, search: &search, built_in: BUILT_IN, overrides };
    load(&request).map_err(|e| Usage(e.into()).into())
}

/// The flags that a step of a recipe depends on.
#[derive(clap::Args)]
pub(crate) struct StepFlags {
    /// Recipe: a file, or the name of a built-in one (`dinoxide recipes` lists them). With few images or a small machine
    /// start from `vit6_64px`
    #[arg(long, value_name = "RECIPE", default_value = "quickstart")]
    pub(crate) config: String,
    /// Learn from this network, which does not train: a run directory, whose heads give the targets, or weights of any
    /// supported format, whose features are matched (`[loss.features]`). Replaces `distillation.teacher`
    #[arg(long, value_name = "PATH")]
    teacher: Option<String>,
    /// Where to compute: `cpu`, `cuda:0`, `vulkan:0`, `wgpu:0`, `metal`. Too slow on `cpu`: a smaller `model.arch`, fewer
    /// `augmentation.local_crops`, smaller crops; on a GPU: `--set train.precision=bf16`
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Images per step. Out of memory: lower it, or raise `efficiency.micro_batches`. Unstable or collapsing: a larger
    /// batch makes Sinkhorn's targets better. Replaces `train.batch_size`
    // Signed, as TOML's numbers are: the recipe says what a number below 0 is instead.
    #[arg(long, value_name = "N")]
    batch_size: Option<i64>,
    /// Override any value of the recipe, as often as needed: `--set schedule.teacher_temp.peak=0.06` (targets too
    /// sharp or unstable: lower), `--set schedule.teacher_momentum.peak=0.996` (small batches: higher),
    /// `--set dino_head.prototypes=4096` (few images, slow heads: fewer), `--set model.drop_path_rate=0.1` (overfitting or
    /// large models: higher). `dinoxide recipes NAME` shows every key
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl StepFlags {
    /// What they change in the recipe.
    pub(crate) fn changes(&self) -> Changes {
        let mut changes = Changes::of(&self.set);
        changes.add("--teacher", "distillation.teacher", self.teacher.as_deref().map(quoted));
        changes.add("--device", "run.device", self.device.as_deref().map(quoted));
        changes.add("--batch-size", "train.batch_size", self.batch_size.map(|n| n.to_string()));
        changes
    }
}

/// The flags that a run of a recipe depends on.
#[derive(clap::Args)]
pub(crate) struct RunFlags {
    #[command(flatten)]
    pub(crate) step: StepFlags,
    /// Images to train on: a folder of any depth, or `synthetic`. Replaces `data.source`, and the recipe's `eval.train` and
    /// `eval.val`: k-NN is then measured on a tenth of each class
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// How long: "100 epochs", "5000 steps", "2M images". Replaces `train.length`; warm-ups in epochs stay as they are.
    /// "0 steps" writes the backbone as it is before training
    #[arg(long, value_name = "LENGTH", allow_hyphen_values = true)]
    length: Option<String>,
    /// Peak learning rate before scaling by the batch size. Loss rises or is not finite: halve it. Replaces
    /// `schedule.lr.peak`
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
    /// Seed of every random draw. Replaces `train.seed`
    #[arg(long, value_name = "N")]
    seed: Option<i64>,
}

impl RunFlags {
    /// What they change in the recipe.
    pub(crate) fn changes(&self) -> Changes {
        let mut changes = self.step.changes();
        if self.data.is_some() {
            // The images that the recipe classifies have nothing to do with others; `--set` may name some that do.
            changes.implied = ["eval.train", "eval.val"].map(|key| format!("{key}=\"\"")).to_vec();
        }
        changes.add("--data", "data.source", self.data.as_deref().map(quoted));
        changes.add("--length", "train.length", self.length.as_deref().map(quoted));
        changes.add("--lr", "schedule.lr.peak", self.lr.map(|rate| format!("{rate:?}")));
        changes.add("--seed", "train.seed", self.seed.map(|n| n.to_string()));
        changes
    }
}

/// Text as a TOML string, which a JSON string is.
pub(crate) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A flag that stands for a value of the recipe.
struct Flag {
    name: &'static str,
    key: &'static str,
    /// The override that it stands for.
    text: String,
}

/// What a command line changes in a recipe.
#[derive(Default)]
pub(crate) struct Changes {
    /// Overrides that follow from a flag; `--set` and stages may say otherwise.
    implied: Vec<String>,
    flags: Vec<Flag>,
    /// What `--set` was given.
    set: Vec<String>,
}

impl Changes {
    /// Those of `--set`.
    pub(crate) fn of(set: &[String]) -> Self {
        Self { set: set.to_vec(), ..Self::default() }
    }

    /// Adds a flag, if it was given: its name, the key that it stands for, and its value as TOML.
    pub(crate) fn add(&mut self, name: &'static str, key: &'static str, value: Option<String>) {
        self.flags.extend(value.map(|value| Flag { name, key, text: format!("{key}={value}") }));
    }

    /// As overrides, in the order in which they apply.
    pub(crate) fn overrides(&self) -> Vec<String> {
        [&self.implied[..], &self.flags()[..], &self.set[..]].concat()
    }

    fn flags(&self) -> Vec<String> {
        self.flags.iter().map(|flag| flag.text.clone()).collect()
    }

    /// The recipe called `name` with these changes. A flag and a `--set` that contradict each other are an error:
    /// whichever won, the other would be lost without a word.
    pub(crate) fn resolve(&self, name: &str) -> anyhow::Result<Resolved<Recipe>> {
        let recipe = resolve(name, &self.overrides())?;
        let flags_last = resolve(name, &[&self.implied[..], &self.set[..], &self.flags()[..]].concat())?;
        // What depends on their order is set twice.
        let twice = difference(&flags_last.value, &recipe.value);
        let values_of = |flag: &Flag| twice.iter().find(|values| values.key == flag.key);
        let found = self.flags.iter().find_map(|flag| Some((flag, values_of(flag)?)));
        let Some((flag, values)) = found else { return Ok(recipe) };
        let set = recipe.origins.get(flag.key).map_or(String::new(), ToString::to_string);
        Err(Usage(anyhow::anyhow!(
            "`{}` and `{set}` contradict each other in {values}\n\nhint: leave one of them out",
            flag.name
        ))
        .into())
    }

    /// Says which of these changes each of the `parts` of a recipe, stages or students, sets itself.
    pub(crate) fn note_overruled<'a>(
        &self,
        recipe: &Resolved<Recipe>,
        what: &str,
        parts: impl IntoIterator<Item = &'a Stage>,
    ) {
        for part in parts {
            let (mut changes, mut keys) = (Vec::new(), Vec::new());
            for (key, origin) in recipe.origins.iter().filter(|(key, _)| holds(&part.set, key)) {
                let Origin::Override(text) = origin else { continue };
                if self.implied.contains(text) {
                    continue;
                }
                let flag = self.flags.iter().find(|flag| flag.text == *text);
                let change = flag.map_or_else(|| format!("`{origin}`"), |flag| format!("`{}`", flag.name));
                if !changes.contains(&change) {
                    changes.push(change);
                }
                keys.push(format!("`{key}`"));
            }
            if !keys.is_empty() {
                let have = if changes.len() == 1 { "has" } else { "have" };
                let (changes, keys, name) = (changes.join(", "), keys.join(", "), &part.name);
                terminal::plain(&format!("note: {changes} {have} no effect in {what} `{name}`, which sets {keys}"));
            }
        }
    }
}

/// Whether a table has a value at a dotted key.
fn holds(table: &toml::Table, key: &str) -> bool {
    match key.split_once('.') {
        None => table.contains_key(key),
        Some((first, rest)) => table.get(first).and_then(toml::Value::as_table).is_some_and(|inner| holds(inner, rest)),
    }
}

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A recipe to show with every value and where it comes from: a file or a name
    recipe: Option<String>,
    /// Override a value, as in `train`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// The first comment line of a recipe's text.
fn headline(text: &str) -> &str {
    text.lines().next().unwrap_or_default().trim_start_matches('#').trim()
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.recipe {
        Some(name) => terminal::data(resolve(name, &args.set)?.to_annotated_toml().trim_end()),
        None => {
            let rows: Vec<Vec<String>> = BUILT_IN
                .iter()
                .filter(|(name, _)| !name.starts_with("base/"))
                .map(|(name, text)| vec![name.to_string(), headline(text).to_owned()])
                .collect();
            let width = rows.iter().map(|r| r[0].len()).max().unwrap_or(0);
            rows.iter().for_each(|row| terminal::data(&format!("{:<width$}  {}", row[0], row[1])));
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use dinoxide_trainer::stages;

    use super::*;

    #[test]
    fn every_built_in_recipe_loads_plans_and_says_what_it_is() {
        let (mut seen, mut parts) = (0, 0);
        for (name, text) in BUILT_IN {
            let recipe = resolve(name, &[]).unwrap_or_else(|e| panic!("{name}: {e:#}"));
            recipe.value.plan(1_281_167).unwrap_or_else(|e| panic!("{name}: {e}"));
            for plan in [stages::plan, stages::students] {
                for stage in plan(&recipe, Path::new("run")).unwrap_or_else(|e| panic!("{name}: {e}")) {
                    let stage_plan = stage.recipe.value.plan(1_281_167);
                    stage_plan.unwrap_or_else(|e| panic!("{name}, {}: {e}", stage.name));
                    parts += 1;
                }
            }
            if !name.starts_with("base/") {
                for part in ["Run:", "Expect:", "arXiv:"] {
                    assert!(text.contains(part), "{name} does not say `{part}`");
                }
            }
            let again = Resolved::<Recipe>::from_text(name, &recipe.to_annotated_toml()).expect("a saved recipe loads");
            assert_eq!(again.value, recipe.value, "{name}");
            seen += 1;
        }
        assert_eq!((seen, parts), (23, 13));
    }

    #[test]
    fn every_file_in_configs_is_built_in() {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        let mut files = 0;
        for (prefix, folder) in [("", folder.clone()), ("base/", folder.join("base"))] {
            for entry in std::fs::read_dir(folder).expect("configs") {
                let name = entry.expect("entry").file_name().into_string().expect("UTF-8");
                if name.ends_with(".toml") {
                    let name = format!("{prefix}{name}");
                    assert!(BUILT_IN.iter().any(|(known, _)| *known == name), "{name} is not built in");
                    files += 1;
                }
            }
        }
        assert_eq!(files, BUILT_IN.len());
    }

    /// The keys of a table of a recipe, those without a default too: serde names them when it refuses another.
    fn keys_of(header: &str) -> Option<Vec<String>> {
        let error = toml::from_str::<Recipe>(&format!("{header}\nno_such_key = 0")).err()?;
        let expected = error.message().strip_prefix("unknown field `no_such_key`, expected ")?;
        Some(expected.split('`').skip(1).step_by(2).map(str::to_owned).collect())
    }

    /// Adds the `keys` of the table at `path` and of all tables in it, each beside its table: `[loss.gram]`, `weight`. Curves
    /// are keys of their table; what is in a curve is counted once, as of `[schedule.lr]`.
    fn collect(path: &str, keys: Vec<String>, found: &mut BTreeSet<(String, String)>) {
        for key in keys {
            let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            let array = format!("[[{inner}]]");
            match keys_of(&format!("[{inner}]")) {
                Some(parts) if parts == ["start", "peak", "end", "warmup", "cosine"] => {
                    found.insert((format!("[{path}]"), key));
                    found.extend(parts.into_iter().map(|part| ("[schedule.lr]".to_owned(), part)));
                }
                Some(keys) => collect(&inner, keys, found),
                None => match keys_of(&array) {
                    Some(keys) => found.extend(keys.into_iter().map(|key| (array.clone(), key))),
                    None => {
                        found.insert((format!("[{path}]"), key));
                    }
                },
            }
        }
    }

    /// The rows of `docs/recipe.md`: table, key and, where it is one, the default as TOML. A heading names one table or two.
    fn documented() -> Vec<(String, String, Option<String>)> {
        let code = |cell: &str| Some(cell.trim().strip_prefix('`')?.strip_suffix('`')?.to_owned());
        let (mut rows, mut tables) = (Vec::new(), Vec::<&str>::new());
        for line in include_str!("../../../docs/recipe.md").lines() {
            if line.starts_with('#') {
                tables = line.split('`').skip(1).step_by(2).collect();
            }
            let mut cells = line.split('|').skip(1);
            if let (Some(key), Some(default)) = (cells.next().and_then(code), cells.next()) {
                rows.extend(tables.iter().map(|table| ((*table).to_owned(), key.clone(), code(default))));
            }
        }
        rows
    }

    #[test]
    fn every_key_is_documented_with_its_default() {
        let rows = documented();
        let mut keys = BTreeSet::new();
        collect("", keys_of("").expect("a recipe has tables"), &mut keys);
        let known: BTreeSet<_> = rows.iter().map(|(table, key, _)| (table.clone(), key.clone())).collect();
        let missing: Vec<_> = keys.difference(&known).collect();
        assert!(missing.is_empty(), "not in docs/recipe.md: {missing:?}");
        let unknown: Vec<_> = known.difference(&keys).collect();
        assert!(unknown.is_empty(), "docs/recipe.md has what no recipe has: {unknown:?}");
        assert_eq!((keys.len(), rows.len()), (164, 164));

        // An entry of `[[stages]]` is no default.
        let stated = rows.iter().filter(|(table, ..)| !table.starts_with("[["));
        let line = |(table, key, default): &(String, String, Option<String>)| {
            let table = table.trim_matches(['[', ']']);
            Some(format!("{table}.{key} = {}", default.as_ref()?))
        };
        let lines: Vec<String> = stated.filter_map(line).collect();
        let recipe: Recipe = toml::from_str(&lines.join("\n")).expect("defaults that are TOML");
        assert_eq!(recipe, Recipe::default());
        assert_eq!(lines.len(), 140);
    }
}
