//! Live migration of VFIO devices between hosts.
//!
//! Three ways in, by how much of a VMM there is already:
//!
//! - [`DeviceSet`] drives devices through the phases for a VMM that has its own memory migration,
//!   connections and control. It opens nothing and commits nothing.
//! - [`Source`] and [`Destination`] are the whole session, over an implementation of [`Machine`].
//! - [`vmm`] lets a VMM in any language be that machine, over a socket.
//!
//! The way of the data is the way through the modules: a device is read into frames in `set::save`,
//! which get room and a connection in `wire::credit` and `wire::outbound`, arrive in
//! `wire::inbound`, and are written to a device in `set::load`. Memory takes the same connections
//! from `memory::sweep`. The phases of each side are the files of `source` and `destination`.
//!
//! Threads are started by the embedder's [`Spawner`]; nothing here opens a path except
//! [`FileJournal`] and the connectors of [`link`].
#![forbid(unsafe_code)]

mod clock;
mod control;
mod destination;
mod event;
mod interrupts;
mod journal;
pub mod link;
pub mod machine;
mod memory;
mod meter;
mod options;
mod report;
pub mod set;
mod source;
mod spawn;
pub mod vmm;
mod wire;

pub use airlift_core as core;
pub use airlift_stream as stream;
#[cfg(feature = "vfio")]
pub use airlift_vfio as vfio;
#[cfg(feature = "vfio-user")]
pub use airlift_vfio_user as vfio_user;
pub use clock::{Environment, KernelRandom, MonotonicClock, Random, kernel_boot_id};
pub use control::{CancelAnswer, Control, DeviceProgress, Progress};
pub use destination::Destination;
pub use event::{Event, NoObserver, Observer, Transition};
pub use journal::{FileJournal, ReadJournalError};
pub use machine::{
    Blocker, Machine, MachineError, MachineMemory, MachineRecord, PendingInterrupt, RecordOwner,
};
pub use options::{
    DEFAULT_RECEIVE_BUDGET, Deadlines, DestinationOptions, Durability, ResetPolicy, SourceOptions,
    StallPolicy, TestOptions,
};
pub use report::{DeviceReport, DowntimeTerms, MemoryReport, MigrationReport, Outcome, Running};
pub use set::DeviceSet;
pub use source::{Ended, Source, SourceDevice};
pub use spawn::{Body, Role, SpawnError, Spawner, StdSpawner};
pub use wire::PooledBuf;
