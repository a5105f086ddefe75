//! The VMM of `--vmm` as the engine's machine, and still in hand afterwards: when the session is
//! over the VMM is told how it ended, for its log.

use airlift::Outcome;
use airlift::machine::{Blocker, Machine, MachineError, MachineMemory, MachineRecord, PendingInterrupt};
use airlift::vmm::RemoteVmm;
use airlift_core::{DeviceId, GpaRange, IovaMap, MemoryLayout};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A VMM that the engine and the command share. The engine alone uses it while a session runs.
#[derive(Clone, Debug)]
pub(crate) struct Vmm(Arc<Mutex<RemoteVmm>>);

impl Vmm {
    /// Shares a VMM that was greeted.
    pub(crate) fn new(vmm: RemoteVmm) -> Self {
        Self(Arc::new(Mutex::new(vmm)))
    }

    fn lock(&self) -> MutexGuard<'_, RemoteVmm> {
        // A call that panicked has left at most a connection that reports itself as broken.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the VMM how the session ended on this side. A VMM that is gone has other worries.
    pub(crate) fn ended(&self, outcome: Outcome) {
        let outcome = match outcome {
            Outcome::Completed => "completed",
            Outcome::Aborted => "aborted",
            Outcome::Cancelled => "cancelled",
            Outcome::Incompatible => "incompatible",
            Outcome::InDoubt => "in_doubt",
        };
        if let Err(error) = self.lock().migration_ended(outcome) {
            tracing::warn!(%error, "the VMM could not be told how the migration ended");
        }
    }
}

impl Machine for Vmm {
    fn blockers(&mut self) -> Result<Vec<Blocker>, MachineError> {
        self.lock().blockers()
    }

    fn memory_layout(&mut self) -> Result<MemoryLayout, MachineError> {
        self.lock().memory_layout()
    }

    fn memory(&mut self) -> Result<MachineMemory, MachineError> {
        self.lock().memory()
    }

    fn iova_map(&mut self, device: &DeviceId) -> Result<IovaMap, MachineError> {
        self.lock().iova_map(device)
    }

    fn start_dirty(&mut self) -> Result<(), MachineError> {
        self.lock().start_dirty()
    }

    fn sync_dirty(&mut self, dirty: &mut dyn FnMut(GpaRange)) -> Result<(), MachineError> {
        self.lock().sync_dirty(dirty)
    }

    fn stop_dirty(&mut self) -> Result<(), MachineError> {
        self.lock().stop_dirty()
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.lock().pause()
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.lock().resume()
    }

    fn close_device_access(&mut self) -> Result<(), MachineError> {
        self.lock().close_device_access()
    }

    fn open_device_access(&mut self) -> Result<(), MachineError> {
        self.lock().open_device_access()
    }

    fn drain_interrupts(&mut self) -> Result<Vec<PendingInterrupt>, MachineError> {
        self.lock().drain_interrupts()
    }

    fn inject_interrupts(&mut self, pending: &[PendingInterrupt]) -> Result<(), MachineError> {
        self.lock().inject_interrupts(pending)
    }

    fn save_records(&mut self) -> Result<Vec<MachineRecord>, MachineError> {
        self.lock().save_records()
    }

    fn load_record(&mut self, record: &MachineRecord) -> Result<(), MachineError> {
        self.lock().load_record(record)
    }

    fn release_shared(&mut self) -> Result<(), MachineError> {
        self.lock().release_shared()
    }

    fn reclaim_shared(&mut self) -> Result<(), MachineError> {
        self.lock().reclaim_shared()
    }

    fn device_was_reset(&mut self, device: &DeviceId) -> Result<(), MachineError> {
        self.lock().device_was_reset(device)
    }

    fn running(&mut self) -> Result<bool, MachineError> {
        self.lock().running()
    }

    fn external_memory_barrier(&mut self, deadline: Duration) -> Result<(), MachineError> {
        self.lock().external_memory_barrier(deadline)
    }
}
