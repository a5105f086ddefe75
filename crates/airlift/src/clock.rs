//! The clock, the random numbers and everything else that the engine is given from outside.

use crate::event::{NoObserver, Observer};
use crate::spawn::{Spawner, StdSpawner};
use airlift_core::commit::BootId;
use airlift_core::{Clock, Timestamp};
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

/// The standard library's monotonic clock; its origin is the moment it was made.
#[derive(Clone, Copy, Debug)]
pub struct MonotonicClock(Instant);

impl Default for MonotonicClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.elapsed())
    }
}

/// A source of random bytes for session ids and connection tokens. They guard against mix-ups, not
/// against attackers: that is TLS's part.
pub trait Random: Send + Sync {
    /// Fills `bytes`.
    ///
    /// # Errors
    /// When there is no randomness to be had; the session then does not begin.
    fn fill(&self, bytes: &mut [u8]) -> std::io::Result<()>;
}

/// The kernel's random numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelRandom;

impl Random for KernelRandom {
    fn fill(&self, bytes: &mut [u8]) -> std::io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            let n = rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
            filled += n;
        }
        Ok(())
    }
}

/// What the engine takes from its surroundings.
#[derive(Clone)]
pub struct Environment {
    /// Starts threads.
    pub spawner: Arc<dyn Spawner>,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Takes events.
    pub observer: Arc<dyn Observer>,
    /// Gives random bytes.
    pub random: Arc<dyn Random>,
    /// Names this boot of the host, for the journal (C-BOOT).
    pub boot: BootId,
}

/// The boot id of this host as the kernel names it; all zero where it cannot be read, so that a
/// restart never takes another boot for this one.
#[must_use]
pub fn kernel_boot_id() -> BootId {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().parse().unwrap_or(BootId(0))
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment").finish_non_exhaustive()
    }
}

impl Default for Environment {
    /// Threads and clock of the standard library, the kernel's random numbers, no observer.
    fn default() -> Self {
        Self {
            spawner: Arc::new(StdSpawner),
            clock: Arc::new(MonotonicClock::default()),
            observer: Arc::new(NoObserver),
            random: Arc::new(KernelRandom),
            boot: kernel_boot_id(),
        }
    }
}

impl Environment {
    /// The same with this observer.
    #[must_use]
    pub fn with_observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.observer = observer;
        self
    }
}
