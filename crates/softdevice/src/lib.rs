//! SoftDevice, a device in software that does everything a migration can break, and the machine
//! around it. They ship with the command, for its demo and for tests.
#![forbid(unsafe_code)]

mod device;
pub mod simvm;

pub use device::{
    FailArc, SoftDevice, SoftDeviceError, SoftDeviceOptions, SoftEvent, SoftMonitor, registers,
};
