//! Multi-crop recipe, pixel operations and block masks: pure functions of image and draws.
