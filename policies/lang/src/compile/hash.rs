//! Hashes of short texts and the tables they lead into.
//!
//! A hash only ever narrows down where to look; what is found is compared in full. So a text made to
//! collide costs its maker one comparison.

const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Mixes two words: the halves of their product, folded.
pub(super) const fn mix(a: u64, b: u64) -> u64 {
    let product = (a ^ 0x2d35_8dcc_aa6c_78a5) as u128 * (b ^ MULTIPLIER) as u128;
    #[expect(clippy::cast_possible_truncation, reason = "the two halves of the product are wanted")]
    let folded = product as u64 ^ (product >> 64) as u64;
    folded
}

/// ASCII capitals to small letters, eight bytes at once; other bytes stay.
const fn fold_case(word: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let low = word & (ONES * 0x7f);
    let above_z = low + ONES * (0x7f - b'Z' as u64);
    let from_a = low + ONES * (0x80 - b'A' as u64);
    let upper = (from_a ^ above_z) & !word & (ONES * 0x80);
    word | (upper >> 2)
}

/// Hashes a text under a seed; with `FOLD`, regardless of ASCII case.
#[inline]
pub(super) fn text<const FOLD: bool>(seed: u64, bytes: &[u8]) -> u64 {
    let fold = |word: u64| if FOLD { fold_case(word) } else { word };
    let mut hash = seed ^ (bytes.len() as u64).wrapping_mul(MULTIPLIER);
    let mut rest = bytes;
    while let Some((chunk, after)) = rest.split_first_chunk::<8>() {
        if after.is_empty() {
            return mix(hash, fold(u64::from_le_bytes(*chunk)));
        }
        hash = mix(hash, fold(u64::from_le_bytes(*chunk)));
        rest = after;
    }
    // The last eight bytes, some of them for the second time, or all there are.
    let word = match (bytes.last_chunk::<8>(), bytes.first_chunk::<4>(), bytes.last_chunk::<4>()) {
        (Some(last), ..) => u64::from_le_bytes(*last),
        (None, Some(first), Some(last)) => {
            u64::from(u32::from_le_bytes(*first)) | u64::from(u32::from_le_bytes(*last)) << 32
        }
        _ => bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    };
    mix(hash, fold(word))
}

/// Whether two texts are the same; with `FOLD`, the second is in small letters and case is ignored.
#[inline]
pub(super) fn same<const FOLD: bool>(found: &[u8], wanted: &[u8]) -> bool {
    if !FOLD {
        return found == wanted;
    }
    if found.len() != wanted.len() {
        return false;
    }
    let (mut a, mut b) = (found, wanted);
    while let (Some((x, after_x)), Some((y, after_y))) =
        (a.split_first_chunk::<8>(), b.split_first_chunk::<8>())
    {
        if fold_case(u64::from_le_bytes(*x)) != u64::from_le_bytes(*y) {
            return false;
        }
        (a, b) = (after_x, after_y);
    }
    match (found.last_chunk::<8>(), wanted.last_chunk::<8>()) {
        (Some(x), Some(y)) => fold_case(u64::from_le_bytes(*x)) == u64::from_le_bytes(*y),
        _ => a.eq_ignore_ascii_case(b),
    }
}

/// What a [`Table`] holds.
pub(super) trait Entry: Copy {
    /// What stands where nothing is.
    const NONE: Self;

    fn is_none(&self) -> bool;
}

/// Open addressing, with a small word in front of each place: most of what is not there, or is not wanted,
/// is never looked for further than in these, which stay in a near cache.
#[derive(Debug)]
pub(super) struct Table<E> {
    /// By place: the kinds of all entries whose hash leads there, each kind a bit.
    kinds: Box<[u32]>,
    entries: Box<[E]>,
    mask: usize,
}

impl<E: Entry> Table<E> {
    /// A table for `count` entries with distinct keys, given with their hashes and kinds.
    pub(super) fn new(count: usize, items: impl Iterator<Item = (u64, u32, E)>) -> Self {
        let size = (count + count / 3 + 1).next_power_of_two().max(2);
        let (kinds, entries) = (vec![0; size].into(), vec![E::NONE; size].into());
        let mut table = Self { kinds, entries, mask: size - 1 };
        for (hash, kinds, entry) in items {
            let mut at = position(hash) & table.mask;
            if let Some(all) = table.kinds.get_mut(at) {
                *all |= kinds;
            }
            while table.entries.get(at).is_some_and(|entry| !entry.is_none()) {
                at = (at + 1) & table.mask;
            }
            if let Some(slot) = table.entries.get_mut(at) {
                *slot = entry;
            }
        }
        table
    }

    /// Whether there may be an entry with this hash and one of these kinds; if not, there is none.
    #[inline]
    pub(super) fn may_have(&self, hash: u64, kinds: u32) -> bool {
        self.kinds.get(position(hash) & self.mask).is_some_and(|all| all & kinds != 0)
    }

    /// The entry with this hash for which `is_it` holds; to be asked for if there may be one.
    #[inline]
    pub(super) fn get(&self, hash: u64, is_it: impl Fn(&E) -> bool) -> Option<&E> {
        let mut at = position(hash) & self.mask;
        loop {
            let entry = self.entries.get(at)?;
            if is_it(entry) {
                return Some(entry);
            }
            if entry.is_none() {
                return None;
            }
            at = (at + 1) & self.mask;
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "some bits of a hash are wanted")]
const fn position(hash: u64) -> usize {
    hash as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Entry for u64 {
        const NONE: Self = Self::MAX;

        fn is_none(&self) -> bool {
            *self == Self::MAX
        }
    }

    #[test]
    fn case_is_folded_in_ascii_only() {
        for (i, byte) in (0..=255_u8).enumerate() {
            let word = u64::from(byte) << (8 * (i % 8));
            let lower = u64::from(byte.to_ascii_lowercase()) << (8 * (i % 8));
            assert_eq!(fold_case(word), lower);
        }
    }

    #[test]
    fn equal_texts_hash_alike_whatever_their_case() {
        for n in 0..40 {
            let text = "AbCdEfGhIj.KlMnOpQrStUvWxYz-0123456789É".get(..n).unwrap_or("");
            let lower = text.to_ascii_lowercase();
            assert_eq!(self::text::<true>(1, text.as_bytes()), self::text::<true>(1, lower.as_bytes()));
            assert!(same::<true>(text.as_bytes(), lower.as_bytes()));
            assert!(!same::<true>(text.as_bytes(), format!("{lower}x").as_bytes()));
        }
    }

    #[test]
    fn a_full_table_finds_all_and_nothing_else() {
        let table = Table::new(1000, (0..1000_u64).map(|n| (mix(n, 0), 1 << (n % 32), n)));
        for n in 0..1000 {
            assert!(table.may_have(mix(n, 0), 1 << (n % 32)));
            assert_eq!(table.get(mix(n, 0), |e| *e == n), Some(&n));
        }
        assert_eq!(table.get(mix(1000, 0), |e| *e == 1000), None);
    }
}
