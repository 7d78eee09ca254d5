//! Fine-tuning: a linear classifier on the backbone's tokens, trained together with the whole backbone (the protocol of
//! BEiT and iBOT, without mixing of images).
//!
//! Train images are random crops; the learning rate falls from the classifier to the patch embedding, rises at first and then
//! falls along a cosine. After each epoch the network is scored on train images that it is not trained on; the best of these
//! states is scored once on val.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData, activation::log_softmax};
use dinoxide_augmentation::TrainTransform;
use dinoxide_kernels as kernels;
use dinoxide_model::{Architecture, Backbone, CropGroup, RopeDraw, StochasticDraws, parameters, weights::host};
use dinoxide_optimizer::{Gradients, Group, Moments, Update, accumulate, group};
use dinoxide_random::{Purpose, stream};
use serde::{Deserialize, Serialize};

use crate::{
    accuracy::{Accuracy, RankCounter, rank},
    bootstrap::{Interval, of_hits},
    error::EvaluationError,
    extract::{Batch, Extraction, for_each_batch, pixels},
    labels::check_classes,
    linear::scaled,
    linear_probe::{Outcome, cross_entropy, one_hot, standard_normal},
    protocol::{FeatureSource, Method, Protocol, Report},
    random_crops::{LabeledImages, RandomCrops},
    selection::{Selection, SelectionReport, draws, stratified_split},
};

const TASK: &str = "finetune";
/// Decays of the moments.
const BETAS: (f64, f64) = (0.9, 0.999);
/// Added to the root of the second moment.
const EPS: f64 = 1e-8;

/// Settings of [`finetune()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FinetuneConfig {
    /// Passes over the train images.
    pub epochs: usize,
    /// Images in an iteration.
    pub batch_size: usize,
    /// Highest learning rate, of the classifier, stated for batches of 256: the rate in use is `rate · batch_size / 256`.
    pub learning_rate: f64,
    /// Factor of the learning rate per block, from the last block down to the patch embedding; 1 is none.
    pub layer_decay: f64,
    /// Weight decay, of all but biases, norms and layer scales.
    pub weight_decay: f64,
    /// Share of the iterations in which the learning rate rises.
    pub warmup: f64,
    /// Share of the target that is spread over all classes.
    pub label_smoothing: f64,
    /// Rate of stochastic depth.
    pub drop_path: f64,
    /// Whether the classifier sees the mean patch token beside CLS.
    pub patches: bool,
    /// Share of train that is held out to choose the epoch.
    pub held_out: f64,
    /// Seed of the classifier's initial weights, order and crops of images, stochastic depth, and held-out images.
    pub seed: u64,
}

impl Default for FinetuneConfig {
    fn default() -> Self {
        Self {
            epochs: 20,
            batch_size: 128,
            learning_rate: 1e-3,
            layer_decay: 0.75,
            weight_decay: 0.05,
            warmup: 0.1,
            label_smoothing: 0.1,
            drop_path: 0.1,
            patches: false,
            held_out: 0.1,
            seed: 0,
        }
    }
}

impl FinetuneConfig {
    /// Checks the settings, before any image is read.
    ///
    /// # Errors
    /// The first that is out of range.
    pub fn validate(&self, architecture: &Architecture) -> Result<(), EvaluationError> {
        let refuse = |key, value: String, expected| Err(EvaluationError::Setting { task: TASK, key, value, expected });
        if self.epochs == 0 {
            return refuse("epochs", "0".into(), "at least 1");
        }
        if self.batch_size == 0 {
            return refuse("batch_size", "0".into(), "at least 1");
        }
        if !(self.learning_rate > 0.0 && self.learning_rate.is_finite()) {
            return refuse("learning_rate", self.learning_rate.to_string(), "above 0 and finite");
        }
        if !(self.layer_decay > 0.0 && self.layer_decay <= 1.0) {
            return refuse("layer_decay", self.layer_decay.to_string(), "above 0 and at most 1");
        }
        if matches!(architecture, Architecture::ConvNext(_)) && self.layer_decay != 1.0 {
            return refuse(
                "layer_decay",
                self.layer_decay.to_string(),
                "1 for a ConvNeXt, which has no blocks of one width",
            );
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return refuse("weight_decay", self.weight_decay.to_string(), "at least 0 and finite");
        }
        for (key, share) in
            [("warmup", self.warmup), ("label_smoothing", self.label_smoothing), ("drop_path", self.drop_path)]
        {
            if !(0.0..1.0).contains(&share) {
                return refuse(key, share.to_string(), "at least 0 and below 1");
            }
        }
        Ok(())
    }

    /// The classifier's learning rate at iteration `t` of `total`: linear to its peak, then half a cosine towards 0.
    fn rate(&self, t: usize, total: usize) -> f64 {
        let warmup = (self.warmup * total as f64).round() as usize;
        let factor = if t < warmup {
            (t + 1) as f64 / warmup as f64
        } else {
            0.5 * (1.0 + (std::f64::consts::PI * (t - warmup) as f64 / (total - warmup) as f64).cos())
        };
        scaled(self.learning_rate, self.batch_size) * factor
    }
}

/// How the network does after an epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochScore {
    /// The epoch, from 1.
    pub epoch: usize,
    /// Mean loss of its iterations, on random crops and smoothed targets, in nats.
    pub train_loss: f64,
    /// Accuracy on the held-out images.
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// Mean cross-entropy on them in nats; `None` if it is not finite.
    pub loss: Option<f64>,
}

/// Result of [`finetune()`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinetuneScores {
    /// Accuracy on val.
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// Of top-1.
    pub interval: Interval,
    /// Mean cross-entropy on val in nats; `None` if it is not finite.
    pub loss: Option<f64>,
    /// The epoch after which the network was scored.
    pub epoch: usize,
    /// What it was chosen on.
    pub selection: SelectionReport,
    /// All epochs.
    pub epochs: Vec<EpochScore>,
}

/// How far [`finetune()`] is.
#[derive(Clone, Debug, PartialEq)]
pub enum FinetuneProgress<'a> {
    /// Iterations done, and how many there will have been at the end.
    Iteration {
        /// Done.
        done: usize,
        /// At the end.
        total: usize,
    },
    /// The score of an epoch.
    Epoch(&'a EpochScore),
}

/// What [`finetune()`] trains and scores on.
#[derive(Clone, Copy)]
pub struct FinetuneImages<'a> {
    /// Images to train on, and to hold out from.
    pub train: LabeledImages<'a>,
    /// Images to score.
    pub val: LabeledImages<'a>,
    /// How they get into the backbone: random crops of its crop size, central ones as it says.
    pub how: &'a Extraction,
    /// How the protocol describes the features; its `augmentation` is filled in.
    pub source: &'a FeatureSource,
}

/// Trains `backbone` with a linear classifier on CLS (and the mean patch token), and scores the epoch that does best on
/// held-out train images on val. Gives the backbone of that epoch too.
///
/// The loss is the cross-entropy with smoothed targets; AdamW has a learning rate for each layer. The best epoch has the
/// highest top-1 accuracy; ties go to the lower cross-entropy, then to the earlier one.
///
/// # Errors
/// If settings are out of range, the splits do not fit together, an image that could be read no longer can, or the loss is
/// not finite.
pub fn finetune(
    backbone: &Backbone,
    images: FinetuneImages<'_>,
    config: &FinetuneConfig,
    device: &Device,
    progress: &mut dyn FnMut(FinetuneProgress<'_>),
) -> Result<(Report<FinetuneScores>, Backbone), EvaluationError> {
    let FinetuneImages { train, val, how, source } = images;
    config.validate(&backbone.architecture())?;
    let how = &Extraction { last_blocks: 1, ..how.clone() };
    how.check(&backbone.architecture())?;
    check_classes(train.labels, val.labels, train.num_classes)?;
    let split = stratified_split(train.labels, config.held_out, config.seed, TASK)?;

    let mut run = Run::new(backbone, train, config, device);
    let mut crops = RandomCrops::new(train, &split.fit, how.crop_px, config.seed);
    let per_epoch = split.fit.len().div_ceil(config.batch_size);
    let total = config.epochs * per_epoch;
    let mut epochs = Vec::<EpochScore>::with_capacity(config.epochs);
    let mut best: Option<(usize, Classifier)> = None;
    for epoch in 1..=config.epochs {
        let mut sum = 0.0;
        for t in (epoch - 1) * per_epoch..epoch * per_epoch {
            sum += run.step(&mut crops, how, t, config.rate(t, total))?;
            progress(FinetuneProgress::Iteration { done: t + 1, total });
        }
        let network = run.network.valid();
        let Outcome { accuracy, loss, .. } = network.score(train, Some(&split.held_out), how, device)?;
        let score = EpochScore { epoch, train_loss: sum / per_epoch as f64, accuracy, loss };
        progress(FinetuneProgress::Epoch(&score));
        let better = |other: &EpochScore| {
            let (own, best) = (score.accuracy.top1, other.accuracy.top1);
            own > best || (own == best && score.loss < other.loss)
        };
        if score.loss.is_some() && best.as_ref().is_none_or(|(i, _)| better(&epochs[*i])) {
            best = Some((epochs.len(), network));
        }
        epochs.push(score);
    }
    let learning_rate = config.learning_rate;
    let (chosen, network) =
        best.ok_or(EvaluationError::HeadDiverged { task: TASK, iteration: total - 1, learning_rate })?;
    let Outcome { accuracy, loss, hits } = network.score(val, None, how, device)?;
    let selection = Selection::HeldOut { fraction: config.held_out };
    let scores = FinetuneScores {
        accuracy,
        interval: of_hits(hits.into_iter()),
        loss,
        epoch: epochs[chosen].epoch,
        selection: SelectionReport::new(selection, split.held_out.len()),
        epochs,
    };
    let source = FeatureSource { augmentation: TrainTransform::DESCRIPTION.into(), ..source.clone() };
    let (train_samples, val_samples) = (Some(train.labels.len()), val.labels.len());
    let method = Method::Finetune(config.clone());
    let protocol = Protocol::new(method, vec![source], train_samples, val_samples, Some(train.num_classes));
    Ok((Report { protocol, scores }, network.backbone))
}

/// The backbone with a linear classifier.
#[derive(Module, Debug)]
struct Classifier {
    backbone: Backbone,
    head: Head,
    #[module(skip)]
    patches: bool,
}

/// The classifier proper.
#[derive(Module, Debug)]
struct Head {
    /// `[C, D]`, or `[C, 2·D]` with the mean patch token.
    weight: Param<Tensor<2>>,
    /// `[C]`.
    bias: Param<Tensor<1>>,
}

impl Classifier {
    /// A copy of the backbone that autodiff tracks, with a fresh classifier: weights `N(0, 0.01)`, biases 0.
    fn new(backbone: &Backbone, num_classes: usize, patches: bool, seed: u64, device: &Device) -> Self {
        let device = device.clone().autodiff();
        let architecture = backbone.architecture();
        // Every value is replaced; the stream only fills memory.
        let fresh = Backbone::new(&architecture, &device, &mut stream(0, Purpose::Init, 0, 0));
        let mut values = parameters::values(backbone);
        let tracked = parameters::replace(fresh, |name, _| values.remove(name).expect("the same architecture"));
        let width = architecture.embed_dim() * if patches { 2 } else { 1 };
        let mut rng = stream(seed, Purpose::Evaluation, draws::LINEAR_INIT, 0);
        let weight = standard_normal(num_classes * width, &mut rng).into_iter().map(|v| 0.01 * v).collect::<Vec<_>>();
        let weight = Tensor::<2>::from_data(TensorData::new(weight, [num_classes, width]), &device);
        let head = Head {
            weight: Param::from_tensor(weight),
            bias: Param::from_tensor(Tensor::zeros([num_classes], &device)),
        };
        Self { backbone: tracked, head, patches }
    }

    /// Class scores `[B, C]` of tokens.
    fn logits(&self, cls: Tensor<2>, patches: impl FnOnce() -> Tensor<3>) -> Tensor<2> {
        let input = if self.patches {
            let [batch, dim] = cls.dims();
            Tensor::cat(vec![cls, patches().mean_dim(1).reshape([batch, dim])], 1)
        } else {
            cls
        };
        kernels::linear(input, self.head.weight.val(), Some(self.head.bias.val()))
    }

    /// Class scores of random crops under given draws.
    fn train_logits(&self, pixels: Tensor<4>, draws: &StochasticDraws) -> Tensor<2> {
        if self.patches {
            let found = self.backbone.forward_train(pixels, None, CropGroup::Global, draws);
            self.logits(found.cls, || found.patches)
        } else {
            self.logits(self.backbone.cls_train(pixels, CropGroup::Global, draws), || unreachable!("CLS alone"))
        }
    }

    /// The scores of central crops: of the samples `rows`, or of all. On plain tensors.
    fn score(
        &self,
        images: LabeledImages<'_>,
        rows: Option<&[u32]>,
        how: &Extraction,
        device: &Device,
    ) -> Result<Outcome, EvaluationError> {
        let all: Vec<u32> = (0..images.labels.len() as u32).collect();
        let rows = rows.unwrap_or(&all);
        let indices: Vec<usize> = rows.iter().map(|&row| images.indices[row as usize]).collect();
        let (mut counter, mut sum, mut hits) = (RankCounter::default(), 0.0, Vec::with_capacity(rows.len()));
        let mut score = |batch: Batch| {
            let last = batch.layers.into_iter().next_back().expect("at least one block");
            let logits = host(self.logits(last.cls, || last.patches).reshape([-1]));
            for own in logits.chunks(images.num_classes) {
                let label = images.labels[rows[hits.len()] as usize] as usize;
                let rank = rank(own, label);
                counter.add(rank);
                sum += cross_entropy(own, label);
                hits.push(rank == Some(0));
            }
            Ok::<(), EvaluationError>(())
        };
        let rejected = for_each_batch(&self.backbone, images.source, &indices, how, device, &mut |_| (), &mut score)?;
        if let Some(lost) = rejected.first() {
            return Err(EvaluationError::Unreadable { image: lost.id.clone(), reason: lost.reason.clone() });
        }
        let loss = Some(sum / rows.len() as f64).filter(|loss: &f64| loss.is_finite());
        Ok(Outcome { accuracy: counter.accuracy(images.num_classes), loss, hits })
    }
}

/// A fine-tuning under way.
struct Run<'a> {
    network: Classifier,
    moments: BTreeMap<String, Moments>,
    groups: BTreeMap<String, Group>,
    /// The backbone's, with the rate of stochastic depth of this run.
    architecture: Architecture,
    images: LabeledImages<'a>,
    config: &'a FinetuneConfig,
    device: Device,
}

impl<'a> Run<'a> {
    fn new(backbone: &Backbone, images: LabeledImages<'a>, config: &'a FinetuneConfig, device: &Device) -> Self {
        let mut architecture = backbone.architecture();
        let depth = match &mut architecture {
            Architecture::Vit(vit) => {
                vit.drop_path_rate = config.drop_path;
                vit.depth
            }
            Architecture::ConvNext(convnext) => {
                convnext.drop_path_rate = config.drop_path;
                0
            }
        };
        let network = Classifier::new(backbone, images.num_classes, config.patches, config.seed, device);
        let (mut moments, mut groups) = (BTreeMap::new(), BTreeMap::new());
        for (name, shape) in parameters::shapes(&network) {
            let of = match name.strip_prefix("backbone.") {
                Some(inner) => group(inner, depth, config.layer_decay),
                None => group(&name, 0, config.layer_decay),
            };
            moments.insert(name.clone(), Moments::zeros(shape.iter().product(), device));
            groups.insert(name, of);
        }
        Self { network, moments, groups, architecture, images, config, device: device.clone() }
    }

    /// Iteration `t`, in forwards of at most `how.batch` images; its loss.
    fn step(
        &mut self,
        crops: &mut RandomCrops<'_>,
        how: &Extraction,
        t: usize,
        rate: f64,
    ) -> Result<f64, EvaluationError> {
        let tracked = self.device.clone().autodiff();
        let num_classes = self.images.num_classes;
        let smoothing = self.config.label_smoothing;
        let stretch = crops.next(self.config.batch_size);
        let (mut gradients, mut loss) = (Gradients::new(), 0.0);
        for (first, rows) in stretch.pieces(how.batch) {
            let images = crops.crops(first, rows)?;
            let mut rng = stream(self.config.seed, Purpose::Evaluation, draws::DROP_PATH, first);
            let mut draws = self.architecture.draw(rows.len(), &mut rng);
            // Positions are not augmented.
            draws.rope.fill(RopeDraw::NONE);
            let logits = self.network.train_logits(pixels(&images, how, &tracked), &draws);
            let targets = one_hot(self.images.labels, rows, num_classes, &tracked);
            let targets = targets.mul_scalar(1.0 - smoothing).add_scalar(smoothing / num_classes as f64);
            let share = self.config.batch_size as f64;
            let objective = (targets * log_softmax(logits, 1)).sum().mul_scalar(-1.0 / share);
            loss += f64::from(host(objective.clone().inner())[0]);
            accumulate(&mut gradients, &self.network, objective);
        }
        if !loss.is_finite() {
            let learning_rate = self.config.learning_rate;
            return Err(EvaluationError::HeadDiverged { task: TASK, iteration: t, learning_rate });
        }
        self.update(gradients, rate);
        Ok(loss)
    }

    /// Moves the weights. What no gradient reaches (a mask token) stays as it is.
    fn update(&mut self, mut gradients: Gradients, rate: f64) {
        let Self { moments, groups, config, .. } = self;
        let update = |name: &str, weight: Tensor<1>| {
            let Some(gradient) = gradients.remove(name) else { return weight };
            let Group { lr_multiplier, weight_decay_multiplier, .. } = groups[name];
            let by = Update {
                beta1: BETAS.0,
                beta2: BETAS.1,
                eps: EPS,
                gradient_factor: 1.0,
                lr: rate * lr_multiplier,
                weight_decay: config.weight_decay * weight_decay_multiplier,
            };
            moments.get_mut(name).expect("each parameter has its moments").update(weight, gradient, by)
        };
        self.network = parameters::replace(self.network.clone(), update);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dinoxide_data::{DecodeLimits, Source, open};

    use super::*;
    use crate::{protocol::test_source, test_data::backbone};

    struct Set {
        source: Arc<dyn Source>,
        indices: Vec<usize>,
        labels: Vec<u32>,
    }

    impl Set {
        fn new(text: &str) -> Self {
            let source = open(text, &DecodeLimits::default()).unwrap();
            let indices: Vec<usize> = (0..source.len()).rev().collect();
            let labels = indices.iter().map(|&i| source.label(i).unwrap() % 3).collect();
            Self { source, indices, labels }
        }

        fn images(&self) -> LabeledImages<'_> {
            LabeledImages { source: &*self.source, indices: &self.indices, labels: &self.labels, num_classes: 3 }
        }
    }

    fn how(batch: usize) -> Extraction {
        Extraction { resize_px: 16, crop_px: 12, mean: [0.5; 3], std: [0.25; 3], last_blocks: 1, batch }
    }

    fn config() -> FinetuneConfig {
        FinetuneConfig { epochs: 3, batch_size: 8, learning_rate: 0.02, drop_path: 0.0, seed: 5, ..Default::default() }
    }

    #[test]
    fn the_learning_rate_rises_and_falls_by_hand() {
        let config = FinetuneConfig { learning_rate: 0.5, batch_size: 128, warmup: 0.2, ..Default::default() };
        let found: Vec<f64> = (0..10).map(|t| config.rate(t, 10)).collect();
        let cosine = |t: f64| 0.125 * (1.0 + (std::f64::consts::PI * t / 8.0).cos());
        let expected = [0.125, 0.25].into_iter().chain((0..8).map(|t| cosine(f64::from(t))));
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
        assert_eq!(FinetuneConfig { warmup: 0.0, ..config }.rate(0, 3), 0.25);
    }

    #[test]
    fn the_loss_is_that_of_smoothed_targets_whatever_the_size_of_a_forward() {
        let (set, device) = (Set::new("synthetic:images=20,size=20"), Device::flex());
        let rows: Vec<u32> = (0..20).collect();
        for patches in [false, true] {
            let config = FinetuneConfig { patches, label_smoothing: 0.3, ..config() };
            let backbone = backbone();
            // By hand: tokens of the backbone as it is, and the classifier's first weights.
            let mut crops = RandomCrops::new(set.images(), &rows, 12, 5);
            let stretch = crops.next(8);
            let images = crops.crops(0, &stretch.rows).unwrap();
            let found = backbone.forward(pixels(&images, &how(8), &device), None);
            let mean = found.patches.mean_dim(1).reshape([8, 12]);
            let (cls, mean) = (host(found.cls.reshape([-1])), host(mean.reshape([-1])));
            let width = if patches { 24 } else { 12 };
            let weight = standard_normal(3 * width, &mut stream(5, Purpose::Evaluation, draws::LINEAR_INIT, 0));
            let mut expected = 0.0;
            for (i, &row) in stretch.rows.iter().enumerate() {
                let mut x = cls[i * 12..][..12].to_vec();
                x.extend(if patches { &mean[i * 12..][..12] } else { &[] });
                let z: Vec<f64> = (0..3)
                    .map(|c| (0..width).map(|d| 0.01 * f64::from(weight[c * width + d]) * f64::from(x[d])).sum())
                    .collect();
                let log_sum = z.iter().map(|z| z.exp()).sum::<f64>().ln();
                for (c, z) in z.iter().enumerate() {
                    let target = 0.1 + if set.labels[row as usize] as usize == c { 0.7 } else { 0.0 };
                    expected -= target * (z - log_sum) / 8.0;
                }
            }
            let loss = |batch: usize, config: &FinetuneConfig| {
                let mut run = Run::new(&backbone, set.images(), config, &device);
                run.step(&mut RandomCrops::new(set.images(), &rows, 12, 5), &how(batch), 0, 0.0).unwrap()
            };
            for batch in [8, 3, 1] {
                let found = loss(batch, &config);
                assert!((found - expected).abs() < 1e-5, "{found} {expected}, forwards of {batch}");
            }
            let dropped = loss(8, &FinetuneConfig { drop_path: 0.9, ..config.clone() });
            assert!((dropped - expected).abs() > 1e-6, "stochastic depth changes the loss");
        }
    }

    #[test]
    fn the_first_update_is_the_learning_rate_of_each_layer_and_decay() {
        let (set, device) = (Set::new("synthetic:images=20,size=20"), Device::flex());
        let rows: Vec<u32> = (0..20).collect();
        let config = FinetuneConfig { layer_decay: 0.5, weight_decay: 0.0, ..config() };
        let moved = |config: &FinetuneConfig| {
            let mut run = Run::new(&backbone(), set.images(), config, &device);
            let before = parameters::values(&run.network);
            run.step(&mut RandomCrops::new(set.images(), &rows, 12, 5), &how(8), 0, 0.01).unwrap();
            let after = parameters::values(&run.network);
            let one = |(name, value): (String, Tensor<1>)| {
                let (old, new) = (host(value), host(after[&name].clone()));
                (name, old, new)
            };
            before.into_iter().map(one).collect::<Vec<_>>()
        };
        // AdamW's first step is the learning rate times the gradient's sign, where the gradient is far above `eps`.
        let mut seen = 0;
        for (name, old, new) in moved(&config) {
            let layers = match name.strip_prefix("backbone.") {
                None => 0,
                Some(name) if name.starts_with("blocks.1.") => 1,
                Some(name) if name.starts_with("blocks.0.") => 2,
                Some(name) if name.starts_with("norm.") => 0,
                Some("mask_token") => {
                    assert_eq!(old, new, "no gradient reaches it");
                    continue;
                }
                Some(_) => 3,
            };
            let expected = 0.01 * 0.5f64.powi(layers);
            let largest = old.iter().zip(&new).map(|(a, b)| f64::from(b - a).abs()).fold(0.0, f64::max);
            assert!((largest / expected - 1.0).abs() < 0.02, "{name}: {largest} {expected}");
            seen += 1;
        }
        assert!(seen > 20, "{seen} parameters");
        let decayed = moved(&FinetuneConfig { weight_decay: 0.5, ..config.clone() });
        for ((name, old, plain), (_, _, decayed)) in moved(&config).into_iter().zip(decayed) {
            let (layers, is_decayed) = match name.as_str() {
                "head.weight" => (0, true),
                "backbone.blocks.0.attn.qkv.weight" => (2, true),
                "backbone.norm.weight" | "head.bias" => (0, false),
                _ => continue,
            };
            let factor = if is_decayed { 0.01 * 0.5f64.powi(layers) * 0.5 } else { 0.0 };
            for ((old, plain), decayed) in old.iter().zip(plain).zip(decayed) {
                let expected = f64::from(plain) - factor * f64::from(*old);
                assert!((f64::from(decayed) - expected).abs() < 1e-7, "{name}");
            }
        }
    }

    #[test]
    fn the_best_epoch_is_scored_and_the_given_backbone_stays_as_it_is() {
        let (train, val) = (Set::new("synthetic:images=60,size=20"), Set::new("synthetic:split=val,images=21,size=20"));
        let (how, source, device, backbone) = (how(8), test_source(), Device::flex(), backbone());
        let on = FinetuneImages { train: train.images(), val: val.images(), how: &how, source: &source };
        let before = parameters::values(&backbone);
        let config = FinetuneConfig { epochs: 5, held_out: 0.3, ..config() };
        let (mut iterations, mut epochs) = (Vec::new(), 0);
        let (report, tuned) = finetune(&backbone, on, &config, &device, &mut |progress| match progress {
            FinetuneProgress::Iteration { done, total } => iterations.push((done, total)),
            FinetuneProgress::Epoch(_) => epochs += 1,
        })
        .unwrap();
        let scores = &report.scores;
        let per_epoch = (60 - scores.selection.samples).div_ceil(8);
        assert_eq!(iterations, (1..=5 * per_epoch).map(|t| (t, 5 * per_epoch)).collect::<Vec<_>>());
        assert_eq!((epochs, scores.epochs.len()), (5, 5));
        let chosen = &scores.epochs[scores.epoch - 1];
        let ahead =
            |e: &EpochScore| (e.accuracy.top1, -e.loss.unwrap()) > (chosen.accuracy.top1, -chosen.loss.unwrap());
        assert!(!scores.epochs.iter().any(ahead), "{scores:?}");
        assert!(scores.epochs[4].train_loss < scores.epochs[0].train_loss, "{scores:?}");
        assert_eq!(report.protocol.features[0].augmentation, TrainTransform::DESCRIPTION);
        let after = parameters::values(&tuned);
        assert_eq!(before.len(), after.len());
        for (name, value) in parameters::values(&backbone) {
            assert_eq!(host(value.clone()), host(before[&name].clone()), "{name}");
            assert!(name == "mask_token" || host(value) != host(after[&name].clone()), "{name} is trained");
        }
        let (again, _) = finetune(&backbone, on, &config, &device, &mut |_| ()).unwrap();
        assert_eq!(again, report, "nothing is random");
    }

    #[test]
    fn a_network_is_scored_as_its_tokens_say() {
        let (set, device, backbone) = (Set::new("synthetic:images=14,size=20"), Device::flex(), backbone());
        let network = Classifier::new(&backbone, 3, true, 5, &device).valid();
        let rows = [2, 3, 7, 11, 12];
        let found = network.score(set.images(), Some(&rows), &how(2), &device).unwrap();
        let weight = standard_normal(72, &mut stream(5, Purpose::Evaluation, draws::LINEAR_INIT, 0));
        let indices: Vec<usize> = rows.iter().map(|&row| set.indices[row as usize]).collect();
        let tokens = crate::extract(&backbone, &*set.source, &indices, &how(14), &device, &mut |_| ()).unwrap();
        let (mut hits, mut loss) = (Vec::new(), 0.0);
        for (i, &row) in rows.iter().enumerate() {
            let x = [tokens.last_cls().row(i), tokens.patch_mean.row(i)].concat();
            let z: Vec<f64> =
                (0..3).map(|c| (0..24).map(|d| 0.01 * f64::from(weight[c * 24 + d]) * f64::from(x[d])).sum()).collect();
            let label = set.labels[row as usize] as usize;
            hits.push(z.iter().all(|other| *other <= z[label]));
            loss += (z.iter().map(|z| z.exp()).sum::<f64>().ln() - z[label]) / 5.0;
        }
        assert_eq!(found.hits, hits);
        assert!((found.loss.unwrap() - loss).abs() < 1e-5);
    }

    #[test]
    fn a_loss_that_is_not_finite_and_classes_that_do_not_fit_are_errors() {
        let (train, mut val) =
            (Set::new("synthetic:images=30,size=20"), Set::new("synthetic:split=val,images=9,size=20"));
        let (how, source, device, backbone) = (how(8), test_source(), Device::flex(), backbone());
        let run = |train: &Set, val: &Set, config: &FinetuneConfig| {
            let on = FinetuneImages { train: train.images(), val: val.images(), how: &how, source: &source };
            finetune(&backbone, on, config, &device, &mut |_| ()).map(|_| ()).unwrap_err()
        };
        let error = run(&train, &val, &FinetuneConfig { learning_rate: 1e30, ..config() });
        let EvaluationError::HeadDiverged { task: "finetune", learning_rate: 1e30, .. } = error else {
            panic!("{error}")
        };
        let mut single = Set::new("synthetic:images=30,size=20");
        single.labels.fill(1);
        assert_eq!(run(&single, &val, &config()), EvaluationError::SingleClass { class: 1, samples: 30 });
        single.labels[3] = 0;
        val.labels[0] = 2;
        assert_eq!(run(&single, &val, &config()), EvaluationError::UnseenClasses { classes: vec![2] });
    }
}
