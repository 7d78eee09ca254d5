//! Fixture `masking`: how block masks are distributed, and how many patches are masked in each crop of a batch.

use dinoxide_augmentation::{BlockMasks, MaskConfig, MaskStyle, batch_masks};
use dinoxide_testkit::{Array, Check, Tolerance};
use rand::{SeedableRng, rngs::ChaCha8Rng};
use serde_json::Value;

use crate::statistics::{DRAWS, Sample, compare_counts, compare_frequencies, number, numbers};

pub(crate) fn all(check: &mut Check) {
    let n = number(&check.fixture.json()["draws"]);
    let cases = check.fixture.json()["cases"].as_array().expect("cases");
    for (i, case) in cases.iter().enumerate() {
        blocks(check, &format!("cases.{i}"), case, n);
    }
    let cases = check.fixture.json()["collate"]["cases"].as_array().expect("cases");
    for (i, case) in cases.iter().enumerate() {
        counts(check, &format!("collate.{i}"), case);
    }
}

fn blocks(check: &mut Check, name: &str, case: &Value, n: f64) {
    let [rows, columns] = numbers(&case["grid"])[..] else { panic!("`{name}.grid`") };
    let grid = (rows as usize, columns as usize);
    let target = case["target"].as_u64().expect("a target") as usize;
    let generator = BlockMasks { max_patches: number(&case["max_num_patches"]), ..BlockMasks::new(grid) };
    let rng = &mut ChaCha8Rng::seed_from_u64(8);
    let (mut masked, mut rectangles) = (Vec::new(), Vec::new());
    let [mut at_most, mut exact] = [(); 2].map(|()| vec![0.0; grid.0 * grid.1]);
    let count = |frequencies: &mut [f64], mask: &[bool]| {
        frequencies.iter_mut().zip(mask).for_each(|(f, &masked)| *f += f64::from(u8::from(masked)) / DRAWS as f64);
    };
    let mut inexact = 0;
    for _ in 0..DRAWS {
        let drawn = generator.draw(target as f64, rng);
        masked.push(drawn.masked);
        rectangles.push(drawn.blocks);
        count(&mut at_most, &drawn.mask);
        let drawn = generator.draw_exact(target, rng);
        inexact += usize::from(drawn.mask.iter().filter(|&&masked| masked).count() != target);
        count(&mut exact, &drawn.mask);
    }
    let (v2, v3) = (&case["v2"], &case["v3"]);
    let sample = Sample::new(masked.iter().map(|&count| count as f64).collect());
    sample.compare_mean(check, &format!("{name}.v2"), number(&v2["mean"]), n);
    sample.compare_variance(check, &format!("{name}.v2"), number(&v2["var"]), n);
    compare_counts(check, &format!("{name}.v2.count_hist"), &masked, &v2["count_hist"]);
    compare_counts(check, &format!("{name}.v2.rect_hist"), &rectangles, &v2["rect_hist"]);
    check.number(&format!("{name}.v3.count"), 0.0, inexact as f64, Tolerance::EXACT);
    for (style, found, reference) in [("v2", at_most, v2), ("v3", exact, v3)] {
        let reference: Vec<f64> = reference["marginal"].as_array().expect("rows").iter().flat_map(numbers).collect();
        compare_frequencies(check, &format!("{name}.{style}.marginal"), &found, &reference, n);
    }
}

/// Targets of a batch's masked crops are spread over the range of ratios, not drawn.
fn counts(check: &mut Check, name: &str, case: &Value) {
    let side = case["grid"].as_u64().expect("a grid") as usize;
    let crops = case["n_images"].as_u64().expect("`n_images`") as usize;
    let config = MaskConfig {
        probability: number(&case["mask_probability"]),
        ratio: numbers(&case["mask_ratio"]).try_into().expect("a range"),
        style: MaskStyle::Exact,
        random_circular_shift: false,
    };
    let masks = batch_masks(crops, (side, side), &config, &mut ChaCha8Rng::seed_from_u64(9));
    let per_crop = masks.mask.chunks_exact(side * side).map(|crop| crop.iter().filter(|&&masked| masked).count());
    let mut found: Vec<f32> = per_crop.filter(|&count| count > 0).map(|count| count as f32).collect();
    found.sort_by(f32::total_cmp);
    let mut expected: Vec<f32> = numbers(&case["v3_targets_in_order"]).into_iter().map(|count| count as f32).collect();
    // A crop whose target is no patch is not masked.
    expected.retain(|&count| count > 0.0);
    expected.sort_by(f32::total_cmp);
    let array = |values: Vec<f32>| Array { shape: vec![values.len()], values };
    let masked = expected.len();
    check.values(&format!("{name}.v3_targets"), &array(expected), &array(found), Tolerance::EXACT);
    let total = number(&case["v3_n_masked_total"]);
    check.number(&format!("{name}.v3_n_masked_total"), total, masks.indices.len() as f64, Tolerance::EXACT);
    let sum = masks.weights.iter().map(|&weight| f64::from(weight)).sum();
    let tolerance = Tolerance { atol: 1e-4, rtol_of_max: 0.0 };
    check.number(&format!("{name}.v3_masks_weight_sum"), number(&case["v3_masks_weight_sum"]), sum, tolerance);

    // With blocks alone, masks fall short of their targets, by less than half a patch each on average.
    let at_most = MaskConfig { style: MaskStyle::AtMost, ..config };
    let totals: Vec<f64> = (0..200)
        .map(|seed| {
            batch_masks(crops, (side, side), &at_most, &mut ChaCha8Rng::seed_from_u64(seed)).indices.len() as f64
        })
        .collect();
    let above = totals.iter().copied().fold(0.0, f64::max) - number(&case["upperbound"]);
    check.number(&format!("{name}.upperbound"), 0.0, above.max(0.0), Tolerance::EXACT);
    let part = (side * side) as f64 * (at_most.ratio[1] - at_most.ratio[0]) / masked.max(1) as f64;
    let deviation = (masked as f64 * part * part / 12.0 * (2.0 / 200.0)).sqrt();
    let tolerance = Tolerance { atol: 5.0 * deviation + 0.5 * masked as f64, rtol_of_max: 0.0 };
    let mean = totals.iter().sum::<f64>() / totals.len() as f64;
    check.number(&format!("{name}.v2_total"), number(&case["v2_total_target_mean_200"]), mean, tolerance);
}
