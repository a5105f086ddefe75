//! How long the guest would stand still if it were stopped now.
//!
//! The model adds the terms of the critical path: devices become quiet and stop (the slowest, they
//! do so in parallel), the final dirty sync, all bytes that are left over the bandwidth there is,
//! the slowest device's load, restoring configuration, starting, and round trips. Memory and device
//! state share the connections, so their bytes are added; a device that gives or takes its state slower
//! than the connections carry it makes the transfer as long as its own. A model of bytes alone is wrong
//! for devices: loading is not free.
//!
//! All of it is estimates. Nothing here measures; the terms come from what the caller has seen.

use crate::DeviceId;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What is known of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceTerms {
    /// The device.
    pub id: DeviceId,
    /// Bytes that STOP_COPY will give, as the device estimates them (V2-ESTIMATE).
    pub stop_copy_bytes: u64,
    /// Bytes of initial pre-copy data that are left.
    pub initial_bytes: u64,
    /// Bytes of pre-copy data that have changed.
    pub dirty_bytes: u64,
    /// Bytes a second at which the slower of its two ends gives or takes its state; `None` when that is
    /// not known, and then the connections alone count.
    pub rate: Option<u64>,
    /// Time from the running state to STOP_COPY, where it is known.
    pub quiesce: Duration,
    /// Time of RESUMING -> STOP on the destination, where it is known.
    pub load: Duration,
}

impl DeviceTerms {
    /// All bytes that this device still has.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.stop_copy_bytes.saturating_add(self.initial_bytes).saturating_add(self.dirty_bytes)
    }
}

/// What an estimate is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EstimateInputs {
    /// Bytes of dirty memory.
    pub memory_dirty_bytes: u64,
    /// The devices.
    pub devices: Vec<DeviceTerms>,
    /// Bytes a second of all data connections together; `None` before there is a measurement.
    pub bandwidth: Option<u64>,
    /// Time of the final dirty sync.
    pub final_dirty_sync: Duration,
    /// All other terms: pause, records, configuration, journal writes, start of devices and vCPUs.
    pub fixed: Duration,
    /// One round trip of the control connection.
    pub round_trip: Duration,
    /// Round trips on the critical path: FINAL to LOADED, COMMIT to RUNNING.
    pub round_trips: u32,
}

/// The terms of the downtime to expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DowntimeEstimate {
    /// The slowest device's way to STOP_COPY.
    pub quiesce: Duration,
    /// The final dirty sync.
    pub final_dirty_sync: Duration,
    /// Sending what is left of memory; `None` when the bandwidth is unknown or 0.
    pub memory: Option<Duration>,
    /// Sending what is left of device state, as far as it is not sent beside memory; `None` when the
    /// bandwidth is unknown or 0.
    pub device_data: Option<Duration>,
    /// The slowest device's load.
    pub load: Duration,
    /// All other terms.
    pub fixed: Duration,
    /// Round trips.
    pub round_trips: Duration,
}

impl DowntimeEstimate {
    /// The estimate from these inputs. Times that are too long to count are cut at [`Duration::MAX`].
    #[must_use]
    pub fn new(inputs: &EstimateInputs) -> Self {
        let longest = |term: fn(&DeviceTerms) -> Duration| {
            inputs.devices.iter().map(term).max().unwrap_or(Duration::ZERO)
        };
        let device_bytes = inputs.devices.iter().fold(0_u64, |sum, d| sum.saturating_add(d.bytes()));
        let memory = transfer_time(inputs.memory_dirty_bytes, inputs.bandwidth);
        let carried = transfer_time(device_bytes, inputs.bandwidth);
        // The slowest by itself; what it takes while memory is sent is in the term of memory.
        let by_itself = |d: &DeviceTerms| {
            d.rate.and_then(|rate| transfer_time(d.bytes(), Some(rate.max(1)))).unwrap_or_default()
        };
        let slowest = inputs.devices.iter().map(by_itself).max().unwrap_or_default();
        let beside = slowest.saturating_sub(memory.unwrap_or_default());
        Self {
            quiesce: longest(|d| d.quiesce),
            final_dirty_sync: inputs.final_dirty_sync,
            memory,
            device_data: carried.map(|carried| carried.max(beside)),
            load: longest(|d| d.load),
            fixed: inputs.fixed,
            round_trips: inputs.round_trip.saturating_mul(inputs.round_trips),
        }
    }

    /// The terms that are no transfer of bytes: more rounds of pre-copy do not make them shorter.
    #[must_use]
    pub const fn without_transfer(&self) -> Duration {
        self.quiesce
            .saturating_add(self.final_dirty_sync)
            .saturating_add(self.load)
            .saturating_add(self.fixed)
            .saturating_add(self.round_trips)
    }

    /// The whole downtime; `None` when there are bytes left and the bandwidth is unknown or 0.
    #[must_use]
    pub fn total(&self) -> Option<Duration> {
        let transfer = self.memory?.saturating_add(self.device_data?);
        Some(self.without_transfer().saturating_add(transfer))
    }

    /// The whole downtime is at most `limit`. `false` when it cannot be told.
    #[must_use]
    pub fn fits(&self, limit: Duration) -> bool {
        self.total().is_some_and(|total| total <= limit)
    }
}

/// The time that `bytes` take at `bandwidth` bytes a second, rounded up to a nanosecond. Nothing
/// takes no time; else `None` when the bandwidth is unknown or 0.
#[must_use]
pub fn transfer_time(bytes: u64, bandwidth: Option<u64>) -> Option<Duration> {
    if bytes == 0 {
        return Some(Duration::ZERO);
    }
    let bandwidth = bandwidth.filter(|b| *b > 0)?;
    let whole = Duration::from_secs(bytes / bandwidth);
    let rest = u128::from(bytes % bandwidth) * 1_000_000_000;
    // Below one second, for the rest is below the bandwidth.
    let nanos = u64::try_from(rest.div_ceil(u128::from(bandwidth))).unwrap_or(1_000_000_000);
    Some(whole.saturating_add(Duration::from_nanos(nanos)))
}

/// Bytes a second, from bytes over a time; `None` when no time has passed.
#[must_use]
pub fn rate(bytes: u64, time: Duration) -> Option<u64> {
    let nanos = time.as_nanos();
    if nanos == 0 {
        return None;
    }
    Some(u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX))
}
