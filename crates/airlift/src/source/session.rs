//! What all phases of the source share, and the one place where it waits.
//!
//! The protocol's machine ([`SourceMachine`]) decides what a message, a deadline or a failure means;
//! [`Session::act`] carries out what it orders: journal, send, and the orders that the phases look at.

use super::figures::Figures;
use crate::control::Control;
use crate::event::Event;
use crate::link::Connector;
use crate::machine::{Machine, MachineError, PendingInterrupt};
use crate::memory::DirtyTracking;
use crate::options::SourceOptions;
use crate::report::Outcome;
use crate::set::{Recorder, SetError, SetEvent, StreamFault};
use crate::wire::control::ControlLink;
use crate::wire::credit::CreditedSink;
use crate::wire::frames::WireError;
use crate::wire::line::{Heard, Line};
use airlift_core::commit::{
    CommitMessage, Journal, Outcome as ProtocolOutcome, Record, SessionId, SourceAction, SourceDeadlines,
    SourceInput, SourceMachine,
};
use airlift_core::{DeviceId, DirtySource, Failure, Phase, Side, Timestamp};
use airlift_stream::{Limits, Message};
use crossbeam_channel::{Receiver, Sender, never, unbounded};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How long to wait at a time when the protocol has no deadline.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// What other threads tell the session's thread.
#[derive(Debug)]
pub(super) enum Input {
    /// From a control connection.
    Control(Heard),
    /// A data connection has failed.
    DataLost { lane: usize, error: WireError },
    /// A cancel was accepted.
    Cancelled,
}

/// Why [`Session::wait`] has returned.
#[derive(Debug)]
pub(super) enum Wake<T> {
    /// A message that is not the protocol's own.
    Message(Message),
    /// A device's worker says something.
    Set(Box<SetEvent>),
    /// What was waited for beside everything else.
    Other(T),
    /// The time is over.
    Time,
    /// The protocol has ordered something: look at [`Session::orders`].
    Ordered,
}

/// What the protocol has ordered and a phase must do.
#[derive(Debug, Default)]
pub(super) struct Orders {
    pub(super) roll_back: Option<Box<Failure>>,
    pub(super) finish: bool,
    pub(super) reconnect: bool,
}

/// What a rollback of the machine must undo.
#[derive(Debug, Default)]
pub(super) struct Undo {
    pub(super) tracking: Option<DirtyTracking>,
    pub(super) paused_at: Option<Timestamp>,
    pub(super) access_closed: bool,
    pub(super) pending: Vec<PendingInterrupt>,
    pub(super) released: bool,
}

pub(super) struct Session {
    pub(super) protocol: SourceMachine,
    pub(super) machine: Box<dyn Machine>,
    pub(super) connector: Box<dyn Connector>,
    journal: Box<dyn Journal>,
    pub(super) recorder: Recorder,
    pub(super) control: Control,
    pub(super) options: SourceOptions,
    pub(super) ids: Vec<DeviceId>,
    /// By device: the newest generation of initial data that the destination has loaded.
    pub(super) acknowledged: Vec<u32>,
    pub(super) dirty_sources: Vec<Option<Box<dyn DirtySource>>>,
    pub(super) mail: Sender<Input>,
    inbox: Receiver<Input>,
    pub(super) line: Line,
    pub(super) sink: Arc<OnceLock<Arc<CreditedSink>>>,
    pub(super) orders: Orders,
    pub(super) undo: Undo,
    pub(super) figures: Figures,
    /// A cancel came before COMMIT was written: the cause, in place of the journal's refusal.
    overtaken: Option<Box<Failure>>,
}

/// The random name of a session.
fn new_session(recorder: &Recorder) -> std::io::Result<SessionId> {
    let mut bytes = [0; 16];
    recorder.environment.random.fill(&mut bytes)?;
    Ok(SessionId(u128::from_be_bytes(bytes)))
}

impl Session {
    pub(super) fn new(
        machine: Box<dyn Machine>,
        connector: Box<dyn Connector>,
        journal: Box<dyn Journal>,
        recorder: Recorder,
        control: Control,
        options: SourceOptions,
    ) -> Self {
        let (mail, inbox) = unbounded();
        let wake = mail.clone();
        control.gate.on_cancel(move || {
            // The session can be over already.
            let _ = wake.send(Input::Cancelled);
        });
        let d = options.deadlines;
        let deadlines = SourceDeadlines {
            connect: d.connect,
            negotiate: d.negotiate,
            setup: d.setup,
            // Pre-copy judges its deadline itself, by the stall policy; this one is for a judgement that
            // does not come.
            precopy: d.precopy.saturating_add(d.setup),
            quiesce: d.quiesce,
            stop_copy: d.stop_copy,
            await_loaded: d.stop_copy,
            commit: d.commit,
            reconnect: d.commit,
            // Every device has `rollback` for each of its steps; this bounds them all.
            roll_back: d.rollback.saturating_mul(4),
            finish: d.rollback,
        };
        let (id, lost) = match new_session(&recorder) {
            Ok(id) => (id, None),
            Err(error) => (SessionId(0), Some(error)),
        };
        let protocol = SourceMachine::new(id, deadlines, recorder.now());
        let now = recorder.now();
        let mut session = Self {
            protocol,
            machine,
            connector,
            journal,
            recorder,
            control,
            options,
            ids: Vec::new(),
            acknowledged: Vec::new(),
            dirty_sources: Vec::new(),
            mail,
            inbox,
            line: Line::default(),
            sink: Arc::default(),
            orders: Orders::default(),
            undo: Undo::default(),
            figures: Figures::default(),
            overtaken: None,
        };
        session.figures.begun = now;
        if let Some(error) = lost {
            session.fail(Failure::new(
                Side::Source,
                Phase::Connect,
                format!("no random session id: {error}"),
            ));
        }
        session
    }

    pub(super) fn now(&self) -> Timestamp {
        self.recorder.now()
    }

    /// The phase that was last announced: what a failure names.
    pub(super) fn phase(&self) -> Phase {
        self.control.gauges.phase()
    }

    /// Begins a phase: the observer first, then the protocol. `false`: the migration has failed.
    pub(super) fn enter(&mut self, phase: Phase) -> bool {
        if self.fallen() {
            return false;
        }
        self.announce(phase);
        // What the observer was blocked for may have brought the end.
        self.catch_up();
        let now = self.now();
        if let Err(error) = self.protocol.handle(SourceInput::Advanced(phase), now) {
            self.fail(Failure::new(Side::Source, phase, error.to_string()));
        }
        self.act();
        !self.fallen()
    }

    pub(super) fn announce(&mut self, phase: Phase) {
        self.control.gauges.set_phase(phase);
        let at_ms = self.recorder.at_ms(self.now());
        tracing::info!(name: "vfio_migration_state_notifier", side = "source", state = %phase);
        self.recorder.emit(&Event::Phase { side: Side::Source, phase, at_ms });
    }

    /// The protocol has ordered a rollback, or the session has ended.
    pub(super) fn fallen(&self) -> bool {
        self.orders.roll_back.is_some() || self.protocol.outcome().is_some()
    }

    /// Something on this side has failed. The first failure is the report's.
    pub(super) fn fail(&mut self, failure: Failure) {
        tracing::error!(error = %failure, "the migration failed");
        let now = self.now();
        // Out of order cannot be: a failure is taken in every state.
        let _ = self.protocol.handle(SourceInput::Failed(Box::new(failure)), now);
        self.act();
    }

    /// Something with the devices has failed. A closed way is no fault of a device: its reason is in the
    /// inbox, and comes first.
    pub(super) fn fail_set(&mut self, phase: Phase, error: SetError) {
        if matches!(error, SetError::Device { fault: StreamFault::Closed(_), .. }) {
            self.catch_up();
            if self.fallen() {
                return;
            }
        }
        self.fail(error.into_failure(Side::Source, phase));
    }

    /// A device's worker says something; a device that has failed ends the migration.
    pub(super) fn fail_on(&mut self, phase: Phase, event: SetEvent) {
        let SetEvent::Failed { device, error } = event else { return };
        let Some(id) = usize::try_from(device).ok().and_then(|index| self.ids.get(index)) else { return };
        let error = SetError::Device { device: id.clone(), fault: error };
        self.fail_set(phase, error);
    }

    /// The machine refused something.
    pub(super) fn fail_machine(&mut self, phase: Phase, error: &MachineError) {
        self.fail(Failure::new(Side::Source, phase, format!("the machine: {error}")).with_errno(error.errno));
    }

    /// Carries out everything that the protocol orders.
    pub(super) fn act(&mut self) {
        while let Some(action) = self.protocol.poll_action() {
            match action {
                SourceAction::Append(record) => self.append(&record),
                SourceAction::Send(message) => self.say(message),
                SourceAction::RollBack { cause } => {
                    let cause = self.overtaken.take().unwrap_or(cause);
                    self.recorder.emit(&Event::Failed { failure: (*cause).clone() });
                    self.figures.error.get_or_insert_with(|| (*cause).clone());
                    self.orders.roll_back = Some(cause);
                }
                SourceAction::FinishSource => self.orders.finish = true,
                SourceAction::Reconnect => self.orders.reconnect = true,
                SourceAction::Finished(outcome) => self.finished(&outcome),
            }
        }
    }

    fn append(&mut self, record: &Record) {
        let kind = record.kind();
        let commit = matches!(record, Record::Commit);
        if commit {
            self.announce(Phase::Commit);
        }
        // A cancel that was answered with "accepted" comes before COMMIT, whatever else has happened.
        let open = !commit || self.control.gate.close();
        let begun = self.now();
        let result = if open {
            self.journal.append(record).map_err(|e| e.to_string())
        } else {
            let phase = self.phase();
            let message = "the user of the source has cancelled";
            self.overtaken = Some(Box::new(Failure::new(Side::Source, phase, message)));
            Err("cancelled before it was asked".into())
        };
        let now = self.now();
        if commit {
            self.figures.commit_journal = now.since(begun);
        }
        let input = match result {
            Ok(()) => SourceInput::Appended(kind),
            Err(message) => {
                if open {
                    tracing::error!(record = %kind, message, "the journal did not take a record");
                }
                SourceInput::AppendFailed(kind)
            }
        };
        // Answers to the machine's own question are never out of order.
        let _ = self.protocol.handle(input, now);
    }

    fn say(&mut self, message: CommitMessage) {
        let session = self.protocol.session();
        let message = match message {
            CommitMessage::Commit => Message::Commit { session },
            CommitMessage::Abort(failure) => {
                Message::Abort { session, failure: self.overtaken.clone().unwrap_or(failure) }
            }
            CommitMessage::Cancel => Message::Cancel { session },
            // What only a destination says.
            CommitMessage::Loaded | CommitMessage::Running | CommitMessage::Abandoned { .. } => return,
        };
        self.line.send(&message);
    }

    fn finished(&mut self, outcome: &ProtocolOutcome) {
        match outcome {
            ProtocolOutcome::Completed | ProtocolOutcome::Cancelled => {}
            ProtocolOutcome::Aborted { cause } => {
                self.figures.error.get_or_insert_with(|| (**cause).clone());
            }
            ProtocolOutcome::InDoubt { doubt } => {
                let phase = self.phase();
                let mut failure = Failure::new(Side::Source, phase, doubt.to_string())
                    .advise("ask the destination whether the guest runs there (airlift resolve); do not start it here before");
                if let Some(lost) = self.figures.link_error.take() {
                    failure = failure.because(lost);
                }
                self.figures.error.get_or_insert(failure);
            }
        }
        let (incompatible, cancelled) = (self.figures.incompatible, self.control.gate.is_cancelled());
        self.figures.outcome = Some(Outcome::of(outcome, incompatible, cancelled));
    }

    /// Uses a new control connection from now on, and reads it.
    pub(super) fn adopt(&mut self, link: ControlLink, first: &Message) -> Result<(), Failure> {
        let phase = self.phase();
        let fail = |message: String| Failure::new(Side::Source, phase, message);
        link.send(first).map_err(|e| fail(format!("cannot send {}: {e}", first.kind())))?;
        self.figures.link_error = None;
        let (mail, sink) = (self.mail.clone(), Arc::clone(&self.sink));
        let credit = move |message: &Message| {
            let Message::Credit { device, frames } = *message else { return false };
            sink.get().is_some_and(|sink| sink.credit(device, frames))
        };
        // The session can be over already.
        let tell = move |heard| drop(mail.send(Input::Control(heard)));
        let spawner = &*self.recorder.environment.spawner;
        self.line.adopt(link, spawner, Limits::default(), credit, tell).map_err(|e| fail(e.to_string()))
    }

    /// Takes everything that has come, without waiting. Messages that are not the protocol's own are
    /// not expected then and end the migration.
    pub(super) fn catch_up(&mut self) {
        while let Ok(input) = self.inbox.try_recv() {
            if let Some(message) = self.take(input) {
                self.unexpected(&message);
            }
        }
        let now = self.now();
        self.protocol.handle_timeout(now);
        self.act();
    }

    /// Takes an input; gives a message that is not the protocol's own.
    fn take(&mut self, input: Input) -> Option<Message> {
        let now = self.now();
        let phase = self.phase();
        let heard = match input {
            Input::Cancelled => {
                if self.protocol.cancel(now) == airlift_core::commit::CancelAnswer::Accepted {
                    tracing::info!("the migration is cancelled");
                }
                self.act();
                return None;
            }
            Input::DataLost { lane, error } => {
                let failure = Failure::new(Side::Source, phase, format!("data connection {lane}: {error}"))
                    .with_errno(error.errno());
                // After the last byte was sent, a data connection is of no more use.
                if !self.figures.all_sent {
                    self.hear_out(failure);
                }
                return None;
            }
            Input::Control(heard) => heard,
        };
        let newest = self.line.is_newest(&heard);
        let (message, _ticket) = match heard.said {
            // What belongs to the session as such counts whichever of its connections brought it.
            Ok((message, ticket)) if newest || message.to_commit().is_some() => (message, ticket),
            Err(error) if newest => {
                self.link_lost(&error);
                return None;
            }
            _ => return None,
        };
        let (session, said) = match message {
            Message::Loaded { session, terms } => {
                self.figures.loaded = Some((terms, now));
                (session, CommitMessage::Loaded)
            }
            Message::Running { session, terms } => {
                self.figures.running.get_or_insert((terms, now));
                (session, CommitMessage::Running)
            }
            Message::Abort { session, failure } => (session, CommitMessage::Abort(failure)),
            Message::Abandoned { session, failure } => (session, CommitMessage::Abandoned { cause: failure }),
            Message::Cancel { session } => (session, CommitMessage::Cancel),
            Message::InitAck { device, generation } => {
                self.acknowledge(device, generation);
                return None;
            }
            other => return Some(other),
        };
        // Out of order cannot be: what the other side says is taken in every state.
        let _ = self.protocol.handle(SourceInput::Received(session, said), now);
        self.act();
        None
    }

    fn acknowledge(&mut self, device: u32, generation: u32) {
        let index = usize::try_from(device).unwrap_or(usize::MAX);
        let Some(acknowledged) = self.acknowledged.get_mut(index) else {
            return self.unexpected(&Message::InitAck { device, generation });
        };
        if generation <= *acknowledged {
            return;
        }
        *acknowledged = generation;
        let device = self.ids[index].clone();
        self.recorder.emit(&Event::InitialDataAcknowledged { device, generation });
    }

    /// A data connection has failed. The other side may have said why on the control connection, just
    /// after it ended the data connections: its reason is the better one.
    fn hear_out(&mut self, failure: Failure) {
        const PATIENCE: Duration = Duration::from_millis(500);
        let until = self.now().after(PATIENCE);
        while !self.fallen() {
            let left = until.since(self.now());
            match self.inbox.recv_timeout(left) {
                Ok(Input::DataLost { .. }) => {}
                Ok(input) => drop(self.take(input)),
                Err(_) => break,
            }
        }
        if !self.fallen() {
            self.fail(failure);
        }
    }

    fn link_lost(&mut self, error: &WireError) {
        let phase = self.phase();
        tracing::warn!(error = %error, "the control connection is lost");
        let lost = Failure::new(Side::Source, phase, format!("the control connection: {error}"))
            .with_errno(error.errno());
        self.line.close();
        let now = self.now();
        if self.protocol.is_committed() {
            // What keeps the answer from coming: the cause of a doubt.
            self.figures.link_error = Some(lost);
            let _ = self.protocol.handle(SourceInput::LinkLost, now);
        } else {
            let advice = "look at the destination: it ended, or the network between the hosts was cut";
            let lost = match error {
                WireError::Protocol(_) => lost,
                _ => lost.advise(advice),
            };
            let _ = self.protocol.handle(SourceInput::Failed(Box::new(lost)), now);
        }
        self.act();
    }

    pub(super) fn unexpected(&mut self, message: &Message) {
        let phase = self.phase();
        self.fail(Failure::new(
            Side::Source,
            phase,
            format!("the destination broke the protocol: {} has no place in {phase}", message.kind()),
        ));
    }

    /// Waits until something happens that a phase must know, at most `patience`.
    pub(super) fn wait<T>(
        &mut self,
        set: Option<&Receiver<SetEvent>>,
        other: Option<&Receiver<T>>,
        patience: Duration,
    ) -> Wake<Option<T>> {
        let until = self.now().after(patience);
        let (no_set, no_other) = (never(), never());
        let (set, other) = (set.unwrap_or(&no_set), other.unwrap_or(&no_other));
        loop {
            let now = self.now();
            self.protocol.handle_timeout(now);
            self.act();
            if self.ordered() {
                return Wake::Ordered;
            }
            let timeout = self.next_timer(now).min(until.since(now));
            crossbeam_channel::select_biased! {
                recv(self.inbox) -> input => {
                    if let Ok(input) = input && let Some(message) = self.take(input) {
                        return Wake::Message(message);
                    }
                }
                recv(set) -> event => {
                    if let Ok(event) = event {
                        return Wake::Set(Box::new(event));
                    }
                }
                recv(other) -> value => return Wake::Other(value.ok()),
                default(timeout) => {
                    if self.now() >= until {
                        return Wake::Time;
                    }
                }
            }
            if self.ordered() {
                return Wake::Ordered;
            }
        }
    }

    /// Waits a while between two attempts to reach the destination; a cancel or a deadline ends it.
    pub(super) fn pause_before_retry(&mut self, patience: Duration) {
        let _ = self.wait::<()>(None, None, patience);
    }

    /// Waits until the other side has closed the control connection, so that our last words arrive.
    pub(super) fn hear_the_end(&mut self, patience: Duration) {
        let until = self.now().after(patience);
        loop {
            match self.inbox.recv_timeout(until.since(self.now())) {
                Ok(Input::Control(heard)) if heard.said.is_err() && self.line.is_newest(&heard) => return,
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    fn ordered(&self) -> bool {
        self.fallen() || self.orders.finish || self.orders.reconnect
    }

    fn next_timer(&self, now: Timestamp) -> Duration {
        self.protocol.poll_timeout().map_or(LONGEST_WAIT, |at| at.since(now).min(LONGEST_WAIT))
    }
}
