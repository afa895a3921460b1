#![no_main]
//! Whatever a netlink socket gives is read to its end.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_broker::fuzzing::netlink(bytes));
