//! The destination's machine: from Listen to Running, and every way to a clean reset.
//!
//! Before LOADED is sent it may reset at will. From then on it holds until COMMIT, ABORT or its own
//! durable ABANDONED; after COMMIT it starts the guest, one durable record ahead of each step.

use super::{
    CancelAnswer, CommitMessage, DestinationAction, DestinationDeadlines, DestinationInput,
    DestinationVerdict, Doubt, Opened, OutOfOrder, Outcome, Record, RecordKind, SessionId,
};
use crate::{Failure, Phase, Side, Timestamp};
use std::collections::VecDeque;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    /// Listen to Load.
    Working,
    /// LOADED is being journalled.
    JournalLoaded,
    /// LOADED is sent (C-HOLD).
    Hold,
    /// COMMIT has come; COMMITTED is being journalled.
    JournalCommitted,
    /// RUN_STARTED is being journalled; nothing has been started (C-RUN-STARTED).
    JournalRunStarted,
    /// The devices are being started.
    StartingDevices,
    /// The vCPUs are being started: from here on nothing is taken back.
    StartingVcpus,
    /// The guest runs.
    Running,
    /// The devices are being reset.
    Resetting { cause: Box<Failure> },
    /// A device could not be reset. A question by the source is a reason to try again.
    NotReset { cause: Box<Failure> },
    /// Every device is reset; ABANDONED is being journalled (C-ABANDONED).
    JournalAbandoned { cause: Box<Failure> },
    /// Every device is reset, but ABANDONED is not durable and must not be said. A question by the
    /// source is a reason to try again.
    Unsaid { cause: Box<Failure> },
    /// This session never runs here, and says so.
    Abandoned { cause: Box<Failure> },
    /// Ended before any device was touched.
    Idle,
    /// It may have run (`ran`: it did), or the journal cannot tell.
    Doubt { ran: bool },
}

/// The destination of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationMachine {
    session: SessionId,
    deadlines: DestinationDeadlines,
    phase: Phase,
    state: State,
    deadline: Option<Timestamp>,
    appending: Option<RecordKind>,
    opened: bool,
    /// LOADED was given to a journal, now or in an earlier life.
    loaded_journalled: bool,
    /// LOADED may have been sent, now or in an earlier life.
    loaded_sent: bool,
    /// The source has said that COMMIT never comes.
    released: bool,
    cancelled: bool,
    outcome: Option<Outcome>,
    actions: VecDeque<DestinationAction>,
}

impl DestinationMachine {
    /// A destination that waits for a source.
    #[must_use]
    pub fn new(session: SessionId, deadlines: DestinationDeadlines, now: Timestamp) -> Self {
        Self {
            session,
            deadlines,
            phase: Phase::Listen,
            state: State::Working,
            deadline: Some(now.after(deadlines.listen)),
            appending: None,
            opened: false,
            loaded_journalled: false,
            loaded_sent: false,
            released: false,
            cancelled: false,
            outcome: None,
            actions: VecDeque::new(),
        }
    }

    /// A destination whose process was started again, with what its journal says. `intact`: everything
    /// that was loaded is still there and has not moved, devices in STOP and guest memory and records
    /// alike (C-INTACT). What the verdict rests on is made durable again before anything is done on its strength
    /// (C-REAPPEND).
    #[must_use]
    pub fn restarted(
        session: SessionId,
        verdict: DestinationVerdict,
        intact: bool,
        deadlines: DestinationDeadlines,
        now: Timestamp,
    ) -> Self {
        let mut machine = Self {
            phase: Phase::Loaded,
            opened: true,
            loaded_journalled: true,
            loaded_sent: true,
            ..Self::new(session, deadlines, now)
        };
        let restart = machine.failure("the destination's process was started again");
        match verdict {
            DestinationVerdict::NeverRan => {
                machine.phase = Phase::Load;
                machine.loaded_journalled = false;
                machine.loaded_sent = false;
                machine.reset(restart, now);
            }
            DestinationVerdict::Hold | DestinationVerdict::Committed if !intact => {
                machine.reset(restart, now)
            }
            DestinationVerdict::Hold => machine.journal_loaded(now),
            DestinationVerdict::Committed => machine.journal_committed(now),
            DestinationVerdict::Abandoned => machine.journal_abandoned(restart, now),
            DestinationVerdict::MayHaveRun { ran } => {
                machine.phase = Phase::Running;
                machine.doubt_for_good(ran, Doubt::MayHaveRun);
            }
            DestinationVerdict::InDoubt(doubt) => machine.doubt_for_good(false, doubt),
        }
        machine
    }

    /// The session that messages must carry.
    #[must_use]
    pub const fn session(&self) -> SessionId {
        self.session
    }

    /// The phase; in a reset, the one that failed.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// The machine's state in one word, for logs and tests.
    #[must_use]
    pub const fn state_name(&self) -> &'static str {
        match self.state {
            State::Working => "working",
            State::JournalLoaded => "journal-loaded",
            State::Hold => "hold",
            State::JournalCommitted => "journal-committed",
            State::JournalRunStarted => "journal-run-started",
            State::StartingDevices => "starting-devices",
            State::StartingVcpus => "starting-vcpus",
            State::Running => "running",
            State::Resetting { .. } => "resetting",
            State::NotReset { .. } => "not-reset",
            State::JournalAbandoned { .. } => "journal-abandoned",
            State::Unsaid { .. } => "unsaid",
            State::Abandoned { .. } => "abandoned",
            State::Idle => "idle",
            State::Doubt { ran: false } => "doubt",
            State::Doubt { ran: true } => "ran",
        }
    }

    /// The latest outcome. One in doubt may be followed by another.
    #[must_use]
    pub const fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    /// The next thing to do. Call until `None` after every input.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<DestinationAction> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] wants to be called. Ask again after every input.
    #[must_use]
    pub const fn poll_timeout(&self) -> Option<Timestamp> {
        self.deadline
    }

    /// The user cancels.
    pub fn cancel(&mut self, now: Timestamp) -> CancelAnswer {
        match self.state {
            State::Working | State::JournalLoaded | State::Hold => {
                self.cancelled = true;
                let cause = self.failure("the user of the destination has cancelled");
                self.abandon(cause, now);
                CancelAnswer::Accepted
            }
            State::JournalCommitted
            | State::JournalRunStarted
            | State::StartingDevices
            | State::StartingVcpus
            | State::Running
            | State::Doubt { .. } => CancelAnswer::TooLate { phase: self.phase },
            _ => CancelAnswer::Accepted,
        }
    }

    /// Something has happened.
    ///
    /// # Errors
    /// The engine has skipped a step; the machine is unchanged.
    pub fn handle(&mut self, input: DestinationInput, now: Timestamp) -> Result<(), OutOfOrder> {
        match input {
            DestinationInput::Open(opened) => return self.open(opened),
            DestinationInput::Advanced(phase) => return self.advance(phase, now),
            DestinationInput::Received(session, message) if session == self.session => {
                self.receive(message, now);
            }
            // A message of another attempt says nothing about this one (C-SESSION).
            DestinationInput::Received(..) => {}
            DestinationInput::Appended(kind) => self.appended(kind, now),
            DestinationInput::AppendFailed(kind) => self.append_failed(kind, now),
            DestinationInput::DevicesReset => {
                if let State::Resetting { cause } = &self.state {
                    let cause = cause.clone();
                    self.devices_reset(cause, now);
                }
            }
            DestinationInput::ResetFailed => {
                if let State::Resetting { cause } = &self.state {
                    self.state = State::NotReset { cause: cause.clone() };
                    self.deadline = None;
                    self.not_abandoned(Doubt::NotReset);
                }
            }
            DestinationInput::DevicesStarted => {
                if matches!(self.state, State::StartingDevices) {
                    self.state = State::StartingVcpus;
                    self.actions.push_back(DestinationAction::StartVcpus);
                }
            }
            DestinationInput::VcpusStarted => self.vcpus_started(),
            DestinationInput::LinkLost => self.link_lost(now),
            DestinationInput::Reconnected => self.reconnected(now),
            DestinationInput::Failed(failure) => self.failed(failure, now),
        }
        Ok(())
    }

    /// A deadline may have passed. Harmless if none has.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        match self.state {
            // What is being reset or journalled may still end; then the machine goes on from here.
            State::Resetting { .. } => self.not_abandoned(Doubt::NotReset),
            State::JournalAbandoned { .. } => {
                self.not_abandoned(Doubt::Journal(RecordKind::Abandoned));
            }
            _ => {
                let cause = self.failure("the deadline of the phase has passed");
                self.failed(cause, now);
            }
        }
    }

    fn open(&mut self, opened: Box<Opened>) -> Result<(), OutOfOrder> {
        match self.state {
            State::Working if self.phase == Phase::Negotiate && !self.opened && self.appending.is_none() => {
                self.append(Record::Opened(opened));
                Ok(())
            }
            State::Working => Err(OutOfOrder { input: "Open", phase: self.phase }),
            _ => Ok(()),
        }
    }

    fn advance(&mut self, phase: Phase, now: Timestamp) -> Result<(), OutOfOrder> {
        // The engine had not yet seen that the migration has failed.
        if !matches!(self.state, State::Working) {
            return Ok(());
        }
        let deadlines = &self.deadlines;
        let patience = match (phase, self.phase) {
            (Phase::Negotiate, Phase::Listen) => deadlines.negotiate,
            // No device is touched before OPENED is durable (C-OPENED).
            (Phase::Resuming, Phase::Negotiate) if self.opened => deadlines.resuming,
            (Phase::Load, Phase::Resuming) => deadlines.load,
            (Phase::Loaded, Phase::Load) => {
                self.journal_loaded(now);
                return Ok(());
            }
            _ => return Err(OutOfOrder { input: "Advanced", phase: self.phase }),
        };
        self.phase = phase;
        self.deadline = Some(now.after(patience));
        Ok(())
    }

    fn receive(&mut self, message: CommitMessage, now: Timestamp) {
        match message {
            CommitMessage::Commit => self.received_commit(now),
            CommitMessage::Abort(reason) => {
                let cause = self.failure("the source has failed");
                self.release(Box::new(cause.because(*reason)), now);
            }
            CommitMessage::Cancel => {
                if self.may_abandon_on_request() {
                    self.cancelled = true;
                }
                let cause = self.failure("the user of the source has cancelled");
                self.release(cause, now);
            }
            CommitMessage::Loaded | CommitMessage::Running | CommitMessage::Abandoned { .. } => {
                if matches!(self.state, State::Working) {
                    let cause = self.failure("the source broke the protocol: it spoke as a destination");
                    self.abandon(cause, now);
                }
            }
        }
    }

    fn received_commit(&mut self, now: Timestamp) {
        match &self.state {
            State::Hold => self.journal_committed(now),
            State::Running | State::Doubt { ran: true } => self.send(CommitMessage::Running),
            State::Working => {
                let cause = self.failure("the source broke the protocol: COMMIT before LOADED");
                self.abandon(cause, now);
            }
            _ => self.answer_or_retry(now),
        }
    }

    const fn may_abandon_on_request(&self) -> bool {
        matches!(self.state, State::Working | State::JournalLoaded | State::Hold)
    }

    /// The source has said that COMMIT never comes.
    fn release(&mut self, cause: Box<Failure>, now: Timestamp) {
        self.released = true;
        if self.may_abandon_on_request() {
            self.reset_or_idle(cause, now);
        } else {
            self.answer_or_retry(now);
        }
    }

    /// The source has asked again, in whatever words.
    fn answer_or_retry(&mut self, now: Timestamp) {
        match &self.state {
            State::Abandoned { cause } => {
                let cause = cause.clone();
                self.send(CommitMessage::Abandoned { cause });
            }
            State::NotReset { cause } => {
                let cause = cause.clone();
                self.reset(cause, now);
            }
            State::Unsaid { cause } => {
                let cause = cause.clone();
                self.journal_abandoned(cause, now);
            }
            _ => {}
        }
    }

    fn appended(&mut self, kind: RecordKind, now: Timestamp) {
        if self.appending != Some(kind) {
            return;
        }
        self.appending = None;
        match (&self.state, kind) {
            (_, RecordKind::Opened) => self.opened = true,
            (State::JournalLoaded, RecordKind::Loaded) => {
                self.phase = Phase::Loaded;
                self.state = State::Hold;
                self.loaded_sent = true;
                self.deadline = Some(now.after(self.deadlines.hold));
                self.send(CommitMessage::Loaded);
            }
            (State::JournalCommitted, RecordKind::Committed) => {
                self.phase = Phase::Committed;
                self.state = State::JournalRunStarted;
                self.append(Record::RunStarted);
            }
            (State::JournalRunStarted, RecordKind::RunStarted) => {
                self.phase = Phase::Running;
                self.state = State::StartingDevices;
                self.actions.push_back(DestinationAction::StartDevices);
            }
            (State::JournalAbandoned { cause }, RecordKind::Abandoned) => {
                let cause = cause.clone();
                self.abandoned(cause);
            }
            (State::JournalAbandoned { cause }, _) => {
                let cause = cause.clone();
                self.journal_abandoned(cause, now);
            }
            (State::Running, RecordKind::Running) => self.publish(Outcome::Completed),
            _ => {}
        }
    }

    fn append_failed(&mut self, kind: RecordKind, now: Timestamp) {
        if self.appending != Some(kind) {
            return;
        }
        self.appending = None;
        match (&self.state, kind) {
            (State::Working, RecordKind::Opened)
            | (State::JournalLoaded, RecordKind::Loaded)
            | (State::JournalCommitted, RecordKind::Committed)
            | (State::JournalRunStarted, RecordKind::RunStarted) => {
                let cause = self.failure(&format!("the journal did not take {kind}"));
                self.abandon(cause, now);
            }
            (State::JournalAbandoned { cause }, RecordKind::Abandoned) => {
                let cause = cause.clone();
                if self.loaded_journalled {
                    self.state = State::Unsaid { cause };
                    self.deadline = None;
                    self.not_abandoned(Doubt::Journal(kind));
                } else {
                    // No journal of this session has LOADED: no restart can ever hold or run.
                    self.abandoned(cause);
                }
            }
            (State::JournalAbandoned { cause }, _) => {
                let cause = cause.clone();
                self.journal_abandoned(cause, now);
            }
            // The guest runs, whatever the journal says; a restart would be in doubt instead of sure.
            (State::Running, RecordKind::Running) => self.publish(Outcome::Completed),
            _ => {}
        }
    }

    fn vcpus_started(&mut self) {
        if matches!(self.state, State::StartingVcpus | State::Doubt { ran: false })
            && self.phase == Phase::Running
        {
            self.state = State::Running;
            self.deadline = None;
            self.send(CommitMessage::Running);
            self.append(Record::Running);
        }
    }

    fn failed(&mut self, failure: Box<Failure>, now: Timestamp) {
        match self.state {
            State::Working
            | State::JournalLoaded
            | State::Hold
            | State::JournalCommitted
            | State::JournalRunStarted
            | State::StartingDevices => self.abandon(failure, now),
            // Some vCPU may have run (C-MAY-HAVE-RUN).
            State::StartingVcpus => self.doubt_for_good(false, Doubt::MayHaveRun),
            _ => {}
        }
    }

    fn link_lost(&mut self, now: Timestamp) {
        match self.state {
            State::Working => {
                let cause = self.failure("the connection was lost");
                self.abandon(cause, now);
            }
            State::Idle => {}
            _ => self.actions.push_back(DestinationAction::AwaitReconnection),
        }
    }

    fn reconnected(&mut self, now: Timestamp) {
        match self.state {
            State::Hold => self.send(CommitMessage::Loaded),
            State::Running | State::Doubt { ran: true } => self.send(CommitMessage::Running),
            _ => self.answer_or_retry(now),
        }
    }

    /// This side gives up by itself. While it can still help, the source is told at once.
    fn abandon(&mut self, cause: Box<Failure>, now: Timestamp) {
        if self.may_abandon_on_request() {
            let message =
                if self.cancelled { CommitMessage::Cancel } else { CommitMessage::Abort(cause.clone()) };
            self.send(message);
        }
        self.reset_or_idle(cause, now);
    }

    fn reset_or_idle(&mut self, cause: Box<Failure>, now: Timestamp) {
        if self.phase >= Phase::Resuming {
            self.reset(cause, now);
        } else {
            self.state = State::Idle;
            self.deadline = None;
            self.publish_end(cause);
        }
    }

    fn reset(&mut self, cause: Box<Failure>, now: Timestamp) {
        self.state = State::Resetting { cause: cause.clone() };
        self.deadline = Some(now.after(self.deadlines.reset));
        self.actions.push_back(DestinationAction::ResetDevices { cause });
    }

    fn devices_reset(&mut self, cause: Box<Failure>, now: Timestamp) {
        if self.appending.is_some() {
            // One append at a time: ABANDONED follows the one under way, whatever becomes of that.
            self.state = State::JournalAbandoned { cause };
        } else {
            self.journal_abandoned(cause, now);
        }
    }

    fn journal_loaded(&mut self, now: Timestamp) {
        self.state = State::JournalLoaded;
        self.loaded_journalled = true;
        self.deadline = Some(now.after(self.deadlines.load));
        self.append(Record::Loaded);
    }

    fn journal_committed(&mut self, now: Timestamp) {
        self.phase = Phase::Committed;
        self.state = State::JournalCommitted;
        self.deadline = Some(now.after(self.deadlines.start));
        self.append(Record::Committed);
    }

    fn journal_abandoned(&mut self, cause: Box<Failure>, now: Timestamp) {
        self.state = State::JournalAbandoned { cause: cause.clone() };
        self.deadline = Some(now.after(self.deadlines.reset));
        self.append(Record::Abandoned { cause });
    }

    fn abandoned(&mut self, cause: Box<Failure>) {
        self.state = State::Abandoned { cause: cause.clone() };
        self.deadline = None;
        self.send(CommitMessage::Abandoned { cause: cause.clone() });
        self.publish_end(cause);
    }

    /// Given up, but ABANDONED must not be said. In doubt only if the source may rely on LOADED.
    fn not_abandoned(&mut self, doubt: Doubt) {
        let cause = match &self.state {
            State::Resetting { cause }
            | State::NotReset { cause }
            | State::JournalAbandoned { cause }
            | State::Unsaid { cause } => cause.clone(),
            _ => return,
        };
        if self.loaded_sent && !self.released {
            self.publish(Outcome::InDoubt { doubt });
        } else {
            self.publish_end(cause);
        }
    }

    fn doubt_for_good(&mut self, ran: bool, doubt: Doubt) {
        self.state = State::Doubt { ran };
        self.deadline = None;
        self.publish(Outcome::InDoubt { doubt });
    }

    fn publish_end(&mut self, cause: Box<Failure>) {
        self.publish(if self.cancelled { Outcome::Cancelled } else { Outcome::Aborted { cause } });
    }

    fn publish(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome.clone());
        self.actions.push_back(DestinationAction::Finished(outcome));
    }

    fn append(&mut self, record: Record) {
        self.appending = Some(record.kind());
        self.actions.push_back(DestinationAction::Append(record));
    }

    fn send(&mut self, message: CommitMessage) {
        self.actions.push_back(DestinationAction::Send(message));
    }

    fn failure(&self, message: &str) -> Box<Failure> {
        Box::new(Failure::new(Side::Destination, self.phase, message))
    }
}
