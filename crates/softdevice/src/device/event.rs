//! What a SoftDevice tells whoever runs it. Times are CLOCK_MONOTONIC in nanoseconds.

use airlift_core::{DeviceState, Errno};
use serde::{Deserialize, Serialize};

/// Something happened to a device. As JSON it is an object whose `event` names it in kebab case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum SoftEvent {
    /// A client came.
    Attached {
        /// The state in which it found the device.
        state: DeviceState,
    },
    /// The client went.
    Detached {
        /// Why.
        reason: String,
        /// The state that is kept for the next client.
        state: DeviceState,
    },
    /// The device was reset: it is as it was made.
    Reset {
        /// When it was asked for.
        start_ns: u64,
        /// When it was done.
        end_ns: u64,
    },
    /// An arc ended.
    Transition {
        /// The state before.
        from: DeviceState,
        /// The state that was asked for.
        to: DeviceState,
        /// When the arc was asked for.
        start_ns: u64,
        /// When it ended.
        end_ns: u64,
        /// Why it failed; absent when it did not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        errno: Option<Errno>,
        /// The state after.
        reached: DeviceState,
    },
    /// The device has stopped: follows the transition.
    Stopped {
        /// Digest of its whole state.
        digest: u64,
        /// Steps that the dirtier has made.
        tick: u64,
        /// Entries that each ring was given.
        produced: Vec<u64>,
        /// Interrupts that each vector has raised.
        raised: Vec<u64>,
    },
    /// A loaded state was compared with what its seed and tick say. Comes some time after the load:
    /// the device may run by then.
    Loaded {
        /// Digest of the whole state as it was loaded.
        digest: u64,
        /// Steps that the dirtier had made.
        tick: u64,
        /// All of it is right.
        verified: bool,
        /// The first page that was found to be wrong.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bad_page: Option<u64>,
        /// Loads that this device has completed since it was made or reset.
        loads: u64,
    },
}
