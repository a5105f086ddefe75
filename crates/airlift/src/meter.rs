//! How fast one end of a device gives or takes its state.

use airlift_core::rate;
use std::time::Duration;

/// A figure is made of so much time: shorter ones are those of the machine's scheduler.
const WINDOW: Duration = Duration::from_millis(50);

/// Measures bytes over the time that was spent on nothing else.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Meter {
    bytes: u64,
    time: Duration,
    rate: Option<u64>,
}

impl Meter {
    /// So many bytes have taken so long.
    pub(crate) fn add(&mut self, bytes: u64, time: Duration) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.time = self.time.saturating_add(time);
        if self.time < WINDOW {
            return;
        }
        self.rate = match (rate(self.bytes, self.time), self.rate) {
            // Up at once: what it has done once it can do. A halt of the machine looks like a slow device.
            (Some(new), Some(old)) if new < old => Some(old.midpoint(new)),
            (new, old) => new.or(old),
        };
        self.restart();
    }

    /// What has been added since the last figure says nothing.
    pub(crate) fn restart(&mut self) {
        (self.bytes, self.time) = (0, Duration::ZERO);
    }

    /// Bytes a second; `None` before there is a figure.
    pub(crate) const fn rate(&self) -> Option<u64> {
        self.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_needs_its_time_and_a_single_halt_is_not_believed_whole() {
        let ms = Duration::from_millis;
        let mut meter = Meter::default();
        meter.add(1 << 20, ms(49));
        assert_eq!(meter.rate(), None);
        meter.restart();
        meter.add(1 << 20, ms(49));
        assert_eq!(meter.rate(), None, "what was before does not count");
        meter.add(0, ms(51));
        assert_eq!(meter.rate(), Some(10 << 20));
        meter.add(1 << 20, ms(1000));
        assert_eq!(meter.rate(), Some(11 << 19));
        meter.add(2 << 20, ms(100));
        assert_eq!(meter.rate(), Some(20 << 20));
    }
}
