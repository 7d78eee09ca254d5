//! Limited-memory BFGS (Nocedal & Wright, *Numerical Optimization*, 2nd ed., algorithms 7.4 and 7.5) with a line search for
//! the strong Wolfe conditions (algorithms 3.5 and 3.6), for smooth functions of many variables in `f64`.

use std::collections::VecDeque;

/// Pairs of steps and gradient changes that model the curvature.
const MEMORY: usize = 10;
/// Sufficient decrease: `f(x + αp) ≤ f(x) + 1e-4·α·∇f·p`.
const DECREASE: f64 = 1e-4;
/// Curvature: `|∇f(x + αp)·p| ≤ 0.9·|∇f(x)·p|`.
const CURVATURE: f64 = 0.9;
/// Relative rounding error of a function value. Below it values cannot tell whether a step descends, and slopes do
/// (the approximate conditions of Hager & Zhang 2005, eq. 4.1).
const ROUNDING: f64 = 1e-13;
/// Evaluations that one line search may take.
const MAX_EVALUATIONS: usize = 40;

/// Where a minimisation ended.
#[derive(Clone, Debug)]
pub(crate) struct Minimum {
    pub(crate) point: Vec<f64>,
    pub(crate) value: f64,
    /// Largest absolute component of the gradient.
    pub(crate) gradient_norm: f64,
    pub(crate) iterations: usize,
}

/// Minimises `function`, which returns its value and writes its gradient, from `start`.
///
/// Stops when no component of the gradient exceeds `tolerance`, after `max_iterations`, or when rounding leaves no step
/// that decreases the function.
pub(crate) fn minimize(
    mut function: impl FnMut(&[f64], &mut [f64]) -> f64,
    start: Vec<f64>,
    tolerance: f64,
    max_iterations: usize,
) -> Minimum {
    let mut point = start;
    let mut gradient = vec![0.0; point.len()];
    let mut value = function(&point, &mut gradient);
    let mut pairs: VecDeque<Pair> = VecDeque::with_capacity(MEMORY);
    let mut iterations = 0;
    while iterations < max_iterations && largest(&gradient) > tolerance {
        let mut direction = descent_direction(&gradient, &pairs);
        let mut slope = dot(&direction, &gradient);
        if slope >= 0.0 || !slope.is_finite() {
            // Rounding spoiled the model of the curvature: start it anew.
            pairs.clear();
            direction = gradient.iter().map(|g| -g).collect();
            slope = -dot(&gradient, &gradient);
        }
        // The model knows no scale yet at first: a step of length at most 1.
        let first_step = if pairs.is_empty() { 1.0f64.min(1.0 / dot(&gradient, &gradient).sqrt()) } else { 1.0 };
        let mut line =
            Line { function: &mut function, point: &point, direction: &direction, value, slope, evaluations: 0 };
        let Some(found) = line.search(first_step) else {
            if pairs.is_empty() {
                break;
            }
            pairs.clear();
            continue;
        };
        let change: Vec<f64> = found.gradient.iter().zip(&gradient).map(|(new, old)| new - old).collect();
        let step: Vec<f64> = direction.iter().map(|d| found.length * d).collect();
        point.iter_mut().zip(&step).for_each(|(x, s)| *x += s);
        (value, gradient) = (found.value, found.gradient);
        let curvature = dot(&step, &change);
        if curvature > f64::EPSILON * dot(&change, &change) {
            if pairs.len() == MEMORY {
                pairs.pop_front();
            }
            pairs.push_back(Pair { step, change, inverse_curvature: 1.0 / curvature });
        }
        iterations += 1;
    }
    let gradient_norm = largest(&gradient);
    Minimum { point, value, gradient_norm, iterations }
}

/// A step and the change of the gradient over it.
struct Pair {
    step: Vec<f64>,
    change: Vec<f64>,
    inverse_curvature: f64,
}

/// Minus the gradient, multiplied by the inverse Hessian that the pairs describe (two-loop recursion).
fn descent_direction(gradient: &[f64], pairs: &VecDeque<Pair>) -> Vec<f64> {
    let mut direction: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut coefficients = Vec::with_capacity(pairs.len());
    for pair in pairs.iter().rev() {
        let coefficient = pair.inverse_curvature * dot(&pair.step, &direction);
        add_scaled(&mut direction, -coefficient, &pair.change);
        coefficients.push(coefficient);
    }
    if let Some(newest) = pairs.back() {
        let scale = 1.0 / (newest.inverse_curvature * dot(&newest.change, &newest.change));
        direction.iter_mut().for_each(|d| *d *= scale);
    }
    for (pair, coefficient) in pairs.iter().zip(coefficients.into_iter().rev()) {
        let correction = pair.inverse_curvature * dot(&pair.change, &direction);
        add_scaled(&mut direction, coefficient - correction, &pair.step);
    }
    direction
}

/// A function along a direction: `φ(α) = f(x + αp)`.
struct Line<'a, F> {
    function: &'a mut F,
    point: &'a [f64],
    direction: &'a [f64],
    /// `φ(0)`.
    value: f64,
    /// `φ'(0)`, negative.
    slope: f64,
    evaluations: usize,
}

/// A point on a line.
#[derive(Clone)]
struct Trial {
    length: f64,
    value: f64,
    slope: f64,
    gradient: Vec<f64>,
}

impl<F: FnMut(&[f64], &mut [f64]) -> f64> Line<'_, F> {
    fn at(&mut self, length: f64) -> Trial {
        self.evaluations += 1;
        let point: Vec<f64> = self.point.iter().zip(self.direction).map(|(x, d)| x + length * d).collect();
        let mut gradient = vec![0.0; point.len()];
        let value = (self.function)(&point, &mut gradient);
        let slope = dot(&gradient, self.direction);
        Trial { length, value, slope, gradient }
    }

    fn decreases(&self, trial: &Trial) -> bool {
        trial.value <= self.value + DECREASE * trial.length * self.slope
    }

    fn is_flat(&self, trial: &Trial) -> bool {
        trial.slope.abs() <= -CURVATURE * self.slope
    }

    /// The strong Wolfe conditions, or their approximation by slopes where values differ by rounding only.
    fn accepts(&self, trial: &Trial) -> bool {
        let level = trial.value <= self.value + ROUNDING * self.value.abs();
        let near_minimum = trial.slope >= CURVATURE * self.slope && trial.slope <= (2.0 * DECREASE - 1.0) * self.slope;
        self.decreases(trial) && self.is_flat(trial) || level && near_minimum
    }

    /// A point that fulfils the conditions, or failing that the best that decreases the function at all.
    fn search(&mut self, first_length: f64) -> Option<Trial> {
        let mut previous = Trial { length: 0.0, value: self.value, slope: self.slope, gradient: Vec::new() };
        let mut length = first_length;
        while self.evaluations < MAX_EVALUATIONS {
            let trial = self.at(length);
            if self.accepts(&trial) {
                return Some(trial);
            }
            // Not finite: too far, look between.
            let too_high = !trial.value.is_finite() || !self.decreases(&trial);
            if too_high || (self.evaluations > 1 && trial.value >= previous.value) {
                return self.zoom(previous, trial);
            }
            if trial.slope >= 0.0 {
                return self.zoom(trial, previous);
            }
            length = 2.0 * trial.length;
            previous = trial;
        }
        Some(previous).filter(|best| best.value < self.value && !best.gradient.is_empty())
    }

    /// Narrows the interval between `low`, the lowest point so far, and `high`, with a minimum between them.
    fn zoom(&mut self, mut low: Trial, mut high: Trial) -> Option<Trial> {
        while self.evaluations < MAX_EVALUATIONS {
            let trial = self.at(between(&low, &high));
            if self.accepts(&trial) {
                return Some(trial);
            }
            if !trial.value.is_finite() || !self.decreases(&trial) || trial.value >= low.value {
                high = trial;
            } else {
                if trial.slope * (high.length - low.length) >= 0.0 {
                    high = low;
                }
                low = trial;
            }
            if (high.length - low.length).abs() <= f64::EPSILON * high.length.abs() {
                break;
            }
        }
        Some(low).filter(|best| best.value < self.value && !best.gradient.is_empty())
    }
}

/// The minimum of the cubic through two points and their slopes if it lies well between them, else the middle.
fn between(a: &Trial, b: &Trial) -> f64 {
    let (left, right) = (a.length.min(b.length), a.length.max(b.length));
    let middle = 0.5 * (left + right);
    let d1 = a.slope + b.slope - 3.0 * (a.value - b.value) / (a.length - b.length);
    let d2 = (b.length - a.length).signum() * (d1 * d1 - a.slope * b.slope).sqrt();
    let cubic = b.length - (b.length - a.length) * (b.slope + d2 - d1) / (b.slope - a.slope + 2.0 * d2);
    let margin = 0.1 * (right - left);
    if cubic >= left + margin && cubic <= right - margin { cubic } else { middle }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(target: &mut [f64], factor: f64, values: &[f64]) {
    target.iter_mut().zip(values).for_each(|(t, v)| *t += factor * v);
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most: f64, value| if value.is_nan() { f64::NAN } else { most.max(value.abs()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solves_an_ill_conditioned_quadratic() {
        // f = ½ Σ a_i (x_i − i)², a from 1e-3 to 1e4.
        let scales: Vec<f64> = (0..8).map(|i| 10f64.powi(i - 3)).collect();
        let function = |x: &[f64], gradient: &mut [f64]| {
            let mut value = 0.0;
            for i in 0..8 {
                let off = x[i] - i as f64;
                gradient[i] = scales[i] * off;
                value += 0.5 * scales[i] * off * off;
            }
            value
        };
        let minimum = minimize(function, vec![3.0; 8], 1e-10, 500);
        assert!(minimum.gradient_norm <= 1e-10 && minimum.iterations < 200, "{minimum:?}");
        assert!(minimum.point.iter().enumerate().all(|(i, x)| (x - i as f64).abs() < 1e-6));
    }

    #[test]
    fn follows_the_valley_of_rosenbrock() {
        let function = |x: &[f64], gradient: &mut [f64]| {
            let (a, b) = (1.0 - x[0], x[1] - x[0] * x[0]);
            gradient[0] = -2.0 * a - 400.0 * x[0] * b;
            gradient[1] = 200.0 * b;
            a * a + 100.0 * b * b
        };
        let minimum = minimize(function, vec![-1.2, 1.0], 1e-9, 200);
        assert!(minimum.iterations < 80, "{minimum:?}");
        assert!((minimum.point[0] - 1.0).abs() < 1e-8 && (minimum.point[1] - 1.0).abs() < 1e-8, "{minimum:?}");
    }

    #[test]
    fn a_step_into_infinity_is_taken_back() {
        // −ln x + x, infinite for x ≤ 0: the first step from far right overshoots.
        let function = |x: &[f64], gradient: &mut [f64]| {
            gradient[0] = 50.0 * (1.0 - 1.0 / x[0]);
            if x[0] > 0.0 { 50.0 * (x[0] - x[0].ln()) } else { f64::INFINITY }
        };
        let minimum = minimize(function, vec![0.3], 1e-9, 100);
        assert!((minimum.point[0] - 1.0).abs() < 1e-9, "{minimum:?}");
    }

    #[test]
    fn a_start_at_the_minimum_stays_and_the_iteration_limit_holds() {
        let function = |x: &[f64], gradient: &mut [f64]| {
            gradient[0] = 4.0 * x[0].powi(3);
            x[0].powi(4)
        };
        let there = minimize(function, vec![0.0], 1e-9, 50);
        assert_eq!((there.iterations, there.value), (0, 0.0));
        assert_eq!(minimize(function, vec![5.0], 0.0, 3).iterations, 3);
    }
}
