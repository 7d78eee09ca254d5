//! Every loss beside its definition: loops in double precision, and slopes of those loops by finite differences.

use burn::tensor::{Device, Int, Tensor, TensorData};
use dinoxide_kernels::Precision::Fp32;
use dinoxide_losses::gram::{Negatives, gram};
use dinoxide_losses::koleo::{koleo, koleo_in_groups};
use dinoxide_losses::sinkhorn::sinkhorn_knopp;
use dinoxide_losses::{Loss, dino, ibot};

/// Numbers in (−1, 1) that single precision holds exactly (SplitMix64).
fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 41) as f64 / f64::from(1u32 << 22) - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Rows of `width` that are distributions, as single precision holds them.
fn distributions(rows: usize, width: usize, seed: u64) -> Vec<f64> {
    let mut values = numbers(rows * width, seed);
    for row in values.chunks_exact_mut(width) {
        row.iter_mut().for_each(|v| *v = (2.0 * *v).exp());
        let sum: f64 = row.iter().sum();
        row.iter_mut().for_each(|v| *v = f64::from((*v / sum) as f32));
    }
    values
}

fn tensor<const D: usize>(values: &[f64], shape: [usize; D], device: &Device) -> Tensor<D> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// A leaf of the student's graph.
fn leaf<const D: usize>(values: &[f64], shape: [usize; D]) -> Tensor<D> {
    tensor(values, shape, &Device::flex().autodiff()).require_grad()
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("single precision")
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `−Σ_k target_k · log softmax(x·Wᵀ / temperature)_k` of one row.
fn cross_entropy(x: &[f64], vectors: &[f64], target: &[f64], temperature: f64) -> f64 {
    let logits: Vec<f64> = vectors.chunks_exact(x.len()).map(|w| dot(x, w) / temperature).collect();
    let log_sum = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
    target.iter().zip(&logits).map(|(t, l)| t * (log_sum - l)).sum()
}

/// A gradient that was found, beside the slopes of `objective` in the same values.
#[track_caller]
fn assert_slopes(what: &str, at: &[f64], found: Vec<f32>, tolerance: f64, objective: impl Fn(&[f64]) -> f64) {
    assert_eq!(found.len(), at.len(), "{what}");
    let mut at = at.to_vec();
    let mut largest = 0.0f64;
    for (i, found) in found.into_iter().enumerate() {
        let (h, value) = (1e-6, at[i]);
        let mut with = |v: f64| {
            at[i] = v;
            objective(&at)
        };
        let slope = (with(value + h) - with(value - h)) / (2.0 * h);
        at[i] = value;
        assert!((f64::from(found) - slope).abs() < tolerance, "{what}, element {i}: {found} and {slope}");
        largest = largest.max(slope.abs());
    }
    assert!(largest > 100.0 * tolerance, "{what}: slopes of at most {largest} say nothing at {tolerance}");
}

#[track_caller]
fn assert_value(what: &str, loss: &Loss, expected: f64) {
    let value = f64::from(host(loss.value.clone())[0]);
    assert!((value - expected).abs() < 2e-6 * expected.abs().max(1.0), "{what}: {value} and {expected}");
}

const TEMPERATURE: f64 = 0.3;

/// A loss on prototypes: value, and gradients with respect to bottleneck and prototypes.
#[track_caller]
fn compare(
    what: &str,
    [rows, width, prototypes]: [usize; 3],
    loss: impl Fn(Tensor<2>, Tensor<2>) -> Loss,
    objective: impl Fn(&[f64], &[f64]) -> f64,
) {
    let (x, w) = (numbers(rows * width, 1), numbers(prototypes * width, 2));
    let (x_leaf, w_leaf) = (leaf(&x, [rows, width]), leaf(&w, [prototypes, width]));
    let found = loss(x_leaf.clone(), w_leaf.clone());
    assert_value(what, &found, objective(&x, &w));
    let gradients = found.graph.backward();
    let of = |leaf: &Tensor<2>| host(leaf.grad(&gradients).expect("a gradient"));
    assert_slopes(&format!("{what}: bottleneck"), &x, of(&x_leaf), 1e-5, |x| objective(x, &w));
    assert_slopes(&format!("{what}: prototypes"), &w, of(&w_leaf), 1e-5, |w| objective(&x, w));
}

#[test]
fn dino_equals_loops_over_samples_and_pairs_of_crops() {
    let (batch, width, prototypes) = (4, 3, 5);
    let mut cases = 0;
    // Student crops, teacher crops, and whether a crop is left out against itself; `None`: local crops.
    for (students, teachers, ignore_diagonal) in
        [(2, 2, Some(true)), (2, 2, Some(false)), (3, 2, Some(true)), (1, 2, None), (3, 2, None)]
    {
        let targets = distributions(teachers * batch, prototypes, 3);
        let given = tensor(&targets, [teachers, batch, prototypes], &Device::flex());
        let objective = |x: &[f64], w: &[f64]| {
            let (mut sum, mut count) = (0.0, 0.0);
            for s in 0..students {
                for t in (0..teachers).filter(|&t| ignore_diagonal != Some(true) || s != t) {
                    for b in 0..batch {
                        let x = &x[(s * batch + b) * width..][..width];
                        let target = &targets[(t * batch + b) * prototypes..][..prototypes];
                        sum += cross_entropy(x, w, target, TEMPERATURE);
                        count += 1.0;
                    }
                }
            }
            sum / count
        };
        let what = format!("{students} student crops, {teachers} teacher crops, {ignore_diagonal:?}");
        let loss = |x, w| match ignore_diagonal {
            Some(ignore) => dino::global(x, w, given.clone(), TEMPERATURE, ignore, Fp32),
            None => dino::local(x, w, given.clone(), TEMPERATURE, Fp32),
        };
        compare(&what, [students * batch, width, prototypes], loss, objective);
        cases += 1;
    }
    assert_eq!(cases, 5);
}

#[test]
fn ibot_equals_loops_over_crops_and_their_masked_patches() {
    let (width, prototypes) = (4, 6);
    // Masked patches of each crop; one crop has none, and counts in the mean.
    let masked = [3usize, 0, 1, 5];
    let rows: usize = masked.iter().sum();
    let targets = distributions(rows, prototypes, 4);
    let weights: Vec<f64> = masked.iter().flat_map(|&count| vec![1.0 / count as f64; count]).collect();
    let objective = |x: &[f64], w: &[f64]| {
        let mut row = 0;
        let mut sum = 0.0;
        for count in masked {
            let mut of_crop = 0.0;
            for _ in 0..count {
                let (x, target) = (&x[row * width..][..width], &targets[row * prototypes..][..prototypes]);
                of_crop += cross_entropy(x, w, target, TEMPERATURE) / count as f64;
                row += 1;
            }
            sum += of_crop;
        }
        sum / masked.len() as f64
    };
    let loss = |x, w| {
        let device = Device::flex();
        let (targets, weights) = (tensor(&targets, [rows, prototypes], &device), tensor(&weights, [rows], &device));
        ibot::masked_patches(x, w, targets, weights, masked.len(), TEMPERATURE, Fp32)
    };
    compare("iBOT", [rows, width, prototypes], loss, objective);
}

const EPS: f64 = 1e-8;

/// KoLeo as a loop over rows, each with the most similar rows of its group.
fn koleo_by_loops(x: &[f64], width: usize, nearest: usize, group: usize) -> f64 {
    let rows: Vec<Vec<f64>> = x
        .chunks_exact(width)
        .map(|row| {
            let length = dot(row, row).sqrt().max(EPS);
            row.iter().map(|v| v / length).collect()
        })
        .collect();
    let mut sum = 0.0;
    for i in 0..rows.len() {
        let first = i / group * group;
        let mut others: Vec<usize> = (first..first + group).filter(|&j| j != i).collect();
        others.sort_by(|&a, &b| dot(&rows[i], &rows[b]).total_cmp(&dot(&rows[i], &rows[a])));
        for &j in &others[..nearest] {
            let square: f64 = rows[i].iter().zip(&rows[j]).map(|(a, b)| (a - b + EPS).powi(2)).sum();
            sum -= (square.sqrt() + EPS).ln();
        }
    }
    sum / (rows.len() * nearest) as f64
}

#[test]
fn koleo_equals_a_loop_over_rows_and_their_neighbours() {
    let (batch, width) = (6, 4);
    let x = numbers(batch * width, 5);
    let mut cases = 0;
    for (nearest, group) in [(1, 6), (1, 3), (1, 2), (2, 6), (2, 3)] {
        let what = format!("{nearest} of {group}");
        let leaf = leaf(&x, [batch, width]);
        let loss = koleo_in_groups(leaf.clone(), nearest, group);
        assert_value(&what, &loss, koleo_by_loops(&x, width, nearest, group));
        let gradient = host(leaf.grad(&loss.graph.backward()).expect("a gradient"));
        assert_slopes(&what, &x, gradient, 1e-5, |x| koleo_by_loops(x, width, nearest, group));
        cases += 1;
    }
    assert_eq!(cases, 5);
}

/// Rows that are so near that ε is as long as what lies between them. Fixtures do not have such rows: with ε = 10⁻¹² they
/// give the same values.
#[test]
fn koleo_of_nearly_identical_rows_counts_epsilon_twice() {
    let x = [1.0, 0.0, 0.0, 1.0, f64::from(3e-8f32), 0.0];
    // ‖(0, −3, 0)·10⁻⁸ + 10⁻⁸‖ = √(1 + 4 + 1)·10⁻⁸ and ‖(0, 3, 0)·10⁻⁸ + 10⁻⁸‖ = √(1 + 16 + 1)·10⁻⁸.
    let by_hand = -(((6f64.sqrt() + 1.0) * 1e-8).ln() + ((18f64.sqrt() + 1.0) * 1e-8).ln()) / 2.0;
    assert!((koleo_by_loops(&x, 3, 1, 2) - by_hand).abs() < 1e-6);
    assert_value("two rows", &koleo(tensor(&x, [2, 3], &Device::flex())), by_hand);
    // What other constants would give: 17.32 and 13.54.
    assert!((by_hand - 16.973).abs() < 1e-3, "{by_hand}");
}

const NEGATIVES: [Negatives; 4] =
    [Negatives::Keep, Negatives::Remove, Negatives::RemoveWhereTeacher, Negatives::RemoveTeacher];

/// Tokens of width `width`, of length 1 if `normalize`.
fn rows(x: &[f64], width: usize, normalize: bool) -> Vec<Vec<f64>> {
    let row = |row: &[f64]| {
        let length = if normalize { dot(row, row).sqrt() } else { 1.0 };
        row.iter().map(|v| v / length).collect()
    };
    x.chunks_exact(width).map(row).collect()
}

#[test]
fn gram_equals_loops_over_pairs_of_tokens() {
    let (groups, tokens, width, teacher_width) = (2, 5, 3, 4);
    let (x, y) = (numbers(groups * tokens * width, 6), numbers(groups * tokens * teacher_width, 7));
    let mut cases = 0;
    for normalize in [false, true] {
        for negatives in NEGATIVES {
            let objective = |x: &[f64]| {
                let (x, y) = (rows(x, width, normalize), rows(&y, teacher_width, normalize));
                let mut sum = 0.0;
                for group in 0..groups {
                    for i in group * tokens..(group + 1) * tokens {
                        for j in group * tokens..(group + 1) * tokens {
                            let (mut s, mut t) = (dot(&x[i], &x[j]), dot(&y[i], &y[j]));
                            match negatives {
                                Negatives::Keep => {}
                                Negatives::Remove => (s, t) = (s.max(0.0), t.max(0.0)),
                                Negatives::RemoveWhereTeacher if t < 0.0 => (s, t) = (s.max(0.0), 0.0),
                                Negatives::RemoveWhereTeacher => {}
                                Negatives::RemoveTeacher => t = t.max(0.0),
                            }
                            sum += (s - t).powi(2);
                        }
                    }
                }
                sum / (groups * tokens * tokens) as f64
            };
            let what = format!("{negatives:?}, normalised: {normalize}");
            let leaf = leaf(&x, [groups, tokens, width]);
            let teacher = tensor(&y, [groups, tokens, teacher_width], &Device::flex());
            let loss = gram(leaf.clone(), teacher, normalize, negatives);
            assert_value(&what, &loss, objective(&x));
            let gradient = host(leaf.grad(&loss.graph.backward()).expect("a gradient"));
            assert_slopes(&what, &x, gradient, 1e-5, objective);
            cases += 1;
        }
    }
    assert_eq!(cases, 8);
}

/// Sinkhorn–Knopp on the matrix itself: prototypes to 1/K, samples to 1/B, at the end samples to 1.
fn sinkhorn_by_loops(logits: &[f64], prototypes: usize, temperature: f64, iterations: usize) -> Vec<f64> {
    let samples = logits.len() / prototypes;
    let mut q: Vec<f64> = logits.iter().map(|l| (l / temperature).exp()).collect();
    for _ in 0..iterations {
        for k in 0..prototypes {
            let sum: f64 = (0..samples).map(|b| q[b * prototypes + k]).sum();
            (0..samples).for_each(|b| q[b * prototypes + k] /= sum * prototypes as f64);
        }
        for row in q.chunks_exact_mut(prototypes) {
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|v| *v /= sum * samples as f64);
        }
    }
    q.iter().map(|v| v * samples as f64).collect()
}

#[test]
fn sinkhorn_equals_loops_over_the_matrix_and_keeps_its_marginals() {
    let mut cases = 0;
    for (samples, prototypes) in [(7, 4), (4, 7), (1, 5), (6, 1)] {
        let logits = numbers(samples * prototypes, 8);
        for iterations in [1, 2, 3, 100] {
            let given = tensor(&logits, [samples, prototypes], &Device::flex());
            let found = host(sinkhorn_knopp(given, 0.2, iterations));
            let expected = sinkhorn_by_loops(&logits, prototypes, 0.2, iterations);
            for (found, expected) in found.iter().zip(&expected) {
                assert!((f64::from(*found) - expected).abs() < 2e-6, "{samples}×{prototypes}: {found} and {expected}");
            }
            for row in found.chunks_exact(prototypes) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6, "samples sum to 1 after every iteration");
            }
            if iterations == 100 {
                for k in 0..prototypes {
                    let mass: f32 = found.iter().skip(k).step_by(prototypes).sum();
                    assert!((mass - samples as f32 / prototypes as f32).abs() < 1e-4, "prototype {k} has {mass}");
                }
            }
            cases += 1;
        }
    }
    assert_eq!(cases, 16);
}

/// Another order of the samples.
const ORDER: [i32; 5] = [3, 0, 4, 1, 2];

fn reordered<const D: usize>(x: Tensor<D>, axis: usize) -> Tensor<D> {
    let order = Tensor::<1, Int>::from_data(TensorData::from(&ORDER[..]), &x.device());
    x.select(axis, order)
}

#[test]
fn another_order_of_the_samples_gives_the_same_losses_and_reordered_targets_and_gradients() {
    let (crops, batch, width, prototypes) = (2, ORDER.len(), 3, 4);
    let device = Device::flex();
    let near = |what: &str, left: Tensor<2>, right: Tensor<2>| {
        let off: f32 = (left - right).abs().max().into_scalar();
        assert!(off < 2e-6, "{what}: off by {off}");
    };
    let logits = tensor(&numbers(batch * prototypes, 9), [batch, prototypes], &device);
    let targets = sinkhorn_knopp(logits.clone(), 0.1, 3);
    near("Sinkhorn", sinkhorn_knopp(reordered(logits, 0), 0.1, 3), reordered(targets.clone(), 0));

    let x = numbers(crops * batch * width, 10);
    let w = tensor(&numbers(prototypes * width, 11), [prototypes, width], &device);
    let targets = targets.unsqueeze::<3>().repeat_dim(0, crops);
    let losses: [&dyn Fn(Tensor<2>, Tensor<3>) -> Loss; 3] = [
        &|x, targets| dino::global(x, Tensor::from_inner(w.clone()), targets, 0.1, true, Fp32),
        &|x, targets| dino::local(x, Tensor::from_inner(w.clone()), targets, 0.1, Fp32),
        &|x, _| koleo_in_groups(x, 2, batch),
    ];
    for (i, loss) in losses.into_iter().enumerate() {
        let leaf = |x: Tensor<3>| Tensor::<2>::from_inner(x.reshape([crops * batch, width])).require_grad();
        let plain = tensor(&x, [crops, batch, width], &device);
        let (first, second) = (leaf(plain.clone()), leaf(reordered(plain, 1)));
        let (left, right) = (loss(first.clone(), targets.clone()), loss(second.clone(), reordered(targets.clone(), 1)));
        assert!((host(left.value)[0] - host(right.value)[0]).abs() < 2e-6, "loss {i}");
        let gradient = |x: &Tensor<2>, loss: Tensor<1>| {
            x.grad(&loss.backward()).expect("a gradient").reshape([crops, batch, width])
        };
        let (left, right) = (gradient(&first, left.graph), gradient(&second, right.graph));
        near(
            &format!("gradient {i}"),
            reordered(left, 1).reshape([-1, width as i32]),
            right.reshape([-1, width as i32]),
        );
    }
}
