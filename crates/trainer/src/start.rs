//! The state of a run before its first step: fresh or trained weights, and the teachers that do not train.

use std::path::Path;

use burn::tensor::{Device, FloatDType};
use dinoxide_model::{Precision, Projector, parameters};
use dinoxide_random::{Purpose, stream};

use crate::checkpoint;
use crate::error::TrainError;
use crate::loss::{EMA, SNAPSHOT};
use crate::network::Network;
use crate::pretrained::{Pretrained, Take, described_differences, is_run, misfit};
use crate::recipe::{Plan, Recipe};
use crate::step::TrainState;
use crate::targets::FrozenTeacher;

/// A run before its first step.
pub(crate) struct Initial {
    pub(crate) state: TrainState,
    /// With the backbone as it is in the state.
    pub(crate) plan: Plan,
    /// What there is to say about weights that were read.
    pub(crate) notes: Vec<String>,
}

/// Reads what the recipe names and checks it against the rest, before anything is written to `directory`.
pub(crate) fn initial(
    config: &Recipe,
    mut plan: Plan,
    teacher: Option<&Pretrained>,
    directory: &Path,
    device: &Device,
) -> Result<Initial, TrainError> {
    check_device(config, device)?;
    let mut notes = Vec::new();
    if config.init.take == Take::State && !is_run(Path::new(&config.init.from)) {
        return Err(misfit(
            "init.take",
            format!(
                "\"state\", and {} is not the directory of a run\n\nhint: `init.take = \"weights\"` takes weights alone",
                config.init.from
            ),
        ));
    }
    let init = match config.init.from.as_str() {
        "" => None,
        from => Some(Pretrained::open("init.from", from, device)?),
    };
    if let Some(init) = &init {
        notes.extend(init.notes.iter().cloned());
        notes.extend(init.fit(&mut plan.backbone)?);
    }
    let mut rng = stream(config.train.seed, Purpose::Init, 0, 0);
    let tracked = device.clone().autodiff();
    let mut student = Network::new(&plan.backbone, &config.dino_head, config.patch_head(), &tracked, &mut rng);
    let frozen = teacher.map(|teacher| frozen_teacher(config, &plan, teacher, &mut notes)).transpose()?;
    if let Some(frozen) = frozen.as_ref().filter(|_| config.loss.features.projects()) {
        let (from, to) = (plan.backbone.embed_dim(), frozen.architecture.embed_dim());
        student.projector = Some(Projector::new(from, to, &tracked, &mut rng));
    }
    if let Some(init) = &init {
        let (network, kept) = init.put_into(student, device);
        student = network;
        notes.push(format!("student and teacher start from {}", init.from));
        notes.extend(kept);
    }
    student = student.with_precision(config.train.precision);
    student.backbone = student.backbone.recomputing(config.efficiency.recompute);
    let mut state = TrainState::of(student, &config.optim, &config.loss, device);
    state.frozen = frozen;
    let gram = &config.loss.gram;
    if gram.weight > 0.0 && gram.teacher != EMA && gram.teacher != SNAPSHOT {
        let Pretrained { backbone, notes: read, .. } = Pretrained::open("loss.gram.teacher", &gram.teacher, device)?;
        for choice in config.augmentation.choices() {
            let size = if choice.gram_crop_size > 0 { choice.gram_crop_size } else { choice.global_crop_size };
            backbone.architecture().grid(size, size).map_err(|e| {
                misfit("augmentation.gram_crop_size", format!("the Gram teacher {} cannot see it: {e}", gram.teacher))
            })?;
        }
        let differences = described_differences(&plan.backbone, &backbone.architecture());
        let shapes = (parameters::shapes(&backbone), parameters::shapes(&state.teacher.backbone));
        if plan.schedule.gram_refresh.every > 0 && (!differences.is_empty() || shapes.0 != shapes.1) {
            return Err(misfit(
                "loss.gram.refresh_every",
                format!(
                    "the Gram teacher {} has another backbone than the run, whose teacher is to replace it{}\n\nhint: set \
                     `loss.gram.refresh_every = \"0 steps\"`",
                    gram.teacher,
                    differences.iter().map(|line| format!("\n{line}")).collect::<String>()
                ),
            ));
        }
        notes.extend(read);
        state.gram_teacher = Some(backbone.with_precision(config.train.precision));
    }
    if !checkpoint::any(&directory.join("checkpoints"))? {
        if config.init.take == Take::State {
            checkpoint::continue_from(&Path::new(&config.init.from).join("checkpoints"), &mut state, device)?;
        }
        if plan.schedule.gram_refresh.is_due(0) {
            state.gram_teacher = Some(state.teacher.backbone.clone());
        }
    }
    Ok(Initial { state, plan, notes })
}

/// An error if the recipe's precision is none of the device's.
pub(crate) fn check_device(config: &Recipe, device: &Device) -> Result<(), TrainError> {
    match config.train.precision {
        Precision::Bf16 if !device.supports_dtype(FloatDType::BF16) => Err(TrainError::Recipe(format!(
            "`train.precision` is \"bf16\" and `run.device` \"{}\", which does not compute with bfloat16\n\nhint: set \
             `train.precision = \"fp32\"`",
            config.run.device
        ))),
        _ => Ok(()),
    }
}

/// The teacher of a distillation, checked against the student.
fn frozen_teacher(
    config: &Recipe,
    plan: &Plan,
    teacher: &Pretrained,
    notes: &mut Vec<String>,
) -> Result<FrozenTeacher, TrainError> {
    const KEY: &str = Pretrained::TEACHER;
    let (loss, from) = (&config.loss, &teacher.from);
    for choice in config.augmentation.choices() {
        let size = choice.global_crop_size;
        let theirs =
            teacher.backbone.architecture().grid(size, size).map_err(|e| misfit(KEY, format!("{from}: {e}")))?;
        let own = plan.backbone.grid(size, size).expect("the plan has checked the size of the crops");
        if loss.ibot_weight > 0.0 && theirs != own {
            return Err(misfit(
                KEY,
                format!(
                    "{from}: crops of {size} px are {} × {} patches to it and {} × {} to the student, and \
                     `loss.ibot_weight` is {}\n\nhint: set `loss.ibot_weight = 0`; `loss.features.patch_weight` matches \
                     patches of different sizes",
                    theirs.0, theirs.1, own.0, own.1, loss.ibot_weight
                ),
            ));
        }
    }
    let patch_head = config.patch_head().unwrap_or(&config.dino_head);
    let patches = patch_head.patch_prototypes.unwrap_or(patch_head.prototypes);
    let heads = [
        ("loss.dino_weight", loss.dino_weight, "dino_head.prototypes", config.dino_head.prototypes, &teacher.dino_head),
        (
            "loss.ibot_weight",
            loss.ibot_weight,
            "ibot_head.prototypes",
            patches,
            if teacher.ibot_head.is_some() { &teacher.ibot_head } else { &teacher.dino_head },
        ),
    ];
    for (weight_key, weight, key, own, head) in heads {
        if weight == 0.0 {
            continue;
        }
        let Some(head) = head else {
            return Err(misfit(
                KEY,
                format!(
                    "{from} has no heads, and `{weight_key}` is {weight}\n\nhint: give the directory of a run, or set \
                     `loss.dino_weight = 0` and `loss.ibot_weight = 0` and match features with `[loss.features]`"
                ),
            ));
        };
        let vectors = if weight_key == "loss.ibot_weight" { head.patch_prototypes() } else { &head.last_layer };
        let theirs = vectors.vectors().dims()[0];
        if theirs != own {
            return Err(misfit(
                KEY,
                format!("{from} has {theirs} prototypes, `{key}` is {own}\n\nhint: set `{key} = {theirs}`"),
            ));
        }
    }
    notes.extend(teacher.notes.iter().cloned());
    Ok(teacher.frozen(config.distillation.cache.is_empty(), config.train.precision))
}
