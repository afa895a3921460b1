//! What the BPF programs and this crate both read and write: the structs of `bpf/backstop.bpf.c`.
#![expect(unsafe_code, reason = "aya::Pod promises that any bytes are valid, which it cannot see")]

/// Ranges of ports in one [`Grant`].
pub(crate) const RANGES: usize = 8;
/// Bits of a [`PlaceData`] before its address.
pub(crate) const PLACE_BITS: u32 = 64;

/// `struct who`.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub(crate) struct Who {
    pub tgid: u32,
    pub uid: u32,
    pub start: u64,
    pub exec: u64,
    pub netns: u64,
}

/// `struct filter`.
#[repr(C)]
pub(crate) struct Filter {
    pub at: u64,
    pub logs: u64,
    pub code: [u64; 8],
}

/// `struct control`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Control {
    pub generation: u64,
    pub lease: u64,
    pub audit: u32,
    pub wanted: u32,
}

/// `struct place` without its length, which aya's key carries.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub(crate) struct PlaceData {
    pub process: u32,
    pub op: u8,
    pub protocol: u8,
    pub zero: u16,
    pub addr: [u8; 16],
}

/// `struct range`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub(crate) struct Range {
    pub low: u16,
    pub high: u16,
    pub rule: u32,
}

/// `struct grant`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Grant {
    pub generation: u64,
    pub until: u64,
    pub count: u32,
    pub silent: u32,
    pub ranges: [Range; RANGES],
}

/// `struct single`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(C)]
pub(crate) struct Single {
    pub cookie: u64,
    pub process: u32,
    pub op: u8,
    pub protocol: u8,
    pub port: u16,
    pub addr: [u8; 16],
}

/// `struct uses`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Uses {
    pub generation: u64,
    pub until: u64,
    pub left: i32,
    pub rule: u32,
}

/// `struct event`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct RawEvent {
    pub time: u64,
    pub start: u64,
    pub exec: u64,
    pub netns: u64,
    pub cookie: u64,
    pub generation: u64,
    pub tgid: u32,
    pub tid: u32,
    pub uid: u32,
    pub process: u32,
    pub rule: u32,
    pub suppressed: u32,
    pub op: u8,
    pub protocol: u8,
    pub cause: u8,
    pub permitted: u8,
    pub port: u16,
    pub family: u16,
    pub addr: [u8; 16],
    pub zero: [u32; 4],
}

const _: () = assert!(size_of::<Who>() == 32 && size_of::<Control>() == 24 && size_of::<Filter>() == 80);
const _: () = assert!(size_of::<PlaceData>() == 24 && size_of::<Grant>() == 88);
const _: () = assert!(size_of::<Single>() == 32 && size_of::<Uses>() == 24);
const _: () = assert!(size_of::<RawEvent>() == 112);

macro_rules! plain {
    ($($type:ty),+) => {$(
        // SAFETY: `repr(C)`, integers and arrays of integers without padding (the sizes are asserted
        // above), so every byte is initialised and every pattern is valid.
        unsafe impl aya::Pod for $type {}
    )+};
}
plain!(Who, Control, PlaceData, Grant, Single, Uses);
