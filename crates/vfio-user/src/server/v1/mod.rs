//! The migration region of interface v1, as the server makes it for a device (V1-REGION).
//!
//! ```text
//!  0        32            start                                 start + section
//!  | fields |   nothing   | data section: trapped, or partly mapped |
//! ```
//!
//! The device never sees the region. Here stands what it looks like and the memory behind its data
//! section; `access` says what a client may do with it and when, on the device thread; `chunks` does
//! what may take time, on the data thread.
//!
//! Each client has a data section of its own, and in it each session begins with nothing (V1-PRIVATE).
//!
//! Not checked here: what a client writes into parts that it has mapped. It is copied out when the
//! client says that it is whole, and judged by the device.

mod access;
mod chunks;
mod round;

pub(super) use chunks::{Chunk, Task};
pub(super) use round::Round;

use crate::codec::RegionAccess;
use crate::section::PAGE;
use crate::{Description, DescriptionError, V1Section};
use airlift_core::Errno;
use airlift_core::v1::{DATA_OFFSET, DATA_SIZE, DEVICE_STATE, INFO_SIZE, PENDING_BYTES, RESERVED};
use airlift_memory::{Access, Mapping, SharedMemory};
use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;
use std::io;
use std::os::fd::BorrowedFd;

/// The first index that is not one of VFIO's own regions of a PCI device.
const FIRST_FREE: u32 = 9;
/// What an access is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    State,
    Reserved,
    Pending,
    DataOffset,
    DataSize,
    /// The data section; bytes from its start.
    Section(u64),
}

/// The region of one device, for one client.
#[derive(Debug)]
pub(super) struct V1Region {
    pub(super) index: u32,
    section: V1Section,
    /// Where the data section begins in the region, in bytes.
    start: u64,
    /// What clients may map: `(offset, length)` in the region.
    areas: Vec<(u64, u64)>,
    /// The same as `(start, end)` in the section, in order.
    mapped: Vec<(u64, u64)>,
    /// Offsets in the file are those of the region.
    file: SharedMemory,
    memory: Mapping,
}

impl V1Region {
    /// The region with this section of a device that is described so.
    ///
    /// An error of kind `InvalidInput` holds a [`DescriptionError`]; others are of the system, which gives
    /// no memory.
    pub(super) fn of(description: &Description, section: &V1Section) -> io::Result<Self> {
        let parts = section.parts().map_err(DescriptionError::from)?;
        let start = if parts.is_empty() { INFO_SIZE } else { PAGE };
        let mut mapped: Vec<_> = parts.iter().map(|&(offset, length)| (offset, offset + length)).collect();
        mapped.sort_unstable();
        let areas = parts.into_iter().map(|(offset, length)| (start + offset, length)).collect();
        let taken = |index: &u32| description.regions.iter().any(|r| r.index == *index);
        // The last number is none: a device has one region more than it.
        let index = (FIRST_FREE..u32::MAX).find(|index| !taken(index)).ok_or(DescriptionError::Index)?;
        let (file, memory) = memory(start + section.size)?;
        Ok(Self { index, section: section.clone(), start, areas, mapped, file, memory })
    }

    /// The same region for another client: with memory that nobody has seen, all zero.
    ///
    /// An error is of the system, which gives no memory.
    pub(super) fn renewed(&self) -> io::Result<Self> {
        let (file, memory) = memory(self.size())?;
        let (section, areas, mapped) = (self.section.clone(), self.areas.clone(), self.mapped.clone());
        Ok(Self { index: self.index, section, start: self.start, areas, mapped, file, memory })
    }

    /// Forgets what is in the data section, for all who map it. The memory goes back to the system, so that
    /// a section of which little was used costs little.
    pub(super) fn wipe(&self) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let wiped = retry_on_intr(|| rustix::fs::fallocate(self.file.fd(), flags, 0, self.file.size()));
        if let Err(error) = wiped {
            // It is still the same client's.
            tracing::error!(%error, "what a session left in the data section stays");
        }
    }

    /// Its size in bytes.
    const fn size(&self) -> u64 {
        self.start + self.section.size
    }

    pub(super) const fn takes_whole_transactions(&self) -> bool {
        self.section.whole_transactions
    }

    /// The file to be mapped, where a part may be.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        (!self.areas.is_empty()).then(|| self.file.fd())
    }

    /// What an access is about. Fields are accessed whole and alone (V1-FIELDS).
    fn place(&self, access: &RegionAccess) -> Result<Place, Errno> {
        let count = u64::from(access.count);
        let end = access.offset.checked_add(count).filter(|end| *end <= self.size()).ok_or(Errno::EINVAL)?;
        match (access.offset, count) {
            (DEVICE_STATE, 4) => Ok(Place::State),
            (RESERVED, 4) => Ok(Place::Reserved),
            (PENDING_BYTES, 8) => Ok(Place::Pending),
            (DATA_OFFSET, 8) => Ok(Place::DataOffset),
            (DATA_SIZE, 8) => Ok(Place::DataSize),
            (offset, _) if offset >= self.start && end > offset => Ok(Place::Section(offset - self.start)),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Copies data into the section, at a place that was checked.
    fn put(&self, at: u64, data: &[u8]) -> Result<(), Errno> {
        self.memory.write(self.start + at, data).map_err(|_| Errno::EFAULT)
    }

    /// Copies data out of the section, as [`put`](Self::put).
    fn get(&self, at: u64, buf: &mut [u8]) -> Result<(), Errno> {
        self.memory.read(self.start + at, buf).map_err(|_| Errno::EFAULT)
    }
}

/// Memory for a region of this size, mapped whole.
fn memory(size: u64) -> io::Result<(SharedMemory, Mapping)> {
    let file = SharedMemory::create("vfio-migration", size.next_multiple_of(PAGE)).map_err(|error| {
        io::Error::new(error.kind(), format!("the memory of the data section cannot be made: {error}"))
    })?;
    let memory = file.map(0, file.size(), Access::ReadWrite).map_err(|error| {
        io::Error::other(format!("the memory of the data section cannot be mapped: {error}"))
    })?;
    Ok((file, memory))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RegionDescription, V1Mapping};
    use airlift_core::v1::bits::{bits_of, effects};
    use airlift_core::{Capabilities, StateFormat, arcs, path};

    fn region(size: u64, mapping: V1Mapping, regions: &[u32]) -> V1Region {
        let region =
            |&index| RegionDescription { index, size: 16, readable: true, writable: true, mapping: None };
        let description = Description {
            regions: regions.iter().map(region).collect(),
            irqs: Vec::new(),
            pci: None,
            migration: None,
            format: StateFormat { name: String::new(), version: 0, accepts: vec![], interfaces: vec![] },
        };
        let section = V1Section { size, mapping, whole_transactions: false };
        V1Region::of(&description, &section).unwrap()
    }

    // V1-REGION
    #[test]
    fn the_section_begins_at_a_page_where_a_part_of_it_is_mapped() {
        let laid = |size, mapping| {
            let region = region(size, mapping, &[0, 9, 10]);
            assert_eq!(region.index, 11);
            assert_eq!(region.fd().is_some(), !region.areas.is_empty());
            (region.start, region.size(), region.areas)
        };
        assert_eq!(laid(10_000, V1Mapping::Trapped), (32, 10_032, vec![]));
        assert_eq!(laid(10_000, V1Mapping::Mapped), (4096, 14_096, vec![(4096, 8192)]));
        assert_eq!(laid(4095, V1Mapping::Mapped), (32, 4127, vec![]), "no whole page of it");
        let sparse = V1Mapping::Sparse(vec![(8192, 4096), (0, 8192)]);
        assert_eq!(laid(20_000, sparse), (4096, 24_096, vec![(12_288, 4096), (4096, 8192)]));
        assert_eq!(laid(1, V1Mapping::Sparse(vec![])), (32, 33, vec![]));
    }

    // V1-FIELDS, V1-BOUNDS
    #[test]
    fn only_whole_fields_and_data_in_the_section_can_be_accessed() {
        for mapping in [V1Mapping::Trapped, V1Mapping::Mapped] {
            let region = region(8192, mapping, &[]);
            let place = |offset, count| region.place(&RegionAccess { offset, region: 9, count }).ok();
            let fields = [(0, 4), (4, 4), (8, 8), (16, 8), (24, 8)];
            for offset in 0..region.start {
                for count in 0..=17 {
                    assert_eq!(place(offset, count).is_some(), fields.contains(&(offset, count)));
                }
            }
            assert_eq!(place(region.start, 1), Some(Place::Section(0)));
            assert_eq!(place(region.start + 8000, 192), Some(Place::Section(8000)));
            assert_eq!(place(region.start + 8000, 193), None);
            assert_eq!(place(region.start, 0), None);
            assert_eq!(place(u64::MAX - 3, 8), None);
            assert_eq!(place(u64::MAX, u32::MAX), None);
        }
    }

    // V1-ORDER
    #[test]
    fn a_device_that_is_walked_arc_by_arc_does_what_one_write_means() {
        let inside = Capabilities::v2(5).unwrap();
        let bits = |state| bits_of(state).unwrap();
        let all = arcs(&Capabilities::v1(1, false));
        assert_eq!(all.len(), 13);
        for arc in all {
            let walked: Vec<_> = path(arc.from, arc.to, &inside)
                .unwrap()
                .into_iter()
                .flat_map(|step| effects(bits(step.from), bits(step.to)))
                .collect();
            let meant: Vec<_> = effects(bits(arc.from), bits(arc.to)).collect();
            assert_eq!(walked, meant, "{arc}");
        }
    }
}
