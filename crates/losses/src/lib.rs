//! DINO, iBOT and KoLeo losses; Sinkhorn-Knopp and softmax centering.
