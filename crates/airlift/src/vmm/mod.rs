//! The VMM protocol: a VMM in any language drives a session over a UNIX socket (`--vmm unix:PATH`).
//!
//! The VMM listens; the migration process connects and asks. One JSON line asks, one line answers,
//! file descriptors travel beside the lines, and what can be large (guest memory, the dirty bitmap,
//! machine records) is in memfds and never in JSON. The verbs are the methods of
//! [`Machine`], one to one. `docs/vmm-protocol.md` tells it byte by byte.
//!
//! [`RemoteVmm`] is the migration process's end and is a `Machine`. [`serve`] is the VMM's end for a
//! VMM in Rust. The order of the verbs is the engine's and is not checked here; the content of
//! records and of guest memory is opaque.
//!
//! Rules: VMM-ONE-ANSWER (each request gets exactly one answer, with its id; one request at a time),
//! VMM-LATE (an answer that comes after its deadline is dropped with its descriptors),
//! VMM-BOUNDS (a line, its descriptors, a record and their number are bounded before memory is
//! allocated), VMM-NO-DATA-IN-JSON (bytes of records, memory and bitmaps are in memfds),
//! VMM-DIRTY-OR (the VMM only sets bits of the dirty bitmap, the migration process alone clears them),
//! VMM-HANGUP (the end of the connection changes nothing of the guest but ends dirty tracking).

mod bitmap;
mod client;
mod server;
#[cfg(test)]
mod tests;
mod wire;

pub use client::{RemoteVmm, VmmTimeouts};
pub use server::{ServeEnd, serve};
pub use wire::{Line, LineChannel, MAX_FDS, MAX_LINE, MAX_RECORD, MAX_RECORDS, PROTOCOL, WireError};

use crate::machine::{Machine, MachineError};
use airlift_core::DeviceId;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::os::fd::OwnedFd;

/// What the descriptor of a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// A connected socket on which a vfio-user server takes migration requests for the device that
    /// the VMM is using.
    VfioUser,
    /// A VFIO device descriptor of the kernel.
    Vfio,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VfioUser => "vfio-user",
            Self::Vfio => "vfio",
        })
    }
}

/// A device that the VMM hands over for a migration.
#[derive(Debug)]
pub struct DeviceHandle {
    /// Its name in the migration.
    pub id: DeviceId,
    /// What `fd` is.
    pub kind: DeviceKind,
    /// The way to the device.
    pub fd: OwnedFd,
}

/// The file behind one region of guest memory.
#[derive(Debug)]
pub struct MemoryFile {
    /// Number of the region in the memory layout.
    pub region: u32,
    /// The file, readable and writable, at least `offset` plus the region's size long for as long as
    /// the session lives.
    pub fd: OwnedFd,
    /// Where the region begins in the file, in bytes; a multiple of 4096.
    pub offset: u64,
}

/// What a VMM gives over the protocol beside being a [`Machine`].
pub trait VmmDevices {
    /// The devices, each with a descriptor of its own, made anew for each call.
    ///
    /// # Errors
    /// When the descriptors cannot be made.
    fn devices(&mut self) -> Result<Vec<DeviceHandle>, MachineError>;

    /// The files behind guest memory, one for each region of the layout; `None` when the VMM moves
    /// memory itself.
    ///
    /// # Errors
    /// When they cannot be given.
    fn memory_files(&mut self) -> Result<Option<Vec<MemoryFile>>, MachineError>;

    /// The session is over on this side, with this outcome (`completed`, `aborted`, …): for a log.
    fn migration_ended(&mut self, outcome: &str);
}

/// A VMM that can be served: every [`Machine`] that is also [`VmmDevices`].
pub trait VmmServer: Machine + VmmDevices {}

impl<T: Machine + VmmDevices + ?Sized> VmmServer for T {}
