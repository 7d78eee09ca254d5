//! Where patches are: rotations of queries and keys, or a learned table on another grid.
//!
//! For images of one size both are constants. For images of any size the graph computes them from the grid, with the same
//! formulas: RoPE's angles (`dinoxide_model::Rope`), and the table times two matrices of interpolation weights
//! (`dinoxide_model::interpolation`). The operator `Resize` is left alone: runtimes differ in how they take an explicit
//! scale factor and in what they do at the borders, and a matrix leaves nothing to them.

use std::f32::consts::TAU;

use dinoxide_model::config::{LearnedConfig, RopeConfig, RopeNormalize};

use crate::graph::{GraphBuilder, Value, int, to_float};

/// The rotations of a sequence, both `[N, d]`.
pub(crate) struct Rotation {
    pub(crate) cos: Value,
    pub(crate) sin: Value,
}

/// The grid of patches as the running graph knows it.
pub(crate) struct Grid {
    /// `[2]` integers: rows, columns.
    size: Value,
    rows: Value,
    columns: Value,
    zero: Value,
    half: Value,
    one: Value,
    two: Value,
}

impl Grid {
    /// Reads the grid off images `[B, C, H, W]`, whose sides are multiples of `patch`.
    pub(crate) fn of(g: &mut GraphBuilder, images: &Value, patch: usize) -> Self {
        let pixels = g.op("grid.pixels", "Shape", &[images], vec![int("start", 2)]);
        let patch = g.int("grid.patch_size", patch as i64);
        let size = g.op("grid", "Div", &[&pixels, &patch], vec![]);
        let float = g.op("grid.float", "Cast", &[&size], vec![to_float()]);
        let mut side = |name: &str, index: i64| {
            let index = g.int(&format!("grid.{name}.index"), index);
            g.op(&format!("grid.{name}"), "Gather", &[&float, &index], vec![])
        };
        let (rows, columns) = (side("rows", 0), side("columns", 1));
        Self {
            size,
            rows,
            columns,
            zero: g.float("zero", 0.0),
            half: g.float("half", 0.5),
            one: g.float("one", 1.0),
            two: g.float("two", 2.0),
        }
    }

    /// `0.5, 1.5, … count − 0.5`, the centres of a row or column of patches.
    fn centres(&self, g: &mut GraphBuilder, name: &str, count: &Value) -> Value {
        let range = g.op(&format!("{name}.range"), "Range", &[&self.zero, count, &self.one], vec![]);
        g.op(&format!("{name}.centres"), "Add", &[&range, &self.half], vec![])
    }

    /// RoPE's tables for `prefix` tokens without a position and the patches of this grid.
    pub(crate) fn rotation(
        &self,
        g: &mut GraphBuilder,
        config: &RopeConfig,
        periods: &[f32],
        prefix: usize,
    ) -> Rotation {
        let (by_row, by_column) = match config.normalize {
            RopeNormalize::Separate => (self.rows.clone(), self.columns.clone()),
            RopeNormalize::Max | RopeNormalize::Min => {
                let kind = if config.normalize == RopeNormalize::Max { "Max" } else { "Min" };
                let by = g.op("rope.by", kind, &[&self.rows, &self.columns], vec![]);
                (by.clone(), by)
            }
        };
        let frequencies: Vec<f32> = periods.iter().map(|period| TAU / period).collect();
        let frequencies = g.floats("rope.frequencies", &[periods.len()], &frequencies);
        let unit = g.ints("rope.unit", &[1]);
        let everywhere = g.op("rope.grid", "Concat", &[&self.size, &unit], vec![int("axis", 0)]);
        let mut angles = |name: &str, count: &Value, by: &Value, axes: [i64; 3]| {
            let name = |part: &str| format!("rope.{name}{part}");
            let at = self.centres(g, &name(""), count);
            let at = g.op(&name(".doubled"), "Mul", &[&at, &self.two], vec![]);
            // Twice a centre and a size are whole numbers: this rounds once.
            let at = g.op(&name(".from_middle"), "Sub", &[&at, by], vec![]);
            let at = g.op(&name(".coordinates"), "Div", &[&at, by], vec![]);
            let axes = g.ints(&name(".axes"), &axes);
            let at = g.op(&name(".on_axis"), "Reshape", &[&at, &axes], vec![]);
            let angles = g.op(&name(".angles"), "Mul", &[&at, &frequencies], vec![]);
            g.op(&name(".everywhere"), "Expand", &[&angles, &everywhere], vec![])
        };
        let by_rows = angles("rows", &self.rows, &by_row, [-1, 1, 1]);
        let by_columns = angles("columns", &self.columns, &by_column, [1, -1, 1]);
        // Pair k is (k, k + d/2): the angles appear twice.
        let angles =
            g.op("rope.pairs", "Concat", &[&by_rows, &by_columns, &by_rows, &by_columns], vec![int("axis", 2)]);
        let head_dim = 4 * periods.len();
        let flat = g.ints("rope.flat", &[-1, head_dim as i64]);
        let angles = g.op("rope.patches", "Reshape", &[&angles, &flat], vec![]);
        let still = g.floats("rope.prefix", &[prefix, head_dim], &vec![0.0; prefix * head_dim]);
        let angles = g.op("rope.angles", "Concat", &[&still, &angles], vec![int("axis", 0)]);
        Rotation { cos: g.op("rope.cos", "Cos", &[&angles], vec![]), sin: g.op("rope.sin", "Sin", &[&angles], vec![]) }
    }

    /// The learned table of patches, `[grid², D]` row-major, on this grid: `[1, P, D]`.
    pub(crate) fn positions(&self, g: &mut GraphBuilder, config: &LearnedConfig, dim: usize, table: &[f32]) -> Value {
        let side = config.grid;
        let size = g.float("pos_embed.grid", side as f32);
        // The stored grid is taken as it is, whatever the offset.
        let mut is_stored =
            |name: &str, count: &Value| g.op(&format!("pos_embed.{name}.is_stored"), "Equal", &[count, &size], vec![]);
        let (rows, columns) = (is_stored("rows", &self.rows), is_stored("columns", &self.columns));
        let stored = g.op("pos_embed.is_stored", "And", &[&rows, &columns], vec![]);
        let offset = g.float("pos_embed.interpolate_offset", config.offset as f32);
        let offset = g.op("pos_embed.offset", "Where", &[&stored, &self.zero, &offset], vec![]);

        let weights = if config.antialias { Self::antialiased_weights } else { Self::plain_weights };
        let mut matrix = |name: &str, count: &Value| {
            let name = format!("pos_embed.{name}");
            let scaled = g.op(&format!("{name}.scaled"), "Add", &[count, &offset], vec![]);
            let step = g.op(&format!("{name}.step"), "Div", &[&size, &scaled], vec![]);
            let at = self.centres(g, &name, count);
            let at = g.op(&format!("{name}.places"), "Mul", &[&at, &step], vec![]);
            let column = g.ints(&format!("{name}.column"), &[-1, 1]);
            let at = g.op(&format!("{name}.at"), "Reshape", &[&at, &column], vec![]);
            weights(self, g, &name, &at, &step, side)
        };
        let (rows, columns) = (matrix("rows", &self.rows), matrix("columns", &self.columns));

        let table = g.floats("pos_embed", &[side, side * dim], table);
        let tall = g.op("pos_embed.tall", "MatMul", &[&rows, &table], vec![]);
        let grids = g.ints("pos_embed.split_columns", &[-1, side as i64, dim as i64]);
        let tall = g.op("pos_embed.tall_grid", "Reshape", &[&tall, &grids], vec![]);
        let wide = g.op("pos_embed.wide", "MatMul", &[&columns, &tall], vec![]);
        let tokens = g.ints("pos_embed.tokens", &[1, -1, dim as i64]);
        g.op("pos_embed.patches", "Reshape", &[&wide, &tokens], vec![])
    }

    /// Bicubic weights `[n, side]` at places `at [n, 1]`; places outside have the value of the border.
    fn plain_weights(&self, g: &mut GraphBuilder, name: &str, at: &Value, _step: &Value, side: usize) -> Value {
        // Taps reach from two before the first input to two behind the last; those outside are added to the border's.
        let taps = side + 4;
        let places: Vec<f32> = (0..taps).map(|j| j as f32 - 1.5).collect();
        let mut onto = vec![0f32; taps * side];
        for (j, row) in onto.chunks_exact_mut(side).enumerate() {
            row[j.saturating_sub(2).min(side - 1)] = 1.0;
        }
        let places = g.floats(&format!("{name}.taps"), &[taps], &places);
        let distance = g.op(&format!("{name}.distance"), "Sub", &[at, &places], vec![]);
        let weights = self.cubic(g, name, &distance, -0.75);
        let onto = g.floats(&format!("{name}.onto_inputs"), &[taps, side], &onto);
        g.op(&format!("{name}.matrix"), "MatMul", &[&weights, &onto], vec![])
    }

    /// Bicubic weights `[n, side]` whose support grows when shrinking; weights outside are left out, the rest renormalised.
    fn antialiased_weights(&self, g: &mut GraphBuilder, name: &str, at: &Value, step: &Value, side: usize) -> Value {
        let places: Vec<f32> = (0..side).map(|j| j as f32 + 0.5).collect();
        let places = g.floats(&format!("{name}.taps"), &[side], &places);
        let stretch = g.op(&format!("{name}.stretch"), "Max", &[step, &self.one], vec![]);
        let distance = g.op(&format!("{name}.distance"), "Sub", &[at, &places], vec![]);
        let distance = g.op(&format!("{name}.stretched"), "Div", &[&distance, &stretch], vec![]);
        let weights = self.cubic(g, name, &distance, -0.5);
        let axis = g.ints(&format!("{name}.axis"), &[1]);
        let total = g.op(&format!("{name}.total"), "ReduceSum", &[&weights, &axis], vec![]);
        g.op(&format!("{name}.matrix"), "Div", &[&weights, &total], vec![])
    }

    /// Keys' cubic convolution kernel with parameter `a` (Keys 1981, eq. 15).
    fn cubic(&self, g: &mut GraphBuilder, name: &str, x: &Value, a: f32) -> Value {
        let x = g.op(&format!("{name}.cubic.abs"), "Abs", &[x], vec![]);
        // The outer polynomial is zero at 2, where the kernel ends.
        let x = g.op(&format!("{name}.cubic.x"), "Min", &[&x, &self.two], vec![]);
        let is_inner = g.op(&format!("{name}.cubic.is_inner"), "Less", &[&x, &self.one], vec![]);
        let mut polynomial = |part: &str, coefficients: [f32; 4]| {
            let name = format!("{name}.cubic.{part}");
            let [first, rest @ ..] = coefficients;
            let mut value = g.float(&format!("{name}.3"), first);
            for (power, coefficient) in (0..3).rev().zip(rest) {
                value = g.op(&format!("{name}.times_x.{power}"), "Mul", &[&value, &x], vec![]);
                let coefficient = g.float(&format!("{name}.{power}"), coefficient);
                value = g.op(&format!("{name}.sum.{power}"), "Add", &[&value, &coefficient], vec![]);
            }
            value
        };
        let inner = polynomial("inner", [a + 2.0, -(a + 3.0), 0.0, 1.0]);
        let outer = polynomial("outer", [a, -5.0 * a, 8.0 * a, -4.0 * a]);
        g.op(&format!("{name}.cubic"), "Where", &[&is_inner, &inner, &outer], vec![])
    }
}
