//! What a fused operation is, and its step in burn's automatic differentiation.

use std::fmt::Debug;
use std::marker::PhantomData;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Flex, backend_extension};

/// A differentiable function of `N` tensors with one result.
pub(crate) trait Operation<const N: usize>: Clone + Debug + Send + 'static {
    /// The value.
    fn forward(&self, inputs: [FlexTensor; N]) -> FlexTensor;

    /// Which inputs [`backward`](Self::backward) reads when the gradients of `tracked` are wanted; the others are not kept.
    fn reads(&self, tracked: [bool; N]) -> [bool; N];

    /// The gradients of the `tracked` inputs, given that of the result. The inputs that [`reads`](Self::reads) names are
    /// there.
    fn backward(
        &self,
        inputs: [Option<FlexTensor>; N],
        grad: FlexTensor,
        tracked: [bool; N],
    ) -> [Option<FlexTensor>; N];
}

/// A differentiable function of `N` tensors that keeps what it likes for its backward pass.
pub(crate) trait Branch<const N: usize>: Clone + Debug + Send + 'static {
    /// What is kept.
    type Kept: Clone + Debug + Send + 'static;

    /// The value and, with `keep`, what [`backward`](Self::backward) reads.
    fn forward(&self, inputs: [FlexTensor; N], keep: bool) -> (FlexTensor, Option<Self::Kept>);

    /// The gradients of all inputs, given that of the result; an input that has no gradient may get anything.
    fn backward(&self, kept: Self::Kept, grad: FlexTensor) -> [FlexTensor; N];
}

/// The backends that run an [`Operation`] or a [`Branch`]: `flex`, with and without automatic differentiation.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait FlexKernels: Backend {
    /// Runs an operation of one tensor.
    fn unary<O: Operation<1>>(a: FloatTensor<Self>, operation: O) -> FloatTensor<Self>;
    /// Runs an operation of two tensors.
    fn binary<O: Operation<2>>(a: FloatTensor<Self>, b: FloatTensor<Self>, operation: O) -> FloatTensor<Self>;
    /// Runs an operation of three tensors.
    fn ternary<O: Operation<3>>(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        operation: O,
    ) -> FloatTensor<Self>;
    /// Runs a branch of four tensors.
    fn quaternary<O: Branch<4>>(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        branch: O,
    ) -> FloatTensor<Self>;
    /// Runs a branch of eight tensors.
    #[allow(
        clippy::too_many_arguments,
        reason = "backends are chosen by arguments that are tensors, not arrays of them"
    )]
    fn octonary<O: Branch<8>>(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        e: FloatTensor<Self>,
        f: FloatTensor<Self>,
        g: FloatTensor<Self>,
        h: FloatTensor<Self>,
        branch: O,
    ) -> FloatTensor<Self>;
    /// Runs a branch of ten tensors.
    #[allow(clippy::too_many_arguments, reason = "as above")]
    fn denary<O: Branch<10>>(
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
        branch: O,
    ) -> FloatTensor<Self>;
}

impl FlexKernels for Flex {
    fn unary<O: Operation<1>>(a: FlexTensor, operation: O) -> FlexTensor {
        operation.forward([a])
    }

    fn binary<O: Operation<2>>(a: FlexTensor, b: FlexTensor, operation: O) -> FlexTensor {
        operation.forward([a, b])
    }

    fn ternary<O: Operation<3>>(a: FlexTensor, b: FlexTensor, c: FlexTensor, operation: O) -> FlexTensor {
        operation.forward([a, b, c])
    }

    fn quaternary<O: Branch<4>>(a: FlexTensor, b: FlexTensor, c: FlexTensor, d: FlexTensor, branch: O) -> FlexTensor {
        branch.forward([a, b, c, d], false).0
    }

    fn octonary<O: Branch<8>>(
        a: FlexTensor,
        b: FlexTensor,
        c: FlexTensor,
        d: FlexTensor,
        e: FlexTensor,
        f: FlexTensor,
        g: FlexTensor,
        h: FlexTensor,
        branch: O,
    ) -> FlexTensor {
        branch.forward([a, b, c, d, e, f, g, h], false).0
    }

    fn denary<O: Branch<10>>(
        a: FlexTensor,
        b: FlexTensor,
        c: FlexTensor,
        d: FlexTensor,
        e: FlexTensor,
        f: FlexTensor,
        g: FlexTensor,
        h: FlexTensor,
        i: FlexTensor,
        j: FlexTensor,
        branch: O,
    ) -> FlexTensor {
        branch.forward([a, b, c, d, e, f, g, h, i, j], false).0
    }
}

type Tracked<C> = FloatTensor<Autodiff<Flex, C>>;

impl<C: CheckpointStrategy> FlexKernels for Autodiff<Flex, C> {
    fn unary<O: Operation<1>>(a: Tracked<C>, operation: O) -> Tracked<C> {
        record::<O, C, 1>(operation, [a])
    }

    fn binary<O: Operation<2>>(a: Tracked<C>, b: Tracked<C>, operation: O) -> Tracked<C> {
        record::<O, C, 2>(operation, [a, b])
    }

    fn ternary<O: Operation<3>>(a: Tracked<C>, b: Tracked<C>, c: Tracked<C>, operation: O) -> Tracked<C> {
        record::<O, C, 3>(operation, [a, b, c])
    }

    fn quaternary<O: Branch<4>>(a: Tracked<C>, b: Tracked<C>, c: Tracked<C>, d: Tracked<C>, branch: O) -> Tracked<C> {
        record_branch::<O, C, 4>(branch, [a, b, c, d])
    }

    fn octonary<O: Branch<8>>(
        a: Tracked<C>,
        b: Tracked<C>,
        c: Tracked<C>,
        d: Tracked<C>,
        e: Tracked<C>,
        f: Tracked<C>,
        g: Tracked<C>,
        h: Tracked<C>,
        branch: O,
    ) -> Tracked<C> {
        record_branch::<O, C, 8>(branch, [a, b, c, d, e, f, g, h])
    }

    fn denary<O: Branch<10>>(
        a: Tracked<C>,
        b: Tracked<C>,
        c: Tracked<C>,
        d: Tracked<C>,
        e: Tracked<C>,
        f: Tracked<C>,
        g: Tracked<C>,
        h: Tracked<C>,
        i: Tracked<C>,
        j: Tracked<C>,
        branch: O,
    ) -> Tracked<C> {
        record_branch::<O, C, 10>(branch, [a, b, c, d, e, f, g, h, i, j])
    }
}

/// Computes the value, and remembers the operation if one of its inputs is tracked.
fn record<O: Operation<N>, C: CheckpointStrategy, const N: usize>(operation: O, inputs: [Tracked<C>; N]) -> Tracked<C> {
    let tracked = inputs.each_ref().map(|input| input.is_tracked());
    let nodes = inputs.each_ref().map(|input| input.node());
    match Step::<O>(PhantomData).prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let reads = operation.reads(tracked);
            let saved = std::array::from_fn(|i| reads[i].then(|| prep.checkpoint(&inputs[i])));
            let value = operation.forward(inputs.map(|input| input.into_primitive()));
            prep.finish((operation, saved), value)
        }
        OpsKind::UnTracked(prep) => prep.finish(operation.forward(inputs.map(|input| input.into_primitive()))),
    }
}

/// The backward step of an operation.
#[derive(Debug)]
struct Step<O>(PhantomData<O>);

impl<O: Operation<N>, const N: usize> Backward<Flex, N> for Step<O> {
    type State = (O, [Option<NodeId>; N]);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&ops.node);
        let (operation, saved) = ops.state;
        let inputs = saved.map(|node| node.map(|node| checkpointer.retrieve_node_output::<FlexTensor>(node)));
        let tracked = ops.parents.each_ref().map(Option::is_some);
        let gradients = operation.backward(inputs, grad, tracked);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// Computes the value of a branch, and remembers it if one of its inputs is tracked.
fn record_branch<O: Branch<N>, C: CheckpointStrategy, const N: usize>(
    branch: O,
    inputs: [Tracked<C>; N],
) -> Tracked<C> {
    let nodes = inputs.each_ref().map(|input| input.node());
    let prepared = BranchStep::<O>(PhantomData).prepare::<C>(nodes).compute_bound().stateful();
    let inputs = inputs.map(|input| input.into_primitive());
    match prepared {
        OpsKind::Tracked(prep) => {
            let (value, kept) = branch.forward(inputs, true);
            prep.finish((branch, kept.expect("a branch keeps what it is asked to keep")), value)
        }
        OpsKind::UnTracked(prep) => prep.finish(branch.forward(inputs, false).0),
    }
}

/// The backward step of a branch.
#[derive(Debug)]
struct BranchStep<O>(PhantomData<O>);

impl<O: Branch<N>, const N: usize> Backward<Flex, N> for BranchStep<O> {
    type State = (O, O::Kept);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&ops.node);
        let (branch, kept) = ops.state;
        let gradients = branch.backward(kept, grad);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(parent) = parent {
                grads.register::<Flex>(parent.id, gradient);
            }
        }
    }
}
