//! Requests on an iommufd.

use super::ioctl::{call, size_of};
use super::pages::PageBitmap;
use airlift_core::Errno;
use iommufd_bindings::{
    iommu_destroy, iommu_hw_info, iommu_hwpt_alloc, iommu_hwpt_get_dirty_bitmap,
    iommu_hwpt_set_dirty_tracking, iommu_ioas_alloc, iommu_ioas_copy, iommu_ioas_map, iommu_ioas_unmap,
    iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING as HW_CAP_DIRTY_TRACKING,
    iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING as HWPT_ALLOC_DIRTY_TRACKING,
    iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE as HWPT_DIRTY_TRACKING_ENABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as MAP_WRITEABLE,
};
use std::os::fd::BorrowedFd;

const DESTROY: u8 = 128;
const IOAS_ALLOC: u8 = 129;
const IOAS_COPY: u8 = 131;
const IOAS_MAP: u8 = 133;
const IOAS_UNMAP: u8 = 134;
const HWPT_ALLOC: u8 = 137;
const GET_HW_INFO: u8 = 138;
const HWPT_SET_DIRTY_TRACKING: u8 = 139;
const HWPT_GET_DIRTY_BITMAP: u8 = 140;

/// IOMMU_DESTROY of an object.
pub(crate) fn destroy(fd: BorrowedFd<'_>, id: u32) -> Result<(), Errno> {
    let mut destroy = iommu_destroy { size: size_of::<iommu_destroy>(), id };
    // SAFETY: a structure of this request with its own size, without pointers.
    unsafe { call(fd, DESTROY, &mut destroy) }.map(|_| ())
}

/// IOMMU_IOAS_ALLOC: the number of a new address space.
pub(crate) fn ioas_alloc(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut alloc = iommu_ioas_alloc { size: size_of::<iommu_ioas_alloc>(), ..Default::default() };
    // SAFETY: a structure of this request with its own size, without pointers.
    unsafe { call(fd, IOAS_ALLOC, &mut alloc) }?;
    Ok(alloc.out_ioas_id)
}

/// IOMMU_IOAS_MAP at a fixed address, for reading and writing.
///
/// # Safety
/// The memory at `address` stays mapped in this process until the range is unmapped, and all of its
/// users know that devices write to it.
pub(crate) unsafe fn ioas_map(
    fd: BorrowedFd<'_>,
    ioas: u32,
    iova: u64,
    length: u64,
    address: *mut u8,
) -> Result<(), Errno> {
    let mut map = iommu_ioas_map {
        size: size_of::<iommu_ioas_map>(),
        flags: MAP_FIXED_IOVA | MAP_READABLE | MAP_WRITEABLE,
        ioas_id: ioas,
        user_va: address.expose_provenance() as u64,
        length,
        iova,
        ..Default::default()
    };
    // SAFETY: a structure of this request with its own size; the caller vouches for the memory.
    unsafe { call(fd, IOAS_MAP, &mut map) }.map(|_| ())
}

/// IOMMU_IOAS_UNMAP: bytes that were unmapped.
pub(crate) fn ioas_unmap(fd: BorrowedFd<'_>, ioas: u32, iova: u64, length: u64) -> Result<u64, Errno> {
    let mut unmap = iommu_ioas_unmap { size: size_of::<iommu_ioas_unmap>(), ioas_id: ioas, iova, length };
    // SAFETY: a structure of this request with its own size, without pointers.
    unsafe { call(fd, IOAS_UNMAP, &mut unmap) }?;
    Ok(unmap.length)
}

/// IOMMU_IOAS_COPY of a range of the address space `from`, to the same addresses of `to`.
///
/// # Errors
/// ENOENT where something in the range is not mapped.
pub(crate) fn ioas_copy(fd: BorrowedFd<'_>, from: u32, to: u32, iova: u64, length: u64) -> Result<(), Errno> {
    let mut copy = iommu_ioas_copy {
        size: size_of::<iommu_ioas_copy>(),
        flags: MAP_FIXED_IOVA | MAP_READABLE | MAP_WRITEABLE,
        dst_ioas_id: to,
        src_ioas_id: from,
        length,
        dst_iova: iova,
        src_iova: iova,
    };
    // SAFETY: a structure of this request with its own size, without pointers; what it maps is mapped
    // already, in an address space of the same iommufd.
    unsafe { call(fd, IOAS_COPY, &mut copy) }.map(|_| ())
}

/// IOMMU_HWPT_ALLOC of a page table with dirty tracking, for `device` over the address space `ioas`.
pub(crate) fn hwpt_alloc(fd: BorrowedFd<'_>, device: u32, ioas: u32) -> Result<u32, Errno> {
    let mut alloc = iommu_hwpt_alloc {
        size: size_of::<iommu_hwpt_alloc>(),
        flags: HWPT_ALLOC_DIRTY_TRACKING,
        dev_id: device,
        pt_id: ioas,
        ..Default::default()
    };
    // SAFETY: a structure of this request with its own size; no data, so its pointer is not used.
    unsafe { call(fd, HWPT_ALLOC, &mut alloc) }?;
    Ok(alloc.out_hwpt_id)
}

/// IOMMU_GET_HW_INFO: whether page tables of `device` can track dirty pages.
pub(crate) fn has_dirty_tracking(fd: BorrowedFd<'_>, device: u32) -> Result<bool, Errno> {
    let mut info = iommu_hw_info { size: size_of::<iommu_hw_info>(), dev_id: device, ..Default::default() };
    // SAFETY: a structure of this request with its own size; no room for data is offered, so its
    // pointer is not used.
    unsafe { call(fd, GET_HW_INFO, &mut info) }?;
    Ok(info.out_capabilities & u64::from(HW_CAP_DIRTY_TRACKING) != 0)
}

/// IOMMU_HWPT_SET_DIRTY_TRACKING.
pub(crate) fn hwpt_dirty_tracking(fd: BorrowedFd<'_>, hwpt: u32, on: bool) -> Result<(), Errno> {
    let mut set = iommu_hwpt_set_dirty_tracking {
        size: size_of::<iommu_hwpt_set_dirty_tracking>(),
        flags: if on { HWPT_DIRTY_TRACKING_ENABLE } else { 0 },
        hwpt_id: hwpt,
        ..Default::default()
    };
    // SAFETY: a structure of this request with its own size, without pointers.
    unsafe { call(fd, HWPT_SET_DIRTY_TRACKING, &mut set) }.map(|_| ())
}

/// IOMMU_HWPT_GET_DIRTY_BITMAP, which clears what it reports: a bitmap with a bit for each page of
/// `length` bytes from `iova`.
pub(crate) fn hwpt_dirty_bitmap(
    fd: BorrowedFd<'_>,
    hwpt: u32,
    iova: u64,
    length: u64,
    page_size: u64,
) -> Result<Vec<u64>, Errno> {
    let mut bitmap = PageBitmap::new(length, page_size)?;
    let mut get = iommu_hwpt_get_dirty_bitmap {
        size: size_of::<iommu_hwpt_get_dirty_bitmap>(),
        hwpt_id: hwpt,
        iova,
        length,
        page_size,
        data: bitmap.address(),
        ..Default::default()
    };
    // SAFETY: a structure of this request with its own size; the bitmap has a bit for each page, and its
    // pages of memory, in which alone the kernel writes, for itself.
    unsafe { call(fd, HWPT_GET_DIRTY_BITMAP, &mut get) }?;
    Ok(bitmap.words().to_vec())
}
