//! Schedules in closed form: every value of a step is a function of the step's number, so that resuming a run is only a
//! matter of knowing the step.

use std::collections::BTreeMap;
use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::duration::Duration;
use crate::loss::{GramConfig, LossConfig, SNAPSHOT};

/// How a curve is put together from its warm-up and its cosine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// DINO, iBOT, DINOv2: the warm-up reaches its peak in its last step, the cosine begins there and stops one step short
    /// of the end value.
    Cosine,
    /// DINOv3's second form: the cosine begins with the peak and ends with the end value, which then stays.
    Blocks,
}

/// A curve as a recipe writes it: linear from `start` to `peak`, then a cosine to `end`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CurveConfig {
    /// Value of the first step, when there is a warm-up.
    pub start: f64,
    /// Value after the warm-up.
    pub peak: f64,
    /// Value at the end.
    pub end: f64,
    /// Length of the linear part.
    pub warmup: Duration,
    /// Length of the cosine, by default all that is left; only with `form = "blocks"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cosine: Option<Duration>,
}

impl Default for CurveConfig {
    fn default() -> Self {
        Self::constant(0.0)
    }
}

impl CurveConfig {
    /// The same value in every step.
    pub fn constant(value: f64) -> Self {
        Self { start: value, peak: value, end: value, warmup: Duration::ZERO, cosine: None }
    }
}

/// A curve over a known number of steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// How its parts meet.
    pub form: Form,
    /// Value of the first step of the warm-up.
    pub start: f64,
    /// Value after the warm-up.
    pub peak: f64,
    /// Value at the end.
    pub end: f64,
    /// Steps of the warm-up.
    pub warmup: u64,
    /// Steps of the cosine, with [`Form::Blocks`]; `None` for all that are left.
    pub cosine: Option<u64>,
    /// With [`Form::Cosine`]: the share by which the cosine is stretched and cut off, so that it reaches the end value
    /// with a slope (DINOv3's `schedule_trunc_extra`).
    pub trunc_extra: f64,
    /// All steps.
    pub total: u64,
}

impl Curve {
    /// The value at a step, counted from 0; beyond the last step, the end value.
    pub fn at(&self, step: u64) -> f64 {
        if step >= self.total {
            return self.end;
        }
        if step < self.warmup {
            let divisions = match self.form {
                Form::Cosine => self.warmup.max(2) - 1,
                Form::Blocks => self.warmup,
            };
            return self.start + (self.peak - self.start) * step as f64 / divisions as f64;
        }
        let i = step - self.warmup;
        let n = self.total - self.warmup;
        if n == 1 && self.form == Form::Cosine {
            return self.peak;
        }
        let share = match self.form {
            Form::Cosine if self.trunc_extra > 0.0 => {
                let stretched = (((1.0 + self.trunc_extra) * n as f64) as u64).max(2);
                let raw = |i: u64| ((PI * i as f64 / (stretched - 1) as f64).cos() + 1.0) / 2.0;
                let last = raw(n - 1);
                (raw(i) - last) / (1.0 - last)
            }
            Form::Cosine => (1.0 + (PI * i as f64 / n as f64).cos()) / 2.0,
            Form::Blocks => {
                let length = self.cosine.unwrap_or(n);
                if i >= length {
                    return self.end;
                }
                (1.0 + (PI * i as f64 / (length.max(2) - 1) as f64).cos()) / 2.0
            }
        };
        self.end + (self.peak - self.end) * share
    }
}

/// How the learning rate follows the batch size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrScaling {
    /// As written.
    None,
    /// `× batch / 256` (DINO, iBOT).
    #[serde(rename = "linear_256")]
    Linear256,
    /// `× √(batch / 1024)` (DINOv2).
    #[serde(rename = "sqrt_1024")]
    Sqrt1024,
    /// `× 4·√(batch / 1024)` (DINOv3, whose recipes state a rate four times smaller).
    #[serde(rename = "sqrt_1024_times_4")]
    Sqrt1024Times4,
}

impl LrScaling {
    /// The factor for a batch.
    pub fn factor(self, batch: usize) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Linear256 => batch as f64 / 256.0,
            Self::Sqrt1024 => (batch as f64 / 1024.0).sqrt(),
            Self::Sqrt1024Times4 => 4.0 * (batch as f64 / 1024.0).sqrt(),
        }
    }
}

/// The `[schedule]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// How curves are put together.
    pub form: Form,
    /// Stretch of the cosines, see [`Curve::trunc_extra`]; with `form = "cosine"`.
    pub trunc_extra: f64,
    /// Learning rate, before scaling. Unstable: halve `peak`, double `warmup`.
    pub lr: CurveConfig,
    /// Scaling of the learning rate's peak (and end, with `form = "blocks"`).
    pub lr_scaling: LrScaling,
    /// Weight decay.
    pub weight_decay: CurveConfig,
    /// Momentum of the teacher: the share of its old weights that a step keeps.
    pub teacher_momentum: CurveConfig,
    /// Temperature of the teacher's targets. Unstable: lower `peak`, lengthen `warmup`.
    pub teacher_temp: CurveConfig,
    /// Temperature of its targets for patches, where it is another (iBOT's command line; its recipes have one for both).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher_patch_temp: Option<CurveConfig>,
    /// For how long the prototypes stay as they are.
    pub freeze_last_layer: Duration,
    /// For how long the backbone stays as it is, while the heads learn: for a run that starts from trained weights.
    pub freeze_backbone: Duration,
    /// Factors of the weights in `[loss]`.
    pub loss: LossFactors,
}

/// The `[schedule.loss]` table: a curve for each weight in `[loss]` itself and for that of
/// `[loss.gram]`, which it multiplies; 1 throughout unless set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossFactors {
    /// Of `loss.dino_weight`.
    pub dino: CurveConfig,
    /// Of `loss.local_weight`. Where it is 0 the local crops are still counted, other than with a weight of 0: the pairs of
    /// global crops keep their share.
    pub local: CurveConfig,
    /// Of `loss.ibot_weight`.
    pub ibot: CurveConfig,
    /// Of `loss.koleo_weight`.
    pub koleo: CurveConfig,
    /// Of `loss.gram.weight`.
    pub gram: CurveConfig,
}

impl Default for LossFactors {
    fn default() -> Self {
        let one = || CurveConfig::constant(1.0);
        Self { dino: one(), local: one(), ibot: one(), koleo: one(), gram: one() }
    }
}

impl LossFactors {
    /// The curves by name.
    pub fn named(&self) -> [(&'static str, &CurveConfig); 5] {
        [
            ("dino", &self.dino),
            ("local", &self.local),
            ("ibot", &self.ibot),
            ("koleo", &self.koleo),
            ("gram", &self.gram),
        ]
    }
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        let curve = |start, peak, end, warmup| CurveConfig { start, peak, end, warmup, cosine: None };
        Self {
            form: Form::Cosine,
            trunc_extra: 0.0,
            lr: curve(0.0, 1e-3, 1e-6, Duration::Epochs(10.0)),
            lr_scaling: LrScaling::Sqrt1024Times4,
            weight_decay: curve(0.04, 0.04, 0.4, Duration::ZERO),
            teacher_momentum: curve(0.992, 0.992, 1.0, Duration::ZERO),
            teacher_temp: curve(0.04, 0.07, 0.07, Duration::Epochs(30.0)),
            teacher_patch_temp: None,
            freeze_last_layer: Duration::Epochs(1.0),
            freeze_backbone: Duration::ZERO,
            loss: LossFactors::default(),
        }
    }
}

/// The values of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scheduled {
    /// The step, from 0.
    pub step: u64,
    /// Learning rate.
    pub lr: f64,
    /// Whether the prototypes stay as they are.
    pub last_layer_frozen: bool,
    /// Whether the backbone stays as it is.
    pub backbone_frozen: bool,
    /// Weight decay.
    pub weight_decay: f64,
    /// Momentum of the teacher.
    pub teacher_momentum: f64,
    /// Temperature of the teacher's CLS targets.
    pub teacher_temp: f64,
    /// Temperature of the teacher's patch targets.
    pub teacher_patch_temp: f64,
    /// Whether the Gram teacher becomes a copy of the teacher after the step.
    pub refresh_gram_teacher: bool,
}

/// When the Gram teacher becomes a copy of the run's own teacher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GramRefresh {
    /// Whether a first copy is made once `from` steps are taken, whatever the period.
    pub snapshot: bool,
    /// Steps before which there is none.
    pub from: u64,
    /// After steps whose number it divides; 0: after none.
    pub every: u64,
    /// At most so many replacements; 0 sets no limit.
    pub max: u64,
}

impl GramRefresh {
    /// Whether it does once `taken` steps are taken. Before the first step, only a snapshot does.
    pub fn is_due(&self, taken: u64) -> bool {
        if self.snapshot && taken == self.from {
            return true;
        }
        if self.every == 0 || taken == 0 || taken < self.from || !taken.is_multiple_of(self.every) {
            return false;
        }
        // Multiples of the period from `from` on, up to this one.
        let earlier = taken / self.every - self.from.max(1).div_ceil(self.every);
        self.max == 0 || earlier < self.max
    }
}

/// All schedules of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Learning rate, scaled.
    pub lr: Curve,
    /// Weight decay.
    pub weight_decay: Curve,
    /// Momentum of the teacher.
    pub teacher_momentum: Curve,
    /// Temperature of the teacher's CLS targets.
    pub teacher_temp: Curve,
    /// Temperature of its patch targets.
    pub teacher_patch_temp: Curve,
    /// Steps in which the prototypes stay as they are.
    pub freeze_steps: u64,
    /// Steps in which the backbone stays as it is.
    pub freeze_backbone_steps: u64,
    /// Factors of weights of losses, by the name of the loss; 1 for those that are not here.
    pub loss: BTreeMap<&'static str, Curve>,
    /// When the Gram teacher is replaced.
    pub gram_refresh: GramRefresh,
    /// All steps.
    pub total: u64,
}

impl Schedule {
    /// The schedules of a run of `total` steps with batches of `batch` images from `samples` images.
    ///
    /// # Errors
    /// Parts that are longer than the run, with both lengths; a run of no step has no use for them.
    pub fn new(
        config: &ScheduleConfig,
        gram: &GramConfig,
        total: u64,
        batch: usize,
        samples: usize,
    ) -> Result<Self, String> {
        let steps = |duration: Duration| duration.steps(batch, samples);
        let curve = |name: &str, c: &CurveConfig, scale_peak: f64, scale_end: f64| {
            let (warmup, cosine) = (steps(c.warmup), c.cosine.map(steps));
            if config.form == Form::Cosine && cosine.is_some() {
                return Err(format!("`schedule.{name}.cosine` needs `schedule.form = \"blocks\"`"));
            }
            let parts = warmup + cosine.unwrap_or(0);
            if parts > total && total > 0 {
                return Err(format!(
                    "`schedule.{name}`: warm-up and cosine take {parts} steps, the whole run {total}\n\nhint: shorten \
                     `schedule.{name}.warmup`, or lengthen `train.length`"
                ));
            }
            Ok(Curve {
                form: config.form,
                start: c.start,
                peak: c.peak * scale_peak,
                end: c.end * scale_end,
                warmup,
                cosine,
                trunc_extra: config.trunc_extra,
                total,
            })
        };
        let factor = config.lr_scaling.factor(batch);
        let end_factor = if config.form == Form::Blocks { factor } else { 1.0 };
        let mut loss = BTreeMap::new();
        for (name, factor) in config.loss.named() {
            loss.insert(name, curve(&format!("loss.{name}"), factor, 1.0, 1.0)?);
        }
        let is_used = gram.weight > 0.0;
        Ok(Self {
            lr: curve("lr", &config.lr, factor, end_factor)?,
            weight_decay: curve("weight_decay", &config.weight_decay, 1.0, 1.0)?,
            teacher_momentum: curve("teacher_momentum", &config.teacher_momentum, 1.0, 1.0)?,
            teacher_patch_temp: match &config.teacher_patch_temp {
                Some(patch_temp) => curve("teacher_patch_temp", patch_temp, 1.0, 1.0)?,
                None => curve("teacher_temp", &config.teacher_temp, 1.0, 1.0)?,
            },
            teacher_temp: curve("teacher_temp", &config.teacher_temp, 1.0, 1.0)?,
            freeze_steps: steps(config.freeze_last_layer),
            freeze_backbone_steps: steps(config.freeze_backbone),
            loss,
            gram_refresh: GramRefresh {
                snapshot: is_used && gram.teacher == SNAPSHOT,
                from: steps(gram.refresh_from),
                every: if is_used { steps(gram.refresh_every) } else { 0 },
                max: gram.max_refreshes,
            },
            total,
        })
    }

    /// The values of a step, counted from 0.
    pub fn at(&self, step: u64) -> Scheduled {
        Scheduled {
            step,
            lr: self.lr.at(step),
            last_layer_frozen: step < self.freeze_steps,
            backbone_frozen: step < self.freeze_backbone_steps,
            weight_decay: self.weight_decay.at(step),
            teacher_momentum: self.teacher_momentum.at(step),
            teacher_temp: self.teacher_temp.at(step),
            teacher_patch_temp: self.teacher_patch_temp.at(step),
            refresh_gram_teacher: self.gram_refresh.is_due(step + 1),
        }
    }

    /// The losses of a step: their weights times what the schedule says.
    pub fn losses_at(&self, config: &LossConfig, step: u64) -> LossConfig {
        let factor = |name: &str| self.loss.get(name).map_or(1.0, |curve| curve.at(step));
        let mut config = config.clone();
        config.dino_weight *= factor("dino");
        config.local_weight *= factor("local");
        config.ibot_weight *= factor("ibot");
        config.koleo_weight *= factor("koleo");
        config.gram.weight *= factor("gram");
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(
        form: Form,
        [start, peak, end]: [f64; 3],
        warmup: u64,
        cosine: Option<u64>,
        extra: f64,
        total: u64,
    ) -> Curve {
        Curve { form, start, peak, end, warmup, cosine, trunc_extra: extra, total }
    }

    #[test]
    fn curves_by_hand() {
        let cases = [
            (
                curve(Form::Cosine, [0.0, 1.0, 0.0], 2, None, 0.0, 10),
                vec![0.0, 1.0, 1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060, 0.0],
            ),
            (
                curve(Form::Cosine, [0.0, 1.0, 0.0], 0, None, 0.25, 8),
                vec![1.0, 0.965852, 0.867526, 0.716881, 0.532089, 0.335437, 0.150644, 0.0],
            ),
            (
                curve(Form::Blocks, [0.0, 1.0, 0.1], 2, None, 0.0, 10),
                vec![0.0, 0.5, 1.0, 0.955436, 0.830570, 0.650134, 0.449866, 0.269430, 0.144564, 0.1],
            ),
            (curve(Form::Blocks, [0.0, 0.0, 2.0], 3, Some(3), 0.0, 8), vec![0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0]),
            (curve(Form::Cosine, [0.5, 1.0, 0.0], 1, None, 0.0, 1), vec![0.5, 0.0]),
            (curve(Form::Blocks, [0.5, 1.0, 0.0], 3, None, 0.0, 3), vec![0.5, 2.0 / 3.0, 5.0 / 6.0, 0.0]),
        ];
        assert_eq!(cases.len(), 6);
        for (curve, expected) in cases {
            for (step, expected) in expected.into_iter().enumerate() {
                let found = curve.at(step as u64);
                assert!((found - expected).abs() < 1e-6, "{curve:?} at {step}: {found}, not {expected}");
            }
        }
    }

    #[test]
    fn the_two_square_root_rules_agree_on_the_references_own_rates() {
        let v2 = 0.004 * LrScaling::Sqrt1024.factor(2048);
        let v3 = 0.001 * LrScaling::Sqrt1024Times4.factor(2048);
        assert!((v2 - 0.00565685).abs() < 1e-8 && (v2 - v3).abs() < 1e-12);
    }

    /// The replacements of DINOv3's rule, counted one by one.
    #[test]
    fn the_gram_teacher_is_replaced_when_the_rule_says() {
        let mut cases = 0;
        for (from, every, max) in [(3, 3, 1), (0, 4, 2), (5, 2, 0), (7, 3, 2), (1, 1, 3), (4, 0, 0)] {
            for snapshot in [false, true] {
                let refresh = GramRefresh { snapshot, from, every, max };
                let (mut count, mut expected) = (0, Vec::new());
                for taken in 0..30u64 {
                    let multiple = every > 0 && taken > 0 && taken >= from && taken % every == 0;
                    let allowed = multiple && (max == 0 || count < max);
                    count += u64::from(multiple);
                    if allowed || (snapshot && taken == from) {
                        expected.push(taken);
                    }
                }
                let found: Vec<u64> = (0..30).filter(|&taken| refresh.is_due(taken)).collect();
                assert_eq!(found, expected, "{refresh:?}");
                cases += 1;
            }
        }
        assert_eq!(cases, 12);
    }

    #[test]
    fn a_step_replaces_the_gram_teacher_once_it_is_taken() {
        let gram = GramConfig { weight: 1.0, refresh_every: Duration::Steps(3), ..GramConfig::default() };
        let gram = GramConfig { teacher: "a file".into(), refresh_from: Duration::Steps(4), ..gram };
        let mut config = ScheduleConfig::default();
        config.lr.warmup = Duration::ZERO;
        config.teacher_temp.warmup = Duration::ZERO;
        let schedule = Schedule::new(&config, &gram, 10, 3, 30).expect("it fits");
        let found: Vec<u64> = (0..10).filter(|&step| schedule.at(step).refresh_gram_teacher).collect();
        // Steps are counted from 0: the sixth and the ninth.
        assert_eq!(found, [5, 8]);
    }

    #[test]
    fn a_weight_is_its_constant_times_its_curve() {
        let mut config = ScheduleConfig { form: Form::Blocks, ..ScheduleConfig::default() };
        config.lr.warmup = Duration::ZERO;
        config.teacher_temp.warmup = Duration::ZERO;
        config.loss.gram = CurveConfig { start: 0.0, peak: 1.0, end: 1.0, warmup: Duration::Steps(4), cosine: None };
        let schedule = Schedule::new(&config, &GramConfig::default(), 10, 3, 30).expect("it fits");
        let mut losses = LossConfig { koleo_weight: 0.3, ..LossConfig::default() };
        losses.gram.weight = 2.0;
        let found: Vec<f64> = [0, 1, 3, 4, 9].map(|step| schedule.losses_at(&losses, step).gram.weight).into();
        assert_eq!(found, [0.0, 0.5, 1.5, 2.0, 2.0]);
        assert_eq!(schedule.losses_at(&losses, 3).koleo_weight, 0.3);
    }

    #[test]
    fn patches_have_the_temperature_of_cls_unless_they_have_their_own() {
        let mut config = ScheduleConfig::default();
        config.lr.warmup = Duration::ZERO;
        config.teacher_temp.warmup = Duration::Steps(4);
        let at = |config: &ScheduleConfig, step| {
            let schedule = Schedule::new(config, &GramConfig::default(), 10, 3, 30).expect("it fits");
            (schedule.at(step).teacher_temp, schedule.at(step).teacher_patch_temp)
        };
        assert_eq!(at(&config, 0), (0.04, 0.04));
        assert_eq!(at(&config, 7), (0.07, 0.07));
        config.teacher_patch_temp = Some(CurveConfig::constant(0.05));
        assert_eq!(at(&config, 0), (0.04, 0.05));
        assert_eq!(at(&config, 7), (0.07, 0.05));
    }

    #[test]
    fn a_warmup_longer_than_the_run_is_an_error_with_both_lengths() {
        let error = Schedule::new(&ScheduleConfig::default(), &GramConfig::default(), 50, 10, 100)
            .expect_err("10 epochs are 100 steps");
        assert!(error.contains("100 steps") && error.contains("50"), "{error}");
    }
}
