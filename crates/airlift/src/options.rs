//! What can be chosen for a migration, with its defaults.

pub use airlift_core::commit::Durability;
pub use airlift_core::{ResetPolicy, StallPolicy};
use std::time::Duration;

/// One receive budget for a session by default: 64 MiB.
pub const DEFAULT_RECEIVE_BUDGET: u64 = 64 << 20;

/// How long each blocking step may take. Every one is a bound on silence or on one step, not on the
/// migration as a whole, except `precopy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// To make one connection.
    pub connect: Duration,
    /// For the answer to HELLO, and for each later step of the handshake.
    pub negotiate: Duration,
    /// For all devices to begin saving or loading.
    pub setup: Duration,
    /// For pre-copy to converge.
    pub precopy: Duration,
    /// For all devices to reach P2P, then STOP_COPY; also for the machine to pause.
    pub quiesce: Duration,
    /// For the rest of all data after the stop, and for the destination's load.
    pub stop_copy: Duration,
    /// For COMMIT to be answered, and for the destination to hold after LOADED.
    pub commit: Duration,
    /// For one device to walk back in a rollback; a device that takes longer is quarantined.
    pub rollback: Duration,
    /// For the source to come back to the destination when the connection ended after COMMIT, and
    /// RUNNING or ABANDONED may be lost. At most `commit` counts.
    pub linger: Duration,
    /// Without any message from the other side for this long, it is taken as gone.
    pub silence: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            negotiate: Duration::from_secs(30),
            setup: Duration::from_secs(30),
            precopy: Duration::from_secs(3600),
            quiesce: Duration::from_secs(30),
            stop_copy: Duration::from_secs(300),
            commit: Duration::from_secs(30),
            rollback: Duration::from_secs(30),
            // A source that was killed does not come back: the destination must not hang long for it.
            linger: Duration::from_secs(5),
            silence: Duration::from_secs(10),
        }
    }
}

/// Choices of the source.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// The downtime that the estimate must fit before the guest is stopped.
    pub downtime_limit: Duration,
    /// Data connections, 1 to 64.
    pub channels: u16,
    /// What to do when pre-copy does not converge.
    pub stall_policy: StallPolicy,
    /// The embedder declares that devices do no DMA to each other: devices without the P2P states
    /// are then accepted together. Recorded in the report.
    pub assume_no_peer_dma: bool,
    /// Whether a device that cannot be walked back may be reset, which destroys what the guest sees.
    pub reset_policy: ResetPolicy,
    /// Bounds of every step.
    pub deadlines: Deadlines,
    /// What the journal given to the session survives; written into its first record.
    pub durability: Durability,
    /// Switches that each break one rule, for tests that must be able to fail.
    pub test: TestOptions,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            // QEMU's default, which operators know.
            downtime_limit: Duration::from_millis(300),
            channels: 1,
            stall_policy: StallPolicy::Wait,
            assume_no_peer_dma: false,
            reset_policy: ResetPolicy::Never,
            deadlines: Deadlines::default(),
            durability: Durability::Process,
            test: TestOptions::default(),
        }
    }
}

/// Choices of the destination.
#[derive(Clone, Debug)]
pub struct DestinationOptions {
    /// Bytes that may be reserved for device data that has not been written yet.
    pub receive_budget: u64,
    /// Data connections that are accepted at most, 1 to 64.
    pub max_channels: u16,
    /// Bounds of every step. `silence` counts from the first connection.
    pub deadlines: Deadlines,
    /// What the journal given to the session survives; written into its first record.
    pub durability: Durability,
    /// How long to wait for a source; `None`: for ever.
    pub listen: Option<Duration>,
}

impl Default for DestinationOptions {
    fn default() -> Self {
        Self {
            receive_budget: DEFAULT_RECEIVE_BUDGET,
            max_channels: 64,
            deadlines: Deadlines::default(),
            durability: Durability::Process,
            listen: None,
        }
    }
}

/// Each switch leaves out one rule. They exist so that a test can show what the rule is for: with a
/// switch set, a migration loses data, and the test sees it. Never set outside of tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TestOptions {
    /// Stop devices without taking them all through P2P first (I14).
    pub skip_p2p: bool,
    /// Make the final dirty sync before the machine's records are saved (I13).
    pub sync_before_records: bool,
}
