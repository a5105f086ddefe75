//! What sysfs says of devices, and which of them VFIO holds.
//!
//! Sysfs can change at any moment; what was read is what was true then, and the kernel has the last
//! word when the device is opened.

use super::{OpenError, Roots};
use airlift_core::Errno;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Most devices that [`list`] looks at.
const MAX_DEVICES: usize = 65_536;

/// What sysfs says of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysfsDevice {
    /// Its name: a PCI address (`0000:65:00.2`) or an mdev's UUID.
    pub name: String,
    /// Its directory, without symbolic links.
    pub path: PathBuf,
    /// Its bus (`pci`, `mdev`).
    pub subsystem: Option<String>,
    /// The driver that is bound to it.
    pub driver: Option<String>,
    /// An mdev's type (`mtty-2`).
    pub mdev_type: Option<String>,
    /// The number of its IOMMU group.
    pub iommu_group: Option<u32>,
    /// The name of its character device (`vfio3`), where the kernel has them.
    pub cdev: Option<String>,
    /// Whether the driver is one of VFIO's: whether the device can be opened through VFIO.
    pub vfio: bool,
}

/// The last part of where a link leads.
fn link_name(link: &Path) -> Option<String> {
    fs::read_link(link).ok()?.file_name()?.to_str().map(Into::into)
}

/// The names in a directory, sorted; none where there is no such directory.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries.take(MAX_DEVICES) {
        names.extend(entry?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

impl SysfsDevice {
    /// The device whose directory `path` is, or leads to.
    ///
    /// # Errors
    /// When there is no such directory.
    pub(super) fn at(path: &Path, roots: &Roots) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        let nodes = names(&path.join("vfio-dev")).unwrap_or_default();
        let subsystem = link_name(&path.join("subsystem"));
        let driver = link_name(&path.join("driver"));
        // Kernels before 6.1 do not say in sysfs which devices VFIO holds.
        let told = roots.sys.join("class/vfio-dev").exists();
        let guessed =
            || subsystem.as_deref() == Some("mdev") || driver.as_ref().is_some_and(|d| d.contains("vfio"));
        Ok(Self {
            vfio: driver.is_some() && if told { !nodes.is_empty() } else { guessed() },
            // Before 6.6, and without CONFIG_VFIO_DEVICE_CDEV, the name has no device number.
            cdev: nodes.into_iter().find(|node| path.join("vfio-dev").join(node).join("dev").exists()),
            mdev_type: link_name(&path.join("mdev_type")),
            iommu_group: link_name(&path.join("iommu_group")).and_then(|n| n.parse().ok()),
            name,
            path,
            subsystem,
            driver,
        })
    }

    /// The device of this number of a character device; `None` when it is not one of VFIO's.
    pub(super) fn of_cdev(rdev: u64, roots: &Roots) -> Option<Self> {
        let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        let node = fs::canonicalize(roots.sys.join(format!("dev/char/{major}:{minor}"))).ok()?;
        if node.parent()?.file_name()? != "vfio-dev" {
            return None;
        }
        Self::at(&node.join("device"), roots).ok()
    }

    /// The device on `bus` of this name.
    pub(super) fn on_bus(bus: &str, name: &str, address: &str, roots: &Roots) -> Result<Self, OpenError> {
        let bus = roots.sys.join("bus").join(bus);
        let link = bus.join("devices").join(name);
        Self::at(&link, roots).map_err(|error| match error.raw_os_error() {
            Some(errno) if error.kind() != io::ErrorKind::NotFound => {
                OpenError::Io { what: format!("look at {}", link.display()), errno: Errno(errno) }
            }
            _ => OpenError::NotFound {
                address: address.into(),
                missing: if bus.exists() { link } else { bus },
            },
        })
    }

    /// Refuses a device that VFIO does not hold.
    pub(super) fn check_driver(&self) -> Result<(), OpenError> {
        match &self.driver {
            None => Err(OpenError::NoDriver { name: self.name.clone() }),
            Some(driver) if !self.vfio => {
                Err(OpenError::WrongDriver { name: self.name.clone(), driver: driver.clone() })
            }
            Some(_) => Ok(()),
        }
    }

    /// The other devices of its group that have a driver which is not VFIO's, with those drivers.
    pub(super) fn hosts_in_group(&self, roots: &Roots) -> Vec<(String, String)> {
        let Some(group) = self.iommu_group else { return Vec::new() };
        let directory = roots.sys.join(format!("kernel/iommu_groups/{group}/devices"));
        let others = names(&directory).unwrap_or_default().into_iter().filter(|name| *name != self.name);
        others
            .filter_map(|name| Self::at(&directory.join(name), roots).ok())
            // These two do no DMA on behalf of the host, which VFIO knows.
            .filter(|d| !d.vfio && !matches!(d.driver.as_deref(), Some("pci-stub" | "pcieport")))
            .filter_map(|d| Some((d.name, d.driver?)))
            .collect()
    }
}

/// Every device that a VFIO driver holds, by name.
///
/// # Errors
/// When sysfs cannot be read.
pub fn list(roots: &Roots) -> io::Result<Vec<SysfsDevice>> {
    let class = roots.sys.join("class/vfio-dev");
    let mut directories: Vec<PathBuf> =
        names(&class)?.into_iter().map(|node| class.join(node).join("device")).collect();
    if !class.exists() {
        for bus in ["pci", "mdev"] {
            let bus = roots.sys.join("bus").join(bus).join("devices");
            directories.extend(names(&bus)?.into_iter().map(|name| bus.join(name)));
        }
    }
    // A device that has gone meanwhile is not an error.
    let mut found: Vec<_> =
        directories.iter().filter_map(|d| SysfsDevice::at(d, roots).ok()).filter(|d| d.vfio).collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_devices_that_hold_a_group_back_are_those_that_the_host_drives() {
        let tree = tempfile::tempdir().unwrap();
        let roots = Roots { sys: tree.path().into(), ..Roots::default() };
        let members = tree.path().join("kernel/iommu_groups/4/devices");
        fs::create_dir_all(&members).unwrap();
        fs::create_dir_all(tree.path().join("class/vfio-dev")).unwrap();
        for (name, driver, vfio) in [
            ("0000:01:00.0", Some("vfio-pci"), true),
            ("0000:01:00.1", Some("snd_hda_intel"), false),
            ("0000:01:00.2", None, false),
            ("0000:00:01.0", Some("pcieport"), false),
        ] {
            let device = tree.path().join("devices").join(name);
            fs::create_dir_all(&device).unwrap();
            symlink("../../kernel/iommu_groups/4", device.join("iommu_group")).unwrap();
            if let Some(driver) = driver {
                symlink(format!("../../bus/pci/drivers/{driver}"), device.join("driver")).unwrap();
            }
            if vfio {
                fs::create_dir_all(device.join("vfio-dev/vfio0")).unwrap();
            }
            symlink(&device, members.join(name)).unwrap();
        }
        let device = SysfsDevice::at(&members.join("0000:01:00.0"), &roots).unwrap();
        let others = device.hosts_in_group(&roots);
        assert_eq!(others, [("0000:01:00.1".into(), "snd_hda_intel".into())]);
        let error = OpenError::NotViable { name: device.name, group: 4, others };
        assert!(error.to_string().contains("0000:01:00.1 (driver snd_hda_intel)"));
    }
}
