//! Faults as wrappers: around a device, a source of dirty reports, or a machine.
//!
//! Each does what it wraps does, except for one thing that goes wrong once, in a place that no
//! checksum of the stream covers. They show that a verification can fail.

mod device;
mod dirty;
mod machine;

pub use device::CorruptingDevice;
pub use dirty::{LastPageLost, LossyDirtySource};
pub use machine::{FaultyMachine, MachineFaults};
