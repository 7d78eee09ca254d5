//! safetensors files, read tensor by tensor: the header is checked against the file, and no value is read before it is
//! asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::rc::Rc;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::source::{Bytes, Element, Stored};

/// The longest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;

type Contents = (BTreeMap<String, Stored>, BTreeMap<String, String>);

/// Tensors and metadata of a file of `length` bytes.
pub(crate) fn read(mut file: File, length: u64) -> Result<Contents, String> {
    if length < 8 {
        return Err(format!("{length} bytes are too few for a header"));
    }
    let mut size = [0; 8];
    let io = |e: std::io::Error| e.to_string();
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    file.read_exact(&mut size).map_err(io)?;
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER || size > length - 8 {
        return Err(format!("its header would have {size} bytes, the file has {length}"));
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).map_err(io)?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|e| format!("its header is damaged: {e}"))?;
    let data = header.data_len() as u64;
    if (8 + size).checked_add(data) != Some(length) {
        return Err(format!("its header describes {data} bytes of values, the file has {}", length - 8 - size));
    }
    let file = Rc::new(file);
    let tensors = header.tensors().into_iter().map(|(name, info)| {
        let element = match info.dtype {
            Dtype::F64 => Element::F64,
            Dtype::F32 => Element::F32,
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::Bf16,
            other => Element::Other(other.to_string()),
        };
        let (start, end) = info.data_offsets;
        let bytes = Bytes::File { file: Rc::clone(&file), start: 8 + size + start as u64, length: end - start };
        (name, Stored { shape: info.shape.clone(), element, bytes })
    });
    let tensors = tensors.collect();
    let metadata = header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
    Ok((tensors, metadata))
}
