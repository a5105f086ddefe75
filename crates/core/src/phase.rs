//! The two sides of a migration and the phases that each goes through, in order.

use serde::{Deserialize, Serialize};
use std::fmt;

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The host that the guest leaves.
    Source,
    /// The host that it comes to.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// A phase of a migration. A side goes only forward through its own, in the order given here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Source: the control connection is being made.
    Connect,
    /// Destination: waits for a source.
    Listen,
    /// Both: HELLO and the compatibility report; no device has been touched.
    Negotiate,
    /// Source: dirty logging on, devices to PRE_COPY.
    Setup,
    /// Source: initial data, then rounds, while the guest runs.
    Precopy,
    /// Source: vCPUs paused, devices to P2P and then STOP_COPY. Downtime begins.
    Quiesce,
    /// Source: records, final dirty sync, the rest of all data.
    StopCopy,
    /// Destination: devices take data.
    Resuming,
    /// Destination: RESUMING -> STOP, where devices validate.
    Load,
    /// Source: everything is sent; waits for LOADED.
    AwaitLoaded,
    /// Destination: LOADED is sent; holds.
    Loaded,
    /// Source: COMMIT is being journalled and sent.
    Commit,
    /// Destination: COMMIT has arrived and is durable.
    Committed,
    /// Destination: devices and vCPUs are being started, then run.
    Running,
    /// Source: the destination runs; devices go STOP_COPY -> STOP.
    Done,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::Listen => "listen",
            Self::Negotiate => "negotiate",
            Self::Setup => "setup",
            Self::Precopy => "precopy",
            Self::Quiesce => "quiesce",
            Self::StopCopy => "stop-copy",
            Self::Resuming => "resuming",
            Self::Load => "load",
            Self::AwaitLoaded => "await-loaded",
            Self::Loaded => "loaded",
            Self::Commit => "commit",
            Self::Committed => "committed",
            Self::Running => "running",
            Self::Done => "done",
        })
    }
}
