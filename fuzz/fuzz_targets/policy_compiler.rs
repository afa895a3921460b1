#![no_main]
//! Any policy that is accepted: decides as the naive evaluator does, and a diff with itself is empty.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_policy::fuzzing::compile(bytes));
