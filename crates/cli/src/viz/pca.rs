//! `dinoxide viz pca`: the three leading principal components of patch tokens as red, green and blue.

use std::process::ExitCode;

use dinoxide_augmentation::Resizer;
use dinoxide_evaluation::dense::TokenGrid;
use dinoxide_evaluation::dense::pca::Moments;
use image::{Rgb, RgbImage};

use super::canvas::{Sheet, Tile, check_output, rows_of_pairs};
use super::{Images, Output, weights_note};
use crate::eval::dense::{DenseSetup, Layers};

/// Coordinates beyond these shares of all take the ends of the colours.
const TAILS: f64 = 0.01;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    images: Images,
    #[command(flatten)]
    layers: Layers,
    /// Only the object: patches on the far side of the first component from the images' borders, with components of their
    /// own (DINOv2, figure 1)
    #[arg(long)]
    foreground: bool,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    check_output(&args.output.output)?;
    let setup = DenseSetup::whole(&args.images.given.load()?, &args.images.seen, &args.layers)?;
    let images = args.images.read()?;
    let encoder = setup.encoder()?;
    let mut resizer = Resizer::default();
    let grids: Vec<TokenGrid> = images
        .iter()
        .map(|(_, image)| encoder.tokens(&encoder.fitted(image, &mut resizer)))
        .collect::<Result<_, _>>()?;
    let dim = grids[0].dim;
    let shown: Vec<Vec<bool>> =
        if args.foreground { figures(&grids)? } else { grids.iter().map(|g| vec![true; g.rows * g.columns]).collect() };
    let mut moments = Moments::new(dim);
    for (grid, shown) in grids.iter().zip(&shown) {
        let tokens: Vec<f32> =
            grid.values.chunks(dim).zip(shown).filter(|(_, on)| **on).flat_map(|(t, _)| t.to_vec()).collect();
        moments.add(&tokens);
    }
    let components = moments.components(3)?;
    let coordinates: Vec<Vec<f32>> = grids.iter().map(|grid| components.project(&grid.values)).collect();
    let ranges: Vec<(f32, f32)> = (0..3)
        .map(|i| {
            let mut all: Vec<f32> = coordinates
                .iter()
                .zip(&shown)
                .flat_map(|(c, shown)| c.chunks(3).zip(shown).filter(|(_, on)| **on).map(move |(c, _)| c[i]))
                .collect();
            all.sort_by(f32::total_cmp);
            let at = |share: f64| all[((all.len() - 1) as f64 * share).round() as usize];
            (at(TAILS), at(1.0 - TAILS))
        })
        .collect();
    let maps = grids.iter().zip(coordinates.iter().zip(&shown)).map(|(grid, (coordinates, shown))| {
        RgbImage::from_fn(grid.columns as u32, grid.rows as u32, |x, y| {
            let place = y as usize * grid.columns + x as usize;
            if !shown[place] {
                return Rgb([255; 3]);
            }
            Rgb([0, 1, 2].map(|i| {
                let (least, most) = ranges[i];
                let value = (coordinates[3 * place + i] - least) / (most - least).max(f32::MIN_POSITIVE);
                (255.0 * value.clamp(0.0, 1.0)).round() as u8
            }))
        })
    });
    let tiles: Vec<[Tile; 2]> = images
        .iter()
        .zip(maps)
        .map(|((name, image), map)| {
            let grid = format!("{} x {} patches", map.width(), map.height());
            [Tile::new(image.clone(), name.clone()), Tile::new(map, grid)]
        })
        .collect();
    let shares: Vec<String> = components.shares.iter().map(|share| format!("{:.0} %", 100.0 * share)).collect();
    let what = if args.foreground { "of the patches of the objects" } else { "of all patches" };
    let sheet = Sheet {
        title: "Principal components of patch tokens".into(),
        note: format!(
            "{}. The first three components {what}, common to all images, as red, green and blue; they have {} of the variance.",
            weights_note(&setup),
            shares.join(", ")
        ),
        rows: rows_of_pairs(tiles),
        group: 2,
        legend: Vec::new(),
    };
    args.output.save(&sheet)
}

/// The patches on the side of the first component where the borders of images are not.
fn figures(grids: &[TokenGrid]) -> anyhow::Result<Vec<Vec<bool>>> {
    let mut moments = Moments::new(grids[0].dim);
    grids.iter().for_each(|grid| moments.add(&grid.values));
    let first = moments.components(1)?;
    let coordinates: Vec<Vec<f32>> = grids.iter().map(|grid| first.project(&grid.values)).collect();
    let mut border = (0.0, 0);
    for (grid, coordinates) in grids.iter().zip(&coordinates) {
        for (place, coordinate) in coordinates.iter().enumerate() {
            let (y, x) = (place / grid.columns, place % grid.columns);
            if y == 0 || x == 0 || y + 1 == grid.rows || x + 1 == grid.columns {
                border = (border.0 + f64::from(*coordinate), border.1 + 1);
            }
        }
    }
    let sign = if border.0 / f64::from(border.1.max(1)) > 0.0 { -1.0 } else { 1.0 };
    // Coordinates have mean 0.
    Ok(coordinates.into_iter().map(|of| of.into_iter().map(|c| sign * c > 0.0).collect()).collect())
}
