//! `dinoxide viz attention` and `dinoxide viz norms`: maps of one number per patch.

use std::process::ExitCode;

use dinoxide_augmentation::Resizer;
use dinoxide_evaluation::dense::foreground::attention_of;
use dinoxide_model::weights::host;

use super::canvas::{Sheet, Tile, check_output, rows_of_pairs};
use super::paint::{heat, range};
use super::{Images, Output, weights_note};
use crate::Usage;
use crate::eval::dense::DenseSetup;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    images: Images,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run_attention(args: &Args) -> anyhow::Result<ExitCode> {
    check_output(&args.output.output)?;
    let setup = DenseSetup::last_block(&args.images.given.load()?, &args.images.seen)?;
    let images = args.images.read()?;
    let encoder = setup.encoder()?;
    let mut resizer = Resizer::default();
    let mut rows = Vec::new();
    for (name, image) in images {
        let fitted = encoder.fitted(&image, &mut resizer);
        let stride = encoder.stride() as u32;
        let grid = ((fitted.height() / stride) as usize, (fitted.width() / stride) as usize);
        let heads = attention_of(&encoder, &fitted);
        if heads.is_empty() {
            let weights = args.images.given.weights.display();
            return Err(Usage(anyhow::anyhow!(
                "{weights}: a ConvNeXt has no attention\n\nhint: `viz pca` shows its patch tokens"
            ))
            .into());
        }
        let mut row = vec![Tile::new(image, name)];
        let mean: Vec<f32> =
            (0..heads[0].len()).map(|p| heads.iter().map(|head| head[p]).sum::<f32>() / heads.len() as f32).collect();
        row.push(Tile::new(heat(&mean, grid, range(&mean)), "mean of the heads"));
        for (number, head) in heads.iter().enumerate() {
            let on_patches = 100.0 * head.iter().sum::<f32>();
            let caption = format!("head {number}, {on_patches:.1} % on patches");
            row.push(Tile::new(heat(head, grid, range(head)), caption));
        }
        rows.push(row);
    }
    let sheet = Sheet {
        title: "Attention of CLS in the last block".into(),
        note: format!(
            "{}. Bright is much; each map from its least to its greatest value. What is missing to 100 % goes to CLS and registers.",
            weights_note(&setup)
        ),
        rows,
        group: usize::MAX,
        legend: Vec::new(),
    };
    args.output.save(&sheet)
}

pub(super) fn run_norms(args: &Args) -> anyhow::Result<ExitCode> {
    check_output(&args.output.output)?;
    let setup = DenseSetup::last_block(&args.images.given.load()?, &args.images.seen)?;
    let images = args.images.read()?;
    let encoder = setup.encoder()?;
    let mut resizer = Resizer::default();
    let mut found = Vec::new();
    for (name, image) in images {
        let fitted = encoder.fitted(&image, &mut resizer);
        let grid = setup.given.description.architecture.grid(fitted.height() as usize, fitted.width() as usize)?;
        let tokens = setup.given.backbone.forward(encoder.pixels(&fitted), None).prenorm;
        let [_, count, dim] = tokens.dims();
        // Patches are the last ones.
        let patches = tokens.narrow(1, count - grid.0 * grid.1, grid.0 * grid.1);
        let values = host(patches.reshape([-1]));
        let norms: Vec<f32> = values.chunks(dim).map(|token| token.iter().map(|v| v * v).sum::<f32>().sqrt()).collect();
        found.push((name, image, grid, norms));
    }
    let all: Vec<f32> = found.iter().flat_map(|(_, _, _, norms)| norms.clone()).collect();
    let common = range(&all);
    let tiles: Vec<[Tile; 2]> = found
        .into_iter()
        .map(|(name, image, grid, norms)| {
            let (least, most) = range(&norms);
            let caption = format!("{least:.1} to {most:.1}, median {:.1}", median(&norms));
            [Tile::new(image, name), Tile::new(heat(&norms, grid, common), caption)]
        })
        .collect();
    let sheet = Sheet {
        title: "Norms of patch tokens".into(),
        note: format!(
            "{}. After the last block, before the final norm. From {:.1} (dark) to {:.1} (bright) in all maps, median {:.1}. \
             A few very bright patches are the outliers that registers are for.",
            weights_note(&setup),
            common.0,
            common.1,
            median(&all)
        ),
        rows: rows_of_pairs(tiles),
        group: 2,
        legend: Vec::new(),
    };
    args.output.save(&sheet)
}

fn median(values: &[f32]) -> f32 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f32::total_cmp);
    sorted[sorted.len() / 2]
}
