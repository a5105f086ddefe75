//! What this host has for VFIO: its device nodes, its IOMMU groups, its devices.

use crate::args::DeviceAddress;
use crate::json::ErrorView;
use airlift_core::Errno;
use airlift_vfio::{Roots, SysfsDevice};
use serde::Serialize;
use std::io::ErrorKind;
use std::path::Path;

/// This host.
#[derive(Debug, Serialize)]
pub(super) struct Host {
    /// The kernel's release.
    pub(super) kernel: String,
    /// `/dev/iommu`.
    pub(super) iommufd: Node,
    /// `/dev/vfio/vfio`.
    pub(super) container: Node,
    /// IOMMU groups that there are.
    pub(super) iommu_groups: usize,
    /// Devices that a VFIO driver holds.
    pub(super) devices: usize,
}

/// A device node.
#[derive(Debug, Serialize)]
pub(super) struct Node {
    pub(super) path: String,
    /// `ready`, or what stands in the way.
    pub(super) found: String,
    /// What to do about it.
    pub(super) advice: Option<&'static str>,
}

impl Node {
    /// Opens it, and closes it again.
    fn look(path: &Path, module: &'static str) -> Self {
        let opened = std::fs::File::options().read(true).write(true).open(path);
        let (found, advice) = match opened {
            Ok(_) => ("ready".into(), None),
            Err(e) if e.kind() == ErrorKind::NotFound => ("not there".into(), Some(module)),
            Err(e) if e.raw_os_error() == Some(Errno::ENODEV.0) => {
                ("no driver behind it".into(), Some(module))
            }
            Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                ("no permission".into(), Some("run as root, or give this user access to it"))
            }
            Err(e) => (e.to_string(), None),
        };
        Self { path: path.display().to_string(), found, advice }
    }
}

impl Host {
    /// Looks at it. What cannot be read is taken as not there.
    pub(super) fn look() -> Self {
        let roots = Roots::default();
        let release = std::fs::read_to_string(roots.proc.join("sys/kernel/osrelease"));
        let groups = std::fs::read_dir(roots.sys.join("kernel/iommu_groups"));
        Self {
            kernel: release.map_or_else(|_| "unknown".into(), |r| r.trim().to_owned()),
            iommufd: Node::look(&roots.dev.join("iommu"), "load the module iommufd, if this kernel has it"),
            container: Node::look(
                &roots.dev.join("vfio/vfio"),
                "load the module vfio_iommu_type1, if this kernel has it",
            ),
            iommu_groups: groups.map_or(0, |entries| entries.filter(Result::is_ok).count()),
            devices: airlift_vfio::list(&roots).map_or(0, |devices| devices.len()),
        }
    }
}

/// Every device that a VFIO driver holds, by its address; and the names of those that have none.
pub(super) fn devices() -> Result<(Vec<DeviceAddress>, Vec<String>), Box<ErrorView>> {
    let roots = Roots::default();
    let found = airlift_vfio::list(&roots).map_err(|e| {
        let view = ErrorView::new(format!("sysfs cannot be read: {e}"));
        Box::new(view.errno(e.raw_os_error().map(Errno)).advise("is it mounted at /sys?"))
    })?;
    let mut addresses = Vec::with_capacity(found.len());
    let mut others = Vec::new();
    for device in found {
        match address(&roots, &device) {
            Some(address) => addresses.push(DeviceAddress::Kernel(address)),
            None => others.push(device.name),
        }
    }
    Ok((addresses, others))
}

fn address(roots: &Roots, device: &SysfsDevice) -> Option<airlift_vfio::DeviceAddress> {
    match device.subsystem.as_deref() {
        Some("pci") => Some(airlift_vfio::DeviceAddress::Pci(device.name.clone())),
        Some("mdev") => Some(airlift_vfio::DeviceAddress::Mdev(device.name.clone())),
        // Platform, CDX and AP devices have no address of their own here.
        _ => {
            let cdev = device.cdev.as_ref()?;
            Some(airlift_vfio::DeviceAddress::Cdev(roots.dev.join("vfio/devices").join(cdev)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_not_there_has_advice() {
        let dir = tempfile::tempdir().unwrap();
        let node = Node::look(&dir.path().join("iommu"), "load it");
        assert_eq!((node.found.as_str(), node.advice), ("not there", Some("load it")));
        std::fs::write(dir.path().join("iommu"), "").unwrap();
        assert_eq!(Node::look(&dir.path().join("iommu"), "load it").found, "ready");
    }

    #[test]
    fn devices_are_addressed_by_what_they_are() {
        let device = |subsystem: &str, cdev: Option<&str>| SysfsDevice {
            name: "0000:65:00.2".into(),
            path: "/sys/x".into(),
            subsystem: Some(subsystem.into()),
            driver: None,
            mdev_type: None,
            iommu_group: None,
            cdev: cdev.map(Into::into),
            vfio: true,
        };
        let shown = |d: &SysfsDevice| address(&Roots::default(), d).map(|a| a.to_string());
        assert_eq!(shown(&device("pci", Some("vfio0"))).as_deref(), Some("pci:0000:65:00.2"));
        assert_eq!(
            shown(&device("platform", Some("vfio3"))).as_deref(),
            Some("cdev:/dev/vfio/devices/vfio3")
        );
        assert_eq!(shown(&device("platform", None)), None);
    }
}
