//! Which pages are dirty: a bitmap over one range of addresses, at 4 KiB, and the readers that turn
//! reports of other page sizes into ranges.
//!
//! Ranges go in and ranges come out; the words between are walked 64 pages at a time and never bit
//! by bit, because a full bitmap is the common one in the first round. Over-reporting is allowed and
//! under-reporting never (V2-DIRTY): every mark is rounded outward.
//!
//! Not checked here: that an address is guest memory (see [`DirtyMap`](crate::DirtyMap)), and that
//! a page is read only after it was taken; that order is the caller's.

/// Bytes of a page as Airlift counts dirty memory.
pub const PAGE_SIZE: u64 = 4096;

/// Bytes of a block: a run that is taken never crosses a multiple of this address. All frames of a
/// block use one connection, so that a page is never overtaken by an older copy of itself.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// The most bytes of addresses that a bitmap covers: 64 TiB, 2 GiB of bitmap.
pub const MAX_TRACKED_BYTES: u64 = 64 << 40;

const BLOCK_PAGES: u64 = BLOCK_SIZE / PAGE_SIZE;
const WORD_PAGES: u64 = 64;

/// A range that a bitmap cannot cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRange {
    /// Start or length is not a multiple of [`PAGE_SIZE`].
    #[error("{start:#x}+{length:#x} is not made of whole pages of 4096 bytes")]
    Unaligned {
        /// First address.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// It is longer than [`MAX_TRACKED_BYTES`] or ends behind the last address.
    #[error("{start:#x}+{length:#x} is beyond what can be tracked")]
    TooLarge {
        /// First address.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// A report's page size is not a power of two.
    #[error("{0} is not a page size")]
    PageSize(u64),
}

/// The dirty pages of the addresses `[base, base + length)`.
///
/// It keeps a cursor, so that successive [`take`](Self::take)s sweep over the whole range before
/// they come back to its start, however fast pages behind the cursor are dirtied again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    base: u64,
    pages: u64,
    words: Vec<u64>,
    dirty: u64,
    cursor: u64,
}

impl DirtyBitmap {
    /// A clean bitmap over `length` bytes from `base`. It takes `length / 32768` bytes.
    ///
    /// # Errors
    /// When either is not a multiple of [`PAGE_SIZE`], or the range is longer than
    /// [`MAX_TRACKED_BYTES`] or ends behind the last address. Nothing was then allocated.
    pub fn new(base: u64, length: u64) -> Result<Self, InvalidRange> {
        if !base.is_multiple_of(PAGE_SIZE) || !length.is_multiple_of(PAGE_SIZE) {
            return Err(InvalidRange::Unaligned { start: base, length });
        }
        let pages = length / PAGE_SIZE;
        let words = usize::try_from(pages.div_ceil(WORD_PAGES)).ok();
        match words {
            Some(words) if length <= MAX_TRACKED_BYTES && base.checked_add(length).is_some() => {
                Ok(Self { base, pages, words: vec![0; words], dirty: 0, cursor: 0 })
            }
            _ => Err(InvalidRange::TooLarge { start: base, length }),
        }
    }

    /// First address.
    #[must_use]
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// Bytes covered.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Number of dirty pages. Costs nothing: it is counted along.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.dirty
    }

    /// No page is dirty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.dirty == 0
    }

    /// Whether the page of `address` is dirty; `false` outside the range.
    #[must_use]
    pub fn contains(&self, address: u64) -> bool {
        let Some(offset) = address.checked_sub(self.base) else { return false };
        let page = offset / PAGE_SIZE;
        page < self.pages && self.words[index(page)] & (1 << (page % WORD_PAGES)) != 0
    }

    /// Marks every page that `[start, start + length)` touches; what lies outside is passed over.
    /// This is also how a page that was taken and not sent goes back.
    pub fn mark(&mut self, start: u64, length: u64) {
        if let Some((first, end)) = self.pages_touched(start, length) {
            self.set(first, end);
        }
    }

    /// Marks all pages.
    pub fn set_all(&mut self) {
        self.set(0, self.pages);
    }

    /// Makes all pages clean.
    pub fn clear(&mut self) {
        if self.dirty > 0 {
            self.words.fill(0);
            self.dirty = 0;
        }
    }

    /// Marks all pages that are dirty in `other`, as far as they lie in this range.
    pub fn merge(&mut self, other: &Self) {
        if (self.base, self.pages) == (other.base, other.pages) {
            for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
                cost::step();
                self.dirty += u64::from((theirs & !*mine).count_ones());
                *mine |= theirs;
            }
        } else {
            for (start, length) in other.ranges() {
                self.mark(start, length);
            }
        }
    }

    /// Marks what a report of another page size says; see [`ReportRanges`].
    ///
    /// # Errors
    /// When `page_size` is not a power of two.
    pub fn merge_report(&mut self, start: u64, page_size: u64, bits: &[u64]) -> Result<(), InvalidRange> {
        for (start, length) in ReportRanges::new(start, page_size, bits)? {
            self.mark(start, length);
        }
        Ok(())
    }

    /// Takes the next run of dirty pages out: makes them clean and returns their address and length
    /// in bytes. The run has at most `max_pages` pages, at least one, and does not cross a multiple
    /// of [`BLOCK_SIZE`]. `None`: nothing is dirty.
    pub fn take(&mut self, max_pages: u64) -> Option<(u64, u64)> {
        if self.dirty == 0 {
            self.cursor = 0;
            return None;
        }
        let first = match self.next_dirty(self.cursor) {
            Some(page) => page,
            None => self.next_dirty(0)?,
        };
        let in_block = BLOCK_PAGES - (self.base / PAGE_SIZE + first) % BLOCK_PAGES;
        let most = max_pages.clamp(1, in_block).min(self.pages - first);
        let end = self.run_end(first, first + most);
        self.unset(first, end);
        self.cursor = end;
        Some((self.base + first * PAGE_SIZE, (end - first) * PAGE_SIZE))
    }

    /// Moves the cursor to the next page of this sweep that is dirty; `false` when there is none.
    pub(crate) fn seek(&mut self) -> bool {
        if self.dirty == 0 {
            return false;
        }
        match self.next_dirty(self.cursor) {
            Some(page) => self.cursor = page,
            None => return false,
        }
        true
    }

    /// Begins a new sweep: the next [`take`](Self::take) looks from the first page on.
    pub(crate) const fn restart_sweep(&mut self) {
        self.cursor = 0;
    }

    /// The dirty ranges, as (address, length) in bytes, by address, none touching the next. They are
    /// not cut at blocks.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        WordRuns::new(&self.words).map(|(first, end)| {
            // No bit stands behind the last page: `set` alone sets bits, within `pages`.
            (self.base + first * PAGE_SIZE, (end - first) * PAGE_SIZE)
        })
    }

    /// The pages that a byte range touches, as `[first, end)`; `None` when it touches none.
    fn pages_touched(&self, start: u64, length: u64) -> Option<(u64, u64)> {
        let limit = self.base + self.length();
        let from = start.max(self.base);
        let to = start.saturating_add(length).min(limit);
        (from < to).then(|| ((from - self.base) / PAGE_SIZE, (to - self.base).div_ceil(PAGE_SIZE)))
    }

    fn set(&mut self, first: u64, end: u64) {
        for (word, mask) in masks(first, end) {
            let word = &mut self.words[word];
            self.dirty += u64::from((mask & !*word).count_ones());
            *word |= mask;
        }
    }

    fn unset(&mut self, first: u64, end: u64) {
        for (word, mask) in masks(first, end) {
            let word = &mut self.words[word];
            self.dirty -= u64::from((mask & *word).count_ones());
            *word &= !mask;
        }
    }

    /// The first dirty page from `from` on.
    fn next_dirty(&self, from: u64) -> Option<u64> {
        if from >= self.pages {
            return None;
        }
        let mut at = index(from);
        let mut word = self.words[at] & (u64::MAX << (from % WORD_PAGES));
        loop {
            cost::step();
            if word != 0 {
                return Some(at as u64 * WORD_PAGES + u64::from(word.trailing_zeros()));
            }
            at += 1;
            word = *self.words.get(at)?;
        }
    }

    /// The first clean page from `first` on, at most `limit`.
    fn run_end(&self, first: u64, limit: u64) -> u64 {
        let mut at = first;
        while at < limit {
            cost::step();
            let shift = at % WORD_PAGES;
            let ones = u64::from((self.words[index(at)] >> shift).trailing_ones());
            at += ones;
            if ones < WORD_PAGES - shift {
                break;
            }
        }
        at.min(limit)
    }
}

/// The word of a page. A bitmap is never longer than `usize` can count: `DirtyBitmap::new` checks.
fn index(page: u64) -> usize {
    usize::try_from(page / WORD_PAGES).unwrap_or(usize::MAX)
}

/// The words that hold `[first, end)`, each with the mask of its part.
fn masks(first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    let mut at = first;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        cost::step();
        let shift = at % WORD_PAGES;
        let pages = (WORD_PAGES - shift).min(end - at);
        let mask = (u64::MAX >> (WORD_PAGES - pages)) << shift;
        let word = index(at);
        at += pages;
        Some((word, mask))
    })
}

/// Runs of set bits in words, as `[first, end)` in bits, joined across words.
#[derive(Clone, Debug)]
struct WordRuns<'a> {
    words: &'a [u64],
    at: usize,
    /// What of the present word has not been looked at.
    rest: u64,
}

impl<'a> WordRuns<'a> {
    fn new(words: &'a [u64]) -> Self {
        Self { words, at: 0, rest: words.first().copied().unwrap_or(0) }
    }

    fn advance(&mut self) -> Option<()> {
        cost::step();
        self.at += 1;
        self.rest = *self.words.get(self.at)?;
        Some(())
    }
}

impl Iterator for WordRuns<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        while self.rest == 0 {
            self.advance()?;
        }
        let first = self.at as u64 * WORD_PAGES + u64::from(self.rest.trailing_zeros());
        loop {
            cost::step();
            let from = self.rest.trailing_zeros();
            let ones = (self.rest >> from).trailing_ones();
            let end = from + ones;
            let end_bit = self.at as u64 * WORD_PAGES + u64::from(end);
            if end < u64::BITS {
                self.rest &= u64::MAX << end;
                return Some((first, end_bit));
            }
            // The run reaches the word's end: it may go on in the next one.
            self.rest = 0;
            if self.advance().is_none() || self.rest & 1 == 0 {
                return Some((first, end_bit));
            }
        }
    }
}

/// The dirty ranges that a report stands for, as (address, length) in bytes, adjacent pages joined.
///
/// Bit `n % 64` of word `n / 64` stands for the page at `start + n * page_size`, as in
/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`, `VFIO_IOMMU_DIRTY_PAGES` and iommufd. The page size may
/// be finer or coarser than [`PAGE_SIZE`]. What would lie behind the last address is cut off.
#[derive(Clone, Debug)]
pub struct ReportRanges<'a> {
    runs: WordRuns<'a>,
    start: u64,
    page_size: u64,
}

impl<'a> ReportRanges<'a> {
    /// Reads a report over pages of `page_size` bytes from `start`.
    ///
    /// # Errors
    /// When `page_size` is not a power of two.
    pub fn new(start: u64, page_size: u64, bits: &'a [u64]) -> Result<Self, InvalidRange> {
        if !page_size.is_power_of_two() {
            return Err(InvalidRange::PageSize(page_size));
        }
        Ok(Self { runs: WordRuns::new(bits), start, page_size })
    }
}

impl Iterator for ReportRanges<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let (first, end) = self.runs.next()?;
        let from = self.start.saturating_add(first.saturating_mul(self.page_size));
        let to = self.start.saturating_add(end.saturating_mul(self.page_size));
        (from < to).then_some((from, to - from))
    }
}

/// Counts the steps of the loops above, so that a test can hold their cost without a clock.
mod cost {
    #[cfg(test)]
    thread_local! {
        static STEPS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
    }

    #[cfg(test)]
    pub(super) fn step() {
        STEPS.set(STEPS.get() + 1);
    }

    #[cfg(not(test))]
    pub(super) const fn step() {}

    #[cfg(test)]
    pub(super) fn of(work: impl FnOnce()) -> u64 {
        let before = STEPS.get();
        work();
        STEPS.get() - before
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_SIZE, DirtyBitmap, PAGE_SIZE, WORD_PAGES, cost};

    const PAGES: u64 = 1 << 20;
    const WORDS: u64 = PAGES / WORD_PAGES;

    fn bitmap() -> DirtyBitmap {
        DirtyBitmap::new(0, PAGES * PAGE_SIZE).unwrap()
    }

    #[test]
    fn marking_and_listing_cost_a_step_for_each_word_not_each_page() {
        let mut full = bitmap();
        assert!(cost::of(|| full.set_all()) <= WORDS);
        assert!(cost::of(|| assert_eq!(full.ranges().count(), 1)) <= 2 * WORDS + 2);
        let mut other = bitmap();
        assert!(cost::of(|| other.merge(&full)) <= WORDS);
    }

    #[test]
    fn a_sweep_of_a_full_bitmap_costs_a_few_steps_for_each_word() {
        let mut full = bitmap();
        full.set_all();
        let mut runs = 0;
        let steps = cost::of(|| {
            while full.take(u64::MAX).is_some() {
                runs += 1;
            }
        });
        assert_eq!(runs, PAGES * PAGE_SIZE / BLOCK_SIZE);
        assert!(steps <= 3 * WORDS + 2 * runs, "{steps} steps");
    }

    #[test]
    fn a_sweep_of_few_pages_walks_the_words_once() {
        let mut sparse = bitmap();
        for page in (0..PAGES).step_by(4096) {
            sparse.mark(page * PAGE_SIZE, 1);
        }
        let runs = sparse.count();
        let steps = cost::of(|| while sparse.take(1).is_some() {});
        assert!(steps <= WORDS + 4 * runs, "{steps} steps");
    }
}
