//! The recipes built into the binary, and how one is loaded.

use std::path::PathBuf;
use std::process::ExitCode;

use dinoxide_config::{Request, Resolved, load};
use dinoxide_trainer::Recipe;

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
pub(crate) fn resolve(name: &str, overrides: &[String]) -> anyhow::Result<Resolved<Recipe>> {
    let search = [PathBuf::from("configs")];
    let request = Request { name, search: &search, built_in: BUILT_IN, overrides };
    load(&request).map_err(|e| Usage(e.into()).into())
}

/// What `--data` changes in a recipe: its images, and those it classifies, which have nothing to do with other images.
pub(crate) fn data_overrides(data: Option<&str>) -> Vec<String> {
    // A JSON string is a TOML string.
    let text = |value: &str| serde_json::Value::from(value);
    let all = |data| [("data.source", data), ("eval.train", ""), ("eval.val", "")];
    data.map(all).into_iter().flatten().map(|(key, value)| format!("{key}={}", text(value))).collect()
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
}
