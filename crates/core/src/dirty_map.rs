//! The dirty pages of all guest memory: one bitmap for each region, addressed by [`GpaRange`].
//!
//! All sources are ORed into it. Ranges outside guest memory (peer BARs, holes) are passed over:
//! they are never copied as memory.

use crate::dirty::{DirtyBitmap, InvalidRange, MAX_TRACKED_BYTES, PAGE_SIZE};
use crate::{Gpa, GpaRange, MemoryLayout};

/// A layout of guest memory that cannot be tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLayout {
    /// A region cannot be covered.
    #[error("memory region {region}: {error}")]
    Region {
        /// Its number.
        region: u32,
        /// Why.
        #[source]
        error: InvalidRange,
    },
    /// Two regions share addresses.
    #[error("memory regions {first} and {second} overlap")]
    Overlap {
        /// The one at the lower address.
        first: u32,
        /// The other.
        second: u32,
    },
    /// All regions together are longer than [`MAX_TRACKED_BYTES`].
    #[error("memory regions are larger than 64 TiB together")]
    TooLarge,
}

/// The dirty pages of guest memory, at 4 KiB.
///
/// [`take_run`](Self::take_run) sweeps: it goes once over all regions before it comes back to a
/// page, so that a part that is dirtied fast does not hold up the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyMap {
    regions: Vec<DirtyBitmap>,
    at: usize,
}

impl DirtyMap {
    /// A clean map of this layout.
    ///
    /// # Errors
    /// When a region is not made of whole pages, regions overlap, or all of them are too large.
    /// Nothing is allocated before all of this is checked.
    pub fn new(layout: &MemoryLayout) -> Result<Self, InvalidLayout> {
        let mut regions = layout.regions.clone();
        regions.sort_by_key(|r| r.gpa);
        let mut total = 0_u64;
        for r in &regions {
            total = total.checked_add(r.size).ok_or(InvalidLayout::TooLarge)?;
        }
        if total > MAX_TRACKED_BYTES {
            return Err(InvalidLayout::TooLarge);
        }
        for pair in regions.windows(2) {
            if pair[0].gpa.0.saturating_add(pair[0].size) > pair[1].gpa.0 {
                return Err(InvalidLayout::Overlap { first: pair[0].id, second: pair[1].id });
            }
        }
        let regions = regions
            .iter()
            .map(|r| {
                DirtyBitmap::new(r.gpa.0, r.size)
                    .map_err(|error| InvalidLayout::Region { region: r.id, error })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { regions, at: 0 })
    }

    /// Pages of all regions.
    #[must_use]
    pub fn total_pages(&self) -> u64 {
        self.regions.iter().map(|r| r.length() / PAGE_SIZE).sum()
    }

    /// Number of dirty pages. Costs a step for each region.
    #[must_use]
    pub fn count_pages(&self) -> u64 {
        self.regions.iter().map(DirtyBitmap::count).sum()
    }

    /// Bytes of the dirty pages.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.count_pages() * PAGE_SIZE
    }

    /// No page is dirty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.iter().all(DirtyBitmap::is_empty)
    }

    /// Whether the page of `address` is dirty; `false` outside guest memory.
    #[must_use]
    pub fn contains(&self, address: Gpa) -> bool {
        self.regions.iter().any(|r| r.contains(address.0))
    }

    /// Marks every page that `range` touches (V2-DIRTY); what is outside guest memory is passed
    /// over. This is also how a page that was taken and not sent goes back.
    pub fn mark(&mut self, range: GpaRange) {
        let end = range.start.0.saturating_add(range.length);
        let first = self.regions.partition_point(|r| r.base() + r.length() <= range.start.0);
        for region in self.regions.iter_mut().skip(first).take_while(|r| r.base() < end) {
            region.mark(range.start.0, range.length);
        }
    }

    /// Marks all pages: the first round, and memory that no source covers.
    pub fn mark_all(&mut self) {
        self.regions.iter_mut().for_each(DirtyBitmap::set_all);
    }

    /// Makes all pages clean and begins a new sweep.
    pub fn clear(&mut self) {
        self.at = 0;
        for region in &mut self.regions {
            region.clear();
            region.restart_sweep();
        }
    }

    /// Marks all pages that are dirty in `other`.
    pub fn merge(&mut self, other: &Self) {
        let alike = self.regions.len() == other.regions.len()
            && self
                .regions
                .iter()
                .zip(&other.regions)
                .all(|(a, b)| (a.base(), a.length()) == (b.base(), b.length()));
        if alike {
            for (mine, theirs) in self.regions.iter_mut().zip(&other.regions) {
                mine.merge(theirs);
            }
        } else {
            for range in other.ranges() {
                self.mark(range);
            }
        }
    }

    /// Takes the next run of dirty pages out: makes them clean and returns them. The run is at most
    /// `max_bytes` long (at least one page), stays within one region and does not cross a multiple
    /// of [`BLOCK_SIZE`](crate::BLOCK_SIZE). `None`: nothing is dirty.
    ///
    /// The pages must be read after this call, never before (V2-DIRTY).
    pub fn take_run(&mut self, max_bytes: u64) -> Option<GpaRange> {
        // Each region's sweep is ended before the next begins. After one turn over all regions the
        // first that has anything is reached again, from its start.
        for _ in 0..=self.regions.len() {
            let region = self.regions.get_mut(self.at)?;
            if region.seek() {
                return region
                    .take(max_bytes / PAGE_SIZE)
                    .map(|(start, length)| GpaRange::new(start, length));
            }
            region.restart_sweep();
            self.at = (self.at + 1) % self.regions.len();
        }
        None
    }

    /// The dirty ranges by address. Ranges of regions that touch are not joined.
    pub fn ranges(&self) -> impl Iterator<Item = GpaRange> + '_ {
        self.regions.iter().flat_map(|r| r.ranges().map(|(start, length)| GpaRange::new(start, length)))
    }
}
