//! The dirty bitmap against the plainest model there is: one `bool` for each page.
#![allow(clippy::unwrap_used)]

use airlift_core::{BLOCK_SIZE, DirtyBitmap, InvalidRange, MAX_TRACKED_BYTES, PAGE_SIZE, ReportRanges};
use proptest::prelude::*;

const PAGES: usize = 1500;

/// The model. Addresses are checked page by page, with no arithmetic of the bitmap's kind.
#[derive(Clone)]
struct Model {
    base: u64,
    dirty: Vec<bool>,
}

impl Model {
    fn page(&self, n: usize) -> u64 {
        self.base + n as u64 * PAGE_SIZE
    }

    fn mark(&mut self, start: u64, length: u64) {
        for n in 0..self.dirty.len() {
            let (from, to) = (self.page(n), self.page(n) + PAGE_SIZE);
            if length > 0 && start < to && start.saturating_add(length) > from {
                self.dirty[n] = true;
            }
        }
    }

    fn ranges(&self) -> Vec<(u64, u64)> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        for n in (0..self.dirty.len()).filter(|&n| self.dirty[n]) {
            match found.last_mut() {
                Some((start, length)) if *start + *length == self.page(n) => *length += PAGE_SIZE,
                _ => found.push((self.page(n), PAGE_SIZE)),
            }
        }
        found
    }
}

#[derive(Clone, Debug)]
enum Op {
    Mark(u64, u64),
    Take(u64),
    SetAll,
    Clear,
    Report(u64, u32, Vec<u64>),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let span = PAGES as u64 * PAGE_SIZE;
    let op = prop_oneof![
        6 => (0..span + 9000, 0..40 * PAGE_SIZE).prop_map(|(at, len)| Op::Mark(at, len)),
        1 => (0..span, any::<u64>()).prop_map(|(at, len)| Op::Mark(at, len)),
        8 => (0..700_u64).prop_map(Op::Take),
        1 => Just(Op::SetAll),
        1 => Just(Op::Clear),
        2 => (0..span, 9..17_u32, prop::collection::vec(any::<u64>(), 0..4))
            .prop_map(|(at, shift, bits)| Op::Report(at, shift, bits)),
    ];
    prop::collection::vec(op, 0..60)
}

proptest! {
    #[test]
    fn behaves_as_the_model(first_page in 0..2000_u64, ops in ops()) {
        let base = first_page * PAGE_SIZE;
        let mut bitmap = DirtyBitmap::new(base, PAGES as u64 * PAGE_SIZE).unwrap();
        let mut model = Model { base, dirty: vec![false; PAGES] };
        for op in ops {
            match op {
                Op::Mark(at, length) => {
                    bitmap.mark(at, length);
                    model.mark(at, length);
                }
                Op::Take(most) => match bitmap.take(most) {
                    None => prop_assert!(!model.dirty.contains(&true)),
                    Some((start, length)) => {
                        let first = usize::try_from((start - base) / PAGE_SIZE).unwrap();
                        let pages = usize::try_from(length / PAGE_SIZE).unwrap();
                        prop_assert!(pages >= 1 && pages as u64 <= most.max(1));
                        prop_assert_eq!(start / BLOCK_SIZE, (start + length - 1) / BLOCK_SIZE);
                        // Every page of the run was dirty, and the run is as long as it can be.
                        prop_assert!(model.dirty[first..first + pages].iter().all(|d| *d));
                        let end = base + (first + pages) as u64 * PAGE_SIZE;
                        let cut = pages as u64 == most.max(1) || end.is_multiple_of(BLOCK_SIZE);
                        prop_assert!(cut || model.dirty.get(first + pages) != Some(&true));
                        model.dirty[first..first + pages].fill(false);
                    }
                },
                Op::SetAll => {
                    bitmap.set_all();
                    model.dirty.fill(true);
                }
                Op::Clear => {
                    bitmap.clear();
                    model.dirty.fill(false);
                }
                Op::Report(at, shift, bits) => {
                    let page_size = 1_u64 << shift;
                    bitmap.merge_report(at, page_size, &bits).unwrap();
                    for (n, word) in bits.iter().enumerate() {
                        for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
                            model.mark(at + (n as u64 * 64 + bit) * page_size, page_size);
                        }
                    }
                }
            }
            prop_assert_eq!(bitmap.count(), model.dirty.iter().filter(|d| **d).count() as u64);
            prop_assert_eq!(bitmap.is_empty(), !model.dirty.contains(&true));
            prop_assert_eq!(bitmap.ranges().collect::<Vec<_>>(), model.ranges());
        }
        for n in 0..PAGES {
            prop_assert_eq!(bitmap.contains(model.page(n) + 17), model.dirty[n]);
        }
    }

    #[test]
    fn merging_is_or_for_equal_and_for_shifted_ranges(
        shift in 0..300_u64,
        a in prop::collection::vec((0..PAGES as u64, 1..90_u64), 0..12),
        b in prop::collection::vec((0..PAGES as u64, 1..90_u64), 0..12),
    ) {
        let length = PAGES as u64 * PAGE_SIZE;
        let mut mine = DirtyBitmap::new(0, length).unwrap();
        let mut theirs = DirtyBitmap::new(shift * PAGE_SIZE, length).unwrap();
        let mut model = Model { base: 0, dirty: vec![false; PAGES] };
        for (page, pages) in a {
            mine.mark(page * PAGE_SIZE, pages * PAGE_SIZE);
            model.mark(page * PAGE_SIZE, pages * PAGE_SIZE);
        }
        for (page, pages) in b {
            theirs.mark(page * PAGE_SIZE, pages * PAGE_SIZE);
            if page + pages > shift {
                let from = page.max(shift);
                model.mark(from * PAGE_SIZE, (page + pages - from) * PAGE_SIZE);
            }
        }
        mine.merge(&theirs);
        prop_assert_eq!(mine.ranges().collect::<Vec<_>>(), model.ranges());
    }

    /// Nothing that is taken is lost and nothing comes twice: the runs of one sweep are the dirty
    /// pages.
    #[test]
    fn a_sweep_gives_every_dirty_page_once(marks in prop::collection::vec((0..PAGES as u64, 1..200_u64), 0..20),
                                           most in 1..600_u64) {
        let mut bitmap = DirtyBitmap::new(0x7000, PAGES as u64 * PAGE_SIZE).unwrap();
        for (page, pages) in marks {
            bitmap.mark(0x7000 + page * PAGE_SIZE, pages * PAGE_SIZE);
        }
        let before = bitmap.clone();
        let mut back = DirtyBitmap::new(0x7000, PAGES as u64 * PAGE_SIZE).unwrap();
        let mut taken = 0;
        while let Some((start, length)) = bitmap.take(most) {
            taken += length / PAGE_SIZE;
            back.mark(start, length);
        }
        prop_assert_eq!(taken, before.count());
        prop_assert!(back.ranges().eq(before.ranges()));
    }
}

#[test]
fn pages_dirtied_behind_the_cursor_wait_for_the_next_sweep() {
    let mut bitmap = DirtyBitmap::new(0, 8 * PAGE_SIZE).unwrap();
    bitmap.set_all();
    assert_eq!(bitmap.take(2), Some((0, 2 * PAGE_SIZE)));
    bitmap.mark(0, 1);
    assert_eq!(bitmap.take(6), Some((2 * PAGE_SIZE, 6 * PAGE_SIZE)));
    assert_eq!(bitmap.take(6), Some((0, PAGE_SIZE)));
    assert_eq!(bitmap.take(6), None);
}

#[test]
fn ranges_that_cannot_be_tracked_are_refused_before_allocation() {
    assert!(matches!(DirtyBitmap::new(1, PAGE_SIZE), Err(InvalidRange::Unaligned { .. })));
    assert!(matches!(DirtyBitmap::new(0, 100), Err(InvalidRange::Unaligned { .. })));
    let too_much = MAX_TRACKED_BYTES + PAGE_SIZE;
    assert!(matches!(DirtyBitmap::new(0, too_much), Err(InvalidRange::TooLarge { .. })));
    let top = u64::MAX - PAGE_SIZE + 1;
    assert!(matches!(DirtyBitmap::new(top, 2 * PAGE_SIZE), Err(InvalidRange::TooLarge { .. })));
    assert_eq!(DirtyBitmap::new(0, 0).unwrap().take(1), None);
}

#[test]
fn reports_join_adjacent_pages_and_stop_at_the_last_address() {
    let bits = [1 << 63, 0b11, 0];
    let found: Vec<_> = ReportRanges::new(0x1000_0000, 65536, &bits).unwrap().collect();
    assert_eq!(found, [(0x1000_0000 + 63 * 65536, 3 * 65536)]);
    let found: Vec<_> = ReportRanges::new(u64::MAX - 4095, 4096, &[0b11]).unwrap().collect();
    assert_eq!(found, [(u64::MAX - 4095, 4095)]);
    for bad in [0, 3, 4097] {
        assert!(matches!(ReportRanges::new(0, bad, &[]), Err(InvalidRange::PageSize(size)) if size == bad));
    }
}
