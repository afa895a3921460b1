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
    let seed = seed ^ (bytes.len() as u64).wrapping_mul(MULTIPLIER);
    if bytes.len() > 16 { long::<FOLD>(seed, bytes) } else { short::<FOLD>(seed, bytes) }
}

#[inline(never)]
fn long<const FOLD: bool>(seed: u64, bytes: &[u8]) -> u64 {
    let (mut hash, mut rest) = (seed, bytes);
    while let (17.., Some((chunk, after))) = (rest.len(), rest.split_first_chunk()) {
        hash = mix(hash, word::<FOLD>(*chunk));
        rest = after;
    }
    short::<FOLD>(hash, rest)
}

#[inline(always)]
fn short<const FOLD: bool>(hash: u64, bytes: &[u8]) -> u64 {
    // The first and the last, some for the second time.
    if let (Some(first), Some(last)) = (bytes.first_chunk(), bytes.last_chunk()) {
        return mix(hash ^ word::<FOLD>(*first), word::<FOLD>(*last));
    }
    let both = if let (Some(first), Some(last)) = (bytes.first_chunk(), bytes.last_chunk()) {
        u64::from(u32::from_le_bytes(*first)) | u64::from(u32::from_le_bytes(*last)) << 32
    } else if let (Some(first), Some(middle), Some(last)) =
        (bytes.first(), bytes.get(bytes.len() / 2), bytes.last())
    {
        u64::from(*first) | u64::from(*middle) << 8 | u64::from(*last) << 16
    } else {
        0
    };
    mix(hash, word::<FOLD>(both.to_le_bytes()))
}

#[inline(always)]
const fn word<const FOLD: bool>(bytes: [u8; 8]) -> u64 {
    let word = u64::from_le_bytes(bytes);
    if FOLD { fold_case(word) } else { word }
}

/// Where a byte stands in a text of at most 64 bytes: a bit for each place.
#[inline(never)]
fn marks(text: &[u8], byte: u8) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let of_word = |word: &[u8; 8]| {
        let differs = u64::from_le_bytes(*word) ^ (ONES * u64::from(byte));
        // The highest bit of each byte that is zero now, then those bits side by side.
        let zeros = !(((differs & (ONES * 0x7f)) + ONES * 0x7f) | differs | (ONES * 0x7f));
        zeros.wrapping_mul(0x0002_0408_1020_4081) >> 56
    };
    let Some(last) = text.last_chunk() else {
        return text.iter().zip(0..).fold(0, |found, (b, at)| found | u64::from(*b == byte) << at);
    };
    // The last eight, some of them for the second time.
    let (mut found, mut rest, mut at) = (of_word(last) << (text.len() - 8), text, 0);
    while let Some((chunk, after)) = rest.split_first_chunk() {
        found |= of_word(chunk) << at;
        (rest, at) = (after, at + 8);
    }
    found
}

/// Where a byte stands in a text, from one end or the other.
pub(super) struct Marks<'t> {
    text: &'t [u8],
    byte: u8,
    /// The window being looked at.
    start: usize,
    end: usize,
    marks: u64,
}

const WINDOW: usize = 64;

impl<'t> Marks<'t> {
    #[inline(always)]
    pub(super) fn from_start(text: &'t [u8], byte: u8) -> Self {
        Self { text, byte, start: 0, end: 0, marks: 0 }.look(0, text.len().min(WINDOW))
    }

    #[inline(always)]
    pub(super) fn from_end(text: &'t [u8], byte: u8) -> Self {
        Self { text, byte, start: 0, end: 0, marks: 0 }.look(text.len().saturating_sub(WINDOW), text.len())
    }

    #[inline(always)]
    fn look(self, start: usize, end: usize) -> Self {
        let window = self.text.get(start..end).unwrap_or_default();
        Self { start, end, marks: marks(window, self.byte), ..self }
    }

    #[inline(always)]
    pub(super) fn next(&mut self) -> Option<usize> {
        while self.marks == 0 {
            if self.end == self.text.len() {
                return None;
            }
            *self = Self { ..*self }.look(self.end, (self.end + WINDOW).min(self.text.len()));
        }
        let at = to_usize(self.marks.trailing_zeros());
        self.marks &= self.marks - 1;
        Some(self.start + at)
    }

    #[inline(always)]
    pub(super) fn next_back(&mut self) -> Option<usize> {
        while self.marks == 0 {
            if self.start == 0 {
                return None;
            }
            *self = Self { ..*self }.look(self.start.saturating_sub(WINDOW), self.start);
        }
        let at = self.marks.ilog2();
        self.marks ^= 1 << at;
        Some(self.start + to_usize(at))
    }
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
    /// A table of entries, which come sorted by their hashes. `kinds` are some bits of each, of which who looks for it
    /// has at least one.
    pub(super) fn new(entries: Vec<E>, kinds: impl Fn(&E) -> u32) -> Self {
        let count = entries.len().next_power_of_two().max(2);
        let mut homes: Box<[Home]> = vec![Home::default(); count + 1].into();
        let rest = u64::BITS - count.ilog2();
        for entry in &entries {
            let home = home(entry.hash(), rest);
            if let Some([this, next]) = homes.get_mut(home..home + 2) {
                this.kinds |= kinds(entry);
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
    }

    fn kind(number: u64) -> u32 {
        1 << (number % 32)
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
    fn marks_are_where_the_byte_is() {
        for length in 0..200 {
            for at in 0..length {
                let mut text = [b'.' ^ 1, b'.' ^ 0x80].repeat(100);
                text.truncate(length);
                text[at / 2] = b'.';
                text[at] = b'.';
                let all = if at == 0 { vec![0] } else { vec![at / 2, at] };
                let mut marks = Marks::from_start(&text, b'.');
                assert_eq!(std::iter::from_fn(|| marks.next()).collect::<Vec<_>>(), all);
                let mut marks = Marks::from_end(&text, b'.');
                let back: Vec<_> = std::iter::from_fn(|| marks.next_back()).collect();
                assert!(back.iter().rev().eq(&all));
            }
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
            let table = Table::new(all, |n| kind(*n));
            for n in 0..size {
                assert!(table.may_have(mix(n, 0), kind(n)));
                assert!(table.near(mix(n, 0)).contains(&n));
            }
            assert!(!table.near(mix(size, 0)).contains(&size));
            let vain = (size..size + 1000).filter(|n| table.may_have(mix(*n, 0), kind(*n))).count();
            assert!(vain < 100, "{vain} of 1000 are looked for in vain");
        }
    }

    #[test]
    fn all_entries_of_a_hash_are_found() {
        let mut all: Vec<u64> = (0..100).chain([7; 100]).collect();
        all.sort_by_key(Entry::hash);
        let table = Table::new(all, |n| kind(*n));
        assert_eq!(table.near(mix(7, 0)), [7; 101]);
        assert!(table.near(mix(8, 0)).contains(&8) && table.near(mix(8, 0)).len() <= CROWD);
    }
}
