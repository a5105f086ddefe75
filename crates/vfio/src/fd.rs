//! A device's descriptor, and what can be asked and done on it apart from migration: info, regions,
//! interrupts, reset.
//!
//! Whether what a region holds makes sense is not checked here.

use crate::error::{protocol, refused};
use crate::sys::{self, Alarm, IrqData};
pub use airlift_core::RegionArea;
use airlift_core::{DeviceError, DeviceErrorKind, Errno};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_CAP_TYPE,
};

/// Most mapped areas of one region that are looked at.
const MAX_AREAS: usize = 4096;

/// A device's descriptor, shared by everything that uses the device. The last one dropped closes it,
/// which resets a real device.
#[derive(Clone, Debug)]
pub struct DeviceFd {
    fd: Arc<OwnedFd>,
    alarm: Alarm,
}

bitflags::bitflags! {
    /// What a device is (`VFIO_DEVICE_FLAGS_*`); flags without a name here are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceFlags: u32 {
        /// It can be reset.
        const RESET = 1;
        /// It is a PCI device: its regions and interrupts are numbered as vfio-pci does.
        const PCI = 2;
        const _ = !0;
    }

    /// What can be done with a region (`VFIO_REGION_INFO_FLAG_*`); flags without a name here are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RegionFlags: u32 {
        /// It can be read.
        const READ = 1;
        /// It can be written.
        const WRITE = 2;
        /// It, or parts of it, can be mapped.
        const MMAP = 4;
        const _ = !0;
    }
}

/// What VFIO_DEVICE_GET_INFO says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What the device is.
    pub flags: DeviceFlags,
    /// Regions that it has.
    pub regions: u32,
    /// Interrupt indexes that it has.
    pub irqs: u32,
}

/// What VFIO_DEVICE_GET_REGION_INFO says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Number of the region.
    pub index: u32,
    /// What can be done with it.
    pub flags: RegionFlags,
    /// Its size in bytes; 0 where there is none of this number.
    pub size: u64,
    /// Where it begins in the device's descriptor.
    pub offset: u64,
    /// Type and subtype, where it has a TYPE capability.
    pub kind: Option<(u32, u32)>,
    /// What can be mapped, in the driver's order, which is not sorted: the areas of its SPARSE_MMAP
    /// capability, all of it where it has none, nothing without [`RegionFlags::MMAP`].
    pub mappable: Vec<RegionArea>,
}

impl DeviceFd {
    /// Shares this descriptor.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd), alarm: Alarm::default() }
    }

    /// Whose calls end when the device's [`Interrupter`](airlift_core::Interrupter) is used.
    pub(crate) const fn alarm(&self) -> &Alarm {
        &self.alarm
    }

    /// What the device is.
    ///
    /// # Errors
    /// When the descriptor is not that of a VFIO device, or is one of a cdev that was not bound yet.
    pub fn info(&self) -> Result<DeviceInfo, DeviceError> {
        let (flags, regions, irqs) =
            sys::device_info(self.as_fd()).map_err(|e| refused("VFIO_DEVICE_GET_INFO", e))?;
        Ok(DeviceInfo { flags: DeviceFlags::from_bits_retain(flags), regions, irqs })
    }

    /// What region `index` is.
    ///
    /// # Errors
    /// EINVAL where there is no such region.
    pub fn region(&self, index: u32) -> Result<RegionInfo, DeviceError> {
        let operation = "VFIO_DEVICE_GET_REGION_INFO";
        let raw = sys::region_info(self.as_fd(), index).map_err(|e| refused(operation, e))?;
        let flags = RegionFlags::from_bits_retain(raw.flags);
        let find = |id| raw.caps.find(u16::try_from(id).unwrap_or(u16::MAX));
        let kind = find(VFIO_REGION_INFO_CAP_TYPE).and_then(|content| {
            let number = |at: usize| Some(u32::from_ne_bytes(*content.get(at..)?.first_chunk()?));
            Some((number(0)?, number(4)?))
        });
        let mappable = match find(VFIO_REGION_INFO_CAP_SPARSE_MMAP) {
            _ if !flags.contains(RegionFlags::MMAP) => Vec::new(),
            None => vec![RegionArea { offset: 0, length: raw.size }],
            Some(content) => sparse(content, raw.size).ok_or_else(|| {
                protocol(operation, format!("the mapped areas of region {index} do not lie in it"))
            })?,
        };
        Ok(RegionInfo { index, flags, size: raw.size, offset: raw.offset, kind, mappable })
    }

    /// Number of vectors of an interrupt index; 0 where there is none of this number.
    ///
    /// # Errors
    /// When the device does not answer.
    pub fn irq_count(&self, index: u32) -> Result<u32, DeviceError> {
        match sys::irq_info(self.as_fd(), index) {
            Ok((_, count)) => Ok(count),
            Err(Errno::EINVAL) => Ok(0),
            Err(errno) => Err(refused("VFIO_DEVICE_GET_IRQ_INFO", errno)),
        }
    }

    /// Gives the vectors of an interrupt index, from `start`, the eventfds that they signal.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn set_eventfds(
        &self,
        index: u32,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), DeviceError> {
        let data = IrqData::Eventfd(eventfds);
        sys::set_irqs(self.as_fd(), index, start, VFIO_IRQ_SET_ACTION_TRIGGER, &data)
            .map_err(|e| refused("VFIO_DEVICE_SET_IRQS", e))
    }

    /// Switches an interrupt index off.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn disable_irqs(&self, index: u32) -> Result<(), DeviceError> {
        sys::set_irqs(self.as_fd(), index, 0, VFIO_IRQ_SET_ACTION_TRIGGER, &IrqData::None(0))
            .map_err(|e| refused("VFIO_DEVICE_SET_IRQS", e))
    }

    /// Reads `buf` from `offset` of a region, in accesses as large as the driver takes.
    ///
    /// # Errors
    /// When it lies outside of the region, or the driver refuses or gives less.
    pub fn read_region(&self, region: &RegionInfo, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let operation = "read of a region";
        let mut at = place(region, offset, buf.len(), operation)?;
        let mut rest = buf;
        while !rest.is_empty() {
            match rustix::io::pread(&*self.fd, &mut *rest, at) {
                Ok(0) => return Err(protocol(operation, "the driver gave less than it says that it has")),
                Ok(read) => {
                    rest = rest.split_at_mut(read.min(rest.len())).1;
                    at += read as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(refused(operation, Errno(error.raw_os_error()))),
            }
        }
        Ok(())
    }

    /// Writes `data` to `offset` of a region, in accesses as large as the driver takes.
    ///
    /// # Errors
    /// When it lies outside of the region, or the driver refuses or takes less.
    pub fn write_region(&self, region: &RegionInfo, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let operation = "write of a region";
        let mut at = place(region, offset, data.len(), operation)?;
        let mut rest = data;
        while !rest.is_empty() {
            match rustix::io::pwrite(&*self.fd, rest, at) {
                Ok(0) => return Err(protocol(operation, "the driver took less than it says that it has")),
                Ok(written) => {
                    rest = rest.get(written..).unwrap_or_default();
                    at += written as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(refused(operation, Errno(error.raw_os_error()))),
            }
        }
        Ok(())
    }

    /// Resets the device: to RUNNING, whatever it was in (V2-ERROR); what it held is lost.
    ///
    /// # Errors
    /// When the driver cannot, or does not answer in `timeout`.
    pub fn reset(&self, timeout: Duration) -> Result<(), DeviceError> {
        self.alarm
            .call(timeout, || sys::reset(self.as_fd()))
            .map_err(|e| crate::error::ended("VFIO_DEVICE_RESET", e))
    }
}

/// The place in the descriptor of `length` bytes at `offset` of `region`.
fn place(region: &RegionInfo, offset: u64, length: usize, operation: &str) -> Result<u64, DeviceError> {
    let inside = offset.checked_add(length as u64).is_some_and(|end| end <= region.size);
    if inside {
        return Ok(region.offset.saturating_add(offset));
    }
    let message = format!(
        "{length} bytes at {offset:#x} are not in region {}, which has {} bytes",
        region.index, region.size
    );
    Err(DeviceError::new(DeviceErrorKind::Misuse, operation, message))
}

/// The areas of a SPARSE_MMAP capability; `None` when one does not lie in the region.
fn sparse(content: &[u8], size: u64) -> Option<Vec<RegionArea>> {
    let count = u32::from_ne_bytes(*content.first_chunk()?);
    let count = usize::try_from(count).ok().filter(|c| *c <= MAX_AREAS)?;
    let areas = content.get(8..)?.as_chunks::<16>().0.get(..count)?;
    let mut all = Vec::with_capacity(count);
    for area in areas {
        let word = |at: usize| area[at..].first_chunk::<8>().map_or(0, |b| u64::from_ne_bytes(*b));
        let (offset, length) = (word(0), word(8));
        if offset.checked_add(length)? > size {
            return None;
        }
        if length > 0 {
            all.push(RegionArea { offset, length });
        }
    }
    Some(all)
}

impl AsFd for DeviceFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capability(areas: &[(u64, u64)], count: u32) -> Vec<u8> {
        let mut bytes = [count.to_ne_bytes(), [0; 4]].concat();
        for (offset, length) in areas {
            bytes.extend(offset.to_ne_bytes());
            bytes.extend(length.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn areas_keep_their_order_and_must_lie_in_the_region() {
        let areas = sparse(&capability(&[(0x2000, 0x1000), (0, 0), (0, 0x1000)], 3), 0x3000).unwrap();
        assert_eq!(areas.iter().map(|a| a.offset).collect::<Vec<_>>(), [0x2000, 0]);
        assert_eq!(sparse(&capability(&[(0x2000, 0x1001)], 1), 0x3000), None);
        assert_eq!(sparse(&capability(&[(u64::MAX, 2)], 1), 0x3000), None);
        assert_eq!(sparse(&capability(&[(0, 1)], 2), 0x3000), None, "a count beyond the capability's end");
        assert_eq!(sparse(&capability(&[], u32::MAX), 0x3000), None);
    }

    #[test]
    fn an_access_outside_of_a_region_is_not_made() {
        let region = RegionInfo {
            index: 0,
            flags: RegionFlags::READ,
            size: 0x100,
            offset: 0x1000,
            kind: None,
            mappable: Vec::new(),
        };
        assert_eq!(place(&region, 0xf0, 0x10, "x"), Ok(0x10f0));
        assert!(place(&region, 0xf1, 0x10, "x").is_err());
        assert!(place(&region, u64::MAX, 2, "x").is_err());
    }
}
