//! VFIO_DEVICE_FEATURE, typed by feature, and the one request on a data descriptor.

use super::device::pair;
use super::ioctl::{call, call_buffer, size_of};
use super::pages::PageBitmap;
use airlift_core::Errno;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
    VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET, vfio_precopy_info,
};

const DEVICE_FEATURE: u8 = 117;
const MIG_GET_PRECOPY_INFO: u8 = 121;

/// The request with `N` words of data, which come back as the kernel left them.
///
/// # Safety
/// Pointers in `data` are valid for what the feature does with them.
unsafe fn feature<const N: usize>(fd: BorrowedFd<'_>, flags: u32, data: [u64; N]) -> Result<[u64; N], Errno> {
    let mut words = vec![0; N + 1];
    let size = u32::try_from(words.len() * 8).map_err(|_| Errno::EINVAL)?;
    words[0] = pair(size, flags);
    words[1..].copy_from_slice(&data);
    // SAFETY: the buffer has the size that it states; the caller vouches for pointers in the data.
    unsafe { call_buffer(fd, DEVICE_FEATURE, &mut words) }?;
    let mut data = [0; N];
    data.copy_from_slice(&words[1..]);
    Ok(data)
}

/// PROBE: whether the device has `feature` for getting, or else for setting.
///
/// # Errors
/// When the answer is another one than yes or no.
pub(crate) fn has_feature(fd: BorrowedFd<'_>, number: u32, set: bool) -> Result<bool, Errno> {
    let direction = if set { VFIO_DEVICE_FEATURE_SET } else { VFIO_DEVICE_FEATURE_GET };
    // SAFETY: a probe carries no data.
    match unsafe { feature::<0>(fd, number | direction | VFIO_DEVICE_FEATURE_PROBE, []) } {
        Ok(_) => Ok(true),
        // No such feature, or not in this direction.
        Err(Errno::ENOTTY | Errno::EINVAL) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// GET MIGRATION: flags of the migration states that the device has.
pub(crate) fn migration_flags(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    // SAFETY: the data has no pointers.
    let [flags] = unsafe { feature(fd, VFIO_DEVICE_FEATURE_MIGRATION | VFIO_DEVICE_FEATURE_GET, [0]) }?;
    Ok(flags)
}

/// GET MIG_DEVICE_STATE: the number of the state.
pub(crate) fn get_state(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    let flags = VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | VFIO_DEVICE_FEATURE_GET;
    // SAFETY: the data has no pointers.
    let [word] = unsafe { feature(fd, flags, [0]) }?;
    Ok(super::device::halves(word).0)
}

/// SET MIG_DEVICE_STATE: the data descriptor, where an arc has opened a session.
pub(crate) fn set_state(fd: BorrowedFd<'_>, state: u32) -> Result<Option<OwnedFd>, Errno> {
    let flags = VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | VFIO_DEVICE_FEATURE_SET;
    // SAFETY: the data has no pointers.
    let [word] = unsafe { feature(fd, flags, [pair(state, u32::MAX)]) }?;
    let (_, data_fd) = super::device::halves(word);
    let data_fd = data_fd.cast_signed();
    // SAFETY: the kernel has installed this descriptor for this call's caller, who owns it; it says -1
    // where there is none.
    Ok((data_fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(data_fd) }))
}

/// GET MIG_DATA_SIZE: estimate of the bytes of STOP_COPY.
pub(crate) fn data_size(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    // SAFETY: the data has no pointers.
    let [size] = unsafe { feature(fd, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE | VFIO_DEVICE_FEATURE_GET, [0]) }?;
    Ok(size)
}

/// SET MIG_PRECOPY_INFOv2: from now on flags of GET_PRECOPY_INFO mean something.
pub(crate) fn precopy_info_v2(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the feature has no data.
    unsafe { feature::<0>(fd, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 | VFIO_DEVICE_FEATURE_SET, []) }
        .map(|_| ())
}

/// VFIO_MIG_GET_PRECOPY_INFO on a data descriptor: flags, initial_bytes, dirty_bytes.
pub(crate) fn precopy_info(data_fd: BorrowedFd<'_>) -> Result<(u32, u64, u64), Errno> {
    let mut info = vfio_precopy_info { argsz: size_of::<vfio_precopy_info>(), ..Default::default() };
    // SAFETY: a structure of this request with its own size, without pointers.
    unsafe { call(data_fd, MIG_GET_PRECOPY_INFO, &mut info) }?;
    Ok((info.flags, info.initial_bytes, info.dirty_bytes))
}

/// SET DMA_LOGGING_START over `ranges` of (iova, length): the page size that the device chose.
pub(crate) fn logging_start(fd: BorrowedFd<'_>, page_size: u64, ranges: &[[u64; 2]]) -> Result<u64, Errno> {
    let count = u32::try_from(ranges.len()).map_err(|_| Errno::EINVAL)?;
    let flags = VFIO_DEVICE_FEATURE_DMA_LOGGING_START | VFIO_DEVICE_FEATURE_SET;
    let data = [page_size, pair(count, 0), ranges.as_ptr().expose_provenance() as u64];
    // SAFETY: the pointer leads to `count` ranges of two u64 that the kernel reads during the call.
    let [chosen, _, _] = unsafe { feature(fd, flags, data) }?;
    Ok(chosen)
}

/// SET DMA_LOGGING_STOP.
pub(crate) fn logging_stop(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the feature has no data.
    unsafe { feature::<0>(fd, VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP | VFIO_DEVICE_FEATURE_SET, []) }
        .map(|_| ())
}

/// GET DMA_LOGGING_REPORT: sets the bits of pages written since the last report, and clears the log.
///
/// # Errors
/// EINVAL where `bitmap` is too short for the range; otherwise the device's.
pub(crate) fn logging_report(
    fd: BorrowedFd<'_>,
    iova: u64,
    length: u64,
    page_size: u64,
    bitmap: &mut [u64],
) -> Result<(), Errno> {
    if !holds(bitmap, length, page_size) {
        return Err(Errno::EINVAL);
    }
    let mut own = PageBitmap::new(length, page_size)?;
    let flags = VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT | VFIO_DEVICE_FEATURE_GET;
    let data = [iova, length, page_size, own.address()];
    // SAFETY: the pointer leads to a bit for each page of the range, which the kernel writes during the call,
    // and the bitmap has its pages of memory, in which alone the kernel writes, for itself.
    unsafe { feature(fd, flags, data) }?;
    for (word, got) in bitmap.iter_mut().zip(own.words()) {
        *word |= got;
    }
    Ok(())
}

/// Whether `bitmap` has a bit for each page of `length` bytes, however the range is aligned.
pub(super) const fn holds(bitmap: &[u64], length: u64, page_size: u64) -> bool {
    if !page_size.is_power_of_two() {
        return false;
    }
    bitmap.len() as u64 >= length.div_ceil(page_size).div_ceil(64)
}
