//! Between fixtures and burn: tensors, modules with given weights, gradients by name.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Device, Gradients, Tensor, TensorData};
use dinoxide_model::parameters;
use dinoxide_testkit::{Array, Fixture};

/// A fixture's tensor on a device.
pub(crate) fn tensor<const D: usize>(array: &Array, device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(array.values.clone(), array.shape.clone()), device)
}

/// A fixture's mask on a device.
pub(crate) fn mask<const D: usize>(array: &Array<bool>, device: &Device) -> Tensor<D, Bool> {
    Tensor::from_data(TensorData::new(array.values.clone(), array.shape.clone()), device)
}

/// A tensor's values.
pub(crate) fn array<const D: usize>(tensor: Tensor<D>) -> Array {
    let shape = tensor.dims().to_vec();
    Array { shape, values: tensor.into_data().try_to_vec().expect("single precision") }
}

/// A tensor's gradient; zero where it took no part.
pub(crate) fn gradient<const D: usize>(tensor: &Tensor<D>, gradients: &Gradients) -> Array {
    match tensor.grad(gradients) {
        Some(gradient) => array(gradient),
        None => Array { shape: tensor.dims().to_vec(), values: vec![0.0; tensor.shape().num_elements()] },
    }
}

/// The gradients of a module's parameters, by name.
pub(crate) fn gradients<M: Module>(module: &M, gradients: &Gradients) -> BTreeMap<String, Array> {
    struct Visitor<'a> {
        gradients: &'a Gradients,
        path: parameters::Path,
        found: BTreeMap<String, Array>,
    }
    impl ModuleVisitor for Visitor<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.found.insert(self.path.name(), gradient(&param.val(), self.gradients));
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    let mut visitor = Visitor { gradients, path: parameters::Path::default(), found: BTreeMap::new() };
    module.visit(&mut visitor);
    visitor.found
}

/// The tensors whose names begin with `prefix`, under what remains of the name after `rename`; those without a new name are
/// left to the caller.
pub(crate) fn named(
    fixture: &Fixture,
    prefix: &str,
    rename: impl Fn(&str) -> Option<String>,
) -> BTreeMap<String, Array> {
    let names = fixture.names(prefix).map(|name| (name, rename(&name[prefix.len()..])));
    names.filter_map(|(name, new)| Some((new?, fixture.floats(name)))).collect()
}

/// The module with these weights, which must be exactly its parameters.
pub(crate) fn load<M: Module>(module: M, weights: &BTreeMap<String, Array>) -> M {
    let shapes: BTreeMap<String, Vec<usize>> = parameters::shapes(&module).into_iter().collect();
    let given: BTreeMap<String, Vec<usize>> = weights.iter().map(|(n, a)| (n.clone(), a.shape.clone())).collect();
    assert_eq!(shapes, given, "the module's parameters (left) are not the fixture's weights (right)");
    parameters::replace(module, |name, old| {
        Tensor::from_data(TensorData::from(weights[name].values.as_slice()), &old.device())
    })
}
