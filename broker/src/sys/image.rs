//! What can be told of a program from its image: why the loader did not take the shim into it.

use std::io::{self, Read};

use super::proc::ProcDir;

/// As much of an executable as holds its headers, and of an environment, in bytes.
const HEAD: u64 = 1 << 16;
const ENVIRONMENT: u64 = 1 << 20;
/// Tags of elf(5) and getauxval(3).
const PT_INTERP: u32 = 3;
const AT_SECURE: u64 = 23;

/// Why the shim is not in a process.
///
/// # Errors
/// It is gone, or may not be looked into.
pub fn why_no_preload(at: &ProcDir) -> io::Result<&'static str> {
    let mut head = Vec::new();
    at.open_executable()?.take(HEAD).read_to_end(&mut head)?;
    let kind = kind(&head);
    let secure = is_secure(&at.auxiliary_vector()?);
    let environment = at.environment(ENVIRONMENT)?;
    let told = environment.split(|b| *b == 0).any(|v| v.starts_with(b"LD_PRELOAD=") && names_shim(v));
    Ok(match kind {
        Kind::Narrow => "it is a 32-bit program, for which there is no shim",
        Kind::Static => "it is a static program",
        Kind::Dynamic if secure => "its file gives it privileges, so the loader takes no library of ours",
        Kind::Dynamic if !told => "it was started without the shim in its environment",
        Kind::Dynamic => "the loader did not take the shim where it runs",
    })
}

fn names_shim(variable: &[u8]) -> bool {
    const NAME: &[u8] = b"libportcullis_preload";
    variable.windows(NAME.len()).any(|part| part == NAME)
}

#[derive(Debug, Eq, PartialEq)]
enum Kind {
    Narrow,
    Static,
    Dynamic,
}

/// Reads the program headers (elf(5)) of a 64-bit executable.
fn kind(head: &[u8]) -> Kind {
    let half = |at: usize| head.get(at..).and_then(|b| b.first_chunk()).map(|b| u16::from_le_bytes(*b));
    let word = |at: usize| head.get(at..).and_then(|b| b.first_chunk()).map(|b| u32::from_le_bytes(*b));
    if head.get(4) != Some(&2) {
        return Kind::Narrow; // e_ident[EI_CLASS] is not ELFCLASS64
    }
    let (Some(table), Some(size), Some(count)) = (word(32), half(54), half(56)) else { return Kind::Static };
    let table = usize::try_from(table).unwrap_or(usize::MAX);
    let mut entries = (0..usize::from(count)).map(|n| table.saturating_add(n * usize::from(size)));
    if entries.any(|entry| word(entry) == Some(PT_INTERP)) { Kind::Dynamic } else { Kind::Static }
}

fn is_secure(vector: &[u8]) -> bool {
    let word = |b: &[u8]| b.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
    vector.chunks_exact(16).any(|pair| word(pair) == AT_SECURE && pair.get(8..).is_some_and(|v| word(v) != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_program_is_known_by_its_headers() {
        assert_eq!(kind(&std::fs::read("/bin/sh").unwrap()), Kind::Dynamic);
        let mut head = vec![0; 200];
        (head[4], head[32], head[54], head[56]) = (2, 64, 56, 2);
        assert_eq!(kind(&head), Kind::Static);
        head[64 + 56] = 3;
        assert_eq!(kind(&head), Kind::Dynamic);
        head[4] = 1;
        assert_eq!(kind(&head), Kind::Narrow);
    }

    #[test]
    fn secure_execution_is_read_from_the_vector() {
        let vector = |value: u64| [6u64, 4096, AT_SECURE, value, 0, 0].map(u64::to_le_bytes).concat();
        assert!(is_secure(&vector(1)) && !is_secure(&vector(0)) && !is_secure(&[]));
    }
}
