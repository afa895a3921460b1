#![no_main]
//! Frames as programs, brokers and key daemons send them: taken as they are, or refused.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_broker::fuzzing::frames(bytes));
