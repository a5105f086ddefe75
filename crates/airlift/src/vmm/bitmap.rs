//! The dirty bitmap in a memfd that both sides map.
//!
//! One bit for each 4 KiB page, set when it was written. Regions stand one after the other in the
//! order of the layout, each from a 64-bit word of its own; page `n` of a region is bit `n % 64` of
//! its word `n / 64`; words are little-endian. The VMM ORs, the migration process swaps with 0
//! (VMM-DIRTY-OR), both atomically.

use crate::machine::MachineError;
use airlift_core::{GpaRange, MemoryLayout};
use airlift_memory::{Access, Mapping, SharedMemory};
use std::os::fd::OwnedFd;

const PAGE: u64 = 4096;

/// The mapped bitmap and the layout that it is for.
#[derive(Debug)]
pub(super) struct SharedBitmap {
    mapping: Mapping,
    regions: Vec<BitmapRegion>,
}

#[derive(Debug)]
struct BitmapRegion {
    gpa: u64,
    size: u64,
    first_word: u64,
}

/// Bytes of the bitmap of this layout.
pub(super) fn bitmap_bytes(layout: &MemoryLayout) -> u64 {
    layout.regions.iter().map(|r| words(r.size) * 8).sum()
}

const fn words(size: u64) -> u64 {
    size.div_ceil(PAGE).div_ceil(64)
}

impl SharedBitmap {
    /// A new, clear bitmap and its file.
    pub(super) fn create(layout: &MemoryLayout) -> Result<(Self, SharedMemory), MachineError> {
        let bytes = bitmap_bytes(layout).max(8);
        let memory = SharedMemory::create("airlift-dirty", bytes).map_err(|e| failed(&e))?;
        Ok((Self::over(&memory, bytes, layout)?, memory))
    }

    /// Maps the bitmap that the other side has made.
    pub(super) fn open(fd: OwnedFd, length: u64, layout: &MemoryLayout) -> Result<Self, MachineError> {
        let bytes = bitmap_bytes(layout).max(8);
        if length < bytes {
            let message = format!("the dirty bitmap has {length} bytes, the memory layout needs {bytes}");
            return Err(MachineError::new("start_dirty", message));
        }
        let memory = SharedMemory::from_fd(fd, bytes).map_err(|e| failed(&e))?;
        Self::over(&memory, bytes, layout)
    }

    fn over(memory: &SharedMemory, bytes: u64, layout: &MemoryLayout) -> Result<Self, MachineError> {
        let mapping = memory.map(0, bytes, Access::ReadWrite).map_err(|e| failed(&e))?;
        let mut first_word = 0;
        let mut regions = Vec::with_capacity(layout.regions.len());
        for region in &layout.regions {
            regions.push(BitmapRegion { gpa: region.gpa.0, size: region.size, first_word });
            first_word += words(region.size);
        }
        Ok(Self { mapping, regions })
    }

    /// Sets the bit of every page that `range` touches; what is outside the layout is an error.
    pub(super) fn set(&self, range: GpaRange) -> Result<(), MachineError> {
        let start = range.start.0;
        let end = range.end().ok_or_else(|| outside(range))?;
        let mut covered = 0;
        for region in &self.regions {
            let from = start.max(region.gpa);
            let to = end.min(region.gpa + region.size);
            if from >= to {
                continue;
            }
            covered += to - from;
            let last = (to - region.gpa - 1) / PAGE;
            let mut page = (from - region.gpa) / PAGE;
            while page <= last {
                let until = last.min(page | 63);
                let bits = (u64::MAX >> (63 - (until - page))) << (page % 64);
                let at = (region.first_word + page / 64) * 8;
                self.mapping.fetch_or_u64(at, bits.to_le()).map_err(|e| failed(&e))?;
                page = until + 1;
            }
        }
        if covered == range.length { Ok(()) } else { Err(outside(range)) }
    }

    /// Takes and clears: calls `dirty` with each run of set pages.
    pub(super) fn take(&self, dirty: &mut dyn FnMut(GpaRange)) -> Result<(), MachineError> {
        for region in &self.regions {
            let mut run: Option<(u64, u64)> = None;
            let pages = region.size.div_ceil(PAGE);
            for word in 0..words(region.size) {
                let at = (region.first_word + word) * 8;
                if self.mapping.load_u64(at).map_err(|e| failed(&e))? == 0 {
                    flush(region, &mut run, dirty);
                    continue;
                }
                let mut bits = u64::from_le(self.mapping.swap_u64(at, 0).map_err(|e| failed(&e))?);
                while bits != 0 {
                    let page = word * 64 + u64::from(bits.trailing_zeros());
                    bits &= bits - 1;
                    if page >= pages {
                        continue;
                    }
                    match &mut run {
                        Some((_, end)) if *end == page => *end = page + 1,
                        _ => {
                            flush(region, &mut run, dirty);
                            run = Some((page, page + 1));
                        }
                    }
                }
            }
            flush(region, &mut run, dirty);
        }
        Ok(())
    }
}

fn flush(region: &BitmapRegion, run: &mut Option<(u64, u64)>, dirty: &mut dyn FnMut(GpaRange)) {
    if let Some((first, end)) = run.take() {
        let length = (end * PAGE).min(region.size) - first * PAGE;
        dirty(GpaRange::new(region.gpa + first * PAGE, length));
    }
}

fn outside(range: GpaRange) -> MachineError {
    let message = format!("dirty range {} + {:#x} is not in the memory layout", range.start, range.length);
    MachineError::new("sync_dirty", message)
}

fn failed(error: &dyn std::error::Error) -> MachineError {
    MachineError::new("dirty bitmap", error.to_string())
}
