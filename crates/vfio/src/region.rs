//! A region of a kernel device as [`RegionAccess`]: reads and writes of the device's descriptor, and
//! mappings of what the driver lets be mapped.
//!
//! What the region holds is not looked at here.

use crate::error::{ended, protocol, refused};
use crate::sys::{Alarm, CallError};
use crate::{DeviceFd, RegionFlags, RegionInfo};
use airlift_core::v1::REGION_TYPE;
use airlift_core::{DeviceError, DeviceErrorKind, Errno, RegionAccess, RegionArea};
use airlift_memory::{Access, Mapping};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Most regions that a device may state: PCI devices have nine and a few of their own.
pub(crate) const MAX_REGIONS: u32 = 128;
/// How long one access may take: drivers answer some only when their data is there.
const ANSWER: Duration = Duration::from_secs(30);
/// How long the access after one that was given up may take: a driver that is stuck is not waited for
/// as long again.
const AFTER_GIVING_UP: Duration = Duration::from_secs(2);

const READ: &str = "read of a region";
const WRITE: &str = "write of a region";

/// Ends the accesses of one call when the device's alarm is rung while it is made, also when that is
/// between two of them. Clones share.
#[derive(Clone, Debug)]
pub(crate) struct Bell {
    alarm: Alarm,
    /// How often it had been rung when the call began, or when it ended an access.
    heard: Arc<AtomicU64>,
}

impl Bell {
    pub(crate) fn new(alarm: Alarm) -> Self {
        let heard = Arc::new(AtomicU64::new(alarm.rings()));
        Self { alarm, heard }
    }

    /// A call begins: what was rung before is not about it.
    pub(crate) fn begin(&self) {
        self.heard.store(self.alarm.rings(), Ordering::Release);
    }

    /// Makes an access. A ring ends one of a call, and not what is done about that as well.
    fn call<T>(&self, timeout: Duration, access: impl FnMut() -> Result<T, Errno>) -> Result<T, CallError> {
        let made = self.alarm.call_since(self.heard.load(Ordering::Acquire), timeout, access);
        if matches!(made, Err(CallError::Interrupted)) {
            self.begin();
        }
        made
    }
}

/// A region of a kernel device.
#[derive(Debug)]
pub struct KernelRegion {
    fd: DeviceFd,
    info: RegionInfo,
    areas: Vec<RegionArea>,
    /// One for each of `areas`.
    mappings: Vec<Mapping>,
    unmapped: Option<String>,
    answer: Duration,
    bell: Option<Bell>,
    /// The access before was given up.
    gave_up: bool,
}

/// Finds the migration region of interface v1: type 3, subtype 1 (V1-REGION). `None` where the device
/// has none.
///
/// # Errors
/// When the device does not answer, or the region is empty or cannot be read and written.
pub fn find_migration_region(fd: &DeviceFd) -> Result<Option<KernelRegion>, DeviceError> {
    let count = fd.info()?.regions;
    for index in 0..count.min(MAX_REGIONS) {
        let info = match fd.region(index) {
            Ok(info) => info,
            // A number without a region, such as that of VGA.
            Err(error) if error.errno == Some(Errno::EINVAL) => continue,
            Err(error) => return Err(error),
        };
        if info.kind == Some(REGION_TYPE) {
            if info.size == 0 || !info.flags.contains(RegionFlags::READ | RegionFlags::WRITE) {
                let message = format!(
                    "the migration region has {} bytes and flags {:#x}; it must be readable and writable",
                    info.size,
                    info.flags.bits()
                );
                return Err(protocol("VFIO_DEVICE_GET_REGION_INFO", message));
            }
            return KernelRegion::new(fd.clone(), info).map(Some);
        }
    }
    Ok(None)
}

impl KernelRegion {
    /// The region that `info` tells of, with all mapped that can be. Where mapping fails, that is said
    /// once in the log, and reads and writes are used (V1-MMAP).
    ///
    /// # Errors
    /// When the region has no bytes.
    pub fn new(fd: DeviceFd, info: RegionInfo) -> Result<Self, DeviceError> {
        if info.size == 0 {
            return Err(protocol("VFIO_DEVICE_GET_REGION_INFO", format!("region {} is empty", info.index)));
        }
        let mut region = Self {
            fd,
            info,
            areas: Vec::new(),
            mappings: Vec::new(),
            unmapped: None,
            answer: ANSWER,
            bell: None,
            gave_up: false,
        };
        region.map();
        Ok(region)
    }

    /// The same with another limit for one access; 30 s otherwise.
    #[must_use]
    pub const fn with_timeout(mut self, timeout: Duration) -> Self {
        self.answer = timeout;
        self
    }

    /// The same with accesses that end when this is rung.
    pub(crate) fn with_bell(mut self, bell: Bell) -> Self {
        self.bell = Some(bell);
        self
    }

    /// Why a part of it that the driver lets be mapped is not.
    #[must_use]
    pub fn unmapped(&self) -> Option<&str> {
        self.unmapped.as_deref()
    }

    /// What the driver says of the region.
    #[must_use]
    pub const fn info(&self) -> &RegionInfo {
        &self.info
    }

    fn map(&mut self) {
        let access = match self.info.flags.contains(RegionFlags::WRITE) {
            true => Access::ReadWrite,
            false => Access::ReadOnly,
        };
        for area in &self.info.mappable {
            let at = self.info.offset.saturating_add(area.offset);
            match Mapping::of_device(self.fd.as_fd(), at, area.length, access) {
                Ok(mapping) => {
                    self.areas.push(*area);
                    self.mappings.push(mapping);
                }
                Err(error) => {
                    self.unmapped.get_or_insert_with(|| {
                        format!("{} bytes at {:#x}: {error}", area.length, area.offset)
                    });
                }
            }
        }
        if let Some(error) = &self.unmapped {
            tracing::warn!(
                region = self.info.index,
                error,
                "a part of a region cannot be mapped; reads and writes are used, which are slower"
            );
        }
    }

    /// How long one call may take.
    fn limit(&self) -> Duration {
        if self.gave_up { self.answer.min(AFTER_GIVING_UP) } else { self.answer }
    }

    /// Makes an access in as many calls as the driver wants. `once` goes on where so many bytes are done.
    fn access(
        &mut self,
        operation: &str,
        field: bool,
        length: usize,
        mut once: impl FnMut(usize) -> Result<usize, Errno>,
    ) -> Result<(), DeviceError> {
        let limit = self.limit();
        let made = whole(operation, field, length, |done| {
            let called = match &self.bell {
                Some(bell) => bell.call(limit, || once(done)),
                None => self.fd.alarm().call(limit, || once(done)),
            };
            called.map_err(|error| ended(operation, error))
        });
        let gave_up =
            |e: &DeviceError| matches!(e.kind, DeviceErrorKind::TimedOut | DeviceErrorKind::Interrupted);
        self.gave_up = made.as_ref().is_err_and(gave_up);
        made
    }

    /// The place in the descriptor of `length` bytes at `offset`.
    fn place(&self, offset: u64, length: usize, operation: &str) -> Result<u64, DeviceError> {
        let inside = offset.checked_add(length as u64).is_some_and(|end| end <= self.info.size);
        let place = self.info.offset.checked_add(offset).filter(|_| inside);
        place.ok_or_else(|| {
            let message = format!("{length} bytes at {offset:#x} are not in {} bytes", self.info.size);
            DeviceError::new(DeviceErrorKind::Misuse, operation, message)
        })
    }

    /// The mapping in which `length` bytes at `offset` lie, and where in it.
    fn mapping(&self, offset: u64, length: usize, operation: &str) -> Result<(&Mapping, u64), DeviceError> {
        let end = offset.saturating_add(length as u64);
        let inside = |area: &RegionArea| offset >= area.offset && end <= area.offset + area.length;
        let found = self.areas.iter().zip(&self.mappings).find(|(area, _)| inside(area));
        found.map(|(area, mapping)| (mapping, offset - area.offset)).ok_or_else(|| {
            let message = format!("{length} bytes at {offset:#x} are not in one mapped area");
            DeviceError::new(DeviceErrorKind::Misuse, operation, message)
        })
    }
}

/// Whether an access must be made at once: a field of native width at its alignment.
const fn is_field(offset: u64, length: usize) -> bool {
    matches!(length, 1 | 2 | 4 | 8) && offset.is_multiple_of(length as u64)
}

/// Repeats `access`, which does a part and says how much, until `length` bytes are done. A field is
/// never done in parts.
pub(crate) fn whole(
    operation: &str,
    field: bool,
    length: usize,
    mut access: impl FnMut(usize) -> Result<usize, DeviceError>,
) -> Result<(), DeviceError> {
    let mut done = 0;
    while done < length {
        let part = access(done)?;
        if part == 0 || part > length - done {
            return Err(protocol(operation, "the driver has fewer bytes than it says"));
        }
        if field && part < length {
            return Err(protocol(operation, format!("the driver made {part} bytes of a field of {length}")));
        }
        done += part;
    }
    Ok(())
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno(error.raw_os_error())
}

impl RegionAccess for KernelRegion {
    fn size(&self) -> u64 {
        self.info.size
    }

    fn mapped(&self) -> &[RegionArea] {
        &self.areas
    }

    fn is_mappable(&self) -> bool {
        !self.info.mappable.is_empty()
    }

    fn read_trapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let at = self.place(offset, buf.len(), READ)?;
        let fd = self.fd.clone();
        self.access(READ, is_field(offset, buf.len()), buf.len(), |done| {
            rustix::io::pread(fd.as_fd(), &mut buf[done..], at + done as u64).map_err(errno)
        })
    }

    fn write_trapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let at = self.place(offset, data.len(), WRITE)?;
        let fd = self.fd.clone();
        self.access(WRITE, is_field(offset, data.len()), data.len(), |done| {
            rustix::io::pwrite(fd.as_fd(), &data[done..], at + done as u64).map_err(errno)
        })
    }

    fn read_mapped(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let (mapping, at) = self.mapping(offset, buf.len(), READ)?;
        mapping.read(at, buf).map_err(|e| refused(READ, Errno(e.raw_errno())))
    }

    fn write_mapped(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let (mapping, at) = self.mapping(offset, data.len(), WRITE)?;
        mapping.write(at, data).map_err(|e| refused(WRITE, Errno(e.raw_errno())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    /// A file in the place of a device: a region of 0x4000 bytes that begins at 0x1000 of it.
    fn region(mappable: &[(u64, u64)]) -> KernelRegion {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x5000).unwrap();
        let info = RegionInfo {
            index: 9,
            flags: RegionFlags::READ | RegionFlags::WRITE | RegionFlags::MMAP,
            size: 0x4000,
            offset: 0x1000,
            kind: Some(REGION_TYPE),
            mappable: mappable
                .iter()
                .map(|(offset, length)| RegionArea { offset: *offset, length: *length })
                .collect(),
        };
        KernelRegion::new(DeviceFd::new(OwnedFd::from(file)), info).unwrap()
    }

    #[test]
    fn mapped_and_trapped_accesses_reach_the_same_bytes() {
        let mut region = region(&[(0x3000, 0x1000), (0x1000, 0x1000)]);
        assert_eq!(region.mapped().len(), 2);
        let data: Vec<u8> = (0..0x3000_u32).map(|i| i.to_le_bytes()[1]).collect();
        airlift_core::region::write_data(&mut region, 0x800, &data).unwrap();
        let mut got = vec![0; data.len()];
        region.read_trapped(0x800, &mut got).unwrap();
        assert_eq!(got, data);
        region.write_trapped(0x1000, &7_u64.to_ne_bytes()).unwrap();
        let mut word = [0; 8];
        region.read_mapped(0x1000, &mut word).unwrap();
        assert_eq!(u64::from_ne_bytes(word), 7);
    }

    // V1-MMAP
    #[test]
    fn what_cannot_be_mapped_is_read_and_written() {
        // Not page aligned: the system refuses to map it.
        let mut region = region(&[(0x1100, 0x1000), (0x3000, 0x1000)]);
        assert_eq!(region.mapped(), [RegionArea { offset: 0x3000, length: 0x1000 }]);
        assert!(region.unmapped().unwrap().contains("0x1100"), "{:?}", region.unmapped());
        let mut got = vec![1; 0x3000];
        airlift_core::region::read_data(&mut region, 0x1000, &mut got).unwrap();
        assert_eq!(got, [0; 0x3000]);
        assert_eq!(region.read_mapped(0x1100, &mut [0; 8]).unwrap_err().kind, DeviceErrorKind::Misuse);
    }

    #[test]
    fn an_access_outside_of_the_region_is_not_made() {
        let mut region = region(&[]);
        for (offset, length) in [(0x3ff9, 8), (u64::MAX, 8)] {
            let error = region.read_trapped(offset, &mut vec![0; length]).unwrap_err();
            assert_eq!(error.kind, DeviceErrorKind::Misuse);
            assert!(region.write_trapped(offset, &vec![0; length]).is_err());
        }
    }

    // K-GIVE-UP
    #[test]
    fn an_interruption_between_two_accesses_of_a_call_ends_the_call_and_no_other() {
        let region = region(&[]);
        let alarm = region.fd.alarm().clone();
        let bell = Bell::new(alarm.clone());
        let mut region = region.with_bell(bell.clone());
        let mut word = [0; 8];
        // While there was no call.
        alarm.ring();
        bell.begin();
        region.read_trapped(0, &mut word).unwrap();
        alarm.ring();
        let error = region.write_trapped(0, &[0; 8]).unwrap_err();
        assert_eq!((error.kind, error.errno), (DeviceErrorKind::Interrupted, Some(Errno::EINTR)));
        // The state is read back after it.
        region.read_trapped(0, &mut word).unwrap();
    }

    // K-GIVE-UP
    #[test]
    fn a_driver_that_is_stuck_is_not_waited_for_as_long_again() {
        let mut region = region(&[]).with_timeout(Duration::from_millis(5));
        let error = region.access(READ, true, 1, |_| Err(Errno::EINTR)).unwrap_err();
        assert_eq!(error.kind, DeviceErrorKind::TimedOut);
        let mut region = region.with_timeout(ANSWER);
        assert_eq!(region.limit(), AFTER_GIVING_UP);
        region.access(READ, true, 1, |_| Ok(1)).unwrap();
        assert_eq!(region.limit(), ANSWER);
    }

    #[test]
    fn a_field_that_comes_in_parts_is_an_error_and_data_is_not() {
        assert!(whole(READ, true, 8, |_| Ok(4)).is_err());
        let mut calls = 0;
        whole(READ, false, 8, |_| {
            calls += 1;
            Ok(4)
        })
        .unwrap();
        assert_eq!(calls, 2);
        assert!(
            whole(READ, false, 8, |_| Ok(0)).is_err(),
            "a driver that gives nothing is not asked for ever"
        );
    }
}
