//! Patterns on surfaces: a tone between 0 and 1 at each point.

use crate::order::mix;

/// The kind of pattern. The unit of length is its period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pattern {
    Stripes,
    Zigzag,
    Dots,
    Loops,
    Checker,
    Grid,
    Bricks,
    Weave,
    Ripples,
    Sunburst,
    Blotches,
    Speckle,
}

impl Pattern {
    /// The tone at `(u, v)`, measured from the middle of the object. `blur` is the width over which an edge changes, one
    /// pixel in periods; `salt` makes the random patterns those of one image. In distribution over random rotations and
    /// offsets each pattern is its own mirror image.
    pub(super) fn tone(self, u: f32, v: f32, blur: f32, salt: u64) -> f32 {
        let edge = |signed: f32| (0.5 + signed / blur).clamp(0.0, 1.0);
        match self {
            Self::Stripes => edge(wave(v)),
            Self::Zigzag => edge(0.75 * wave(v + 1.5 * wave(0.55 * u))),
            Self::Dots => edge(0.31 - length(cell(u), cell(v))),
            Self::Loops => edge(0.12 - (length(cell(u), cell(v)) - 0.31).abs()),
            Self::Checker => {
                let (a, b) = (wave(0.55 * u), wave(0.55 * v));
                edge((a * b).signum() * a.abs().min(b.abs()) * 1.8)
            }
            Self::Grid => edge(0.13 - cell(u).abs().min(cell(v).abs())),
            Self::Bricks => {
                let joint = 0.5 - cell(1.1 * v).abs();
                let shifted = 0.55 * u + 0.5 * (floor(1.1 * v) & 1) as f32;
                edge(joint.min((0.5 - cell(shifted).abs()) * 2.0) - 0.12)
            }
            Self::Weave => {
                let along = if (floor(0.6 * u) ^ floor(0.6 * v)) & 1 == 0 { u } else { v };
                edge(wave(1.2 * along))
            }
            Self::Ripples => edge(wave(length(u, v))),
            // Seven lines through the middle; each crossed changes the tone.
            Self::Sunburst => {
                const LINES: [(f32, f32); 7] = [
                    (1.0, 0.0),
                    (0.900_968_9, 0.433_883_7),
                    (0.623_489_8, 0.781_831_5),
                    (0.222_520_9, 0.974_927_9),
                    (-0.222_520_9, 0.974_927_9),
                    (-0.623_489_8, 0.781_831_5),
                    (-0.900_968_9, 0.433_883_7),
                ];
                let (mut sign, mut nearest) = (1.0f32, f32::MAX);
                for (a, b) in LINES {
                    let side = a * u + b * v;
                    sign *= side.signum();
                    nearest = nearest.min(side.abs());
                }
                edge(sign * nearest)
            }
            Self::Blotches => edge(1.6 * (smooth_noise(1.1 * u, 1.1 * v, salt) - 0.5)),
            Self::Speckle => lattice(floor(2.6 * u), floor(2.6 * v), salt),
        }
    }
}

/// A triangle wave of period 1, between −¼ and ¼: the signed distance to the edges of a square wave.
fn wave(x: f32) -> f32 {
    cell(x).abs() - 0.25
}

/// The distance from the middle of a cell of side 1, signed: between −½ and ½.
fn cell(x: f32) -> f32 {
    x - floor(x) as f32 - 0.5
}

fn length(x: f32, y: f32) -> f32 {
    (x * x + y * y).sqrt()
}

/// `⌊x⌋`. The library's own is a function call on processors without SSE 4.1, and there are several to a pixel.
fn floor(x: f32) -> i32 {
    let truncated = x as i32;
    truncated - i32::from(x < truncated as f32)
}

/// A random number between 0 and 1 at each integer point.
fn lattice(i: i32, j: i32, salt: u64) -> f32 {
    let point = u64::from(i as u32) << 32 | u64::from(j as u32);
    (mix(point ^ salt) >> 40) as f32 / (1u64 << 24) as f32
}

/// Noise that varies smoothly over a length of 1: lattice values, blended by `3t² − 2t³`.
pub(super) fn smooth_noise(x: f32, y: f32, salt: u64) -> f32 {
    let (i, j) = (floor(x), floor(y));
    let fade = |t: f32| t * t * (3.0 - 2.0 * t);
    let (s, t) = (fade(x - i as f32), fade(y - j as f32));
    let row = |j| lattice(i, j, salt) * (1.0 - s) + lattice(i + 1, j, salt) * s;
    row(j) * (1.0 - t) + row(j + 1) * t
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Pattern; 12] = [
        Pattern::Stripes,
        Pattern::Zigzag,
        Pattern::Dots,
        Pattern::Loops,
        Pattern::Checker,
        Pattern::Grid,
        Pattern::Bricks,
        Pattern::Weave,
        Pattern::Ripples,
        Pattern::Sunburst,
        Pattern::Blotches,
        Pattern::Speckle,
    ];

    #[test]
    fn tones_stay_in_range_and_both_are_well_represented() {
        for pattern in ALL {
            let tones: Vec<_> = (0..10_000)
                .map(|i| pattern.tone((i % 100) as f32 * 0.261 - 13.0, (i / 100) as f32 * 0.259 - 13.0, 0.12, 5))
                .collect();
            assert!(tones.iter().all(|tone| (0.0..=1.0).contains(tone)), "{pattern:?}");
            let mean = tones.iter().sum::<f32>() / tones.len() as f32;
            assert!((0.25..0.8).contains(&mean), "{pattern:?} has mean tone {mean}");
        }
    }

    #[test]
    fn smooth_noise_meets_its_lattice_and_does_not_jump() {
        assert_eq!(smooth_noise(3.0, -2.0, 9), lattice(3, -2, 9));
        for i in 0..1000 {
            let x = i as f32 * 0.017 - 8.0;
            assert!((smooth_noise(x, 0.3, 1) - smooth_noise(x + 0.001, 0.3, 1)).abs() < 0.003);
        }
    }
}
