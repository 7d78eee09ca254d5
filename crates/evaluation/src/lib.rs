//! Frozen-feature evaluations: k-NN, linear probe, effective rank.
