//! The handle to a running migration: cancel it, watch it.

use airlift_core::{DeviceState, Phase};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// The answer to a cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelAnswer {
    /// The migration ends with the source running, within its rollback deadline.
    Accepted,
    /// COMMIT is under way or past: the migration can only go forward.
    TooLate {
        /// The phase.
        phase: Phase,
    },
}

/// Progress of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceProgress {
    /// The state as of its last arc.
    pub state: DeviceState,
    /// Bytes moved.
    pub bytes: u64,
    /// Initial bytes left, as the device says.
    pub initial_bytes: u64,
    /// Dirty bytes left, as the device says.
    pub dirty_bytes: u64,
}

/// A copy of where a migration stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The phase.
    pub phase: Phase,
    /// The memory round.
    pub round: u32,
    /// Bytes of guest memory.
    pub memory_total: u64,
    /// Bytes of memory moved.
    pub memory_sent: u64,
    /// Bytes of memory known to be dirty.
    pub memory_dirty: u64,
    /// Measured bandwidth, bytes a second; 0 before the first measurement.
    pub bandwidth: u64,
    /// What the downtime would be, in microseconds; 0 before the first estimate.
    pub downtime_estimate_us: u64,
    /// By device, in the order in which devices were given.
    pub devices: Vec<DeviceProgress>,
}

/// Counters that the engine's threads write and [`Control::progress`] reads.
#[derive(Debug)]
pub(crate) struct Gauges {
    phase: AtomicU8,
    pub(crate) round: AtomicU32,
    pub(crate) memory_total: AtomicU64,
    pub(crate) memory_sent: AtomicU64,
    pub(crate) memory_dirty: AtomicU64,
    pub(crate) bandwidth: AtomicU64,
    pub(crate) estimate_us: AtomicU64,
    pub(crate) devices: Vec<DeviceGauges>,
}

#[derive(Debug)]
pub(crate) struct DeviceGauges {
    pub(crate) state: AtomicU32,
    pub(crate) bytes: AtomicU64,
    pub(crate) initial: AtomicU64,
    pub(crate) dirty: AtomicU64,
}

const PHASES: [Phase; 15] = [
    Phase::Connect,
    Phase::Listen,
    Phase::Negotiate,
    Phase::Setup,
    Phase::Precopy,
    Phase::Quiesce,
    Phase::StopCopy,
    Phase::Resuming,
    Phase::Load,
    Phase::AwaitLoaded,
    Phase::Loaded,
    Phase::Commit,
    Phase::Committed,
    Phase::Running,
    Phase::Done,
];

impl Gauges {
    pub(crate) fn new(devices: usize, phase: Phase) -> Arc<Self> {
        let device = || DeviceGauges {
            state: AtomicU32::new(DeviceState::Running.to_raw()),
            bytes: AtomicU64::new(0),
            initial: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
        };
        let gauges = Self {
            phase: AtomicU8::new(0),
            round: AtomicU32::new(0),
            memory_total: AtomicU64::new(0),
            memory_sent: AtomicU64::new(0),
            memory_dirty: AtomicU64::new(0),
            bandwidth: AtomicU64::new(0),
            estimate_us: AtomicU64::new(0),
            devices: (0..devices).map(|_| device()).collect(),
        };
        gauges.set_phase(phase);
        Arc::new(gauges)
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        let at = PHASES.iter().position(|p| *p == phase).unwrap_or(0);
        self.phase.store(u8::try_from(at).unwrap_or(0), Ordering::Release);
    }

    pub(crate) fn phase(&self) -> Phase {
        PHASES[usize::from(self.phase.load(Ordering::Acquire)) % PHASES.len()]
    }
}

/// What a cancel must do once it is accepted: wake the engine's thread.
type Wake = Box<dyn Fn() + Send>;

/// Decides in one place whether a cancel or the commit came first.
pub(crate) struct CancelGate {
    cancelled: AtomicBool,
    closed: Mutex<bool>,
    wake: Mutex<Option<Wake>>,
}

impl std::fmt::Debug for CancelGate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CancelGate").field("cancelled", &self.is_cancelled()).finish_non_exhaustive()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Both values are plain data that a panic of another holder cannot leave half-written.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl CancelGate {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            cancelled: AtomicBool::new(false),
            closed: Mutex::new(false),
            wake: Mutex::new(None),
        })
    }

    /// Calls `wake` at a cancel: at once when there was one already.
    pub(crate) fn on_cancel(&self, wake: impl Fn() + Send + 'static) {
        let mut place = locked(&self.wake);
        if self.is_cancelled() {
            wake();
        }
        *place = Some(Box::new(wake));
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Closes the gate for cancels. `false`: a cancel came first.
    pub(crate) fn close(&self) -> bool {
        let mut closed = locked(&self.closed);
        if self.is_cancelled() {
            return false;
        }
        *closed = true;
        true
    }

    fn cancel(&self) -> bool {
        let closed = locked(&self.closed);
        if *closed {
            return false;
        }
        self.cancelled.store(true, Ordering::Release);
        drop(closed);
        if let Some(wake) = locked(&self.wake).as_ref() {
            wake();
        }
        true
    }
}

/// A handle to a migration, valid after its end too.
#[derive(Clone, Debug)]
pub struct Control {
    pub(crate) gauges: Arc<Gauges>,
    pub(crate) gate: Arc<CancelGate>,
}

impl Control {
    /// Asks for the end of the migration with the source running. Accepted until COMMIT (I17).
    #[must_use]
    pub fn cancel(&self) -> CancelAnswer {
        if self.gate.cancel() {
            CancelAnswer::Accepted
        } else {
            CancelAnswer::TooLate { phase: self.gauges.phase() }
        }
    }

    /// Where the migration stands. Takes no lock.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let g = &self.gauges;
        let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
        Progress {
            phase: g.phase(),
            round: g.round.load(Ordering::Relaxed),
            memory_total: get(&g.memory_total),
            memory_sent: get(&g.memory_sent),
            memory_dirty: get(&g.memory_dirty),
            bandwidth: get(&g.bandwidth),
            downtime_estimate_us: get(&g.estimate_us),
            devices: g
                .devices
                .iter()
                .map(|d| DeviceProgress {
                    state: DeviceState::from_raw(d.state.load(Ordering::Relaxed)),
                    bytes: get(&d.bytes),
                    initial_bytes: get(&d.initial),
                    dirty_bytes: get(&d.dirty),
                })
                .collect(),
        }
    }
}
