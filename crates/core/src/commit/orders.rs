//! What the engines tell the two machines, and what the machines order.
//!
//! An order is answered by an input; each says by which.

use super::{CommitMessage, Opened, Outcome, Record, RecordKind, SessionId};
use crate::{Failure, Phase};

/// What the source's engine reports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceInput {
    /// Negotiation has succeeded: this is what the journal opens with. Answered by
    /// `Append(Opened)`; Setup may be entered once that is durable.
    Open(Box<Opened>),
    /// The engine has entered this phase: Negotiate to AwaitLoaded, forward, Precopy may be skipped.
    Advanced(Phase),
    /// A message has arrived, under this session.
    Received(SessionId, CommitMessage),
    /// The record asked for is durable.
    Appended(RecordKind),
    /// The record asked for is not known to be durable.
    AppendFailed(RecordKind),
    /// Everything that can run on this side runs, states read back; what cannot is quarantined and
    /// named by the engine.
    RolledBack,
    /// The devices are in STOP, or have been given up.
    SourceStopped,
    /// The connection is gone.
    LinkLost,
    /// There is a new connection to the same session.
    Reconnected,
    /// Something on this side has failed.
    Failed(Box<Failure>),
}

/// What the source's engine has to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Make this record durable; answer `Appended` or `AppendFailed`.
    Append(Record),
    /// Send; without a connection, drop.
    Send(CommitMessage),
    /// Walk every device back to the state it had, in P2P order, resume the vCPUs, stop logging;
    /// answer `RolledBack`.
    RollBack {
        /// Why.
        cause: Box<Failure>,
    },
    /// Take every device from STOP_COPY to STOP; answer `SourceStopped`.
    FinishSource,
    /// Drop what is left of the connection and make a new one to the same session; answer
    /// `Reconnected`, or nothing.
    Reconnect,
    /// The session has ended, so far as this side can tell.
    Finished(Outcome),
}

/// What the destination's engine reports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DestinationInput {
    /// Negotiation has succeeded: this is what the journal opens with. Answered by
    /// `Append(Opened)`; Resuming may be entered once that is durable.
    Open(Box<Opened>),
    /// The engine has entered Negotiate, Resuming or Load, in this order; or Loaded: every device is
    /// in STOP with its state validated, memory and records are complete.
    Advanced(Phase),
    /// A message has arrived, under this session.
    Received(SessionId, CommitMessage),
    /// The record asked for is durable.
    Appended(RecordKind),
    /// The record asked for is not known to be durable.
    AppendFailed(RecordKind),
    /// Every device is reset or gone for good, states read back, and no vCPU has run.
    DevicesReset,
    /// A device could not be reset and may still hold guest state.
    ResetFailed,
    /// Every device is in RUNNING.
    DevicesStarted,
    /// The vCPUs run.
    VcpusStarted,
    /// The connection is gone.
    LinkLost,
    /// There is a new connection to the same session.
    Reconnected,
    /// Something on this side has failed: a device was lost or refused, the machine, the data.
    Failed(Box<Failure>),
}

/// What the destination's engine has to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Make this record durable; answer `Appended` or `AppendFailed`.
    Append(Record),
    /// Send; without a connection, drop.
    Send(CommitMessage),
    /// Stop what starts and reset every device, whatever it is doing; answer `DevicesReset` or
    /// `ResetFailed`. Asked for only when no vCPU was.
    ResetDevices {
        /// Why.
        cause: Box<Failure>,
    },
    /// Every device STOP -> RUNNING_P2P, then all to RUNNING; answer `DevicesStarted` or `Failed`.
    StartDevices,
    /// Inject pending interrupts, run the vCPUs; answer `VcpusStarted` or `Failed`.
    StartVcpus,
    /// Be ready for the source to connect again to the same session; answer `Reconnected`, or nothing.
    AwaitReconnection,
    /// The session has ended, so far as this side can tell.
    Finished(Outcome),
}
