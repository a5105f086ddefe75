//! SimVm as an [`airlift::machine::Machine`].
//!
//! It is stricter than a VMM need be: a call that comes in the wrong order is refused, so that an
//! engine that forgets a step fails here.

use super::SimVm;
use super::shared::locked;
use airlift::machine::{Blocker, Machine, MachineError, MachineMemory, MachineRecord, PendingInterrupt};
use airlift::vmm::{DeviceHandle, DeviceKind, MemoryFile, VmmDevices};
use airlift_core::{DeviceId, Errno, GpaRange, Iova, IovaMap, IovaMapping, MemoryLayout};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long the guest's threads may take to stop.
const PAUSE_TIME: Duration = Duration::from_secs(20);

fn refused(operation: &str, errno: Errno, message: impl Into<String>) -> MachineError {
    MachineError { errno: Some(errno), ..MachineError::new(operation, message) }
}

impl SimVm {
    fn must_be_paused(&self, operation: &str) -> Result<(), MachineError> {
        if self.shared.gate.is_open() {
            return Err(refused(operation, Errno::EBUSY, "the vCPUs run"));
        }
        Ok(())
    }
}

impl Machine for SimVm {
    fn blockers(&mut self) -> Result<Vec<Blocker>, MachineError> {
        let lost = self.shared.ports.iter().filter_map(|port| {
            let why = port.lost()?;
            Some(Blocker { owner: port.id.to_string(), reason: format!("the device is lost: {why}") })
        });
        Ok(lost.collect())
    }

    fn memory_layout(&mut self) -> Result<MemoryLayout, MachineError> {
        Ok(self.shared.memory.layout())
    }

    fn memory(&mut self) -> Result<MachineMemory, MachineError> {
        Ok(MachineMemory::Engine(self.shared.memory.guest.clone()))
    }

    fn iova_map(&mut self, device: &DeviceId) -> Result<IovaMap, MachineError> {
        if !self.shared.ports.iter().any(|port| port.id == *device) {
            return Err(refused("iova_map", Errno::ENODEV, format!("there is no device {device}")));
        }
        // The BARs of peers are mapped for DMA too, and are not memory.
        let regions = self.shared.memory.layout().regions;
        let map = regions.iter().map(|r| IovaMapping { iova: Iova(r.gpa.0), gpa: r.gpa, length: r.size });
        Ok(IovaMap::new(map.collect()))
    }

    fn start_dirty(&mut self) -> Result<(), MachineError> {
        self.shared.memory.clear_dirty();
        locked(&self.shared.status).tracking = true;
        Ok(())
    }

    fn sync_dirty(&mut self, dirty: &mut dyn FnMut(GpaRange)) -> Result<(), MachineError> {
        if !locked(&self.shared.status).tracking {
            return Err(refused("sync_dirty", Errno::EINVAL, "dirty tracking was not started"));
        }
        let memory = &self.shared.memory;
        let paused = !self.shared.gate.is_open();
        let lost = paused && self.shared.sabotage.lose_dirty_page.swap(false, Ordering::Relaxed);
        let lost = if lost { self.shared.last_written(0) } else { None };
        let lose = |page| lost == Some(page);
        memory.take_dirty(lose, dirty);
        Ok(())
    }

    fn stop_dirty(&mut self) -> Result<(), MachineError> {
        locked(&self.shared.status).tracking = false;
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        if !self.shared.gate.close(PAUSE_TIME) {
            return Err(refused("pause", Errno::ETIMEDOUT, "a thread of the guest does not stop"));
        }
        self.shared.log.stopped();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        if self.shared.gate.is_open() {
            return Ok(());
        }
        let clock = {
            let status = locked(&self.shared.status);
            let missing = match (status.alive, status.owner, status.access) {
                (false, ..) => Some("no guest was loaded"),
                (_, false, _) => Some("what both sides share is not here"),
                (.., false) => Some("access to devices is closed"),
                _ => None,
            };
            if let Some(why) = missing {
                return Err(refused("resume", Errno::EINVAL, why));
            }
            status.pvclock
        };
        let agrees = self
            .shared
            .pvclock_agrees(clock.saves)
            .map_err(|e| MachineError::new("resume", format!("the page of the pvclock: {e}")))?;
        if !agrees {
            tracing::warn!(saves = clock.saves, "the page that the pvclock record wrote is not there");
            locked(&self.shared.status).record_mismatches += 1;
        }
        locked(&self.shared.status).drained.clear();
        self.shared.log.started();
        self.shared.gate.open();
        Ok(())
    }

    fn close_device_access(&mut self) -> Result<(), MachineError> {
        self.must_be_paused("close_device_access")?;
        for port in &self.shared.ports {
            // A read has a reply, and posted writes come before it. A device that is lost has none.
            port.flush();
        }
        locked(&self.shared.status).access = false;
        Ok(())
    }

    fn open_device_access(&mut self) -> Result<(), MachineError> {
        locked(&self.shared.status).access = true;
        Ok(())
    }

    /// What was drained stays on record until it is injected or the guest runs: when the process that
    /// took it dies, the next one drains it again.
    fn drain_interrupts(&mut self) -> Result<Vec<PendingInterrupt>, MachineError> {
        self.must_be_paused("drain_interrupts")?;
        let mut pending = locked(&self.shared.status).drained.clone();
        for port in &self.shared.ports {
            for (vector, number) in (0..port.vectors.count()).zip(0_u32..) {
                let count = port
                    .vectors
                    .take(vector)
                    .map_err(|e| MachineError::new("drain_interrupts", format!("{}: {e}", port.id)))?;
                if count > 0 {
                    let index = super::irq::MSIX;
                    pending.push(PendingInterrupt { device: port.id.clone(), index, vector: number, count });
                }
            }
        }
        locked(&self.shared.status).drained.clone_from(&pending);
        Ok(pending)
    }

    fn inject_interrupts(&mut self, pending: &[PendingInterrupt]) -> Result<(), MachineError> {
        for interrupt in pending {
            let port = self.shared.ports.iter().find(|port| port.id == interrupt.device);
            let vector = usize::try_from(interrupt.vector).unwrap_or(usize::MAX);
            let raised = port
                .filter(|port| interrupt.index == super::irq::MSIX && vector < port.vectors.count())
                .ok_or_else(|| "there is no such interrupt".to_owned())
                .and_then(|port| port.vectors.raise(vector, interrupt.count).map_err(|e| e.to_string()));
            if let Err(why) = raised {
                let message = format!("vector {} of {}: {why}", interrupt.vector, interrupt.device);
                return Err(refused("inject_interrupts", Errno::EINVAL, message));
            }
        }
        locked(&self.shared.status).drained.clear();
        Ok(())
    }

    fn save_records(&mut self) -> Result<Vec<MachineRecord>, MachineError> {
        self.must_be_paused("save_records")?;
        self.shared.save_records()
    }

    fn load_record(&mut self, record: &MachineRecord) -> Result<(), MachineError> {
        self.must_be_paused("load_record")?;
        if !self.shared.config.incoming || !self.shared.log.intervals().is_empty() {
            return Err(refused("load_record", Errno::EINVAL, "this machine is not waiting for a migration"));
        }
        self.shared.load_record(record)
    }

    fn release_shared(&mut self) -> Result<(), MachineError> {
        self.must_be_paused("release_shared")?;
        locked(&self.shared.status).owner = false;
        Ok(())
    }

    fn reclaim_shared(&mut self) -> Result<(), MachineError> {
        locked(&self.shared.status).owner = true;
        Ok(())
    }

    fn device_was_reset(&mut self, device: &DeviceId) -> Result<(), MachineError> {
        let i = self.shared.ports.iter().position(|port| port.id == *device);
        let i = i.ok_or_else(|| {
            refused("device_was_reset", Errno::ENODEV, format!("there is no device {device}"))
        })?;
        if !locked(&self.shared.status).alive {
            return Ok(());
        }
        self.shared
            .wire(i)
            .map_err(|why| MachineError::new("device_was_reset", format!("{device}: {why}")))?;
        locked(&self.shared.driver).devices[i].was_reset = true;
        Ok(())
    }

    fn running(&mut self) -> Result<bool, MachineError> {
        Ok(self.shared.gate.is_open())
    }

    fn external_memory_barrier(&mut self, _deadline: Duration) -> Result<(), MachineError> {
        Err(refused("external_memory_barrier", Errno::EINVAL, "the engine moves this machine's memory"))
    }
}

impl VmmDevices for SimVm {
    /// The devices that are not lost; [`Machine::blockers`] names the others.
    fn devices(&mut self) -> Result<Vec<DeviceHandle>, MachineError> {
        let mut handles = Vec::new();
        for port in self.shared.ports.iter().filter(|port| port.lost().is_none()) {
            let fd = port
                .migration_socket()
                .map_err(|why| MachineError::new("devices", format!("{}: {why}", port.id)))?;
            handles.push(DeviceHandle { id: port.id.clone(), kind: DeviceKind::VfioUser, fd });
        }
        Ok(handles)
    }

    fn memory_files(&mut self) -> Result<Option<Vec<MemoryFile>>, MachineError> {
        let files = self.shared.memory.files.iter().zip(0..).map(|(file, region)| {
            let fd = file.try_clone_fd().map_err(|e| MachineError::new("memory", e.to_string()))?;
            Ok(MemoryFile { region, fd, offset: 0 })
        });
        files.collect::<Result<_, _>>().map(Some)
    }

    fn migration_ended(&mut self, outcome: &str) {
        tracing::info!(outcome, "the migration has ended");
        locked(&self.shared.status).last_outcome = Some(outcome.to_owned());
    }
}
