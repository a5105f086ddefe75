//! Time as a parameter: a monotonic timestamp from an origin that the caller chose.

use std::time::Duration;

/// A moment: the time since an arbitrary origin that is fixed for a session. Monotonic; it says
/// nothing about the date.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub Duration);

impl Timestamp {
    /// The moment `delay` later.
    #[must_use]
    pub const fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(delay))
    }

    /// Time from `earlier` to this moment; zero if it is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// A source of monotonic time. The engine takes one, so that a simulator can be the clock.
pub trait Clock: Send + Sync {
    /// This moment. It never goes back.
    fn now(&self) -> Timestamp;
}
