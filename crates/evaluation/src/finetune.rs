//! Fine-tuning: a linear classifier on the backbone's tokens, trained together with the whole backbone (the protocol of
//! BEiT and iBOT, without mixing of images).
//!
//! Train images are random crops; the learning rate falls from the classifier to the patch embedding, rises at first and then
//! falls along a cosine. After each epoch the network is scored on train images that it is not trained on; the best of these
//! states is scored once on val.

use burn::module::Module;
use burn::tensor::Device;
use dinoxide_augmentation::TrainTransform;
use dinoxide_model::{Architecture, Backbone};
use serde::{Deserialize, Serialize};

use crate::{
    accuracy::Accuracy,
    bootstrap::{Interval, of_hits},
    error::EvaluationError,
    extract::Extraction,
    finetune_network::{Classifier, Run},
    labels::check_classes,
    linear::scaled,
    linear_probe::Outcome,
    protocol::{FeatureSource, Method, Protocol, Report},
    random_crops::{LabeledImages, RandomCrops},
    selection::{Selection, SelectionReport, stratified_split},
};

pub(crate) const TASK: &str = "finetune";
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
    /// Weight decay, of all but biases, norms and layer scales; of a ConvNeXt also of the norms before its convolutions of
    /// stride 2 and 4, which are not called norms.
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

#[cfg(test)]
mod tests {
    use dinoxide_model::{parameters, weights::host};

    use super::*;
    use crate::{
        finetune_network::tests::{Set, config, how},
        protocol::test_source,
        test_data::backbone,
    };

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
    fn an_earlier_epoch_that_does_best_is_the_one_on_val() {
        let (train, val) = (Set::new("synthetic:images=60,size=20"), Set::new("synthetic:split=val,images=21,size=20"));
        let (how, source, device, backbone) = (how(8), test_source(), Device::flex(), backbone());
        let on = FinetuneImages { train: train.images(), val: val.images(), how: &how, source: &source };
        let earlier = (0..10).find_map(|seed| {
            let config = FinetuneConfig { epochs: 5, held_out: 0.3, seed, ..config() };
            let (report, _) = finetune(&backbone, on, &config, &device, &mut |_| ()).unwrap();
            (report.scores.epoch < 5).then_some((config, report.scores))
        });
        let (config, scores) = earlier.expect("a seed whose last epoch is not the best");
        // The same again, stopped after that epoch.
        let split = stratified_split(&train.labels, 0.3, config.seed, TASK).unwrap();
        let mut run = Run::new(&backbone, train.images(), &config, &device);
        let mut crops = RandomCrops::new(train.images(), &split.fit, how.crop_px, config.seed);
        let per_epoch = split.fit.len().div_ceil(8);
        for t in 0..scores.epoch * per_epoch {
            run.step(&mut crops, &how, t, config.rate(t, 5 * per_epoch)).unwrap();
        }
        let expected = run.network.valid().score(val.images(), None, &how, &device).unwrap();
        assert_eq!((scores.accuracy, scores.loss), (expected.accuracy, expected.loss));
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
