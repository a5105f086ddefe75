//! What all phases of the destination share, and the one place where it waits.

use super::door::Door;
use super::figures::Figures;
use crate::control::Control;
use crate::event::Event;
use crate::link::Acceptor;
use crate::machine::{Machine, MachineError};
use crate::options::DestinationOptions;
use crate::report::Outcome;
use crate::set::{Recorder, SetEvent};
use crate::wire::Pool;
use crate::wire::control::{ControlLink, Ticket};
use crate::wire::frames::WireError;
use crate::wire::inbound::Arrival;
use crate::wire::line::{Heard, Line};
use airlift_core::commit::{
    CommitMessage, DestinationAction, DestinationDeadlines, DestinationInput, DestinationMachine, Journal,
    Outcome as ProtocolOutcome, Record, RecordKind, SessionId,
};
use airlift_core::{Failure, Phase, Side, Timestamp};
use airlift_stream::{Limits, Message};
use crossbeam_channel::{Receiver, Sender, never, unbounded};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// How long to wait at a time when the protocol has no deadline.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// What the embedder lends to a session.
pub(super) struct Lent {
    pub(super) machine: Box<dyn Machine>,
    pub(super) acceptor: Box<dyn Acceptor>,
    pub(super) journal: Box<dyn Journal>,
    pub(super) recorder: Recorder,
    pub(super) control: Control,
    pub(super) options: DestinationOptions,
}

/// What other threads tell the session's thread.
#[derive(Debug)]
pub(super) enum Input {
    /// From a control connection.
    Control(Heard),
    /// From a data connection.
    Data { lane: usize, arrival: Arrival },
    /// A cancel was accepted.
    Cancelled,
}

/// Why [`Session::wait`] has returned.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one at a time, and taken apart at once")]
pub(super) enum Wake {
    /// A message that is not the protocol's own.
    Message(Message),
    /// Something came over a data connection.
    Data(Arrival),
    /// A device's worker says something.
    Set(SetEvent),
    /// The time is over.
    Time,
    /// The protocol has ordered something: look at [`Session::orders`].
    Ordered,
}

/// What the protocol has ordered and a phase must do.
#[derive(Debug, Default)]
pub(super) struct Orders {
    pub(super) reset: bool,
    pub(super) start_devices: bool,
    pub(super) start_vcpus: bool,
    pub(super) await_reconnection: bool,
}

pub(super) struct Session {
    pub(super) protocol: DestinationMachine,
    pub(super) machine: Box<dyn Machine>,
    pub(super) acceptor: Box<dyn Acceptor>,
    journal: Box<dyn Journal>,
    pub(super) recorder: Recorder,
    pub(super) control: Control,
    pub(super) options: DestinationOptions,
    pub(super) mail: Sender<Input>,
    /// What device data came in. Kept to the end: giving it back to the system takes milliseconds, which
    /// would be the downtime's.
    pub(super) buffers: Vec<Pool>,
    inbox: Receiver<Input>,
    /// What has come before the phase that it is for.
    early: VecDeque<(Wake, Option<Ticket>)>,
    pub(super) line: Line,
    /// Where the source comes back to.
    door: Door,
    /// Why the control connection has just ended: the cause of what follows from that.
    lost_by: Option<Failure>,
    /// What both sides share was taken here, and not given up again.
    pub(super) reclaimed: bool,
    /// Access to the devices was opened, and not closed again.
    pub(super) access_open: bool,
    /// The source has said DONE.
    pub(super) source_knows: bool,
    pub(super) orders: Orders,
    pub(super) figures: Figures,
}

impl Session {
    pub(super) fn new(lent: Lent, id: SessionId) -> Self {
        let Lent { machine, acceptor, journal, recorder, control, options } = lent;
        let (mail, inbox) = unbounded();
        let wake = mail.clone();
        control.gate.on_cancel(move || {
            // The session can be over already.
            let _ = wake.send(Input::Cancelled);
        });
        let d = options.deadlines;
        let deadlines = DestinationDeadlines {
            listen: Duration::MAX,
            negotiate: d.negotiate,
            resuming: d.setup.saturating_add(d.precopy).saturating_add(d.quiesce).saturating_add(d.stop_copy),
            load: d.stop_copy,
            // The source may take its whole deadline to ask again.
            hold: d.commit.saturating_mul(2),
            start: d.commit,
            reset: d.rollback.saturating_mul(2),
        };
        let now = recorder.now();
        let door = Door::new(Limits::new(64), d.silence, Arc::clone(&recorder.environment.clock));
        let mut session = Self {
            protocol: DestinationMachine::new(id, deadlines, now),
            machine,
            acceptor,
            journal,
            recorder,
            control,
            options,
            mail,
            buffers: Vec::new(),
            inbox,
            early: VecDeque::new(),
            line: Line::default(),
            door,
            lost_by: None,
            reclaimed: false,
            access_open: false,
            source_knows: false,
            orders: Orders::default(),
            figures: Figures::default(),
        };
        session.figures.begun = now;
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
        self.advance(phase);
        !self.fallen()
    }

    /// Tells the protocol of a phase.
    pub(super) fn advance(&mut self, phase: Phase) {
        // What this thread was busy with, or the observer, may have hidden the end.
        self.catch_up();
        if self.fallen() {
            return;
        }
        let now = self.now();
        if let Err(error) = self.protocol.handle(DestinationInput::Advanced(phase), now) {
            self.fail(Failure::new(Side::Destination, phase, error.to_string()));
        }
        self.act();
    }

    pub(super) fn announce(&mut self, phase: Phase) {
        self.control.gauges.set_phase(phase);
        let at_ms = self.recorder.at_ms(self.now());
        tracing::info!(name: "vfio_migration_state_notifier", side = "destination", state = %phase);
        self.recorder.emit(&Event::Phase { side: Side::Destination, phase, at_ms });
    }

    /// The protocol has ordered a reset, or the session has ended.
    pub(super) fn fallen(&self) -> bool {
        self.orders.reset || self.protocol.outcome().is_some()
    }

    /// Something on this side has failed. The first failure is the report's.
    pub(super) fn fail(&mut self, failure: Failure) {
        tracing::error!(error = %failure, "the migration failed");
        if !self.fallen() {
            self.recorder.emit(&Event::Failed { failure: failure.clone() });
        }
        self.figures.error.get_or_insert_with(|| failure.clone());
        self.feed(DestinationInput::Failed(Box::new(failure)));
    }

    /// The machine refused something.
    pub(super) fn fail_machine(&mut self, phase: Phase, error: &MachineError) {
        let failure = Failure::new(Side::Destination, phase, format!("the machine: {error}"));
        self.fail(failure.with_errno(error.errno));
    }

    /// Hands the protocol an input that belongs in every state, and carries out what it orders.
    pub(super) fn feed(&mut self, input: DestinationInput) {
        let now = self.now();
        if let Err(error) = self.protocol.handle(input, now) {
            tracing::error!(error = %error, "the engine is out of turn");
        }
        self.act();
    }

    /// Carries out everything that the protocol orders.
    pub(super) fn act(&mut self) {
        while let Some(action) = self.protocol.poll_action() {
            match action {
                DestinationAction::Append(record) => self.append(&record),
                DestinationAction::Send(message) => self.say(message),
                DestinationAction::ResetDevices { cause } => {
                    let cause = self.explained(cause);
                    if self.figures.error.is_none() {
                        self.recorder.emit(&Event::Failed { failure: (*cause).clone() });
                        self.figures.error = Some(*cause);
                    }
                    self.orders.reset = true;
                }
                DestinationAction::StartDevices => self.orders.start_devices = true,
                DestinationAction::StartVcpus => self.orders.start_vcpus = true,
                DestinationAction::AwaitReconnection => self.orders.await_reconnection = true,
                DestinationAction::Finished(outcome) => self.finished(&outcome),
            }
        }
    }

    /// A failure with why the connection was lost, if it comes from that.
    fn explained(&mut self, cause: Box<Failure>) -> Box<Failure> {
        match self.lost_by.take() {
            Some(lost) if cause.cause.is_none() => Box::new(cause.because(lost)),
            _ => cause,
        }
    }

    fn append(&mut self, record: &Record) {
        let kind = record.kind();
        if kind == RecordKind::Committed {
            self.figures.committed_at = Some(self.now());
            // A cancel that was answered with "accepted" comes before COMMITTED (I17): nothing has
            // started yet, so that the guest can still go back.
            if !self.control.gate.close() {
                let message = "the user of the destination has cancelled";
                self.figures
                    .error
                    .get_or_insert_with(|| Failure::new(Side::Destination, Phase::Loaded, message));
                let now = self.now();
                let _ = self.protocol.handle(DestinationInput::AppendFailed(kind), now);
                return;
            }
        }
        let begun = self.now();
        let result = self.journal.append(record);
        let now = self.now();
        self.figures.journal_took(kind, now.since(begun));
        let input = match result {
            Ok(()) => DestinationInput::Appended(kind),
            Err(error) => {
                tracing::error!(error = %error, "the journal did not take a record");
                let failure = Failure::new(Side::Destination, self.phase(), error.to_string())
                    .with_errno(error.errno)
                    .advise("look at the file system of the journal");
                self.figures.error.get_or_insert(failure);
                DestinationInput::AppendFailed(kind)
            }
        };
        // Answers to the machine's own question are never out of order.
        let _ = self.protocol.handle(input, now);
    }

    fn say(&mut self, message: CommitMessage) {
        let session = self.protocol.session();
        let message = match message {
            CommitMessage::Loaded => {
                if self.figures.loaded_said {
                    Message::Loaded { session, terms: self.figures.loaded_terms() }
                } else {
                    self.figures.loaded_said = true;
                    let terms = self.figures.finish_loaded(&self.recorder);
                    Message::Loaded { session, terms }
                }
            }
            CommitMessage::Running => {
                Message::Running { session, terms: self.figures.running_terms(&self.recorder) }
            }
            CommitMessage::Abort(failure) => Message::Abort { session, failure },
            CommitMessage::Abandoned { cause } => Message::Abandoned { session, failure: cause },
            CommitMessage::Cancel => Message::Cancel { session },
            // What only a source says.
            CommitMessage::Commit => return,
        };
        self.line.send(&message);
    }

    fn finished(&mut self, outcome: &ProtocolOutcome) {
        match outcome {
            ProtocolOutcome::Completed | ProtocolOutcome::Cancelled => {}
            ProtocolOutcome::Aborted { cause } => {
                let cause = self.explained(cause.clone());
                self.figures.error.get_or_insert(*cause);
            }
            ProtocolOutcome::InDoubt { doubt } => {
                let phase = self.phase();
                let failure = Failure::new(Side::Destination, phase, doubt.to_string())
                    .advise("ask the source whether the guest runs there; do not start it here before");
                self.figures.error.get_or_insert(failure);
            }
        }
        let (incompatible, cancelled) = (self.figures.incompatible, self.control.gate.is_cancelled());
        self.figures.outcome = Some(Outcome::of(outcome, incompatible, cancelled));
    }

    /// Uses this control connection from now on, and reads it.
    pub(super) fn adopt(&mut self, link: ControlLink) -> Result<(), Failure> {
        let mail = self.mail.clone();
        // The session can be over already.
        let tell = move |heard| drop(mail.send(Input::Control(heard)));
        let spawner = &*self.recorder.environment.spawner;
        self.line
            .adopt(link, spawner, Limits::default(), |_| false, tell)
            .map_err(|e| Failure::new(Side::Destination, self.phase(), e.to_string()))
    }

    /// Takes an input; gives what is not the protocol's own.
    fn take(&mut self, input: Input) -> Option<(Wake, Option<Ticket>)> {
        let heard = match input {
            Input::Cancelled => {
                let now = self.now();
                let _ = self.protocol.cancel(now);
                self.act();
                return None;
            }
            Input::Data { lane, arrival: Arrival::Lost(error) } => {
                self.data_lost(lane, &error);
                return None;
            }
            Input::Data { arrival, .. } => return Some((Wake::Data(arrival), None)),
            Input::Control(heard) => heard,
        };
        let newest = self.line.is_newest(&heard);
        let (message, ticket) = match heard.said {
            Ok(said) => said,
            Err(error) => {
                if newest {
                    self.link_lost(&error);
                }
                return None;
            }
        };
        // What belongs to the session as such counts whichever of its connections brought it.
        let (session, said) = match message {
            Message::Commit { session } => (session, CommitMessage::Commit),
            Message::Abort { session, failure } => (session, CommitMessage::Abort(failure)),
            Message::Cancel { session } => (session, CommitMessage::Cancel),
            Message::Done { session } if session != self.protocol.session() => return None,
            Message::Done { .. } if self.figures.committed_at.is_some() => {
                self.source_knows = true;
                return None;
            }
            _ if !newest => return None,
            other => return Some((Wake::Message(other), Some(ticket))),
        };
        self.feed(DestinationInput::Received(session, said));
        None
    }

    fn link_lost(&mut self, error: &WireError) {
        let phase = self.phase();
        if self.protocol.outcome().is_none() {
            tracing::warn!(error = %error, phase = %phase, "the control connection is lost");
        }
        self.line.close();
        let lost = Failure::new(Side::Destination, phase, format!("the control connection: {error}"))
            .with_errno(error.errno());
        self.lost_by = Some(match error {
            WireError::Protocol(_) | WireError::Frame(_) | WireError::Message(_) => lost,
            _ => lost.advise("look at the source: it ended, or the network between the hosts was cut"),
        });
        self.feed(DestinationInput::LinkLost);
        self.lost_by = None;
    }

    /// Takes everything that has come, without waiting. What is for a phase is kept for it.
    pub(super) fn catch_up(&mut self) {
        while let Ok(input) = self.inbox.try_recv() {
            if let Some(kept) = self.take(input) {
                self.early.push_back(kept);
            }
        }
        let now = self.now();
        self.protocol.handle_timeout(now);
        self.act();
    }

    /// The source ends its data connections when it gives up, and says why on the control connection:
    /// its reason is the better one.
    fn data_lost(&mut self, lane: usize, error: &WireError) {
        const PATIENCE: Duration = Duration::from_millis(500);
        let until = self.now().after(PATIENCE);
        while !self.fallen()
            && matches!(error, WireError::Closed | WireError::Io { .. } | WireError::Frame(_))
        {
            match self.inbox.recv_timeout(until.since(self.now())) {
                Ok(Input::Data { .. }) => {}
                Ok(input) => {
                    let _ = self.take(input);
                }
                Err(_) => break,
            }
        }
        if !self.fallen() {
            let failure =
                Failure::new(Side::Destination, self.phase(), format!("data connection {lane}: {error}"));
            self.fail(failure.with_errno(error.errno()));
        }
    }

    pub(super) fn unexpected(&mut self, message: &Message) {
        let phase = self.phase();
        self.fail(Failure::new(
            Side::Destination,
            phase,
            format!("the source broke the protocol: {} has no place in {phase}", message.kind()),
        ));
    }

    /// Waits until something happens that a phase must know, at most `patience`.
    pub(super) fn wait(&mut self, set: Option<&Receiver<SetEvent>>, patience: Duration) -> Wake {
        let until = self.now().after(patience);
        let no_set = never();
        let set = set.unwrap_or(&no_set);
        loop {
            let now = self.now();
            self.protocol.handle_timeout(now);
            self.act();
            // While the source is awaited nothing else may go unheard.
            if self.orders.await_reconnection {
                self.catch_up();
            }
            if self.ordered() {
                return Wake::Ordered;
            }
            if let Some((wake, _ticket)) = self.early.pop_front() {
                return wake;
            }
            let timeout = self.next_timer(now).min(until.since(now));
            crossbeam_channel::select_biased! {
                recv(set) -> event => {
                    if let Ok(event) = event {
                        return Wake::Set(event);
                    }
                }
                recv(self.inbox) -> input => {
                    if let Ok(input) = input && let Some((wake, _ticket)) = self.take(input) {
                        return wake;
                    }
                }
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

    fn ordered(&self) -> bool {
        let orders = &self.orders;
        self.fallen() || orders.start_devices || orders.start_vcpus || orders.await_reconnection
    }

    fn next_timer(&self, now: Timestamp) -> Duration {
        self.protocol.poll_timeout().map_or(LONGEST_WAIT, |at| at.since(now).min(LONGEST_WAIT))
    }

    /// Takes the source's new control connection, if one comes within `patience`.
    pub(super) fn await_source(&mut self, patience: Duration) {
        let heard = match self.door.next(&mut *self.acceptor, patience) {
            Ok(heard) => heard,
            Err(error) => {
                tracing::warn!(error = %error, "no connection can be taken now");
                if let Ok(input) = self.inbox.recv_timeout(patience)
                    && let Some(kept) = self.take(input)
                {
                    self.early.push_back(kept);
                }
                None
            }
        };
        match heard {
            Some((stream, Message::Resume { session })) if session == self.protocol.session() => {
                match self.adopt(ControlLink::new(stream)) {
                    Ok(()) => self.feed(DestinationInput::Reconnected),
                    Err(failure) => self.fail(failure),
                }
            }
            Some((_, other)) => {
                tracing::warn!(message = %other.kind(), "a connection of another session was shown out");
            }
            None => {}
        }
    }

    /// Waits until the source has said DONE or the control connection has ended, at most `patience`.
    pub(super) fn hear_the_end(&mut self, patience: Duration) {
        let until = self.now().after(patience);
        while !self.source_knows && self.line.is_open() {
            match self.inbox.recv_timeout(until.since(self.now())) {
                // A source that has not heard asks again, and is told again.
                Ok(input) => {
                    let _ = self.take(input);
                }
                Err(_) => return,
            }
        }
    }
}
