use burn::tensor::Device;
use dinoxide_evaluation::*;
use std::time::Instant;
fn data(n: usize, d: usize, c: usize, seed: u64) -> LabeledFeatures {
    let mut s = seed;
    let mut r = move || { s ^= s << 13; s ^= s >> 7; s ^= s << 17; (s >> 40) as f32 / (1u32 << 24) as f32 };
    let mut t = 77u64;
    let mut rc = move || { t ^= t << 13; t ^= t >> 7; t ^= t << 17; (t >> 40) as f32 / (1u32 << 24) as f32 - 0.5 };
    let centers: Vec<f32> = (0..c * d).map(|_| rc()).collect();
    let labels: Vec<u32> = (0..n).map(|_| ((r() * c as f32) as u32).min(c as u32 - 1)).collect();
    let v = labels.iter().flat_map(|&l| (0..d).map(|j| centers[l as usize * d + j] + 3.0 * (r() + r() + r() - 1.5)).collect::<Vec<_>>()).collect();
    LabeledFeatures::new(Features::new(n, d, v).unwrap(), labels, c).unwrap()
}
fn main() {
    let what = std::env::args().nth(1).unwrap_or("knn".into());
    let dev = Device::flex();
    let (train, val) = (data(50_000, 384, 100, 1), data(10_000, 384, 100, 2));
    let src: FeatureSource = serde_json::from_value(serde_json::json!({"backbone":"","train_data":"","val_data":"","tokens":[],"layers":[],"final_norm":true,"resize_px":1,"crop_px":1,"interpolation":"","augmentation":""})).unwrap();
    if what == "knn" {
        for _ in 0..2 {
            let t = Instant::now();
            let r = knn(&train, &val, &src, &KnnConfig::default(), &dev).unwrap();
            println!("knn {:.3}s {:?}", t.elapsed().as_secs_f64(), r.scores.by_k[1].accuracy);
        }
    } else if what == "linear" {
        let t = Instant::now();
        let c = LinearConfig { iterations: 200, ..Default::default() };
        let r = linear(&[FeatureSet { name: "a".into(), source: src, train, val }], &c, &dev, &mut |_| ()).unwrap();
        println!("linear 200 it x13, {:.3}s top1 {} lr {}", t.elapsed().as_secs_f64(), r.scores.accuracy.top1, r.scores.learning_rate);
    } else if what == "logistic" {
        let t = Instant::now();
        let m = dinoxide_evaluation::logistic::fit_logistic(&train, 1e-3, &LogisticConfig::default()).unwrap();
        println!("logistic {:.3}s it {} grad {:e}", t.elapsed().as_secs_f64(), m.iterations, m.gradient_norm);
    } else {
        let t = Instant::now();
        let r = spectrum(train.features(), &src, true).unwrap();
        println!("spectrum {:.3}s rank {}", t.elapsed().as_secs_f64(), r.scores.effective_rank);
    }
}
