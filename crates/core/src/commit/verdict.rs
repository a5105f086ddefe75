//! What a restarted side may conclude from its journal, and nothing more.
//!
//! The verdict knows records only. Whether devices and memory are still there is for the caller to
//! find out; [`DestinationMachine::restarted`](super::DestinationMachine::restarted) asks for it.

use super::{BootId, Doubt, Durability, Opened, Record, RecordKind};
use crate::Side;

/// What a journal of the source says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceVerdict {
    /// COMMIT was never sent: this guest may run here.
    RunHere {
        /// COMMIT was attempted and given up, so that ABORTED is what keeps the two apart.
        aborted: bool,
    },
    /// COMMIT may have been sent: hold, and ask the destination.
    Committed,
    /// The destination had abandoned: this guest may run here.
    RolledBack,
    /// Only the destination or an operator can tell.
    InDoubt(Doubt),
    /// The guest runs on the destination.
    Done,
}

/// What a journal of the destination says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationVerdict {
    /// LOADED was never sent: the devices can be reset at will.
    NeverRan,
    /// LOADED may have been sent: hold.
    Hold,
    /// COMMIT has arrived and nothing was started.
    Committed,
    /// Something may have run: only an operator may decide.
    MayHaveRun {
        /// The guest certainly ran.
        ran: bool,
    },
    /// The session never runs here.
    Abandoned,
    /// Only an operator can tell.
    InDoubt(Doubt),
}

fn opened(records: &[Record], side: Side) -> Option<&Opened> {
    match records.first() {
        Some(Record::Opened(opened)) if opened.side == side => Some(opened),
        _ => None,
    }
}

/// Another boot, and the journal was only as durable as its process: its last records may be missing.
fn may_lack_records(opened: &Opened, boot: &BootId) -> bool {
    opened.durability == Durability::Process && opened.boot != *boot
}

/// Reads a source's journal after a restart in the boot `boot`.
///
/// A journal without OPENED, or of the other side, is in doubt and never "not committed" (C-MISSING).
/// A `Process` journal of another boot in which there is no COMMIT is in doubt: COMMIT may have been
/// sent and lost (C-BOOT).
#[must_use]
pub fn source_verdict(records: &[Record], boot: &BootId) -> SourceVerdict {
    let has = |kind| records.iter().any(|record| record.kind() == kind);
    let Some(opened) = opened(records, Side::Source) else {
        return SourceVerdict::InDoubt(Doubt::JournalMissing);
    };
    if has(RecordKind::Done) {
        SourceVerdict::Done
    } else if has(RecordKind::RolledBack) {
        SourceVerdict::RolledBack
    } else if has(RecordKind::Aborted) {
        SourceVerdict::RunHere { aborted: has(RecordKind::Commit) }
    } else if has(RecordKind::Commit) {
        SourceVerdict::Committed
    } else if may_lack_records(opened, boot) {
        SourceVerdict::InDoubt(Doubt::OtherBoot)
    } else {
        SourceVerdict::RunHere { aborted: false }
    }
}

/// Reads a destination's journal after a restart in the boot `boot`.
///
/// A journal without OPENED, or of the other side, is in doubt (C-MISSING). A `Process` journal of
/// another boot without ABANDONED is in doubt: RUN_STARTED may have been lost (C-BOOT). With
/// RUN_STARTED and without ABANDONED, something may have run (C-MAY-HAVE-RUN).
#[must_use]
pub fn destination_verdict(records: &[Record], boot: &BootId) -> DestinationVerdict {
    let has = |kind| records.iter().any(|record| record.kind() == kind);
    let Some(opened) = opened(records, Side::Destination) else {
        return DestinationVerdict::InDoubt(Doubt::JournalMissing);
    };
    if has(RecordKind::Abandoned) {
        DestinationVerdict::Abandoned
    } else if has(RecordKind::Running) {
        DestinationVerdict::MayHaveRun { ran: true }
    } else if has(RecordKind::RunStarted) {
        DestinationVerdict::MayHaveRun { ran: false }
    } else if may_lack_records(opened, boot) {
        DestinationVerdict::InDoubt(Doubt::OtherBoot)
    } else if has(RecordKind::Committed) {
        DestinationVerdict::Committed
    } else if has(RecordKind::Loaded) {
        DestinationVerdict::Hold
    } else {
        DestinationVerdict::NeverRan
    }
}
