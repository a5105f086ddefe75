//! vfio-user, both ends: a codec without I/O, a client whose device is an
//! [`airlift_core::MigrationDevice`], and a server that makes a device author's [`Device`] migratable.
#![forbid(unsafe_code)]

mod device;

pub use device::{
    Attachment, Description, Detach, Device, DmaChange, IrqDescription, Loader, MigrationSupport, PciIds,
    RegionAreas, RegionDescription, RegionIndex, RegionMapping, Saver,
};
