//! The machine of `--no-guest`: devices that no guest uses. There is nothing to pause and no memory
//! to move.

use airlift::machine::{Blocker, Machine, MachineError, MachineMemory, MachineRecord, PendingInterrupt};
use airlift_core::{DeviceId, GpaRange, IovaMap, MemoryLayout};
use airlift_memory::GuestMemory;
use std::time::Duration;

/// No vCPUs, no memory, no records.
#[derive(Debug)]
pub(crate) struct NoGuest {
    running: bool,
}

impl NoGuest {
    /// `running`: what is here runs now, as far as there is something: on the source, its devices.
    pub(crate) const fn new(running: bool) -> Self {
        Self { running }
    }
}

impl Machine for NoGuest {
    fn blockers(&mut self) -> Result<Vec<Blocker>, MachineError> {
        Ok(Vec::new())
    }

    fn memory_layout(&mut self) -> Result<MemoryLayout, MachineError> {
        Ok(MemoryLayout::default())
    }

    fn memory(&mut self) -> Result<MachineMemory, MachineError> {
        GuestMemory::new(Vec::new())
            .map(MachineMemory::Engine)
            .map_err(|e| MachineError::new("memory", e.to_string()))
    }

    fn iova_map(&mut self, _device: &DeviceId) -> Result<IovaMap, MachineError> {
        Ok(IovaMap::default())
    }

    fn start_dirty(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn sync_dirty(&mut self, _dirty: &mut dyn FnMut(GpaRange)) -> Result<(), MachineError> {
        Ok(())
    }

    fn stop_dirty(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.running = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        // What runs here are the devices; the engine has started them.
        self.running = true;
        Ok(())
    }

    fn close_device_access(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn open_device_access(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn drain_interrupts(&mut self) -> Result<Vec<PendingInterrupt>, MachineError> {
        Ok(Vec::new())
    }

    fn inject_interrupts(&mut self, pending: &[PendingInterrupt]) -> Result<(), MachineError> {
        match pending.first() {
            None => Ok(()),
            Some(first) => Err(MachineError::new(
                "inject_interrupts",
                format!("device {} has an interrupt pending, and no guest is here to take it", first.device),
            )),
        }
    }

    fn save_records(&mut self) -> Result<Vec<MachineRecord>, MachineError> {
        Ok(Vec::new())
    }

    fn load_record(&mut self, record: &MachineRecord) -> Result<(), MachineError> {
        Err(MachineError::new(
            "load_record",
            format!(
                "a record {} came, and no guest is here to take it: use --vmm on both sides",
                record.name
            ),
        ))
    }

    fn release_shared(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn reclaim_shared(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn device_was_reset(&mut self, _device: &DeviceId) -> Result<(), MachineError> {
        Ok(())
    }

    fn running(&mut self) -> Result<bool, MachineError> {
        Ok(self.running)
    }

    fn external_memory_barrier(&mut self, _deadline: Duration) -> Result<(), MachineError> {
        Err(MachineError::new("external_memory_barrier", "there is no memory"))
    }
}
