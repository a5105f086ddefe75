//! Descriptors that somebody else has opened: what they are, and which device they belong to.
//!
//! What that device is attached to, and in which state it is, is not asked here.

use super::holder::device_path;
use super::{Attachment, DeviceAddress, OpenDevice, OpenError, Roots, SysfsDevice};
use crate::{DeviceFd, sys};
use airlift_core::Errno;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

pub(super) fn open(number: RawFd, roots: &Roots) -> Result<OpenDevice, OpenError> {
    let fd = sys::duplicate(number).map_err(|errno| match errno {
        Errno::EBADF => OpenError::NotOpen { fd: number },
        errno => OpenError::Io { what: format!("duplicate descriptor {number}"), errno },
    })?;
    check(fd.as_fd(), number, roots)?;
    let sysfs = sysfs(fd.as_fd(), roots);
    Ok(OpenDevice {
        fd: DeviceFd::new(fd),
        address: DeviceAddress::Fd(number),
        sysfs,
        attachment: Attachment::Given,
    })
}

/// A descriptor that this process owns and that a VMM has handed in, for instance over a socket. The
/// address is its number.
///
/// # Errors
/// When it is no descriptor of a VFIO device, or one of a character device that was not bound.
pub(super) fn from_fd(fd: OwnedFd, roots: &Roots) -> Result<OpenDevice, OpenError> {
    let number = fd.as_raw_fd();
    check(fd.as_fd(), number, roots)?;
    let sysfs = sysfs(fd.as_fd(), roots);
    Ok(OpenDevice {
        fd: DeviceFd::new(fd),
        address: DeviceAddress::Fd(number),
        sysfs,
        attachment: Attachment::Given,
    })
}

fn check(fd: BorrowedFd<'_>, number: RawFd, roots: &Roots) -> Result<(), OpenError> {
    let other = || OpenError::NotVfio { what: format!("descriptor {number}"), wanted: "device" };
    // Any device may answer these numbers in its own way; a file of VFIO says so in its name.
    let link = fs::read_link(roots.proc.join("self/fd").join(fd.as_raw_fd().to_string()));
    if link.is_ok_and(|link| !link.to_string_lossy().contains("vfio")) {
        let is_cdev =
            rustix::fs::fstat(fd).ok().and_then(|s| SysfsDevice::of_cdev(s.st_rdev, roots)).is_some();
        if !is_cdev {
            return Err(other());
        }
    }
    match sys::device_info(fd) {
        Ok(_) => Ok(()),
        Err(Errno::EINVAL) if sysfs(fd, roots).is_some() => Err(OpenError::NotBound { fd: number }),
        Err(Errno::ENOTTY | Errno::EINVAL) => Err(other()),
        Err(errno) => {
            Err(OpenError::Io { what: format!("VFIO_DEVICE_GET_INFO of descriptor {number}"), errno })
        }
    }
}

/// The device, when the descriptor says which: one of a character device does by its number, one of a
/// group since Linux 6.18 in its fdinfo.
pub(super) fn sysfs(fd: BorrowedFd<'_>, roots: &Roots) -> Option<SysfsDevice> {
    let stat = rustix::fs::fstat(fd).ok()?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device() {
        return SysfsDevice::of_cdev(stat.st_rdev, roots);
    }
    let fdinfo = roots.proc.join("self/fdinfo").join(fd.as_raw_fd().to_string());
    SysfsDevice::at(&device_path(&fdinfo, &roots.sys)?, roots).ok()
}
