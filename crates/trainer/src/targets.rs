//! The teacher's side of a step: what it says of the crops, and the targets made of that.

use burn::tensor::{Tensor, s};
use dinoxide_losses::{center::Center, sinkhorn::sinkhorn_knopp};
use dinoxide_model::{Architecture, Backbone, ProjectionHead, interpolation::resize_tokens};
use serde::{Deserialize, Serialize};

use crate::batch::{Batch, TeacherTokens};
use crate::loss::{CenterOver, Centering, EMA, GramConfig, LossConfig};
use crate::network::{Seen, flat, rows};
use crate::schedule::Scheduled;
use crate::step::TrainState;

/// What the teacher's targets look like; each has `ln K` as its ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetEntropy {
    /// Mean entropy of a target, in nats: 0 when each names a single prototype, ln K when none says anything.
    pub conditional: f64,
    /// Entropy of the mean target, in nats: 0 when all name the same prototype, ln K when all prototypes are used.
    pub marginal: f64,
}

/// Targets of one micro-batch. Plain.
pub(crate) struct Targets {
    /// `[2, B, K]`, with a DINO loss.
    pub(crate) cls: Option<Tensor<3>>,
    /// `[M, K']`, with an iBOT loss.
    pub(crate) patches: Option<Tensor<2>>,
}

/// A network that does not train and tells the student what to say. Its heads may be missing where no loss asks for them.
#[derive(Clone, Debug)]
pub struct FrozenTeacher {
    /// What the backbone is.
    pub architecture: Architecture,
    /// The backbone; `None` where its tokens come with every batch.
    pub backbone: Option<Backbone>,
    /// The head of CLS tokens.
    pub dino_head: Option<ProjectionHead>,
    /// The head of patch tokens; `None` where they share that of CLS tokens.
    pub ibot_head: Option<ProjectionHead>,
}

impl FrozenTeacher {
    /// Its tokens of the global crops, `parts` of the samples at a time.
    ///
    /// # Panics
    /// Without a backbone.
    pub fn tokens(&self, batch: &Batch, parts: usize) -> TeacherTokens {
        let backbone = self.backbone.as_ref().expect("a teacher in memory");
        let tokens = batch.divide(parts).iter().map(|part| tokens_of(backbone, part)).collect();
        TeacherTokens::join(tokens)
    }
}

fn tokens_of(backbone: &Backbone, part: &Batch) -> TeacherTokens {
    let features = backbone.forward(flat(part.global.clone()), None);
    let ([rows, dim], [_, patches, _]) = (features.cls.dims(), features.patches.dims());
    TeacherTokens {
        cls: features.cls.reshape([2, rows / 2, dim]),
        patches: features.patches.reshape([2, rows / 2, patches, dim]),
    }
}

/// The networks that a student learns from. Plain.
#[derive(Clone, Copy)]
struct Teacher<'a> {
    backbone: Option<&'a Backbone>,
    dino_head: Option<&'a ProjectionHead>,
    patch_head: Option<&'a ProjectionHead>,
}

impl<'a> Teacher<'a> {
    /// The frozen teacher if there is one, else the student's running mean.
    fn of(state: &'a TrainState) -> Self {
        match &state.frozen {
            Some(frozen) => Self {
                backbone: frozen.backbone.as_ref(),
                dino_head: frozen.dino_head.as_ref(),
                patch_head: frozen.ibot_head.as_ref().or(frozen.dino_head.as_ref()),
            },
            None => Self {
                backbone: Some(&state.teacher.backbone),
                dino_head: Some(&state.teacher.dino_head),
                patch_head: Some(state.teacher.patch_head()),
            },
        }
    }
}

/// What the teachers say of one micro-batch. Plain.
pub(crate) struct TeacherOutputs {
    /// `[2B, K]`, with a DINO loss.
    cls: Option<Tensor<2>>,
    /// `[M, K']`, masked patches, with an iBOT loss.
    patches: Option<Tensor<2>>,
    /// `[1, K']`, the mean over all patches of the micro-batch, where a center asks for it.
    all_patches_mean: Option<Tensor<2>>,
    /// What the losses on features compare with.
    pub(crate) guidance: Guidance,
}

/// Tokens of the global crops, `[2B, D]` and `[2B, P, D]`. Plain.
#[derive(Clone)]
pub(crate) struct Tokens {
    pub(crate) cls: Tensor<2>,
    pub(crate) patches: Tensor<3>,
}

/// Features that the student's are compared with. Plain.
pub(crate) struct Guidance {
    /// The frozen teacher's, patches on the student's grid; with a loss on features.
    pub(crate) features: Option<Tokens>,
    /// `[2B, P, D']`, patches of the Gram teacher on the student's grid; with a Gram loss.
    pub(crate) gram: Option<Tensor<3>>,
}

/// The teacher sees the global crops, unmasked; no gradient reaches it.
pub(crate) fn teacher_outputs(state: &TrainState, part: &Batch, config: &LossConfig) -> TeacherOutputs {
    let teacher = Teacher::of(state);
    let center_of_all = config.patch_center == CenterOver::All && config.centering == Centering::Softmax;
    let masked: &[usize] = if config.ibot_weight > 0.0 { &part.masks.indices } else { &[] };
    let seen = match &part.tokens {
        Some(TeacherTokens { cls, patches }) => {
            let ([views, batch, dim], [_, _, count, _]) = (cls.dims(), patches.dims());
            let cls = cls.clone().reshape([views * batch, dim]);
            Seen::of_all(cls, patches.clone().reshape([views * batch, count, dim]), masked)
        }
        None => {
            let backbone = teacher.backbone.expect("a teacher in memory, or its tokens in the batch");
            let gram = config.gram.weight > 0.0 && state.gram_teacher.is_none() && config.gram.teacher == EMA;
            // Of a frozen teacher all tokens, so that they are, to the bit, those that several students share.
            let wanted = state.frozen.is_some() || gram || (config.ibot_weight > 0.0 && center_of_all);
            Seen::new(backbone, part.global.clone(), None, None, masked, wanted)
        }
    };
    let guidance = guidance(state, part, &seen, config);
    let cls = (config.dino_weight > 0.0).then(|| required(teacher.dino_head).forward(seen.cls));
    if config.ibot_weight == 0.0 {
        return TeacherOutputs { cls, patches: None, all_patches_mean: None, guidance };
    }
    let head = required(teacher.patch_head);
    let all_patches_mean = seen.patches.filter(|_| center_of_all).map(|patches| {
        // Logits are linear in the bottleneck: the mean of the logits is the logits of the mean. In single precision,
        // as all of centering.
        let bottleneck = head.bottleneck(rows(patches));
        bottleneck.mean_dim(0).matmul(head.patch_prototypes().vectors().transpose())
    });
    let patches = head.forward_patches(seen.masked);
    TeacherOutputs { cls, patches: Some(patches), all_patches_mean, guidance }
}

fn required(head: Option<&ProjectionHead>) -> &ProjectionHead {
    head.expect("the recipe was checked for heads")
}

/// Of what the teacher has `seen` in the global crops, and of the Gram teacher's tokens, those that a loss asks for.
fn guidance(state: &TrainState, part: &Batch, seen: &Seen, config: &LossConfig) -> Guidance {
    let patches = || seen.patches.clone().expect("patches that a loss compares with are computed");
    let size = |crops: &Tensor<5>| (crops.dims()[3], crops.dims()[4]);
    let grid = |architecture: &Architecture, (height, width): (usize, usize)| {
        architecture.grid(height, width).expect("the recipe was checked for sizes")
    };
    let own = grid(&state.teacher.backbone.architecture(), size(&part.global));
    let GramConfig { resize, antialias, .. } = config.gram;
    let resized = |patches: Tensor<3>, from| resize_tokens(patches, from, own, resize, antialias);
    let matched = state.frozen.as_ref().filter(|_| config.features.is_used()).map(|frozen| {
        let from = grid(&frozen.architecture, size(&part.global));
        Tokens { cls: seen.cls.clone(), patches: resized(patches(), from) }
    });
    let gram = (config.gram.weight > 0.0).then(|| match (&state.gram_teacher, config.gram.teacher.as_str()) {
        (Some(backbone), _) => {
            let crops = part.gram.as_ref().unwrap_or(&part.global);
            let patches = backbone.forward(flat(crops.clone()), None).patches;
            Some(resized(patches, grid(&backbone.architecture(), size(crops))))
        }
        (None, EMA) => Some(patches()),
        // The snapshot is not due yet.
        (None, _) => None,
    });
    Guidance { features: matched, gram: gram.flatten() }
}

/// Targets of each micro-batch from the logits of all, with the [`TargetEntropy`] of the CLS targets, `[2]`. Logits that no
/// center will ask for are taken, and their memory with them.
pub(crate) fn center(
    state: &TrainState,
    logits: &mut [TeacherOutputs],
    config: &LossConfig,
    at: &Scheduled,
) -> (Vec<Targets>, Option<Tensor<1>>) {
    let rows = |logits: &Option<Tensor<2>>| logits.as_ref().map(|logits| logits.dims()[0]);
    let counts: Vec<_> = logits.iter().map(|l| (rows(&l.cls), rows(&l.patches))).collect();
    // The targets of all micro-batches as one tensor; `None` when the recipe leaves out the loss that they are for.
    let targets = |logits: Vec<&mut Option<Tensor<2>>>, center: &Center, temperature: f64| {
        let keep = config.centering == Centering::Softmax;
        let own = logits.into_iter().map(|logits| if keep { logits.clone() } else { logits.take() });
        let mut all = own.collect::<Option<Vec<_>>>()?;
        let all = if all.len() == 1 { all.remove(0) } else { Tensor::cat(all, 0) };
        Some(match config.centering {
            Centering::Sinkhorn => sinkhorn_knopp(all, temperature, config.sinkhorn_iterations),
            Centering::Softmax => center.targets(all, temperature),
        })
    };
    let cls = targets(logits.iter_mut().map(|l| &mut l.cls).collect(), &state.cls_center, at.teacher_temp);
    let patches =
        targets(logits.iter_mut().map(|l| &mut l.patches).collect(), &state.patch_center, at.teacher_patch_temp);
    let (mut first_cls, mut first_patch) = (0, 0);
    // The rows of a micro-batch among all.
    let own = |all: &Option<Tensor<2>>, first: &mut usize, count: Option<usize>| {
        let (all, count) = (all.as_ref()?, count?);
        *first += count;
        Some(all.clone().slice(s![*first - count..*first, ..]))
    };
    let parts = counts.into_iter().map(|(cls_rows, patch_rows)| {
        let cls = own(&cls, &mut first_cls, cls_rows).map(|targets| {
            let [rows, prototypes] = targets.dims();
            targets.reshape([2, rows / 2, prototypes])
        });
        Targets { cls, patches: own(&patches, &mut first_patch, patch_rows) }
    });
    let parts = parts.collect();
    (parts, cls.map(target_entropy))
}

/// Conditional and marginal entropy, `[2]`.
fn target_entropy(targets: Tensor<2>) -> Tensor<1> {
    let entropy = |p: Tensor<2>| (p.clone() * p.clamp_min(1e-30).log()).sum().neg();
    let rows = targets.dims()[0] as f64;
    let marginal = entropy(targets.clone().mean_dim(0));
    Tensor::cat(vec![entropy(targets) / rows, marginal], 0)
}

/// Moves the centers towards this batch's logits; the next step's targets are the first to see it.
pub(crate) fn update_centers(state: &mut TrainState, logits: &[TeacherOutputs], parts: &[Batch], config: &LossConfig) {
    if config.centering != Centering::Softmax {
        return;
    }
    let all = |of: fn(&TeacherOutputs) -> &Option<Tensor<2>>| {
        let found: Vec<Tensor<2>> = logits.iter().filter_map(|logits| of(logits).clone()).collect();
        (!found.is_empty()).then(|| Tensor::cat(found, 0))
    };
    if let Some(cls) = all(|logits| &logits.cls) {
        state.cls_center.update(cls);
    }
    let patches = match config.patch_center {
        CenterOver::Masked => all(|logits| &logits.patches),
        CenterOver::All => {
            // Micro-batches have the same number of patches per sample, but not of samples.
            let samples: usize = parts.iter().map(Batch::len).sum();
            let shares = logits.iter().zip(parts).filter_map(|(logits, part)| {
                Some(logits.all_patches_mean.clone()? * (part.len() as f64 / samples as f64))
            });
            shares.reduce(|sum, share| sum + share)
        }
    };
    if let Some(patches) = patches {
        state.patch_center.update(patches);
    }
}
