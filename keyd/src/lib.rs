//! Privileged side: kernel filters, keys, relays.
