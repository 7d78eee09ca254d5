//! The recipe, the training step, the loop and the run directory.
