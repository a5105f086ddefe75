//! A journal as the storage under it may treat it: appends that land without being acknowledged, are
//! acknowledged without being on the disk, or are read back now and gone after a power loss.

use airlift_core::commit::{BootId, Durability, Opened, Record, RecordKind, SessionId};
use airlift_core::{Failure, Phase, Side};
use std::hash::{Hash, Hasher};

/// The boot in which the session was opened, and the one after a power loss.
pub(super) const FIRST_BOOT: BootId = BootId(1);
pub(super) const LATER_BOOT: BootId = BootId(2);

/// The one session of the simulation.
pub(super) const SESSION: SessionId = SessionId(0xa1);

/// Where an append got to that was not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Landing {
    /// Nowhere.
    Absent,
    /// It is read back, until the host loses power.
    Volatile,
    /// It is as durable as if it had been acknowledged.
    Durable,
}

/// The records of one side, with whether each survives a power loss. A record appended again keeps
/// its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SimJournal {
    durability: Durability,
    /// The first `len` are there.
    records: [(RecordKind, bool); 10],
    len: usize,
}

/// One word for all records: hashing states is most of the work of an exploration.
impl Hash for SimJournal {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let packed = self.there().iter().fold(self.durability as u64 + 1, |packed, (kind, on_disk)| {
            packed << 5 | (*kind as u64) << 1 | u64::from(*on_disk)
        });
        state.write_u64(packed);
    }
}

impl SimJournal {
    pub(super) fn new(durability: Durability) -> Self {
        Self { durability, records: [(RecordKind::Opened, true); 10], len: 1 }
    }

    pub(super) fn has(&self, kind: RecordKind) -> bool {
        self.there().iter().any(|(there, _)| *there == kind)
    }

    /// The record survives what its degree promises: it is there, and on the disk if it has to be.
    pub(super) fn is_durable(&self, kind: RecordKind) -> bool {
        self.there()
            .iter()
            .any(|(there, on_disk)| *there == kind && (*on_disk || self.degree(kind) == Durability::Process))
    }

    fn there(&self) -> &[(RecordKind, bool)] {
        &self.records[..self.len]
    }

    fn degree(&self, kind: RecordKind) -> Durability {
        kind.durability(self.durability)
    }

    /// An append of `kind` that got this far. `degree`: what it is durable against, if it is.
    pub(super) fn land(&mut self, kind: RecordKind, landing: Landing, degree: Durability) {
        let on_disk = match landing {
            Landing::Absent => return,
            Landing::Volatile => false,
            Landing::Durable => degree == Durability::Power,
        };
        match self.records[..self.len].iter_mut().find(|(there, _)| *there == kind) {
            Some((_, already)) => *already |= on_disk,
            // Ten kinds of record, each once: there is room.
            None => {
                self.records[self.len] = (kind, on_disk);
                self.len += 1;
            }
        }
    }

    /// How many records a power loss may take.
    pub(super) fn unsynced(&self) -> usize {
        self.there().iter().filter(|(_, on_disk)| !on_disk).count()
    }

    /// The host loses power; of the records that were not on the disk the first `kept` had got there.
    pub(super) fn lose_power(&mut self, kept: usize) {
        let mut survivors = Self::new(self.durability);
        let mut left = kept;
        for (kind, on_disk) in self.there() {
            let survives = *on_disk || left > 0;
            if !on_disk {
                left = left.saturating_sub(1);
            }
            if survives {
                survivors.land(*kind, Landing::Durable, Durability::Power);
            }
        }
        *self = survivors;
    }

    /// What a restart reads.
    pub(super) fn read(&self, side: Side) -> Vec<Record> {
        let cause = || Box::new(fixed_failure(side));
        self.there()
            .iter()
            .map(|(kind, _)| match kind {
                RecordKind::Opened => Record::Opened(Box::new(Opened {
                    session: SESSION,
                    side,
                    boot: FIRST_BOOT,
                    durability: self.durability,
                    peer: String::new(),
                    devices: Vec::new(),
                })),
                RecordKind::Loaded => Record::Loaded,
                RecordKind::Commit => Record::Commit,
                RecordKind::Committed => Record::Committed,
                RecordKind::RunStarted => Record::RunStarted,
                RecordKind::Running => Record::Running,
                RecordKind::Abandoned => Record::Abandoned { cause: cause() },
                RecordKind::RolledBack => Record::RolledBack { cause: cause() },
                RecordKind::Aborted => Record::Aborted { cause: cause() },
                RecordKind::Done => Record::Done,
            })
            .collect()
    }

    pub(super) const fn durability(&self) -> Durability {
        self.durability
    }
}

/// One failure for all: what failed makes no difference to the protocol.
pub(super) fn fixed_failure(side: Side) -> Failure {
    Failure::new(side, Phase::Load, "")
}
