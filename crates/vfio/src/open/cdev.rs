//! The way through a device's character device and an iommufd (K-BIND).
//!
//! That the driver is one of VFIO's was checked before.

use super::group::{busy, not_viable};
use super::{Attachment, DeviceAddress, OpenDevice, OpenError, OpenOptions, SysfsDevice, open_node};
use crate::iommu::AttachError;
use crate::{DeviceFd, Iommufd};
use airlift_core::Errno;
use std::os::fd::AsFd;

pub(super) fn open(
    address: &DeviceAddress,
    device: SysfsDevice,
    options: &OpenOptions,
) -> Result<OpenDevice, OpenError> {
    let name = device.name.clone();
    let Some(cdev) = &device.cdev else { return Err(OpenError::NoCdev { name }) };
    if cdev.starts_with("noiommu-") {
        return Err(OpenError::NoIommu { name, noiommu: true });
    }
    let path = match address {
        // Named by its path, which may be another node of the same device.
        DeviceAddress::Cdev(path) => path.clone(),
        _ => options.roots.dev.join("vfio/devices").join(cdev),
    };
    let iommufd = match &options.iommufd {
        Some(iommufd) => iommufd.clone(),
        None => Iommufd::open(&options.roots.dev.join("iommu"))?,
    };
    let fd = open_node(&path).map_err(|errno| match errno {
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
            OpenError::NotFound { address: address.to_string(), missing: path.clone() }
        }
        errno => OpenError::of_node(&path, errno),
    })?;
    let attached = iommufd.attach(fd.as_fd(), &name);
    let (number, page_table) = match attached {
        Ok(attached) => attached,
        Err(error) => {
            // Closed first: our own descriptor is not what holds the device.
            drop(fd);
            return Err(refused(error, &device, options));
        }
    };
    Ok(OpenDevice {
        fd: DeviceFd::new(fd),
        address: address.clone(),
        sysfs: Some(device),
        attachment: Attachment::Iommufd { iommufd, device: number, page_table },
    })
}

/// Why binding or attaching failed.
fn refused(error: AttachError, device: &SysfsDevice, options: &OpenOptions) -> OpenError {
    let (operation, errno) = match error {
        AttachError::Bind(errno) => ("VFIO_DEVICE_BIND_IOMMUFD", errno),
        AttachError::Attach(errno) => ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno),
    };
    match error {
        AttachError::Bind(Errno::ENOTTY) => {
            OpenError::NotVfio { what: format!("the node of {}", device.name), wanted: "device" }
        }
        // EBUSY when the group holds it or the host uses a device of the group; EINVAL, besides much else,
        // when another descriptor of the character device is bound.
        AttachError::Bind(Errno::EBUSY | Errno::EINVAL) => {
            let held = busy(device, options);
            let seen = matches!(&held, OpenError::Busy { holders, .. } if !holders.seen.is_empty());
            let hosts = device.iommu_group.filter(|_| !device.hosts_in_group(&options.roots).is_empty());
            match (seen, hosts, errno) {
                (false, Some(group), _) => not_viable(device, group, options),
                (false, None, Errno::EINVAL) => OpenError::of_iommu(operation, &device.name, errno),
                _ => held,
            }
        }
        _ => OpenError::of_iommu(operation, &device.name, errno),
    }
}
