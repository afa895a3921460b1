//! Real daemons and clients, wrapped, between namespaces.
