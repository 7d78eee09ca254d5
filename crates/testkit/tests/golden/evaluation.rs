//! Fixture `eval`: k-NN, inputs of linear probes, logistic regression, segmentation and depth metrics.

use burn::tensor::Device;
use dinoxide_evaluation::{
    ConfusionMatrix, Features, KnnConfig, LabeledFeatures, LogisticConfig,
    dense::segmentation::{Classes, Ids},
    depth::depth_scores,
    fit_logistic,
    knn::class_scores,
    segmentation::SegmentationScores,
};
use dinoxide_testkit::{Array, Check, Fixture, Tolerance};
use serde_json::Value;

use crate::vit;

/// Metrics that the reference computed in single precision.
const METRIC: Tolerance = Tolerance { atol: 0.0, rtol_of_max: 1e-5 };

pub(crate) fn all(check: &mut Check) {
    neighbours(check);
    linear_inputs(check);
    logistic(check);
    segmentation(check);
    depth(check);
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

fn features(fixture: &Fixture, name: &str) -> Features {
    let Array { shape, values } = fixture.floats(name);
    Features::new(shape[0], shape[1], values).expect("features")
}

fn labels(fixture: &Fixture, name: &str) -> Vec<u32> {
    fixture.array::<i64>(name).values.into_iter().map(|label| u32::try_from(label).expect("a label")).collect()
}

/// Shares of classes after the `k` nearest neighbours, and the accuracy that follows.
fn neighbours(check: &mut Check) {
    let fixture = check.fixture;
    let hyper = &fixture.hyper()["knn"];
    let classes = hyper["num_classes"].as_u64().expect("`num_classes`") as usize;
    let labeled = |values: &str, names: &str| {
        LabeledFeatures::new(features(fixture, values), labels(fixture, names), classes).expect("labelled features")
    };
    let train = labeled("knn.train_features", "knn.train_labels");
    let test = labeled("knn.test_features_raw", "knn.test_labels");
    let k: Vec<usize> =
        hyper["ks"].as_array().expect("`ks`").iter().map(|k| k.as_u64().expect("a count") as usize).collect();
    let config = KnnConfig { k, temperature: number(&hyper["T"]), skip_first: false, ..Default::default() };
    let scores = |config: &KnnConfig| class_scores(&train, &test, config, &Device::flex()).expect("scores");
    let shape = || vec![test.rows(), classes];
    for (values, k) in scores(&config).into_iter().zip(&config.k) {
        let right = values
            .chunks_exact(classes)
            .zip(test.labels())
            .filter(|(scores, label)| scores.iter().all(|other| *other <= scores[**label as usize]));
        let accuracy = right.count() as f64 / test.rows() as f64;
        check.number(&format!("knn.top1.k{k}"), number(&hyper["top1"][format!("k{k}")]), accuracy, METRIC);
        check.tensor(&format!("knn.probas.k{k}"), &Array { shape: shape(), values });
    }
    for name in fixture.names("knn.probas.").filter(|name| name.ends_with("_only_skip_first")) {
        let k = name.trim_start_matches("knn.probas.k").trim_end_matches("_only_skip_first");
        let config = KnnConfig { k: vec![k.parse().expect("a count")], skip_first: true, ..config.clone() };
        let values = scores(&config).remove(0);
        check.tensor(name, &Array { shape: shape(), values });
    }
}

/// `linear.n<layers>_avgpool<0|1>`: from the layers of the backbone of fixture `vit_v3_a` on its images.
fn linear_inputs(check: &mut Check) {
    let fixture = check.fixture;
    let backbone = fixture.beside("vit_v3_a");
    let choices: Vec<(&str, usize, bool)> = fixture
        .names("linear.n")
        .map(|name| {
            let (layers, mean) = name["linear.n".len()..].split_once("_avgpool").expect("`_avgpool`");
            (name, layers.parse().expect("a number of layers"), mean == "1")
        })
        .collect();
    let most = choices.iter().map(|(_, layers, _)| *layers).max().expect("a choice");
    let (cls, patches) = vit::last_layers(&backbone, most);
    let table = |array: &Array| Features::new(array.shape[0], array.shape[1], array.values.clone()).expect("features");
    let (cls, patches) = (cls.iter().map(table).collect::<Vec<_>>(), table(&patches));
    let cls: Vec<&Features> = cls.iter().collect();
    for (name, layers, mean) in choices {
        let input = Features::linear_input(&cls, mean.then_some(&patches), layers).expect("an input");
        let found = Array { shape: vec![input.rows(), input.dim()], values: input.values().to_vec() };
        check.tensor(name, &found);
    }
}

fn logistic(check: &mut Check) {
    let fixture = check.fixture;
    let test = features(fixture, "logreg.test_x");
    let test_labels = labels(fixture, "logreg.test_y");
    let train = features(fixture, "logreg.train_x");
    let train_labels = labels(fixture, "logreg.train_y");
    // The reference's own optimum is known to 1e-4 in the gradient at the largest strength; this is far below.
    let config = LogisticConfig { tolerance: 1e-11, max_iterations: 5000, ..Default::default() };
    for (c, expected) in fixture.hyper()["logreg"]["C"].as_object().expect("strengths") {
        let classes = fixture.shape(&format!("logreg.C{c}.bias"))[0];
        let labeled = LabeledFeatures::new(train.clone(), train_labels.clone(), classes).expect("labelled features");
        let model = fit_logistic(&labeled, c.parse().expect("a strength"), &config).expect("a fit");
        let probabilities = model.probabilities(&test).expect("probabilities");
        let accuracy = |probabilities: &[f64], labels: &[u32]| {
            let right = probabilities
                .chunks_exact(classes)
                .zip(labels)
                .filter(|(p, label)| p.iter().all(|other| *other <= p[**label as usize]));
            right.count() as f64 / labels.len() as f64
        };
        for (part, values, atol, rtol_of_max) in [
            ("weight", &model.weight, 0.0, 1e-3),
            ("bias", &model.bias, 0.0, 1e-3),
            ("test_proba", &probabilities, 1e-4, 0.0),
        ] {
            let name = format!("logreg.C{c}.{part}");
            let expected = fixture.floats(&name);
            let values = values.iter().map(|&v| v as f32).collect();
            let found = Array { shape: expected.shape.clone(), values };
            check.values(&name, &expected, &found, Tolerance { atol, rtol_of_max });
        }
        let fitted = model.probabilities(&train).expect("probabilities");
        for (key, found) in [
            ("objective", model.objective),
            ("test_acc", accuracy(&probabilities, &test_labels)),
            ("train_acc", accuracy(&fitted, &train_labels)),
        ] {
            check.number(&format!("logreg.C{c}.{key}"), number(&expected[key]), found, METRIC);
        }
    }
}

fn segmentation(check: &mut Check) {
    let fixture = check.fixture;
    let hyper = &fixture.hyper()["seg"];
    let classes = hyper["num_classes"].as_u64().expect("`num_classes`") as usize;
    let ignored = hyper["ignore_index"].as_u64().expect("`ignore_index`") as u32;
    let predictions = labels(fixture, "seg.pred");
    let from_one = Classes { count: classes, void: ignored, ids: Ids::FromOne };
    let reduced = labels(fixture, "seg.gt_zero").into_iter().map(|id| from_one.class(id).unwrap_or(ignored)).collect();
    for (labels, areas, metrics) in [
        (labels(fixture, "seg.gt"), "seg.areas", "metrics"),
        (reduced, "seg.areas_reduce_zero", "metrics_reduce_zero_label"),
    ] {
        let shape = fixture.shape(areas).to_vec();
        let pixels = predictions.len() / shape[0];
        let mut all = ConfusionMatrix::new(classes, ignored);
        let mut values = vec![0.0; shape.iter().product()];
        for (image, values) in values.chunks_exact_mut(4 * classes).enumerate() {
            let pixels = image * pixels..(image + 1) * pixels;
            let mut matrix = ConfusionMatrix::new(classes, ignored);
            matrix.add(&predictions[pixels.clone()], &labels[pixels]).expect("labels");
            for (class, [right, predicted, label]) in matrix.areas().into_iter().enumerate() {
                let rows = [right, predicted + label - right, predicted, label];
                rows.into_iter().enumerate().for_each(|(row, area)| values[row * classes + class] = area as f32);
            }
            all.merge(&matrix);
        }
        check.values(areas, &fixture.floats(areas), &Array { shape, values }, Tolerance::EXACT);
        let scores = all.scores().expect("scores");
        for (key, expected) in hyper[metrics].as_object().expect("metrics") {
            // Ours are percentages.
            let found = percentage(&scores, key) / 100.0;
            check.number(&format!("seg.{metrics}.{key}"), number(expected), found, METRIC);
        }
    }
}

fn percentage(scores: &SegmentationScores, key: &str) -> f64 {
    match key {
        "mIoU" => scores.mean_iou,
        "acc" => scores.mean_accuracy,
        "aAcc" => scores.pixel_accuracy,
        "dice" => scores.mean_dice,
        "fscore" => scores.mean_f_score,
        "precision" => scores.mean_precision,
        "recall" => scores.mean_recall,
        _ => panic!("a metric `{key}` is not known"),
    }
}

fn depth(check: &mut Check) {
    let fixture = check.fixture;
    let valid = fixture.array::<bool>("depth.valid_mask").values;
    let (predictions, depths) = (fixture.floats("depth.pred").values, fixture.floats("depth.gt").values);
    let scores = depth_scores(&predictions, &depths, &valid).expect("scores");
    let exact = Tolerance { atol: 0.0, rtol_of_max: 1e-12 };
    for (metrics, tolerance) in [("metrics", METRIC), ("metrics_f64", exact)] {
        for (key, expected) in fixture.hyper()["depth"][metrics].as_object().expect("metrics") {
            let found = match key.as_str() {
                "a1" => scores.a1,
                "a2" => scores.a2,
                "a3" => scores.a3,
                "abs_rel" => scores.abs_rel,
                "rmse" => scores.rmse,
                "log_10" => scores.log10,
                "rmse_log" => scores.rmse_log,
                "silog" => scores.silog,
                "sq_rel" => scores.sq_rel,
                "mae" => scores.mae,
                _ => panic!("a metric `{key}` is not known"),
            };
            check.number(&format!("depth.{metrics}.{key}"), number(expected), found, tolerance);
        }
    }
}
