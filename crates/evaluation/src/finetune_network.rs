//! The network of a fine-tuning, and its iterations: a backbone that autodiff tracks, a linear classifier, and AdamW with a
//! learning rate for each layer.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData, activation::log_softmax};
use dinoxide_kernels::{self as kernels, Precision};
use dinoxide_model::{Architecture, Backbone, CropGroup, RopeDraw, StochasticDraws, parameters, weights::host};
use dinoxide_optimizer::{Gradients, Group, Moments, Update, accumulate, group};
use dinoxide_random::{Purpose, stream};

use crate::{
    accuracy::{RankCounter, rank},
    error::EvaluationError,
    extract::{Batch, Extraction, for_each_batch, pixels},
    finetune::{FinetuneConfig, TASK},
    linear_probe::{Outcome, cross_entropy, one_hot, standard_normal},
    random_crops::{LabeledImages, RandomCrops},
    selection::draws,
};

/// Decays of the moments.
const BETAS: (f64, f64) = (0.9, 0.999);
/// Added to the root of the second moment.
const EPS: f64 = 1e-8;

/// The backbone with a linear classifier.
#[derive(Module, Debug)]
pub(crate) struct Classifier {
    pub(crate) backbone: Backbone,
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
        kernels::linear(input, self.head.weight.val(), Some(self.head.bias.val()), Precision::Fp32)
    }

    /// Class scores of random crops under given draws.
    fn train_logits(&self, pixels: Tensor<4>, draws: &StochasticDraws) -> Tensor<2> {
        if self.patches {
            let [_, _, height, width] = pixels.dims();
            let found = self.backbone.forward_train(pixels, None, CropGroup::Global, draws);
            // Those that central crops are scored by.
            let patches = self.backbone.last_layer_patches(&found, (height, width));
            self.logits(found.cls, || patches)
        } else {
            let found = self.backbone.forward_selected(pixels, None, CropGroup::Global, Some(draws), &[]);
            self.logits(found.cls, || unreachable!("CLS alone"))
        }
    }

    /// The scores of central crops: of the samples `rows`, or of all. On plain tensors.
    pub(crate) fn score(
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
pub(crate) struct Run<'a> {
    pub(crate) network: Classifier,
    moments: BTreeMap<String, Moments>,
    groups: BTreeMap<String, Group>,
    /// The backbone's, with the rate of stochastic depth of this run.
    architecture: Architecture,
    images: LabeledImages<'a>,
    config: &'a FinetuneConfig,
    device: Device,
}

impl<'a> Run<'a> {
    /// Of a copy of the backbone, with a fresh classifier.
    pub(crate) fn new(
        backbone: &Backbone,
        images: LabeledImages<'a>,
        config: &'a FinetuneConfig,
        device: &Device,
    ) -> Self {
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
    pub(crate) fn step(
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
pub(crate) mod tests {
    use std::sync::Arc;

    use dinoxide_data::{DecodeLimits, Source, open};
    use dinoxide_model::{ModelConfig, config::Position};

    use super::*;
    use crate::test_data::{backbone, backbone_of, model_config};

    /// Synthetic images of three classes, last first.
    pub(crate) struct Set {
        pub(crate) source: Arc<dyn Source>,
        pub(crate) indices: Vec<usize>,
        pub(crate) labels: Vec<u32>,
    }

    impl Set {
        pub(crate) fn new(text: &str) -> Self {
            let source = open(text, &DecodeLimits::default()).unwrap();
            let indices: Vec<usize> = (0..source.len()).rev().collect();
            let labels = indices.iter().map(|&i| source.label(i).unwrap() % 3).collect();
            Self { source, indices, labels }
        }

        pub(crate) fn images(&self) -> LabeledImages<'_> {
            LabeledImages { source: &*self.source, indices: &self.indices, labels: &self.labels, num_classes: 3 }
        }
    }

    pub(crate) fn how(batch: usize) -> Extraction {
        Extraction { resize_px: 16, crop_px: 12, mean: [0.5; 3], std: [0.25; 3], last_blocks: 1, batch }
    }

    pub(crate) fn config() -> FinetuneConfig {
        FinetuneConfig { epochs: 3, batch_size: 8, learning_rate: 0.02, drop_path: 0.0, seed: 5, ..Default::default() }
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
    fn positions_are_not_augmented() {
        let (set, device) = (Set::new("synthetic:images=20,size=20"), Device::flex());
        let rows: Vec<u32> = (0..20).collect();
        let loss = |rescale: f64| {
            let model = ModelConfig { position: Position::Rope, rope_rescale: rescale, ..model_config() };
            let backbone = backbone_of(&model);
            let config = config();
            let mut run = Run::new(&backbone, set.images(), &config, &device);
            // The classifier moves first: it hardly hears positions otherwise.
            let mut crops = RandomCrops::new(set.images(), &rows, 12, 5);
            (0..3).map(|t| run.step(&mut crops, &how(8), t, 0.02).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(loss(3.0), loss(1.0));
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
}
