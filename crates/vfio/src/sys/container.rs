//! Requests on groups and type1 containers.

use super::caps::Caps;
use super::device::{halves, pair};
use super::feature::holds;
use super::ioctl::{call, call_buffer, call_value, size_of};
use airlift_core::Errno;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
    VFIO_GROUP_FLAGS_CONTAINER_SET, VFIO_GROUP_FLAGS_VIABLE, VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_START, VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, VFIO_TYPE1v2_IOMMU, vfio_group_status, vfio_iommu_type1_dma_map,
};

const CHECK_EXTENSION: u8 = 101;
const SET_IOMMU: u8 = 102;
const GROUP_GET_STATUS: u8 = 103;
const GROUP_SET_CONTAINER: u8 = 104;
const GROUP_GET_DEVICE_FD: u8 = 106;
const IOMMU_GET_INFO: u8 = 112;
const IOMMU_MAP_DMA: u8 = 113;
const IOMMU_UNMAP_DMA: u8 = 114;
const IOMMU_DIRTY_PAGES: u8 = 117;

/// Most bytes of an answer with capabilities.
const MAX_INFO: u32 = 1 << 20;

/// VFIO_CHECK_EXTENSION for the second version of type1: whether the container has it.
pub(crate) fn check_extension(container: BorrowedFd<'_>) -> Result<bool, Errno> {
    // SAFETY: the argument is a number.
    unsafe { call_value(container, CHECK_EXTENSION, number(VFIO_TYPE1v2_IOMMU)) }.map(|answer| answer > 0)
}

fn number(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// VFIO_SET_IOMMU to the second version of type1.
pub(crate) fn set_type1(container: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the argument is a number.
    unsafe { call_value(container, SET_IOMMU, number(VFIO_TYPE1v2_IOMMU)) }.map(|_| ())
}

/// VFIO_GROUP_GET_STATUS.
pub(crate) fn group_status(group: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut status = vfio_group_status { argsz: size_of::<vfio_group_status>(), ..Default::default() };
    // SAFETY: a structure of this request with its own size, without pointers.
    unsafe { call(group, GROUP_GET_STATUS, &mut status) }?;
    Ok(status.flags)
}

/// Whether all devices of the group have drivers that let it be used, and whether it has a container.
pub(crate) fn group_viable(flags: u32) -> (bool, bool) {
    (flags & VFIO_GROUP_FLAGS_VIABLE != 0, flags & VFIO_GROUP_FLAGS_CONTAINER_SET != 0)
}

/// VFIO_GROUP_SET_CONTAINER.
pub(crate) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut fd = container.as_raw_fd();
    // SAFETY: the argument points to a descriptor's number, which the kernel reads.
    unsafe { call(group, GROUP_SET_CONTAINER, &mut fd) }.map(|_| ())
}

/// VFIO_GROUP_GET_DEVICE_FD of the device that is called `name` in sysfs.
pub(crate) fn get_device_fd(group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let mut bytes = name.to_bytes_with_nul().to_vec();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let mut words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|c| u64::from_ne_bytes(*c)).collect();
    // SAFETY: the argument points to a string with its end, which the kernel reads.
    let fd = unsafe { call_buffer(group, GROUP_GET_DEVICE_FD, &mut words) }?;
    // SAFETY: on success the answer is a new descriptor that this call's caller owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a container's MIGRATION capability says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Type1Dirty {
    /// Page sizes that bitmaps can have, as bits.
    pub(crate) page_sizes: u64,
    /// Most bytes of one bitmap.
    pub(crate) max_bitmap: u64,
}

/// VFIO_IOMMU_GET_INFO: what the container can report, `None` when it cannot track dirty pages.
pub(crate) fn type1_dirty(container: BorrowedFd<'_>) -> Result<Option<Type1Dirty>, Errno> {
    // argsz, flags, iova_pgsizes, cap_offset, pad.
    const FIXED: u32 = 24;
    let mut room = FIXED;
    let words = loop {
        let mut words = vec![0_u64; number(room.div_ceil(8))];
        words[0] = pair(room, 0);
        // SAFETY: the buffer has the size that it states, at least that of the fixed structure, which
        // has no pointers.
        unsafe { call_buffer(container, IOMMU_GET_INFO, &mut words) }?;
        let (argsz, _) = halves(words[0]);
        if argsz <= room || room != FIXED || argsz > MAX_INFO {
            break words;
        }
        room = argsz;
    };
    let (_, flags) = halves(words[0]);
    if flags & VFIO_IOMMU_INFO_CAPS == 0 {
        return Ok(None);
    }
    let (first, _) = halves(words[2]);
    let caps = Caps::new(&words, first);
    let id = u16::try_from(VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION).unwrap_or(u16::MAX);
    // flags and padding, page sizes, bitmap size.
    let fields = caps.find(id).and_then(|content| content.get(8..24)).map(|bytes| {
        let word = |at: usize| bytes[at..].first_chunk::<8>().map_or(0, |b| u64::from_ne_bytes(*b));
        Type1Dirty { page_sizes: word(0), max_bitmap: word(8) }
    });
    Ok(fields)
}

/// VFIO_IOMMU_MAP_DMA, for reading and writing.
///
/// # Safety
/// The memory at `address` stays mapped in this process until the range is unmapped, and all of its
/// users know that devices write to it: the kernel may look `address` up whenever a device writes.
pub(crate) unsafe fn map_dma(
    container: BorrowedFd<'_>,
    iova: u64,
    length: u64,
    address: *mut u8,
) -> Result<(), Errno> {
    let mut map = vfio_iommu_type1_dma_map {
        argsz: size_of::<vfio_iommu_type1_dma_map>(),
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: address.expose_provenance() as u64,
        iova,
        size: length,
    };
    // SAFETY: a structure of this request with its own size; the caller vouches for the memory.
    unsafe { call(container, IOMMU_MAP_DMA, &mut map) }.map(|_| ())
}

/// VFIO_IOMMU_UNMAP_DMA; with a bitmap and its page size, the bits of pages that were dirty are set in
/// it. Bytes that were unmapped.
pub(crate) fn unmap_dma(
    container: BorrowedFd<'_>,
    iova: u64,
    length: u64,
    dirty: Option<(u64, &mut [u64])>,
) -> Result<u64, Errno> {
    let mut words = vec![0, iova, length];
    let mut flags = 0;
    if let Some((page_size, bitmap)) = dirty {
        if !holds(bitmap, length, page_size) {
            return Err(Errno::EINVAL);
        }
        flags = VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
        words.extend([page_size, bytes(bitmap), bitmap.as_mut_ptr().expose_provenance() as u64]);
    }
    let size = u32::try_from(words.len() * 8).map_err(|_| Errno::EINVAL)?;
    words[0] = pair(size, flags);
    // SAFETY: the buffer has the size that it states; the bitmap's pointer leads to as many bytes as are
    // stated, which the kernel writes during the call.
    unsafe { call_buffer(container, IOMMU_UNMAP_DMA, &mut words) }?;
    Ok(words[2])
}

fn bytes(bitmap: &[u64]) -> u64 {
    bitmap.len() as u64 * 8
}

/// VFIO_IOMMU_DIRTY_PAGES START.
pub(crate) fn dirty_start(container: BorrowedFd<'_>) -> Result<(), Errno> {
    dirty_pages(container, VFIO_IOMMU_DIRTY_PAGES_FLAG_START)
}

/// VFIO_IOMMU_DIRTY_PAGES STOP.
pub(crate) fn dirty_stop(container: BorrowedFd<'_>) -> Result<(), Errno> {
    dirty_pages(container, VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)
}

fn dirty_pages(container: BorrowedFd<'_>, flags: u32) -> Result<(), Errno> {
    let mut words = [pair(8, flags)];
    // SAFETY: the buffer has the size that it states; START and STOP carry no data.
    unsafe { call_buffer(container, IOMMU_DIRTY_PAGES, &mut words) }.map(|_| ())
}

/// VFIO_IOMMU_DIRTY_PAGES GET_BITMAP, which clears what it reports. The kernel overwrites the bits of
/// mapped ranges and leaves those of others as they are.
pub(crate) fn dirty_bitmap(
    container: BorrowedFd<'_>,
    iova: u64,
    length: u64,
    page_size: u64,
    bitmap: &mut [u64],
) -> Result<(), Errno> {
    if !holds(bitmap, length, page_size) {
        return Err(Errno::EINVAL);
    }
    let address = bitmap.as_mut_ptr().expose_provenance() as u64;
    let mut words =
        [pair(48, VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP), iova, length, page_size, bytes(bitmap), address];
    // SAFETY: the buffer has the size that it states; the bitmap's pointer leads to as many bytes as are
    // stated, which the kernel writes during the call.
    unsafe { call_buffer(container, IOMMU_DIRTY_PAGES, &mut words) }.map(|_| ())
}
