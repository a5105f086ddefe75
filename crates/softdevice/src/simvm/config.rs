//! How a SimVm is made, and what is refused.

use airlift_core::DeviceId;
use std::path::PathBuf;

/// Smallest guest memory in bytes.
pub const MIN_MEMORY: u64 = 2 << 20;
/// Largest guest memory in bytes.
pub const MAX_MEMORY: u64 = 1 << 40;
/// Most vCPUs.
pub const MAX_VCPUS: u32 = 64;
/// Most devices: each has a slot for its BAR between memory and 4 GiB.
pub const MAX_DEVICES: usize = 32;

/// One device of a SimVm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimDevice {
    /// Its name in a migration.
    pub id: DeviceId,
    /// The socket of its vfio-user server.
    pub socket: PathBuf,
}

/// What a SimVm is. Both sides of a migration need the same memory, vCPUs, working set, seed, ring
/// entries, peer DMA and devices in the same order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimVmConfig {
    /// Guest memory in bytes, a multiple of 64 KiB, [`MIN_MEMORY`] to [`MAX_MEMORY`]. Half of it, at
    /// most 3 GiB, is below 4 GiB.
    pub memory: u64,
    /// Number of vCPU threads, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Bytes that all vCPUs together write in a second; 0: none.
    pub write_rate: u64,
    /// Bytes that the vCPUs write in turn; `None`, or more: half of memory.
    pub working_set: Option<u64>,
    /// What the content of memory follows from.
    pub seed: u64,
    /// The devices.
    pub devices: Vec<SimDevice>,
    /// Waits for the state of a migration: nothing is written to memory or to devices.
    pub incoming: bool,
    /// Entries in a second of each ring; 0: the device's own rate.
    pub ring_rate: u64,
    /// Slots of each ring in guest memory, 16 to 65,536. A ring in a BAR has as many as fit.
    pub ring_entries: u64,
    /// Entries for each interrupt; `None`: the device's own number.
    pub interrupt_every: Option<u64>,
    /// Device i writes into a ring in the BAR of device i + 1, and the last into that of the first.
    /// Has no effect with fewer than two devices.
    pub peer_dma: bool,
}

impl Default for SimVmConfig {
    fn default() -> Self {
        Self {
            memory: 256 << 20,
            vcpus: 2,
            write_rate: 32 << 20,
            working_set: None,
            seed: 1,
            devices: Vec::new(),
            incoming: false,
            ring_rate: 0,
            ring_entries: 4096,
            interrupt_every: None,
            peer_dma: true,
        }
    }
}

/// A SimVm could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SimVmError {
    /// A value of the configuration is out of its range.
    #[error("{what}: {why}")]
    Config {
        /// Which.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A device cannot be used.
    #[error("device {device}: {operation}: {message}")]
    Device {
        /// Which.
        device: DeviceId,
        /// What was being done.
        operation: &'static str,
        /// What happened.
        message: String,
    },
    /// The system refused memory, a thread or a descriptor.
    #[error("{what}: {source}")]
    System {
        /// For what.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Memory cannot be mapped.
    #[error("guest memory: {0}")]
    Memory(#[from] airlift_memory::MemoryError),
}

impl SimVmConfig {
    pub(super) fn check(&self) -> Result<(), SimVmError> {
        let refuse = |what, why: String| Err(SimVmError::Config { what, why });
        if self.memory < MIN_MEMORY || self.memory > MAX_MEMORY || !self.memory.is_multiple_of(64 << 10) {
            return refuse(
                "memory",
                format!("{} bytes, must be a multiple of 64 KiB from 2 MiB", self.memory),
            );
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return refuse("vcpus", format!("{}, must be 1 to {MAX_VCPUS}", self.vcpus));
        }
        if self.devices.len() > MAX_DEVICES {
            return refuse("devices", format!("{}, at most {MAX_DEVICES}", self.devices.len()));
        }
        if let Some((i, d)) =
            self.devices.iter().enumerate().find(|(i, d)| self.devices[..*i].iter().any(|o| o.id == d.id))
        {
            return refuse("devices", format!("number {i} has the name of another, {}", d.id));
        }
        if !(16..=65_536).contains(&self.ring_entries) {
            return refuse("ring_entries", format!("{}, must be 16 to 65536", self.ring_entries));
        }
        Ok(())
    }
}
