//! What `benches/peer/evaluation/speed.py` times beside PyTorch: an exact search for neighbours, and a grid of linear
//! classifiers trained at once and one after another.
//!
//!     evaluation_peer knn TRAIN_ROWS QUERY_ROWS DIM K TRAIN.f32 QUERIES.f32 NEIGHBORS.u32
//!     evaluation_peer probe ROWS DIM CLASSES ITERATIONS ROUNDS
//!
//! Prints one JSON object with times in seconds.

use std::io::Write;
use std::time::Instant;

use burn::tensor::Device;
use dinoxide_evaluation::{
    FeatureSet, FeatureSource, Features, LabeledFeatures, LinearConfig, Selection, Token, linear, nearest_neighbors,
};
use serde_json::json;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| -> Outcome<usize> { Ok(args[index].parse()?) };
    let found = match args.first().map(String::as_str) {
        Some("knn") if args.len() == 8 => {
            let (train, queries, dim, k) = (number(1)?, number(2)?, number(3)?, number(4)?);
            let (train, queries) = (read(&args[5], train, dim)?, read(&args[6], queries, dim)?);
            let start = Instant::now();
            let found = nearest_neighbors(&train, &queries, k, &Device::flex())?;
            let seconds = start.elapsed().as_secs_f64();
            let rows = found.iter().flatten().flat_map(|neighbor| (neighbor.row as u32).to_le_bytes());
            std::fs::write(&args[7], rows.collect::<Vec<u8>>())?;
            json!({ "seconds": seconds })
        }
        Some("probe") if args.len() == 6 => probe(number(1)?, number(2)?, number(3)?, number(4)?, number(5)?)?,
        _ => return Err("see the head of this file".into()),
    };
    writeln!(std::io::stdout(), "{found}")?;
    Ok(())
}

fn read(path: &str, rows: usize, dim: usize) -> Outcome<Features> {
    let bytes = std::fs::read(path)?;
    Ok(Features::new(rows, dim, bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())?)
}

/// Trains the default grid of learning rates at once, and each rate alone, in turn.
fn probe(rows: usize, dim: usize, classes: usize, iterations: usize, rounds: usize) -> Outcome<serde_json::Value> {
    // Any values will do; these are spread over [-1, 1].
    let values = (0..rows * dim).map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0);
    let labels = (0..rows).map(|i| (i % classes) as u32).collect();
    let data = LabeledFeatures::new(Features::new(rows, dim, values.collect())?, labels, classes)?;
    let source = FeatureSource {
        backbone: "none".into(),
        train_data: "hashes".into(),
        val_data: "hashes".into(),
        tokens: vec![Token::Cls],
        layers: vec![0],
        final_norm: true,
        resize_px: 224,
        crop_px: 224,
        interpolation: "none".into(),
        augmentation: "none".into(),
    };
    let sets = [FeatureSet { name: "cls".into(), source, train: data.clone(), val: data }];
    let config = LinearConfig { iterations, selection: Selection::Val, ..Default::default() };
    let time = |rates: &[f64]| -> Outcome<f64> {
        let config = LinearConfig { learning_rates: rates.to_vec(), ..config.clone() };
        let start = Instant::now();
        linear(&sets, &config, &Device::flex(), &mut |_| ())?;
        Ok(start.elapsed().as_secs_f64())
    };
    let (mut together, mut separate) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        together.push(time(&config.learning_rates)?);
        let each = config.learning_rates.iter().map(|&rate| time(&[rate])).collect::<Outcome<Vec<f64>>>()?;
        separate.push(each.iter().sum::<f64>());
    }
    Ok(json!({ "classifiers": config.learning_rates.len(), "together": together, "separate": separate }))
}
