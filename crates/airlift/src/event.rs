//! What happens, as it happens: one value for each event, handed to the embedder's [`Observer`].

use airlift_core::{CompatReport, DeviceId, DeviceState, Failure, Phase, Side};
use serde::{Deserialize, Serialize};

/// One arc, or combination of arcs, that a device was asked to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Transition {
    /// The side of the device.
    pub side: Side,
    /// State before.
    pub from: DeviceState,
    /// State reached; after a failure the state that was read back.
    pub to: DeviceState,
    /// When it began: milliseconds since the session's start on that side.
    pub at_ms: f64,
    /// How long it took, in milliseconds.
    pub took_ms: f64,
}

/// Something that happened in a migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A phase begins. The observer is called before anything of the phase is done.
    Phase {
        /// Whose phase.
        side: Side,
        /// Which.
        phase: Phase,
        /// Milliseconds since the session's start on this side.
        at_ms: f64,
    },
    /// The two sides were compared.
    Compared {
        /// Every finding.
        report: CompatReport,
    },
    /// A device made an arc.
    Transition {
        /// The device.
        device: DeviceId,
        /// The arc.
        #[serde(flatten)]
        transition: Transition,
    },
    /// A round of memory ended.
    Round {
        /// Its number; 0 is the first, which sends everything.
        round: u32,
        /// Bytes of memory sent in it.
        sent_bytes: u64,
        /// Bytes of memory dirty after it.
        dirty_bytes: u64,
        /// Bytes that devices still have.
        device_bytes: u64,
        /// Measured bandwidth in bytes a second.
        bandwidth: u64,
        /// What the downtime would be if the guest were stopped now, in milliseconds.
        estimate_ms: f64,
    },
    /// A device's initial data was acknowledged by the other side.
    InitialDataAcknowledged {
        /// The device.
        device: DeviceId,
        /// The generation.
        generation: u32,
    },
    /// Pre-copy does not converge.
    Stalled {
        /// Why, with figures.
        cause: String,
    },
    /// Something is done in a lesser way than asked for, and why.
    Degraded {
        /// What.
        message: String,
    },
    /// A device is given up: nothing more is asked of it.
    Quarantined {
        /// The device.
        device: DeviceId,
        /// Why.
        reason: String,
    },
    /// The migration failed on this side; what follows is the way back.
    Failed {
        /// Everything known.
        failure: Failure,
    },
}

/// Takes events. Called from the thread that runs the session and from the devices' workers, which
/// report their own arcs, so also at the same time; the events of one thread come in order. What it
/// does delays the migration, and a worker's arc in the downtime.
pub trait Observer: Send + Sync {
    /// An event happened.
    fn event(&self, event: &Event);
}

/// Drops every event.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn event(&self, _event: &Event) {}
}
