//! Which pages were written by the device: bitmaps over the ranges that the client named.
//!
//! A writer stores first and marks afterwards; a report takes and clears bits with one atomic step
//! each. So a page that is written while a report runs is in this report or in the next (V2-DIRTY).

use airlift_core::Errno;
use std::sync::atomic::{AtomicU64, Ordering};

/// A log that runs. Ranges and pages are whole multiples of its page size.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    shift: u32,
    all: bool,
    words: u64,
    limit: u64,
    ranges: Vec<Range>,
}

#[derive(Debug)]
struct Range {
    start: u64,
    end: u64,
    bits: Box<[AtomicU64]>,
}

impl DirtyLog {
    /// A log at `page_size` bytes over `ranges` of `(iova, length)`. `all`: ranges that are mapped
    /// later belong to it. `limit` bounds the bytes of all bitmaps.
    pub(crate) fn new(page_size: u64, all: bool, ranges: &[(u64, u64)], limit: u64) -> Result<Self, Errno> {
        if !page_size.is_power_of_two() {
            return Err(Errno::EINVAL);
        }
        let shift = page_size.max(4096).trailing_zeros();
        let mut log = Self { shift, all, words: 0, limit, ranges: Vec::new() };
        for &(start, length) in ranges {
            log.add(start, length)?;
        }
        Ok(log)
    }

    pub(crate) fn page_size(&self) -> u64 {
        1 << self.shift
    }

    /// Ranges that are mapped later belong to the log.
    pub(crate) fn is_all(&self) -> bool {
        self.all
    }

    /// Logs one more range. Nothing happens when it is logged already.
    pub(crate) fn add(&mut self, start: u64, length: u64) -> Result<(), Errno> {
        let end = start.checked_add(length).ok_or(Errno::EINVAL)?;
        if length == 0 || !self.aligned(start) || !self.aligned(end) {
            return Err(Errno::EINVAL);
        }
        if self.ranges.iter().any(|r| r.start == start && r.end == end) {
            return Ok(());
        }
        if self.ranges.iter().any(|r| r.start < end && start < r.end) {
            return Err(Errno::EEXIST);
        }
        let words = (length >> self.shift).div_ceil(64);
        if (self.words + words) * 8 > self.limit {
            return Err(Errno::E2BIG);
        }
        let count = usize::try_from(words).map_err(|_| Errno::E2BIG)?;
        self.words += words;
        let bits = std::iter::repeat_with(|| AtomicU64::new(0)).take(count).collect();
        let at = self.ranges.partition_point(|r| r.start < start);
        self.ranges.insert(at, Range { start, end, bits });
        Ok(())
    }

    fn aligned(&self, address: u64) -> bool {
        address & (self.page_size() - 1) == 0
    }

    /// The bytes were written.
    pub(crate) fn mark(&self, iova: u64, length: u64) {
        let end = iova.saturating_add(length);
        let first = self.ranges.partition_point(|r| r.end <= iova);
        for range in self.ranges[first..].iter().take_while(|r| r.start < end) {
            let from = (iova.max(range.start) - range.start) >> self.shift;
            let to = (end.min(range.end) - range.start - 1) >> self.shift;
            each_word(from, to + 1, |word, mask| {
                if let Some(bits) = range.bits.get(word) {
                    bits.fetch_or(mask, Ordering::AcqRel);
                }
            });
        }
    }

    /// Takes and clears what was written in `length` bytes from `iova`: a bit for each `page_size`
    /// bytes. Parts that are not logged have no bit set (VU-LOG-RANGES).
    pub(crate) fn report(&self, iova: u64, length: u64, page_size: u64) -> Result<Vec<u64>, Errno> {
        let end = iova.checked_add(length).ok_or(Errno::EINVAL)?;
        let fits = page_size.is_power_of_two() && page_size >= self.page_size();
        // A part of a page cannot be cleared without losing the rest of it.
        if !fits || length == 0 || !self.aligned(iova) || !self.aligned(end) {
            return Err(Errno::EINVAL);
        }
        let pages = length.div_ceil(page_size);
        let words = pages.div_ceil(64);
        if words.saturating_mul(8) > self.limit {
            return Err(Errno::E2BIG);
        }
        let mut out = vec![0_u64; usize::try_from(words).map_err(|_| Errno::E2BIG)?];
        let first = self.ranges.partition_point(|r| r.end <= iova);
        let mut found = false;
        let shift = page_size.trailing_zeros();
        for range in self.ranges[first..].iter().take_while(|r| r.start < end) {
            found = true;
            let from = (iova.max(range.start) - range.start) >> self.shift;
            let to = (end.min(range.end) - range.start) >> self.shift;
            each_word(from, to, |word, mask| {
                let Some(bits) = range.bits.get(word) else { return };
                if bits.load(Ordering::Relaxed) & mask == 0 {
                    return;
                }
                let mut taken = bits.fetch_and(!mask, Ordering::AcqRel) & mask;
                while taken != 0 {
                    let bit = (word as u64) * 64 + u64::from(taken.trailing_zeros());
                    let page = (range.start + (bit << self.shift) - iova) >> shift;
                    // The word exists: the page lies below `pages`.
                    if let Some(word) = usize::try_from(page / 64).ok().and_then(|i| out.get_mut(i)) {
                        *word |= 1 << (page % 64);
                    }
                    taken &= taken - 1;
                }
            });
        }
        if found { Ok(out) } else { Err(Errno::ENOENT) }
    }
}

/// Calls `each` with every word of 64 bits that bits `from..to` touch, and the mask of them in it.
fn each_word(from: u64, to: u64, mut each: impl FnMut(usize, u64)) {
    let mut at = from;
    while at < to {
        let word = at / 64;
        let stop = to.min((word + 1) * 64);
        let count = stop - at;
        let mask = if count == 64 { u64::MAX } else { ((1 << count) - 1) << (at % 64) };
        if let Ok(word) = usize::try_from(word) {
            each(word, mask);
        }
        at = stop;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_page_is_reported_once_and_at_its_place() {
        let log = DirtyLog::new(4096, false, &[(MIB, MIB)], MIB).unwrap();
        log.mark(MIB + 70 * 4096 + 100, 1);
        log.mark(MIB + 4095, 2);
        let bits = log.report(MIB, MIB, 4096).unwrap();
        assert_eq!(bits, [0b11, 1 << 6, 0, 0]);
        assert_eq!(log.report(MIB, MIB, 4096).unwrap(), [0; 4]);
    }

    #[test]
    fn a_coarser_report_keeps_every_page() {
        // The case in which a widely used server loses page 300 of 512 MiB.
        let log = DirtyLog::new(4096, false, &[(0, 512 * MIB)], MIB).unwrap();
        log.mark(300 * MIB + 5 * 4096, 4096);
        let bits = log.report(0, 512 * MIB, MIB).unwrap();
        let set: Vec<_> = (0..512).filter(|n| bits[n / 64] >> (n % 64) & 1 == 1).collect();
        assert_eq!(set, [300]);
    }

    #[test]
    fn a_report_of_a_part_clears_that_part_only() {
        let log = DirtyLog::new(4096, false, &[(0, MIB), (2 * MIB, MIB)], MIB).unwrap();
        log.mark(0, 3 * MIB);
        assert_eq!(log.report(4096, 2 * 4096, 4096).unwrap(), [0b11]);
        let rest = log.report(0, 3 * MIB, 4096).unwrap();
        assert_eq!(rest.iter().map(|w| w.count_ones()).sum::<u32>(), 512 - 2);
        // The hole between the ranges is not logged.
        assert_eq!(rest[4..8], [0; 4]);
    }

    #[test]
    fn what_would_lose_bits_is_refused() {
        let log = DirtyLog::new(65536, false, &[(0, MIB)], MIB).unwrap();
        assert_eq!(log.report(0, MIB, 4096), Err(Errno::EINVAL));
        assert_eq!(log.report(4096, MIB - 4096, 65536), Err(Errno::EINVAL));
        assert_eq!(log.report(8 * MIB, MIB, 65536), Err(Errno::ENOENT));
        assert!(DirtyLog::new(3000, false, &[], MIB).is_err());
        assert!(DirtyLog::new(0, false, &[], MIB).is_err());
        assert_eq!(DirtyLog::new(4096, false, &[(0, 1 << 50)], MIB).unwrap_err(), Errno::E2BIG);
    }

    #[test]
    fn no_page_is_lost_under_concurrent_writers() {
        let log = DirtyLog::new(4096, false, &[(0, 4 * MIB)], MIB).unwrap();
        // Each writer stores a number into its page before it marks; the reporter reads the page
        // after it has cleared the bit. What it saw last must be what was written last.
        let pages: Vec<AtomicU64> = (0..1024).map(|_| AtomicU64::new(0)).collect();
        let mut copy = vec![0_u64; 1024];
        let collect = |copy: &mut Vec<u64>| {
            let bits = log.report(0, 4 * MIB, 4096).unwrap();
            for page in (0..1024_usize).filter(|p| bits[p / 64] >> (p % 64) & 1 == 1) {
                copy[page] = pages[page].load(Ordering::Acquire);
            }
        };
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..4_u64)
                .map(|w| {
                    let (log, pages) = (&log, &pages);
                    scope.spawn(move || {
                        for n in 1..20_000_u64 {
                            let page = (n * 7 + w) % 256 * 4 + w;
                            pages[usize::try_from(page).unwrap()].store(n, Ordering::Release);
                            log.mark(page * 4096, 8);
                        }
                    })
                })
                .collect();
            while writers.iter().any(|w| !w.is_finished()) {
                collect(&mut copy);
            }
        });
        collect(&mut copy);
        let truth: Vec<_> = pages.iter().map(|p| p.load(Ordering::Relaxed)).collect();
        assert_eq!(copy, truth);
    }
}
