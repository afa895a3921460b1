//! Hashes of short texts and the tables they lead into.
//!
//! A hash only ever narrows down where to look; what is found is compared in full. So a text made to
//! collide costs its maker one comparison.

use crate::source::to_usize;

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

/// Hashes a text under a seed; with `FOLD`, regardless of ASCII case. Most texts have no more than sixteen bytes,
/// so that one multiplication will do.
#[inline]
pub(super) fn text<const FOLD: bool>(seed: u64, bytes: &[u8]) -> u64 {
    let word = |bytes: [u8; 8]| {
        let word = u64::from_le_bytes(bytes);
        if FOLD { fold_case(word) } else { word }
    };
    let mut hash = seed ^ (bytes.len() as u64).wrapping_mul(MULTIPLIER);
    let mut rest = bytes;
    while let (17.., Some((chunk, after))) = (rest.len(), rest.split_first_chunk()) {
        hash = mix(hash, word(*chunk));
        rest = after;
    }
    // The first and the last of what is left, some of it for the second time.
    if let (Some(first), Some(last)) = (rest.first_chunk(), rest.last_chunk()) {
        return mix(hash ^ word(*first), word(*last));
    }
    let both = match (rest.first_chunk::<4>(), rest.last_chunk::<4>()) {
        (Some(first), Some(last)) => {
            u64::from(u32::from_le_bytes(*first)) | u64::from(u32::from_le_bytes(*last)) << 32
        }
        _ => rest.iter().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    };
    mix(hash, word(both.to_le_bytes()))
}

/// Whether two texts are the same regardless of case, of which the second is in small letters.
#[inline]
pub(super) fn same(found: &[u8], wanted: &[u8]) -> bool {
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
pub(super) trait Entry {
    fn hash(&self) -> u64;

    /// Some bits, of which who looks for it has at least one.
    fn kinds(&self) -> u32;
}

/// Entries in the order of their hashes, without a gap, and at least as many homes: each is for one beginning
/// that hashes may have.
///
/// In front of each home stands a small word: most of what is not there, or is not wanted, is never looked
/// for further than in these, which stay in a near cache.
#[derive(Debug)]
pub(super) struct Table<E> {
    entries: Box<[E]>,
    /// One more than there are, for the end of the last.
    homes: Box<[Home]>,
    /// Bits of a hash that do not tell its home.
    rest: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Home {
    /// The kinds of all its entries.
    kinds: u32,
    /// Where its entries begin.
    start: u32,
}

impl<E: Entry> Table<E> {
    /// A table of entries, which come sorted by their hashes.
    pub(super) fn new(entries: Vec<E>) -> Self {
        let count = entries.len().next_power_of_two().max(2);
        let mut homes: Box<[Home]> = vec![Home::default(); count + 1].into();
        let rest = u64::BITS - count.ilog2();
        for entry in &entries {
            let home = home(entry.hash(), rest);
            if let Some([this, next]) = homes.get_mut(home..home + 2) {
                this.kinds |= entry.kinds();
                next.start += 1;
            }
        }
        let mut sum = 0;
        for Home { start, .. } in &mut homes {
            sum += *start;
            *start = sum;
        }
        Self { entries: entries.into(), homes, rest }
    }

    /// Whether there may be an entry with this hash and one of these kinds; if not, there is none.
    #[inline(always)]
    pub(super) fn may_have(&self, hash: u64, kinds: u32) -> bool {
        let all = self.homes.get(home(hash, self.rest)).map_or(0, |home| home.kinds);
        all & kinds != 0
    }

    /// The entries with this hash, and few others; to be asked for if there may be one.
    #[inline]
    pub(super) fn near(&self, hash: u64) -> &[E] {
        let home = home(hash, self.rest);
        let Some([this, next]) = self.homes.get(home..home + 2) else { return &[] };
        let all = self.entries.get(to_usize(this.start)..to_usize(next.start)).unwrap_or_default();
        if all.len() > CROWD { only(all, hash) } else { all }
    }
}

/// More entries than this at one home are not all looked at.
const CROWD: usize = 8;

#[cold]
fn only<E: Entry>(all: &[E], hash: u64) -> &[E] {
    let start = all.partition_point(|entry| entry.hash() < hash);
    let end = all.partition_point(|entry| entry.hash() <= hash);
    all.get(start..end).unwrap_or_default()
}

/// The home of a hash: its first bits, so that homes are in the order of hashes.
#[expect(clippy::cast_possible_truncation, reason = "some bits of a hash are wanted")]
const fn home(hash: u64, rest: u32) -> usize {
    (hash >> rest) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Entry for u64 {
        fn hash(&self) -> u64 {
            mix(*self, 0)
        }

        fn kinds(&self) -> u32 {
            1 << (self % 32)
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
            assert!(same(text.as_bytes(), lower.as_bytes()));
            assert!(!same(text.as_bytes(), format!("{lower}x").as_bytes()));
        }
    }

    #[test]
    fn a_table_finds_all_and_nothing_else() {
        for size in [0, 1, 2, 1000] {
            let mut all: Vec<u64> = (0..size).collect();
            all.sort_by_key(Entry::hash);
            let table = Table::new(all);
            for n in 0..size {
                assert!(table.may_have(mix(n, 0), 1 << (n % 32)));
                assert!(table.near(mix(n, 0)).contains(&n));
            }
            assert!(!table.near(mix(size, 0)).contains(&size));
            let vain = (size..size + 1000).filter(|n| table.may_have(mix(*n, 0), 1 << (n % 32))).count();
            assert!(vain < 100, "{vain} of 1000 are looked for in vain");
        }
    }

    #[test]
    fn all_entries_of_a_hash_are_found() {
        let mut all: Vec<u64> = (0..100).chain([7; 100]).collect();
        all.sort_by_key(Entry::hash);
        let table = Table::new(all);
        assert_eq!(table.near(mix(7, 0)), [7; 101]);
        assert!(table.near(mix(8, 0)).contains(&8) && table.near(mix(8, 0)).len() <= CROWD);
    }
}
