#![no_main]
//! Any two policies: each flow that their diff gives as an example is decided as it says.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_policy::fuzzing::diff(bytes));
