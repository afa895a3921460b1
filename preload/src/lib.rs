//! Exported hooks.
