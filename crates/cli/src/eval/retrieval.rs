//! `dinoxide eval retrieval`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dinoxide_data::{ReadError, Source};
use dinoxide_evaluation::{Extracted, GroundTruth, LabeledFeatures, RetrievalConfig, retrieval, revisited};
use image::RgbImage;

use super::check_distinct;
use super::frozen::{Frozen, Tokens};
use super::outcome::{Metric, Outcome};
use super::sets::Set;
use crate::Usage;

#[derive(clap::Args)]
pub(crate) struct Task {
    /// Images to search, in a folder per class or instance. Without `--queries`, each is a query in turn
    #[arg(long, value_name = "DIR")]
    data: String,
    #[command(flatten)]
    tokens: Tokens,
    /// Images to search for, in folders of the same names
    #[arg(long, value_name = "DIR")]
    queries: Option<String>,
    /// Leave out images whose file name matches, or with a slash in it, whose path; may be given several times
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Images are relevant to each other if their first N folders are the same: 2 for `<class>/<object>/<view>.jpg`
    #[arg(long, value_name = "N", default_value_t = 1)]
    instance_depth: usize,
    /// Ranks at which recall is taken
    #[arg(long, value_name = "K,K,…", value_delimiter = ',', default_value = "1,5,10")]
    k: Vec<usize>,
    /// Queries and what is relevant to them from this file, as revisited Oxford and Paris give it, in JSON
    #[arg(long, value_name = "FILE", conflicts_with_all = ["queries", "instance_depth", "k"])]
    ground_truth: Option<PathBuf>,
}

impl super::measurement::Task for Task {
    const BLOCKS: usize = 1;

    fn run(&self, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        let set = Set::open(&self.data, &self.exclude)?;
        match &self.ground_truth {
            Some(path) => self.landmarks(set, path, frozen),
            None => self.instances(set, frozen),
        }
    }
}

impl Task {
    fn instances(&self, gallery: Set, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        if self.instance_depth == 0 {
            return Err(Usage(anyhow::anyhow!("`--instance-depth` is 0, must be at least 1")).into());
        }
        check_distinct("retrieval", "--k", &self.k)?;
        let queries = match &self.queries {
            Some(spec) => Some(Set::open(spec, &self.exclude)?),
            None => None,
        };
        let relevance = match self.instance_depth {
            1 => "same first folder".to_owned(),
            depth => format!("same first {depth} folders"),
        };
        let config = RetrievalConfig { k: self.k.clone(), relevance };
        config.validate(gallery.source.len() - usize::from(queries.is_none()))?;
        let mut instances = Instances { depth: self.instance_depth, numbers: HashMap::new() };
        let gallery_labels = instances.labels(&gallery)?;
        let query_labels = queries.as_ref().map(|queries| instances.labels(queries)).transpose()?;
        let count = instances.numbers.len();
        let tokens = self.tokens.chosen();
        let labeled = |found: &Extracted, labels: &[u32]| {
            let labels = found.indices.iter().map(|&index| labels[index]).collect();
            LabeledFeatures::new(found.image_features(&tokens)?, labels, count)
        };
        let searched = labeled(&*frozen.features(&gallery)?, &gallery_labels)?;
        let asked = match (&queries, query_labels) {
            (Some(set), Some(labels)) => Some(labeled(&*frozen.features(set)?, &labels)?),
            _ => None,
        };
        let (train, val) = match &queries {
            Some(queries) => (gallery.name.as_str(), queries.name.as_str()),
            None => ("", gallery.name.as_str()),
        };
        let source = frozen.source(train, val, tokens.clone(), 1);
        let report = retrieval(&searched, asked.as_ref(), &source, &config, &frozen.device)?;
        let scores = &report.scores;
        let mut data = format!("{} queries among {} images, {count} instances", scores.queries, searched.rows());
        if scores.without_match > 0 {
            data = format!("{data}, {} without a match left out", scores.without_match);
        }
        let mut outcome = Outcome::new("retrieval", data, &report)?;
        outcome.metrics = vec![Metric::percent("mAP", scores.map, scores.interval)];
        let recall = scores.recall.iter();
        outcome.metrics.extend(recall.map(|at| Metric::percent(format!("recall@{}", at.k), at.recall, at.interval)));
        Ok(outcome)
    }

    fn landmarks(&self, images: Set, path: &Path, frozen: &mut Frozen) -> anyhow::Result<Outcome> {
        let wrong = |e: &dyn std::fmt::Display| Usage(anyhow::anyhow!("{}: {e}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| wrong(&e))?;
        let truth: GroundTruth = serde_json::from_str(&text).map_err(|e| wrong(&e))?;
        truth.check().map_err(|e| wrong(&e))?;
        let stem = |id: &str| Path::new(id).file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let by_name: HashMap<String, usize> =
            (0..images.source.len()).filter_map(|index| Some((stem(&images.source.id(index))?, index))).collect();
        let named = |names: &[String]| -> anyhow::Result<Vec<usize>> {
            let find = |name: &String| {
                let found = by_name.get(name).or_else(|| by_name.get(&stem(name)?)).copied();
                found.ok_or_else(|| wrong(&format!("image `{name}` is not in {}", images.name)).into())
            };
            names.iter().map(find).collect()
        };
        let pick = |what: &str, names: &[String], boxes: Vec<Option<[f32; 4]>>| -> anyhow::Result<Set> {
            let source = Arc::new(Picked { source: Arc::clone(&images.source), indices: named(names)?, boxes });
            Ok(Set { name: format!("{}, {what} of {}", images.name, path.display()), source })
        };
        let gallery = pick("gallery", &truth.imlist, Vec::new())?;
        let queries = pick("queries", &truth.qimlist, truth.gnd.iter().map(|one| one.bbx).collect())?;
        let features = [frozen.features(&gallery)?, frozen.features(&queries)?];
        if let Some(missing) = features.iter().flat_map(|found| &found.rejected).next() {
            return Err(wrong(&format!("image `{}` cannot be read: {}", missing.id, missing.reason)).into());
        }
        let [found, asked] = features;
        let tokens = self.tokens.chosen();
        let [found, asked] = [found.image_features(&tokens)?, asked.image_features(&tokens)?];
        let source = frozen.source(&gallery.name, &queries.name, tokens, 1);
        let report = revisited(&found, &asked, &truth, &source, &frozen.device)?;
        let data = format!("{} queries among {} images", truth.qimlist.len(), truth.imlist.len());
        let mut outcome = Outcome::new("retrieval", data, &report)?;
        for scores in &report.scores.by_difficulty {
            let name = &scores.difficulty;
            outcome.metrics.push(Metric::percent(format!("mAP, {name}"), scores.map, scores.interval));
            for (k, precision) in [1, 5, 10].into_iter().zip(scores.precision) {
                outcome.metrics.push(Metric::percent(format!("precision@{k}, {name}"), precision, None));
            }
        }
        Ok(outcome)
    }
}

/// Numbers of instances by the folders they lie in.
struct Instances {
    depth: usize,
    numbers: HashMap<String, u32>,
}

impl Instances {
    /// The instance of every image. Built-in images, which lie in no folder, have their class for one.
    fn labels(&mut self, set: &Set) -> anyhow::Result<Vec<u32>> {
        let mut labels = Vec::with_capacity(set.source.len());
        for index in 0..set.source.len() {
            let id = set.source.id(index);
            let folders = id.split('/').count() - 1;
            let key = match set.source.label(index) {
                Some(class) if folders == 0 && self.depth == 1 => set.source.classes()[class as usize].clone(),
                _ if folders < self.depth => {
                    return Err(Usage(anyhow::anyhow!(
                        "{}: image `{id}` lies in {folders} folder(s), `--instance-depth` asks for {}\n\nhint: leave such images out with `--exclude`, or lower the depth",
                        set.name, self.depth
                    ))
                    .into());
                }
                _ => id.split('/').take(self.depth).collect::<Vec<_>>().join("/"),
            };
            let next = self.numbers.len() as u32;
            labels.push(*self.numbers.entry(key).or_insert(next));
        }
        Ok(labels)
    }
}

/// Images of a source in a given order, cropped where there is a box.
struct Picked {
    source: Arc<dyn Source>,
    indices: Vec<usize>,
    /// Left, top, right, bottom, in pixels; none at all, or one for each image.
    boxes: Vec<Option<[f32; 4]>>,
}

impl Source for Picked {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn id(&self, index: usize) -> String {
        self.source.id(self.indices[index])
    }

    fn read(&self, index: usize) -> Result<RgbImage, ReadError> {
        let image = self.source.read(self.indices[index])?;
        Ok(match self.boxes.get(index).copied().flatten() {
            Some(edges) => crop(&image, edges),
            None => image,
        })
    }

    fn label(&self, _: usize) -> Option<u32> {
        None
    }

    fn classes(&self) -> &[String] {
        &[]
    }
}

/// The part of an image inside a box, of at least one pixel.
fn crop(image: &RgbImage, [left, top, right, bottom]: [f32; 4]) -> RgbImage {
    let (width, height) = image.dimensions();
    let within = |low: f32, high: f32, length: u32| {
        let start = (low.max(0.0).round() as u32).min(length - 1);
        (start, (high.max(0.0).round() as u32).clamp(start + 1, length) - start)
    };
    let ((x, width), (y, height)) = (within(left, right, width), within(top, bottom, height));
    image::imageops::crop_imm(image, x, y, width, height).to_image()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_are_cut_to_the_image() {
        let image = RgbImage::from_fn(20, 10, |x, y| image::Rgb([x as u8, y as u8, 0]));
        let part = crop(&image, [3.4, 2.0, 8.6, 7.0]);
        assert_eq!((part.dimensions(), part.get_pixel(0, 0).0), ((6, 5), [3, 2, 0]));
        assert_eq!(crop(&image, [-5.0, -1.0, 99.0, 99.0]).dimensions(), (20, 10));
        assert_eq!(crop(&image, [50.0, 50.0, 40.0, 40.0]).dimensions(), (1, 1));
    }
}
