//! The linear probe as the reference systems train it: every iteration sees new random crops, so the backbone is run on
//! every sample of every iteration, and all classifiers of all feature sets share that forward.
//!
//! Nothing is cached: in memory are the crops of one forward, the features of one iteration, and the classifiers.

use burn::tensor::{Device, Tensor};
use dinoxide_augmentation::TrainTransform;
use dinoxide_model::{Backbone, LayerFeatures, weights::host};

use crate::{
    error::EvaluationError,
    extract::{Extracted, Extraction, extract, pixels},
    features::Features,
    grid::{Ground, search},
    labels::{LabeledFeatures, check_classes},
    linear::{LinearConfig, LinearProgress, LinearScores},
    linear_probe::{Outcome, Probes, Samples, Schedule, Training, one_hot},
    protocol::{FeatureSource, Report},
    random_crops::{LabeledImages, RandomCrops},
};

/// Which tokens a linear classifier sees.
#[derive(Clone, Debug)]
pub struct FeatureChoice {
    /// Name in the result.
    pub name: String,
    /// How they are extracted from central crops.
    pub source: FeatureSource,
    /// CLS tokens of this many last blocks.
    pub blocks: usize,
    /// Whether the mean patch token of the last block follows them.
    pub patches: bool,
}

impl FeatureChoice {
    /// What it takes from features of central crops.
    ///
    /// # Errors
    /// If they are of fewer blocks.
    pub fn of(&self, found: &Extracted) -> Result<Features, EvaluationError> {
        let cls: Vec<&Features> = found.cls.iter().collect();
        Features::linear_input(&cls, self.patches.then_some(&found.patch_mean), self.blocks)
    }

    /// What it takes from the tokens of the last layers, of which there are enough; `[B, D]`.
    pub(crate) fn of_layers(&self, layers: &[LayerFeatures]) -> Tensor<2> {
        let mut parts: Vec<Tensor<2>> =
            layers[layers.len() - self.blocks..].iter().map(|layer| layer.cls.clone()).collect();
        if self.patches {
            let last = layers.last().expect("at least one layer").patches.clone();
            let [batch, _, dim] = last.dims();
            parts.push(last.mean_dim(1).reshape([batch, dim]));
        }
        Tensor::cat(parts, 1)
    }
}

/// What [`linear_augmented`] trains and scores classifiers on.
#[derive(Clone, Copy)]
pub struct Augmented<'a> {
    /// The backbone.
    pub backbone: &'a Backbone,
    /// The images that random crops are taken of.
    pub train: LabeledImages<'a>,
    /// The feature sets.
    pub choices: &'a [FeatureChoice],
    /// Features of the central crops of val, for each of the feature sets.
    pub val: &'a [LabeledFeatures],
    /// How crops get into the backbone: random ones of its crop size, central ones as it says.
    pub how: &'a Extraction,
    /// Where to compute.
    pub device: &'a Device,
}

/// Trains a linear classifier for every feature set and learning rate on random crops, chooses the best, and scores it on
/// the central crops of val, all as [`linear`](crate::linear::linear()).
///
/// # Errors
/// If settings are out of range, the splits do not fit together, an image that could be read no longer can, features are not
/// finite, or every classifier diverges.
///
/// # Panics
/// If there is not one set of val features for each choice.
pub fn linear_augmented(
    on: Augmented<'_>,
    config: &LinearConfig,
    progress: &mut dyn FnMut(LinearProgress),
) -> Result<Report<LinearScores>, EvaluationError> {
    config.validate()?;
    assert!(!on.choices.is_empty() && on.choices.len() == on.val.len(), "{} sets of val features", on.val.len());
    on.val.iter().try_for_each(|val| check_classes(on.train.labels, val.labels(), on.train.num_classes))?;
    search(&Anew { on, config }, config, progress)
}

/// Train images whose features are computed when they are needed.
struct Anew<'a> {
    on: Augmented<'a>,
    config: &'a LinearConfig,
}

impl Anew<'_> {
    /// The features of each of the sets in one iteration, each with a last column of 1, from one forward of each crop.
    fn inputs(
        &self,
        crops: &mut RandomCrops<'_>,
        sets: &[usize],
        how: &Extraction,
        layers: &[usize],
    ) -> Result<(Vec<u32>, Vec<Tensor<2>>), EvaluationError> {
        let Augmented { backbone, train, choices, device, .. } = self.on;
        let stretch = crops.next(self.config.batch_size);
        let mut parts = vec![Vec::new(); sets.len()];
        for (first, rows) in stretch.pieces(how.batch) {
            let images = crops.crops(first, rows)?;
            let tokens = backbone.forward_layers(pixels(&images, how, device), layers, true);
            for (parts, &set) in parts.iter_mut().zip(sets) {
                let features = choices[set].of_layers(&tokens);
                let sums = host(features.clone().sum_dim(1).reshape([-1]));
                if let Some(i) = sums.iter().position(|sum| !sum.is_finite()) {
                    let image = train.source.id(train.indices[rows[i] as usize]);
                    let images_affected = sums.iter().filter(|sum| !sum.is_finite()).count();
                    return Err(EvaluationError::NonFiniteImage { image, value: sums[i], images_affected });
                }
                parts.push(features);
            }
        }
        let ones = Tensor::<2>::ones([stretch.rows.len(), 1], device);
        let inputs = parts.into_iter().map(|parts| Tensor::cat(vec![Tensor::cat(parts, 0), ones.clone()], 1)).collect();
        Ok((stretch.rows, inputs))
    }
}

impl Ground for Anew<'_> {
    fn sets(&self) -> Vec<(&str, FeatureSource)> {
        let source = |choice: &FeatureChoice| FeatureSource {
            augmentation: TrainTransform::DESCRIPTION.into(),
            ..choice.source.clone()
        };
        self.on.choices.iter().map(|choice| (choice.name.as_str(), source(choice))).collect()
    }

    fn train_labels(&self) -> &[u32] {
        self.on.train.labels
    }

    fn num_classes(&self) -> usize {
        self.on.train.num_classes
    }

    fn val_samples(&self) -> usize {
        self.on.val[0].rows()
    }

    fn groups(&self) -> Vec<Vec<usize>> {
        vec![(0..self.on.choices.len()).collect()]
    }

    fn train(
        &self,
        sets: &[usize],
        rows: &[u32],
        rates: &[f64],
        tick: &mut dyn FnMut(),
    ) -> Result<Vec<Probes>, EvaluationError> {
        let Augmented { backbone, train, choices, val, how, device } = self.on;
        let last_blocks = sets.iter().map(|&set| choices[set].blocks).max().expect("at least one feature set");
        let how = Extraction { last_blocks, ..how.clone() };
        let (_, layers) = how.check(&backbone.architecture())?;
        let schedules: Vec<Schedule<'_>> = sets.iter().map(|&set| self.config.schedule(rates, set as u64)).collect();
        let mut trainings: Vec<Training<'_>> = sets
            .iter()
            .zip(&schedules)
            .map(|(&set, schedule)| Training::new(val[set].dim(), train.num_classes, *schedule, device))
            .collect();
        let mut crops = RandomCrops::new(train, rows, how.crop_px, self.config.seed);
        for iteration in 0..self.config.iterations {
            let (rows, inputs) = self.inputs(&mut crops, sets, &how, &layers)?;
            let targets = one_hot(train.labels, &rows, train.num_classes, device);
            for (training, inputs) in trainings.iter_mut().zip(inputs) {
                training.step(iteration, inputs, targets.clone());
            }
            tick();
        }
        Ok(trainings.into_iter().map(Training::into_probes).collect())
    }

    fn score(
        &self,
        sets: &[usize],
        probes: &[Probes],
        rows: Option<&[u32]>,
    ) -> Result<Vec<Vec<Outcome>>, EvaluationError> {
        let Augmented { backbone, train, choices, val, how, device } = self.on;
        let central = match rows {
            None => None,
            Some(rows) => {
                let indices: Vec<usize> = rows.iter().map(|&row| train.indices[row as usize]).collect();
                let found = extract(backbone, train.source, &indices, how, device, &mut |_| ())?;
                if let Some(lost) = found.rejected.first() {
                    return Err(EvaluationError::Unreadable { image: lost.id.clone(), reason: lost.reason.clone() });
                }
                Some((found, rows.iter().map(|&row| train.labels[row as usize]).collect::<Vec<u32>>()))
            }
        };
        let score = |(&set, probes): (&usize, &Probes)| {
            let held_out = central
                .as_ref()
                .map(|(found, labels)| LabeledFeatures::new(choices[set].of(found)?, labels.clone(), train.num_classes))
                .transpose()?;
            let of = held_out.as_ref().unwrap_or(&val[set]);
            let all: Vec<u32> = (0..of.rows() as u32).collect();
            probes.score(Samples { of, rows: &all }, device)
        };
        sets.iter().zip(probes).map(score).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dinoxide_data::{DecodeLimits, Source, open};
    use dinoxide_model::parameters;

    use super::*;
    use crate::{protocol::test_source, selection::Selection, test_data::backbone};

    struct Setting {
        backbone: Backbone,
        train: Arc<dyn Source>,
        indices: Vec<usize>,
        labels: Vec<u32>,
        choices: Vec<FeatureChoice>,
        val: Vec<LabeledFeatures>,
        how: Extraction,
    }

    impl Setting {
        fn new() -> Self {
            let set = |text: &str| open(text, &DecodeLimits::default()).unwrap();
            let (train, val) = (set("synthetic:images=26,size=20"), set("synthetic:split=val,images=15,size=20"));
            let how =
                Extraction { resize_px: 16, crop_px: 12, mean: [0.5; 3], std: [0.25; 3], last_blocks: 2, batch: 5 };
            let choice = |name: &str, blocks, patches| FeatureChoice {
                name: name.into(),
                source: test_source(),
                blocks,
                patches,
            };
            let choices = vec![choice("one", 1, false), choice("two and patches", 2, true)];
            let backbone = backbone();
            let all: Vec<usize> = (0..15).collect();
            let found = extract(&backbone, &*val, &all, &how, &Device::flex(), &mut |_| ()).unwrap();
            let of_val = |choice: &FeatureChoice| {
                let labels = all.iter().map(|&i| val.label(i).unwrap() % 3).collect();
                LabeledFeatures::new(choice.of(&found).unwrap(), labels, 3).unwrap()
            };
            // Not all images, and not in their order.
            let indices: Vec<usize> = (0..26).rev().filter(|i| i % 6 != 2).collect();
            let labels = indices.iter().map(|&i| train.label(i).unwrap() % 3).collect();
            let val = choices.iter().map(of_val).collect();
            Self { backbone, train, indices, labels, choices, val, how }
        }

        fn run(&self, config: &LinearConfig) -> Result<Report<LinearScores>, EvaluationError> {
            self.run_with(config, &mut |_| ())
        }

        fn run_with(
            &self,
            config: &LinearConfig,
            progress: &mut dyn FnMut(LinearProgress),
        ) -> Result<Report<LinearScores>, EvaluationError> {
            let train = self.images();
            let Self { backbone, choices, val, how, .. } = self;
            let on = Augmented { backbone, train, choices, val, how, device: &Device::flex() };
            linear_augmented(on, config, progress)
        }

        fn images(&self) -> LabeledImages<'_> {
            LabeledImages { source: &*self.train, indices: &self.indices, labels: &self.labels, num_classes: 3 }
        }
    }

    fn config() -> LinearConfig {
        LinearConfig {
            learning_rates: vec![0.1, 4.0],
            iterations: 6,
            batch_size: 8,
            seed: 5,
            selection: Selection::Val,
            ..Default::default()
        }
    }

    /// The features of the crops, computed one by one, and classifiers trained on them with loops in double precision: mean
    /// cross-entropies on val.
    fn naive(setting: &Setting, set: usize, rate: f64, config: &LinearConfig) -> f64 {
        let choice = &setting.choices[set];
        let all: Vec<u32> = (0..setting.indices.len() as u32).collect();
        let mut crops = RandomCrops::new(setting.images(), &all, 12, config.seed);
        let val = &setting.val[set];
        let dim = val.dim();
        let initial = {
            let draws = crate::selection::draws::LINEAR_INIT;
            let mut rng = dinoxide_random::stream(5, dinoxide_random::Purpose::Evaluation, draws, set as u64);
            crate::linear_probe::standard_normal(dim * 3, &mut rng)
        };
        let mut weight: Vec<f64> = initial.iter().map(|v| f64::from(*v) * 0.01).chain([0.0; 3]).collect();
        let mut velocity = vec![0.0; weight.len()];
        let logits = |x: &[f64], weight: &[f64]| -> Vec<f64> {
            (0..3).map(|c| (0..=dim).map(|d| x[d] * weight[3 * d + c]).sum()).collect()
        };
        for t in 0..config.iterations {
            let stretch = crops.next(config.batch_size);
            let mut gradient = vec![0.0; weight.len()];
            for (i, row) in stretch.rows.iter().enumerate() {
                let crop = crops.crops(stretch.first + i as u64, &[*row]).unwrap();
                let pixels = pixels(&crop, &setting.how, &Device::flex());
                let layers = setting.backbone.forward_layers(pixels, &[0, 1], true);
                let mut x: Vec<f64> = Vec::new();
                let first = layers.len() - choice.blocks;
                layers[first..]
                    .iter()
                    .for_each(|l| x.extend(host(l.cls.clone().reshape([-1])).iter().map(|v| f64::from(*v))));
                if choice.patches {
                    let [_, patches, width] = layers[1].patches.dims();
                    let values = host(layers[1].patches.clone().reshape([-1]));
                    let mean = |d: usize| (0..patches).map(|p| f64::from(values[p * width + d])).sum::<f64>();
                    x.extend((0..width).map(|d| mean(d) / patches as f64));
                }
                x.push(1.0);
                let exp: Vec<f64> = logits(&x, &weight).iter().map(|z| z.exp()).collect();
                let label = setting.labels[*row as usize] as usize;
                for c in 0..3 {
                    let residual = exp[c] / exp.iter().sum::<f64>() - f64::from(u8::from(c == label));
                    (0..=dim).for_each(|d| gradient[3 * d + c] += residual * x[d] / config.batch_size as f64);
                }
            }
            let rate = rate * 8.0 / 256.0 * (1.0 + (std::f64::consts::PI * t as f64 / 6.0).cos()) / 2.0;
            for ((w, v), g) in weight.iter_mut().zip(&mut velocity).zip(gradient) {
                *v = 0.9 * *v + g;
                *w -= rate * *v;
            }
        }
        let loss = |row: usize| {
            let x: Vec<f64> = val.features().row(row).iter().map(|v| f64::from(*v)).chain([1.0]).collect();
            let z = logits(&x, &weight);
            z.iter().map(|z| z.exp()).sum::<f64>().ln() - z[val.labels()[row] as usize]
        };
        (0..15).map(loss).sum::<f64>() / 15.0
    }

    #[test]
    fn classifiers_equal_loops_over_the_same_crops() {
        let setting = Setting::new();
        let report = setting.run(&config()).unwrap();
        assert_eq!(report.scores.candidates.len(), 4);
        let mut losses = Vec::new();
        for (set, choice) in setting.choices.iter().enumerate() {
            for rate in [0.1, 4.0] {
                let found = report.scores.candidates[losses.len()].clone();
                assert_eq!((found.feature_set.as_str(), found.learning_rate), (choice.name.as_str(), rate));
                let expected = naive(&setting, set, rate, &config());
                assert!((found.loss.unwrap() - expected).abs() < 2e-5, "{} {rate}: {found:?} {expected}", choice.name);
                losses.push(expected);
            }
        }
        assert!(losses.iter().all(|loss| losses.iter().filter(|other| (*other - loss).abs() < 1e-4).count() == 1));
        let stamps: Vec<_> = report.protocol.features.iter().map(|source| source.augmentation.as_str()).collect();
        assert_eq!(stamps, [TrainTransform::DESCRIPTION; 2]);
        assert_eq!((report.protocol.train_samples, report.protocol.val_samples), (Some(setting.labels.len()), 15));
    }

    #[test]
    fn the_chosen_classifier_is_trained_again_on_all_of_train_and_the_forward_may_have_any_size() {
        let mut setting = Setting::new();
        let config = LinearConfig { selection: Selection::HeldOut { fraction: 0.3 }, ..config() };
        let mut seen = Vec::new();
        let report = setting.run_with(&config, &mut |p| seen.push((p.done, p.total, p.is_final))).unwrap();
        assert_eq!(seen.len(), 12);
        assert_eq!((seen[5], seen[6], seen[11]), ((6, 12, false), (7, 12, true), (12, 12, true)));
        let scores = &report.scores;
        assert_eq!((scores.selection.on.as_str(), scores.selection.samples < setting.labels.len()), ("held_out", true));
        // On val, the classifier is the one that training on all of train gives.
        let set = setting.choices.iter().position(|choice| choice.name == scores.feature_set).unwrap();
        let expected = naive(&setting, set, scores.learning_rate, &config);
        assert!((scores.loss.unwrap() - expected).abs() < 2e-5, "{scores:?} {expected}");
        setting.how.batch = 64;
        let other = setting.run(&config).unwrap().scores;
        assert_eq!((other.feature_set.as_str(), other.accuracy), (scores.feature_set.as_str(), scores.accuracy));
        assert!((other.loss.unwrap() - scores.loss.unwrap()).abs() < 1e-5);
    }

    #[test]
    fn features_that_are_not_finite_are_named_by_their_image() {
        let mut setting = Setting::new();
        let nan = |name: &str, value: Tensor<1>| {
            if name == "norm.bias" { value.mul_scalar(f32::NAN) } else { value }
        };
        setting.backbone = parameters::replace(setting.backbone, nan);
        let error = setting.run(&config()).unwrap_err().to_string();
        assert!(
            error.starts_with("features: a value of `") && error.contains("is NaN (5 images are affected)"),
            "{error}"
        );
    }

    #[test]
    fn splits_that_do_not_fit_are_refused() {
        let mut setting = Setting::new();
        setting.labels.iter_mut().for_each(|label| *label = 1);
        let samples = setting.labels.len();
        assert_eq!(setting.run(&config()).unwrap_err(), EvaluationError::SingleClass { class: 1, samples });
        setting.labels[0] = 0;
        assert_eq!(setting.run(&config()).unwrap_err(), EvaluationError::UnseenClasses { classes: vec![2] });
    }
}
