#![no_main]
//! Any bytes: diagnostics that can be shown, or a policy that formats to itself.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_policy::fuzzing::parse(bytes));
