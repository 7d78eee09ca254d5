//! What a step of a fixture `train_*` leaves behind: weights of student and teacher, and the optimizer's moments.

use std::{cell::Cell, collections::BTreeMap};

use burn::{module::Module, tensor::Tensor};
use dinoxide_model::parameters;
use dinoxide_testkit::{Array, Check, Fixture, Tolerance};
use dinoxide_trainer::step::TrainState;
use serde_json::Value;

use crate::{heads, recipes::Recipe, tensors::array, vit};

/// A parameter's name in the network for its name in a reference; `None` for buffers.
pub(crate) fn parameter(name: &str) -> Option<String> {
    let (submodule, inner) = name.split_once('.').expect("a parameter lies in a submodule");
    match submodule {
        "backbone" => Some(format!("backbone.{}", vit::parameter(inner)?)),
        "head" => Some(format!("dino_head.{}", heads::parameter(inner))),
        _ => Some(format!("{submodule}.{}", heads::parameter(inner))),
    }
}

/// The position of a bias of keys among the biases of queries, keys and values.
///
/// Without rotary positions it changes no attention weight: its gradient is zero but for rounding, which Adam turns into
/// steps as long as any other.
fn is_void(recipe: &Recipe, name: &str, index: usize) -> bool {
    let dim = recipe.backbone.embed_dim;
    recipe.backbone.rope.is_none() && name.ends_with("attn.qkv.bias") && (dim..2 * dim).contains(&index)
}

/// A gradient below which rounding may turn Adam's step around.
const NEXT_TO_NOTHING: f64 = 1e-6;

/// Everything that a step has changed, beside what it is in the reference.
pub(crate) struct Comparison<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) state: &'a TrainState,
    pub(crate) steps_done: usize,
    /// Sum of the learning rates of the steps.
    pub(crate) lr_so_far: f64,
}

impl Comparison<'_> {
    /// Compares norms of everything and, where the fixture has them, all values.
    pub(crate) fn all(&self, check: &mut Check, step: &Value) {
        for kind in ["student", "ema", "adam_m", "adam_v"] {
            let values = self.values(kind);
            self.norms(check, step, kind, &values);
            self.tensors(check, kind, &values);
        }
        // Stated after the first step, and where it has changed.
        if step["norms"]["gram_teacher"].is_array() {
            self.norms(check, step, "gram_teacher", &self.values("gram_teacher"));
        }
    }

    /// By our names; without those that the optimizer has not met yet.
    fn values(&self, kind: &str) -> BTreeMap<String, Vec<f32>> {
        let host = |values: BTreeMap<String, Tensor<1>>| {
            values.into_iter().map(|(name, value)| (name, array(value).values)).collect::<BTreeMap<_, _>>()
        };
        let moments = self.state.optimizer.moments.iter().filter(|(_, moments)| moments.steps > 0);
        match kind {
            "student" => host(parameters::values(&self.state.student.valid())),
            "ema" => host(parameters::values(&self.state.teacher)),
            "gram_teacher" => {
                let backbone = self.state.gram_teacher.as_ref().expect("a Gram teacher");
                let named = |(name, value)| (format!("backbone.{name}"), value);
                host(parameters::values(backbone).into_iter().map(named).collect())
            }
            "adam_m" => host(moments.map(|(name, moments)| (name.clone(), moments.m.clone())).collect()),
            _ => host(moments.map(|(name, moments)| (name.clone(), moments.v.clone())).collect()),
        }
    }

    /// What the fixture states for `step1` or, later, for `step6`.
    fn tolerance(&self, check: &Check, kind: &str) -> Tolerance {
        let stated = &check.fixture.json()["tolerance"];
        // A Gram teacher is a copy of the teacher.
        let kind = if kind == "gram_teacher" { "ema" } else { kind };
        let of = |step: &str| {
            let kind = &stated[step][kind];
            Some(Tolerance { atol: kind["atol"].as_f64()?, rtol_of_max: kind["rtol_of_max"].as_f64()? })
        };
        let first = if self.steps_done == 1 { of("step1") } else { None };
        first.or_else(|| of("step6")).expect("a tolerance of every kind of tensor")
    }

    /// `step<n>.<kind>.*`, element by element.
    ///
    /// Adam divides by a root of squares: an element whose true gradient is next to nothing may be off by the learning
    /// rate in each step. One in a thousand elements of a kind may be, if its gradient is that small.
    fn tensors(&self, check: &mut Check, kind: &str, values: &BTreeMap<String, Vec<f32>>) {
        let fixture = check.fixture;
        let prefix = format!("step{}.{kind}.", self.steps_done);
        let tolerance = self.tolerance(check, kind);
        let (elements, outliers) = (Cell::new(0usize), Cell::new(0usize));
        for name in fixture.names(&prefix) {
            let expected = fixture.floats(name);
            let Some(parameter) = parameter(&name[prefix.len()..]) else { continue };
            let Some(values) = values.get(&parameter).filter(|values| values.len() == expected.values.len()) else {
                check.failure(&format!("{name}: there is no such parameter of this size"));
                continue;
            };
            elements.set(elements.get() + values.len());
            let largest = expected.values.iter().fold(0.0f64, |largest, v| largest.max(f64::from(v.abs())));
            let allowed = tolerance.atol + tolerance.rtol_of_max * largest;
            let gradient = self.gradient_scale(check.fixture, &name[prefix.len()..]);
            let excused = |i: usize, value: f32| {
                let off = (f64::from(value) - f64::from(expected.values[i])).abs();
                let outlier = matches!(kind, "student" | "ema")
                    && (off > allowed && off <= self.lr_so_far)
                    && gradient.as_ref().is_some_and(|gradient| gradient[i] < NEXT_TO_NOTHING);
                outliers.set(outliers.get() + usize::from(outlier && !is_void(self.recipe, &parameter, i)));
                outlier || is_void(self.recipe, &parameter, i)
            };
            let found = values.iter().enumerate();
            let found = found.map(|(i, &v)| if excused(i, v) { expected.values[i] } else { v }).collect();
            check.values(name, &expected, &Array { shape: expected.shape.clone(), values: found }, tolerance);
        }
        if elements.get() > 0 && matches!(kind, "student" | "ema") {
            let allowed = Tolerance { atol: 1e-3 * elements.get() as f64, rtol_of_max: 0.0 };
            check.number(&format!("{prefix} outliers"), 0.0, outliers.get() as f64, allowed);
        }
    }

    /// How large the reference's gradients of each element of a tensor were; `None` where it has no moments.
    fn gradient_scale(&self, fixture: &Fixture, name: &str) -> Option<Vec<f64>> {
        let (beta1, beta2) = (self.recipe.optim.beta1, self.recipe.optim.beta2);
        let steps = self.steps_done as i32;
        let of = |kind: &str| {
            let name = format!("step{}.{kind}.{name}", self.steps_done);
            fixture.has(&name).then(|| fixture.floats(&name).values.into_iter().map(f64::from))
        };
        match of("adam_v") {
            Some(v) => Some(v.map(|v| (v / (1.0 - beta2.powi(steps))).sqrt()).collect()),
            // The first moment alone tells the gradient only after one step, when it is a single one.
            None if steps == 1 => of("adam_m").map(|m| m.map(|m| (m / (1.0 - beta1)).abs()).collect()),
            None => None,
        }
    }

    /// `norms.<kind>`: the Euclidean norm of each tensor, of weights also the sum.
    ///
    /// They may be as far off as the tolerance of every single element allows, and by their seventh digit.
    fn norms(&self, check: &mut Check, step: &Value, kind: &str, values: &BTreeMap<String, Vec<f32>>) {
        let tolerance = self.tolerance(check, kind);
        let names = &check.fixture.json()["norm_names"];
        let names = names[kind].as_array().or(names[if kind == "adam_v" { "adam_m" } else { "student" }].as_array());
        let stated = step["norms"][kind].as_array().expect("norms");
        let names = names.expect("names");
        assert!(stated.len() <= names.len(), "`norms.{kind}`: a name for each norm");
        // Parameters that the optimizer has not met yet are `null`, or left out at the end of the list.
        for (name, stated) in names.iter().zip(stated.iter().chain(std::iter::repeat(&Value::Null))) {
            let name = name.as_str().expect("a name");
            let case = format!("step {}: norm of {kind} {name}", self.steps_done);
            let Some(parameter) = parameter(name) else { continue };
            let found = values.get(&parameter);
            let (norm, sum) = (stated.as_f64().or(stated[0].as_f64()), stated[1].as_f64());
            let (Some(norm), Some(found)) = (norm, found) else {
                if norm.is_some() || found.is_some() {
                    check.failure(&format!("{case}: only one of the two has it"));
                }
                continue;
            };
            if (0..found.len()).any(|i| is_void(self.recipe, &parameter, i)) && matches!(kind, "student" | "ema") {
                continue;
            }
            let count = found.len() as f64;
            let square: f64 = found.iter().map(|&v| f64::from(v).powi(2)).sum();
            let of_norm = Tolerance { atol: tolerance.atol * count.sqrt(), rtol_of_max: tolerance.rtol_of_max + 1e-6 };
            check.number(&case, norm, square.sqrt(), of_norm);
            if let Some(sum) = sum {
                let found: f64 = found.iter().map(|&v| f64::from(v)).sum();
                let of_sum = Tolerance { atol: tolerance.atol * count, rtol_of_max: 1e-6 };
                check.number(&format!("{case} (sum)"), sum, found, of_sum);
            }
        }
    }
}
