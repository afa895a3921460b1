#![no_main]
//! Any held call with any memory behind its arguments: is understood or not, and what is judged is what goes on.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_broker::fuzzing::held_call(bytes));
