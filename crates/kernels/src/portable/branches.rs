//! The residual branches of a transformer block, each as one operation. What the matrix products made is kept for the
//! backward pass, or with [`Branch::recompute`] only the input.

use burn::backend::DispatchTensor;
use burn::tensor::{IndexingUpdateOp, Int, Tensor};

use super::attention::{Heads, SelfAttention};
use super::layer_norm::Norm;
use super::operation::{Operation, denary, octonary};
use super::projections::{First, Last, first_backward};
use crate::{Branch, Precision, Projection, RopeTable, composed, gated, gated_backward};

/// See [`crate::attention`]; with `rows`, [`crate::selected_attention`]. The result is `[rows, D]`.
pub(crate) fn attention(
    x: Tensor<3>,
    rows: Option<&[usize]>,
    branch: Branch,
    num_heads: usize,
    rope: Option<&RopeTable>,
) -> Tensor<2> {
    let [batch, tokens, width] = x.dims();
    let rows = rows.map(|rows| {
        assert!(
            rows.is_sorted_by(|a, b| a < b) && rows.last().is_none_or(|&last| last < batch * tokens),
            "attention: rows of x [{batch}, {tokens}, {width}] have to be ascending and within"
        );
        let indices: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
        Tensor::from_data(indices.as_slice(), &x.device().without_autodiff())
    });
    let operation = Attention {
        attention: SelfAttention::new(num_heads, rope, branch.precision),
        rows,
        eps: branch.norm.eps,
        precision: branch.precision,
        recompute: branch.recompute,
    };
    let [a, b, c, d, e, f, g] = branch.into_dispatch(width);
    Tensor::from_dispatch(octonary([x.into_dispatch(), a, b, c, d, e, f, g], operation))
}

/// See [`crate::feed_forward`].
pub(crate) fn feed_forward(x: Tensor<2>, branch: Branch) -> Tensor<2> {
    let operation = FeedForward { eps: branch.norm.eps, precision: branch.precision, recompute: branch.recompute };
    let [a, b, c, d, e, f, g] = branch.into_dispatch(x.dims()[1]);
    Tensor::from_dispatch(octonary([x.into_dispatch(), a, b, c, d, e, f, g], operation))
}

/// See [`crate::gated_feed_forward`].
pub(crate) fn gated_feed_forward(x: Tensor<2>, branch: Branch, value: Option<Projection>) -> Tensor<2> {
    let (eps, precision, recompute) = (branch.norm.eps, branch.precision, branch.recompute);
    let value = value.map(|value| (value.bias_or_zero().into_dispatch(), value.weight.into_dispatch()));
    let [a, b, c, d, e, f, g] = branch.into_dispatch(x.dims()[1]);
    let x = x.into_dispatch();
    Tensor::from_dispatch(match value {
        None => octonary([x, a, b, c, d, e, f, g], GatedFeedForward::<1> { eps, precision, recompute }),
        Some((bias, weight)) => {
            let operation = GatedFeedForward::<2> { eps, precision, recompute };
            denary([x, a, b, c, d, weight, bias, e, f, g], operation)
        }
    })
}

/// Inputs `x [B, N, D]`; the norm's `weight [D]`, `bias [D]`; the packed projection's `W [3·D, D]`, `b [3·D]`; the last
/// one's `Wₚ [D, D]`, `bₚ [D]`; `γ [D]`.
#[derive(Clone, Debug)]
struct Attention {
    attention: SelfAttention,
    /// Places in the flattened list `[B·N]` of tokens; none are all.
    rows: Option<Tensor<1, Int>>,
    eps: f64,
    precision: Precision,
    recompute: bool,
}

/// What a branch's backward pass reads: its input, what it was given, and what lies between.
#[derive(Clone, Debug)]
struct Kept<const D: usize, T> {
    x: Tensor<D>,
    norm: Norm,
    first: First,
    last: Last,
    /// `None` when it is computed again.
    between: Option<T>,
}

impl Operation<8> for Attention {
    /// Between the layers: heads, and their results `[rows, D]`.
    type Kept = Kept<3, (Heads, Tensor<2>)>;

    fn forward(
        &self,
        [x, norm_weight, norm_bias, weight, bias, w_out, b_out, gamma]: [DispatchTensor; 8],
        keep: bool,
    ) -> (DispatchTensor, Option<Self::Kept>) {
        let x = Tensor::<3>::from_dispatch(x);
        let norm = Norm::new(norm_weight, norm_bias, self.eps);
        let first = First::new(weight, bias, self.precision);
        let last = Last::new(w_out, b_out, gamma, self.precision);
        let (heads, values) = self.between(&x, &norm, &first);
        let heads = keep.then_some(heads);
        let y = last.forward(self.select(rows(x.clone())), values.clone());
        let kept = heads.map(|heads| {
            let between = (!self.recompute).then_some((heads, values));
            Kept { x, norm, first, last, between }
        });
        (y.into_dispatch(), kept)
    }

    fn backward(&self, kept: Self::Kept, grad: DispatchTensor) -> [DispatchTensor; 8] {
        let Kept { x, norm, first, last, between } = kept;
        let (heads, values) = between.unwrap_or_else(|| self.between(&x, &norm, &first));
        let [batch, tokens, width] = x.dims();
        let grad = Tensor::<2>::from_dispatch(grad);
        let input = last.backward_input(grad.clone());
        let [dw_out, db_out, dgamma] = last.backward(grad.clone(), values);
        let packed = self.attention.gradient(&heads, self.spread(input, batch * tokens), batch);
        drop(heads);
        let ([dx, dnorm_weight, dnorm_bias], [[dweight, dbias]]) =
            first_backward(rows(x), &norm, [(first, rows(packed))]);
        let dx = Tensor::<2>::from_dispatch(dx) + self.spread(grad, batch * tokens);
        let dx = dx.reshape([batch, tokens, width]).into_dispatch();
        [dx, dnorm_weight, dnorm_bias, dweight, dbias, dw_out, db_out, dgamma]
    }
}

impl Attention {
    fn between(&self, x: &Tensor<3>, norm: &Norm, first: &First) -> (Heads, Tensor<2>) {
        let [batch, tokens, width] = x.dims();
        let packed = first.with_bias(first.forward(norm.forward(rows(x.clone()))));
        let heads = self.attention.heads(packed.reshape([batch, tokens, 3 * width]));
        let values = self.select(self.attention.values(&heads, batch));
        (heads, values)
    }

    /// The rows that are asked for.
    fn select(&self, all: Tensor<2>) -> Tensor<2> {
        match &self.rows {
            Some(rows) => all.select(0, rows.clone()),
            None => all,
        }
    }

    /// Those rows among `count`, the others zero.
    fn spread(&self, selected: Tensor<2>, count: usize) -> Tensor<2> {
        match &self.rows {
            Some(rows) => {
                let zeros = Tensor::zeros([count, selected.dims()[1]], (&selected.device(), selected.dtype()));
                zeros.select_assign(0, rows.clone(), selected, IndexingUpdateOp::Add)
            }
            None => selected,
        }
    }
}

/// Inputs `x [M, D]`; the norm's `weight [D]`, `bias [D]`; `W [F, D]`, `b [F]`; the last layer's `[D, F]`, `[D]`; `γ [D]`.
#[derive(Clone, Copy, Debug)]
struct FeedForward {
    eps: f64,
    precision: Precision,
    recompute: bool,
}

impl Operation<8> for FeedForward {
    /// Between the layers: the hidden one `[M, F]` before its bias.
    type Kept = Kept<2, Tensor<2>>;

    fn forward(
        &self,
        [x, norm_weight, norm_bias, weight, bias, w_out, b_out, gamma]: [DispatchTensor; 8],
        keep: bool,
    ) -> (DispatchTensor, Option<Self::Kept>) {
        let x = Tensor::<2>::from_dispatch(x);
        let norm = Norm::new(norm_weight, norm_bias, self.eps);
        let first = First::new(weight, bias, self.precision);
        let last = Last::new(w_out, b_out, gamma, self.precision);
        let unbiased = first.forward(norm.forward(x.clone()));
        let between = (keep && !self.recompute).then(|| unbiased.clone());
        let y = last.forward(x.clone(), composed::gelu(first.with_bias(unbiased)));
        (y.into_dispatch(), keep.then(|| Kept { x, norm, first, last, between }))
    }

    fn backward(&self, kept: Self::Kept, grad: DispatchTensor) -> [DispatchTensor; 8] {
        let Kept { x, norm, first, last, between } = kept;
        let hidden = first.with_bias(between.unwrap_or_else(|| first.forward(norm.forward(x.clone()))));
        let grad = Tensor::<2>::from_dispatch(grad);
        let input = last.backward_input(grad.clone());
        let [dw_out, db_out, dgamma] = last.backward(grad.clone(), composed::gelu(hidden.clone()));
        let dhidden = input * gelu_slope(hidden);
        let ([dx, dnorm_weight, dnorm_bias], [[dweight, dbias]]) = first_backward(x, &norm, [(first, dhidden)]);
        let dx = (Tensor::<2>::from_dispatch(dx) + grad).into_dispatch();
        [dx, dnorm_weight, dnorm_bias, dweight, dbias, dw_out, db_out, dgamma]
    }
}

/// Inputs `x [M, D]`; the norm's `weight [D]`, `bias [D]`; of one layer, which makes gates and then values, `W [2·F, D]`,
/// `b [2·F]`, or of two `[F, D]`, `[F]` each; the last layer's `[D, F]`, `[D]`; `γ [D]`.
#[derive(Clone, Copy, Debug)]
struct GatedFeedForward<const LAYERS: usize> {
    eps: f64,
    precision: Precision,
    recompute: bool,
}

/// What its backward pass reads.
#[derive(Clone, Debug)]
struct GatedKept<const LAYERS: usize> {
    x: Tensor<2>,
    norm: Norm,
    first: [First; LAYERS],
    last: Last,
    /// What the first layers make, before their biases; `None` when it is computed again.
    between: Option<[Tensor<2>; LAYERS]>,
}

impl<const LAYERS: usize> GatedFeedForward<LAYERS> {
    fn value(
        &self,
        x: DispatchTensor,
        norm: [DispatchTensor; 2],
        first: [[DispatchTensor; 2]; LAYERS],
        last: [DispatchTensor; 3],
        keep: bool,
    ) -> (DispatchTensor, Option<GatedKept<LAYERS>>) {
        let x = Tensor::<2>::from_dispatch(x);
        let ([norm_weight, norm_bias], [w_out, b_out, gamma]) = (norm, last);
        let norm = Norm::new(norm_weight, norm_bias, self.eps);
        let first = first.map(|[weight, bias]| First::new(weight, bias, self.precision));
        let last = Last::new(w_out, b_out, gamma, self.precision);
        let unbiased = made(&first, norm.forward(x.clone()));
        let between = (keep && !self.recompute).then(|| unbiased.clone());
        let [gate, value] = gate_and_value(&first, unbiased);
        let y = last.forward(x.clone(), gated(gate, value));
        (y.into_dispatch(), keep.then(|| GatedKept { x, norm, first, last, between }))
    }

    fn gradients(
        &self,
        kept: GatedKept<LAYERS>,
        grad: DispatchTensor,
    ) -> ([DispatchTensor; 3], [[DispatchTensor; 2]; LAYERS], [DispatchTensor; 3]) {
        let GatedKept { x, norm, first, last, between } = kept;
        let between = between.unwrap_or_else(|| made(&first, norm.forward(x.clone())));
        let [gate, value] = gate_and_value(&first, between);
        let grad = Tensor::<2>::from_dispatch(grad);
        let input = last.backward_input(grad.clone());
        let [activated, dgate, dvalue] = gated_backward(gate, value, input);
        let [dw_out, db_out, dgamma] = last.backward(grad.clone(), activated);
        let mut dmade = match LAYERS {
            1 => vec![Tensor::cat(vec![dgate, dvalue], 1)],
            _ => vec![dgate, dvalue],
        }
        .into_iter();
        let layers = first.map(|layer| (layer, dmade.next().expect("one for each layer")));
        let ([dx, dnorm_weight, dnorm_bias], dfirst) = first_backward(x, &norm, layers);
        let dx = (Tensor::<2>::from_dispatch(dx) + grad).into_dispatch();
        ([dx, dnorm_weight, dnorm_bias], dfirst, [dw_out, db_out, dgamma])
    }
}

/// What each layer makes of the norm's result, before its bias.
fn made<const LAYERS: usize>(first: &[First; LAYERS], normalized: Tensor<2>) -> [Tensor<2>; LAYERS] {
    first.each_ref().map(|layer| layer.forward(normalized.clone()))
}

/// Gates and values `[M, F]`, with their biases.
fn gate_and_value<const LAYERS: usize>(first: &[First; LAYERS], unbiased: [Tensor<2>; LAYERS]) -> [Tensor<2>; 2] {
    let mut made = first.iter().zip(unbiased).map(|(layer, unbiased)| layer.with_bias(unbiased));
    let head = made.next().expect("a layer");
    match made.next() {
        Some(value) => [head, value],
        None => {
            let half = head.dims()[1] / 2;
            [head.clone().narrow(1, 0, half), head.narrow(1, half, half)]
        }
    }
}

impl Operation<8> for GatedFeedForward<1> {
    type Kept = GatedKept<1>;

    fn forward(
        &self,
        [x, norm_weight, norm_bias, weight, bias, w_out, b_out, gamma]: [DispatchTensor; 8],
        keep: bool,
    ) -> (DispatchTensor, Option<Self::Kept>) {
        self.value(x, [norm_weight, norm_bias], [[weight, bias]], [w_out, b_out, gamma], keep)
    }

    fn backward(&self, kept: Self::Kept, grad: DispatchTensor) -> [DispatchTensor; 8] {
        let ([dx, dnorm_weight, dnorm_bias], [[dweight, dbias]], [dw_out, db_out, dgamma]) = self.gradients(kept, grad);
        [dx, dnorm_weight, dnorm_bias, dweight, dbias, dw_out, db_out, dgamma]
    }
}

impl Operation<10> for GatedFeedForward<2> {
    type Kept = GatedKept<2>;

    fn forward(
        &self,
        [x, norm_weight, norm_bias, w_gate, b_gate, w_value, b_value, w_out, b_out, gamma]: [DispatchTensor; 10],
        keep: bool,
    ) -> (DispatchTensor, Option<Self::Kept>) {
        let first = [[w_gate, b_gate], [w_value, b_value]];
        self.value(x, [norm_weight, norm_bias], first, [w_out, b_out, gamma], keep)
    }

    fn backward(&self, kept: Self::Kept, grad: DispatchTensor) -> [DispatchTensor; 10] {
        let ([dx, dnorm_weight, dnorm_bias], dfirst, [dw_out, db_out, dgamma]) = self.gradients(kept, grad);
        let [[dw_gate, db_gate], [dw_value, db_value]] = dfirst;
        [dx, dnorm_weight, dnorm_bias, dw_gate, db_gate, dw_value, db_value, dw_out, db_out, dgamma]
    }
}

/// `Φ(x) + x·φ(x)`.
fn gelu_slope(x: Tensor<2>) -> Tensor<2> {
    let cumulative = ((x.clone() * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5;
    let density = (x.clone().powi_scalar(2) * -0.5).exp()
        * (0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2);
    cumulative + x * density
}

/// `[B, N, D]` → `[B·N, D]`.
fn rows(tokens: Tensor<3>) -> Tensor<2> {
    let [batch, count, width] = tokens.dims();
    tokens.reshape([batch * count, width])
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::{attention, feed_forward, gated_feed_forward};
    use crate::Precision::{self, Bf16, Fp32};
    use crate::testing::{
        Case, Inputs, assert_as_near, assert_same, attention_case, branch, branch_shapes, distances, feed_forward_case,
        rope, run,
    };
    use crate::{Branch, Projection, RopeTable, composed};

    fn composed_rows(x: Tensor<3>, branch: Branch, heads: usize, rope: Option<&RopeTable>) -> Tensor<2> {
        super::rows(composed::attention(x, branch, heads, rope))
    }

    /// Each input by itself, all, and none.
    fn tracked() -> impl Iterator<Item = [bool; 8]> {
        (0..10).map(|alone| std::array::from_fn(|i| alone == 8 || alone == i))
    }

    #[test]
    fn attention_equals_composed_whichever_inputs_are_tracked() {
        let mut cases = 0;
        for sizes in [[1, 1, 1, 2], [3, 5, 2, 8], [2, 11, 3, 4]] {
            for tracked in tracked() {
                for with_rope in [false, true] {
                    let rope = |t: &Inputs| with_rope.then(|| rope(t));
                    assert_same(
                        &attention_case(sizes, tracked),
                        |t| attention(t.cube(0), None, branch(t, true, true, Fp32), sizes[2], rope(t).as_ref()),
                        |t| composed_rows(t.cube(0), branch(t, true, true, Fp32), sizes[2], rope(t).as_ref()),
                    );
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, 3 * 10 * 2);
    }

    #[test]
    fn selected_rows_equal_those_of_the_whole() {
        let rows: [&[usize]; 4] = [&[0], &[0, 5, 10], &[1, 3, 10, 11, 12, 13, 14], &[14]];
        for rows in rows {
            assert_same(
                &attention_case([3, 5, 2, 8], [true; 8]),
                |t| attention(t.cube(0), Some(rows), branch(t, true, true, Fp32), 2, Some(&rope(t))),
                |t| composed::selected_attention(t.cube(0), rows, branch(t, true, true, Fp32), 2, Some(&rope(t))),
            );
        }
    }

    #[test]
    #[should_panic(expected = "rows of x [2, 3, 4] have to be ascending and within")]
    fn rows_outside_panic() {
        run(&attention_case([2, 3, 1, 4], [false; 8]), |t| {
            attention(t.cube(0), Some(&[2, 6]), branch(t, true, true, Fp32), 1, None)
        });
    }

    #[test]
    fn feed_forward_equals_composed_whichever_inputs_are_tracked() {
        let mut cases = 0;
        for (rows, width, inner) in [(1, 1, 2), (5, 24, 13), (7, 13, 40)] {
            for tracked in tracked() {
                assert_same(
                    &feed_forward_case([rows, width, inner], tracked),
                    |t| feed_forward(t.matrix(0), branch(t, true, true, Fp32)),
                    |t| composed::feed_forward(t.matrix(0), branch(t, true, true, Fp32)),
                );
                cases += 1;
            }
        }
        assert_eq!(cases, 30);
    }

    /// Of gates and values from one layer the first eight inputs, from two all.
    fn gated_case(rows: usize, width: usize, inner: usize, layers: usize, tracked: &[bool]) -> Case {
        let first = 2 * inner / layers;
        let mut shapes = branch_shapes(&[rows, width], first, inner);
        if layers == 2 {
            shapes.extend([vec![first, width], vec![first]]);
        }
        Case::new(&shapes.iter().map(Vec::as_slice).collect::<Vec<_>>(), tracked)
    }

    fn value(t: &Inputs, layers: usize, bias: bool) -> Option<Projection> {
        (layers == 2).then(|| Projection { weight: t.matrix(8), bias: bias.then(|| t.vector(9)) })
    }

    #[test]
    fn gated_feed_forward_equals_composed_whichever_inputs_are_tracked() {
        let mut cases = 0;
        for (rows, width, inner) in [(1, 1, 1), (5, 24, 13), (7, 13, 40)] {
            for layers in [1, 2] {
                let inputs = 6 + 2 * layers;
                for alone in 0..inputs + 2 {
                    let tracked: Vec<bool> = (0..inputs).map(|i| alone == inputs || alone == i).collect();
                    assert_same(
                        &gated_case(rows, width, inner, layers, &tracked),
                        |t| gated_feed_forward(t.matrix(0), branch(t, true, true, Fp32), value(t, layers, true)),
                        |t| {
                            composed::gated_feed_forward(
                                t.matrix(0),
                                branch(t, true, true, Fp32),
                                value(t, layers, true),
                            )
                        },
                    );
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, 3 * (10 + 12));
        // Without biases and layer scale.
        for layers in [1, 2] {
            let tracked: Vec<bool> = (0..6 + 2 * layers).map(|i| ![4, 6, 7, 9].contains(&i)).collect();
            assert_same(
                &gated_case(6, 24, 10, layers, &tracked),
                |t| gated_feed_forward(t.matrix(0), branch(t, false, false, Fp32), value(t, layers, false)),
                |t| composed::gated_feed_forward(t.matrix(0), branch(t, false, false, Fp32), value(t, layers, false)),
            );
        }
    }

    #[test]
    fn without_biases_or_layer_scale_equals_composed() {
        for (bias, gamma) in [(false, true), (true, false), (false, false)] {
            let mut tracked = [true; 8];
            (tracked[4], tracked[6], tracked[7]) = (bias, bias, gamma);
            assert_same(
                &feed_forward_case([6, 24, 10], tracked),
                |t| feed_forward(t.matrix(0), branch(t, bias, gamma, Fp32)),
                |t| composed::feed_forward(t.matrix(0), branch(t, bias, gamma, Fp32)),
            );
            assert_same(
                &attention_case([3, 7, 2, 6], tracked),
                |t| attention(t.cube(0), None, branch(t, bias, gamma, Fp32), 2, None),
                |t| composed_rows(t.cube(0), branch(t, bias, gamma, Fp32), 2, None),
            );
        }
    }

    #[test]
    fn computing_what_lies_between_again_does_not_change_the_bits() {
        for precision in [Fp32, Bf16] {
            let with = |recompute| {
                let branch = |t: &Inputs| Branch { recompute, ..branch(t, true, true, precision) };
                let mut results =
                    run(&feed_forward_case([9, 24, 50], [true; 8]), |t| feed_forward(t.matrix(0), branch(t)));
                results.extend(run(&attention_case([2, 9, 3, 8], [true; 8]), |t| {
                    attention(t.cube(0), Some(&[0, 4, 9, 17]), branch(t), 3, Some(&rope(t)))
                }));
                for layers in [1, 2] {
                    let case = gated_case(9, 24, 50, layers, &vec![true; 6 + 2 * layers]);
                    results.extend(run(&case, |t| gated_feed_forward(t.matrix(0), branch(t), value(t, layers, true))));
                }
                results.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>()
            };
            assert_eq!(with(true), with(false), "{precision:?}");
        }
    }

    /// Both round the operands of products, though not all gradients at the same place.
    #[test]
    fn in_bfloat16_it_is_as_near_to_single_precision_as_the_definition() {
        let rows: Vec<usize> = (0..3 * 17).filter(|i| i % 3 != 1).collect();
        let mut compared = 0;
        let mut compare = |case: Case,
                           ours: &dyn Fn(&Inputs, Precision) -> Tensor<2>,
                           defined: &dyn Fn(&Inputs, Precision) -> Tensor<2>| {
            // The values have the same roundings, but for what lies near the border between two numbers: some 5e-3 apart they
            // would be without them.
            let values = [run(&case, |t| ours(t, Bf16)), run(&case, |t| defined(t, Bf16))];
            assert!(distances(&values[0][..1], &values[1][..1])[0] < 1e-3);
            compared += assert_as_near(&case, ours, defined, 1.1);
        };
        compare(
            attention_case([3, 17, 2, 12], [true; 8]),
            &|t, precision| attention(t.cube(0), Some(&rows), branch(t, true, true, precision), 2, Some(&rope(t))),
            &|t, precision| {
                composed::selected_attention(t.cube(0), &rows, branch(t, true, true, precision), 2, Some(&rope(t)))
            },
        );
        compare(
            feed_forward_case([190, 48, 100], [true; 8]),
            &|t, precision| feed_forward(t.matrix(0), branch(t, true, true, precision)),
            &|t, precision| composed::feed_forward(t.matrix(0), branch(t, true, true, precision)),
        );
        for layers in [1, 2] {
            compare(
                gated_case(190, 160, 100, layers, &vec![true; 6 + 2 * layers]),
                &|t, precision| {
                    gated_feed_forward(t.matrix(0), branch(t, true, true, precision), value(t, layers, true))
                },
                &|t, precision| {
                    composed::gated_feed_forward(t.matrix(0), branch(t, true, true, precision), value(t, layers, true))
                },
            );
        }
        assert_eq!(compared, 18 + 9 + 11);
    }
}
