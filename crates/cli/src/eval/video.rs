//! `dinoxide eval video`: masks of the first frame, carried through a video by patch tokens.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use dinoxide_data::{AnnotatedSource, DecodeLimits, MapKind, Pairing, is_synthetic};
use dinoxide_evaluation::dense::propagation::{ObjectScores, Propagation, PropagationConfig, score_object};
use dinoxide_evaluation::{Method, Protocol, Report};
use serde_json::json;

use super::dense::{DenseSetup, DenseTask, Layers, Seen};
use super::given::Given;
use super::outcome::{Metric, Outcome};
use crate::Usage;
use crate::table::table;
use crate::terminal::Log;

#[derive(clap::Args)]
pub(crate) struct Task {
    #[command(flatten)]
    seen: Seen,
    #[command(flatten)]
    layers: Layers,
    /// Videos: a folder for each, with its frames in `img/` and a mask for each in `mask/`; with `--masks`, with its frames
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Folder of the masks, a folder for each video, as `Annotations/480p` of DAVIS
    #[arg(long, value_name = "DIR")]
    masks: Option<PathBuf>,
    /// Frames before the one at hand that labels come from, besides the first
    #[arg(
        long,
        value_name = "N",
        default_value_t = PropagationConfig::default().context
    )]
    context: usize,
    /// Patches by which a place may move from one of these frames, along each axis
    #[arg(long, value_name = "N", default_value_t = PropagationConfig::default().radius)]
    radius: usize,
    /// Tokens that give their labels
    #[arg(long, value_name = "K", default_value_t = PropagationConfig::default().top_k)]
    top_k: usize,
    /// Temperature of their weights
    #[arg(
        long,
        value_name = "T",
        default_value_t = PropagationConfig::default().temperature
    )]
    temperature: f32,
}

/// Where videos are looked for.
const LAYOUT: &str =
    "hint: give a folder with a folder for each video, its frames in `img/` and a mask for each in `mask/`";

/// A folder of frames.
struct Video {
    name: String,
    frames: AnnotatedSource,
}

/// What came of a video: each object's scores, and those of its first mask left where it is.
struct Scored {
    name: String,
    objects: Vec<ObjectScores>,
    still: Vec<ObjectScores>,
    frames: usize,
}

impl DenseTask for Task {
    fn run(&self, given: &Rc<Given>) -> anyhow::Result<Outcome> {
        let &Self { context, radius, top_k, temperature, .. } = self;
        let config = PropagationConfig { context, radius, top_k, temperature };
        config.check().map_err(|e| Usage(e.into()))?;
        let setup = DenseSetup::whole(given, &self.seen, &self.layers)?;
        let videos = videos(self)?;
        let mut log = Log::new(None)?;
        let total: usize = videos.iter().map(|video| video.frames.len()).sum();
        log.bar(total as u64, 0, "{bar:28} {msg} {pos}/{len} frames, {eta} left");
        let encoder = setup.encoder()?;
        let (mut scored, mut done) = (Vec::new(), 0);
        for video in &videos {
            scored.push(score(video, &encoder, &config, &mut |frame| {
                log.set((done + frame) as u64, video.name.clone())
            })?);
            done += video.frames.len();
        }
        log.clear();

        let all = |of: fn(&Scored) -> &Vec<ObjectScores>| -> ObjectScores {
            ObjectScores::mean(&scored.iter().flat_map(|video| of(video).clone()).collect::<Vec<_>>())
        };
        let (mean, still) = (all(|video| &video.objects), all(|video| &video.still));
        let row = |name: &str, objects: String, frames: String, of: &ObjectScores| {
            let numbers = [of.j_and_f(), of.j_mean, of.j_recall, of.f_mean, of.f_recall];
            let cells = numbers.map(|value| format!("{value:.1}"));
            [vec![name.to_owned(), objects, frames], cells.to_vec()].concat()
        };
        let mut rows: Vec<Vec<String>> = scored
            .iter()
            .map(|video| {
                let (objects, frames) = (video.objects.len().to_string(), video.frames.to_string());
                row(&video.name, objects, frames, &ObjectScores::mean(&video.objects))
            })
            .collect();
        let objects: usize = scored.iter().map(|video| video.objects.len()).sum();
        rows.push(row("mean over objects", objects.to_string(), String::new(), &mean));
        rows.push(row("the first mask, left where it is", String::new(), String::new(), &still));
        let text = format!(
            "video: J&F {:.1} (J {:.1}, F {:.1}) over {objects} objects in {} videos\n{}",
            mean.j_and_f(),
            mean.j_mean,
            mean.f_mean,
            scored.len(),
            table(&["video", "objects", "frames", "J&F", "J", "J recall", "F", "F recall"], &rows)
        );
        let source = setup.source("", &self.data.display().to_string());
        let frames = scored.iter().map(|video| video.frames).sum();
        let inference = format!("whole frames, {}", encoder.size_description());
        let method = Method::Video { propagation: config, inference };
        let protocol = Protocol::new(method, vec![source], None, frames, None);
        let videos: Vec<_> = scored
            .iter()
            .map(|video| json!({ "name": video.name, "frames": video.frames, "objects": video.objects }))
            .collect();
        let scores = json!({ "j_and_f": mean.j_and_f(), "mean": mean, "videos": videos });
        let data = format!("{objects} objects in {} videos", scored.len());
        let mut outcome = Outcome::new("video", data, &Report { protocol, scores })?;
        let of = |name: &str, value: f64| Metric::percent(name, value, None);
        outcome.metrics = vec![of("J&F", mean.j_and_f()), of("J", mean.j_mean), of("F", mean.f_mean)];
        outcome.more = vec![("still", json!(still))];
        outcome.shown = Some(text);
        Ok(outcome)
    }
}

/// The videos in a folder, in the order of their names.
fn videos(args: &Task) -> anyhow::Result<Vec<Video>> {
    let data = &args.data;
    let usage = |message: String| Usage(anyhow::anyhow!("{}: {message}", data.display()));
    if is_synthetic(&data.to_string_lossy()) {
        return Err(usage(format!("the built-in images are no videos\n\n{LAYOUT}")).into());
    }
    let entries = std::fs::read_dir(data).map_err(|e| usage(e.to_string()))?;
    let mut folders: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.is_dir() && !is_hidden(path))
        .collect();
    folders.sort_unstable();
    let mut videos = Vec::new();
    for folder in folders {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let pairing = Pairing {
            images: folder.display().to_string(),
            maps: args.masks.as_ref().map(|masks| masks.join(&name)),
            ..Pairing::default()
        };
        let frames = AnnotatedSource::open(&pairing, MapKind::Mask, &DecodeLimits::default())?;
        if frames.images_without_map() > 0 {
            let (without, all) = (frames.images_without_map(), frames.len() + frames.images_without_map());
            return Err(usage(format!("{without} of the {all} frames of `{name}` have no mask to compare with")).into());
        }
        if frames.len() < 3 {
            return Err(usage(format!(
                "`{name}` has {} frames, the first and the last of which are not scored",
                frames.len()
            ))
            .into());
        }
        videos.push(Video { name, frames });
    }
    if videos.is_empty() {
        return Err(usage(format!("no folder of a video in it\n\n{LAYOUT}")).into());
    }
    Ok(videos)
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
}

fn score(
    video: &Video,
    encoder: &dinoxide_evaluation::dense::Encoder<'_>,
    config: &PropagationConfig,
    progress: &mut dyn FnMut(usize),
) -> anyhow::Result<Scored> {
    let frames = &video.frames;
    let named = |error: &dyn std::fmt::Display| anyhow::anyhow!("video `{}`: {error}", video.name);
    let image = frames.image(0).map_err(|e| named(&e))?;
    let first = frames.mask(0).map_err(|e| named(&e))?;
    let width = image.width() as usize;
    let check = |mask: &dinoxide_data::IntegerMap| {
        if (mask.width, mask.height) == image.dimensions() {
            return Ok(());
        }
        let (w, h) = image.dimensions();
        Err(named(&format!("frames are {w}x{h}, a mask is {}x{}", mask.width, mask.height)))
    };
    check(&first)?;
    let mut ids: Vec<u16> = first.values.iter().copied().filter(|&id| id > 0).collect();
    ids.sort_unstable();
    ids.dedup();
    // Masks of one object are often 0 and 255; beside other ids, 255 is void, as in DAVIS.
    let void = (ids.len() > 1 && ids.contains(&255)).then_some(255);
    ids.retain(|&id| Some(id) != void);
    if ids.is_empty() {
        return Err(named(&"the first mask has no object, every pixel is 0"));
    }
    let numbered: Vec<u16> =
        first.values.iter().map(|id| ids.iter().position(|one| one == id).map_or(0, |at| at as u16 + 1)).collect();
    let mut propagation = Propagation::new(encoder, config, &image, &numbered, ids.len() + 1)?;
    let (mut found, mut truths) = (Vec::new(), Vec::new());
    // The last frame is not scored, so it need not be seen.
    for index in 1..frames.len() - 1 {
        let mask = propagation.next(&frames.image(index).map_err(|e| named(&e))?).map_err(|e| named(&e))?;
        let truth = frames.mask(index).map_err(|e| named(&e))?;
        check(&truth)?;
        found.push(
            mask.iter().map(|&label| if label == 0 { 0 } else { ids[usize::from(label) - 1] }).collect::<Vec<u16>>(),
        );
        truths.push(truth.values);
        progress(index + 1);
    }
    let (mut objects, mut still) = (Vec::new(), Vec::new());
    for &id in &ids {
        let pairs: Vec<(&[u16], &[u16])> = found.iter().zip(&truths).map(|(a, b)| (&a[..], &b[..])).collect();
        objects.push(score_object(&pairs, width, id, void)?);
        let pairs: Vec<(&[u16], &[u16])> = truths.iter().map(|truth| (&first.values[..], &truth[..])).collect();
        still.push(score_object(&pairs, width, id, void)?);
    }
    Ok(Scored { name: video.name.clone(), objects, still, frames: found.len() })
}
