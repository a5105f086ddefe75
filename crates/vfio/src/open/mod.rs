//! Opening devices: by which of the host's two ways, with which IOMMU context, and what stands in the
//! way.
//!
//! Whether the device can be migrated is not looked at here: that is asked of the open device.

mod address;
mod cdev;
mod error;
mod given;
mod group;
mod holder;
mod sysfs;

pub use address::{DeviceAddress, InvalidAddress};
pub use error::OpenError;
pub use group::Group;
pub(crate) use group::WeakGroup;
pub use holder::{Holder, Holders};
pub use sysfs::{SysfsDevice, list};

use crate::{Container, DeviceFd, Iommufd};
use airlift_core::Errno;
use rustix::fs::{Mode, OFlags};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Where the host's trees are. Tests use trees of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// The root of sysfs.
    pub sys: PathBuf,
    /// The root of the device nodes.
    pub dev: PathBuf,
    /// The root of procfs.
    pub proc: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self { sys: "/sys".into(), dev: "/dev".into(), proc: "/proc".into() }
    }
}

/// By which of the host's ways a device is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// Its character device where the host has it and an iommufd, otherwise its group.
    #[default]
    Auto,
    /// Its character device (`/dev/vfio/devices/vfioN`), bound to an iommufd.
    Cdev,
    /// Its group (`/dev/vfio/N`), in a type1 container.
    Group,
}

/// How to open a device.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// The iommufd to bind to; a new one where there is none.
    pub iommufd: Option<Iommufd>,
    /// The container for the group; a new one where there is none.
    pub container: Option<Container>,
    /// By which way. With [`Way::Auto`], a container that is handed in without an iommufd means the group.
    pub way: Way,
    /// Where the host's trees are.
    pub roots: Roots,
}

/// What a device's DMA goes through.
#[derive(Clone, Debug)]
pub enum Attachment {
    /// An iommufd.
    Iommufd {
        /// The iommufd.
        iommufd: Iommufd,
        /// The device's number in it.
        device: u32,
        /// The page table (or, for a device whose DMA is mediated, the address space) that it is
        /// attached to.
        page_table: u32,
    },
    /// A type1 container.
    Container {
        /// The container.
        container: Container,
        /// The device's group.
        group: Group,
    },
    /// Whatever the VMM that handed the descriptor in has attached it to.
    Given,
}

/// An open device.
#[derive(Clone, Debug)]
pub struct OpenDevice {
    // First, so that the device is closed before what it is attached to.
    /// Its descriptor.
    pub fd: DeviceFd,
    /// By which address it was opened.
    pub address: DeviceAddress,
    /// What sysfs says of it; `None` for a descriptor that was handed in and cannot be found there.
    pub sysfs: Option<SysfsDevice>,
    /// What its DMA goes through.
    pub attachment: Attachment,
}

/// Opens a device.
///
/// A driver may reset the device when it is opened; it surely does when the last descriptor is closed.
/// The device that another process holds is never touched: what `fd:N` names is used as it is.
///
/// # Errors
/// See [`OpenError`].
pub fn open(address: &DeviceAddress, options: &OpenOptions) -> Result<OpenDevice, OpenError> {
    let roots = &options.roots;
    let device = match address {
        DeviceAddress::Fd(number) => return given::open(*number, roots),
        DeviceAddress::Pci(name) => SysfsDevice::on_bus("pci", name, &address.to_string(), roots)?,
        DeviceAddress::Mdev(name) => SysfsDevice::on_bus("mdev", name, &address.to_string(), roots)?,
        DeviceAddress::Cdev(path) => {
            let stat = rustix::fs::stat(path).map_err(|error| match error {
                rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => {
                    OpenError::NotFound { address: address.to_string(), missing: path.clone() }
                }
                error => OpenError::of_node(path, Errno(error.raw_os_error())),
            })?;
            let device = rustix::fs::FileType::from_raw_mode(stat.st_mode)
                .is_char_device()
                .then(|| SysfsDevice::of_cdev(stat.st_rdev, roots))
                .flatten();
            let other =
                || OpenError::NotVfio { what: path.display().to_string(), wanted: "character device" };
            device.ok_or_else(other)?
        }
    };
    device.check_driver()?;
    if cdev_way(address, &device, options) {
        cdev::open(address, device, options)
    } else {
        group::open(address, device, options)
    }
}

fn cdev_way(address: &DeviceAddress, device: &SysfsDevice, options: &OpenOptions) -> bool {
    match options.way {
        Way::Cdev => true,
        Way::Group => false,
        Way::Auto if options.iommufd.is_some() => true,
        Way::Auto if options.container.is_some() => false,
        Way::Auto if matches!(address, DeviceAddress::Cdev(_)) => true,
        Way::Auto => device.cdev.is_some() && options.roots.dev.join("iommu").exists(),
    }
}

/// Opens one of the host's nodes for reading and writing.
pub(crate) fn open_node(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Errno(error.raw_os_error()))
}

impl OpenDevice {
    /// A device whose descriptor a VMM has handed in (over a socket, say), and which that VMM keeps: it is
    /// used as it is.
    ///
    /// # Errors
    /// When it is no descriptor of a VFIO device, or one of a character device that was not bound.
    pub fn from_fd(fd: OwnedFd, roots: &Roots) -> Result<Self, OpenError> {
        given::from_fd(fd, roots)
    }
}
