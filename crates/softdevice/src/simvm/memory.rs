//! The guest's memory, which of its pages were written, and whether they hold what they must.

use super::config::{SimVmConfig, SimVmError};
use super::content::{BOOT, PAGE, PAGE_BYTES, fill_page};
use super::layout::{HIGH_START, Pages, Role};
use airlift_core::{Gpa, GpaRange, MemoryLayout, MemoryRegion};
use airlift_memory::{Access, GuestMemory, GuestRegion, Mapping, MemoryError, SharedMemory, is_zero};
use std::sync::atomic::{AtomicU64, Ordering};

/// Guest memory in two memfds, below and above the hole, with a dirty bitmap.
///
/// Writers write first and mark then. Marks are made whether somebody tracks or not: whoever begins
/// to track clears, and finds in memory whatever was marked before.
#[derive(Debug)]
pub(super) struct VmMemory {
    pub(super) pages: Pages,
    pub(super) files: [SharedMemory; 2],
    mappings: [Mapping; 2],
    pub(super) guest: GuestMemory,
    seed: u64,
    dirty: Vec<AtomicU64>,
}

impl VmMemory {
    pub(super) fn new(config: &SimVmConfig) -> Result<Self, SimVmError> {
        let pages = Pages::new(config)?;
        let file = |name, bytes| {
            SharedMemory::create(name, bytes)
                .map_err(|source| SimVmError::System { what: "memfd for guest memory", source })
        };
        let low = pages.low * PAGE_BYTES;
        let files = [file("simvm-low", low)?, file("simvm-high", config.memory - low)?];
        let map = |file: &SharedMemory| file.map(0, file.size(), Access::ReadWrite);
        let mappings = [map(&files[0])?, map(&files[1])?];
        let region = |gpa, i: usize| GuestRegion { gpa, mapping: mappings[i].clone() };
        let guest = GuestMemory::new(vec![region(0, 0), region(HIGH_START, 1)])?;
        let dirty = std::iter::repeat_with(AtomicU64::default)
            .take(usize::try_from(pages.total.div_ceil(64)).unwrap_or(usize::MAX))
            .collect();
        Ok(Self { pages, files, mappings, guest, seed: config.seed, dirty })
    }

    pub(super) fn layout(&self) -> MemoryLayout {
        let region = |id, gpa, size| MemoryRegion { id, gpa: Gpa(gpa), size, page_size: PAGE_BYTES };
        let regions = vec![region(0, 0, self.files[0].size()), region(1, HIGH_START, self.files[1].size())];
        MemoryLayout { generation: 1, regions }
    }

    /// The mapping that holds a page, and the page's offset there.
    pub(super) fn place(&self, page: u64) -> (&Mapping, u64) {
        match page.checked_sub(self.pages.low) {
            None => (&self.mappings[0], page * PAGE_BYTES),
            Some(above) => (&self.mappings[1], above * PAGE_BYTES),
        }
    }

    /// Fills the pages that a guest fills when it boots.
    pub(super) fn boot(&self) -> Result<(), MemoryError> {
        for page in (0..self.pages.total).filter(|&p| self.pages.role(p) == Role::Boot) {
            self.write_page(page, BOOT)?;
        }
        Ok(())
    }

    /// Writes what `page` holds after step `step`, and marks it.
    pub(super) fn write_page(&self, page: u64, step: u64) -> Result<(), MemoryError> {
        let mut content = [0; PAGE];
        fill_page(&mut content, self.seed, page, step);
        let (mapping, offset) = self.place(page);
        mapping.write(offset, &content)?;
        self.mark(page);
        Ok(())
    }

    /// Marks a page as written. After the write.
    pub(super) fn mark(&self, page: u64) {
        if let Some(word) = usize::try_from(page / 64).ok().and_then(|i| self.dirty.get(i)) {
            word.fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    /// Forgets all marks.
    pub(super) fn clear_dirty(&self) {
        for word in &self.dirty {
            word.swap(0, Ordering::SeqCst);
        }
    }

    /// Takes all marks: calls `each` with runs of pages, none across the regions. A page for which
    /// `lose` is true is left out.
    pub(super) fn take_dirty(&self, mut lose: impl FnMut(u64) -> bool, each: &mut dyn FnMut(GpaRange)) {
        let mut run: Option<(u64, u64)> = None;
        let mut flush = |run: Option<(u64, u64)>| {
            if let Some((first, end)) = run {
                each(GpaRange::new(self.pages.gpa(first), (end - first) * PAGE_BYTES));
            }
        };
        for (word, marks) in (0..).zip(&self.dirty) {
            let mut bits =
                if marks.load(Ordering::SeqCst) == 0 { 0 } else { marks.swap(0, Ordering::SeqCst) };
            while bits != 0 {
                let page = word * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                if lose(page) {
                    continue;
                }
                match &mut run {
                    Some((_, end)) if *end == page && page != self.pages.low => *end = page + 1,
                    _ => flush(run.replace((page, page + 1))),
                }
            }
        }
        flush(run);
    }

    /// Copies a page.
    pub(super) fn read_page(&self, page: u64, content: &mut [u8; PAGE]) -> Result<(), MemoryError> {
        let (mapping, offset) = self.place(page);
        mapping.read(offset, content)
    }

    /// Whether `content` is what `page` holds after its last write, step `last`.
    pub(super) fn is_content(&self, content: &[u8; PAGE], page: u64, last: Option<u64>) -> bool {
        let Some(step) = last else { return is_zero(content) };
        let mut expected = [0; PAGE];
        fill_page(&mut expected, self.seed, page, step);
        *content == expected
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_come_out_once_as_runs_that_end_at_the_hole() {
        let config = SimVmConfig { memory: 4 << 20, ..SimVmConfig::default() };
        let memory = VmMemory::new(&config).unwrap();
        let take = |lose: u64| {
            let mut seen = Vec::new();
            memory.take_dirty(|p| p == lose, &mut |r| seen.push((r.start.0, r.length)));
            seen
        };
        for page in [3, 63, 64, 65, 511, 512, 1023] {
            memory.mark(page);
        }
        let high = |page: u64| HIGH_START + (page - 512) * 4096;
        let expected = [(63 * 4096, 3 * 4096), (511 * 4096, 4096), (high(512), 4096), (high(1023), 4096)];
        assert_eq!(take(3), expected);
        assert_eq!(take(3), []);
    }
}
