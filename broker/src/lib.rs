//! Decides: policy, process context, sessions, audit log.
