//! Where this kernel keeps the few fields that the programs read.
//!
//! Its type information (BTF) has more than a hundred thousand types, and to take all of them in takes longer
//! than all else that a cold start needs. So the raw bytes are gone through once, and what is made of them is
//! a small BTF: the structures that the programs name, with the fields that they name.

use std::{
    collections::{HashMap, VecDeque},
    io,
};

use aya::Endianness;
use aya_obj::btf::Btf;

use crate::{error::BackstopError, sys::Contents};

const FROM: &str = "/sys/kernel/btf/vmlinux";

/// What `bpf/kernel.h` declares with `KERNEL`.
const STRUCTURES: [&[u8]; 13] = [
    b"net",
    b"nsproxy",
    b"cred",
    b"seccomp",
    b"seccomp_filter",
    b"bpf_prog",
    b"task_struct",
    b"bpf_iter_meta",
    b"bpf_iter__task",
    b"bpf_sock_addr_kern",
    b"ip_options",
    b"ip_options_rcu",
    b"ipcm_cookie",
];
/// The fields that are read of them, and of what is in them.
const FIELDS: [&[u8]; 23] = [
    b"net_cookie",
    b"net_ns",
    b"euid",
    b"val",
    b"pid",
    b"tgid",
    b"group_leader",
    b"start_boottime",
    b"self_exec_id",
    b"cred",
    b"nsproxy",
    b"seccomp",
    b"filter",
    b"log",
    b"prev",
    b"prog",
    b"seq",
    b"meta",
    b"task",
    b"t_ctx",
    b"srr",
    b"opt",
    b"addr",
];
/// The function whose arguments an iterator over tasks gets.
const ITERATOR: &[u8] = b"bpf_iter_task";

// linux/btf.h
const MAGIC: u32 = 0xeb9f;
mod kind {
    pub const INT: u32 = 1;
    pub const POINTER: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FORWARD: u32 = 7;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const FUNCTION: u32 = 12;
    pub const PROTOTYPE: u32 = 13;
    pub const VARIABLE: u32 = 14;
    pub const SECTION: u32 = 15;
    pub const DECLARATION_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
}

/// What is known of the kernel.
pub struct Types {
    /// The structures that the programs look into.
    pub btf: Btf,
    /// The kernel's own number of the iterator's function.
    pub iterator: u32,
}

impl Types {
    /// Asks the running kernel.
    pub fn of_kernel() -> Result<Self, BackstopError> {
        let data = Contents::of(FROM).map_err(BackstopError::NoTypes)?;
        let strange = || BackstopError::NoTypes(io::ErrorKind::InvalidData.into());
        let raw = Raw::new(&data).ok_or_else(strange)?;
        let small = raw.thin().ok_or_else(strange)?;
        Ok(Self {
            btf: Btf::parse(&small, Endianness::default()).map_err(|_| strange())?,
            iterator: raw.find(kind::FUNCTION, &[ITERATOR]).next().ok_or_else(strange)?,
        })
    }
}

/// The kernel's type information as it is.
struct Raw<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type begins; number 0 is `void`.
    at: Vec<usize>,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn part(data: &[u8], from: u32, offset: u32, length: u32) -> Option<&[u8]> {
    data.get(usize::try_from(from).ok()?..)?
        .get(usize::try_from(offset).ok()?..)?
        .get(..usize::try_from(length).ok()?)
}

/// Kind and count out of a type's second word.
const fn split(info: u32) -> (u32, usize) {
    (info >> 24 & 0x1f, (info & 0xffff) as usize)
}

impl<'a> Raw<'a> {
    fn new(data: &'a [u8]) -> Option<Self> {
        if word(data, 0)? & 0xffff != MAGIC {
            return None;
        }
        let header = word(data, 4)?;
        let types = part(data, header, word(data, 8)?, word(data, 12)?)?;
        let strings = part(data, header, word(data, 16)?, word(data, 20)?)?;
        let mut at = vec![usize::MAX];
        let mut next = 0;
        while next < types.len() {
            at.push(next);
            let (kind, count) = split(word(types, next + 4)?);
            next += 12
                + match kind {
                    kind::INT | kind::VARIABLE | kind::DECLARATION_TAG => 4,
                    kind::ARRAY => 12,
                    kind::STRUCT | kind::UNION | kind::SECTION | kind::ENUM64 => count * 12,
                    kind::ENUM | kind::PROTOTYPE => count * 8,
                    _ => 0,
                };
        }
        Some(Self { types, strings, at })
    }

    /// Name, second and third word of a type, and where its rest begins.
    fn get(&self, id: u32) -> Option<(u32, u32, u32, usize)> {
        let at = *self.at.get(usize::try_from(id).ok()?)?;
        Some((word(self.types, at)?, word(self.types, at + 4)?, word(self.types, at + 8)?, at + 12))
    }

    fn is_named(&self, name: u32, among: &[&[u8]]) -> bool {
        let from = usize::try_from(name).ok().and_then(|at| self.strings.get(at..)).unwrap_or_default();
        among.iter().any(|one| from.strip_prefix(*one).is_some_and(|rest| rest.first() == Some(&0)))
    }

    /// Types of a kind that have one of these names. The names are looked for once, as each stands there once: to look
    /// at each type's would be a hundred thousand places all over the strings.
    fn find(&self, wanted: u32, names: &[&[u8]]) -> impl Iterator<Item = u32> {
        let place = |name: &&[u8]| {
            let whole = [&[0], *name, &[0]].concat();
            u32::try_from(memchr::memmem::find(self.strings, &whole)? + 1).ok()
        };
        let places: Vec<u32> = names.iter().filter_map(place).collect();
        (1u32..).zip(self.at.iter().skip(1)).filter_map(move |(id, &at)| {
            let kind = split(word(self.types, at + 4)?).0;
            (kind == wanted && places.contains(&word(self.types, at)?)).then_some(id)
        })
    }

    /// The small BTF.
    fn thin(&self) -> Option<Vec<u8>> {
        let mut small = Small { strings: vec![0], ..Small::default() };
        for id in self.find(kind::STRUCT, &STRUCTURES) {
            small.number(id);
        }
        while let Some(id) = small.waiting.pop_front() {
            self.copy(id, &mut small)?;
        }
        let [types, strings] = [&small.types, &small.strings].map(|part| u32::try_from(part.len()));
        let (types, strings) = (types.ok()?, strings.ok()?);
        let header = [MAGIC | 1 << 16, 24, 0, types, types, strings];
        let header = header.iter().flat_map(|word| word.to_le_bytes());
        Some(header.chain(small.types).chain(small.strings).collect())
    }

    fn copy(&self, id: u32, to: &mut Small) -> Option<()> {
        let (name, info, third, rest) = self.get(id)?;
        let (kind, count) = split(info);
        let named = to.name(self.strings.get(usize::try_from(name).ok()?..)?)?;
        match kind {
            kind::INT => to.write(&[named, info, third, word(self.types, rest)?]),
            kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                let target = to.number(third);
                to.write(&[named, info, target]);
            }
            kind::STRUCT | kind::UNION => {
                let mut fields = Vec::new();
                for field in 0..count {
                    let at = rest + 12 * field;
                    let name = word(self.types, at)?;
                    if name == 0 || self.is_named(name, &FIELDS) {
                        fields.push(to.name(self.strings.get(usize::try_from(name).ok()?..)?)?);
                        fields.push(to.number(word(self.types, at + 4)?));
                        fields.push(word(self.types, at + 8)?);
                    }
                }
                let kept = u32::try_from(fields.len() / 3).ok()?;
                to.write(&[named, info & !0xffff | kept, third]);
                to.write(&fields);
            }
            // What it leads to is not looked into from here.
            kind::POINTER => to.write(&[0, info, 0]),
            _ => to.write(&[0, kind::FORWARD << 24, 0]),
        }
        Some(())
    }
}

/// A BTF in the making, whose types have numbers of their own.
#[derive(Default)]
struct Small {
    types: Vec<u8>,
    strings: Vec<u8>,
    numbers: HashMap<u32, u32>,
    waiting: VecDeque<u32>,
}

impl Small {
    /// The number here of a type of the kernel's, which will be written in its turn.
    fn number(&mut self, id: u32) -> u32 {
        if id == 0 {
            return 0;
        }
        let next = u32::try_from(self.numbers.len() + 1).unwrap_or(0);
        *self.numbers.entry(id).or_insert_with(|| {
            self.waiting.push_back(id);
            next
        })
    }

    /// Takes on a name, which ends with NUL.
    fn name(&mut self, from: &[u8]) -> Option<u32> {
        let length = from.iter().position(|b| *b == 0)?;
        if length == 0 {
            return Some(0);
        }
        let at = u32::try_from(self.strings.len()).ok()?;
        self.strings.extend(from.get(..=length)?);
        Some(at)
    }

    fn write(&mut self, words: &[u32]) {
        self.types.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_type_information_is_refused() {
        assert!(Raw::new(&[]).is_none());
        assert!(Raw::new(&[0; 64]).is_none());
        let mut cut = [MAGIC | 1 << 16, 24, 0, 12, 12, 1].map(u32::to_le_bytes).concat();
        assert!(Raw::new(&cut).is_none(), "types and strings are missing");
        // One structure that says it has a field, and has none.
        cut.extend([1, kind::STRUCT << 24 | 1, 8].map(u32::to_le_bytes).concat());
        cut.extend(b"\0");
        assert!(Raw::new(&cut).is_none_or(|raw| raw.thin().is_none_or(|thin| thin.len() < 64)));
    }

    #[test]
    fn the_running_kernels_is_made_small() {
        let Ok(data) = Contents::of(FROM) else { return };
        let raw = Raw::new(&data).unwrap();
        let small = raw.thin().unwrap();
        assert!(small.len() < 8192, "{}", small.len());
        assert!(Types::of_kernel().unwrap().iterator > 0);
    }
}
