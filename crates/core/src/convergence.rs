//! When pre-copy is over: the decision after each round, and the reason when it does not come.
//!
//! No clock and no I/O: a round's figures come in, a [`Decision`] comes out. The figures are
//! estimates of others; what is checked here is only whether they get better.

use crate::estimate::DowntimeEstimate;
use crate::{DeviceId, Timestamp};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// What to do when pre-copy makes no more progress, or its deadline has passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StallPolicy {
    /// Say so and go on with rounds until the deadline, then abort.
    #[default]
    Wait,
    /// Stop the guest although the downtime will be longer than the limit.
    Force,
    /// Give the migration up.
    Abort,
}

/// How pre-copy is to be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvergenceConfig {
    /// The longest downtime that is accepted.
    pub downtime_limit: Duration,
    /// Rounds without any progress after which pre-copy counts as stalled; at least 1.
    pub stall_rounds: u32,
    /// What happens then.
    pub policy: StallPolicy,
    /// The moment when pre-copy must be over; `None`: no bound.
    pub deadline: Option<Timestamp>,
}

/// What one device has left after a round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceLeft {
    /// The device.
    pub id: DeviceId,
    /// Bytes that it still has, of all kinds.
    pub bytes: u64,
    /// Bytes a second at which the slower of its two ends gives or takes them; `None` when not known.
    pub rate: Option<u64>,
    /// Its initial data has been loaded and acknowledged for the generation it is in now, or it has
    /// none (V2-INITIAL, V2-REINIT).
    pub acknowledged: bool,
}

/// The figures after a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// When it ended.
    pub now: Timestamp,
    /// Bytes of memory that are dirty now.
    pub memory_bytes: u64,
    /// The devices.
    pub devices: Vec<DeviceLeft>,
    /// The downtime to expect if the guest were stopped now.
    pub estimate: DowntimeEstimate,
    /// Bytes a second that the connections carried; `None` when not known.
    pub bandwidth: Option<u64>,
    /// Bytes of memory dirtied a second during the round; `None` when not known.
    pub memory_dirty_rate: Option<u64>,
}

impl Round {
    /// Bytes of memory and devices that are left.
    #[must_use]
    pub fn remaining_bytes(&self) -> u64 {
        self.devices.iter().fold(self.memory_bytes, |sum, d| sum.saturating_add(d.bytes))
    }
}

/// Why pre-copy does not come to an end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StallCause {
    /// The data would fit, but the destination has not loaded the initial data of these devices.
    InitialData {
        /// The devices.
        devices: Vec<DeviceId>,
    },
    /// No connection has carried anything, so that nothing can be estimated.
    NoBandwidth,
    /// What does not depend on the bytes left is longer than the limit: more rounds cannot help.
    FixedTerms {
        /// Those terms together.
        time: Duration,
        /// The limit.
        limit: Duration,
    },
    /// Memory is dirtied at least as fast as it is sent.
    MemoryDirtyRate {
        /// Bytes dirtied a second.
        dirty_rate: u64,
        /// Bytes sent a second.
        bandwidth: u64,
    },
    /// What devices have left takes longer than the limit by itself.
    DeviceData {
        /// The devices with anything left, the largest first.
        devices: Vec<DeviceLeft>,
        /// Bytes sent a second.
        bandwidth: u64,
    },
    /// The bytes left have not become fewer, for no reason of the above.
    NoProgress {
        /// Bytes left.
        remaining: u64,
        /// The fewest there ever were.
        fewest: u64,
    },
}

impl fmt::Display for StallCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InitialData { devices } => {
                let names: Vec<_> = devices.iter().map(DeviceId::as_str).collect();
                write!(f, "the destination has not acknowledged the initial data of {}", names.join(", "))
            }
            Self::NoBandwidth => f.write_str("nothing is being carried over the connections"),
            Self::FixedTerms { time, limit } => write!(
                f,
                "stopping, loading and starting take {time:?} by themselves, more than the downtime limit of {limit:?}"
            ),
            Self::MemoryDirtyRate { dirty_rate, bandwidth } => write!(
                f,
                "the guest dirties {dirty_rate} bytes of memory a second, and {bandwidth} bytes a second are sent"
            ),
            Self::DeviceData { devices, bandwidth } => {
                let each = |d: &DeviceLeft| match d.rate.filter(|rate| rate < bandwidth) {
                    Some(rate) => format!("{} {} bytes, at {rate} a second by itself", d.id, d.bytes),
                    None => format!("{} {} bytes", d.id, d.bytes),
                };
                let each: Vec<_> = devices.iter().map(each).collect();
                write!(f, "device state left to send at {bandwidth} bytes a second: {}", each.join("; "))
            }
            Self::NoProgress { remaining, fewest } => {
                write!(f, "{remaining} bytes are left and they do not become fewer than {fewest}")
            }
        }
    }
}

/// What to do after a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round.
    Continue,
    /// Stop the guest now.
    Switch {
        /// The limit is not met: the policy forces the switch for this reason.
        forced: Option<StallCause>,
    },
    /// Another round, and report this. Comes once for each stall.
    Stalled {
        /// Why.
        cause: StallCause,
    },
    /// Give up.
    Abort {
        /// Why.
        cause: StallCause,
        /// The deadline has passed; else the policy gives up at the first stall.
        deadline_passed: bool,
    },
}

/// Judges the rounds of one pre-copy.
///
/// The guest is stopped when the estimate fits the limit and no device waits for the
/// acknowledgement of its initial data (V2-INITIAL). Progress is a new minimum of the bytes left,
/// or of the number of devices that wait.
#[derive(Clone, Debug)]
pub struct Convergence {
    config: ConvergenceConfig,
    fewest_bytes: u64,
    fewest_waiting: usize,
    idle_rounds: u32,
    reported: bool,
}

impl Convergence {
    /// Before the first round.
    #[must_use]
    pub const fn new(config: ConvergenceConfig) -> Self {
        Self { config, fewest_bytes: u64::MAX, fewest_waiting: usize::MAX, idle_rounds: 0, reported: false }
    }

    /// The decision after this round.
    pub fn round(&mut self, round: &Round) -> Decision {
        let waiting: Vec<_> =
            round.devices.iter().filter(|d| !d.acknowledged).map(|d| d.id.clone()).collect();
        let fits = round.estimate.fits(self.config.downtime_limit);
        if fits && waiting.is_empty() {
            return Decision::Switch { forced: None };
        }
        let remaining = round.remaining_bytes();
        if remaining < self.fewest_bytes || waiting.len() < self.fewest_waiting {
            self.fewest_bytes = self.fewest_bytes.min(remaining);
            self.fewest_waiting = self.fewest_waiting.min(waiting.len());
            self.idle_rounds = 0;
            self.reported = false;
        } else {
            self.idle_rounds = self.idle_rounds.saturating_add(1);
        }

        let deadline_passed = self.config.deadline.is_some_and(|deadline| round.now >= deadline);
        let stalled = self.idle_rounds >= self.config.stall_rounds.max(1);
        if !deadline_passed && !stalled {
            return Decision::Continue;
        }
        let cause = self.cause(round, fits, waiting);
        match self.config.policy {
            StallPolicy::Force => Decision::Switch { forced: Some(cause) },
            StallPolicy::Abort => Decision::Abort { cause, deadline_passed },
            StallPolicy::Wait if deadline_passed => Decision::Abort { cause, deadline_passed },
            StallPolicy::Wait if self.reported => Decision::Continue,
            StallPolicy::Wait => {
                self.reported = true;
                Decision::Stalled { cause }
            }
        }
    }

    /// The first reason that applies, from what no round can change to what the next one might.
    fn cause(&self, round: &Round, fits: bool, waiting: Vec<DeviceId>) -> StallCause {
        let limit = self.config.downtime_limit;
        let time = round.estimate.without_transfer();
        if time > limit {
            return StallCause::FixedTerms { time, limit };
        }
        if fits {
            return StallCause::InitialData { devices: waiting };
        }
        let Some(bandwidth) = round.bandwidth.filter(|b| *b > 0) else { return StallCause::NoBandwidth };
        let for_devices = round.estimate.device_data.unwrap_or(Duration::MAX);
        if for_devices > limit.saturating_sub(time) {
            if !waiting.is_empty() {
                return StallCause::InitialData { devices: waiting };
            }
            let mut devices: Vec<_> = round.devices.iter().filter(|d| d.bytes > 0).cloned().collect();
            devices.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.id.cmp(&b.id)));
            return StallCause::DeviceData { devices, bandwidth };
        }
        match round.memory_dirty_rate {
            Some(dirty_rate) if dirty_rate >= bandwidth => {
                StallCause::MemoryDirtyRate { dirty_rate, bandwidth }
            }
            _ => StallCause::NoProgress { remaining: round.remaining_bytes(), fewest: self.fewest_bytes },
        }
    }
}
