//! Image sources, decoding, sampling order and the parallel loader.
