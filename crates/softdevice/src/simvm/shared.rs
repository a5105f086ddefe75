//! What the machine's threads share, and the passes of the guest driver.

use super::clock::RunLog;
use super::config::SimVmConfig;
use super::content::{PAGE, mix};
use super::driver::{GuestRing, RingCounters};
use super::gate::Gate;
use super::layout::{PVCLOCK_PAGE, bar_address};
use super::memory::VmMemory;
use super::port::Port;
use crate::registers as reg;
use airlift::machine::PendingInterrupt;
use airlift_memory::MemoryError;
use serde::{Deserialize, Serialize};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often the driver asks devices for their counters.
const COMPARE_EVERY: Duration = Duration::from_millis(50);
/// How often while something is odd.
const COMPARE_SOON: Duration = Duration::from_millis(10);
/// Longest wait of the driver for an interrupt.
const DRIVER_WAIT: Duration = Duration::from_millis(1);

const PVCLOCK_MAGIC: u64 = u64::from_le_bytes(*b"PVCLOCK1");

/// Everything of a SimVm that several threads use.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: SimVmConfig,
    pub(super) memory: VmMemory,
    pub(super) gate: Gate,
    pub(super) log: RunLog,
    /// Steps that each vCPU has made.
    pub(super) steps: Vec<Mutex<u64>>,
    pub(super) ports: Vec<Port>,
    pub(super) driver: Mutex<Driver>,
    pub(super) status: Mutex<Status>,
    pub(super) sabotage: Sabotages,
}

/// Where the machine stands.
#[derive(Debug)]
pub(super) struct Status {
    /// There is a guest: it has booted or was loaded.
    pub(super) alive: bool,
    /// The guest may use its devices.
    pub(super) access: bool,
    /// This side has what both sides share.
    pub(super) owner: bool,
    /// Somebody fetches dirty pages.
    pub(super) tracking: bool,
    pub(super) pvclock: PvClock,
    pub(super) record_mismatches: u64,
    /// Interrupts that a migration process has taken and not given back.
    pub(super) drained: Vec<PendingInterrupt>,
    /// How the last migration ended on this side.
    pub(super) last_outcome: Option<String>,
}

/// A clock whose record writes guest memory when it is saved, as kvmclock's does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PvClock {
    /// How often it was saved.
    pub(super) saves: u64,
}

/// What the guest driver knows.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) devices: Vec<GuestDevice>,
    compare_at: Instant,
}

/// One device, seen by the guest.
#[derive(Debug)]
pub(super) struct GuestDevice {
    pub(super) rings: Vec<GuestRing>,
    /// Interrupts received of each vector.
    pub(super) received: Vec<u64>,
    /// It was reset: the driver must set it up again.
    pub(super) was_reset: bool,
}

/// Faults that a test asks for.
#[derive(Debug, Default)]
pub(super) struct Sabotages {
    pub(super) lose_dirty_page: AtomicBool,
    pub(super) lose_pvclock_page: AtomicBool,
}

/// The driver's record.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DriverRecord {
    pub(super) devices: Vec<DriverDeviceRecord>,
}

/// One device in the driver's record.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DriverDeviceRecord {
    pub(super) id: airlift_core::DeviceId,
    pub(super) rings: Vec<RingCounters>,
    pub(super) received: Vec<u64>,
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Slots of the ring in a BAR of this size.
fn bar_entries(config: &SimVmConfig, bar: u64) -> u64 {
    config.ring_entries.min(bar.saturating_sub(reg::RING_HEADER) / 8)
}

impl Driver {
    /// The rings that the configuration gives: ring 0 of each device in guest memory, ring 1 in the
    /// BAR of the next device.
    pub(super) fn new(config: &SimVmConfig, memory: &VmMemory, ports: &[Port]) -> Self {
        let device = |(i, port): (usize, &Port)| {
            let page = memory.pages.ring(i as u64);
            let mut rings = vec![GuestRing::in_memory(memory, 0, page, config.ring_entries)];
            if let Some(peer) = peer_of(config, i) {
                let bar = &ports[peer].bar2;
                let entries = bar_entries(config, bar.len());
                rings.push(GuestRing::in_bar(bar, 1, bar_address(peer as u64), entries));
            }
            GuestDevice { rings, received: vec![0; port.vectors.count()], was_reset: false }
        };
        Self { devices: ports.iter().enumerate().map(device).collect(), compare_at: Instant::now() }
    }

    pub(super) fn record(&self, ports: &[Port]) -> DriverRecord {
        let device = |(device, port): (&GuestDevice, &Port)| DriverDeviceRecord {
            id: port.id.clone(),
            rings: device.rings.iter().map(|r| r.counters.clone()).collect(),
            received: device.received.clone(),
        };
        DriverRecord { devices: self.devices.iter().zip(ports).map(device).collect() }
    }

    /// Takes over a record; `Err` says what does not fit.
    pub(super) fn load(&mut self, record: DriverRecord, ports: &[Port]) -> Result<(), String> {
        if record.devices.len() != self.devices.len() {
            return Err(format!("{} devices, here are {}", record.devices.len(), self.devices.len()));
        }
        for ((ours, theirs), port) in self.devices.iter_mut().zip(record.devices).zip(ports) {
            if theirs.id != port.id
                || theirs.rings.len() != ours.rings.len()
                || theirs.received.len() != ours.received.len()
            {
                return Err(format!("device {} does not match {} here", theirs.id, port.id));
            }
            for (ring, counters) in ours.rings.iter_mut().zip(theirs.rings) {
                ring.counters = counters;
                ring.forget();
            }
            ours.received = theirs.received;
            // Left over from a migration to here that was aborted.
            ours.was_reset = false;
            for vector in 0..port.vectors.count() {
                port.vectors.take(vector).map_err(|e| format!("interrupts of {}: {e}", port.id))?;
            }
        }
        Ok(())
    }
}

/// The device into whose BAR device `i` writes.
pub(super) fn peer_of(config: &SimVmConfig, i: usize) -> Option<usize> {
    let n = config.devices.len();
    (config.peer_dma && n > 1).then(|| (i + 1) % n)
}

impl Shared {
    /// The driver thread.
    pub(super) fn run_driver(&self) {
        while self.gate.enter() {
            while !self.gate.halted() {
                if let Err(error) = self.drive() {
                    // Rings are inside memory and BARs by construction.
                    tracing::error!(%error, "the guest driver cannot reach a ring");
                }
                Port::wait_any(&self.ports, DRIVER_WAIT);
            }
        }
    }

    /// One pass of the driver.
    fn drive(&self) -> Result<(), MemoryError> {
        let mut driver = locked(&self.driver);
        let compare = Instant::now() >= driver.compare_at;
        let mut odd = false;
        for (device, port) in driver.devices.iter_mut().zip(&self.ports) {
            for (vector, received) in device.received.iter_mut().enumerate() {
                *received += port.vectors.take(vector).unwrap_or(0);
            }
            if device.was_reset && self.set_up(device, port).is_ok() {
                device.was_reset = false;
            }
            for ring in &mut device.rings {
                ring.consume(&self.memory)?;
                if !compare || self.gate.halted() {
                    continue;
                }
                if let Some(produced) = port.read(reg::ring_register(ring.index, reg::RING_PRODUCED)) {
                    odd |= ring.compare(&self.memory, produced)?;
                }
            }
        }
        if compare {
            driver.compare_at = Instant::now() + if odd { COMPARE_SOON } else { COMPARE_EVERY };
        }
        Ok(())
    }

    /// Programs the rings of a device that is as it was made.
    pub(super) fn set_up(&self, device: &mut GuestDevice, port: &Port) -> Result<(), String> {
        for received in &mut device.received {
            *received = 0;
        }
        for ring in &mut device.rings {
            ring.clear(&self.memory).map_err(|e| e.to_string())?;
            let kind = if ring.index == 0 { reg::KIND_MEMORY } else { reg::KIND_PEER };
            for (register, value) in [
                (reg::RING_IOVA, ring.iova),
                (reg::RING_ENTRIES, ring.entries),
                (reg::RING_KIND, kind),
                (reg::RING_RATE, self.config.ring_rate),
                (reg::RING_ENABLE, 1),
            ] {
                port.write(reg::ring_register(ring.index, register), value)?;
            }
        }
        if let Some(every) = self.config.interrupt_every {
            port.write(reg::INTERRUPT_EVERY, every)?;
        }
        port.write(reg::CONTROL, reg::CONTROL_RUN)
    }

    /// The page that a vCPU wrote last.
    pub(super) fn last_written(&self, vcpu: usize) -> Option<u64> {
        let step = locked(self.steps.get(vcpu)?).checked_sub(1)?;
        let pages = &self.memory.pages;
        Some(pages.vcpu_page(vcpu, pages.orders[vcpu].page(step)))
    }

    /// What the pvclock's page holds after this many saves; zeros before the first.
    pub(super) fn pvclock_words(&self, saves: u64) -> [u64; 3] {
        if saves == 0 { [0; 3] } else { [PVCLOCK_MAGIC, saves, mix(self.config.seed ^ mix(saves))] }
    }

    /// Writes the pvclock's page.
    pub(super) fn write_pvclock(&self, saves: u64) -> Result<(), MemoryError> {
        let (mapping, offset) = self.memory.place(PVCLOCK_PAGE);
        for (word, at) in self.pvclock_words(saves).into_iter().zip((offset..).step_by(8)) {
            mapping.store_u64(at, word)?;
        }
        self.memory.mark(PVCLOCK_PAGE);
        Ok(())
    }

    /// Whether the pvclock's page is that of its last save.
    pub(super) fn pvclock_agrees(&self, saves: u64) -> Result<bool, MemoryError> {
        let mut content = [0; PAGE];
        self.memory.read_page(PVCLOCK_PAGE, &mut content)?;
        let words = self.pvclock_words(saves);
        let found = content.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).take(words.len());
        Ok(found.eq(words))
    }
}
