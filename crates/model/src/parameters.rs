//! Walking over a module's parameters by name.
//!
//! A parameter's name is its path in the module, which is its name in the references' checkpoints
//! (`blocks.3.attn.qkv.weight`). The optimizer's groups, the EMA, checkpoints and weight files all go by it.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

/// The place of a walk over a module, which is the name of the parameter there.
///
/// Which variant of an enum a module is (a [`Backbone`](crate::Backbone)) has no part in the name: the references build one
/// or the other in the same place.
#[derive(Clone, Debug, Default)]
pub struct Path(Vec<String>);

impl Path {
    /// To be called where burn's walk enters a module, with what it says.
    pub fn enter(&mut self, name: &str, container: &str) {
        if !is_enum(container) {
            self.0.push(name.to_owned());
        }
    }

    /// To be called where burn's walk leaves a module.
    pub fn exit(&mut self, container: &str) {
        if !is_enum(container) {
            self.0.pop();
        }
    }

    /// The name.
    pub fn name(&self) -> String {
        self.0.join(".")
    }
}

/// Whether burn's name for the kind of a container is that of an enum.
fn is_enum(container: &str) -> bool {
    container.starts_with("Enum:")
}

/// Calls `f` with the name, shape and flattened plain value of each parameter, in the module's order.
pub fn visit<M: Module>(module: &M, f: impl FnMut(&str, &[usize], Tensor<1>)) {
    struct Visitor<F> {
        path: Path,
        f: F,
    }
    impl<F: FnMut(&str, &[usize], Tensor<1>)> ModuleVisitor for Visitor<F> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = plain(param.val());
            let shape = value.dims();
            (self.f)(&self.path.name(), &shape, value.reshape([-1]));
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    module.visit(&mut Visitor { path: Path::default(), f });
}

/// The flattened plain values of a module's parameters, by name.
pub fn values<M: Module>(module: &M) -> BTreeMap<String, Tensor<1>> {
    let mut values = BTreeMap::new();
    visit(module, |name, _, value| {
        values.insert(name.to_owned(), value);
    });
    values
}

/// Names and shapes of a module's parameters, in the module's order.
pub fn shapes<M: Module>(module: &M) -> Vec<(String, Vec<usize>)> {
    let mut shapes = Vec::new();
    visit(module, |name, shape, _| shapes.push((name.to_owned(), shape.to_vec())));
    shapes
}

/// Replaces each parameter by `f(name, flattened plain value)`, which must keep its length.
///
/// Whether a parameter is tracked by autodiff does not change. The value is handed over, so that a computation on it may
/// reuse its memory.
pub fn replace<M: Module>(module: M, f: impl FnMut(&str, Tensor<1>) -> Tensor<1>) -> M {
    struct Mapper<F> {
        path: Path,
        f: F,
    }
    impl<F: FnMut(&str, Tensor<1>) -> Tensor<1>> ModuleMapper for Mapper<F> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (id, value, mapper) = param.consume();
            let tracked = value.device().is_autodiff();
            let value = plain(value);
            let shape = value.dims();
            let new = (self.f)(&self.path.name(), value.reshape([-1])).reshape(shape);
            let new = if tracked { Tensor::from_inner(new).require_grad() } else { new };
            Param::from_mapped_value(id, new, mapper)
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    module.map(&mut Mapper { path: Path::default(), f })
}

/// The tensor without its autodiff context; itself where it has none.
fn plain<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if tensor.device().is_autodiff() { tensor.inner() } else { tensor }
}
