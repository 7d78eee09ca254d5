//! Reading fixtures: one JSON file and at most one safetensors file per name.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A directory of golden fixtures.
#[derive(Clone, Debug)]
pub struct Golden {
    directory: PathBuf,
    committed: bool,
}

impl Golden {
    /// The directory named by the environment variable `DINOXIDE_GOLDEN`, or else the committed one.
    pub fn open() -> Self {
        match env::var_os("DINOXIDE_GOLDEN") {
            Some(directory) => Self { directory: directory.into(), committed: false },
            None => Self { directory: Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"), committed: true },
        }
    }

    /// Fixtures in a directory of the caller's choice.
    pub fn at(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into(), committed: false }
    }

    /// Whether these are the committed fixtures, of which even the number of comparisons is known.
    pub fn is_committed(&self) -> bool {
        self.committed
    }

    /// Names of the fixtures: file names without `.json` and `.safetensors`. Other files are not fixtures.
    ///
    /// # Panics
    /// If the directory cannot be listed.
    pub fn names(&self) -> BTreeSet<String> {
        let shown = self.directory.display();
        let entries = fs::read_dir(&self.directory).unwrap_or_else(|e| panic!("`{shown}`: {e}"));
        let mut names = BTreeSet::new();
        for entry in entries {
            let path = entry.unwrap_or_else(|e| panic!("`{shown}`: {e}")).path();
            if let (Some(stem), Some("json" | "safetensors")) =
                (path.file_stem().and_then(|s| s.to_str()), path.extension().and_then(|e| e.to_str()))
            {
                names.insert(stem.to_owned());
            }
        }
        names
    }

    /// Reads the fixture `name`.
    ///
    /// # Panics
    /// If its files cannot be read or parsed.
    pub fn fixture(&self, name: &str) -> Fixture {
        let path = self.directory.join(format!("{name}.json"));
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("`{}`: {e}", path.display()));
        let json = serde_json::from_str(&text).unwrap_or_else(|e| panic!("`{}`: {e}", path.display()));
        let path = self.directory.join(format!("{name}.safetensors"));
        let mut tensors = BTreeMap::new();
        if path.exists() {
            let bytes = fs::read(&path).unwrap_or_else(|e| panic!("`{}`: {e}", path.display()));
            let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("`{}`: {e}", path.display()));
            for (tensor, view) in file.iter() {
                let stored = Stored { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() };
                tensors.insert(tensor.to_owned(), stored);
            }
        }
        Fixture { golden: self.clone(), name: name.to_owned(), json, tensors, read: RefCell::default() }
    }
}

/// A tensor on the host: row-major values of a shape; a scalar's shape is empty.
#[derive(Clone, Debug, PartialEq)]
pub struct Array<T = f32> {
    /// Sizes of the axes.
    pub shape: Vec<usize>,
    /// Values, the last axis fastest.
    pub values: Vec<T>,
}

/// A type of values that fixtures hold.
pub trait Element: Sized {
    /// Its name in a safetensors file.
    const DTYPE: Dtype;

    /// Values of consecutive little-endian bytes.
    fn decode(bytes: &[u8]) -> Vec<Self>;
}

macro_rules! element {
    ($type:ty, $dtype:ident) => {
        impl Element for $type {
            const DTYPE: Dtype = Dtype::$dtype;

            fn decode(bytes: &[u8]) -> Vec<Self> {
                let (values, rest) = bytes.as_chunks();
                assert!(rest.is_empty(), "{} bytes are left over", rest.len());
                values.iter().map(|&bytes| Self::from_le_bytes(bytes)).collect()
            }
        }
    };
}
element!(f32, F32);
element!(i64, I64);
element!(i8, I8);
element!(u8, U8);

impl Element for bool {
    const DTYPE: Dtype = Dtype::BOOL;

    fn decode(bytes: &[u8]) -> Vec<Self> {
        bytes.iter().map(|&byte| byte != 0).collect()
    }
}

#[derive(Clone, Debug)]
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// One fixture. It remembers which of its tensors were read, so that a test can prove that it left none out.
#[derive(Clone, Debug)]
pub struct Fixture {
    golden: Golden,
    name: String,
    json: Value,
    tensors: BTreeMap<String, Stored>,
    read: RefCell<BTreeSet<String>>,
}

impl Fixture {
    /// The file name without extension.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Another fixture of the same directory, whose inputs this one shares.
    ///
    /// # Panics
    /// If its files cannot be read or parsed.
    pub fn beside(&self, name: &str) -> Self {
        self.golden.fixture(name)
    }

    /// The whole JSON file.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// The hyper-parameters; `null` where the file has none.
    pub fn hyper(&self) -> &Value {
        &self.json["hyper"]
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of the tensors that begin with `prefix`, in alphabetical order.
    pub fn names<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.tensors.keys().map(String::as_str).filter(move |name| name.starts_with(prefix))
    }

    /// The shape of a tensor; does not count as reading it.
    ///
    /// # Panics
    /// If there is no such tensor.
    pub fn shape(&self, name: &str) -> &[usize] {
        &self.stored(name).shape
    }

    /// A tensor of floats.
    ///
    /// # Panics
    /// If there is no such tensor, or it is of another type.
    pub fn floats(&self, name: &str) -> Array {
        self.array(name)
    }

    /// A tensor of any element type.
    ///
    /// # Panics
    /// If there is no such tensor, or it is of another type.
    pub fn array<T: Element>(&self, name: &str) -> Array<T> {
        let stored = self.stored(name);
        assert_eq!(stored.dtype, T::DTYPE, "{}: `{name}`: element type", self.name);
        self.read.borrow_mut().insert(name.to_owned());
        Array { shape: stored.shape.clone(), values: T::decode(&stored.bytes) }
    }

    /// A scalar.
    ///
    /// # Panics
    /// If there is no such tensor, or it has more than one value.
    pub fn scalar(&self, name: &str) -> f32 {
        let array = self.floats(name);
        assert_eq!(array.values.len(), 1, "{}: `{name}` is no scalar", self.name);
        array.values[0]
    }

    /// Counts a tensor as read without reading it: for one that a test leaves out for a stated reason.
    pub fn leave_out(&self, name: &str) {
        self.stored(name);
        self.read.borrow_mut().insert(name.to_owned());
    }

    /// Names of the tensors that nothing has read.
    pub fn unread(&self) -> Vec<&str> {
        let read = self.read.borrow();
        self.tensors.keys().map(String::as_str).filter(|&name| !read.contains(name)).collect()
    }

    fn stored(&self, name: &str) -> &Stored {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: there is no tensor `{name}`", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_every_element_type_are_read_and_remembered() {
        let directory = tempfile::tempdir().expect("a directory");
        let header = r#"{"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"b":{"dtype":"BOOL","shape":[3],"data_offsets":[8,11]},"c":{"dtype":"I8","shape":[],"data_offsets":[11,12]},"d":{"dtype":"I64","shape":[1],"data_offsets":[12,20]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend([1, 0, 1, 0xfe]);
        bytes.extend((-7i64).to_le_bytes());
        fs::write(directory.path().join("x.safetensors"), bytes).expect("written");
        fs::write(directory.path().join("x.json"), r#"{"hyper": {"depth": 3}}"#).expect("written");
        fs::write(directory.path().join("README.md"), "").expect("written");

        let golden = Golden::at(directory.path());
        assert_eq!(golden.names().into_iter().collect::<Vec<_>>(), ["x"]);
        let fixture = golden.fixture("x");
        assert_eq!(fixture.hyper()["depth"], 3);
        assert_eq!(fixture.floats("a"), Array { shape: vec![1, 2], values: vec![1.5, -2.0] });
        assert_eq!(fixture.array::<bool>("b").values, [true, false, true]);
        assert_eq!(fixture.unread(), ["c", "d"]);
        assert_eq!(fixture.array::<i8>("c"), Array { shape: vec![], values: vec![-2] });
        fixture.leave_out("d");
        assert!(fixture.unread().is_empty());
        assert_eq!(fixture.array::<i64>("d").values, [-7]);
    }

    #[test]
    #[should_panic(expected = "x: there is no tensor `y`")]
    fn a_missing_tensor_is_named() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("x.json"), "{}").expect("written");
        Golden::at(directory.path()).fixture("x").floats("y");
    }
}
