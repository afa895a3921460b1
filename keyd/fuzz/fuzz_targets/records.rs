#![no_main]
//! Any content in the records of an authenticated peer, and any bytes in their place.

mod sides;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (client, server) = sides::sides();
    portcullis_relay::fuzzing::records(client, server, bytes).expect("two good ends");
});
