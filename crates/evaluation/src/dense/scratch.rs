//! A temporary file of 16-bit words, for what does not fit in memory: tokens in half precision, masks, depths.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Mutex;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::TokenGrid;
use crate::EvaluationError;

/// Words written to a [`Scratch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    start: u64,
    words: usize,
}

/// A token grid written to a [`Scratch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoredGrid {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) dim: usize,
    span: Span,
}

/// The file, without a name: it is gone when it is closed, whatever happens to the program.
pub(crate) struct Scratch {
    file: Mutex<File>,
    words: u64,
}

impl Scratch {
    pub(crate) fn new() -> Result<Self, EvaluationError> {
        Ok(Self { file: Mutex::new(tempfile::tempfile().map_err(failed)?), words: 0 })
    }

    pub(crate) fn push(&mut self, words: &[u16]) -> Result<Span, EvaluationError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let span = Span { start: self.words, words: words.len() };
        let file = self.file.get_mut().expect("no thread panics while it has the file");
        file.seek(SeekFrom::Start(2 * span.start)).and_then(|_| file.write_all(&bytes)).map_err(failed)?;
        self.words += words.len() as u64;
        Ok(span)
    }

    pub(crate) fn get(&self, span: Span) -> Result<Vec<u16>, EvaluationError> {
        let mut bytes = vec![0; 2 * span.words];
        let mut file = self.file.lock().expect("no thread panics while it has the file");
        file.seek(SeekFrom::Start(2 * span.start)).and_then(|_| file.read_exact(&mut bytes)).map_err(failed)?;
        Ok(bytes.as_chunks::<2>().0.iter().map(|&word| u16::from_le_bytes(word)).collect())
    }

    /// Writes numbers in half precision.
    ///
    /// # Errors
    /// A number beyond ±65504, or the file system's.
    pub(crate) fn push_floats(&mut self, values: &[f32]) -> Result<Span, EvaluationError> {
        let mut halves = vec![f16::ZERO; values.len()];
        halves.convert_from_f32_slice(values);
        if let Some(at) = halves.iter().position(|half| !half.is_finite()) {
            let message = format!("{} is out of the range of half precision", values[at]);
            return Err(EvaluationError::Scratch { message });
        }
        self.push(halves.reinterpret_cast())
    }

    pub(crate) fn get_floats(&self, span: Span) -> Result<Vec<f32>, EvaluationError> {
        let mut values = vec![0.0; span.words];
        self.get(span)?.reinterpret_cast::<f16>().convert_to_f32_slice(&mut values);
        Ok(values)
    }

    pub(crate) fn push_grid(&mut self, grid: &TokenGrid) -> Result<StoredGrid, EvaluationError> {
        let TokenGrid { rows, columns, dim, .. } = *grid;
        Ok(StoredGrid { rows, columns, dim, span: self.push_floats(&grid.values)? })
    }

    pub(crate) fn get_grid(&self, stored: &StoredGrid) -> Result<TokenGrid, EvaluationError> {
        let StoredGrid { rows, columns, dim, span } = *stored;
        Ok(TokenGrid { rows, columns, dim, values: self.get_floats(span)? })
    }
}

fn failed(error: std::io::Error) -> EvaluationError {
    EvaluationError::Scratch { message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_in_any_order() {
        let mut scratch = Scratch::new().unwrap();
        let grid = TokenGrid { rows: 1, columns: 3, dim: 2, values: vec![0.5, -2.0, 1.0 / 3.0, 65_504.0, 0.0, -1e-3] };
        let words = scratch.push(&[7, 65_535, 0]).unwrap();
        let stored = scratch.push_grid(&grid).unwrap();
        let empty = scratch.push(&[]).unwrap();
        let found = scratch.get_grid(&stored).unwrap();
        assert_eq!((found.rows, found.columns, found.dim), (1, 3, 2));
        for (found, expected) in found.values.iter().zip(&grid.values) {
            assert!((found - expected).abs() <= expected.abs() / 2048.0, "{found} {expected}");
        }
        assert_eq!((scratch.get(words).unwrap(), scratch.get(empty).unwrap()), (vec![7, 65_535, 0], vec![]));
        let message = scratch.push_floats(&[1.0, -1e6]).unwrap_err().to_string();
        assert!(message.contains("-1000000 is out of the range"), "{message}");
    }
}
