//! The machine of `--no-guest`: devices that no guest uses. There is nothing to pause. Memory is that
//! of `--memory`, and the only records are the PCI configurations of the kernel's devices, which a VMM
//! would save itself: they are restored while the devices are RESUMING.
//!
//! Eventfds of interrupts are not in a configuration: who takes the devices over makes new ones.

use crate::memory::FileMemory;
use airlift::machine::{
    Blocker, Machine, MachineError, MachineMemory, MachineRecord, PendingInterrupt, RecordOwner,
};
use airlift_core::{DeviceId, GpaRange, IovaMap, MemoryLayout};
use airlift_memory::GuestMemory;
use airlift_vfio::PciConfig;
use std::time::Duration;

/// No vCPUs; memory and records of devices only where they were given.
#[derive(Debug, Default)]
pub(crate) struct NoGuest {
    running: bool,
    memory: Option<FileMemory>,
    /// Devices that reach the memory.
    reach: Vec<DeviceId>,
    configs: Vec<(DeviceId, PciConfig)>,
}

impl NoGuest {
    /// `running`: what is here runs now, as far as there is something: on the source, its devices.
    pub(crate) fn new(running: bool) -> Self {
        Self { running, ..Self::default() }
    }

    /// The same with memory, which the devices `reach` can write.
    pub(crate) fn with_memory(mut self, memory: Option<FileMemory>, reach: Vec<DeviceId>) -> Self {
        self.memory = memory;
        self.reach = reach;
        self
    }

    /// The same with these devices' configurations.
    pub(crate) fn with_configs(mut self, configs: Vec<(DeviceId, PciConfig)>) -> Self {
        self.configs = configs;
        self
    }
}

fn on_device(operation: &str, id: &DeviceId, error: &airlift_core::DeviceError) -> MachineError {
    let message = format!("the configuration of {id}: {error}");
    MachineError { errno: error.errno, ..MachineError::new(operation, message) }
}

impl Machine for NoGuest {
    fn blockers(&mut self) -> Result<Vec<Blocker>, MachineError> {
        // A configuration that cannot be carried is found before anything is touched.
        let blocker = |(id, config): &(DeviceId, PciConfig)| {
            let reason = config.check().err()?;
            Some(Blocker { owner: id.to_string(), reason: reason.to_string() })
        };
        Ok(self.configs.iter().filter_map(blocker).collect())
    }

    fn memory_layout(&mut self) -> Result<MemoryLayout, MachineError> {
        Ok(self.memory.as_ref().map(|m| m.layout().clone()).unwrap_or_default())
    }

    fn memory(&mut self) -> Result<MachineMemory, MachineError> {
        if let Some(memory) = &self.memory {
            return Ok(MachineMemory::Engine(memory.memory().clone()));
        }
        GuestMemory::new(Vec::new())
            .map(MachineMemory::Engine)
            .map_err(|e| MachineError::new("memory", e.to_string()))
    }

    fn iova_map(&mut self, device: &DeviceId) -> Result<IovaMap, MachineError> {
        let memory = self.memory.as_ref().filter(|_| self.reach.contains(device));
        Ok(memory.map(FileMemory::iova_map).unwrap_or_default())
    }

    // Nobody but the devices writes to the memory: that is the user's word.
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
        let save = |(id, config): &(DeviceId, PciConfig)| {
            let data = config.save().map_err(|e| on_device("save_records", id, &e))?;
            Ok(MachineRecord { owner: RecordOwner::Device(id.clone()), name: "config".into(), data })
        };
        self.configs.iter().map(save).collect()
    }

    fn load_record(&mut self, record: &MachineRecord) -> Result<(), MachineError> {
        if let RecordOwner::Device(id) = &record.owner {
            let Some((_, config)) = self.configs.iter().find(|(other, _)| other == id) else {
                let message = format!(
                    "a configuration of {id} came, and the device here is no PCI device of the kernel that could take it"
                );
                return Err(MachineError::new("load_record", message));
            };
            return config.restore(&record.data).map_err(|e| on_device("load_record", id, &e));
        }
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
        Err(MachineError::new("external_memory_barrier", "no memory is moved by a VMM"))
    }
}
