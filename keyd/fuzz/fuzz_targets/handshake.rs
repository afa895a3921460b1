#![no_main]
//! Any bytes as what a peer sends in its handshake.

mod sides;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (client, server) = sides::sides();
    portcullis_relay::fuzzing::hello(bytes);
    let _either = portcullis_relay::fuzzing::handshake(client, server, bytes);
});
