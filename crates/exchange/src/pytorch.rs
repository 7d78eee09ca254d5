//! PyTorch files: a zip archive with a pickle that names the tensors, and their bytes beside it.
//!
//! Reading goes through a parser that executes nothing: it knows the calls that rebuild tensors, and every other object is
//! a name without a value. Limits that the archive is held to before it is parsed are here. Writing is a pickle of fixed
//! shape, protocol 2, which `torch.load(path, weights_only=True)` reads as a flat dictionary.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::path::Path;

use pytorch_reader::{DType, PytorchReader};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::source::{Bytes, Element, Stored};
use crate::{ExchangeError, Tensors};

/// What to do with a file from before PyTorch 1.6.
pub(crate) const LEGACY: &str = "a pickle that is not in a zip archive, as PyTorch wrote before 1.6\n\nhint: save it \
    again with a current PyTorch: `torch.save(torch.load(path, map_location=\"cpu\"), new_path)`";

/// Name of the entry with our description, beside the pickle; PyTorch leaves entries that it does not know alone.
const DESCRIPTION: &str = "dinoxide.json";

/// Folder of the entries in files that are written.
const ROOT: &str = "weights";

/// Largest pickle read. It names tensors and holds what was saved beside them; that of 7 B parameters has 200 kB. A
/// pickle of nothing but empty lists grows a hundredfold in memory, which sets the limit.
const MAX_PICKLE: u64 = 8 << 20;

/// Largest description read.
const MAX_DESCRIPTION: u64 = 1 << 20;

pub(crate) fn is_zip(start: [u8; 4]) -> bool {
    start == *b"PK\x03\x04"
}

/// A pickle of protocol 2 to 5.
pub(crate) fn is_legacy(start: [u8; 4]) -> bool {
    start[0] == 0x80 && (2..=5).contains(&start[1])
}

/// Tensors by their path in the pickle's dictionaries, and the description if there is one.
pub(crate) fn read(path: &Path, length: u64) -> Result<(BTreeMap<String, Stored>, Option<String>), ExchangeError> {
    let bad = |reason: String| ExchangeError::unreadable(path, format!("not a readable PyTorch file: {reason}"));
    let description = check(path, length).map_err(bad)?;
    let reader = PytorchReader::new(path).map_err(|e| bad(e.to_string()))?;
    let tensors = reader.into_tensors().into_iter().map(|(name, tensor)| {
        let element = match tensor.dtype() {
            DType::F64 => Element::F64,
            DType::F32 => Element::F32,
            DType::F16 => Element::F16,
            DType::BF16 => Element::Bf16,
            other => Element::Other(format!("{other:?}")),
        };
        (name, Stored { shape: tensor.shape().to_vec(), element, bytes: Bytes::PyTorch(tensor) })
    });
    Ok((tensors.collect(), description))
}

/// Holds an archive to what `torch.save` writes, which bounds what parsing it can take; gives the description.
fn check(path: &Path, length: u64) -> Result<Option<String>, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| e.to_string())?;
    let mut description = None;
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(|e| e.to_string())?;
        let name = entry.name().map_err(|e| e.to_string())?.into_owned();
        if entry.compression() != CompressionMethod::Stored || entry.compressed_size() != entry.size() {
            return Err(format!("`{name}` is compressed, which `torch.save` never does"));
        }
        let limit = match name.rsplit('/').next() {
            Some("data.pkl") => MAX_PICKLE,
            Some(DESCRIPTION) => MAX_DESCRIPTION,
            _ => length,
        };
        if entry.size() > limit.min(length) {
            return Err(format!("`{name}` has {} bytes, at most {} are read", entry.size(), limit.min(length)));
        }
        if name.ends_with(&format!("/{DESCRIPTION}")) {
            drop(entry);
            let mut text = String::new();
            let mut entry = archive.by_index(index).map_err(|e| e.to_string())?;
            entry.read_to_string(&mut text).map_err(|e| format!("`{name}`: {e}"))?;
            description = Some(text);
        }
    }
    Ok(description)
}

/// Writes `tensors` as a flat dictionary in single precision.
pub(crate) fn write(file: &File, tensors: &Tensors, description: &str) -> std::io::Result<()> {
    let mut archive = ZipWriter::new(BufWriter::new(file));
    let text = [("data.pkl", pickle(tensors)), ("byteorder", b"little".to_vec()), (DESCRIPTION, description.into())];
    for (name, bytes) in text {
        start(&mut archive, name, bytes.len())?;
        archive.write_all(&bytes)?;
    }
    for (key, weight) in tensors.values().enumerate() {
        start(&mut archive, &format!("data/{key}"), size_of_val(weight.values.as_slice()))?;
        write_values(&mut archive, &weight.values)?;
    }
    start(&mut archive, "version", 2)?;
    archive.write_all(b"3\n")?;
    archive.finish().map_err(std::io::Error::from)?.flush()
}

/// Begins an entry, aligned as PyTorch aligns, so that it can map the file into memory.
fn start(archive: &mut ZipWriter<impl Write + Seek>, name: &str, length: usize) -> std::io::Result<()> {
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .large_file(length >= u32::MAX as usize)
        .with_alignment(64);
    archive.start_file(format!("{ROOT}/{name}"), options).map_err(std::io::Error::from)
}

fn write_values(to: &mut impl Write, values: &[f32]) -> std::io::Result<()> {
    for part in values.chunks(1 << 14) {
        let bytes: Vec<u8> = part.iter().flat_map(|value| value.to_le_bytes()).collect();
        to.write_all(&bytes)?;
    }
    Ok(())
}

/// `{name: _rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())}`.
fn pickle(tensors: &Tensors) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec();
    for (key, (name, weight)) in tensors.iter().enumerate() {
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(b"ctorch\nFloatStorage\n");
        text(&mut out, &key.to_string());
        text(&mut out, "cpu");
        integer(&mut out, weight.values.len());
        out.extend(b"tQ");
        integer(&mut out, 0);
        let strides = (0..weight.shape.len()).map(|axis| weight.shape[axis + 1..].iter().product());
        for list in [weight.shape.clone(), strides.collect()] {
            out.push(b'(');
            list.iter().for_each(|size| integer(&mut out, *size));
            out.push(b't');
        }
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn integer(out: &mut Vec<u8>, value: usize) {
    match i32::try_from(value) {
        Ok(value) => {
            out.push(b'J');
            out.extend(value.to_le_bytes());
        }
        Err(_) => {
            // Two's complement; sizes never reach the sign bit.
            out.extend([0x8a, 8]);
            out.extend((value as u64).to_le_bytes());
        }
    }
}
