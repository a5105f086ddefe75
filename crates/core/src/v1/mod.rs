//! Interface v1: the migration region of Linux 5.8 to 5.17, from its user's side.
//!
//! A device that speaks it has a region that begins with `struct vfio_device_migration_info`; its data
//! section follows. All that a migration does is reads and writes there:
//!
//! | offset | field | |
//! |---|---|---|
//! | 0 | u32 device_state | what the device does: [`bits`] |
//! | 4 | u32 reserved | |
//! | 8 | u64 pending_bytes | how much there still is, never exact |
//! | 16 | u64 data_offset | where in the region the next chunk is, or is to be written |
//! | 24 | u64 data_size | how large it is |
//! | 32 | the data section | trapped, mapped, or partly mapped |
//!
//! [`SaveLoop`] and [`LoadLoop`] say what is to be read or written next, given what was read: no I/O
//! is in them. [`V1Device`] does what they say over a [`RegionAccess`](crate::RegionAccess), and is a
//! [`MigrationDevice`](crate::MigrationDevice) over whatever transport that is.
//!
//! The device's own side is the server's of whoever has one; `bits` holds what both need.

pub mod bits;
mod device;
mod load;
mod save;
mod session;

use crate::RegionArea;

pub use device::{V1Control, V1Device};
pub use load::{LoadLoop, LoadStep};
pub use save::{SaveLoop, SaveStep, V1Fault};

/// The migration region of a device, for whoever wants to show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationRegion {
    /// Its number.
    pub index: u32,
    /// Its size in bytes.
    pub size: u64,
    /// What of it is mapped here, in no order.
    pub mapped: Vec<RegionArea>,
    /// Why a part that could be mapped is not (V1-MMAP).
    pub unmapped: Option<String>,
    /// Bytes that its data section has at the most.
    pub data_section: u64,
    /// The device takes a transaction only in one round (V1-WHOLE).
    pub whole_transactions: bool,
}

/// Type and subtype of the region, in its TYPE capability.
pub const REGION_TYPE: (u32, u32) = (3, 1);
/// Offset of `device_state`, 4 bytes.
pub const DEVICE_STATE: u64 = 0;
/// Offset of the reserved field, 4 bytes: reads 0, writes are ignored.
pub const RESERVED: u64 = 4;
/// Offset of `pending_bytes`, 8 bytes, read only.
pub const PENDING_BYTES: u64 = 8;
/// Offset of `data_offset`, 8 bytes, read only.
pub const DATA_OFFSET: u64 = 16;
/// Offset of `data_size`, 8 bytes.
pub const DATA_SIZE: u64 = 24;
/// Bytes of the fields; the data section lies behind them.
pub const INFO_SIZE: u64 = 32;
