#![no_main]
//! Whatever a crash has left of the log, the next broker begins with it.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_broker::fuzzing::log(bytes));
