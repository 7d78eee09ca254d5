//! One picture: an object before a wall and a floor, with everything about it that is not its class drawn at random.
//!
//! Only arithmetic that IEEE 754 fixes to the last bit goes into a pixel, apart from the sine and cosine of a few angles,
//! so images are the same on every machine but for a rounding here and there.

use std::f32::consts::TAU;

use dinoxide_random::{Purpose, stream};
use image::Rgb;
use rand::{Rng, RngExt};

use super::pattern::{Pattern, smooth_noise};
use super::shape::Shape;
use crate::order::mix;

type Color = [f32; 3];

/// What is known about one pixel.
pub(super) struct Pixel {
    pub(super) color: Rgb<u8>,
    pub(super) is_object: bool,
    /// In metres.
    pub(super) depth: f32,
}

/// All that was drawn for one image. Lengths are in units of the shorter side, from the image's middle.
pub(super) struct Scene {
    /// Pixels to a unit, and the middle in pixels.
    unit: f32,
    middle: [f32; 2],
    room: Room,
    blobs: Vec<Blob>,
    object: Object,
    /// How the light changes over the picture, relative to a unit.
    light: [f32; 2],
    /// Noise amplitude, in colour units.
    noise: f32,
    salt: u64,
}

/// Wall and floor.
struct Room {
    /// Where they meet, and the lower edge of the image.
    joint: f32,
    bottom: f32,
    wall_depth: f32,
    /// At the lower edge.
    floor_depth: f32,
    wall: [Color; 2],
    floor: [Color; 2],
    clutter: f32,
}

/// A soft spot on the background that means nothing.
struct Blob {
    center: [f32; 2],
    /// Half axes, inverted.
    inverse: [f32; 2],
    color: Color,
}

struct Object {
    shape: Shape,
    pattern: Pattern,
    center: [f32; 2],
    radius: f32,
    depth: f32,
    /// Cosine and sine of the rotation of the outline, and of the pattern.
    turn: [f32; 2],
    pattern_turn: [f32; 2],
    pattern_offset: [f32; 2],
    period: f32,
    tones: [Color; 2],
    /// Towards the light, in the plane of the image.
    light: [f32; 2],
}

impl Scene {
    /// Draws the scene of a sample, for an image of `height` rows and `width` columns.
    pub(super) fn new(seed: u64, sample: u64, shape: Shape, pattern: Pattern, height: u32, width: u32) -> Self {
        let mut rng = stream(seed, Purpose::Synthetic, sample, 0);
        let unit = height.min(width) as f32;
        let half = [width as f32 / unit / 2.0, height as f32 / unit / 2.0];
        Self {
            unit,
            middle: [width as f32 / 2.0, height as f32 / 2.0],
            room: Room::new(&mut rng, half[1]),
            blobs: (0..rng.random_range(3..7)).map(|_| Blob::new(&mut rng, half)).collect(),
            object: Object::new(&mut rng, shape, pattern, half),
            light: {
                // Up to three fifths less or more at the ends of the longer side.
                let strength = uniform(&mut rng, 0.0, 1.2) / (2.0 * half[0].max(half[1]));
                direction(uniform(&mut rng, 0.0, TAU)).map(|part| strength * part)
            },
            noise: uniform(&mut rng, 0.01, 0.05),
            salt: rng.next_u64(),
        }
    }

    /// The pixel in column `x`, row `y`.
    pub(super) fn pixel(&self, x: u32, y: u32) -> Pixel {
        let at = [(x as f32 + 0.5 - self.middle[0]) / self.unit, (y as f32 + 0.5 - self.middle[1]) / self.unit];
        let object = &self.object;
        let blur = 1.0 / self.unit;
        let local = rotate([at[0] - object.center[0], at[1] - object.center[1]], object.turn);
        let distance = object.shape.distance(local[0] / object.radius, local[1] / object.radius) * object.radius;
        let cover = (0.5 - distance / blur).clamp(0.0, 1.0);
        let is_object = cover >= 0.5;

        let mut color = [0.0; 3];
        let mut depth = 0.0;
        if cover < 1.0 {
            (color, depth) = self.room.look(at, self.salt);
            for blob in &self.blobs {
                blob.paint(at, &mut color);
            }
            // The object keeps some light from what is behind its edge.
            let shade = 1.0 - 0.35 * (1.0 - distance / (0.35 * object.radius)).clamp(0.0, 1.0);
            color = color.map(|value| value * shade);
        }
        if cover > 0.0 {
            let (front, front_depth) = object.look(at, distance, blur, self.salt);
            color = mixed(color, front, cover);
            if is_object {
                depth = front_depth;
            }
        }
        let light = 1.0 + at[0] * self.light[0] + at[1] * self.light[1];
        Pixel { color: self.developed(color.map(|value| value * light), x, y), is_object, depth }
    }

    /// Adds noise, independent in each channel, and rounds.
    fn developed(&self, color: Color, x: u32, y: u32) -> Rgb<u8> {
        let bits = mix(self.salt ^ (u64::from(y) << 32 | u64::from(x)));
        let channel = |i: u32| {
            let uniform = ((bits >> (20 * i)) & 0xfffff) as f32 / 524_288.0 - 1.0;
            ((color[i as usize] + self.noise * uniform) * 255.0 + 0.5).clamp(0.0, 255.0) as u8
        };
        Rgb([channel(0), channel(1), channel(2)])
    }
}

impl Room {
    fn new(rng: &mut impl Rng, half_height: f32) -> Self {
        let pair = |rng: &mut _| {
            let (hue, value) = (uniform(rng, 0.0, 1.0), uniform(rng, 0.2, 0.8));
            let (other_hue, other_value) = (hue + uniform(rng, -0.12, 0.12), value + uniform(rng, -0.15, 0.15));
            [hsv(hue, uniform(rng, 0.02, 0.15), value), hsv(other_hue, uniform(rng, 0.02, 0.15), other_value)]
        };
        Self {
            joint: uniform(rng, -0.3, 0.5) * half_height,
            bottom: half_height,
            wall_depth: uniform(rng, 4.0, 9.5),
            floor_depth: uniform(rng, 2.6, 3.4),
            wall: pair(rng),
            floor: pair(rng),
            clutter: uniform(rng, 0.3, 0.9),
        }
    }

    /// Colour and depth of the background. On a floor seen in perspective, one over depth is linear in the row.
    fn look(&self, at: [f32; 2], salt: u64) -> (Color, f32) {
        let down = ((at[1] - self.joint) / (self.bottom - self.joint)).max(0.0);
        let depth = 1.0 / ((1.0 - down) / self.wall_depth + down / self.floor_depth);
        let grain = smooth_noise(3.1 * at[0], 3.1 * at[1], salt);
        let colors = if down > 0.0 { &self.floor } else { &self.wall };
        let color = mixed(colors[0], colors[1], grain);
        let light = 1.0 + self.clutter * (smooth_noise(5.3 * at[0], 5.3 * at[1], !salt) - 0.5);
        // Haze: what is far is paler.
        let haze = 0.4 * depth / (depth + 8.0);
        (mixed(color.map(|value| value * light), [0.75; 3], haze), depth)
    }
}

impl Blob {
    fn new(rng: &mut impl Rng, half: [f32; 2]) -> Self {
        let axis = |rng: &mut _| 1.0 / uniform(rng, 0.08, 0.3);
        Self {
            center: half.map(|half| uniform(rng, -half, half)),
            inverse: [axis(rng), axis(rng)],
            color: hsv(uniform(rng, 0.0, 1.0), uniform(rng, 0.05, 0.25), uniform(rng, 0.35, 0.65)),
        }
    }

    fn paint(&self, at: [f32; 2], color: &mut Color) {
        let [dx, dy] = [0, 1].map(|i| (at[i] - self.center[i]) * self.inverse[i]);
        let cover = (1.6 * (1.0 - dx * dx - dy * dy)).clamp(0.0, 0.9);
        if cover > 0.0 {
            *color = mixed(*color, self.color, cover);
        }
    }
}

impl Object {
    /// Its true radius in metres: seen at a distance `d`, it is `SIZE / d` units large.
    const SIZE: f32 = 0.75;

    fn new(rng: &mut impl Rng, shape: Shape, pattern: Pattern, half: [f32; 2]) -> Self {
        let radius = uniform(rng, 0.34, 0.5);
        // A little of it may be cut off by the border.
        let center = half.map(|half| {
            let reach = (half - 0.8 * radius).max(0.0);
            uniform(rng, -reach, reach)
        });
        Self {
            shape,
            pattern,
            center,
            radius,
            depth: Self::SIZE / radius,
            turn: direction(uniform(rng, -0.4, 0.4)),
            pattern_turn: direction(uniform(rng, -0.5, 0.5)),
            pattern_offset: [uniform(rng, 0.0, 8.0), uniform(rng, 0.0, 8.0)],
            period: uniform(rng, 0.1, 0.14),
            tones: Self::tones(rng),
            light: direction(uniform(rng, 0.0, TAU)),
        }
    }

    /// Two colours of any hue that differ clearly in brightness, in either order.
    fn tones(rng: &mut impl Rng) -> [Color; 2] {
        let low = uniform(rng, 0.1, 0.3);
        let dark = hsv(uniform(rng, 0.0, 1.0), uniform(rng, 0.1, 0.3), low);
        let bright = hsv(uniform(rng, 0.0, 1.0), uniform(rng, 0.05, 0.2), low + uniform(rng, 0.5, 0.6));
        if rng.random() { [dark, bright] } else { [bright, dark] }
    }

    /// Colour and depth of the front at a point, `distance` from the outline.
    fn look(&self, at: [f32; 2], distance: f32, blur: f32, salt: u64) -> (Color, f32) {
        let from_center = [at[0] - self.center[0], at[1] - self.center[1]];
        let [mut u, mut v] = rotate(from_center, self.pattern_turn).map(|length| length / self.period);
        let centered = matches!(self.pattern, Pattern::Ripples | Pattern::Sunburst);
        let spread = if centered { 0.1 } else { 1.0 };
        u += spread * self.pattern_offset[0];
        v += spread * self.pattern_offset[1];
        let tone = self.pattern.tone(u, v, blur / self.period, salt);
        // The front is rounded towards its edge, over a third of the radius.
        let rise = (-distance / (0.33 * self.radius)).clamp(0.0, 1.0);
        let bulge = rise * (2.0 - rise);
        let along_light = (from_center[0] * self.light[0] + from_center[1] * self.light[1]) / self.radius;
        let light = 0.72 + 0.28 * bulge + 0.18 * along_light;
        let color = mixed(self.tones[0], self.tones[1], tone).map(|value| value * light);
        (color, self.depth - 0.25 * bulge)
    }
}

fn uniform(rng: &mut impl Rng, low: f32, high: f32) -> f32 {
    rng.random_range(low..=high)
}

fn mixed(a: Color, b: Color, t: f32) -> Color {
    [0, 1, 2].map(|i| a[i] + (b[i] - a[i]) * t)
}

/// Cosine and sine.
fn direction(angle: f32) -> [f32; 2] {
    [angle.cos(), angle.sin()]
}

fn rotate([x, y]: [f32; 2], [cos, sin]: [f32; 2]) -> [f32; 2] {
    [cos * x + sin * y, cos * y - sin * x]
}

/// Hue in turns, saturation and value between 0 and 1.
fn hsv(hue: f32, saturation: f32, value: f32) -> Color {
    [5.0f32, 3.0, 1.0].map(|shift| {
        let k = (shift + 6.0 * hue).rem_euclid(6.0);
        value * (1.0 - saturation * k.min(4.0 - k).clamp(0.0, 1.0))
    })
}
