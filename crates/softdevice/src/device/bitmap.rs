//! A set of pages, by words of 64: a record's run of pages never leaves its word, so that the bytes
//! that a set will give are known exactly.

use super::content::PAGE;
use super::format::HEAD;

/// A set of pages.
#[derive(Clone, Debug)]
pub(crate) struct PageSet {
    words: Vec<u64>,
    pages: usize,
    count: usize,
    cursor: usize,
}

impl PageSet {
    pub(crate) fn empty(pages: usize) -> Self {
        Self { words: vec![0; pages.div_ceil(64)], pages, count: 0, cursor: 0 }
    }

    pub(crate) fn full(pages: usize) -> Self {
        let mut words = vec![u64::MAX; pages.div_ceil(64)];
        if let Some(last) = words.last_mut().filter(|_| !pages.is_multiple_of(64)) {
            *last = (1 << (pages % 64)) - 1;
        }
        Self { words, pages, count: pages, cursor: 0 }
    }

    /// Pages that it can hold: its members are below.
    pub(crate) const fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) const fn len(&self) -> usize {
        self.count
    }

    pub(crate) fn contains(&self, page: usize) -> bool {
        self.words[page / 64] >> (page % 64) & 1 == 1
    }

    pub(crate) fn insert(&mut self, page: usize) {
        let bit = 1 << (page % 64);
        let word = &mut self.words[page / 64];
        self.count += usize::from(*word & bit == 0);
        *word |= bit;
    }

    /// Bytes of the records that hold all its pages.
    pub(crate) fn stream_bytes(&self) -> u64 {
        let runs: u64 = self.words.iter().map(|word| u64::from((word & !(word << 1)).count_ones())).sum();
        runs * HEAD as u64 + (self.count * PAGE) as u64
    }

    /// Takes a run of pages out: first page and how many. Goes round, so that no page waits for ever.
    pub(crate) fn take_run(&mut self) -> Option<(usize, usize)> {
        if self.count == 0 {
            return None;
        }
        while self.words[self.cursor] == 0 {
            self.cursor = (self.cursor + 1) % self.words.len();
        }
        let word = &mut self.words[self.cursor];
        let first = word.trailing_zeros();
        let length = (*word >> first).trailing_ones();
        let mask = (u64::MAX >> (64 - length)) << first;
        *word &= !mask;
        let length = length as usize;
        self.count -= length;
        Some((self.cursor * 64 + first as usize, length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_full_set_gives_every_page_once() {
        for pages in [1, 63, 64, 65, 200] {
            let mut set = PageSet::full(pages);
            let mut next = 0;
            while let Some((first, length)) = set.take_run() {
                assert_eq!(first, next);
                next += length;
            }
            assert_eq!(next, pages);
        }
    }

    proptest! {
        #[test]
        fn runs_are_the_pages_and_the_bytes_are_exact(pages in prop::collection::btree_set(0..300_usize, 0..200)) {
            let mut set = PageSet::empty(300);
            pages.iter().for_each(|p| set.insert(*p));
            pages.iter().for_each(|p| set.insert(*p));
            prop_assert_eq!(set.len(), pages.len());
            let expected = set.stream_bytes();
            let (mut taken, mut bytes) = (BTreeSet::new(), 0);
            while let Some((first, length)) = set.take_run() {
                prop_assert!(first / 64 == (first + length - 1) / 64);
                bytes += (HEAD + length * PAGE) as u64;
                taken.extend(first..first + length);
            }
            prop_assert_eq!(taken, pages);
            prop_assert_eq!(bytes, expected);
        }
    }
}
