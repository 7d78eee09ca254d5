//! Golden fixtures, tolerance helpers and tiny recipes for tests.
