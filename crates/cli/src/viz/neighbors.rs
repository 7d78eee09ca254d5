//! `dinoxide viz neighbors`: images and the ones that are nearest to them.

use std::path::PathBuf;
use std::process::ExitCode;

use dinoxide_data::{DecodeLimits, open};
use dinoxide_evaluation::{Extraction, Features, extract, nearest_neighbors};
use dinoxide_exchange::{Loaded, load};
use image::Rgb;

use super::canvas::{Sheet, Tile, check_output};
use super::{Output, file_name, spread};
use crate::terminal::{self, Log};
use crate::{Usage, device};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Weights: a run directory, its `teacher.safetensors`, one of its checkpoints, a `.pth` file of the DINO repositories, a
    /// Hugging Face folder, a timm file
    #[arg(long, value_name = "PATH")]
    weights: PathBuf,
    /// Images to look among: a folder, or `synthetic`; a frame says whether the class is the same where there are classes
    #[arg(long, value_name = "DIR")]
    data: String,
    /// Images whose neighbours are shown, evenly spread over the folder
    #[arg(
        long,
        value_name = "N",
        default_value_t = 6,
        value_parser = clap::value_parser!(u64).range(1..=100)
    )]
    count: u64,
    /// Neighbours of each
    #[arg(
        long,
        value_name = "K",
        default_value_t = 7,
        value_parser = clap::value_parser!(u64).range(1..=50)
    )]
    k: u64,
    /// Side of the crop that the backbone sees, in pixels; default: the size it was trained at
    #[arg(long, value_name = "PX")]
    crop: Option<usize>,
    /// Images in one forward. Out of memory: lower
    #[arg(
        long,
        value_name = "N",
        default_value_t = 64,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    batch_size: u64,
    /// Where to compute: `cpu`, `cuda:0`, `vulkan:0`, `wgpu:0`, `metal`
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    #[command(flatten)]
    output: Output,
}

const SAME: Rgb<u8> = Rgb([70, 160, 80]);
const OTHER: Rgb<u8> = Rgb([214, 80, 70]);

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    check_output(&args.output.output)?;
    let device = device::parse(&args.device)?;
    let Loaded { backbone, description, notes, .. } = load(&args.weights, &device)?;
    terminal::notes(&args.weights, &notes);
    let source = open(&args.data, &DecodeLimits::default())?;
    let crop_px = args.crop.unwrap_or(description.image_size);
    let how = Extraction {
        resize_px: crop_px,
        crop_px,
        mean: description.mean,
        std: description.std,
        last_blocks: 1,
        batch: args.batch_size as usize,
    };
    let indices: Vec<usize> = (0..source.len()).collect();
    let mut log = Log::new(None)?;
    log.bar(indices.len() as u64, 0, "{bar:28} features of {pos}/{len} images, {eta} left");
    let found = extract(&backbone, &*source, &indices, &how, &device, &mut |done| log.set(done as u64, String::new()))?;
    log.clear();
    crate::eval::dense::warn(&mut log, &found.rejected);
    let features = found.last_cls();
    let k = args.k as usize;
    if features.rows() <= k {
        let (data, rows) = (&args.data, features.rows());
        return Err(Usage(anyhow::anyhow!("{data}: {rows} images, too few for {k} neighbours of each")).into());
    }
    let chosen: Vec<usize> = spread(features.rows(), (args.count as usize).min(features.rows())).collect();
    let values = chosen.iter().flat_map(|&row| features.row(row).to_vec()).collect();
    let queries = Features::new(chosen.len(), features.dim(), values)?;
    let nearest = nearest_neighbors(features, &queries, k + 1, &device)?;
    let labelled = !source.classes().is_empty();
    let class = |row: usize| source.label(found.indices[row]).map(|label| source.classes()[label as usize].clone());
    let picture = |row: usize| source.read(found.indices[row]);
    let (mut same, mut all) = (0, 0);
    let mut rows = Vec::new();
    for (&query, neighbors) in chosen.iter().zip(&nearest) {
        let name = class(query).unwrap_or_else(|| file_name(&source.id(found.indices[query])));
        let mut row = vec![Tile::new(picture(query)?, name)];
        // An image is its own nearest neighbour, unless another one is the same.
        for neighbor in neighbors.iter().filter(|neighbor| neighbor.row != query).take(k) {
            let mut tile = Tile::new(picture(neighbor.row)?, format!("{:.3}", neighbor.similarity));
            if labelled {
                let equal = class(neighbor.row) == class(query);
                (same, all) = (same + usize::from(equal), all + 1);
                tile.frame = Some(if equal { SAME } else { OTHER });
                tile.caption = format!("{:.3}  {}", neighbor.similarity, class(neighbor.row).unwrap_or_default());
            }
            row.push(tile);
        }
        rows.push(row);
    }
    let share = if labelled { format!(" {same} of {all} are of the same class.") } else { String::new() };
    let legend = if labelled {
        vec![(SAME, "the same class".to_owned()), (OTHER, "another class".to_owned())]
    } else {
        Vec::new()
    };
    let sheet = Sheet {
        title: "Nearest neighbours by CLS token".into(),
        note: format!(
            "{} ({}). On the left, an image; beside it the {k} nearest of {} by cosine similarity.{share}",
            file_name(&args.weights.display().to_string()),
            description.architecture,
            features.rows()
        ),
        rows,
        group: usize::MAX,
        legend,
    };
    args.output.save(&sheet)
}
