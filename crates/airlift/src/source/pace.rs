//! What the connections carry: bytes a second, measured while they have all that they can take.
//!
//! A first burst goes into the sockets' buffers at the speed of memory, so that a figure is made only
//! of a window of enough bytes and enough time, and every later window corrects it.

use airlift_core::{Timestamp, rate};
use std::time::Duration;

/// A window has this many bytes at least...
const ENOUGH_BYTES: u64 = 1 << 20;

/// ...and is this long...
const ENOUGH_TIME: Duration = Duration::from_millis(20);

/// ...or, over a slow connection, this long.
const SURELY_ENOUGH_TIME: Duration = Duration::from_secs(1);

/// Measures the bandwidth.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    seen: u64,
    window: (u64, Duration),
    bandwidth: Option<u64>,
    /// Where the window of all bytes began, busy or not, and what had been sent then.
    loose: (u64, Timestamp),
    carried: Option<u64>,
}

impl Pace {
    pub(super) const fn new(now: Timestamp) -> Self {
        Self { seen: 0, window: (0, Duration::ZERO), bandwidth: None, loose: (0, now), carried: None }
    }

    /// `sent` bytes have been sent in all; since the last call the connections had all that they can
    /// take for `busy`.
    pub(super) fn add(&mut self, sent: u64, busy: Duration, now: Timestamp) {
        let bytes = sent.saturating_sub(self.seen);
        self.seen = sent;
        let (before, since) = self.loose;
        if now.since(since) >= ENOUGH_TIME {
            let carried = rate(sent.saturating_sub(before), now.since(since));
            self.carried = self.carried.max(carried);
            self.loose = (sent, now);
        }
        if busy.is_zero() {
            return;
        }
        let (bytes, time) = (self.window.0.saturating_add(bytes), self.window.1.saturating_add(busy));
        self.window = (bytes, time);
        if (bytes < ENOUGH_BYTES || time < ENOUGH_TIME) && time < SURELY_ENOUGH_TIME {
            return;
        }
        self.window = (0, Duration::ZERO);
        self.bandwidth = match (rate(bytes, time), self.bandwidth) {
            // Down at once: a downtime that is longer than it was said to be is the worse error.
            (Some(new), Some(old)) if new > old => Some(old.midpoint(new)),
            (new, old) => new.or(old),
        };
    }

    /// Bytes a second. While the connections never had all that they can take, the most that they have
    /// carried; `None` when that is nothing.
    pub(super) fn bandwidth(&self) -> Option<u64> {
        self.bandwidth.or_else(|| self.carried.filter(|carried| *carried > 0))
    }

    /// Nothing has ever been sent.
    pub(super) const fn is_unused(&self) -> bool {
        self.seen == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn at(ms: u64) -> Timestamp {
        Timestamp(Duration::from_millis(ms))
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_burst_into_the_sockets_says_nothing_yet_and_a_slow_sink_corrects_what_it_said() {
        let mut pace = Pace::new(at(0));
        // 4 MiB in 2 ms: they are in the sockets' buffers, not on the other side.
        pace.add(4 * MIB, ms(2), at(2));
        assert_eq!(pace.bandwidth(), None);
        // The window goes on until it is long enough; then the burst is still a part of it.
        pace.add(4 * MIB + MIB / 2, ms(50), at(52));
        let first = pace.bandwidth().unwrap();
        assert!(first > 80 * MIB, "{first}");
        // The sink takes 10 MiB a second.
        pace.add(5 * MIB + MIB / 2, ms(100), at(152));
        assert_eq!(pace.bandwidth(), Some(10 * MIB));
    }

    #[test]
    fn idle_time_does_not_make_the_connections_look_slow() {
        let mut pace = Pace::new(at(0));
        pace.add(10 * MIB, ms(100), at(100));
        assert_eq!(pace.bandwidth(), Some(100 * MIB));
        for round in 1..100 {
            pace.add(10 * MIB + round * 4096, Duration::ZERO, at(100 + round * 5));
        }
        assert_eq!(pace.bandwidth(), Some(100 * MIB));
    }

    #[test]
    fn little_data_that_never_fills_the_connections_still_has_a_figure() {
        let mut pace = Pace::new(at(0));
        pace.add(4096, Duration::ZERO, at(5));
        assert_eq!(pace.bandwidth(), None);
        pace.add(8192, Duration::ZERO, at(20));
        assert_eq!(pace.bandwidth(), Some(8192 * 50));
        // It does not fade while nothing is sent.
        pace.add(8192, Duration::ZERO, at(5000));
        assert_eq!(pace.bandwidth(), Some(8192 * 50));
    }

    #[test]
    fn a_connection_that_takes_nothing_any_more_is_seen() {
        let mut pace = Pace::new(at(0));
        pace.add(10 * MIB, ms(100), at(100));
        pace.add(10 * MIB, ms(1000), at(1100));
        assert_eq!(pace.bandwidth(), Some(0));
        pace.add(20 * MIB, ms(100), at(1200));
        assert_eq!(pace.bandwidth(), Some(50 * MIB));
    }
}
