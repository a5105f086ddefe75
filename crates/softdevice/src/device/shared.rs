//! What the threads of a SoftDevice share.

use super::event::SoftEvent;
use super::loader::LoadSession;
use super::memory::{Memory, crc64};
use super::options::SoftDeviceOptions;
use super::registers::Registers;
use super::saver::SaveSession;
use airlift_core::{DeviceState, Errno};
use airlift_memory::{Mapping, SharedMemory};
use airlift_vfio_user::{Dma, Irqs};
use crc_fast::{CrcAlgorithm, Digest};
use rustix::time::{ClockId, clock_gettime};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The interrupt index that the device raises: MSI-X.
pub(crate) const MSIX: u32 = 2;

/// How far the device moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Nothing changes.
    Parked,
    /// Internal memory changes; no DMA.
    NoDma,
    /// Everything runs.
    Full,
}

impl Level {
    pub(crate) const fn of(state: DeviceState) -> Self {
        match state {
            DeviceState::Running | DeviceState::PreCopy => Self::Full,
            DeviceState::RunningP2p | DeviceState::PreCopyP2p => Self::NoDma,
            _ => Self::Parked,
        }
    }
}

/// The client's side.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) dma: Dma,
    pub(crate) irqs: Irqs,
}

/// The device behind its lock.
pub(crate) struct Core {
    pub(crate) state: DeviceState,
    pub(crate) level: Level,
    pub(crate) link: Option<Link>,
    pub(crate) shutdown: bool,
    /// The DMA engine is inside a batch.
    pub(crate) dma_busy: bool,
    /// The dirtier is inside a batch.
    pub(crate) dirtier_busy: bool,
    /// Ranges that the client is taking away: no DMA to them.
    pub(crate) leaving: Vec<(u64, u64)>,
    pub(crate) memory: Memory,
    pub(crate) registers: Registers,
    pub(crate) loads: u64,
    pub(crate) errors: u64,
    /// BAR2 as it was when the device stopped.
    pub(crate) bar2_at_stop: Option<Vec<u8>>,
    pub(crate) save: Option<SaveSession>,
    pub(crate) next_session: u64,
}

impl Core {
    pub(crate) const fn runs(&self, level: Level) -> bool {
        self.level as u8 >= level as u8 && self.link.is_some() && self.registers.control != 0
    }

    /// Raises an interrupt: told now, or when somebody can be told.
    pub(crate) fn raise(&mut self, vector: usize) {
        self.registers.raised[vector] = self.registers.raised[vector].wrapping_add(1);
        if !self.link.as_ref().is_some_and(|link| deliver(link, vector)) {
            self.registers.pending[vector] = self.registers.pending[vector].wrapping_add(1);
        }
    }

    pub(crate) fn session(&mut self) -> u64 {
        self.next_session += 1;
        self.next_session
    }
}

/// Whether the client was told.
pub(crate) fn deliver(link: &Link, vector: usize) -> bool {
    u32::try_from(vector).is_ok_and(|vector| link.irqs.trigger(MSIX, vector) == Ok(true))
}

pub(crate) struct Shared {
    pub(crate) options: SoftDeviceOptions,
    pub(crate) bar2: Mapping,
    pub(crate) bar2_file: SharedMemory,
    /// Taken before `core` where both are.
    pub(crate) load: Mutex<Option<LoadSession>>,
    core: Mutex<Core>,
    changed: Condvar,
    events: Box<dyn Fn(SoftEvent) + Send + Sync>,
}

impl Shared {
    pub(crate) fn new(
        options: SoftDeviceOptions,
        bar2_file: SharedMemory,
        bar2: Mapping,
        memory: Memory,
        events: Box<dyn Fn(SoftEvent) + Send + Sync>,
    ) -> Self {
        let registers = Registers::new(options.interrupt_every);
        Self {
            options,
            bar2,
            bar2_file,
            load: Mutex::new(None),
            core: Mutex::new(Core {
                state: DeviceState::Running,
                level: Level::Full,
                link: None,
                shutdown: false,
                dma_busy: false,
                dirtier_busy: false,
                leaving: Vec::new(),
                memory,
                registers,
                loads: 0,
                errors: 0,
                bar2_at_stop: None,
                save: None,
                next_session: 0,
            }),
            changed: Condvar::new(),
            events,
        }
    }

    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn load(&self) -> MutexGuard<'_, Option<LoadSession>> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn notify(&self) {
        self.changed.notify_all();
    }

    pub(crate) fn wait<'a>(&self, core: MutexGuard<'a, Core>) -> MutexGuard<'a, Core> {
        self.changed.wait(core).unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn wait_for<'a>(&self, core: MutexGuard<'a, Core>, time: Duration) -> MutexGuard<'a, Core> {
        self.changed.wait_timeout(core, time).unwrap_or_else(PoisonError::into_inner).0
    }

    pub(crate) fn tell(&self, event: SoftEvent) {
        (self.events)(event);
    }

    /// Lowers the level and waits until what it forbids has come to rest.
    pub(crate) fn park(&self, level: Level) -> Result<(), Errno> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut core = self.core();
        core.level = core.level.min(level);
        self.notify();
        while (core.dma_busy && level < Level::Full) || (core.dirtier_busy && level < Level::NoDma) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Errno::ETIMEDOUT);
            }
            core = self.wait_for(core, left);
        }
        Ok(())
    }

    /// Sleeps, unless the device is being dropped.
    pub(crate) fn sleep(&self, time: Duration) {
        let end = Instant::now() + time;
        let mut core = self.core();
        while !core.shutdown {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            core = self.wait_for(core, left);
        }
    }

    /// BAR2's content now.
    pub(crate) fn read_bar2(&self) -> Vec<u8> {
        // BAR2 has at most 16 MiB, and the whole of it is in the mapping.
        let mut bytes = vec![0; usize::try_from(self.options.bar2_size).unwrap_or(0)];
        if self.bar2.read(0, &mut bytes).is_err() {
            bytes.clear();
        }
        bytes
    }

    /// Digest of the device's whole state: internal memory, registers, BAR2.
    pub(crate) fn digest(&self, core: &Core) -> u64 {
        let bar2 = core.bar2_at_stop.as_ref().map_or_else(|| crc64(&self.read_bar2()), |bytes| crc64(bytes));
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        digest.update(&core.memory.digest().to_le_bytes());
        digest.update(&core.registers.save(core.memory.seed(), core.memory.tick()));
        digest.update(&bar2.to_le_bytes());
        digest.finalize()
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}
