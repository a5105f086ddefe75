//! The source's machine: from Connect to Done, and every way back.
//!
//! It knows nothing of devices and bytes. Up to AwaitLoaded it follows the engine's phases with a
//! deadline for each, and any failure ends in a rollback. From LOADED on it is the source's half of
//! the commit protocol.

use super::{
    CancelAnswer, CommitMessage, Doubt, Opened, OutOfOrder, Outcome, Record, RecordKind, SessionId,
    SourceAction, SourceDeadlines, SourceInput, SourceVerdict,
};
use crate::{Failure, Phase, Side, Timestamp};
use std::collections::VecDeque;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    /// Connect to AwaitLoaded.
    Working,
    /// COMMIT is being journalled. `resumed`: again, after a restart, so that it may have been sent.
    JournalCommit { resumed: bool },
    /// COMMIT is durable and sent (C-COMMIT-DURABLE, C-COMMIT-HOLD). `reconnecting`: the first deadline is over.
    Committed { reconnecting: bool },
    /// COMMIT could not be journalled; ABORTED must be, before anything runs.
    JournalAborted { cause: Box<Failure> },
    /// The destination has abandoned; ROLLED_BACK must be durable before anything runs.
    JournalRolledBack { cause: Box<Failure> },
    /// The engine walks the devices back. `close`: with which record the journal still has to end.
    RollingBack { cause: Box<Failure>, close: bool },
    /// Devices go to STOP.
    Finishing,
    /// The last record is being written; a failure of it changes nothing.
    Closing(Outcome),
    /// Nothing more will come from this side by itself. `recorded`: the journal had COMMIT, and a new
    /// connection is a reason to make it durable again.
    Doubt { recorded: bool },
    /// Ended.
    Closed,
}

/// The source of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceMachine {
    session: SessionId,
    deadlines: SourceDeadlines,
    phase: Phase,
    state: State,
    deadline: Option<Timestamp>,
    appending: Option<RecordKind>,
    opened: bool,
    /// LOADED came before the engine had said AwaitLoaded.
    loaded: bool,
    cancelled: bool,
    /// COMMIT was never sent and never will be; this is why.
    aborted: Option<Box<Failure>>,
    /// ABANDONED came while an append was under way.
    abandoned: Option<Box<Failure>>,
    outcome: Option<Outcome>,
    actions: VecDeque<SourceAction>,
}

impl SourceMachine {
    /// A source that is about to connect.
    #[must_use]
    pub fn new(session: SessionId, deadlines: SourceDeadlines, now: Timestamp) -> Self {
        Self {
            session,
            deadlines,
            phase: Phase::Connect,
            state: State::Working,
            deadline: Some(now.after(deadlines.connect)),
            appending: None,
            opened: false,
            loaded: false,
            cancelled: false,
            aborted: None,
            abandoned: None,
            outcome: None,
            actions: VecDeque::new(),
        }
    }

    /// A source whose process was started again, with what its journal says. What the verdict rests
    /// on is made durable again before anything is done on its strength (C-REAPPEND): the record that
    /// was read back may be one whose append had failed.
    #[must_use]
    pub fn restarted(
        session: SessionId,
        verdict: SourceVerdict,
        deadlines: SourceDeadlines,
        now: Timestamp,
    ) -> Self {
        let mut machine = Self { phase: Phase::Commit, opened: true, ..Self::new(session, deadlines, now) };
        let restart =
            || Box::new(Failure::new(Side::Source, Phase::Commit, "the source's process was started again"));
        match verdict {
            SourceVerdict::RunHere { aborted: false } => {
                machine.phase = Phase::AwaitLoaded;
                machine.abort(restart(), now);
            }
            SourceVerdict::RunHere { aborted: true } => machine.journal_aborted(restart(), now),
            SourceVerdict::Committed => machine.journal_commit(true, now),
            SourceVerdict::RolledBack => machine.journal_rolled_back(restart(), now),
            SourceVerdict::InDoubt(doubt) => {
                machine.state = State::Doubt { recorded: false };
                machine.doubt(doubt);
            }
            SourceVerdict::Done => {
                machine.phase = Phase::Done;
                machine.state = State::Closed;
                machine.publish(Outcome::Completed);
            }
        }
        machine
    }

    /// The session that messages must carry.
    #[must_use]
    pub const fn session(&self) -> SessionId {
        self.session
    }

    /// The phase; in a rollback, the one that failed.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// The machine's state in one word, for logs and tests.
    #[must_use]
    pub const fn state_name(&self) -> &'static str {
        match self.state {
            State::Working => "working",
            State::JournalCommit { .. } => "journal-commit",
            State::Committed { .. } => "committed",
            State::JournalAborted { .. } => "journal-aborted",
            State::JournalRolledBack { .. } => "journal-rolled-back",
            State::RollingBack { .. } => "rolling-back",
            State::Finishing => "finishing",
            State::Closing(_) => "closing",
            State::Doubt { .. } => "doubt",
            State::Closed => match self.outcome {
                Some(Outcome::Completed) => "done",
                _ => "runs-on",
            },
        }
    }

    /// The latest outcome. One in doubt may be followed by another.
    #[must_use]
    pub const fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    /// COMMIT has been asked for: the guest does not run here unless this session is rolled back.
    #[must_use]
    pub const fn is_committed(&self) -> bool {
        matches!(
            self.state,
            State::JournalCommit { .. }
                | State::Committed { .. }
                | State::JournalAborted { .. }
                | State::JournalRolledBack { .. }
                | State::Finishing
                | State::Closing(Outcome::Completed)
                | State::Doubt { .. }
        ) || matches!((&self.state, &self.outcome), (State::Closed, Some(Outcome::Completed)))
    }

    /// The next thing to do. Call until `None` after every input.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] wants to be called. Ask again after every input.
    #[must_use]
    pub const fn poll_timeout(&self) -> Option<Timestamp> {
        self.deadline
    }

    /// The user cancels.
    pub fn cancel(&mut self, now: Timestamp) -> CancelAnswer {
        if self.is_committed() {
            return CancelAnswer::TooLate { phase: self.phase };
        }
        if matches!(self.state, State::Working) {
            self.cancelled = true;
            let cause = self.failure("the user of the source has cancelled");
            self.abort(cause, now);
        }
        CancelAnswer::Accepted
    }

    /// Something has happened.
    ///
    /// # Errors
    /// The engine has skipped a step; the machine is unchanged.
    pub fn handle(&mut self, input: SourceInput, now: Timestamp) -> Result<(), OutOfOrder> {
        match input {
            SourceInput::Open(opened) => return self.open(opened),
            SourceInput::Advanced(phase) => return self.advance(phase, now),
            SourceInput::Received(session, message) if session == self.session => {
                self.receive(message, now);
            }
            // A message of another attempt says nothing about this one (C-SESSION).
            SourceInput::Received(..) => {}
            SourceInput::Appended(kind) => self.appended(kind, now),
            SourceInput::AppendFailed(kind) => self.append_failed(kind, now),
            SourceInput::RolledBack => self.rolled_back(now),
            SourceInput::SourceStopped => {
                if matches!(self.state, State::Finishing) {
                    self.close(Outcome::Completed, Record::Done, now);
                }
            }
            SourceInput::LinkLost => self.link_lost(now),
            SourceInput::Reconnected => self.reconnected(now),
            SourceInput::Failed(failure) => {
                // After COMMIT a failure of this side changes nothing: the destination has the guest.
                if matches!(self.state, State::Working) {
                    self.abort(failure, now);
                }
            }
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
            State::Working => {
                let cause = self.failure("the deadline of the phase has passed");
                self.abort(cause, now);
            }
            State::Committed { reconnecting: false } => self.await_reconnection(now),
            State::Committed { reconnecting: true } => self.doubt(Doubt::PeerSilent),
            // The record may still become durable; then the machine goes on from here.
            State::JournalCommit { .. } => self.doubt(Doubt::Journal(RecordKind::Commit)),
            State::JournalAborted { .. } => self.doubt(Doubt::Journal(RecordKind::Aborted)),
            State::JournalRolledBack { .. } => self.doubt(Doubt::Journal(RecordKind::RolledBack)),
            State::RollingBack { .. } => self.doubt(Doubt::RollBackStuck),
            State::Finishing => self.close(Outcome::Completed, Record::Done, now),
            State::Closing(ref outcome) => {
                let outcome = outcome.clone();
                self.closed(outcome);
            }
            State::Doubt { .. } | State::Closed => {}
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
        let (patience, prepared) = match phase {
            Phase::Negotiate => (deadlines.negotiate, self.phase == Phase::Connect),
            // No device is touched before OPENED is durable (C-OPENED).
            Phase::Setup => (deadlines.setup, self.phase == Phase::Negotiate && self.opened),
            Phase::Precopy => (deadlines.precopy, self.phase == Phase::Setup),
            Phase::Quiesce => (deadlines.quiesce, matches!(self.phase, Phase::Setup | Phase::Precopy)),
            Phase::StopCopy => (deadlines.stop_copy, self.phase == Phase::Quiesce),
            Phase::AwaitLoaded => (deadlines.await_loaded, self.phase == Phase::StopCopy),
            _ => (Duration::ZERO, false),
        };
        if !prepared {
            return Err(OutOfOrder { input: "Advanced", phase: self.phase });
        }
        self.phase = phase;
        self.deadline = Some(now.after(patience));
        if phase == Phase::AwaitLoaded && self.loaded {
            self.journal_commit(false, now);
        }
        Ok(())
    }

    fn receive(&mut self, message: CommitMessage, now: Timestamp) {
        match message {
            CommitMessage::Loaded => self.received_loaded(now),
            CommitMessage::Running => self.received_running(now),
            CommitMessage::Abandoned { cause } => self.received_abandoned(cause, now),
            // Only before COMMIT: the destination's wish binds nobody afterwards (C-ABORT).
            CommitMessage::Abort(reason) => {
                if matches!(self.state, State::Working) {
                    let cause = self.failure("the destination has failed");
                    self.abort(Box::new(cause.because(*reason)), now);
                }
            }
            CommitMessage::Cancel => {
                if matches!(self.state, State::Working) {
                    self.cancelled = true;
                    let cause = self.failure("the user of the destination has cancelled");
                    self.abort(cause, now);
                }
            }
            CommitMessage::Commit => self.violation("COMMIT", now),
        }
    }

    fn received_loaded(&mut self, now: Timestamp) {
        match &self.state {
            State::Working => match self.phase {
                Phase::AwaitLoaded => self.journal_commit(false, now),
                // The engine may learn of its own last byte after the destination has.
                Phase::StopCopy => self.loaded = true,
                _ => self.violation("LOADED", now),
            },
            // It holds and has not had COMMIT.
            State::Committed { .. } => self.send(CommitMessage::Commit),
            // It holds and has missed ABORT.
            _ => self.send_abort(),
        }
    }

    fn received_running(&mut self, now: Timestamp) {
        match self.state {
            State::Working => self.violation("RUNNING", now),
            State::Committed { .. } | State::Doubt { .. } => {
                self.phase = Phase::Done;
                self.state = State::Finishing;
                self.deadline = Some(now.after(self.deadlines.finish));
                self.actions.push_back(SourceAction::FinishSource);
            }
            // While an append is under way the answer is repeated to the COMMIT that follows.
            _ => {}
        }
    }

    fn received_abandoned(&mut self, reason: Box<Failure>, now: Timestamp) {
        match self.state {
            State::Working => {
                let cause = self.failure("the destination has abandoned the migration");
                self.abort(Box::new(cause.because(*reason)), now);
            }
            State::Committed { .. } | State::Doubt { .. } => {
                let cause = self.failure("the destination has abandoned the migration");
                self.journal_rolled_back(Box::new(cause.because(*reason)), now);
            }
            State::JournalCommit { .. } | State::JournalAborted { .. } => self.abandoned = Some(reason),
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
            (State::JournalCommit { .. }, RecordKind::Commit) => {
                self.state = State::Committed { reconnecting: false };
                self.deadline = Some(now.after(self.deadlines.commit));
                self.send(CommitMessage::Commit);
                if let Some(reason) = self.abandoned.take() {
                    self.received_abandoned(reason, now);
                }
            }
            (State::JournalAborted { cause }, RecordKind::Aborted) => {
                let cause = cause.clone();
                self.aborted = Some(cause.clone());
                self.send_abort();
                self.roll_back(cause, false, now);
            }
            (State::JournalRolledBack { cause }, RecordKind::RolledBack) => {
                let cause = cause.clone();
                self.roll_back(cause, false, now);
            }
            (State::Closing(outcome), _) => {
                let outcome = outcome.clone();
                self.closed(outcome);
            }
            _ => {}
        }
    }

    fn append_failed(&mut self, kind: RecordKind, now: Timestamp) {
        if self.appending != Some(kind) {
            return;
        }
        self.appending = None;
        match (&self.state, kind) {
            (State::Working, RecordKind::Opened) => {
                let cause = self.failure("the journal did not take OPENED");
                self.abort(cause, now);
            }
            // COMMIT was not sent, so a durable ABORTED still decides (C-COMMIT-FAILED).
            (State::JournalCommit { resumed: false }, RecordKind::Commit) => {
                let cause = self.failure("the journal did not take COMMIT");
                self.journal_aborted(cause, now);
            }
            // An earlier life of this process may have sent COMMIT: nothing may take it back.
            (State::JournalCommit { resumed: true }, RecordKind::Commit) => {
                self.give_up(Doubt::Journal(kind), true, now);
            }
            (State::JournalAborted { .. }, RecordKind::Aborted) => {
                self.give_up(Doubt::Journal(kind), false, now);
            }
            (State::JournalRolledBack { .. }, RecordKind::RolledBack) => {
                self.give_up(Doubt::Journal(kind), false, now);
            }
            (State::Closing(outcome), _) => {
                let outcome = outcome.clone();
                self.closed(outcome);
            }
            _ => {}
        }
    }

    fn rolled_back(&mut self, now: Timestamp) {
        if let State::RollingBack { cause, close } = &self.state {
            let (cause, close) = (cause.clone(), *close);
            let record = Record::Aborted { cause: cause.clone() };
            let outcome = if self.cancelled { Outcome::Cancelled } else { Outcome::Aborted { cause } };
            // An append that never returned is still under way: this session writes nothing more.
            if close && self.opened && self.appending.is_none() {
                self.close(outcome, record, now);
            } else {
                self.closed(outcome);
            }
        }
    }

    fn link_lost(&mut self, now: Timestamp) {
        match self.state {
            State::Working => {
                let cause = self.failure("the connection was lost");
                self.abort(cause, now);
            }
            State::Committed { reconnecting: false } => self.await_reconnection(now),
            State::Committed { reconnecting: true } | State::JournalCommit { .. } | State::Doubt { .. } => {
                self.actions.push_back(SourceAction::Reconnect);
            }
            _ => {}
        }
    }

    fn await_reconnection(&mut self, now: Timestamp) {
        self.state = State::Committed { reconnecting: true };
        self.deadline = Some(now.after(self.deadlines.reconnect));
        self.actions.push_back(SourceAction::Reconnect);
    }

    fn reconnected(&mut self, now: Timestamp) {
        match &self.state {
            State::Committed { reconnecting } => {
                // The deadline of the first loss holds: a peer that takes connections and drops them
                // must not keep this side from being in doubt.
                if !reconnecting {
                    self.deadline = Some(now.after(self.deadlines.reconnect));
                }
                self.state = State::Committed { reconnecting: true };
                self.send(CommitMessage::Commit);
            }
            State::Doubt { recorded: true } => self.journal_commit(true, now),
            _ => self.send_abort(),
        }
    }

    /// Before COMMIT: the destination is told, and what was touched is walked back.
    fn abort(&mut self, cause: Box<Failure>, now: Timestamp) {
        let touched = self.phase >= Phase::Setup;
        self.aborted = Some(cause.clone());
        self.send_abort();
        if touched {
            self.roll_back(cause, true, now);
        } else {
            self.state = State::RollingBack { cause, close: true };
            self.rolled_back(now);
        }
    }

    fn roll_back(&mut self, cause: Box<Failure>, close: bool, now: Timestamp) {
        self.state = State::RollingBack { cause: cause.clone(), close };
        self.deadline = Some(now.after(self.deadlines.roll_back));
        self.actions.push_back(SourceAction::RollBack { cause });
    }

    fn journal_commit(&mut self, resumed: bool, now: Timestamp) {
        self.phase = Phase::Commit;
        self.state = State::JournalCommit { resumed };
        self.deadline = Some(now.after(self.deadlines.commit));
        self.append(Record::Commit);
    }

    fn journal_aborted(&mut self, cause: Box<Failure>, now: Timestamp) {
        self.state = State::JournalAborted { cause: cause.clone() };
        self.deadline = Some(now.after(self.deadlines.commit));
        self.append(Record::Aborted { cause });
    }

    fn journal_rolled_back(&mut self, cause: Box<Failure>, now: Timestamp) {
        self.state = State::JournalRolledBack { cause: cause.clone() };
        self.deadline = Some(now.after(self.deadlines.commit));
        self.append(Record::RolledBack { cause });
    }

    /// The journal has failed where nothing may be done without it.
    fn give_up(&mut self, doubt: Doubt, recorded: bool, now: Timestamp) {
        self.state = State::Doubt { recorded };
        self.deadline = None;
        self.doubt(doubt);
        if let Some(reason) = self.abandoned.take() {
            self.received_abandoned(reason, now);
        }
    }

    fn close(&mut self, outcome: Outcome, record: Record, now: Timestamp) {
        self.state = State::Closing(outcome);
        self.deadline = Some(now.after(self.deadlines.finish));
        self.append(record);
    }

    fn closed(&mut self, outcome: Outcome) {
        self.state = State::Closed;
        self.deadline = None;
        self.publish(outcome);
    }

    fn doubt(&mut self, doubt: Doubt) {
        self.publish(Outcome::InDoubt { doubt });
    }

    fn publish(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome.clone());
        self.actions.push_back(SourceAction::Finished(outcome));
    }

    fn append(&mut self, record: Record) {
        self.appending = Some(record.kind());
        self.actions.push_back(SourceAction::Append(record));
    }

    fn send(&mut self, message: CommitMessage) {
        self.actions.push_back(SourceAction::Send(message));
    }

    /// Says that COMMIT never comes; nothing where that has not been decided.
    fn send_abort(&mut self) {
        if let Some(cause) = &self.aborted {
            let message =
                if self.cancelled { CommitMessage::Cancel } else { CommitMessage::Abort(cause.clone()) };
            self.send(message);
        }
    }

    fn violation(&mut self, message: &str, now: Timestamp) {
        if matches!(self.state, State::Working) {
            let cause = Failure::new(
                Side::Source,
                self.phase,
                format!("the destination broke the protocol: {message} in this phase"),
            );
            self.abort(Box::new(cause), now);
        }
    }

    fn failure(&self, message: &str) -> Box<Failure> {
        Box::new(Failure::new(Side::Source, self.phase, message))
    }
}
