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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::SessionId;
    use crate::{Failure, Phase};

    const BOOT: BootId = BootId(1);
    const OTHER: BootId = BootId(2);

    fn journal(side: Side, durability: Durability, kinds: &[RecordKind]) -> Vec<Record> {
        let cause = || Box::new(Failure::new(side, Phase::Commit, "x"));
        let opened = Opened {
            session: SessionId(1),
            side,
            boot: BOOT,
            durability,
            peer: String::new(),
            devices: Vec::new(),
        };
        let mut records = vec![Record::Opened(Box::new(opened))];
        records.extend(kinds.iter().map(|kind| match kind {
            RecordKind::Loaded => Record::Loaded,
            RecordKind::Commit => Record::Commit,
            RecordKind::Committed => Record::Committed,
            RecordKind::RunStarted => Record::RunStarted,
            RecordKind::Running => Record::Running,
            RecordKind::Abandoned => Record::Abandoned { cause: cause() },
            RecordKind::RolledBack => Record::RolledBack { cause: cause() },
            RecordKind::Aborted => Record::Aborted { cause: cause() },
            _ => Record::Done,
        }));
        records
    }

    /// C-BOOT.
    #[test]
    fn what_a_source_may_conclude() {
        use RecordKind::{Aborted, Commit, Done, RolledBack};
        use SourceVerdict as V;
        let in_doubt = V::InDoubt(Doubt::OtherBoot);
        // Records; the verdict in the same boot, and after a power loss for either degree.
        let table: [(&[RecordKind], [SourceVerdict; 3]); 6] = [
            (&[], [V::RunHere { aborted: false }, in_doubt, V::RunHere { aborted: false }]),
            (&[Commit], [V::Committed; 3]),
            (&[Commit, RolledBack], [V::RolledBack; 3]),
            (&[Aborted], [V::RunHere { aborted: false }; 3]),
            (&[Commit, Aborted], [V::RunHere { aborted: true }; 3]),
            (&[Commit, Done], [V::Done; 3]),
        ];
        for (kinds, [same, process, power]) in table {
            let read = |durability, boot| source_verdict(&journal(Side::Source, durability, kinds), &boot);
            assert_eq!(read(Durability::Process, BOOT), same, "{kinds:?}");
            assert_eq!(read(Durability::Power, BOOT), same, "{kinds:?}");
            assert_eq!(read(Durability::Process, OTHER), process, "{kinds:?}");
            assert_eq!(read(Durability::Power, OTHER), power, "{kinds:?}");
        }
    }

    /// C-BOOT, C-MAY-HAVE-RUN.
    #[test]
    fn what_a_destination_may_conclude() {
        use DestinationVerdict as V;
        use RecordKind::{Abandoned, Committed, Loaded, RunStarted, Running};
        let in_doubt = V::InDoubt(Doubt::OtherBoot);
        let table: [(&[RecordKind], [DestinationVerdict; 3]); 8] = [
            (&[], [V::NeverRan, in_doubt, V::NeverRan]),
            (&[Loaded], [V::Hold, in_doubt, V::Hold]),
            (&[Loaded, Committed], [V::Committed, in_doubt, V::Committed]),
            (&[Loaded, Committed, RunStarted], [V::MayHaveRun { ran: false }; 3]),
            (&[Loaded, Committed, RunStarted, Running], [V::MayHaveRun { ran: true }; 3]),
            (&[Abandoned], [V::Abandoned; 3]),
            (&[Loaded, Abandoned], [V::Abandoned; 3]),
            (&[Loaded, Committed, RunStarted, Abandoned], [V::Abandoned; 3]),
        ];
        for (kinds, [same, process, power]) in table {
            let read =
                |durability, boot| destination_verdict(&journal(Side::Destination, durability, kinds), &boot);
            assert_eq!(read(Durability::Process, BOOT), same, "{kinds:?}");
            assert_eq!(read(Durability::Power, BOOT), same, "{kinds:?}");
            assert_eq!(read(Durability::Process, OTHER), process, "{kinds:?}");
            assert_eq!(read(Durability::Power, OTHER), power, "{kinds:?}");
        }
    }

    /// C-MISSING: absence of evidence is not evidence.
    #[test]
    fn a_journal_that_is_missing_is_in_doubt() {
        let missing = SourceVerdict::InDoubt(Doubt::JournalMissing);
        assert_eq!(source_verdict(&[], &BOOT), missing);
        assert_eq!(source_verdict(&[Record::Commit], &BOOT), missing);
        let others = journal(Side::Destination, Durability::Power, &[RecordKind::Abandoned]);
        assert_eq!(source_verdict(&others, &BOOT), missing);

        let missing = DestinationVerdict::InDoubt(Doubt::JournalMissing);
        assert_eq!(destination_verdict(&[], &BOOT), missing);
        assert_eq!(destination_verdict(&[Record::Loaded], &BOOT), missing);
        let others = journal(Side::Source, Durability::Power, &[]);
        assert_eq!(destination_verdict(&others, &BOOT), missing);
    }
}
