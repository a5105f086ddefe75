//! Dirty pages of a machine with several regions: nothing lost, nothing outside, a fair sweep.
#![allow(clippy::unwrap_used)]

use airlift_core::{DirtyMap, Gpa, GpaRange, InvalidLayout, MemoryLayout, MemoryRegion, PAGE_SIZE};
use std::collections::BTreeSet;

const GAP: u64 = 0x20_0000;

fn region(id: u32, gpa: u64, size: u64) -> MemoryRegion {
    MemoryRegion { id, gpa: Gpa(gpa), size, page_size: PAGE_SIZE }
}

/// A low region, a hole, and two regions that touch.
fn layout() -> MemoryLayout {
    let regions = vec![region(2, 0x100_0000, 0x4000), region(0, 0, 0xa000), region(1, 0x100_4000, 0x30_0000)];
    MemoryLayout { generation: 0, regions }
}

fn pages(range: GpaRange) -> impl Iterator<Item = u64> {
    (0..range.length / PAGE_SIZE).map(move |n| range.start.0 + n * PAGE_SIZE)
}

#[test]
fn everything_marked_comes_out_once_in_runs_of_bounded_size() {
    let mut map = DirtyMap::new(&layout()).unwrap();
    map.mark_all();
    assert_eq!(map.count_pages(), map.total_pages());
    assert_eq!(map.dirty_bytes(), layout().total_bytes());
    let mut seen = BTreeSet::new();
    while let Some(run) = map.take_run(1 << 20) {
        assert!(run.length <= 1 << 20);
        assert_eq!(run.start.0 / GAP, (run.start.0 + run.length - 1) / GAP, "crosses a block");
        for page in pages(run) {
            assert!(seen.insert(page), "{page:#x} came twice");
        }
    }
    assert_eq!(seen.len() as u64, layout().total_bytes() / PAGE_SIZE);
    assert!(map.is_empty());
}

#[test]
fn marks_round_outward_and_pass_over_what_is_no_memory() {
    let mut map = DirtyMap::new(&layout()).unwrap();
    map.mark(GpaRange::new(0x9fff, 0xff_7000));
    let found: Vec<_> = map.ranges().collect();
    assert_eq!(found, [GpaRange::new(0x9000, 0x1000), GpaRange::new(0x100_0000, 0x1000)]);
    assert!(map.contains(Gpa(0x9001)) && !map.contains(Gpa(0xb000)));
    map.clear();
    map.mark(GpaRange::new(0x100_3fff, 2));
    let found: Vec<_> = map.ranges().collect();
    assert_eq!(found, [GpaRange::new(0x100_3000, 0x1000), GpaRange::new(0x100_4000, 0x1000)]);
    map.mark(GpaRange::new(0x8000_0000, u64::MAX));
    assert_eq!(map.count_pages(), 2);
}

#[test]
fn a_region_that_is_dirtied_again_and_again_does_not_starve_the_others() {
    let mut map = DirtyMap::new(&layout()).unwrap();
    map.mark_all();
    let total = map.total_pages();
    let mut seen = BTreeSet::new();
    // Each page sent is dirtied again at once; one sweep must still visit all.
    for _ in 0..total {
        let run = map.take_run(PAGE_SIZE).unwrap();
        map.mark(run);
        seen.extend(pages(run));
    }
    assert_eq!(seen.len() as u64, total);
}

#[test]
fn a_run_that_was_not_sent_goes_back() {
    let mut map = DirtyMap::new(&layout()).unwrap();
    map.mark(GpaRange::new(0x1000, 0x3000));
    let run = map.take_run(0).unwrap();
    assert_eq!(run, GpaRange::new(0x1000, PAGE_SIZE), "less than a page counts as one page");
    map.mark(run);
    assert_eq!(map.ranges().collect::<Vec<_>>(), [GpaRange::new(0x1000, 0x3000)]);
}

#[test]
fn maps_are_ored() {
    let mut map = DirtyMap::new(&layout()).unwrap();
    let mut other = map.clone();
    map.mark(GpaRange::new(0, 1));
    other.mark(GpaRange::new(0x1000, 1));
    let mut small =
        DirtyMap::new(&MemoryLayout { generation: 9, regions: vec![region(7, 0x2000, 0x8000)] }).unwrap();
    small.mark(GpaRange::new(0x2000, 1));
    map.merge(&other);
    map.merge(&small);
    assert_eq!(map.ranges().collect::<Vec<_>>(), [GpaRange::new(0, 0x3000)]);
}

#[test]
fn layouts_that_cannot_be_tracked_are_refused() {
    let of = |regions: Vec<MemoryRegion>| DirtyMap::new(&MemoryLayout { generation: 0, regions });
    let overlap = of(vec![region(4, 0x3000, 0x1000), region(3, 0, 0x4000)]);
    assert_eq!(overlap, Err(InvalidLayout::Overlap { first: 3, second: 4 }));
    assert!(matches!(of(vec![region(5, 0x10, 0x1000)]), Err(InvalidLayout::Region { region: 5, .. })));
    assert_eq!(of(vec![region(0, 0, 1 << 62)]), Err(InvalidLayout::TooLarge));
    let sum = of(vec![region(0, 0, u64::MAX), region(1, 0, u64::MAX)]);
    assert_eq!(sum, Err(InvalidLayout::TooLarge));
    assert!(of(Vec::new()).unwrap().take_run(4096).is_none());
}
