//! Which head a dense task has.

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::dpt::{self, DptHead};
use super::head::{BatchLoss, HeadConfig, LinearHead};
use super::scratch::{Scratch, StoredGrid};
use super::{Encoder, TokenGrid};
use crate::EvaluationError;

/// What a head is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadKind {
    /// Batch normalisation and a 1×1 convolution.
    #[default]
    Linear,
    /// Convolutions on four blocks (Ranftl et al. 2021), four outputs along a patch.
    Dpt,
}

/// A head.
pub(crate) enum Head {
    Linear(Box<LinearHead>),
    Dpt(DptHead),
}

impl Head {
    /// Trains a head on stored tokens of `encoder`, see [`LinearHead::train`].
    ///
    /// # Errors
    /// As there, and tokens of other than four blocks for a [`HeadKind::Dpt`].
    pub(crate) fn train(
        task: &'static str,
        tokens: (&Scratch, &[StoredGrid]),
        channels: usize,
        config: &HeadConfig,
        encoder: &Encoder<'_>,
        loss: &BatchLoss<'_>,
        progress: &mut dyn FnMut(usize, f64),
    ) -> Result<Self, EvaluationError> {
        let device: &Device = encoder.device();
        match config.kind {
            HeadKind::Linear => LinearHead::train(task, tokens, channels, config, device, loss, progress)
                .map(|head| Self::Linear(Box::new(head))),
            HeadKind::Dpt => {
                let widths = encoder.widths();
                if widths.len() != dpt::BLOCKS {
                    let value = format!("dpt with tokens of {} block(s)", widths.len());
                    return Err(EvaluationError::Setting { task, key: "head", value, expected: "given four blocks" });
                }
                DptHead::train(task, tokens, (&widths, channels), config, device, loss, progress).map(Self::Dpt)
            }
        }
    }

    /// The outputs for an image, `[rows · columns, channels]`, and their grid.
    pub(crate) fn outputs(&self, tokens: &TokenGrid) -> Result<(Vec<f32>, (usize, usize)), EvaluationError> {
        match self {
            Self::Linear(head) => Ok((head.outputs(tokens)?, (tokens.rows, tokens.columns))),
            Self::Dpt(head) => head.outputs(tokens),
        }
    }

    /// Number of outputs for a place.
    pub(crate) fn channels(&self) -> usize {
        match self {
            Self::Linear(head) => head.channels(),
            Self::Dpt(head) => head.channels(),
        }
    }
}
