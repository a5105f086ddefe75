//! When the guest ran and wrote, by CLOCK_MONOTONIC, which all processes of a host share.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Most run intervals that are kept; older ones are merged into the first.
const MAX_INTERVALS: usize = 1024;

/// CLOCK_MONOTONIC in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// A time in which vCPUs could run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunInterval {
    /// Before the first vCPU ran, CLOCK_MONOTONIC in nanoseconds.
    pub start_ns: u64,
    /// After the last vCPU had stopped; `None`: it still lasts.
    pub end_ns: Option<u64>,
}

/// When vCPUs ran and wrote, on this side.
#[derive(Debug, Default)]
pub(super) struct RunLog {
    first_write: AtomicU64,
    last_write: AtomicU64,
    max_gap: AtomicU64,
    intervals: Mutex<Vec<RunInterval>>,
}

impl RunLog {
    /// A vCPU has written.
    pub(super) fn wrote(&self) {
        let now = monotonic_ns();
        let before = self.last_write.fetch_max(now, Ordering::Relaxed);
        if before == 0 {
            // Two vCPUs may both find no write before theirs: the earlier one is the first.
            let _ = self.first_write.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
            self.first_write.fetch_min(now, Ordering::Relaxed);
        } else if now > before {
            self.max_gap.fetch_max(now - before, Ordering::Relaxed);
        }
    }

    pub(super) fn started(&self) {
        let mut intervals = self.intervals.lock().unwrap_or_else(PoisonError::into_inner);
        if intervals.len() == MAX_INTERVALS {
            let second = intervals.remove(1);
            intervals[0].end_ns = second.end_ns;
        }
        intervals.push(RunInterval { start_ns: monotonic_ns(), end_ns: None });
    }

    pub(super) fn stopped(&self) {
        let mut intervals = self.intervals.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = intervals.last_mut()
            && last.end_ns.is_none()
        {
            last.end_ns = Some(monotonic_ns());
        }
    }

    pub(super) fn intervals(&self) -> Vec<RunInterval> {
        self.intervals.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn first_write(&self) -> Option<u64> {
        Some(self.first_write.load(Ordering::Relaxed)).filter(|&t| t != 0)
    }

    pub(super) fn last_write(&self) -> Option<u64> {
        Some(self.last_write.load(Ordering::Relaxed)).filter(|&t| t != 0)
    }

    pub(super) fn max_gap(&self) -> u64 {
        self.max_gap.load(Ordering::Relaxed)
    }
}
