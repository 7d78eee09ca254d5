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
    use proptest::prelude::*;

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

    fn any_recipe() -> impl Strategy<Value = Recipe> {
        let head =
            (any::<u16>(), any::<u16>()).prop_map(|(a, b)| Head { hidden_dim: a.into(), bottleneck_dim: b.into() });
        let stage = (any::<u32>(), any::<u32>(), head.clone()).prop_map(|(steps, crop_px, head)| Stage {
            steps,
            crop_px,
            head,
        });
        let schedule = prop_oneof![
            any::<f64>().prop_map(|value| Schedule::Constant { value }),
            any::<(f64, f64)>().prop_map(|(start, end)| Schedule::Cosine { start, end }),
        ];
        let run = (any::<String>(), any::<Option<String>>(), any::<u64>()).prop_map(|(name, note, seed)| Run {
            name,
            note,
            seed,
        });
        let model = (any::<bool>(), any::<u8>(), head).prop_map(|(small, patch_size, head)| Model {
            arch: if small { Arch::VitSmall } else { Arch::VitBase },
            patch_size,
            depth: 3,
            head,
        });
        let optim = any::<(f32, f64, [f64; 2])>().prop_map(|(base_lr, weight_decay, betas)| Optim {
            base_lr,
            weight_decay,
            betas,
        });
        let scales = prop::collection::btree_map(any::<String>(), any::<f32>(), 0..3);
        let probe = any::<Option<u32>>().prop_map(|crop_px| crop_px.map(|crop_px| Probe { crop_px }));
        (run, model, optim, schedule, prop::collection::vec(stage, 0..3), probe, scales).prop_map(
            |(run, model, optim, schedule, stages, probe, lr_scale)| Recipe {
                run,
                model,
                optim,
                schedule,
                stages,
                probe,
                lr_scale,
            },
        )
    }

    proptest! {
        #[test]
        fn any_recipe_survives_being_annotated_and_read(recipe in any_recipe()) {
            let written = Resolved::<Recipe>::from_text("written", &toml::to_string(&recipe).unwrap()).unwrap();
            prop_assert_eq!(&written.value, &recipe);
            let saved = Resolved::<Recipe>::from_text("saved", &written.to_annotated_toml()).unwrap();
            prop_assert_eq!(&saved.value, &recipe);
        }
    }
}
