//! Putting a graph together: constants and operations, each under a name of its own.

use std::collections::BTreeSet;

use crate::proto::{self, Attribute, AttributeType, DataType};

/// A value of the graph: an input, a constant, or an output of an operation.
#[derive(Clone, Debug)]
pub(crate) struct Value(String);

impl Value {
    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.0
    }
}

/// A size that is known now, or the name of one that is known when the graph runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Axis {
    Known(usize),
    Named(&'static str),
}

/// A graph that grows in the order in which it runs.
#[derive(Default)]
pub(crate) struct GraphBuilder {
    graph: proto::Graph,
    names: BTreeSet<String>,
}

impl GraphBuilder {
    /// The message, under `name`.
    pub(crate) fn finish(mut self, name: &str) -> proto::Graph {
        self.graph.name = Some(name.to_owned());
        self.graph
    }

    /// Claims a name; two values of one name would make the graph mean something else.
    fn value(&mut self, name: &str) -> Value {
        assert!(self.names.insert(name.to_owned()), "the graph has two values called `{name}`");
        Value(name.to_owned())
    }

    /// An input of single-precision numbers.
    pub(crate) fn input(&mut self, name: &str, axes: &[Axis], doc: &str) -> Value {
        self.graph.input.push(value_info(name, axes, doc));
        self.value(name)
    }

    /// Makes `value` an output of single-precision numbers. It must have been called by the name it is to have.
    pub(crate) fn output(&mut self, value: &Value, axes: &[Axis], doc: &str) {
        self.graph.output.push(value_info(value.name(), axes, doc));
    }

    /// A constant of single-precision numbers, row-major.
    pub(crate) fn floats(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Value {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values of `{name}` {shape:?}");
        self.constant(name, shape, DataType::Float, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// A constant single-precision number without axes.
    pub(crate) fn float(&mut self, name: &str, value: f32) -> Value {
        self.floats(name, &[], &[value])
    }

    /// A constant list of integers.
    pub(crate) fn ints(&mut self, name: &str, values: &[i64]) -> Value {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.constant(name, &[values.len()], DataType::Int64, bytes)
    }

    /// A constant integer without axes.
    pub(crate) fn int(&mut self, name: &str, value: i64) -> Value {
        self.constant(name, &[], DataType::Int64, value.to_le_bytes().to_vec())
    }

    fn constant(&mut self, name: &str, shape: &[usize], data_type: DataType, raw_data: Vec<u8>) -> Value {
        self.graph.initializer.push(proto::Tensor {
            dims: shape.iter().map(|&size| size as i64).collect(),
            data_type: Some(data_type.into()),
            name: Some(name.to_owned()),
            raw_data: Some(raw_data),
        });
        self.value(name)
    }

    /// An operation of the standard domain with one output, which is called `name` as the operation is.
    pub(crate) fn op(&mut self, name: &str, kind: &str, inputs: &[&Value], attributes: Vec<Attribute>) -> Value {
        let output = self.value(name);
        self.push(name, kind, inputs, vec![output.name().to_owned()], attributes);
        output
    }

    /// Parts of the given sizes along an axis, called `name.0`, `name.1` and so on.
    pub(crate) fn split<const K: usize>(&mut self, name: &str, x: &Value, axis: i64, sizes: [usize; K]) -> [Value; K] {
        let sizes = self.ints(&format!("{name}.sizes"), &sizes.map(|size| size as i64));
        let parts: [Value; K] = std::array::from_fn(|i| self.value(&format!("{name}.{i}")));
        let outputs = parts.iter().map(|part| part.name().to_owned()).collect();
        self.push(name, "Split", &[x, &sizes], outputs, vec![int("axis", axis)]);
        parts
    }

    fn push(&mut self, name: &str, kind: &str, inputs: &[&Value], output: Vec<String>, attribute: Vec<Attribute>) {
        self.graph.node.push(proto::Node {
            input: inputs.iter().map(|value| value.name().to_owned()).collect(),
            output,
            name: Some(name.to_owned()),
            op_type: Some(kind.to_owned()),
            attribute,
        });
    }
}

/// An attribute of one integer.
pub(crate) fn int(name: &str, value: i64) -> Attribute {
    Attribute {
        name: Some(name.to_owned()),
        i: Some(value),
        r#type: Some(AttributeType::Int.into()),
        ..Attribute::default()
    }
}

/// An attribute of several integers.
pub(crate) fn ints(name: &str, values: &[usize]) -> Attribute {
    Attribute {
        name: Some(name.to_owned()),
        ints: values.iter().map(|&value| value as i64).collect(),
        r#type: Some(AttributeType::Ints.into()),
        ..Attribute::default()
    }
}

/// An attribute of one number.
pub(crate) fn float(name: &str, value: f32) -> Attribute {
    Attribute {
        name: Some(name.to_owned()),
        f: Some(value),
        r#type: Some(AttributeType::Float.into()),
        ..Attribute::default()
    }
}

/// The attribute that says what a `Cast` gives: single precision.
pub(crate) fn to_float() -> Attribute {
    int("to", i64::from(i32::from(DataType::Float)))
}

fn value_info(name: &str, axes: &[Axis], doc: &str) -> proto::ValueInfo {
    let dim = axes
        .iter()
        .map(|axis| match *axis {
            Axis::Known(size) => proto::Dimension { dim_value: Some(size as i64), dim_param: None },
            Axis::Named(name) => proto::Dimension { dim_value: None, dim_param: Some(name.to_owned()) },
        })
        .collect();
    let tensor = proto::TensorType { elem_type: Some(DataType::Float.into()), shape: Some(proto::Shape { dim }) };
    proto::ValueInfo {
        name: Some(name.to_owned()),
        r#type: Some(proto::Type { tensor_type: Some(tensor) }),
        doc_string: Some(doc.to_owned()),
    }
}
