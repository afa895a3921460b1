#![no_main]
//! Any bytes as files that include one another.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(folder) = tempfile::tempdir() else { return };
    portcullis_policy::fuzzing::include(folder.path(), bytes);
});
