//! The session machines of both sides and the commit protocol between them, without I/O.
//!
//! [`SourceMachine`] and [`DestinationMachine`] decide; the engine does. Inputs go in with the time,
//! actions come out, and the answer to an action is another input:
//!
//! ```text
//! loop {
//!     while let Some(action) = machine.poll_action() {
//!         match action {
//!             Append(record) => match journal.append(&record) {
//!                 Ok(()) => machine.handle(Input::Appended(record.kind()), now())?,
//!                 Err(_) => machine.handle(Input::AppendFailed(record.kind()), now())?,
//!             },
//!             Send(message) => link.send(machine.session(), message),     // no link: drop it
//!             RollBack { .. } | StartDevices | … => start_it_and_report_later(action),
//!             Finished(outcome) => publish(outcome),
//!         }
//!     }
//!     match next_event_before(machine.poll_timeout()) {
//!         Some(input) => machine.handle(input, now())?,
//!         None => machine.handle_timeout(now()),
//!     }
//! }
//! ```
//!
//! **The engine's part.** Actions are carried out in the order given, and the queue is drained before
//! the next input. A machine has at most one append under way. A machine is kept and fed after
//! [`Outcome`] is published, for as long as the other side can still ask: a repeated question gets the
//! same answer, and an outcome in doubt is replaced by a better one when reconnection brings the
//! answer. Messages that the link loses need no repetition by the engine: after `Reconnected` each
//! machine says again what the other side must know.
//!
//! **What holds** (`docs/rules.md`, C-*; the simulator of `airlift-testkit` explores it): at no time
//! do both sides run; after COMMIT is durable on the source it runs again only on the destination's
//! ABANDONED; ABANDONED is said only when every device was reset, no vCPU ran, and the record is
//! durable; nothing that a record permits is done before the record is durable.
//!
//! Not checked here: what devices really do. The engine says `RolledBack`, `DevicesReset` or
//! `DevicesStarted` only after reading the states back.

mod deadlines;
mod destination;
mod message;
mod orders;
mod record;
mod source;
mod verdict;

pub use deadlines::{DestinationDeadlines, SourceDeadlines};
pub use destination::DestinationMachine;
pub use message::CommitMessage;
pub use orders::{DestinationAction, DestinationInput, SourceAction, SourceInput};
pub use record::{
    BootId, Durability, InvalidId, Journal, JournalError, Opened, Record, RecordKind, SessionId,
};
pub use source::SourceMachine;
pub use verdict::{DestinationVerdict, SourceVerdict, destination_verdict, source_verdict};

use crate::{Failure, Phase};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::hash::{Hash, Hasher};

/// How a migration ended on one side. Published when it is true (C-TRUTH).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs on the destination.
    Completed,
    /// It failed; the guest runs on the source or may be started there. The destination is reset.
    Aborted {
        /// Why.
        cause: Box<Failure>,
    },
    /// As `Aborted`, on a user's wish.
    Cancelled,
    /// This side cannot tell where the guest runs. It does not start it here.
    InDoubt {
        /// Why not.
        doubt: Doubt,
    },
}

/// Why a side is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Doubt {
    /// Source: COMMIT is durable and the destination has not answered.
    PeerSilent,
    /// The journal did not take this record, or has not answered.
    Journal(RecordKind),
    /// There is no journal, or it is not this side's.
    JournalMissing,
    /// The host was restarted and the journal may lack its last records.
    OtherBoot,
    /// Destination: the guest may have run here, and is gone.
    MayHaveRun,
    /// Destination: a device could not be reset after LOADED.
    NotReset,
    /// Source: the devices have not been walked back within the deadline.
    RollBackStuck,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PeerSilent => f.write_str("COMMIT is durable and the destination has not answered"),
            Self::Journal(record) => write!(f, "the journal did not take {record}"),
            Self::JournalMissing => f.write_str("there is no journal of this session and side"),
            Self::OtherBoot => {
                f.write_str("the host was restarted and its journal may lack the last records")
            }
            Self::MayHaveRun => f.write_str("the guest may have run on the destination and is gone"),
            Self::NotReset => f.write_str("a destination device could not be reset"),
            Self::RollBackStuck => f.write_str("the source's devices were not walked back in time"),
        }
    }
}

/// The answer to a user who cancels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum CancelAnswer {
    /// The migration ends with the guest on the source.
    Accepted,
    /// COMMIT may be durable, or the guest runs on the destination: the migration goes on (C-CANCEL).
    TooLate {
        /// The phase of the side that was asked.
        phase: Phase,
    },
}

/// The engine has done something out of turn: a defect in the engine, not a failed migration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{input} does not belong in phase {phase}")]
pub struct OutOfOrder {
    /// What was handed in.
    pub input: &'static str,
    /// The machine's phase.
    pub phase: Phase,
}

/// Nothing enters the hash: what failed decides nothing in the protocol, and to an explorer that
/// tells states apart by their hash two that differ only in their causes are one.
impl Hash for Failure {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}
