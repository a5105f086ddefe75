//! Sets of ranges as the kernel's logs take them, and bitmaps as they give them.
//!
//! Ranges are only ever made larger here: a log may cover and report too much, never too little
//! (V2-DIRTY). Not checked here: that anything is mapped.

use airlift_core::{Errno, IovaRange, ReportRanges};

/// Most bits of one report where the kernel takes any part of a range: 256 KiB of bitmap, 8 GiB of
/// pages of 4 KiB. A report does not hold up others for longer than that takes.
const REPORT_BITS: u64 = 1 << 21;

/// Ranges as (start, end), by address; none overlaps another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// Rounds `ranges` outward to `align`, a power of two, and joins what overlaps, and what touches
    /// as far as the whole stays within `join` bytes. `None` when something ends behind 2^64 - `align`.
    pub(super) fn new(ranges: &[IovaRange], align: u64, join: u64) -> Option<Self> {
        let mut list = Vec::with_capacity(ranges.len());
        for range in ranges.iter().filter(|r| r.length > 0) {
            let end = range.end()?.checked_next_multiple_of(align)?;
            list.push((range.start.0 & !(align - 1), end));
        }
        list.sort_unstable();
        let mut joined: Vec<(u64, u64)> = Vec::with_capacity(list.len());
        for (start, end) in list {
            match joined.last_mut() {
                Some(last) if start < last.1 || (start == last.1 && end - last.0 <= join) => {
                    last.1 = last.1.max(end);
                }
                _ => joined.push((start, end)),
            }
        }
        Some(Self(joined))
    }

    /// The same as at most `count` ranges: the smallest gaps are covered too.
    pub(super) fn at_most(&self, count: usize) -> Self {
        let mut gaps: Vec<(u64, usize)> =
            self.0.windows(2).enumerate().map(|(at, pair)| (pair[1].0 - pair[0].1, at)).collect();
        gaps.sort_unstable();
        gaps.truncate(self.0.len().saturating_sub(count.max(1)));
        let closed: std::collections::BTreeSet<usize> = gaps.into_iter().map(|(_, at)| at).collect();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (at, range) in self.0.iter().enumerate() {
            match merged.last_mut() {
                Some(last) if at > 0 && closed.contains(&(at - 1)) => last.1 = range.1,
                _ => merged.push(*range),
            }
        }
        Self(merged)
    }

    /// The same rounded outward to `align`; as it is where it is aligned already.
    pub(super) fn rounded(&self, align: u64) -> Option<Self> {
        let all: Vec<_> = self.0.iter().map(|(start, end)| IovaRange::new(*start, end - start)).collect();
        Self::new(&all, align, u64::MAX)
    }

    pub(super) const fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges as the kernel takes them: start and length.
    pub(super) fn raw(&self) -> Vec<[u64; 2]> {
        self.0.iter().map(|(start, end)| [*start, end - start]).collect()
    }

    /// The ranges that share an address with `range`, whole.
    pub(super) fn touched(&self, range: IovaRange) -> impl Iterator<Item = (u64, u64)> + '_ {
        let end = range.end().unwrap_or(u64::MAX);
        let first = self.0.partition_point(|(_, stop)| *stop <= range.start.0);
        self.0[first..].iter().copied().take_while(move |(start, _)| *start < end)
    }

    /// `range`, as far as it is in these ranges, rounded outward to `page` and cut into parts of one
    /// report each: start and length. The ranges are aligned to `page`, so rounding stays in them.
    pub(super) fn parts(&self, range: IovaRange, page: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let end = range.end().unwrap_or(u64::MAX);
        let most = page.saturating_mul(REPORT_BITS);
        self.touched(range).flat_map(move |(start, stop)| {
            let mut at = range.start.0.max(start) & !(page - 1);
            let last = end.min(stop).checked_next_multiple_of(page).unwrap_or(stop);
            std::iter::from_fn(move || {
                let part = (at < last).then(|| (at, (last - at).min(most)))?;
                at += part.1;
                Some(part)
            })
        })
    }
}

/// A zeroed bitmap with a bit for each page of `length` bytes.
///
/// # Errors
/// ENOMEM when it would be larger than can be addressed.
pub(super) fn bitmap(length: u64, page: u64) -> Result<Vec<u64>, Errno> {
    let words = length.div_ceil(page).div_ceil(64);
    Ok(vec![0; usize::try_from(words).map_err(|_| Errno::ENOMEM)?])
}

/// Calls `each` with the runs of pages whose bits are set in the report of `length` bytes from
/// `start`.
pub(crate) fn runs(start: u64, length: u64, page: u64, bits: &[u64], each: &mut dyn FnMut(IovaRange)) {
    let end = start.saturating_add(length);
    let Ok(ranges) = ReportRanges::new(start, page, bits) else {
        // No page size: whoever asked with it cannot tell pages apart.
        each(IovaRange::new(start, length));
        return;
    };
    for (from, run) in ranges {
        // The last word has bits for which there is no page.
        let to = from.saturating_add(run).min(end);
        if from < to {
            each(IovaRange::new(from, to - from));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    fn ranges(list: &[(u64, u64)]) -> Vec<IovaRange> {
        list.iter().map(|(start, end)| IovaRange::new(*start, end - start)).collect()
    }

    #[test]
    fn ranges_are_rounded_outward_and_joined() {
        let made =
            Ranges::new(&ranges(&[(0x5800, 0x6001), (0x1001, 0x2000), (0x2000, 0x3000)]), PAGE, 1 << 20);
        assert_eq!(made.unwrap().0, [(0x1000, 0x3000), (0x5000, 0x7000)]);
        let apart = Ranges::new(&ranges(&[(0x1000, 0x2000), (0x2000, 0x3000)]), PAGE, 0x1000).unwrap();
        assert_eq!(apart.len(), 2, "ranges that touch stay apart where the whole would be too long");
        assert_eq!(Ranges::new(&[IovaRange::new(u64::MAX - 1, 1)], PAGE, 0), None);
        assert_eq!(Ranges::new(&[IovaRange::new(0, u64::MAX)], PAGE, 0), None);
        assert!(Ranges::new(&[IovaRange::new(4096, 0)], PAGE, 0).unwrap().is_empty());
    }

    #[test]
    fn the_smallest_gaps_are_closed_first() {
        let all = Ranges(vec![(0, 10), (20, 30), (100, 110), (111, 120)]);
        assert_eq!(all.at_most(4), all);
        assert_eq!(all.at_most(3).0, [(0, 10), (20, 30), (100, 120)]);
        assert_eq!(all.at_most(2).0, [(0, 30), (100, 120)]);
        assert_eq!(all.at_most(1).0, [(0, 120)]);
        assert_eq!(all.at_most(0).0, [(0, 120)]);
    }

    #[test]
    fn a_report_is_cut_into_parts_within_what_is_logged() {
        let logged = Ranges(vec![(0, 0x10_000), (0x20_000, 5 * PAGE * REPORT_BITS / 2)]);
        let parts: Vec<_> = logged.parts(IovaRange::new(0xf001, u64::MAX), PAGE).collect();
        assert_eq!(parts[0], (0xf000, 0x1000));
        assert_eq!(parts[1].0, 0x20_000);
        assert!(parts.iter().all(|(_, length)| *length <= PAGE * REPORT_BITS));
        assert_eq!(parts[1..].iter().map(|p| p.1).sum::<u64>(), 5 * PAGE * REPORT_BITS / 2 - 0x20_000);
        assert_eq!(logged.parts(IovaRange::new(0x10_000, 0x10_000), PAGE).count(), 0);
        // Pages that are larger than what is asked for.
        assert_eq!(logged.parts(IovaRange::new(0x8000, 1), 0x8000).collect::<Vec<_>>(), [(0x8000, 0x8000)]);
    }

    #[test]
    fn bits_behind_the_last_page_are_no_pages() {
        let mut got = Vec::new();
        runs(0x1000, 3 * PAGE, PAGE, &[u64::MAX], &mut |r| got.push((r.start.0, r.length)));
        assert_eq!(got, [(0x1000, 0x3000)]);
        assert_eq!(bitmap(65 * PAGE, PAGE).unwrap().len(), 2);
    }

    proptest! {
        /// However ranges are rounded and merged, every address stays covered, and nothing overlaps.
        #[test]
        fn no_address_is_lost(
            list in prop::collection::vec((0_u64..1 << 24, 1_u64..1 << 16), 1..20),
            count in 1_usize..8,
            large in any::<bool>(),
        ) {
            let given: Vec<_> = list.iter().map(|(start, length)| IovaRange::new(*start, *length)).collect();
            let made = Ranges::new(&given, PAGE, 1 << 20).unwrap().at_most(count);
            let made = if large { made.rounded(1 << 16).unwrap() } else { made };
            prop_assert!(made.len() <= count);
            prop_assert!(made.0.windows(2).all(|pair| pair[0].1 <= pair[1].0));
            for range in &given {
                let covered = |address: u64| made.0.iter().any(|(s, e)| (*s..*e).contains(&address));
                prop_assert!(covered(range.start.0) && covered(range.end().unwrap() - 1));
                // One range covers each given one whole.
                prop_assert_eq!(made.touched(*range).count(), 1);
            }
        }
    }
}
