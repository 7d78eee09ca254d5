//! Properties of the backbone that hold for any weights, and its patches and positions beside naive loops, on grids of any
//! shape.

use burn::module::Param;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use dinoxide_model::config::{FfnKind, Position, RopeConfig, RopeNormalize, RopePeriods};
use dinoxide_model::weights::host;
use dinoxide_model::{
    Architecture, CropGroup, HeadConfig, HeadNorm, ModelConfig, ProjectionHead, Rope, RopeDraw, StochasticDraws, Vit,
    parameters,
};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

const PATCH: usize = 4;
const CHANNELS: usize = 3;
/// Rows and columns of patches.
const GRIDS: [(usize, usize); 6] = [(1, 1), (1, 5), (5, 1), (2, 3), (3, 2), (4, 4)];

fn config(position: Position) -> ModelConfig {
    ModelConfig {
        embed_dim: Some(16),
        depth: Some(2),
        num_heads: Some(2),
        patch_size: PATCH,
        register_tokens: 3,
        layer_scale_init: 1.0,
        ffn: if position == Position::Rope { FfnKind::Swiglu } else { FfnKind::Mlp },
        position,
        ..ModelConfig::default()
    }
}

fn vit(config: &ModelConfig) -> Vit {
    let Architecture::Vit(config) = config.resolve(4 * PATCH).expect("sizes fit") else { panic!("a ViT") };
    let mut vit = Vit::new(&config, &Device::flex(), &mut ChaCha8Rng::seed_from_u64(1));
    // Fresh tokens and tables are next to nothing beside what they are added to.
    vit.pos_embed = vit.pos_embed.map(|table| Param::from_tensor(noise(table.val().dims(), 2)));
    vit.mask_token = vit.mask_token.map(|token| Param::from_tensor(noise(token.val().dims(), 3)));
    vit
}

fn noise<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

fn images(batch: usize, (rows, columns): (usize, usize)) -> Tensor<4> {
    noise([batch, CHANNELS, rows * PATCH, columns * PATCH], 4)
}

fn mask(batch: usize, patches: usize) -> Tensor<2, Bool> {
    let values: Vec<bool> = (0..batch * patches).map(|i| i % 3 == 1).collect();
    Tensor::from_data(TensorData::new(values, [batch, patches]), &Device::flex())
}

fn places(order: &[usize]) -> Tensor<1, Int> {
    let order: Vec<i32> = order.iter().map(|&i| i as i32).collect();
    Tensor::from_data(TensorData::from(order.as_slice()), &Device::flex())
}

#[track_caller]
fn assert_near<const D: usize>(what: &str, left: Tensor<D>, right: Tensor<D>, tolerance: f32) {
    assert_eq!(left.dims(), right.dims(), "{what}");
    let largest: f32 = left.clone().abs().max().into_scalar();
    let off: f32 = (left - right).abs().max().into_scalar();
    assert!(off <= tolerance && largest > 100.0 * tolerance, "{what}: off by {off}, values up to {largest}");
}

#[test]
fn images_of_a_batch_do_not_see_each_other() {
    let order = [3, 0, 4, 2, 1];
    let mut cases = 0;
    for position in [Position::Learned, Position::Rope] {
        let vit = vit(&config(position));
        for grid in GRIDS {
            let (images, mask) = (images(order.len(), grid), mask(order.len(), grid.0 * grid.1));
            let all = vit.forward(images.clone(), Some(mask.clone()));
            let reordered =
                vit.forward(images.clone().select(0, places(&order)), Some(mask.clone().select(0, places(&order))));
            let what = format!("{position:?}, {grid:?}");
            assert_near(&what, all.cls.clone().select(0, places(&order)), reordered.cls, 1e-5);
            assert_near(&what, all.patches.clone().select(0, places(&order)), reordered.patches, 1e-5);
            for b in 0..order.len() {
                let alone =
                    vit.forward(images.clone().select(0, places(&[b])), Some(mask.clone().select(0, places(&[b]))));
                assert_near(&what, all.prenorm.clone().select(0, places(&[b])), alone.prenorm, 1e-5);
            }
            cases += 1;
        }
    }
    assert_eq!(cases, 12);
}

/// Without positions, a patch is known by its content alone.
#[test]
fn without_positions_another_order_of_the_patches_reorders_their_tokens() {
    let mut vit = vit(&config(Position::Learned));
    vit.pos_embed = vit.pos_embed.map(|table| Param::from_tensor(table.val().zeros_like()));
    let (batch, grid) = (2, (2, 3));
    let order = [4, 2, 0, 5, 1, 3];
    let images = images(batch, grid);
    // Patches along the batch, in their new order, put together again.
    let patch = |place: usize| {
        let (top, left) = (place / grid.1 * PATCH, place % grid.1 * PATCH);
        images.clone().slice([0..batch, 0..CHANNELS, top..top + PATCH, left..left + PATCH])
    };
    let rows = order.chunks_exact(grid.1).map(|row| Tensor::cat(row.iter().map(|&place| patch(place)).collect(), 3));
    let shuffled = Tensor::cat(rows.collect(), 2);
    let (plain, shuffled) = (vit.forward(images, None), vit.forward(shuffled, None));
    assert_near("CLS", plain.cls, shuffled.cls, 1e-5);
    assert_near("patches", plain.patches.select(1, places(&order)), shuffled.patches, 1e-5);
}

/// Rows of patches first, within a patch channels, rows, columns; each with its place in the interpolated table.
#[test]
fn patches_and_positions_equal_naive_loops_on_grids_of_any_shape() {
    let mut config = config(Position::Learned);
    config.depth = Some(1);
    let mut vit = vit(&config);
    // A block of nothing: what comes out is what went in.
    for block in &mut vit.blocks {
        *block = parameters::replace(block.clone(), |_, weight| weight.zeros_like());
    }
    let dim = 16;
    let weight = host(vit.patch_embed.proj.weight.val().reshape([-1]));
    let bias = host(vit.patch_embed.proj.bias.val());
    let table = host(vit.pos_embed.as_ref().expect("a table").val().reshape([-1]));
    let token = host(vit.mask_token.as_ref().expect("a mask token").val().reshape([-1]));
    let batch = 2;
    let mut cases = 0;
    for grid in GRIDS {
        let (height, width) = (grid.0 * PATCH, grid.1 * PATCH);
        let given = images(batch, grid);
        let pixels = host(given.clone().reshape([-1]));
        let found = vit.forward(given, Some(mask(batch, grid.0 * grid.1))).prenorm;
        let prefix = 4;
        assert_eq!(found.dims(), [batch, prefix + grid.0 * grid.1, dim]);
        let found = host(found.reshape([-1]));
        for b in 0..batch {
            for place in 0..grid.0 * grid.1 {
                let (row, column) = (place / grid.1, place % grid.1);
                for d in 0..dim {
                    let mut value = f64::from(bias[d]);
                    for c in 0..CHANNELS {
                        for y in 0..PATCH {
                            for x in 0..PATCH {
                                let pixel =
                                    ((b * CHANNELS + c) * height + row * PATCH + y) * width + column * PATCH + x;
                                let weight = weight[((d * CHANNELS + c) * PATCH + y) * PATCH + x];
                                value += f64::from(pixels[pixel]) * f64::from(weight);
                            }
                        }
                    }
                    if (b * grid.0 * grid.1 + place) % 3 == 1 {
                        value = f64::from(token[d]);
                    }
                    value += position(&table[dim..], dim, grid, (row, column), d);
                    let found = f64::from(found[(b * (prefix + grid.0 * grid.1) + prefix + place) * dim + d]);
                    assert!((found - value).abs() < 1e-5, "{grid:?} {row} {column} {d}: {found} and {value}");
                    cases += 1;
                }
            }
        }
    }
    assert_eq!(cases, batch * dim * (1 + 5 + 5 + 6 + 6 + 16));
}

/// The 4×4 table at a place of another grid: a cubic through the 16 nearest entries (Keys 1981, a = −0.75), those beyond
/// the border repeated.
fn position(table: &[f32], dim: usize, grid: (usize, usize), (row, column): (usize, usize), d: usize) -> f64 {
    const SIDE: usize = 4;
    let kernel = |x: f64| match x.abs() {
        x if x < 1.0 => 1.25 * x.powi(3) - 2.25 * x.powi(2) + 1.0,
        x if x < 2.0 => -0.75 * (x.powi(3) - 5.0 * x.powi(2) + 8.0 * x - 4.0),
        _ => 0.0,
    };
    if grid == (SIDE, SIDE) {
        return f64::from(table[(row * SIDE + column) * dim + d]);
    }
    // The offset that DINOv2 adds to the size.
    let at = |i: usize, size: usize| (i as f64 + 0.5) * SIDE as f64 / (size as f64 + 0.1) - 0.5;
    let (y, x) = (at(row, grid.0), at(column, grid.1));
    let inside = |i: isize| i.clamp(0, SIDE as isize - 1) as usize;
    let mut sum = 0.0;
    for i in -3..SIDE as isize + 3 {
        for j in -3..SIDE as isize + 3 {
            let entry = table[(inside(i) * SIDE + inside(j)) * dim + d];
            sum += kernel(y - i as f64) * kernel(x - j as f64) * f64::from(entry);
        }
    }
    sum
}

#[test]
fn a_students_forward_without_stochastic_depth_is_the_teachers() {
    let mut cases = 0;
    for position in [Position::Learned, Position::Rope] {
        let vit = vit(&config(position));
        for grid in GRIDS {
            let images = images(3, grid);
            let draws = StochasticDraws::draw(vit.config(), 3, &mut ChaCha8Rng::seed_from_u64(5));
            let student = vit.forward_train(images.clone(), None, CropGroup::Global, &draws);
            assert_near(&format!("{position:?}, {grid:?}"), vit.forward(images, None).prenorm, student.prenorm, 1e-6);
            cases += 1;
        }
    }
    assert_eq!(cases, 12);
}

/// Cosine and sine of `2π · coordinate / period`: frequencies of the row, those of the column, and both again.
#[test]
fn rotary_tables_equal_the_formula_on_grids_of_any_shape() {
    let (head_dim, prefix, base) = (12, 2, 50.0f64);
    let periods = RopePeriods::Base(base);
    let config = RopeConfig { periods, normalize: RopeNormalize::Separate, shift: 0.0, jitter: 1.0, rescale: 1.0 };
    let rope = Rope::new(config, head_dim);
    let mut cases = 0;
    for grid in GRIDS {
        let table = rope.table(grid, prefix, &RopeDraw::NONE, &Device::flex());
        assert_eq!(table.cos.dims(), [prefix + grid.0 * grid.1, head_dim]);
        let (cos, sin) = (host(table.cos.reshape([-1])), host(table.sin.reshape([-1])));
        for (token, k) in (0..grid.0 * grid.1).flat_map(|token| (0..head_dim).map(move |k| (token, k))) {
            let at = |place: usize, size: usize| 2.0 * (place as f64 + 0.5) / size as f64 - 1.0;
            let by_row = k % 6 < 3;
            let coordinate = if by_row { at(token / grid.1, grid.0) } else { at(token % grid.1, grid.1) };
            let angle = std::f64::consts::TAU * coordinate / base.powf((k % 3) as f64 / 3.0);
            let found = (prefix + token) * head_dim + k;
            let off = (f64::from(cos[found]) - angle.cos()).abs().max((f64::from(sin[found]) - angle.sin()).abs());
            assert!(off < 1e-6, "{grid:?}, patch {token}, coordinate {k}: off by {off}");
            cases += 1;
        }
    }
    assert_eq!(cases, head_dim * (1 + 5 + 5 + 6 + 6 + 16));
}

/// `x · (1 + erf(x/√2)) / 2`, by the series of erf.
fn gelu(x: f64) -> f64 {
    let z = x / std::f64::consts::SQRT_2;
    let (mut term, mut sum) = (z, z);
    for n in 1..60 {
        term *= -z * z / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    0.5 * x * (1.0 + sum * std::f64::consts::FRAC_2_SQRT_PI)
}

#[test]
fn heads_equal_loops_over_layers_and_prototypes() {
    let (rows, dim) = (4, 7);
    let mut cases = 0;
    for norm in [HeadNorm::None, HeadNorm::Weight, HeadNorm::WeightFixed] {
        for layers in [1, 2, 3] {
            let config = HeadConfig {
                prototypes: 6,
                bottleneck_dim: 3,
                hidden_dim: 5,
                layers,
                norm,
                patch_prototypes: Some(2),
                ..HeadConfig::default()
            };
            let head = ProjectionHead::new(dim, &config, &Device::flex(), &mut ChaCha8Rng::seed_from_u64(6));
            let mut seed = 10;
            let head = parameters::replace(head, |_, weight| {
                seed += 1;
                noise(weight.dims(), seed)
            });
            let shapes = parameters::shapes(&head).into_iter().collect::<std::collections::BTreeMap<_, _>>();
            let values = parameters::values(&head);
            // Rows of a matrix by name.
            let matrix = |name: &str| -> Vec<Vec<f64>> {
                let values = host(values[name].clone()).into_iter().map(f64::from).collect::<Vec<_>>();
                values.chunks_exact(shapes[name][1]).map(<[f64]>::to_vec).collect()
            };
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let x = noise([rows, dim], 7);
            let found = [head.forward(x.clone()), head.forward_patches(x.clone())].map(|y| host(y.reshape([-1])));
            for (row, x) in host(x.reshape([-1])).chunks_exact(dim).enumerate() {
                let mut y: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
                for layer in 0..layers {
                    let bias = host(values[&format!("mlp.{}.bias", 2 * layer)].clone());
                    let weight = matrix(&format!("mlp.{}.weight", 2 * layer));
                    y = weight.iter().zip(bias).map(|(w, b)| dot(w, &y) + f64::from(b)).collect();
                    if layer + 1 < layers {
                        y.iter_mut().for_each(|v| *v = gelu(*v));
                    }
                }
                let length = dot(&y, &y).sqrt();
                for (name, found) in ["last_layer", "last_layer2"].into_iter().zip(&found) {
                    let vectors = match norm {
                        HeadNorm::None => matrix(&format!("{name}.weight")),
                        _ => {
                            let magnitudes = matrix(&format!("{name}.weight_g"));
                            let directions = matrix(&format!("{name}.weight_v"));
                            let scaled = directions.iter().zip(magnitudes).map(|(v, g)| {
                                let length = dot(v, v).sqrt();
                                v.iter().map(|v| g[0] * v / length).collect()
                            });
                            scaled.collect()
                        }
                    };
                    for (k, vector) in vectors.iter().enumerate() {
                        let expected = dot(vector, &y) / length;
                        let found = f64::from(found[row * vectors.len() + k]);
                        assert!((found - expected).abs() < 2e-6, "{norm:?}, {layers} layers: {found} and {expected}");
                        cases += 1;
                    }
                }
            }
        }
    }
    assert_eq!(cases, 3 * 3 * rows * (6 + 2));
}
