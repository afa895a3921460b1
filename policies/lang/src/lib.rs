//! The policy language: text to compiled policy.
