//! Frames and shared memory between the parts of one host.
