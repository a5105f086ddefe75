//! SoftDevice: a device in software that does what a migration can break.
//!
//! It has internal memory whose content follows from a seed and a tick and is rewritten while the
//! device runs, a DMA engine that writes strictly increasing sequences into rings (in guest memory or
//! in the BAR of a peer), interrupts that are counted, and BAR2, which peers and the guest write. All
//! of that is its state. [`registers`] says what a guest driver sees; `format` has the saved stream.
//!
//! What the states mean here:
//! - In RUNNING and PRE_COPY everything runs once the guest has set `CONTROL` and a client is attached.
//! - In the P2P states the DMA engine is parked, whichever memory a ring is in; the dirtier runs (V2-P2P).
//! - At the arc to STOP or STOP_COPY everything parks (V2-STOPPED), and **BAR2 is copied then**. What a peer that was
//!   not quiesced writes to it later is not part of the saved state: it is lost, as it would be in a
//!   real device. That is what the P2P states are for (SD-BAR2-AT-STOP).
//! - RESUMING -> STOP refuses what is incomplete or whose checksum or digest is wrong (SD-VALIDATE). The
//!   comparison of all memory with seed and tick comes after it, outside of the arc.

mod arcs;
mod bitmap;
mod content;
mod engine;
mod event;
mod format;
mod loader;
mod memory;
mod options;
mod pace;
pub mod registers;
mod saver;
mod shared;

pub use event::SoftEvent;
pub use options::{FailArc, SoftDeviceError, SoftDeviceOptions};

use airlift_core::{Arc as StateArc, DeviceState, Errno, MigrationFlags, StateFormat};
use airlift_memory::{Access, SharedMemory};
use airlift_vfio_user::{
    Attachment, Description, Detach, Device, DmaChange, Done, IrqDescription, Loader, MigrationInterface,
    MigrationSupport, PciIds, RegionAreas, RegionDescription, RegionIndex, RegionMapping, Saver,
};
use arcs::Job;
use crossbeam_channel::Sender;
use memory::Memory;
use registers as reg;
use shared::{Core, Level, Link, MSIX, Shared, now_ns};
use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// BAR0: registers.
const BAR0: RegionIndex = 0;
/// BAR2: memory that peers and the guest write.
const BAR2: RegionIndex = 2;

/// The device. Give it to a vfio-user server; dropping it ends its threads.
pub struct SoftDevice {
    shared: Arc<Shared>,
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for SoftDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftDevice").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

impl SoftDevice {
    /// A device in RUNNING that does nothing yet. Allocates and writes all of its memory, which takes
    /// about a second for 2 GiB. `events` is called from the device's threads and must not block
    /// for long.
    ///
    /// # Errors
    /// When an option is out of its range, or memory or threads cannot be had.
    pub fn new(
        options: SoftDeviceOptions,
        events: impl Fn(SoftEvent) + Send + Sync + 'static,
    ) -> Result<Self, SoftDeviceError> {
        options.check()?;
        let max = SoftDeviceOptions::MAX_STATE;
        let value = options.state_size;
        let pages = usize::try_from(value / 4096).map_err(|_| SoftDeviceError::Size {
            what: "a state",
            value,
            max,
        })?;
        let file = SharedMemory::create("soft-device-bar2", options.bar2_size)
            .map_err(|source| SoftDeviceError::System { what: "BAR2", source })?;
        let bar2 = file.map(0, options.bar2_size, Access::ReadWrite)?;
        let memory = Memory::new(options.seed, pages).map_err(|error| SoftDeviceError::System {
            what: "internal memory",
            source: std::io::Error::new(std::io::ErrorKind::OutOfMemory, error),
        })?;
        let shared = Arc::new(Shared::new(options, file, bar2, memory, Box::new(events)));
        let (jobs, queue) = crossbeam_channel::unbounded();
        let mut device = Self { shared: Arc::clone(&shared), jobs: Some(jobs), threads: Vec::new() };
        let s = Arc::clone(&shared);
        device.spawn("soft-dma", move || engine::run_dma(&s))?;
        let s = Arc::clone(&shared);
        device.spawn("soft-dirtier", move || engine::run_dirtier(&s))?;
        device.spawn("soft-arcs", move || arcs::run_jobs(&shared, &queue))?;
        Ok(device)
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), SoftDeviceError> {
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(run)
            .map_err(|source| SoftDeviceError::System { what: "threads", source })?;
        self.threads.push(thread);
        Ok(())
    }

    /// A view of the device for whoever runs it; usable while a server owns the device.
    #[must_use]
    pub fn monitor(&self) -> SoftMonitor {
        SoftMonitor(Arc::clone(&self.shared))
    }

    /// Hands a job to the thread that does them; dropping it is how a job that cannot be done fails.
    fn submit(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }

    fn register(&self, core: &Core, offset: u64) -> u64 {
        let options = &self.shared.options;
        match offset {
            reg::MAGIC => reg::MAGIC_VALUE,
            reg::VERSION => reg::VERSION_VALUE,
            reg::SEED => core.memory.seed(),
            reg::TICK => core.memory.tick(),
            reg::STATE_SIZE => options.state_size,
            reg::DIGEST => self.shared.digest(core),
            reg::VERIFIED => core.memory.verdict(),
            reg::LOADS => core.loads,
            reg::ERRORS => core.errors,
            reg::BAR2_SIZE => options.bar2_size,
            reg::VECTORS => u64::from(options.vectors),
            // Where there is no register, 0.
            _ => core.registers.read(offset, options.vectors).unwrap_or(0),
        }
    }

    fn read_registers(&self, offset: u64, buf: &mut [u8]) {
        let core = self.shared.core();
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let word = self.register(&core, at / 8 * 8).to_le_bytes();
            let skip = usize::try_from(at % 8).unwrap_or(0);
            let length = rest.len().min(8 - skip);
            let (part, more) = rest.split_at_mut(length);
            part.copy_from_slice(&word[skip..skip + length]);
            at += length as u64;
            rest = more;
        }
    }

    fn write_register(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let value = u64::from_le_bytes(data.try_into().map_err(|_| Errno::EINVAL)?);
        if !offset.is_multiple_of(8) {
            return Err(Errno::EINVAL);
        }
        let mut core = self.shared.core();
        if matches!(core.state, DeviceState::StopCopy | DeviceState::Resuming | DeviceState::Error) {
            return Err(Errno::EBUSY);
        }
        if offset == reg::VERIFIED {
            if value != 1 {
                return Err(Errno::EINVAL);
            }
            let pass = core.memory.begin_check();
            drop(core);
            self.submit(Job::Check { pass });
            return Ok(());
        }
        // A batch under way was planned with the old settings. It may wait for an answer of the client
        // that only this thread can take in: so not for ever.
        let deadline = Instant::now() + Duration::from_secs(1);
        while core.dma_busy {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Errno::EBUSY);
            }
            core = self.shared.wait_for(core, left);
        }
        core.registers.write(offset, value)?;
        self.shared.notify();
        Ok(())
    }
}

impl Drop for SoftDevice {
    fn drop(&mut self) {
        self.shared.core().shutdown = true;
        self.shared.notify();
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A panic there was reported by its own thread.
            let _ = thread.join();
        }
    }
}

impl Device for SoftDevice {
    fn describe(&self) -> Description {
        let options = &self.shared.options;
        let region =
            |index, size, mapping| RegionDescription { index, size, readable: true, writable: true, mapping };
        // Without a descriptor BAR2 is still there, only not to be mapped.
        let mapping = self.shared.bar2_file.try_clone_fd().ok().map(|fd| RegionMapping {
            fd: Arc::new(fd),
            offset: 0,
            areas: RegionAreas::Whole,
        });
        let mut flags = MigrationFlags::STOP_COPY;
        let v1 = matches!(options.interface, MigrationInterface::V1(_));
        flags.set(MigrationFlags::P2P, options.p2p && !v1);
        flags.set(MigrationFlags::PRE_COPY, options.precopy);
        Description {
            regions: vec![region(BAR0, reg::BAR0_SIZE, None), region(BAR2, options.bar2_size, mapping)],
            irqs: vec![IrqDescription { index: MSIX, count: options.vectors, maskable: false }],
            pci: Some(PciIds {
                // Numbers that nobody was assigned.
                vendor: 0xa1f7,
                device: 1,
                subsystem_vendor: 0xa1f7,
                subsystem: 1,
                class: 0xff_0000,
                revision: 1,
            }),
            migration: Some(MigrationSupport {
                interface: options.interface.clone(),
                flags,
                dma_logging: options.dma_logging,
                reinit: false,
            }),
            format: StateFormat {
                name: "airlift-softdevice".into(),
                version: format::VERSION,
                accepts: vec![format::VERSION],
                interfaces: options
                    .accept_other_interface
                    .then_some(options.other_interface())
                    .into_iter()
                    .collect(),
            },
        }
    }

    fn attach(&mut self, attachment: Attachment) {
        let state = attachment.state;
        let mut core = self.shared.core();
        core.link = Some(Link { dma: attachment.dma, irqs: attachment.irqs });
        core.leaving.clear();
        core.state = state;
        core.level = Level::of(state);
        self.shared.notify();
        drop(core);
        self.shared.tell(SoftEvent::Attached { state });
    }

    fn detach(&mut self, why: Detach) {
        self.shared.core().link = None;
        // Should a batch not end, what it still does fails: its memory is gone.
        let rested = self.shared.park(Level::Parked);
        if rested.is_err() {
            tracing::warn!("the device was still at work when its client went");
        }
        *self.shared.load() = None;
        let mut core = self.shared.core();
        core.save = None;
        core.leaving.clear();
        core.state = match core.state {
            DeviceState::StopCopy => DeviceState::Stop,
            DeviceState::PreCopy => DeviceState::Running,
            DeviceState::PreCopyP2p => DeviceState::RunningP2p,
            DeviceState::Resuming => DeviceState::Error,
            other => other,
        };
        core.level = Level::of(core.state);
        let state = core.state;
        drop(core);
        let reason = match why {
            Detach::Closed => "closed".into(),
            Detach::Protocol(what) => format!("protocol: {what}"),
            Detach::Shutdown => "shutdown".into(),
        };
        self.shared.tell(SoftEvent::Detached { reason, state });
    }

    fn region_read(&mut self, region: RegionIndex, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        match region {
            BAR0 => {
                self.read_registers(offset, buf);
                Ok(())
            }
            BAR2 => self.shared.bar2.read(offset, buf).map_err(|e| Errno(e.raw_errno())),
            _ => Err(Errno::EINVAL),
        }
    }

    fn region_write(&mut self, region: RegionIndex, offset: u64, data: &[u8]) -> Result<(), Errno> {
        match region {
            BAR0 => self.write_register(offset, data),
            BAR2 => self.shared.bar2.write(offset, data).map_err(|e| Errno(e.raw_errno())),
            _ => Err(Errno::EINVAL),
        }
    }

    fn dma_changed(&mut self, change: DmaChange, done: Done) {
        match change {
            DmaChange::Mapped { iova, length } => {
                let end = iova.saturating_add(length);
                let mut core = self.shared.core();
                core.leaving.retain(|(at, len)| *at >= end || at.saturating_add(*len) <= iova);
                drop(core);
                done.ok();
            }
            DmaChange::Unmapping { iova, length } => self.submit(Job::Release { iova, length, done }),
        }
    }

    fn reset(&mut self, done: Done) {
        self.submit(Job::Reset { done, start_ns: now_ns() });
    }

    fn transition(&mut self, arc: StateArc, done: Done) {
        self.submit(Job::Arc { arc, done, start_ns: now_ns() });
    }

    fn saver(&mut self) -> Result<Box<dyn Saver>, Errno> {
        Ok(Box::new(saver::SoftSaver::new(&self.shared)?))
    }

    fn loader(&mut self) -> Result<Box<dyn Loader>, Errno> {
        Ok(Box::new(loader::SoftLoader::new(&self.shared)?))
    }
}

/// A view of a [`SoftDevice`] from beside its server.
#[derive(Clone)]
pub struct SoftMonitor(Arc<Shared>);

impl fmt::Debug for SoftMonitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SoftMonitor")
    }
}

impl SoftMonitor {
    /// The device's state.
    #[must_use]
    pub fn state(&self) -> DeviceState {
        self.0.core().state
    }

    /// Digest of its whole state.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.0.digest(&self.0.core())
    }

    /// Steps that the dirtier has made.
    #[must_use]
    pub fn tick(&self) -> u64 {
        self.0.core().memory.tick()
    }

    /// Entries that each ring was given.
    #[must_use]
    pub fn produced(&self) -> Vec<u64> {
        self.0.core().registers.rings.iter().map(|ring| ring.produced).collect()
    }

    /// As the register [`VERIFIED`](registers::VERIFIED).
    #[must_use]
    pub fn verified(&self) -> u64 {
        self.0.core().memory.verdict()
    }
}
