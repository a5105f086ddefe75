//! How much work is due at a rate.

use std::time::{Duration, Instant};

/// The longest time for which work piles up: after a halt a worker goes on, it does not catch up.
const LONGEST: Duration = Duration::from_millis(50);

/// Counts the units that are due.
#[derive(Debug)]
pub(crate) struct Pace {
    last: Option<Instant>,
    /// Nanoseconds times rate that are not a whole unit yet.
    rest: u128,
}

impl Pace {
    pub(crate) const fn new() -> Self {
        Self { last: None, rest: 0 }
    }

    /// The worker halts: time does not count until the next call of [`due`](Self::due).
    pub(crate) const fn halt(&mut self) {
        self.last = None;
    }

    /// Units of `1 / rate` seconds, each `per` of the rate's own, that are due at `now`.
    pub(crate) fn due(&mut self, now: Instant, rate: u64, per: u64) -> u64 {
        let since = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.last = Some(now);
        let unit = 1_000_000_000 * u128::from(per);
        let have = self.rest + since.min(LONGEST).as_nanos() * u128::from(rate);
        self.rest = have % unit;
        u64::try_from(have / unit).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_to_the_unit_and_a_halt_is_not_made_up_for() {
        let start = Instant::now();
        let mut pace = Pace::new();
        assert_eq!(pace.due(start, 1000, 1), 0);
        let total: u64 = (1..=1000).map(|i| pace.due(start + Duration::from_micros(i * 700), 1000, 1)).sum();
        assert_eq!(total, 700);
        pace.halt();
        assert_eq!(pace.due(start + Duration::from_secs(60), 1000, 1), 0);
        assert_eq!(pace.due(start + Duration::from_secs(120), 1000, 1), 50);
        assert_eq!(pace.due(start + Duration::from_millis(120_040), 1 << 20, 4096), 10);
    }
}
