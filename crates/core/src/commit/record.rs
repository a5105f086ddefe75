//! The journal of one side: what is written down, how durable it is, and by whom.
//!
//! The records are plain data; [`Journal`] is the only way out, and the embedder implements it. What
//! a restart may conclude from the records is in `verdict`. Nothing here checks that records come in
//! a sensible order: the machines ask for them in order, and the verdict distrusts what it reads.

use crate::{DeviceId, DeviceState, Errno, Failure, Side};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The text is not 128 bits in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not 32 hexadecimal digits: {0:?}")]
pub struct InvalidId(pub String);

macro_rules! id_of_128_bits {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:032x})"), self.0)
            }
        }

        /// Reads 32 hexadecimal digits; hyphens between them, as in a UUID, are skipped.
        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let refuse = || InvalidId(text.chars().take(64).collect());
                let mut digits = 0;
                let mut value = 0_u128;
                for c in text.chars().filter(|c| *c != '-') {
                    digits += 1;
                    if digits > 32 {
                        return Err(refuse());
                    }
                    value = value << 4 | u128::from(c.to_digit(16).ok_or_else(refuse)?);
                }
                if digits == 32 { Ok(Self(value)) } else { Err(refuse()) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

id_of_128_bits! {
    /// The random name of one migration. Every message and every journal belongs to exactly one, so
    /// that nothing said in an earlier attempt can be taken for an answer in this one (C-SESSION).
    SessionId
}

id_of_128_bits! {
    /// What names one boot of a host (`/proc/sys/kernel/random/boot_id`). Another value than the one
    /// in [`Opened`] means that the host has lost power or was restarted since.
    BootId
}

/// What a record survives once [`Journal::append`] has returned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// The death of the process, not of the host. After a power loss such a journal proves little,
    /// and the verdict says so (C-BOOT).
    #[default]
    Process,
    /// A power loss of the host too.
    Power,
}

/// The first record of a journal: what must be known before the first device is touched.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Opened {
    /// The migration.
    pub session: SessionId,
    /// Whose journal this is.
    pub side: Side,
    /// The boot in which it was opened.
    pub boot: BootId,
    /// How durable its records are.
    pub durability: Durability,
    /// The other side, as a person would name it (a URI).
    pub peer: String,
    /// Each device of this side with its state before the migration touched it: a restart rolls back
    /// to exactly this, so that a device that did not run is not started.
    pub devices: Vec<(DeviceId, DeviceState)>,
}

/// One record. Serialized with the kind as a tag.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Record {
    /// Both: a session begins.
    Opened(Box<Opened>),
    /// Destination: everything is loaded and validated. LOADED may be sent.
    Loaded,
    /// Source: it will not run this guest again unless the destination says ABANDONED. COMMIT may be
    /// sent.
    Commit,
    /// Destination: COMMIT has arrived.
    Committed,
    /// Destination: from here on something may have run.
    RunStarted,
    /// Destination: the guest has run here.
    Running,
    /// Destination: every device was reset and no vCPU ran; this session never runs here. ABANDONED
    /// may be sent.
    Abandoned {
        /// Why.
        cause: Box<Failure>,
    },
    /// Source: ABANDONED has arrived after COMMIT; the guest may run here again.
    RolledBack {
        /// Why.
        cause: Box<Failure>,
    },
    /// Source: the migration has failed and COMMIT was never sent.
    Aborted {
        /// Why.
        cause: Box<Failure>,
    },
    /// Source: the guest runs on the destination and the devices here are stopped.
    Done,
}

/// The kind of a [`Record`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordKind {
    /// [`Record::Opened`].
    Opened,
    /// [`Record::Loaded`].
    Loaded,
    /// [`Record::Commit`].
    Commit,
    /// [`Record::Committed`].
    Committed,
    /// [`Record::RunStarted`].
    RunStarted,
    /// [`Record::Running`].
    Running,
    /// [`Record::Abandoned`].
    Abandoned,
    /// [`Record::RolledBack`].
    RolledBack,
    /// [`Record::Aborted`].
    Aborted,
    /// [`Record::Done`].
    Done,
}

impl Record {
    /// The kind of this record.
    #[must_use]
    pub const fn kind(&self) -> RecordKind {
        match self {
            Self::Opened(_) => RecordKind::Opened,
            Self::Loaded => RecordKind::Loaded,
            Self::Commit => RecordKind::Commit,
            Self::Committed => RecordKind::Committed,
            Self::RunStarted => RecordKind::RunStarted,
            Self::Running => RecordKind::Running,
            Self::Abandoned { .. } => RecordKind::Abandoned,
            Self::RolledBack { .. } => RecordKind::RolledBack,
            Self::Aborted { .. } => RecordKind::Aborted,
            Self::Done => RecordKind::Done,
        }
    }
}

impl RecordKind {
    /// The degree to which this record must be durable before the append returns, for a journal of
    /// the `chosen` degree. OPENED and ABORTED must survive a power loss in every journal
    /// (C-JOURNAL-SYNC): without OPENED nothing can be said of a session, and a COMMIT that outlives
    /// the ABORTED behind it would start the destination after the source has run on. Neither is in
    /// the downtime of a migration that succeeds.
    #[must_use]
    pub const fn durability(self, chosen: Durability) -> Durability {
        match self {
            Self::Opened | Self::Aborted => Durability::Power,
            _ => chosen,
        }
    }
}

impl fmt::Display for RecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Opened => "OPENED",
            Self::Loaded => "LOADED",
            Self::Commit => "COMMIT",
            Self::Committed => "COMMITTED",
            Self::RunStarted => "RUN_STARTED",
            Self::Running => "RUNNING",
            Self::Abandoned => "ABANDONED",
            Self::RolledBack => "ROLLED_BACK",
            Self::Aborted => "ABORTED",
            Self::Done => "DONE",
        })
    }
}

/// A record could not be made durable. It may nevertheless be there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("the journal did not take {record}: {message}{}", errno.map(|e| format!(": {e}")).unwrap_or_default())]
pub struct JournalError {
    /// The record.
    pub record: RecordKind,
    /// The error number, where there is one.
    pub errno: Option<Errno>,
    /// What happened, for a person.
    pub message: String,
}

/// Where the records of one side of one session go.
///
/// An implementation keeps three promises. An append that returned `Ok` is read back by every later
/// read that its degree covers ([`RecordKind::durability`]), whatever became of failed appends before
/// it. Records are read back in the order of their appends. A record that is torn is absent.
/// It promises nothing of an append that failed: the record may be absent, may be read back, and may
/// be read back now and be gone after a power loss.
pub trait Journal: Send {
    /// Appends one record. `Ok` means durable.
    ///
    /// # Errors
    /// The record is not known to be durable.
    fn append(&mut self, record: &Record) -> Result<(), JournalError>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Phase;

    #[test]
    fn ids_are_written_as_32_digits_and_read_with_hyphens() {
        let id: BootId = "0123abcd-0000-0000-0000-00000000000f".parse().unwrap();
        assert_eq!(id.to_string(), "0123abcd00000000000000000000000f");
        assert_eq!(id.to_string().parse(), Ok(id));
        let short = "0".repeat(31);
        let long = "0".repeat(33);
        let letters = "g".repeat(32);
        for refused in ["", "-", short.as_str(), long.as_str(), letters.as_str()] {
            assert!(refused.parse::<SessionId>().is_err(), "{refused:?}");
        }
    }

    /// A journal is read by the process after the one that wrote it: nothing may get lost on the way.
    #[test]
    fn every_record_is_read_back_as_it_was_written() {
        let cause = Box::new(
            Failure::new(Side::Destination, Phase::Load, "refused")
                .with_errno(Some(Errno::EINVAL))
                .in_state(Some(DeviceState::Unknown(9))),
        );
        let opened = Opened {
            session: SessionId(u128::MAX),
            side: Side::Source,
            boot: BootId(3),
            durability: Durability::Power,
            peer: "tcp:h:1".into(),
            devices: vec![(DeviceId::new("nic0").unwrap(), DeviceState::Running)],
        };
        let records = [
            Record::Opened(Box::new(opened)),
            Record::Loaded,
            Record::Commit,
            Record::Committed,
            Record::RunStarted,
            Record::Running,
            Record::Abandoned { cause: cause.clone() },
            Record::RolledBack { cause: cause.clone() },
            Record::Aborted { cause },
            Record::Done,
        ];
        for record in records {
            let line = serde_json::to_string(&record).unwrap();
            assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), record, "{line}");
        }
    }
}
