//! The kernel's VFIO, as a migration needs it.
//!
//! [`open`] finds a device in sysfs, or takes a descriptor that a VMM has opened, and attaches it to an
//! [`Iommufd`] or a type1 [`Container`]. [`VfioDevice`] is the device as the engine drives it: an
//! [`airlift_core::MigrationDevice`] over migration interface v2, or over the migration region of
//! interface v1, which [`KernelRegion`] gives access to. [`choose`] says who can report the memory that it
//! writes by DMA, and [`PciConfig`] holds what its migration data does not.
//!
//! ```no_run
//! use airlift_core::{DeviceId, MigrationDevice};
//! use airlift_vfio::{OpenOptions, VfioDevice, VfioOptions, open};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let opened = open(&"pci:0000:3b:00.2".parse()?, &OpenOptions::default())?;
//! let mut device = VfioDevice::new(DeviceId::new("net0")?, opened, VfioOptions::default())?;
//! println!("{} has {:?}", device.state()?, device.capabilities());
//! # Ok(())
//! # }
//! ```
//!
//! The last close of a device's descriptor resets a real device (K-LAST-CLOSE): what was loaded into it
//! lasts as long as somebody holds it.
//!
//! This is one of the two crates of Airlift with unsafe code, and all of it is in the private module
//! `sys`: every ioctl, and the timers that end calls which block. Nothing here orders devices among
//! each other, moves data between hosts, or runs a guest.

mod device;
mod dirty;
mod error;
mod fd;
mod feature;
mod identity;
mod iommu;
mod open;
mod options;
mod pci;
mod region;
mod session;
mod sys;
mod v1;
mod v2;
mod walk;

pub use device::VfioDevice;
pub use dirty::{ContainerLog, DeviceLog, DirtyChoice, PageTableLog, Tracker, choose};
pub use fd::{DeviceFd, DeviceFlags, DeviceInfo, RegionArea, RegionFlags, RegionInfo};
pub use feature::Feature;
pub use iommu::{Container, Iommufd};
pub use open::{
    Attachment, DeviceAddress, Group, Holder, Holders, InvalidAddress, OpenDevice, OpenError, OpenOptions,
    Roots, SysfsDevice, Way, list, open,
};
pub use options::{Recover, VfioOptions};
pub use pci::PciConfig;
pub use region::{KernelRegion, find_migration_region};
