//! What `benches/peer/evaluation/speed.py` times beside PyTorch: an exact search for neighbours, features of a ViT-S/16, and
//! a grid of linear classifiers trained at once and one after another.
//!
//!     evaluation_peer knn TRAIN_ROWS QUERY_ROWS DIM K TRAIN.f32 QUERIES.f32 NEIGHBORS.u32
//!     evaluation_peer probe ROWS DIM CLASSES ITERATIONS ROUNDS
//!     evaluation_peer forward IMAGES BATCH
//!     evaluation_peer weights FILE
//!
//! Prints one JSON object with times in seconds; `weights` writes the fresh ViT-S/16 that `forward` times.

use std::io::Write;
use std::time::Instant;

use burn::tensor::Device;
use dinoxide_augmentation::RgbImage;
use dinoxide_data::{ReadError, Source};
use dinoxide_evaluation::{
    Extraction, FeatureSet, FeatureSource, Features, LabeledFeatures, LinearConfig, Selection, Token, extract, linear,
    nearest_neighbors,
};
use dinoxide_model::config::Position;
use dinoxide_model::weights::{Description, Provenance, backbone_file};
use dinoxide_model::{Arch, Backbone, ModelConfig};
use dinoxide_random::{Purpose, stream};
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
        Some("forward") if args.len() == 3 => forward(number(1)?, number(2)?)?,
        Some("weights") if args.len() == 2 => {
            let (backbone, description) = vit_small()?;
            backbone_file(&backbone, &description).write(args[1].as_ref())?;
            json!({})
        }
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

/// A fresh ViT-S/16 for 224 px with learned positions, as DINO trains it.
fn vit_small() -> Outcome<(Backbone, Description)> {
    let config = ModelConfig {
        arch: Arch::VitSmall,
        patch_size: 16,
        position: Position::Learned,
        layer_scale_init: 0.0,
        mask_token: false,
        ..ModelConfig::default()
    };
    let architecture = config.resolve(224)?;
    let backbone = Backbone::new(&architecture, &Device::flex(), &mut stream(0, Purpose::Init, 0, 0));
    let (mean, std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    let provenance = Provenance::default();
    Ok((backbone, Description { architecture, image_size: 224, mean, std, provenance, fingerprint: None }))
}

/// Images that are already decoded.
struct Decoded(Vec<RgbImage>);

impl Source for Decoded {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn id(&self, index: usize) -> String {
        index.to_string()
    }

    fn read(&self, index: usize) -> Result<RgbImage, ReadError> {
        Ok(self.0[index].clone())
    }

    fn label(&self, _index: usize) -> Option<u32> {
        None
    }

    fn classes(&self) -> &[String] {
        &[]
    }
}

/// Times the features of decoded images of 224 × 224 pixels, after a batch that sets memory aside.
fn forward(images: usize, batch: usize) -> Outcome<serde_json::Value> {
    let (backbone, Description { mean, std, .. }) = vit_small()?;
    let pixels = |i: usize| (0..3 * 224 * 224).map(move |p| ((p * 31 + i * 7) % 251) as u8).collect();
    let decoded = (0..images).map(|i| RgbImage::from_raw(224, 224, pixels(i)).expect("an image's bytes"));
    let source = Decoded(decoded.collect());
    let how = Extraction { resize_px: 224, crop_px: 224, mean, std, last_blocks: 1, batch };
    let time = |count: usize| -> Outcome<f64> {
        let indices: Vec<usize> = (0..count).collect();
        let start = Instant::now();
        extract(&backbone, &source, &indices, &how, &Device::flex(), &mut |_| ())?;
        Ok(start.elapsed().as_secs_f64())
    };
    time(batch.min(images))?;
    Ok(json!({ "seconds": time(images)?, "images": images }))
}
