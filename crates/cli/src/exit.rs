//! What the command's exit code says.

use airlift::{MigrationReport, Outcome};
use std::process::ExitCode;

/// The end of a run of the command, as its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Done,
    /// Failed; this side is as it was before.
    Failed,
    /// The arguments are wrong; nothing was done.
    Usage,
    /// In doubt: only the other side or an operator can say which side may run.
    InDoubt,
    /// The sides do not match; nothing was touched.
    Incompatible,
    /// Cancelled; this side is as it was before.
    Cancelled,
    /// Failed, and a device of this side was reset or lost.
    DeviceLost,
    /// The migration was done, and this is the code of the command that took the devices over.
    Command(u8),
}

impl Exit {
    /// The exit code of an outcome. `lost`: a device of this side was reset or given up.
    pub(crate) const fn of(outcome: Outcome, lost: bool) -> Self {
        match outcome {
            Outcome::Completed => Self::Done,
            Outcome::InDoubt => Self::InDoubt,
            Outcome::Incompatible => Self::Incompatible,
            Outcome::Aborted | Outcome::Cancelled if lost => Self::DeviceLost,
            Outcome::Aborted => Self::Failed,
            Outcome::Cancelled => Self::Cancelled,
        }
    }

    /// The exit code of one side's report.
    pub(crate) fn of_report(report: &MigrationReport) -> Self {
        let lost = report.devices.iter().any(|d| d.was_reset || d.quarantined.is_some());
        Self::of(report.outcome, lost)
    }

    /// The number.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::InDoubt => 3,
            Self::Incompatible => 4,
            Self::Cancelled => 5,
            Self::DeviceLost => 6,
            Self::Command(code) => code,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_has_its_code() {
        assert_eq!(Exit::of(Outcome::Completed, false).code(), 0);
        assert_eq!(Exit::of(Outcome::Aborted, false).code(), 1);
        assert_eq!(Exit::Usage.code(), 2);
        assert_eq!(Exit::of(Outcome::InDoubt, true).code(), 3);
        assert_eq!(Exit::of(Outcome::Incompatible, false).code(), 4);
        assert_eq!(Exit::of(Outcome::Cancelled, false).code(), 5);
        assert_eq!(Exit::of(Outcome::Aborted, true).code(), 6);
        assert_eq!(Exit::of(Outcome::Cancelled, true).code(), 6);
    }
}
