//! The state request as the kernel has it, without the checks that `VfioDevice` makes before it.
//!
//! `VfioDevice` does not send what the interface forbids; that the kernel refuses the same is what these
//! tests compare.
#![allow(unsafe_code, reason = "one request that the crate's interface does not let through")]

use airlift_core::Errno;
use airlift_vfio::DeviceFd;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use vfio_bindings::bindings::vfio::{VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_SET};

/// `_IO(VFIO_TYPE, VFIO_BASE + 17)`.
const VFIO_DEVICE_FEATURE: libc::c_ulong = 0x3b75;

/// Head and data of the request.
#[repr(C, align(8))]
struct SetState {
    argsz: u32,
    flags: u32,
    state: u32,
    data_fd: i32,
}

/// SET of a state, whatever its number and however many arcs away: the data descriptor that came back.
pub(crate) fn set_state(device: &DeviceFd, state: u32) -> Result<Option<OwnedFd>, Errno> {
    let flags = VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE | VFIO_DEVICE_FEATURE_SET;
    let mut request = SetState { argsz: 16, flags, state, data_fd: -2 };
    // SAFETY: a structure of this request with its own size, without pointers.
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), VFIO_DEVICE_FEATURE, &raw mut request) };
    if result < 0 {
        return Err(Errno(std::io::Error::last_os_error().raw_os_error().unwrap()));
    }
    assert!(request.data_fd >= -1, "the driver left data_fd as it was");
    // SAFETY: the kernel has installed this descriptor for the caller of this call.
    Ok((request.data_fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(request.data_fd) }))
}
