//! What an operation with a hand-written backward is, and its step in burn's automatic differentiation, on any backend.

use std::fmt::Debug;
use std::marker::PhantomData;

#[cfg(feature = "cube")]
use burn::backend::Cube;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchKindConversion, DispatchTensor, Flex,
    backend_extension,
};

/// A differentiable function of `N` tensors that keeps what it likes for its backward pass. All tensors it sees are plain.
pub(super) trait Operation<const N: usize>: Clone + Debug + Send + 'static {
    /// What is kept.
    type Kept: Clone + Debug + Send + 'static;

    /// The value and, with `keep`, what [`backward`](Self::backward) reads.
    fn forward(&self, inputs: [DispatchTensor; N], keep: bool) -> (DispatchTensor, Option<Self::Kept>);

    /// The gradients of all inputs, given that of the result.
    fn backward(&self, kept: Self::Kept, grad: DispatchTensor) -> [DispatchTensor; N];
}

/// The value of an operation of one tensor, followed by automatic differentiation where that is.
pub(super) fn unary<O: Operation<1>>(a: DispatchTensor, operation: O) -> DispatchTensor {
    if is_plain(&a) { operation.forward([a], false).0 } else { Dispatch::portable_unary(a, operation) }
}

/// The value of an operation of three tensors, followed by automatic differentiation where one of them is.
pub(super) fn ternary<O: Operation<3>>(inputs: [DispatchTensor; 3], operation: O) -> DispatchTensor {
    if inputs.iter().all(is_plain) {
        return operation.forward(inputs, false).0;
    }
    let [a, b, c] = inputs;
    Dispatch::portable_ternary(a, b, c, operation)
}

/// The value of an operation of eight tensors, followed by automatic differentiation where one of them is.
pub(super) fn octonary<O: Operation<8>>(inputs: [DispatchTensor; 8], operation: O) -> DispatchTensor {
    if inputs.iter().all(is_plain) {
        return operation.forward(inputs, false).0;
    }
    let [a, b, c, d, e, f, g, h] = inputs;
    Dispatch::portable_octonary(a, b, c, d, e, f, g, h, operation)
}

/// The value of an operation of ten tensors, followed by automatic differentiation where one of them is.
pub(super) fn denary<O: Operation<10>>(inputs: [DispatchTensor; 10], operation: O) -> DispatchTensor {
    if inputs.iter().all(is_plain) {
        return operation.forward(inputs, false).0;
    }
    let [a, b, c, d, e, f, g, h, i, j] = inputs;
    Dispatch::portable_denary(a, b, c, d, e, f, g, h, i, j, operation)
}

fn is_plain(tensor: &DispatchTensor) -> bool {
    tensor.autodiff == DispatchAutodiffContext::Disabled
}

/// The backends: all that there are, with automatic differentiation and without.
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Autodiff)]
pub(crate) trait Portable: Backend {
    /// Runs an operation of one tensor.
    fn portable_unary<O: Operation<1>>(a: FloatTensor<Self>, operation: O) -> FloatTensor<Self>;
    /// Runs an operation of three tensors.
    fn portable_ternary<O: Operation<3>>(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        operation: O,
    ) -> FloatTensor<Self>;
    /// Runs an operation of eight tensors.
    #[allow(
        clippy::too_many_arguments,
        reason = "backends are chosen by arguments that are tensors, not arrays of them"
    )]
    fn portable_octonary<O: Operation<8>>(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        e: FloatTensor<Self>,
        f: FloatTensor<Self>,
        g: FloatTensor<Self>,
        h: FloatTensor<Self>,
        operation: O,
    ) -> FloatTensor<Self>;
    /// Runs an operation of ten tensors.
    #[allow(clippy::too_many_arguments, reason = "as above")]
    fn portable_denary<O: Operation<10>>(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        e: FloatTensor<Self>,
        f: FloatTensor<Self>,
        g: FloatTensor<Self>,
        h: FloatTensor<Self>,
        i: FloatTensor<Self>,
        j: FloatTensor<Self>,
        operation: O,
    ) -> FloatTensor<Self>;
}

/// The methods of [`Portable`] for a backend, by a function of an operation and its inputs.
macro_rules! by {
    ($run:path) => {
        fn portable_unary<O: Operation<1>>(a: FloatTensor<Self>, operation: O) -> FloatTensor<Self> {
            $run(operation, [a])
        }

        fn portable_ternary<O: Operation<3>>(
            a: FloatTensor<Self>,
            b: FloatTensor<Self>,
            c: FloatTensor<Self>,
            operation: O,
        ) -> FloatTensor<Self> {
            $run(operation, [a, b, c])
        }

        fn portable_octonary<O: Operation<8>>(
            a: FloatTensor<Self>,
            b: FloatTensor<Self>,
            c: FloatTensor<Self>,
            d: FloatTensor<Self>,
            e: FloatTensor<Self>,
            f: FloatTensor<Self>,
            g: FloatTensor<Self>,
            h: FloatTensor<Self>,
            operation: O,
        ) -> FloatTensor<Self> {
            $run(operation, [a, b, c, d, e, f, g, h])
        }

        fn portable_denary<O: Operation<10>>(
            a: FloatTensor<Self>,
            b: FloatTensor<Self>,
            c: FloatTensor<Self>,
            d: FloatTensor<Self>,
            e: FloatTensor<Self>,
            f: FloatTensor<Self>,
            g: FloatTensor<Self>,
            h: FloatTensor<Self>,
            i: FloatTensor<Self>,
            j: FloatTensor<Self>,
            operation: O,
        ) -> FloatTensor<Self> {
            $run(operation, [a, b, c, d, e, f, g, h, i, j])
        }
    };
}

impl Portable for Flex {
    by!(value::<Self, _, _>);
}

#[cfg(feature = "cube")]
impl Portable for Cube {
    by!(value::<Self, _, _>);
}

impl<B: Backend, C: CheckpointStrategy> Portable for Autodiff<B, C>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    by!(recorded::<B, C, _, _>);
}

/// The value alone.
fn value<B: Backend, O: Operation<N>, const N: usize>(operation: O, inputs: [FloatTensor<B>; N]) -> FloatTensor<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    primitive::<B>(operation.forward(inputs.map(dispatched::<B>), false).0)
}

/// The value; the operation is remembered if one of its inputs is tracked.
fn recorded<B: Backend, C: CheckpointStrategy, O: Operation<N>, const N: usize>(
    operation: O,
    inputs: [FloatTensor<Autodiff<B, C>>; N],
) -> FloatTensor<Autodiff<B, C>>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    let nodes = inputs.each_ref().map(|input| input.node());
    let prepared = Step::<O>(PhantomData).prepare::<C>(nodes).compute_bound().stateful();
    let inputs = inputs.map(|input| dispatched::<B>(input.into_primitive()));
    match prepared {
        OpsKind::Tracked(prep) => {
            let (value, kept) = operation.forward(inputs, true);
            let kept = kept.expect("an operation keeps what it is asked to keep");
            prep.finish((operation, kept), primitive::<B>(value))
        }
        OpsKind::UnTracked(prep) => prep.finish(primitive::<B>(operation.forward(inputs, false).0)),
    }
}

/// The backward step of an operation.
#[derive(Debug)]
struct Step<O>(PhantomData<O>);

impl<O: Operation<N>, B: Backend, const N: usize> Backward<B, N> for Step<O>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = (O, O::Kept);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (operation, kept) = ops.state;
        let gradients = operation.backward(kept, dispatched::<B>(grad));
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, primitive::<B>(gradient));
            }
        }
    }
}

/// A tensor of a backend as one of any.
fn dispatched<B: Backend>(tensor: FloatTensor<B>) -> DispatchTensor
where
    DispatchTensor: DispatchKindConversion<B>,
{
    DispatchTensor::from_backend(BackendTensor::Float(tensor))
}

/// A tensor that an operation made, as one of its backend.
fn primitive<B: Backend>(tensor: DispatchTensor) -> FloatTensor<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    <DispatchTensor as DispatchKindConversion<B>>::try_into_backend(tensor)
        .expect("an operation stays on the backend of its inputs")
        .float()
}
