//! A resolved recipe as TOML that says of each value where it was set, and that can be loaded again.

use serde::Serialize;
use toml::de::DeTable;

use crate::layer::{Part, walk_leaves};
use crate::origin::Origin;
use crate::resolve::Resolved;

impl<T: Serialize> Resolved<T> {
    /// The whole recipe as TOML that [`load`](crate::load) reads back to the same value, each leaf with its origin in a comment:
    /// `base_lr = 0.004  # configs/base/dinov2.toml:31`. Options that are `None` do not appear.
    ///
    /// # Panics
    /// If `value` was changed after loading to something that TOML cannot express.
    pub fn to_annotated_toml(&self) -> String {
        let text = toml::to_string(&self.value).expect("a value that was written as TOML when it was loaded");
        let table = DeTable::parse(&text).expect("serialized TOML parses").into_inner();
        let mut comments: Vec<(usize, &Origin)> = Vec::new();
        walk_leaves(&table, "", &mut |key, value, part| {
            let Some(origin) = self.origins.get(key) else { return };
            match part {
                Part::Leaf => comments.push((value.span().end, origin)),
                Part::Sections => {
                    let headers = value.get_ref().as_array().into_iter().flat_map(|sections| sections.iter());
                    comments.extend(headers.map(|header| (header.span().end, origin)));
                }
            }
        });
        comments.sort_by_key(|(end, _)| *end);
        let mut annotated = String::with_capacity(2 * text.len());
        let mut copied = 0;
        for (end, origin) in comments {
            annotated.push_str(&text[copied..end]);
            annotated.push_str("  # ");
            // A file name or an override may hold a line break, which would end the comment.
            annotated.extend(origin.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }));
            copied = end;
        }
        annotated.push_str(&text[copied..]);
        annotated
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::ChaCha8Rng;
    use rand::{RngExt, SeedableRng};

    use crate::Resolved;
    use crate::sample::{Arch, Folder, Head, Model, Optim, Probe, Recipe, Run, Schedule, Stage, layered};

    #[test]
    fn the_annotated_recipe_reads_back_to_the_same_value() {
        let (folder, resolved) = layered();
        let text = resolved.to_annotated_toml();
        let expected = "\
[run]
name = \"third\"  # --set run.name=third
seed = 1  # base/b.toml:1

[model]
arch = \"vit_small\"  # default
patch_size = 14  # default
depth = 12  # default

[model.head]
hidden_dim = 8  # top.toml:5
bottleneck_dim = 256  # default

[optim]
base_lr = 0.001  # base/b.toml:4
weight_decay = 0.2  # top.toml:3
betas = [0.8, 0.9]  # base/b.toml:6

[schedule]
kind = \"constant\"  # base/b.toml:11
value = 3.0  # --set schedule.value=3

[[stages]]  # top.toml:6
steps = 3  # top.toml:7
crop_px = 224  # default

[stages.head]
hidden_dim = 1  # default
bottleneck_dim = 2  # default

[[stages]]  # top.toml:6
steps = 10  # default
crop_px = 224  # default

[stages.head]
hidden_dim = 4  # top.toml:9
bottleneck_dim = 2  # default

[lr_scale]
\"blocks.0\" = 0.5  # base/b.toml:14
";
        assert_eq!(folder.shorten(&text), expected);
        assert_eq!(Resolved::<Recipe>::from_text("saved", &text).unwrap().value, resolved.value);
        folder.write("saved.toml", text.as_bytes());
        assert_eq!(folder.load("saved.toml", &[]).unwrap().value, resolved.value);
    }

    #[test]
    fn line_breaks_in_an_override_do_not_break_out_of_the_comment() {
        let folder = Folder::new(&[("a.toml", "")]);
        let resolved = folder.load("a.toml", &["run.name=a\nseed = 99"]).unwrap();
        assert_eq!(resolved.value.run.name, "a\nseed = 99");
        let saved = Resolved::<Recipe>::from_text("saved", &resolved.to_annotated_toml()).unwrap();
        assert_eq!(saved.value, resolved.value);
    }

    /// A finite number of any size, as often as not one that is written without a fraction.
    fn number(rng: &mut ChaCha8Rng) -> f64 {
        let bits = f64::from_bits(rng.random());
        if rng.random() && bits.is_finite() { bits } else { f64::from(rng.random_range(-3..=3)) }
    }

    fn single(rng: &mut ChaCha8Rng) -> f32 {
        let bits = f32::from_bits(rng.random());
        if bits.is_finite() { bits } else { 0.0 }
    }

    /// Up to eight characters, half of them those with a meaning in TOML.
    fn text(rng: &mut ChaCha8Rng) -> String {
        const SPECIAL: [char; 12] = ['"', '\\', '\'', '#', '\n', '\r', '\t', '\0', '=', '[', '.', '\u{7f}'];
        let character = |rng: &mut ChaCha8Rng| match rng.random() {
            true => SPECIAL[rng.random_range(0..SPECIAL.len())],
            false => rng.random(),
        };
        (0..rng.random_range(0..=8)).map(|_| character(rng)).collect()
    }

    fn some<T>(rng: &mut ChaCha8Rng, value: impl FnOnce(&mut ChaCha8Rng) -> T) -> Option<T> {
        if rng.random() { Some(value(rng)) } else { None }
    }

    fn any_recipe(rng: &mut ChaCha8Rng) -> Recipe {
        let head = |rng: &mut ChaCha8Rng| Head {
            hidden_dim: rng.random::<u16>().into(),
            bottleneck_dim: rng.random::<u16>().into(),
        };
        let run = Run { name: text(rng), note: some(rng, text), seed: rng.random() };
        let arch = if rng.random() { Arch::VitSmall } else { Arch::VitBase };
        let model = Model { arch, patch_size: rng.random(), depth: 3, head: head(rng) };
        let optim = Optim { base_lr: single(rng), weight_decay: number(rng), betas: [number(rng), number(rng)] };
        let schedule = match rng.random() {
            true => Schedule::Constant { value: number(rng) },
            false => Schedule::Cosine { start: number(rng), end: number(rng) },
        };
        let stage = |rng: &mut ChaCha8Rng| Stage { steps: rng.random(), crop_px: rng.random(), head: head(rng) };
        let stages = (0..rng.random_range(0..3)).map(|_| stage(rng)).collect();
        let probe = some(rng, |rng| Probe { crop_px: rng.random() });
        let lr_scale = (0..rng.random_range(0..3)).map(|_| (text(rng), single(rng))).collect();
        Recipe { run, model, optim, schedule, stages, probe, lr_scale }
    }

    #[test]
    fn any_recipe_survives_being_annotated_and_read() {
        for seed in 0..500 {
            let recipe = any_recipe(&mut ChaCha8Rng::seed_from_u64(seed));
            let written = Resolved::<Recipe>::from_text("written", &toml::to_string(&recipe).unwrap()).unwrap();
            assert_eq!(written.value, recipe, "seed {seed}");
            let saved = Resolved::<Recipe>::from_text("saved", &written.to_annotated_toml()).unwrap();
            assert_eq!(saved.value, recipe, "seed {seed}");
        }
    }
}
