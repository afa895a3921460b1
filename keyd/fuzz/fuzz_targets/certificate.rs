#![no_main]
//! Any bytes as a certificate, one of its extensions, a name in it, a list of members.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_keyd::fuzzing::certificate(bytes));
