#![no_main]
//! Any bytes as a broker's request.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_keyd::fuzzing::request(bytes));
