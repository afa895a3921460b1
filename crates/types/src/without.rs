//! What is done without although the kernel may have it.

use std::{fmt, str::FromStr};

/// Something that older kernels lack, or that an administrator does not want.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Lack {
    /// Both forms of the backstop.
    Backstop,
    /// Its BPF programs.
    Bpf,
    /// Its nftables table.
    Nftables,
    /// A pidfd with each message of a program (`SO_PASSPIDFD`, Linux 6.5).
    PidfdOfWriter,
    /// Synchronous wake-up of who is held by the guard (`SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP`, Linux 6.6).
    WakeUp,
    /// Landlock's rules for the network (version 4, Linux 6.7).
    Landlock,
}

impl Lack {
    /// Each with its word.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::Backstop, "backstop"),
        (Self::Bpf, "bpf"),
        (Self::Nftables, "nftables"),
        (Self::PidfdOfWriter, "passpidfd"),
        (Self::WakeUp, "sync-wake-up"),
        (Self::Landlock, "landlock"),
    ];
}

/// A set of [`Lack`], written as their words with commas in between.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Without(u8);

impl Without {
    /// Whether this is done without.
    #[must_use]
    pub const fn has(self, lack: Lack) -> bool {
        self.0 & 1 << lack as u8 != 0
    }

    /// This too.
    #[must_use]
    pub const fn and(self, lack: Lack) -> Self {
        Self(self.0 | 1 << lack as u8)
    }

    /// Words of what is done without.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        Lack::ALL.into_iter().filter(move |(lack, _)| self.has(*lack)).map(|(_, word)| word)
    }
}

/// No word for a [`Lack`].
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "`{0}` is nothing to do without; there are backstop, bpf, nftables, passpidfd, sync-wake-up and landlock"
)]
pub struct UnknownLack(String);

impl FromStr for Without {
    type Err = UnknownLack;
    fn from_str(text: &str) -> Result<Self, UnknownLack> {
        let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
        words.into_iter().try_fold(Self::default(), |all, word| {
            let found = Lack::ALL.into_iter().find(|(_, name)| *name == word);
            found.map(|(lack, _)| all.and(lack)).ok_or_else(|| UnknownLack(word.to_owned()))
        })
    }
}

impl fmt::Display for Without {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words().collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back_as_they_were_and_others_are_named() {
        let all: Without = "landlock, bpf".parse().unwrap();
        assert!(all.has(Lack::Bpf) && all.has(Lack::Landlock) && !all.has(Lack::Backstop));
        assert_eq!(all.to_string(), "bpf,landlock");
        assert_eq!("".parse(), Ok(Without::default()));
        assert!("bfp".parse::<Without>().unwrap_err().to_string().contains("`bfp`"));
    }
}
