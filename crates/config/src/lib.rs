//! Typed TOML with extends, overrides, origins and nearest-key messages; knows no vision.
