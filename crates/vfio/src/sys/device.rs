//! Requests on a device's descriptor: info, interrupts, reset, binding to iommufd.

use super::caps::{Caps, RawRegion};
use super::ioctl::{call, call_buffer, call_value, last_errno, size_of};
use airlift_core::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, vfio_device_attach_iommufd_pt,
    vfio_device_bind_iommufd, vfio_device_info, vfio_irq_info, vfio_region_info,
};

const DEVICE_GET_INFO: u8 = 107;
const DEVICE_GET_REGION_INFO: u8 = 108;
const DEVICE_GET_IRQ_INFO: u8 = 109;
const DEVICE_SET_IRQS: u8 = 110;
const DEVICE_RESET: u8 = 111;
const DEVICE_BIND_IOMMUFD: u8 = 118;
const DEVICE_ATTACH_IOMMUFD_PT: u8 = 119;

/// Most bytes of an answer with capabilities: a region with thousands of mapped areas.
const MAX_INFO: u32 = 1 << 20;
/// Most vectors of one VFIO_DEVICE_SET_IRQS: MSI-X has 2048.
const MAX_VECTORS: usize = 2048;

/// Another descriptor, close-on-exec, of what descriptor `number` of this process is open on: whoever
/// named the number keeps it.
pub(crate) fn duplicate(number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes any number and answers EBADF to one that is not open.
    match unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) } {
        fd if fd < 0 => Err(last_errno()),
        // SAFETY: the kernel has just made this descriptor for this call's caller.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

/// VFIO_DEVICE_GET_INFO: flags, number of regions, number of interrupt indexes.
pub(crate) fn device_info(fd: BorrowedFd<'_>) -> Result<(u32, u32, u32), Errno> {
    let mut info = vfio_device_info { argsz: size_of::<vfio_device_info>(), ..Default::default() };
    // SAFETY: a structure of this request with its own size, without pointers.
    unsafe { call(fd, DEVICE_GET_INFO, &mut info) }?;
    Ok((info.flags, info.num_regions, info.num_irqs))
}

/// VFIO_DEVICE_GET_REGION_INFO. Asked a second time with more room where the region has capabilities.
pub(crate) fn region_info(fd: BorrowedFd<'_>, index: u32) -> Result<RawRegion, Errno> {
    let fixed = size_of::<vfio_region_info>();
    let mut room = fixed;
    loop {
        let mut words = vec![0_u64; usize::try_from(room.div_ceil(8)).unwrap_or(4)];
        // argsz and flags; index and cap_offset.
        words[0] = pair(room, 0);
        words[1] = pair(index, 0);
        // SAFETY: the buffer has the size that it states, at least that of the fixed structure, which
        // has no pointers.
        unsafe { call_buffer(fd, DEVICE_GET_REGION_INFO, &mut words) }?;
        let (argsz, flags) = halves(words[0]);
        if argsz > room && room == fixed && argsz <= MAX_INFO {
            room = argsz;
            continue;
        }
        let (_, first) = halves(words[1]);
        let first = if argsz > room { 0 } else { first };
        return Ok(RawRegion { flags, size: words[2], offset: words[3], caps: Caps::new(&words, first) });
    }
}

/// Two u32 fields that follow each other, as one word.
pub(super) const fn pair(first: u32, second: u32) -> u64 {
    let [a, b, c, d] = first.to_ne_bytes();
    let [e, f, g, h] = second.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// The two u32 fields of a word.
pub(super) const fn halves(word: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))
}

/// VFIO_DEVICE_GET_IRQ_INFO: flags and number of vectors.
pub(crate) fn irq_info(fd: BorrowedFd<'_>, index: u32) -> Result<(u32, u32), Errno> {
    let mut info = vfio_irq_info { argsz: size_of::<vfio_irq_info>(), index, ..Default::default() };
    // SAFETY: a structure of this request with its own size, without pointers.
    unsafe { call(fd, DEVICE_GET_IRQ_INFO, &mut info) }?;
    Ok((info.flags, info.count))
}

/// What VFIO_DEVICE_SET_IRQS is given for its vectors.
#[derive(Debug)]
pub(crate) enum IrqData<'a> {
    /// Nothing, for so many vectors; 0 with ACTION_TRIGGER switches the index off.
    None(u32),
    /// An eventfd for each, or none.
    Eventfd(&'a [Option<BorrowedFd<'a>>]),
}

/// VFIO_DEVICE_SET_IRQS with `action`, one of `VFIO_IRQ_SET_ACTION_*`.
pub(crate) fn set_irqs(
    fd: BorrowedFd<'_>,
    index: u32,
    start: u32,
    action: u32,
    data: &IrqData<'_>,
) -> Result<(), Errno> {
    let (kind, count, bytes): (_, _, Vec<u8>) = match data {
        IrqData::None(count) => (VFIO_IRQ_SET_DATA_NONE, *count, Vec::new()),
        IrqData::Eventfd(fds) => {
            let numbers = fds.iter().map(|fd| fd.as_ref().map_or(-1, AsRawFd::as_raw_fd));
            (VFIO_IRQ_SET_DATA_EVENTFD, vectors(fds.len())?, numbers.flat_map(i32::to_ne_bytes).collect())
        }
    };
    // argsz, flags, index, start, count, data.
    let size = u32::try_from(20 + bytes.len()).map_err(|_| Errno::EINVAL)?;
    let head = [size, action | kind, index, start, count];
    let mut all: Vec<u8> = head.iter().flat_map(|n| n.to_ne_bytes()).collect();
    all.extend(bytes);
    all.resize(all.len().next_multiple_of(8), 0);
    let mut words: Vec<u64> = all.as_chunks::<8>().0.iter().map(|c| u64::from_ne_bytes(*c)).collect();
    // SAFETY: the buffer has at least the size that it states, and count matches its data; the
    // descriptors in it are borrowed for the length of the call, and the kernel takes its own references.
    match unsafe { call_buffer(fd, DEVICE_SET_IRQS, &mut words) } {
        Ok(0) => Ok(()),
        // So many vectors could be had instead, and none is on.
        Ok(_) => Err(Errno::ENOSPC),
        Err(errno) => Err(errno),
    }
}

fn vectors(count: usize) -> Result<u32, Errno> {
    u32::try_from(count).ok().filter(|_| count <= MAX_VECTORS).ok_or(Errno::EINVAL)
}

/// VFIO_DEVICE_RESET.
pub(crate) fn reset(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the request has no argument.
    unsafe { call_value(fd, DEVICE_RESET, 0) }.map(|_| ())
}

/// VFIO_DEVICE_BIND_IOMMUFD: the device's number in that iommufd.
pub(crate) fn bind_iommufd(fd: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut bind = vfio_device_bind_iommufd {
        argsz: size_of::<vfio_device_bind_iommufd>(),
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: a structure of this request with its own size; its pointer is null and not flagged as given.
    unsafe { call(fd, DEVICE_BIND_IOMMUFD, &mut bind) }?;
    Ok(bind.out_devid)
}

/// VFIO_DEVICE_ATTACH_IOMMUFD_PT: the page table that it is attached to now.
pub(crate) fn attach_pt(fd: BorrowedFd<'_>, pt: u32) -> Result<u32, Errno> {
    let mut attach = vfio_device_attach_iommufd_pt {
        // Without the field for a PASID, which older kernels do not know.
        argsz: 12,
        pt_id: pt,
        ..Default::default()
    };
    // SAFETY: a structure of this request that is longer than the size that it states, without pointers.
    unsafe { call(fd, DEVICE_ATTACH_IOMMUFD_PT, &mut attach) }?;
    Ok(attach.pt_id)
}
