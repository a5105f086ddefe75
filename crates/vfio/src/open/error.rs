//! Why a device could not be opened, and what can be done about it.
//!
//! Nothing here asks the kernel anything but who owns a node.

use super::Holders;
use airlift_core::Errno;
use std::fmt;
use std::path::{Path, PathBuf};

/// Why a device could not be opened. The text says what is; [`advice`](Self::advice) says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no such device.
    #[error("{address}: there is no such device: {missing} does not exist")]
    NotFound {
        /// The address.
        address: String,
        /// What was looked for.
        missing: PathBuf,
    },
    /// No driver is bound to it.
    #[error("no driver is bound to {name}")]
    NoDriver {
        /// The device's name in sysfs.
        name: String,
    },
    /// The driver that is bound to it is not one of VFIO's.
    #[error("{name} is bound to the driver {driver}, which does not hand it to user space through VFIO")]
    WrongDriver {
        /// The device's name in sysfs.
        name: String,
        /// Its driver.
        driver: String,
    },
    /// The kernel gives the device no character device.
    #[error("the kernel gives {name} no character device (/dev/vfio/devices/vfioN)")]
    NoCdev {
        /// The device's name in sysfs.
        name: String,
    },
    /// No IOMMU stands between the device and memory.
    #[error("no IOMMU protects memory from {name}{}", if *noiommu {
        ": its driver has put it into noiommu mode, which does not allow a migration"
    } else {
        ": it is in no IOMMU group"
    })]
    NoIommu {
        /// The device's name in sysfs.
        name: String,
        /// Whether VFIO offers it in noiommu mode.
        noiommu: bool,
    },
    /// VFIO does not offer the device's IOMMU group.
    #[error("{name} is in IOMMU group {group}, but there is no {}", path.display())]
    NoGroup {
        /// The device's name in sysfs.
        name: String,
        /// The number of its group.
        group: u32,
        /// The node that should be there.
        path: PathBuf,
    },
    /// Other devices of its IOMMU group are used by the host.
    #[error(
        "IOMMU group {group} of {name} cannot be used while the host uses others of it: {}",
        list(others)
    )]
    NotViable {
        /// The device's name in sysfs.
        name: String,
        /// The number of its group.
        group: u32,
        /// The other devices of the group that have drivers, with those: all that could hold it back.
        others: Vec<(String, String)>,
    },
    /// This process may not open a node.
    #[error("no permission to open {} ({owner})", path.display())]
    NoPermission {
        /// The node.
        path: PathBuf,
        /// Who owns it, and its mode.
        owner: String,
    },
    /// The host does not have what is needed of VFIO or iommufd.
    #[error("the host has no {}", path.display())]
    NoVfio {
        /// What is missing.
        path: PathBuf,
        /// The kernel modules that bring it.
        modules: &'static str,
    },
    /// Something that was handed in or named is not what it should be.
    #[error("{what} is no VFIO {wanted}")]
    NotVfio {
        /// What was looked at.
        what: String,
        /// What it should be (`device`, `container`).
        wanted: &'static str,
    },
    /// A descriptor of a character device that was handed in is not bound to an iommufd.
    #[error("descriptor {fd} is that of a device, but it was not bound to an iommufd yet")]
    NotBound {
        /// The descriptor.
        fd: i32,
    },
    /// A descriptor that was handed in is not open.
    #[error("descriptor {fd} is not open in this process")]
    NotOpen {
        /// The descriptor.
        fd: i32,
    },
    /// Somebody else has the device.
    #[error("{name} is held by {holders}")]
    Busy {
        /// The device's name in sysfs.
        name: String,
        /// By whom.
        holders: Holders,
    },
    /// The host's IOMMU does not keep the device from raising any interrupt of the host.
    #[error("{operation}: the IOMMU does not isolate interrupts of {name} (EPERM)")]
    UnsafeInterrupts {
        /// What was refused.
        operation: String,
        /// The device's name in sysfs.
        name: String,
    },
    /// Memory may not be pinned.
    #[error("{operation}: the memory of the guest could not be pinned for {name} (ENOMEM)")]
    MemoryLock {
        /// What was refused.
        operation: String,
        /// The device's name in sysfs.
        name: String,
    },
    /// Something else was refused.
    #[error("{what}: {errno}")]
    Io {
        /// What was being done.
        what: String,
        /// The error number.
        errno: Errno,
    },
}

fn list(others: &[(String, String)]) -> String {
    let texts: Vec<_> = others.iter().map(|(name, driver)| format!("{name} (driver {driver})")).collect();
    if texts.is_empty() { "none of them can be seen".into() } else { texts.join(", ") }
}

impl OpenError {
    /// What the user can do.
    #[must_use]
    pub fn advice(&self) -> String {
        match self {
            Self::NotFound { address, .. } if address.starts_with("mdev:") => {
                "create it (write its UUID to mdev_supported_types/TYPE/create of its parent), or look at what \
                 is there with `airlift probe`"
                    .into()
            }
            Self::NotFound { .. } => "look at what is there with `airlift probe`".into(),
            Self::NoDriver { name } | Self::WrongDriver { name, .. } => bind(name),
            Self::NoCdev { .. } => "the kernel must be 6.6 or newer and have CONFIG_VFIO_DEVICE_CDEV; otherwise \
                                    let the device be opened through its group, in a container"
                .into(),
            Self::NoIommu { noiommu: true, .. } => {
                "switch the IOMMU on (firmware, intel_iommu=on) and noiommu mode off \
                 (vfio.enable_unsafe_noiommu_mode=0)"
                    .into()
            }
            Self::NoIommu { .. } => "switch the IOMMU on: in the firmware, and with intel_iommu=on on the \
                                     kernel's command line where it is not on by default"
                .into(),
            Self::NoGroup { .. } => {
                "the kernel may have no groups (CONFIG_VFIO_GROUP) and offer only the character device; or \
                 udev, or the container that this process is in, does not show the node"
                    .into()
            }
            Self::NotViable { .. } => {
                "bind the other devices of the group to vfio-pci too, or unbind their drivers".into()
            }
            Self::NoPermission { path, .. } => {
                format!("become a user that may open {}, or let udev give it to one", path.display())
            }
            Self::NoVfio { modules, .. } => format!(
                "load the kernel modules ({modules}); inside a container, the node must be passed into it"
            ),
            Self::NotVfio { .. } => "check the number or path that was given".into(),
            Self::NotBound { .. } => {
                "hand it in after VFIO_DEVICE_BIND_IOMMUFD, or name the device by cdev: to have it bound".into()
            }
            Self::NotOpen { .. } => "check that the descriptor is inherited (no close-on-exec)".into(),
            Self::Busy { holders, .. } => holders.advice().into(),
            Self::UnsafeInterrupts { .. } => {
                "switch interrupt remapping on in the firmware; where the hardware has none and all guests are \
                 trusted, set allow_unsafe_interrupts=1 of vfio_iommu_type1 or iommufd"
                    .into()
            }
            Self::MemoryLock { .. } => "raise the limit of locked memory (`ulimit -l`, LimitMEMLOCK=) to the \
                                        size of the guest's memory and some more"
                .into(),
            Self::Io { .. } => "look at the kernel's log (dmesg) for the driver's own words".into(),
        }
    }

    /// The error number, where the kernel gave one that the kind does not say already.
    #[must_use]
    pub const fn errno(&self) -> Option<Errno> {
        match self {
            Self::Io { errno, .. } => Some(*errno),
            Self::NotFound { .. } | Self::NoVfio { .. } | Self::NoGroup { .. } => Some(Errno::ENOENT),
            Self::NoPermission { .. } => Some(Errno::EACCES),
            Self::Busy { .. } => Some(Errno::EBUSY),
            Self::UnsafeInterrupts { .. } => Some(Errno::EPERM),
            Self::MemoryLock { .. } => Some(Errno::ENOMEM),
            Self::NotOpen { .. } => Some(Errno::EBADF),
            _ => None,
        }
    }

    /// A node of the host could not be opened.
    pub(crate) fn of_node(path: &Path, errno: Errno) -> Self {
        match errno {
            Errno::EACCES | Errno::EPERM => {
                Self::NoPermission { path: path.into(), owner: Owner::of(path).to_string() }
            }
            errno => Self::Io { what: format!("open {}", path.display()), errno },
        }
    }

    /// A request that makes the IOMMU work for a device was refused.
    pub(crate) fn of_iommu(operation: &str, name: &str, errno: Errno) -> Self {
        let (operation, name) = (operation.into(), name.into());
        match errno {
            Errno::EPERM => Self::UnsafeInterrupts { operation, name },
            Errno::ENOMEM => Self::MemoryLock { operation, name },
            errno => Self::Io { what: format!("{operation} for {name}"), errno },
        }
    }
}

fn bind(name: &str) -> String {
    if super::address::bdf(name).is_none() {
        return "load the driver of the device's parent, which binds it".into();
    }
    format!(
        "bind it to vfio-pci, or to the variant driver of its vendor, which a migration needs: \
         `driverctl set-override {name} vfio-pci`, or write the driver's name to \
         /sys/bus/pci/devices/{name}/driver_override, unbind it, and write {name} to /sys/bus/pci/drivers_probe"
    )
}

/// Who owns a node.
struct Owner(Option<(u32, u32, u32)>);

impl Owner {
    fn of(path: &Path) -> Self {
        let stat = rustix::fs::stat(path).ok();
        Self(stat.map(|stat| (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777)))
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some((uid, gid, mode)) => write!(f, "owner uid {uid}, gid {gid}, mode {mode:04o}"),
            None => f.write_str("owner unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_driver_gets_advice_for_the_bus_of_the_device() {
        let pci = OpenError::NoDriver { name: "0000:65:00.2".into() };
        assert!(pci.advice().contains("vfio-pci"));
        let mdev = OpenError::NoDriver { name: "00000000-0000-0000-0000-000000000001".into() };
        assert!(!mdev.advice().contains("vfio-pci"));
    }

    #[test]
    fn errno_of_the_iommu_become_reasons() {
        let kind = |errno| OpenError::of_iommu("VFIO_SET_IOMMU", "0000:65:00.2", errno);
        assert!(matches!(kind(Errno::EPERM), OpenError::UnsafeInterrupts { .. }));
        assert!(matches!(kind(Errno::ENOMEM), OpenError::MemoryLock { .. }));
        assert_eq!(kind(Errno::ENODEV).errno(), Some(Errno::ENODEV));
    }

    #[test]
    fn a_node_that_may_not_be_opened_is_named_with_its_owner() {
        let tree = tempfile::tempdir().unwrap();
        let node = tree.path().join("12");
        std::fs::write(&node, "").unwrap();
        rustix::fs::chmod(&node, rustix::fs::Mode::RUSR).unwrap();
        let error = OpenError::of_node(&node, Errno::EACCES);
        assert!(error.to_string().contains("mode 0400"), "{error}");
        assert!(error.to_string().contains(&node.display().to_string()));
    }
}
