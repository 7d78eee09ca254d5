//! The training of many linear classifiers on the same features at once: one weight matrix whose columns are those of all
//! classifiers side by side, so that a step is two matrix products whatever their number. [`Probes::train`] takes features
//! that are known, [`Training`] whatever the caller has for each iteration.
//!
//! The classifiers share no parameter. They start from the same weights and see the same batches, so what becomes of one
//! does not depend on which others are trained beside it.

use burn::tensor::{DType, Device, Tensor, TensorData, activation::softmax};
use dinoxide_random::{Purpose, stream};
use rand::{Rng, seq::SliceRandom};
use rayon::prelude::*;

use crate::{
    accuracy::{Accuracy, RankCounter, rank},
    error::EvaluationError,
    labels::LabeledFeatures,
    neighbors::{floats, read},
    selection::draws,
};

/// Standard deviation of the initial weights.
const INIT_STD: f32 = 0.01;
/// Rows scored together.
const SCORING_BLOCK: usize = 1024;

/// Samples of a split, by row number.
#[derive(Clone, Copy)]
pub(crate) struct Samples<'a> {
    pub(crate) of: &'a LabeledFeatures,
    pub(crate) rows: &'a [u32],
}

impl Samples<'_> {
    /// The chosen rows, each followed by a 1 that multiplies the bias: `[n, D + 1]`.
    fn inputs(self, chosen: &[u32], device: &Device) -> Tensor<2> {
        let width = self.of.dim() + 1;
        let mut values = vec![1.0; chosen.len() * width];
        values.par_chunks_mut(width).zip(chosen).for_each(|(out, &row)| {
            out[..width - 1].copy_from_slice(self.of.features().row(row as usize));
        });
        Tensor::from_data(TensorData::new(values, [chosen.len(), width]), (device, DType::F32))
    }
}

/// The classes of the rows `chosen`, one-hot: `[n, C]`.
pub(crate) fn one_hot(labels: &[u32], chosen: &[u32], num_classes: usize, device: &Device) -> Tensor<2> {
    let mut values = vec![0.0f32; chosen.len() * num_classes];
    for (out, &row) in values.chunks_mut(num_classes).zip(chosen) {
        out[labels[row as usize] as usize] = 1.0;
    }
    Tensor::from_data(TensorData::new(values, [chosen.len(), num_classes]), (device, DType::F32))
}

/// How the classifiers are trained.
#[derive(Clone, Copy)]
pub(crate) struct Schedule<'a> {
    /// Learning rate of each classifier at the first iteration, for the batch size in use.
    pub(crate) rates: &'a [f64],
    pub(crate) iterations: usize,
    pub(crate) batch_size: usize,
    pub(crate) momentum: f64,
    pub(crate) seed: u64,
    /// Number of the feature set, which has its own initial weights.
    pub(crate) feature_set: u64,
}

/// `G` linear classifiers of `C` classes.
pub(crate) struct Probes {
    /// `[D + 1, G·C]`, the last row the biases.
    weight: Tensor<2>,
    classifiers: usize,
    num_classes: usize,
}

/// How one classifier does.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) accuracy: Accuracy,
    /// Mean cross-entropy in nats; `None` if it is not finite.
    pub(crate) loss: Option<f64>,
    /// Which samples are right.
    pub(crate) hits: Vec<bool>,
}

/// Classifiers in training, by SGD with momentum: `v ← m·v + ∇`, `w ← w − η_t·v`, `η_t = η·½(1 + cos(πt/T))`, on the mean
/// cross-entropy of each classifier, whose gradient is `xᵀ(softmax(xw) − onehot)/B`.
pub(crate) struct Training<'a> {
    schedule: Schedule<'a>,
    probes: Probes,
    /// It carries its classifier's learning rate: a rate multiplies columns, and the residuals have fewer rows.
    velocity: Tensor<2>,
    /// `[1, G·C]`, divided by the batch size.
    rates: Tensor<2>,
}

impl<'a> Training<'a> {
    /// Classifiers of features of `dim` values, one for each learning rate.
    pub(crate) fn new(dim: usize, num_classes: usize, schedule: Schedule<'a>, device: &Device) -> Self {
        let classifiers = schedule.rates.len();
        let columns = classifiers * num_classes;
        let batch_size = schedule.batch_size as f64;
        let rates = schedule.rates.iter().flat_map(|&rate| vec![(rate / batch_size) as f32; num_classes]);
        let rates = TensorData::new(rates.collect::<Vec<_>>(), [1, columns]);
        let weight = initial_weight(dim, num_classes, &schedule, device);
        Self {
            schedule,
            probes: Probes { weight, classifiers, num_classes },
            velocity: Tensor::zeros([dim + 1, columns], (device, DType::F32)),
            rates: Tensor::from_data(rates, (device, DType::F32)),
        }
    }

    /// An iteration.
    ///
    /// # Shapes
    /// `inputs [B, D + 1]`, the last column 1; `targets [B, C]`, one-hot.
    pub(crate) fn step(&mut self, iteration: usize, inputs: Tensor<2>, targets: Tensor<2>) {
        let Probes { weight, classifiers, num_classes } = &mut self.probes;
        let batch_size = inputs.dims()[0];
        let logits = inputs.clone().matmul(weight.clone()).reshape([batch_size, *classifiers, *num_classes]);
        let residuals = softmax(logits, 2) - targets.unsqueeze_dim(1);
        let residuals = residuals.reshape([batch_size, *classifiers * *num_classes]) * self.rates.clone();
        self.velocity = self.velocity.clone().mul_scalar(self.schedule.momentum) + inputs.transpose().matmul(residuals);
        let rate = cosine(iteration, self.schedule.iterations);
        *weight = weight.clone() - self.velocity.clone().mul_scalar(rate);
    }

    /// The classifiers as they are now.
    pub(crate) fn into_probes(self) -> Probes {
        self.probes
    }
}

impl Probes {
    /// Trains on samples whose features are known.
    ///
    /// Batches are consecutive pieces of an endless sequence of epochs, each in a new order, and are always full.
    pub(crate) fn train(
        samples: Samples<'_>,
        schedule: &Schedule<'_>,
        device: &Device,
        mut progress: impl FnMut(usize),
    ) -> Self {
        let num_classes = samples.of.num_classes();
        let mut training = Training::new(samples.of.dim(), num_classes, *schedule, device);
        let mut order = Order::new(samples.rows, schedule.seed);
        for iteration in 0..schedule.iterations {
            let batch = order.take(schedule.batch_size);
            let targets = one_hot(samples.of.labels(), &batch, num_classes, device);
            training.step(iteration, samples.inputs(&batch, device), targets);
            progress(iteration + 1);
        }
        training.into_probes()
    }

    /// Scores every classifier on the samples.
    pub(crate) fn score(&self, samples: Samples<'_>, device: &Device) -> Result<Vec<Outcome>, EvaluationError> {
        let mut counters =
            vec![(RankCounter::default(), 0.0f64, Vec::with_capacity(samples.rows.len())); self.classifiers];
        for rows in samples.rows.chunks(SCORING_BLOCK) {
            let logits = read(samples.inputs(rows, device).matmul(self.weight.clone()))?;
            let judged: Vec<Vec<(Option<usize>, f64)>> = floats(&logits)?
                .par_chunks(self.classifiers * self.num_classes)
                .zip(rows)
                .map(|(logits, &row)| {
                    let label = samples.of.labels()[row as usize] as usize;
                    logits.chunks(self.num_classes).map(|own| (rank(own, label), cross_entropy(own, label))).collect()
                })
                .collect();
            for (counter, (rank, loss)) in
                judged.iter().flat_map(|sample| sample.iter().enumerate()).map(|(i, &s)| (i, s))
            {
                counters[counter].0.add(rank);
                counters[counter].1 += loss;
                counters[counter].2.push(rank == Some(0));
            }
        }
        let count = samples.rows.len() as f64;
        let outcome = |(counter, loss, hits): (RankCounter, f64, Vec<bool>)| Outcome {
            accuracy: counter.accuracy(self.num_classes),
            loss: Some(loss / count).filter(|loss| loss.is_finite()),
            hits,
        };
        Ok(counters.into_iter().map(outcome).collect())
    }
}

/// The same `N(0, 0.01)` weights and zero biases for each classifier.
fn initial_weight(dim: usize, num_classes: usize, schedule: &Schedule<'_>, device: &Device) -> Tensor<2> {
    let classifiers = schedule.rates.len();
    let mut rng = stream(schedule.seed, Purpose::Evaluation, draws::LINEAR_INIT, schedule.feature_set);
    let one = standard_normal(dim * num_classes, &mut rng);
    let mut values = Vec::with_capacity((dim + 1) * classifiers * num_classes);
    for row in one.chunks(num_classes) {
        (0..classifiers).for_each(|_| values.extend(row.iter().map(|value| INIT_STD * value)));
    }
    values.resize((dim + 1) * classifiers * num_classes, 0.0);
    Tensor::from_data(TensorData::new(values, [dim + 1, classifiers * num_classes]), (device, DType::F32))
}

/// Factor of the learning rate at iteration `t` of `T`: from 1 towards 0, which iteration `T` would have.
fn cosine(iteration: usize, iterations: usize) -> f64 {
    0.5 * (1.0 + (std::f64::consts::PI * iteration as f64 / iterations as f64).cos())
}

/// `ln Σ_c exp(z_c) − z_label`.
pub(crate) fn cross_entropy(logits: &[f32], label: usize) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    sum.ln() + f64::from(largest) - f64::from(logits[label])
}

/// An endless sequence of epochs over some rows, each in its own order.
pub(crate) struct Order<'a> {
    rows: &'a [u32],
    seed: u64,
    epoch: u64,
    remaining: Vec<u32>,
}

impl<'a> Order<'a> {
    pub(crate) fn new(rows: &'a [u32], seed: u64) -> Self {
        Self { rows, seed, epoch: 0, remaining: Vec::new() }
    }

    /// The next `count` rows.
    pub(crate) fn take(&mut self, count: usize) -> Vec<u32> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            if self.remaining.is_empty() {
                self.remaining = self.rows.to_vec();
                self.remaining.shuffle(&mut stream(self.seed, Purpose::Evaluation, draws::LINEAR_ORDER, self.epoch));
                self.epoch += 1;
            }
            let from = self.remaining.len().saturating_sub(count - taken.len());
            taken.extend(self.remaining.drain(from..));
        }
        taken
    }
}

/// Normal values of mean 0 and variance 1, by Box and Muller's transform.
pub(crate) fn standard_normal(count: usize, rng: &mut impl Rng) -> Vec<f32> {
    let mut uniform = || (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * uniform()).sin_cos();
        values.extend([(radius * cos) as f32, (radius * sin) as f32]);
    }
    values.truncate(count);
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::clustered;

    const RATES: [f64; 3] = [0.03, 0.5, 2.0];

    fn schedule(rates: &[f64]) -> Schedule<'_> {
        Schedule { rates, iterations: 13, batch_size: 9, momentum: 0.9, seed: 3, feature_set: 2 }
    }

    /// One classifier at a time, in `f64`, with loops: class scores `[n, C]` of every row after training.
    fn naive(train: &LabeledFeatures, rows: &[u32], rate: f64, schedule: &Schedule<'_>, initial: &[f32]) -> Vec<f64> {
        let (dim, classes) = (train.dim(), train.num_classes());
        let mut weight: Vec<f64> = initial.iter().map(|&v| f64::from(v) * f64::from(INIT_STD)).collect();
        let (mut bias, mut velocity, mut bias_velocity) =
            (vec![0.0; classes], vec![0.0; dim * classes], vec![0.0; classes]);
        let logits = |x: &[f32], weight: &[f64], bias: &[f64]| -> Vec<f64> {
            (0..classes)
                .map(|c| bias[c] + (0..dim).map(|d| f64::from(x[d]) * weight[d * classes + c]).sum::<f64>())
                .collect()
        };
        let mut order = Order::new(rows, schedule.seed);
        for t in 0..schedule.iterations {
            let mut gradient = vec![0.0; dim * classes];
            let mut bias_gradient = vec![0.0; classes];
            for row in order.take(schedule.batch_size) {
                let x = train.features().row(row as usize);
                let z: Vec<f64> = logits(x, &weight, &bias).iter().map(|z| z.exp()).collect();
                let total: f64 = z.iter().sum();
                for c in 0..classes {
                    let hot = f64::from(u8::from(train.labels()[row as usize] as usize == c));
                    let residual = (z[c] / total - hot) / schedule.batch_size as f64;
                    bias_gradient[c] += residual;
                    (0..dim).for_each(|d| gradient[d * classes + c] += residual * f64::from(x[d]));
                }
            }
            let rate = rate * (1.0 + (std::f64::consts::PI * t as f64 / schedule.iterations as f64).cos()) / 2.0;
            for (w, (v, g)) in weight.iter_mut().zip(velocity.iter_mut().zip(&gradient)) {
                *v = schedule.momentum * *v + g;
                *w -= rate * *v;
            }
            for (w, (v, g)) in bias.iter_mut().zip(bias_velocity.iter_mut().zip(&bias_gradient)) {
                *v = schedule.momentum * *v + g;
                *w -= rate * *v;
            }
        }
        (0..train.rows()).flat_map(|row| logits(train.features().row(row), &weight, &bias)).collect()
    }

    #[test]
    fn all_classifiers_equal_loops_that_train_one_at_a_time() {
        let device = Device::flex();
        let train = clustered(4, 31, 6, 1.0, 1);
        let rows: Vec<u32> = (0..31).filter(|row| row % 5 != 0).collect();
        let schedule = schedule(&RATES);
        let mut seen = Vec::new();
        let probes = Probes::train(Samples { of: &train, rows: &rows }, &schedule, &device, |t| seen.push(t));
        assert_eq!(seen, (1..=13).collect::<Vec<_>>());
        let all: Vec<u32> = (0..31).collect();
        let ours =
            read(Samples { of: &train, rows: &all }.inputs(&all, &device).matmul(probes.weight.clone())).unwrap();
        let ours = floats(&ours).unwrap();
        let initial = standard_normal(24, &mut stream(3, Purpose::Evaluation, draws::LINEAR_INIT, 2));
        let scores = probes.score(Samples { of: &train, rows: &all }, &device).unwrap();
        for (g, rate) in RATES.iter().enumerate() {
            let expected = naive(&train, &rows, *rate, &schedule, &initial);
            let (mut hits, mut loss) = (0, 0.0);
            for row in 0..31 {
                let (ours, expected) = (&ours[row * 12 + g * 4..][..4], &expected[row * 4..][..4]);
                assert!(
                    ours.iter().zip(expected).all(|(a, b)| (f64::from(*a) - b).abs() < 2e-5),
                    "{ours:?} {expected:?}"
                );
                let label = train.labels()[row] as usize;
                hits += usize::from(expected.iter().all(|other| *other <= expected[label]));
                loss += expected.iter().map(|z| z.exp()).sum::<f64>().ln() - expected[label];
            }
            assert_eq!(scores[g].accuracy, Accuracy { top1: 100.0 * hits as f64 / 31.0, top5: None });
            assert!((scores[g].loss.unwrap() - loss / 31.0).abs() < 1e-5);
        }
        assert_eq!(scores.len(), 3);
    }

    #[test]
    fn a_classifier_does_not_depend_on_the_others() {
        let device = Device::flex();
        let train = clustered(3, 20, 5, 1.0, 1);
        let rows: Vec<u32> = (0..20).collect();
        let samples = Samples { of: &train, rows: &rows };
        let together = Probes::train(samples, &schedule(&RATES), &device, |_| ()).score(samples, &device).unwrap();
        let alone = Probes::train(samples, &schedule(&RATES[1..2]), &device, |_| ()).score(samples, &device).unwrap();
        assert_eq!(together[1].accuracy, alone[0].accuracy);
        assert!((together[1].loss.unwrap() - alone[0].loss.unwrap()).abs() < 1e-6);
    }

    #[test]
    fn each_epoch_visits_every_row_once_in_a_new_order() {
        let rows = [3, 5, 6, 9, 11];
        let mut order = Order::new(&rows, 4);
        let drawn = [order.take(3), order.take(4), order.take(8)].concat();
        let mut epochs: Vec<Vec<u32>> = drawn.chunks(5).map(<[u32]>::to_vec).collect();
        assert!(epochs[0] != epochs[1] || epochs[1] != epochs[2]);
        for epoch in &mut epochs {
            epoch.sort_unstable();
            assert_eq!(*epoch, rows);
        }
    }

    #[test]
    fn normal_draws_have_mean_zero_and_variance_one() {
        let values = standard_normal(40_001, &mut stream(1, Purpose::Evaluation, 9, 9));
        assert_eq!(values.len(), 40_001);
        let mean = values.iter().sum::<f32>() / 40_001.0;
        let variance = values.iter().map(|v| v * v).sum::<f32>() / 40_001.0;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "mean {mean}, variance {variance}");
    }
}
