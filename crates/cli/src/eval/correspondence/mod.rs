//! `dinoxide eval correspondence`: silhouettes or keypoints carried from image to image by patch tokens.

mod points;

use std::path::PathBuf;
use std::rc::Rc;

use dinoxide_data::{AnnotatedSource, DecodeLimits, MapKind, Pairing};
use dinoxide_evaluation::dense::keypoints::{ALPHAS, PointConfig, keypoints};
use dinoxide_evaluation::dense::silhouettes::{GroupScore, silhouettes};
use dinoxide_evaluation::dense::transfer::PairConfig;
use dinoxide_evaluation::{Method, Protocol, Report};

use self::points::{listed_pairs, read_points};
use super::dense::{DenseSetup, DenseTask, Layers, Seen, warn};
use super::given::Given;
use super::outcome::{Metric, Outcome};
use super::sets::Set;
use crate::table::table;
use crate::terminal::Log;

#[derive(clap::Args)]
pub(crate) struct Task {
    #[command(flatten)]
    seen: Seen,
    #[command(flatten)]
    layers: Layers,
    /// Images in folders of classes or objects, each with its mask as for `eval segmentation`; with `--keypoints`, without
    #[arg(long, value_name = "DIR")]
    data: String,
    /// Folder of the masks, where the layout is another
    #[arg(long, value_name = "DIR", conflicts_with = "keypoints")]
    masks: Option<PathBuf>,
    /// Images are paired if their first N folders are the same: 1 for `<class>/…`, 2 for `<class>/<object>/…`; 0: all are
    #[arg(long, value_name = "N", default_value_t = 1)]
    instance_depth: usize,
    /// Pair only images whose next folder differs: other objects of a class
    #[arg(long)]
    across: bool,
    /// Images of each group that something is carried from, drawn at random; every other one is a target of each
    #[arg(long, value_name = "N", default_value_t = PairConfig::default().sources)]
    sources: usize,
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Id of mask pixels that are not scored; 0 is ground, every other id is figure
    #[arg(long, value_name = "ID", default_value_t = 65_535)]
    void: u32,
    /// Carry keypoints instead of silhouettes: lines `IMAGE,NAME,X,Y` in pixels, images by their paths below `--data`
    #[arg(long, value_name = "FILE")]
    keypoints: Option<PathBuf>,
    /// Boxes of the objects, by which distances are measured: lines `IMAGE,LEFT,TOP,RIGHT,BOTTOM`; default: the images
    #[arg(long, value_name = "FILE", requires = "keypoints")]
    boxes: Option<PathBuf>,
    /// The pairs, instead of those by folders: lines `SOURCE,TARGET`
    #[arg(long, value_name = "FILE", requires = "keypoints")]
    pairs: Option<PathBuf>,
    /// Patches around the most similar one that say where a point is in between; 0: the middle of that patch
    #[arg(long, value_name = "N", default_value_t = PointConfig::default().window)]
    point_window: usize,
    /// Temperature of their weights
    #[arg(long, value_name = "T", default_value_t = PointConfig::default().temperature)]
    temperature: f32,
}

impl DenseTask for Task {
    fn run(&self, given: &Rc<Given>) -> anyhow::Result<Outcome> {
        let setup = DenseSetup::whole(given, &self.seen, &self.layers)?;
        match &self.keypoints {
            Some(path) => self.keypoints(setup, path),
            None => self.silhouettes(setup),
        }
    }
}

impl Task {
    fn paired(&self) -> PairConfig {
        PairConfig { folders: self.instance_depth, across: self.across, sources: self.sources, seed: self.seed }
    }

    fn silhouettes(&self, mut setup: DenseSetup) -> anyhow::Result<Outcome> {
        let pairing = Pairing { images: self.data.clone(), maps: self.masks.clone(), ..Pairing::default() };
        let images = AnnotatedSource::open(&pairing, MapKind::Mask, &DecodeLimits::default())?;
        if images.images_without_map() > 0 {
            let (without, with) = (images.images_without_map(), images.len());
            let data = &self.data;
            setup.log.line(&format!("note: {data}: {without} images have no mask and are left out, {with} have one"));
        }
        let pairs = self.paired();
        let groups = pairs.groups(&(0..images.len()).map(|index| images.id(index)).collect::<Vec<_>>())?;
        let mut log = Log::new(None)?;
        let encoder = setup.encoder()?;
        let (scores, rejected) = silhouettes(&encoder, &images, &groups, self.void, &mut progress(&mut log))?;
        let inference = format!("whole images, {}", encoder.size_description());
        log.clear();
        warn(&mut log, &rejected);
        let data = format!("{} pairs, {} targets in {} groups", scores.pairs, scores.targets, scores.by_group.len());
        let source = setup.source("", &self.data);
        let method = Method::Silhouettes { pairs, ignored: self.void, inference };
        let protocol = Protocol::new(method, vec![source], None, scores.targets, None);
        let metrics = vec![Metric::percent("IoU of silhouettes", scores.iou, scores.interval)];
        let beside = [("left where they are", scores.still), ("everything is figure", scores.everything)];
        let shown = shown(&data, &metrics, &beside, &scores.by_group);
        let mut outcome = Outcome::new("correspondence", data, &Report { protocol, scores })?;
        (outcome.metrics, outcome.shown) = (metrics, Some(shown));
        Ok(outcome)
    }

    fn keypoints(&self, setup: DenseSetup, path: &std::path::Path) -> anyhow::Result<Outcome> {
        let how = PointConfig { window: self.point_window, temperature: self.temperature };
        how.check()?;
        let images = Set::open(&self.data, &[])?;
        let points = read_points(path, self.boxes.as_deref(), &images)?;
        let groups = match &self.pairs {
            Some(path) => listed_pairs(path, &images)?,
            None => {
                // Images without a point have nothing to carry, and nothing to find.
                let known: Vec<usize> = (0..points.len()).filter(|&index| !points[index].named.is_empty()).collect();
                let ids: Vec<String> = known.iter().map(|&index| images.source.id(index)).collect();
                let mut groups = self.paired().groups(&ids)?;
                for group in &mut groups {
                    group.sources.iter_mut().for_each(|source| *source = known[*source]);
                    group.targets.iter_mut().for_each(|(target, _)| *target = known[*target]);
                }
                groups
            }
        };
        let mut log = Log::new(None)?;
        let encoder = setup.encoder()?;
        let found = keypoints(&encoder, &*images.source, &points, &groups, &how, &mut progress(&mut log));
        let inference = format!("whole images, {}", encoder.size_description());
        log.clear();
        let (scores, rejected) = found?;
        warn(&mut log, &rejected);
        if scores.without_points > 0 {
            let (without, pairs) = (scores.without_points, scores.pairs);
            log.line(&format!(
                "note: {without} pairs have no keypoint of the same name and are left out, {pairs} have one"
            ));
        }
        let data = format!("{} pairs, {} keypoints", scores.pairs, scores.points);
        let source = setup.source("", &self.data);
        let file = |path: &std::path::Path| path.display().to_string();
        let pairs = match &self.pairs {
            Some(path) => file(path),
            None => serde_json::to_string(&self.paired())?,
        };
        let extent = self.boxes.as_deref().map_or("image".to_owned(), file);
        let method = Method::Keypoints { pairs, points: how, extent, inference };
        let protocol = Protocol::new(method, vec![source], None, scores.pairs, None);
        let by_pair = ALPHAS.iter().zip(scores.by_pair.iter().zip(&scores.intervals));
        let mut metrics: Vec<Metric> = by_pair
            .map(|(alpha, (&value, &interval))| Metric::percent(format!("PCK@{alpha}"), value, interval))
            .collect();
        let by_point = ALPHAS.iter().zip(&scores.by_point);
        metrics.extend(by_point.map(|(alpha, &value)| Metric::percent(format!("PCK@{alpha}, by point"), value, None)));
        let beside = [("PCK@0.1, left where they are", scores.still[0])];
        let shown = shown(&data, &metrics, &beside, &scores.by_group);
        let mut outcome = Outcome::new("correspondence", data, &Report { protocol, scores })?;
        (outcome.metrics, outcome.shown) = (metrics, Some(shown));
        Ok(outcome)
    }
}

/// Shows how many images were seen.
fn progress(log: &mut Log) -> impl FnMut(usize, usize) + '_ {
    let mut begun = false;
    move |done, of| {
        if !begun {
            log.bar(of as u64, 0, "{bar:28} {pos}/{len} images, {eta} left");
            begun = true;
        }
        log.set(done as u64, String::new());
    }
}

/// For a terminal: the figures, what they stand beside, and each group if there are a few.
fn shown(data: &str, metrics: &[Metric], beside: &[(&str, f64)], groups: &[GroupScore]) -> String {
    const MOST_GROUPS: usize = 20;
    let mut rows: Vec<Vec<String>> =
        metrics.iter().map(|metric| vec![metric.name.clone(), metric.shown(), metric.interval_shown()]).collect();
    let plain = |name: &str, value: f64| vec![name.to_owned(), format!("{value:.2} %"), "-".to_owned()];
    rows.extend(beside.iter().map(|(name, value)| plain(name, *value)));
    if (2..=MOST_GROUPS).contains(&groups.len()) {
        rows.extend(groups.iter().map(|group| plain(&format!("{}, {}", metrics[0].name, group.group), group.score)));
    }
    format!("correspondence: {data}\n{}", table(&["metric", "value", "95 % interval"], &rows))
}
