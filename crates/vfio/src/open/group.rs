//! The way through a device's group and a type1 container (K-BIND).
//!
//! The kernel lets a device of a group that is open be opened any number of times: that a device is used
//! once is for the caller to see to. That the driver is one of VFIO's was checked before.

use super::holder::{Wanted, find};
use super::{Attachment, DeviceAddress, OpenDevice, OpenError, OpenOptions, SysfsDevice, open_node};
use crate::sys;
use crate::{Container, DeviceFd};
use airlift_core::Errno;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

/// An open IOMMU group in a container. Clones are the same group; the last one dropped closes it.
#[derive(Clone, Debug)]
pub struct Group(Arc<Inner>);

/// A group that somebody else keeps open.
#[derive(Clone, Debug)]
pub(crate) struct WeakGroup(Weak<Inner>);

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    number: u32,
}

impl Group {
    /// The group's number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.0.number
    }

    pub(crate) fn downgrade(&self) -> WeakGroup {
        WeakGroup(Arc::downgrade(&self.0))
    }
}

impl WeakGroup {
    pub(crate) fn upgrade(&self) -> Option<Group> {
        self.0.upgrade().map(Group)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

pub(super) fn open(
    address: &DeviceAddress,
    device: SysfsDevice,
    options: &OpenOptions,
) -> Result<OpenDevice, OpenError> {
    let number =
        device.iommu_group.ok_or_else(|| OpenError::NoIommu { name: device.name.clone(), noiommu: false })?;
    let container = match &options.container {
        Some(container) => container.clone(),
        None => Container::open(&options.roots.dev.join("vfio/vfio"))?,
    };
    let group = container.group(number, &device.name, || open_group(&device, number, options))?;
    let name = CString::new(device.name.clone())
        .map_err(|_| OpenError::Io { what: format!("name {:?}", device.name), errno: Errno::EINVAL })?;
    let fd = sys::get_device_fd(group.as_fd(), &name).map_err(|errno| match errno {
        Errno::EBUSY => busy(&device, options),
        errno => OpenError::Io { what: format!("VFIO_GROUP_GET_DEVICE_FD of {}", device.name), errno },
    })?;
    Ok(OpenDevice {
        fd: DeviceFd::new(fd),
        address: address.clone(),
        sysfs: Some(device),
        attachment: Attachment::Container { container, group },
    })
}

fn open_group(device: &SysfsDevice, number: u32, options: &OpenOptions) -> Result<Group, OpenError> {
    let directory = options.roots.dev.join("vfio");
    let path = directory.join(number.to_string());
    let name = device.name.clone();
    let fd = open_node(&path).map_err(|errno| match errno {
        Errno::ENOENT if directory.join(format!("noiommu-{number}")).exists() => {
            OpenError::NoIommu { name, noiommu: true }
        }
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => OpenError::NoGroup { name, group: number, path },
        Errno::EBUSY => busy(device, options),
        errno => OpenError::of_node(&path, errno),
    })?;
    let status = sys::group_status(fd.as_fd()).map_err(|errno| match errno {
        Errno::ENOTTY => {
            let what = directory.join(number.to_string()).display().to_string();
            OpenError::NotVfio { what, wanted: "group" }
        }
        errno => OpenError::Io { what: "VFIO_GROUP_GET_STATUS".into(), errno },
    })?;
    let (viable, _) = sys::group_viable(status);
    if !viable {
        return Err(not_viable(device, number, options));
    }
    Ok(Group(Arc::new(Inner { fd, number })))
}

pub(super) fn not_viable(device: &SysfsDevice, group: u32, options: &OpenOptions) -> OpenError {
    let others = device.hosts_in_group(&options.roots);
    OpenError::NotViable { name: device.name.clone(), group, others }
}

/// The device, or its group, is held by somebody.
pub(super) fn busy(device: &SysfsDevice, options: &OpenOptions) -> OpenError {
    let directory = options.roots.dev.join("vfio");
    let group = device.iommu_group.map(|number| directory.join(number.to_string()));
    let cdev = device.cdev.as_ref().map(|name| directory.join("devices").join(name));
    let wanted = Wanted {
        nodes: group.into_iter().chain(cdev).collect(),
        sysfs: Some(device.path.clone()),
        sys: options.roots.sys.clone(),
    };
    OpenError::Busy { name: device.name.clone(), holders: find(&wanted, &options.roots.proc) }
}
