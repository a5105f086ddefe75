//! The machine: what an embedder of the whole session implements.
//!
//! No method has a default body: what a VMM does not have, it says (an empty list, an error), so
//! that nothing is skipped in silence. The engine calls from one thread, in the order of the phases;
//! [`Source`](crate::Source) and [`Destination`](crate::Destination) name the order.

use airlift_core::{DeviceId, GpaRange, IovaMap, MemoryLayout};
use airlift_memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The machine refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{operation}: {message}")]
pub struct MachineError {
    /// The method that failed.
    pub operation: String,
    /// What happened, for a person.
    pub message: String,
    /// The error number, where there is one.
    pub errno: Option<airlift_core::Errno>,
}

impl MachineError {
    /// An error without an error number.
    #[must_use]
    pub fn new(operation: impl Into<String>, message: impl Into<String>) -> Self {
        Self { operation: operation.into(), message: message.into(), errno: None }
    }
}

/// A reason why this machine cannot be migrated now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// Who says so (a device, a subsystem).
    pub owner: String,
    /// Why.
    pub reason: String,
}

/// Who moves guest memory.
#[derive(Clone, Debug)]
pub enum MachineMemory {
    /// The engine, through these mappings.
    Engine(GuestMemory),
    /// The VMM; [`Machine::external_memory_barrier`] is its result.
    External,
}

/// Whose state a record holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordOwner {
    /// The machine itself: vCPUs, an interrupt controller.
    Machine,
    /// The configuration of one VFIO device (PCI config space, BARs, MSI state); travels as the
    /// CONFIG record of that device's stream. At most one for each device.
    Device(DeviceId),
}

/// A named piece of the machine's own state, opaque to the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineRecord {
    /// Whose it is.
    pub owner: RecordOwner,
    /// Its name, 1 to 255 bytes. That of a device record does not travel: there is at most one, and it
    /// arrives as `config`.
    pub name: String,
    /// Its content, at most 1,000,000 bytes; 4096 records and 64 MiB are the most of a machine.
    pub data: Vec<u8>,
}

/// An interrupt that a device raised before the stop and the guest has not seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingInterrupt {
    /// The device that raised it.
    pub device: DeviceId,
    /// Interrupt index (0 INTx, 1 MSI, 2 MSI-X).
    pub index: u32,
    /// Number within the index.
    pub vector: u32,
    /// How often it was raised.
    pub count: u64,
}

/// A virtual machine, as far as a migration concerns it.
///
/// On the source, in order: `blockers`, `memory_layout`, `memory`, `iova_map`, `start_dirty`,
/// `sync_dirty`…, then in the downtime `pause`, `close_device_access`, (devices stop)
/// `drain_interrupts`, `save_records`, `release_shared`, `sync_dirty`; in a rollback `reclaim_shared`
/// (if it was released), `open_device_access`, `inject_interrupts`, `resume`; and in the end always
/// `stop_dirty`, `running`.
///
/// On the destination: `blockers`, `memory_layout`, `memory`, `load_record`…, then in the downtime
/// `reclaim_shared`, (devices run) `open_device_access`, `inject_interrupts`, `resume`. When one of them
/// but `resume` fails, the guest goes back: `close_device_access` if it was opened, (devices are reset)
/// `release_shared` if it was taken. In the end always `running`.
pub trait Machine: Send {
    /// Everything that forbids a migration now; empty when nothing does.
    ///
    /// # Errors
    /// When the machine cannot answer.
    fn blockers(&mut self) -> Result<Vec<Blocker>, MachineError>;

    /// The layout of guest memory, frozen from this call to the end of the session.
    ///
    /// # Errors
    /// When the machine cannot answer.
    fn memory_layout(&mut self) -> Result<MemoryLayout, MachineError>;

    /// Access to guest memory.
    ///
    /// # Errors
    /// When it cannot be given.
    fn memory(&mut self) -> Result<MachineMemory, MachineError>;

    /// How addresses of `device` map to guest memory.
    ///
    /// # Errors
    /// When the device is not known.
    fn iova_map(&mut self, device: &DeviceId) -> Result<IovaMap, MachineError>;

    /// Begins to track writes by vCPUs and by the VMM itself.
    ///
    /// # Errors
    /// When tracking cannot be started; the migration ends.
    fn start_dirty(&mut self) -> Result<(), MachineError>;

    /// Fetches and clears: calls `dirty` with each range written by vCPUs or the VMM since the last
    /// call. Over-reporting is allowed, under-reporting never.
    ///
    /// # Errors
    /// When the fetch fails; all memory is then taken as dirty, once, and a second error ends the migration.
    fn sync_dirty(&mut self, dirty: &mut dyn FnMut(GpaRange)) -> Result<(), MachineError>;

    /// Ends tracking. Called in every end of a migration, also twice.
    ///
    /// # Errors
    /// When it cannot be ended; reported, nothing more.
    fn stop_dirty(&mut self) -> Result<(), MachineError>;

    /// Stops all vCPUs; none runs when it returns.
    ///
    /// # Errors
    /// When they cannot be stopped; the migration is rolled back.
    fn pause(&mut self) -> Result<(), MachineError>;

    /// Lets vCPUs run.
    ///
    /// # Errors
    /// When they cannot run: on the source a rollback is then incomplete, and said so.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// Keeps the guest and the VMM away from all devices: BAR mappings, kicks. Posted writes have
    /// reached the devices when it returns.
    ///
    /// # Errors
    /// When access cannot be closed; the migration is rolled back.
    fn close_device_access(&mut self) -> Result<(), MachineError>;

    /// Undoes [`close_device_access`](Self::close_device_access).
    ///
    /// # Errors
    /// As [`resume`](Self::resume).
    fn open_device_access(&mut self) -> Result<(), MachineError>;

    /// Takes the interrupts that devices raised and the guest has not seen; devices are stopped.
    ///
    /// # Errors
    /// When they cannot be read; the migration is rolled back.
    fn drain_interrupts(&mut self) -> Result<Vec<PendingInterrupt>, MachineError>;

    /// Delivers interrupts that were drained, here or on the other side.
    ///
    /// # Errors
    /// When one cannot be delivered.
    fn inject_interrupts(&mut self, pending: &[PendingInterrupt]) -> Result<(), MachineError>;

    /// The machine's records, in the order in which the destination must load them. Saving them may
    /// write guest memory: the final dirty sync comes after.
    ///
    /// # Errors
    /// When one cannot be saved; the migration is rolled back.
    fn save_records(&mut self) -> Result<Vec<MachineRecord>, MachineError>;

    /// Restores one record. Device records are restored while the device is RESUMING.
    ///
    /// # Errors
    /// When it is refused; the migration is aborted with this as the cause.
    fn load_record(&mut self, record: &MachineRecord) -> Result<(), MachineError>;

    /// Gives up what both sides share (disks, addresses): the destination may take it now. Called right
    /// after [`save_records`](Self::save_records), in the downtime: it may write guest memory, for the
    /// final dirty sync comes after it.
    ///
    /// On the destination it is called after a start that failed: only when it has succeeded may the
    /// source run again.
    ///
    /// # Errors
    /// When it cannot be given up: on the source the migration is rolled back, on the destination it is
    /// in doubt.
    fn release_shared(&mut self) -> Result<(), MachineError>;

    /// Takes what both sides share: on the destination before it runs, on the source in a rollback.
    ///
    /// # Errors
    /// When it cannot be taken; nothing of it is held then.
    fn reclaim_shared(&mut self) -> Result<(), MachineError>;

    /// A device was reset by policy: what the guest sees of it is lost, and config and interrupts
    /// must be armed anew.
    ///
    /// # Errors
    /// When the machine cannot re-arm it; reported.
    fn device_was_reset(&mut self, device: &DeviceId) -> Result<(), MachineError>;

    /// Whether vCPUs run now.
    ///
    /// # Errors
    /// When the machine cannot answer: it is then unknown.
    fn running(&mut self) -> Result<bool, MachineError>;

    /// For [`MachineMemory::External`]: waits until the VMM's own transfer of all memory is done on
    /// this side. On the source in StopCopy, on the destination before LOADED. It can be called several
    /// times, each time for a slice of the whole wait.
    ///
    /// # Errors
    /// With the number `ETIMEDOUT` when `deadline` (from now) has passed and the transfer goes on: it is
    /// then called again until the phase's own deadline. Any other error ends the migration, which is
    /// rolled back.
    fn external_memory_barrier(&mut self, deadline: Duration) -> Result<(), MachineError>;
}
