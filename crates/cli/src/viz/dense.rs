//! `dinoxide viz segmentation` and `dinoxide viz depth`: what a head on patch tokens says, beside what is true.

use std::process::ExitCode;

use dinoxide_evaluation::dense::segmentation::Classes;

use super::canvas::{Sheet, Tile, check_output};
use super::paint::{class_color, distance, heat, overlay};
use super::{Output, file_name, leave_out, spread, unreadable, weights_note};
use crate::eval::given::Weights;
use crate::eval::{depth, segmentation};

#[derive(clap::Args)]
pub(crate) struct Args<T: clap::Args> {
    #[command(flatten)]
    given: Weights,
    #[command(flatten)]
    task: T,
    /// Val images to show, evenly spread
    #[arg(
        long,
        value_name = "N",
        default_value_t = 4,
        value_parser = clap::value_parser!(u64).range(1..=100)
    )]
    count: u64,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run_segmentation(args: &Args<segmentation::Task>) -> anyhow::Result<ExitCode> {
    check_output(&args.output.output)?;
    let trained = args.task.train(&args.given.load()?)?;
    let encoder = trained.setup.encoder()?;
    let (val, classes) = (&trained.val, trained.classes);
    let (mut rows, mut rejected) = (Vec::new(), Vec::new());
    let mut seen = std::collections::BTreeSet::new();
    for index in spread(val.len(), val.len().min(args.count as usize)) {
        let image = match val.image(index) {
            Ok(image) => image,
            Err(error) => {
                rejected.push(unreadable(index, error));
                continue;
            }
        };
        let truth = classes.read(val, index, image.dimensions()).map_err(|error| args.task.blamed(error, val))?;
        let truth = match truth {
            Ok(truth) => truth,
            Err(why) => {
                rejected.push(why);
                continue;
            }
        };
        let predicted = trained.head.predict(&encoder, &image)?;
        let scored = predicted.iter().zip(&truth).filter(|(_, truth)| **truth != Classes::VOID);
        let (right, all) = scored.fold((0usize, 0usize), |(r, n), (p, t)| (r + usize::from(p == t), n + 1));
        let share = if all == 0 { 0.0 } else { 100.0 * right as f64 / all as f64 };
        seen.extend(truth.iter().chain(&predicted).copied().filter(|&class| class != Classes::VOID));
        rows.push(vec![
            Tile::new(image.clone(), file_name(&val.id(index))),
            Tile::new(overlay(&image, &truth, Classes::VOID), "the mask"),
            Tile::new(overlay(&image, &predicted, Classes::VOID), format!("the head, {share:.0} % of pixels right")),
        ]);
    }
    leave_out(rejected, rows.len())?;
    let legend =
        seen.into_iter().map(|class| (class_color(class as usize), trained.names[class as usize].clone())).collect();
    let sheet = Sheet {
        title: "Segmentation by a head on patch tokens".into(),
        note: format!(
            "{}. Head trained on {} images. Dark pixels of a mask are void.",
            weights_note(&trained.setup),
            trained.train_images
        ),
        rows,
        group: usize::MAX,
        legend,
    };
    args.output.save(&sheet)
}

pub(super) fn run_depth(args: &Args<depth::Task>) -> anyhow::Result<ExitCode> {
    check_output(&args.output.output)?;
    let trained = args.task.train(&args.given.load()?)?;
    let encoder = trained.setup.encoder()?;
    let val = &trained.val;
    let images = dinoxide_evaluation::dense::depth::DepthImages { source: val, scale: trained.scale };
    let (mut found, mut rejected) = (Vec::new(), Vec::new());
    for index in spread(val.len(), val.len().min(args.count as usize)) {
        let (image, truth) = match images.read(index)? {
            Ok(both) => both,
            Err(why) => {
                rejected.push(why);
                continue;
            }
        };
        let predicted = trained.head.predict(&encoder, &image)?;
        found.push((file_name(&val.id(index)), image, truth, predicted));
    }
    leave_out(rejected, found.len())?;
    // One scale of colours for all, without the few pixels that are farthest.
    let mut known: Vec<f32> =
        found.iter().flat_map(|(_, _, truth, _)| truth.iter().copied().filter(|depth| *depth > 0.0)).collect();
    anyhow::ensure!(!known.is_empty(), "none of the images has a known depth");
    known.sort_by(f32::total_cmp);
    let range = (known[0], known[(known.len() - 1) * 99 / 100]);
    let scale = range.1 / 4.0;
    let mut rows = Vec::new();
    for (name, image, truth, predicted) in found {
        let error: Vec<f32> =
            truth.iter().zip(&predicted).map(|(t, p)| if *t > 0.0 { (p - t).abs() } else { 0.0 }).collect();
        let of_known = truth.iter().filter(|t| **t > 0.0).count().max(1);
        let mean = error.iter().sum::<f32>() / of_known as f32;
        let (width, height) = image.dimensions();
        rows.push(vec![
            Tile::new(image, name),
            Tile::new(distance(&truth, width, range), "measured"),
            Tile::new(distance(&predicted, width, range), "the head"),
            Tile::new(
                heat(&error, (height as usize, width as usize), (0.0, scale)),
                format!("error, mean {mean:.2} m"),
            ),
        ]);
    }
    let sheet = Sheet {
        title: "Depth by a head on patch tokens".into(),
        note: format!(
            "{}. Head trained on {} images. From {:.1} m (red) to {:.1} m (blue); gray is not measured. \
             Errors from 0 (dark) to {scale:.1} m (bright).",
            weights_note(&trained.setup),
            trained.train_images,
            range.0,
            range.1
        ),
        rows,
        group: usize::MAX,
        legend: Vec::new(),
    };
    args.output.save(&sheet)
}
