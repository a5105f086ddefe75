//! What can happen next, and what must never have happened.

use super::journal::Landing;
use airlift_core::Side;
use std::fmt;

/// A message on the network, with its sender where both send it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// LOADED.
    Loaded,
    /// COMMIT.
    Commit,
    /// RUNNING.
    Running,
    /// ABANDONED.
    Abandoned,
    /// ABORT.
    Abort(Side),
    /// CANCEL.
    Cancel(Side),
}

impl Message {
    pub(super) const ALL: [Self; 8] = [
        Self::Loaded,
        Self::Commit,
        Self::Running,
        Self::Abandoned,
        Self::Abort(Side::Source),
        Self::Abort(Side::Destination),
        Self::Cancel(Side::Source),
        Self::Cancel(Side::Destination),
    ];

    pub(super) const fn to(self) -> Side {
        match self {
            Self::Loaded | Self::Running | Self::Abandoned => Side::Source,
            Self::Commit | Self::Abort(Side::Source) | Self::Cancel(Side::Source) => Side::Destination,
            Self::Abort(Side::Destination) | Self::Cancel(Side::Destination) => Side::Source,
        }
    }
}

/// One step of the joint system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The engine carries out the machine's next action.
    Act(Side),
    /// The engine enters the next phase.
    Advance(Side),
    /// A message arrives, for the first time or again.
    Deliver(Message),
    /// The append under way is acknowledged.
    Appended(Side),
    /// Fault: the append under way fails, having got this far.
    AppendFails(Side, Landing),
    /// The operation of the devices or vCPUs that is under way succeeds.
    Succeeds(Side),
    /// It fails. A fault, unless a lost device is the reason.
    OperationFails(Side),
    /// A deadline passes.
    Timeout(Side),
    /// A side sees that the connection is gone.
    LinkLost(Side),
    /// A side sees a new connection.
    Reconnected(Side),
    /// The user cancels.
    Cancel(Side),
    /// Something fails on a side before COMMIT that leaves its devices able to run.
    Fails(Side),
    /// Fault: the process dies and is started again; an append under way got this far.
    Crash(Side, Option<Landing>),
    /// Fault: the host loses power; the devices are gone, and all but the first `kept` records that
    /// were not yet on the disk.
    PowerLoss {
        /// Whose host.
        side: Side,
        /// An append under way got this far.
        landing: Option<Landing>,
        /// How many unsynced records survive.
        kept: usize,
    },
    /// Fault: a device of the destination is lost; whether that is noticed at once.
    DeviceLost {
        /// The engine sees it.
        noticed: bool,
    },
    /// A broken destination says ABANDONED without a record.
    SayAbandoned,
}

impl Step {
    /// A step that uses up one of the bounded faults.
    pub(super) const fn is_fault(self) -> bool {
        matches!(
            self,
            Self::AppendFails(..) | Self::Crash(..) | Self::PowerLoss { .. } | Self::DeviceLost { .. }
        )
    }

    /// A step by which two sides left in peace come to an end: no fault, no wish, no loss.
    pub(super) const fn is_helpful(self) -> bool {
        !self.is_fault()
            && !matches!(
                self,
                Self::LinkLost(_)
                    | Self::Cancel(_)
                    | Self::Fails(_)
                    | Self::OperationFails(_)
                    | Self::SayAbandoned
            )
    }
}

/// A rule that is left out, to show that the exploration notices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Breakage {
    /// The protocol as it is.
    #[default]
    None,
    /// The destination says ABANDONED while it holds, without a record (C-ABANDONED).
    AbandonUnrecorded,
    /// The source resumes when COMMIT stays unanswered (C-COMMIT-HOLD).
    ResumeOnTimeout,
    /// A restart takes every boot for the journal's (C-BOOT).
    IgnoreBootId,
    /// COMMIT is sent while its record is being written (C-COMMIT-DURABLE).
    SendBeforeJournal,
    /// The destination takes COMMITTED and RUN_STARTED for durable at once (C-RUN-STARTED).
    RunBeforeCommitted,
    /// A reset is reported without being done (C-ABANDONED).
    AbandonWithoutReset,
    /// A restart does not make durable again what it read back (C-REAPPEND).
    NoReappend,
    /// ABORTED is no more durable than the other records (C-JOURNAL-SYNC).
    AbortedUnsynced,
    /// A restarted destination takes what it finds for what it loaded (C-INTACT).
    AssumeIntact,
}

impl Breakage {
    /// Every rule that can be left out.
    pub const ALL: [Self; 9] = [
        Self::AbandonUnrecorded,
        Self::ResumeOnTimeout,
        Self::IgnoreBootId,
        Self::SendBeforeJournal,
        Self::RunBeforeCommitted,
        Self::AbandonWithoutReset,
        Self::NoReappend,
        Self::AbortedUnsynced,
        Self::AssumeIntact,
    ];
}

/// A property that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Violation {
    /// Both sides are live: vCPUs run, or a device that holds guest state does.
    BothLive,
    /// The guest went on at both sides, if not at the same time.
    Forked,
    /// The destination runs devices or vCPUs that do not hold what was loaded.
    StartedEmpty,
    /// The source goes on (C-COMMIT-HOLD, C-COMMIT-FAILED) with COMMIT in its journal and neither ROLLED_BACK nor ABORTED durable.
    CommittedSourceRuns,
    /// A message was sent ahead of the record that permits it.
    SaidTooEarly(Message),
    /// A published outcome is not true (C-TRUTH).
    FalseOutcome(Side),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BothLive => f.write_str("both sides are live"),
            Self::Forked => f.write_str("the guest went on at both sides"),
            Self::StartedEmpty => f.write_str("the destination runs without what was loaded"),
            Self::CommittedSourceRuns => {
                f.write_str("the source runs after COMMIT without being rolled back")
            }
            Self::SaidTooEarly(message) => write!(f, "{message:?} was sent before its record was durable"),
            Self::FalseOutcome(side) => write!(f, "the {side} published an outcome that is not true"),
        }
    }
}
