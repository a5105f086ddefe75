//! vfio-user, both ends: a codec without I/O, a client whose device is an
//! [`airlift_core::MigrationDevice`], and a server that makes a device author's [`Device`] migratable.
#![forbid(unsafe_code)]

mod client;
pub mod codec;
mod device;
mod dma;
mod dma_log;
mod done;
mod irqs;
mod section;
mod server;
pub mod transport;

pub use client::{
    Client, ClientOptions, DmaHandler, DmaWriteLog, RegionDetails, VfioUserDevice, VfioUserDirtySource,
    VfioUserRegion,
};
pub use device::{
    Attachment, Description, DescriptionError, Detach, Device, DmaChange, IrqDescription, Loader,
    MigrationInterface, MigrationSupport, PciIds, RegionAreas, RegionDescription, RegionIndex, RegionMapping,
    Saver,
};
pub use dma::{Dma, DmaAccess, DmaError, DmaGuard};
pub use done::{Completion, Done};
pub use irqs::Irqs;
pub use section::{V1Mapping, V1Section, V1SectionError};
pub use server::{Server, ServerHandle, ServerOptions};
