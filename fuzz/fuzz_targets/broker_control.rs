#![no_main]
//! Whatever a command writes to the control socket is a request or none.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_broker::fuzzing::control(bytes));
