//! Frames between broker and key daemon.
