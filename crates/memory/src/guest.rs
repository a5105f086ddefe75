//! Guest memory: mappings at guest-physical addresses.

use crate::{Mapping, MemoryError};
use std::sync::Arc;

/// One region of guest memory.
#[derive(Clone, Debug)]
pub struct GuestRegion {
    /// Where the guest sees it, in bytes.
    pub gpa: u64,
    /// What is there.
    pub mapping: Mapping,
}

/// The memory of a guest. Clones are the same memory. An access that touches several regions that
/// adjoin is split; one that touches an address without memory is refused whole.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    regions: Arc<[GuestRegion]>,
}

impl GuestMemory {
    /// Memory of these regions, in any order.
    ///
    /// # Errors
    /// [`MemoryError::Overlap`] when two share an address or one reaches beyond 2^64.
    pub fn new(mut regions: Vec<GuestRegion>) -> Result<Self, MemoryError> {
        regions.sort_by_key(|r| r.gpa);
        for (i, region) in regions.iter().enumerate() {
            let next = regions.get(i + 1);
            let end = region.gpa.checked_add(region.mapping.len());
            if end.is_none_or(|end| next.is_some_and(|next| next.gpa < end)) {
                let second = next.map_or(region.gpa, |next| next.gpa);
                return Err(MemoryError::Overlap { first: region.gpa, second });
            }
        }
        Ok(Self { regions: regions.into() })
    }

    /// The regions, by address.
    #[must_use]
    pub fn regions(&self) -> &[GuestRegion] {
        &self.regions
    }

    /// Bytes of all regions.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.regions.iter().map(|r| r.mapping.len()).sum()
    }

    /// The region that holds `gpa`, and the offset of it there.
    #[must_use]
    pub fn find(&self, gpa: u64) -> Option<(&GuestRegion, u64)> {
        let after = self.regions.partition_point(|r| r.gpa <= gpa);
        let region = &self.regions[after.checked_sub(1)?];
        let offset = gpa - region.gpa;
        (offset < region.mapping.len()).then_some((region, offset))
    }

    /// Calls `each(mapping, offset in it, position in the access, length)` for every piece of the range, after all of
    /// it was found to be there.
    fn pieces(
        &self,
        gpa: u64,
        length: usize,
        mut each: impl FnMut(&Mapping, u64, usize, usize) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        for check_only in [true, false] {
            let mut done = 0;
            while done < length {
                let at = gpa.checked_add(done as u64).ok_or(MemoryError::Unmapped { gpa: u64::MAX })?;
                let (region, offset) = self.find(at).ok_or(MemoryError::Unmapped { gpa: at })?;
                let left = usize::try_from(region.mapping.len() - offset).unwrap_or(usize::MAX);
                let piece = left.min(length - done);
                if !check_only {
                    each(&region.mapping, offset, done, piece)?;
                }
                done += piece;
            }
        }
        Ok(())
    }

    /// As [`Mapping::next_data`], in addresses. An address without memory counts as data, so that the access
    /// which follows finds it.
    #[must_use]
    pub fn next_data(&self, gpa: u64, length: u64) -> Option<u64> {
        let mut at = gpa;
        let mut left = length;
        while left > 0 {
            let Some((region, offset)) = self.find(at) else { return Some(at) };
            let here = left.min(region.mapping.len() - offset);
            if let Some(found) = region.mapping.next_data(offset, here) {
                return Some(at + (found - offset));
            }
            left -= here;
            // Not beyond 2^64: a region ends before it.
            at = at.saturating_add(here);
        }
        None
    }

    /// Copies bytes out, as [`Mapping::read`].
    ///
    /// # Errors
    /// When an address has no memory; `buf` is then untouched.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.pieces(gpa, buf.len(), |mapping, offset, at, len| mapping.read(offset, &mut buf[at..at + len]))
    }

    /// Copies bytes in, as [`Mapping::write`].
    ///
    /// # Errors
    /// When an address has no memory (nothing is then written) or a region is read-only.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.pieces(gpa, data.len(), |mapping, offset, at, len| mapping.write(offset, &data[at..at + len]))
    }

    /// Sets `length` bytes to `byte`.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn fill(&self, gpa: u64, length: u64, byte: u8) -> Result<(), MemoryError> {
        let length = usize::try_from(length).map_err(|_| MemoryError::Unmapped { gpa: u64::MAX })?;
        self.pieces(gpa, length, |mapping, offset, _, len| mapping.fill(offset, len as u64, byte))
    }

    /// As [`Mapping::load_u64`].
    ///
    /// # Errors
    /// When there is no memory, or the word is misaligned in its region or crosses its end.
    pub fn load_u64(&self, gpa: u64) -> Result<u64, MemoryError> {
        let (region, offset) = self.find(gpa).ok_or(MemoryError::Unmapped { gpa })?;
        region.mapping.load_u64(offset)
    }

    /// As [`Mapping::store_u64`].
    ///
    /// # Errors
    /// As [`load_u64`](Self::load_u64), and when the region is read-only.
    pub fn store_u64(&self, gpa: u64, value: u64) -> Result<(), MemoryError> {
        let (region, offset) = self.find(gpa).ok_or(MemoryError::Unmapped { gpa })?;
        region.mapping.store_u64(offset, value)
    }
}
