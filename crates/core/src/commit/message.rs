//! What the two machines say to each other. The bytes are `airlift-stream`'s.

use crate::Failure;
use serde::{Deserialize, Serialize};

/// A message of the commit protocol. Each belongs to a session and is idempotent: it may arrive late,
/// several times, or after a restart of either side.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum CommitMessage {
    /// Destination to source: everything is loaded and validated; from here on the destination holds.
    Loaded,
    /// Source to destination: COMMIT is durable here. Run.
    Commit,
    /// Destination to source: the guest runs here.
    Running,
    /// Either way: the migration has failed. From the source it is final (COMMIT was and will never
    /// be sent); from the destination it asks the source to abort, and means nothing after COMMIT.
    Abort(
        /// What failed on the sender's side.
        Box<Failure>,
    ),
    /// Destination to source: this session never runs here. Every device was reset, and unless LOADED
    /// was never near, that is durable.
    Abandoned {
        /// Why.
        cause: Box<Failure>,
    },
    /// As [`CommitMessage::Abort`], because the sender's user has cancelled.
    Cancel,
}
