//! A machine with faults in its memory or in its dirty reports.

use super::LastPageLost;
use airlift::machine::{Blocker, Machine, MachineError, MachineMemory, MachineRecord, PendingInterrupt};
use airlift_core::{DeviceId, GpaRange, IovaMap, MemoryLayout};
use airlift_memory::GuestMemory;
use std::time::Duration;

/// Which faults a [`FaultyMachine`] has.
#[derive(Clone, Debug, Default)]
pub struct MachineFaults {
    /// Armed when vCPUs are paused: what is written last is lost. The same loss can be given to the
    /// devices' dirty sources.
    pub lose_last_page: Option<LastPageLost>,
    /// One byte of memory changes after everything was loaded and before anything runs.
    pub corrupt_memory: bool,
}

/// Passes everything on to a machine, with faults.
pub struct FaultyMachine {
    inner: Box<dyn Machine>,
    faults: MachineFaults,
}

impl std::fmt::Debug for FaultyMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultyMachine").field("faults", &self.faults).finish_non_exhaustive()
    }
}

impl FaultyMachine {
    /// Around `inner`.
    #[must_use]
    pub fn new(inner: Box<dyn Machine>, faults: MachineFaults) -> Self {
        Self { inner, faults }
    }

    fn corrupt(&mut self) -> Result<(), MachineError> {
        let failed = |message: String| MachineError::new("corrupt_memory", message);
        let MachineMemory::Engine(memory) = self.inner.memory()? else {
            return Err(failed("the engine has no access to this machine's memory".into()));
        };
        let gpa = page_to_corrupt(&memory)
            .ok_or_else(|| failed("no page with content stands before an empty one".into()))?;
        let word = memory.load_u64(gpa).map_err(|e| failed(e.to_string()))?;
        memory.store_u64(gpa, word ^ 1).map_err(|e| failed(e.to_string()))
    }
}

/// The last page with content that stands right before an empty one. In a SimVm such a page is never
/// written again, so that what is wrong with it stays wrong.
fn page_to_corrupt(memory: &GuestMemory) -> Option<u64> {
    for region in memory.regions().iter().rev() {
        let mut next_is_empty = false;
        for page in (0..region.mapping.len() / 4096).rev() {
            let gpa = region.gpa + page * 4096;
            let mut bytes = [0; 4096];
            memory.read(gpa, &mut bytes).ok()?;
            let empty = bytes.iter().all(|b| *b == 0);
            if next_is_empty && !empty {
                return Some(gpa);
            }
            next_is_empty = empty;
        }
    }
    None
}

impl Machine for FaultyMachine {
    fn blockers(&mut self) -> Result<Vec<Blocker>, MachineError> {
        self.inner.blockers()
    }

    fn memory_layout(&mut self) -> Result<MemoryLayout, MachineError> {
        self.inner.memory_layout()
    }

    fn memory(&mut self) -> Result<MachineMemory, MachineError> {
        self.inner.memory()
    }

    fn iova_map(&mut self, device: &DeviceId) -> Result<IovaMap, MachineError> {
        self.inner.iova_map(device)
    }

    fn start_dirty(&mut self) -> Result<(), MachineError> {
        self.inner.start_dirty()
    }

    fn sync_dirty(&mut self, dirty: &mut dyn FnMut(GpaRange)) -> Result<(), MachineError> {
        let Some(loss) = &self.faults.lose_last_page else { return self.inner.sync_dirty(dirty) };
        let mut ranges = Vec::new();
        self.inner.sync_dirty(&mut |r| ranges.push((r.start.0, r.length)))?;
        ranges.sort_unstable();
        loss.pass(ranges, |start, length| dirty(GpaRange::new(start, length)));
        Ok(())
    }

    fn stop_dirty(&mut self) -> Result<(), MachineError> {
        self.inner.stop_dirty()
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.inner.pause()?;
        if let Some(loss) = &self.faults.lose_last_page {
            loss.arm();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.inner.resume()
    }

    fn close_device_access(&mut self) -> Result<(), MachineError> {
        self.inner.close_device_access()
    }

    fn open_device_access(&mut self) -> Result<(), MachineError> {
        self.inner.open_device_access()
    }

    fn drain_interrupts(&mut self) -> Result<Vec<PendingInterrupt>, MachineError> {
        self.inner.drain_interrupts()
    }

    fn inject_interrupts(&mut self, pending: &[PendingInterrupt]) -> Result<(), MachineError> {
        self.inner.inject_interrupts(pending)
    }

    fn save_records(&mut self) -> Result<Vec<MachineRecord>, MachineError> {
        self.inner.save_records()
    }

    fn load_record(&mut self, record: &MachineRecord) -> Result<(), MachineError> {
        self.inner.load_record(record)
    }

    fn release_shared(&mut self) -> Result<(), MachineError> {
        self.inner.release_shared()
    }

    fn reclaim_shared(&mut self) -> Result<(), MachineError> {
        self.inner.reclaim_shared()?;
        if self.faults.corrupt_memory {
            self.corrupt()?;
        }
        Ok(())
    }

    fn device_was_reset(&mut self, device: &DeviceId) -> Result<(), MachineError> {
        self.inner.device_was_reset(device)
    }

    fn running(&mut self) -> Result<bool, MachineError> {
        self.inner.running()
    }

    fn external_memory_barrier(&mut self, deadline: Duration) -> Result<(), MachineError> {
        self.inner.external_memory_barrier(deadline)
    }
}
