//! How long each side waits, phase by phase. Every wait of a machine ends by one of these.

use std::hash::{Hash, Hasher};
use std::time::Duration;

/// How long the source waits, phase by phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceDeadlines {
    /// For a connection.
    pub connect: Duration,
    /// For HELLO, the compatibility report and OPENED.
    pub negotiate: Duration,
    /// For dirty logging and PRE_COPY.
    pub setup: Duration,
    /// For all of pre-copy.
    pub precopy: Duration,
    /// From the pause until all devices are in STOP_COPY.
    pub quiesce: Duration,
    /// For the rest of all data.
    pub stop_copy: Duration,
    /// For LOADED.
    pub await_loaded: Duration,
    /// For COMMIT to become durable and RUNNING or ABANDONED to come.
    pub commit: Duration,
    /// After COMMIT, for a new connection and its answer, before this side is in doubt.
    pub reconnect: Duration,
    /// For all devices to be walked back.
    pub roll_back: Duration,
    /// For the devices' last step to STOP and for the closing record.
    pub finish: Duration,
}

impl SourceDeadlines {
    /// The same patience in every phase.
    #[must_use]
    pub const fn all(patience: Duration) -> Self {
        Self {
            connect: patience,
            negotiate: patience,
            setup: patience,
            precopy: patience,
            quiesce: patience,
            stop_copy: patience,
            await_loaded: patience,
            commit: patience,
            reconnect: patience,
            roll_back: patience,
            finish: patience,
        }
    }
}

/// Nothing enters the hash: they are the same in every state of a machine.
impl Hash for SourceDeadlines {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

impl Default for SourceDeadlines {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self {
            connect: s(10),
            negotiate: s(30),
            setup: s(30),
            precopy: s(3600),
            quiesce: s(10),
            stop_copy: s(300),
            await_loaded: s(60),
            commit: s(15),
            reconnect: s(60),
            roll_back: s(30),
            finish: s(10),
        }
    }
}

/// How long the destination waits, phase by phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DestinationDeadlines {
    /// For a source.
    pub listen: Duration,
    /// For HELLO, the compatibility report and OPENED.
    pub negotiate: Duration,
    /// For all data: as long as the source may take for pre-copy and the rest.
    pub resuming: Duration,
    /// For all devices to take and validate their state, and for LOADED to become durable.
    pub load: Duration,
    /// For COMMIT, after LOADED. When it is over this side abandons.
    pub hold: Duration,
    /// From COMMIT until the vCPUs run.
    pub start: Duration,
    /// For all devices to be reset and ABANDONED to become durable.
    pub reset: Duration,
}

impl DestinationDeadlines {
    /// The same patience in every phase.
    #[must_use]
    pub const fn all(patience: Duration) -> Self {
        Self {
            listen: patience,
            negotiate: patience,
            resuming: patience,
            load: patience,
            hold: patience,
            start: patience,
            reset: patience,
        }
    }
}

/// Nothing enters the hash: they are the same in every state of a machine.
impl Hash for DestinationDeadlines {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

impl Default for DestinationDeadlines {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self {
            listen: s(3600),
            negotiate: s(30),
            resuming: s(4200),
            load: s(60),
            hold: s(120),
            start: s(15),
            reset: s(30),
        }
    }
}
