//! The student's side of a step: its forwards, and the losses of one micro-batch.

use burn::module::Module;
use burn::tensor::{Bool, Tensor, s};
use dinoxide_losses::{
    Loss, dino,
    feature::feature,
    gram::{Negatives, gram},
    ibot, koleo,
};
use dinoxide_model::{CropGroup, StochasticDraws};

use crate::batch::{Batch, DeviceMasks};
use crate::loss::{GramTokens, LossConfig, LossValues};
use crate::network::{Network, Seen, gather, rows};
use crate::step::StepDraws;
use crate::targets::{Guidance, Targets};

/// The terms of a micro-batch, or of a group of its crops; a mean over its own samples, except for iBOT (see [`ibot::masked_patches`]).
#[derive(Default)]
pub(crate) struct Terms {
    dino_global: Option<Loss>,
    dino_local: Option<Loss>,
    ibot: Option<Loss>,
    koleo: Option<Loss>,
    /// A scalar that carries KoLeo's gradient when its value belongs to the whole batch.
    koleo_graph: Option<Tensor<1>>,
    gram: Option<Loss>,
    feature_cls: Option<Loss>,
    feature_patch: Option<Loss>,
    relation: Option<Loss>,
    /// Pairs of global crops, and of local with global crops.
    pairs: (f64, f64),
}

/// What one micro-batch is judged by.
pub(crate) struct Judgement<'a> {
    pub(crate) config: &'a LossConfig,
    pub(crate) guidance: &'a Guidance,
    /// Gradient of KoLeo with respect to the CLS tokens, when it belongs to the whole batch.
    pub(crate) spread: Option<&'a Tensor<2>>,
    /// Samples of the whole batch.
    pub(crate) whole_batch: usize,
    /// Whether the student sees its masked patches all the same: under a frozen teacher, as in DINOv3.
    pub(crate) sees_all: bool,
}

impl Judgement<'_> {
    /// Whether a loss looks at patches that are not masked.
    fn looks_at_all_patches(&self) -> bool {
        let weights = &self.config.features;
        let matched = weights.patch_weight > 0.0 || weights.relation_weight > 0.0;
        self.guidance.gram.is_some() || (matched && self.guidance.features.is_some())
    }
}

/// The terms that the crops of one group have a part in. Targets that no other group needs are taken.
pub(crate) fn student_losses(
    student: &Network,
    part: &Batch,
    (group, draws): (CropGroup, &StochasticDraws),
    targets: &mut Targets,
    by: &Judgement<'_>,
) -> Terms {
    let mut terms = Terms { pairs: pairs(part, by.config), ..Terms::default() };
    match group {
        CropGroup::Global => global_losses(student, part, draws, targets, by, &mut terms),
        CropGroup::Local => local_losses(student, part, draws, targets, by, &mut terms),
    }
    terms
}

fn global_losses(
    student: &Network,
    part: &Batch,
    draws: &StochasticDraws,
    targets: &mut Targets,
    by: &Judgement<'_>,
    terms: &mut Terms,
) {
    let config = by.config;
    let masks = (config.ibot_weight > 0.0).then(|| DeviceMasks::new(&part.masks, &part.global.device()));
    let mask = masks.as_ref().filter(|_| !by.sees_all).map(|masks| Tensor::<2, Bool>::from_inner(masks.mask.clone()));
    let masked: &[usize] = if masks.is_some() { &part.masks.indices } else { &[] };
    let crops = tracked(part.global.clone());
    let global = Seen::new(&student.backbone, crops, mask, Some(draws), masked, by.looks_at_all_patches());

    guided_losses(student, part, &global, by, terms);
    if let Some(targets) = &targets.cls {
        let head = &student.dino_head;
        terms.dino_global = Some(dino::global(
            head.bottleneck(global.cls.clone()),
            head.last_layer.vectors(),
            targets.clone(),
            config.student_temp,
            config.ignore_diagonal,
            head.precision(),
        ));
    }
    if let (Some(masks), Some(targets)) = (masks, targets.patches.take()) {
        let head = student.patch_head();
        let bottleneck = head.bottleneck(global.masked);
        let crops = 2 * by.whole_batch;
        let loss = ibot::masked_patches(
            bottleneck,
            head.patch_prototypes().vectors(),
            targets,
            masks.weights,
            crops,
            config.student_temp,
            head.precision(),
        );
        terms.ibot = Some(loss);
    }
    if config.koleo_weight > 0.0 {
        match by.spread {
            None => terms.koleo = Some(koleo_per_crop(global.cls, 2, config)),
            Some(gradient) => terms.koleo_graph = Some((global.cls * tracked(gradient.clone())).sum()),
        }
    }
}

fn local_losses(
    student: &Network,
    part: &Batch,
    draws: &StochasticDraws,
    targets: &mut Targets,
    by: &Judgement<'_>,
    terms: &mut Terms,
) {
    if let (Some(crops), Some(targets)) = (by.config.local_crops(part), targets.cls.take()) {
        let head = &student.dino_head;
        let bottleneck = head.bottleneck(student.cls(tracked(crops), None, CropGroup::Local, Some(draws)));
        let vectors = head.last_layer.vectors();
        terms.dino_local = Some(dino::local(bottleneck, vectors, targets, by.config.student_temp, head.precision()));
    }
}

/// The losses on features: Gram anchoring, and the matching of a frozen teacher's tokens.
fn guided_losses(student: &Network, part: &Batch, global: &Seen, by: &Judgement<'_>, terms: &mut Terms) {
    let config = by.config;
    let patches = || global.patches.clone().expect("patches that a loss looks at are computed");
    if let Some(teacher) = &by.guidance.gram {
        let gram_config = &config.gram;
        let (ours, theirs) = match gram_config.per_image {
            true => (patches(), teacher.clone()),
            false => {
                let chosen = |tokens: Tensor<3>| {
                    let masked = match gram_config.tokens {
                        GramTokens::All => return rows(tokens).unsqueeze::<3>(),
                        GramTokens::Masked => true,
                        GramTokens::Unmasked => false,
                    };
                    let of = |i: &usize| part.masks.mask[*i] == masked;
                    let places: Vec<usize> = (0..part.masks.mask.len()).filter(of).collect();
                    gather(tokens, &places).unsqueeze::<3>()
                };
                (chosen(patches()), chosen(teacher.clone()))
            }
        };
        terms.gram = Some(gram(ours, theirs, gram_config.normalize, gram_config.negatives));
    }
    let Some(teacher) = &by.guidance.features else { return };
    let weights = &config.features;
    if let Some(projector) = &student.projector {
        terms.feature_cls = (weights.cls_weight > 0.0)
            .then(|| feature(projector.cls(global.cls.clone()), teacher.cls.clone(), weights.distance));
        terms.feature_patch = (weights.patch_weight > 0.0)
            .then(|| feature(projector.patches(rows(patches())), rows(teacher.patches.clone()), weights.distance));
    }
    terms.relation = (weights.relation_weight > 0.0).then(|| {
        let patches = gram(patches(), teacher.patches.clone(), true, Negatives::Keep);
        let cls = gram(global.cls.clone().unsqueeze(), teacher.cls.clone().unsqueeze(), true, Negatives::Keep);
        Loss { value: patches.value + cls.value, graph: patches.graph + cls.graph }
    });
}

fn koleo_per_crop(cls: Tensor<2>, crops: usize, config: &LossConfig) -> Loss {
    koleo::koleo_per_crop(cls, crops, config.koleo_neighbours, config.koleo_group)
}

/// KoLeo over a batch in several micro-batches.
pub(crate) struct Spread {
    /// The sum over the two global crops.
    pub(crate) value: Tensor<1>,
    /// Gradient of the sum over crops with respect to the CLS tokens of each micro-batch: `[2B, D]`, plain.
    pub(crate) gradients: Vec<Tensor<2>>,
}

pub(crate) fn koleo_of_parts(
    student: &Network,
    parts: &[Batch],
    draws: &StepDraws,
    config: &LossConfig,
    sees_all: bool,
) -> Spread {
    let student = student.valid();
    let cls: Vec<Tensor<3>> = parts
        .iter()
        .zip(draws)
        .map(|(part, draws)| {
            let masks =
                (config.ibot_weight > 0.0 && !sees_all).then(|| DeviceMasks::new(&part.masks, &part.global.device()));
            let mask = masks.map(|m| m.mask);
            let cls = student.cls(part.global.clone(), mask, CropGroup::Global, Some(&draws[0]));
            let [rows, dim] = cls.dims();
            cls.reshape([2, rows / 2, dim])
        })
        .collect();
    let cls = Tensor::cat(cls, 1);
    let [crops, batch, dim] = cls.dims();
    let cls = Tensor::<2>::from_inner(cls.reshape([crops * batch, dim])).require_grad();
    let loss = koleo_per_crop(cls.clone(), crops, config);
    let gradient = cls.grad(&loss.graph.backward()).expect("KoLeo depends on every CLS token");
    let gradient = gradient.reshape([crops, batch, dim]);
    let mut first = 0;
    let gradients = parts.iter().map(|part| {
        let samples = first..first + part.len();
        first = samples.end;
        gradient.clone().slice(s![.., samples, ..]).reshape([crops * part.len(), dim])
    });
    Spread { value: loss.value, gradients: gradients.collect() }
}

/// Pairs of (student crop, teacher crop): global with global, local with global.
fn pairs(batch: &Batch, config: &LossConfig) -> (f64, f64) {
    let global = if config.ignore_diagonal { 2.0 } else { 4.0 };
    (global, batch.local.as_ref().map_or(0.0, |local| 2.0 * local.dims()[0] as f64))
}

/// Weights of the global and local DINO terms: together a mean over all pairs when `local_weight` is 1.
fn dino_weights((global, local): (f64, f64), config: &LossConfig) -> (f64, f64) {
    let all = global + local;
    (config.dino_weight * global / all, config.dino_weight * config.local_weight * local / all)
}

/// The scalar to minimise on one micro-batch. `None` if every term is left out.
pub(crate) fn weighted_sum(terms: Terms, share: f64, config: &LossConfig) -> Option<Tensor<1>> {
    let (global, local) = dino_weights(terms.pairs, config);
    let parts = [
        terms.dino_global.map(|l| l.graph * (global * share)),
        terms.dino_local.map(|l| l.graph * (local * share)),
        terms.ibot.map(|l| l.graph * config.ibot_weight),
        terms.koleo.map(|l| l.graph * config.koleo_weight),
        terms.koleo_graph.map(|graph| graph * config.koleo_weight),
        terms.gram.map(|l| l.graph * (config.gram.weight * share)),
        terms.feature_cls.map(|l| l.graph * (config.features.cls_weight * share)),
        terms.feature_patch.map(|l| l.graph * (config.features.patch_weight * share)),
        terms.relation.map(|l| l.graph * (config.features.relation_weight * share)),
    ];
    parts.into_iter().flatten().reduce(|sum, part| sum + part)
}

/// The loss values of a step while they are on the device.
#[derive(Default)]
pub(crate) struct UnreadLosses {
    values: Vec<(Field, f64, Tensor<1>)>,
}

/// Where a value belongs.
type Field = fn(&mut LossValues) -> &mut Option<f64>;

impl UnreadLosses {
    /// Adds a micro-batch's terms, each of which counts as its `share` where it is a mean over samples.
    pub(crate) fn add(&mut self, terms: &Terms, share: f64) {
        let mut add = |field: Field, loss: &Option<Loss>, factor: f64| {
            self.values.extend(loss.as_ref().map(|loss| (field, factor, loss.value.clone())));
        };
        add(|l| &mut l.dino_global, &terms.dino_global, share);
        add(|l| &mut l.dino_local, &terms.dino_local, share);
        add(|l| &mut l.ibot, &terms.ibot, 1.0);
        add(KOLEO, &terms.koleo, 1.0 / CROPS);
        add(|l| &mut l.gram, &terms.gram, share);
        add(|l| &mut l.feature_cls, &terms.feature_cls, share);
        add(|l| &mut l.feature_patch, &terms.feature_patch, share);
        add(|l| &mut l.relation, &terms.relation, share);
    }

    /// Adds KoLeo of a batch in several micro-batches.
    pub(crate) fn add_koleo(&mut self, spread: &Spread) {
        self.values.push((KOLEO, 1.0 / CROPS, spread.value.clone()));
    }

    /// A number for each value, in their order.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = Tensor<1>> {
        self.values.iter().map(|(_, _, value)| value.clone())
    }

    /// The [`tensors`](Self::tensors) after they were read.
    pub(crate) fn read(self, numbers: impl IntoIterator<Item = f32>) -> LossValues {
        let mut losses = LossValues::default();
        for ((field, factor, _), number) in self.values.into_iter().zip(numbers) {
            *field(&mut losses).get_or_insert(0.0) += f64::from(number) * factor;
        }
        losses
    }
}

const KOLEO: Field = |losses| &mut losses.koleo;

/// Global crops, whose mean the value of KoLeo is.
const CROPS: f64 = 2.0;

pub(crate) fn total(losses: &LossValues, config: &LossConfig, batch: &Batch) -> f64 {
    let (global, local) = dino_weights(pairs(batch, config), config);
    global * losses.dino_global.unwrap_or(0.0)
        + local * losses.dino_local.unwrap_or(0.0)
        + config.ibot_weight * losses.ibot.unwrap_or(0.0)
        // The objective sums KoLeo over the two global crops; the value is their mean.
        + config.koleo_weight * 2.0 * losses.koleo.unwrap_or(0.0)
        + config.gram.weight * losses.gram.unwrap_or(0.0)
        + config.features.cls_weight * losses.feature_cls.unwrap_or(0.0)
        + config.features.patch_weight * losses.feature_patch.unwrap_or(0.0)
        + config.features.relation_weight * losses.relation.unwrap_or(0.0)
}

/// A plain tensor as a constant of the autodiff graph.
fn tracked<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    Tensor::from_inner(tensor)
}
