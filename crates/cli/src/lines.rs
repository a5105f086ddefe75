//! The lines that `soft-device` and `sim-vm` print with `--json` beside their crates' own events, and
//! that `demo` reads: one type for both ends.

use airlift::Running;
use serde::{Deserialize, Serialize};

/// `listening`: the process can be connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listening {
    /// Where: a URI.
    pub(crate) uri: String,
}

/// `session-ended` of a simulated machine: a migration process has gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SessionEnded {
    /// The outcome that it reported; null when it reported none, as when it was killed.
    pub(crate) outcome: Option<String>,
    /// What was wrong with the connection.
    pub(crate) problem: Option<String>,
}

/// `result` of a process that takes no part in the decision where the guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Bystander {
    /// `completed` or `aborted`.
    pub(crate) outcome: &'static str,
    /// It does not know.
    pub(crate) source_running: Running,
    /// It does not know.
    pub(crate) destination_running: Running,
    /// What failed.
    pub(crate) error: Option<crate::json::ErrorView>,
}

impl Bystander {
    /// It ended as it should.
    pub(crate) const fn done() -> Self {
        Self {
            outcome: "completed",
            source_running: Running::Unknown,
            destination_running: Running::Unknown,
            error: None,
        }
    }

    /// It could not go on.
    pub(crate) fn failed(error: crate::json::ErrorView) -> Self {
        Self { outcome: "aborted", error: Some(error), ..Self::done() }
    }
}
