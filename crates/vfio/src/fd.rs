//! A device's descriptor, and what can be asked and done on it apart from migration: info, regions,
//! interrupts, reset.
//!
//! Whether what a region holds makes sense is not checked here.

use crate::error::{ended, protocol};
use crate::region::whole;
use crate::sys::{self, Alarm, CallError, IrqData};
pub use airlift_core::RegionArea;
use airlift_core::{DeviceError, DeviceErrorKind, Errno};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_CAP_TYPE,
};

/// How long the driver may take over one request: some are made while the guest stands still.
const ANSWER: Duration = Duration::from_secs(5);
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

    /// Makes a request that ends when the alarm is rung, or when it takes longer than `limit`.
    fn within<T>(
        &self,
        limit: Duration,
        operation: &str,
        call: impl FnMut() -> Result<T, Errno>,
    ) -> Result<T, DeviceError> {
        self.alarm.call(limit, call).map_err(|e| ended(operation, e))
    }

    /// What the device is.
    ///
    /// # Errors
    /// When the descriptor is not that of a VFIO device, or is one of a cdev that was not bound yet.
    pub fn info(&self) -> Result<DeviceInfo, DeviceError> {
        let ask = || sys::device_info(self.as_fd());
        let (flags, regions, irqs) = self.within(ANSWER, "VFIO_DEVICE_GET_INFO", ask)?;
        Ok(DeviceInfo { flags: DeviceFlags::from_bits_retain(flags), regions, irqs })
    }

    /// What region `index` is.
    ///
    /// # Errors
    /// EINVAL where there is no such region.
    pub fn region(&self, index: u32) -> Result<RegionInfo, DeviceError> {
        let operation = "VFIO_DEVICE_GET_REGION_INFO";
        let raw = self.within(ANSWER, operation, || sys::region_info(self.as_fd(), index))?;
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
        match self.alarm.call(ANSWER, || sys::irq_info(self.as_fd(), index)) {
            Ok((_, count)) => Ok(count),
            Err(CallError::Errno(Errno::EINVAL)) => Ok(0),
            Err(error) => Err(ended("VFIO_DEVICE_GET_IRQ_INFO", error)),
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
        self.set_irqs(index, start, &IrqData::Eventfd(eventfds))
    }

    /// Switches an interrupt index off.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn disable_irqs(&self, index: u32) -> Result<(), DeviceError> {
        self.set_irqs(index, 0, &IrqData::None(0))
    }

    fn set_irqs(&self, index: u32, start: u32, data: &IrqData<'_>) -> Result<(), DeviceError> {
        let set = || sys::set_irqs(self.as_fd(), index, start, VFIO_IRQ_SET_ACTION_TRIGGER, data);
        self.within(ANSWER, "VFIO_DEVICE_SET_IRQS", set)
    }

    /// Reads `buf` from `offset` of a region, in accesses as large as the driver takes.
    ///
    /// # Errors
    /// When it lies outside of the region, or the driver refuses, gives less, or does not answer in 5 s.
    pub fn read_region(&self, region: &RegionInfo, offset: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let operation = "read of a region";
        let at = place(region, offset, buf.len(), operation)?;
        whole(operation, false, buf.len(), |done| {
            let read = || rustix::io::pread(&*self.fd, &mut buf[done..], at + done as u64);
            self.within(ANSWER, operation, number(read))
        })
    }

    /// Writes `data` to `offset` of a region, in accesses as large as the driver takes.
    ///
    /// # Errors
    /// When it lies outside of the region, or the driver refuses, takes less, or does not answer in 5 s.
    pub fn write_region(&self, region: &RegionInfo, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let operation = "write of a region";
        let at = place(region, offset, data.len(), operation)?;
        whole(operation, false, data.len(), |done| {
            let write = || rustix::io::pwrite(&*self.fd, &data[done..], at + done as u64);
            self.within(ANSWER, operation, number(write))
        })
    }

    /// Resets the device: to RUNNING, whatever it was in (V2-ERROR); what it held is lost.
    ///
    /// # Errors
    /// When the driver cannot, or does not answer in `timeout`.
    pub fn reset(&self, timeout: Duration) -> Result<(), DeviceError> {
        self.within(timeout, "VFIO_DEVICE_RESET", || sys::reset(self.as_fd()))
    }
}

/// The same call with the error's number.
fn number<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> impl FnMut() -> Result<T, Errno> {
    move || call().map_err(|error| Errno(error.raw_os_error()))
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

    fn file(content: &[u8]) -> DeviceFd {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, content).unwrap();
        DeviceFd::new(file.into())
    }

    fn region(size: u64) -> RegionInfo {
        RegionInfo {
            index: 0,
            flags: RegionFlags::READ | RegionFlags::WRITE,
            size,
            offset: 4,
            kind: None,
            mappable: Vec::new(),
        }
    }

    #[test]
    fn a_region_is_read_and_written_where_it_lies_and_a_driver_that_has_less_is_noticed() {
        let fd = file(b"0123456789");
        let mut got = [0; 4];
        fd.write_region(&region(8), 1, b"ab").unwrap();
        fd.read_region(&region(8), 0, &mut got).unwrap();
        assert_eq!(&got, b"4ab7");
        assert_eq!(fd.read_region(&region(8), 4, &mut got).unwrap_err().kind, DeviceErrorKind::Protocol);
    }

    // K-GIVE-UP
    #[test]
    fn a_request_that_the_driver_does_not_answer_ends() {
        let fd = file(b"");
        let late = fd.within(Duration::from_millis(5), "x", || Err::<(), _>(Errno::EINTR)).unwrap_err();
        assert_eq!((late.kind, late.errno), (DeviceErrorKind::TimedOut, Some(Errno::ETIMEDOUT)));
        // By the device's interrupter.
        let alarm = fd.alarm().clone();
        let rung = fd.within(Duration::from_secs(60), "x", || {
            alarm.ring();
            Err::<(), _>(Errno::EINTR)
        });
        assert_eq!(rung.unwrap_err().kind, DeviceErrorKind::Interrupted);
    }

    #[test]
    fn an_access_outside_of_a_region_is_not_made() {
        let region = RegionInfo { offset: 0x1000, ..region(0x100) };
        assert_eq!(place(&region, 0xf0, 0x10, "x"), Ok(0x10f0));
        assert!(place(&region, 0xf1, 0x10, "x").is_err());
        assert!(place(&region, u64::MAX, 2, "x").is_err());
    }
}
