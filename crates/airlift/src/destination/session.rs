//! What all phases of the destination share, and the one place where it waits.

use super::report::Figures;
use crate::control::Control;
use crate::event::Event;
use crate::link::Acceptor;
use crate::machine::{Machine, MachineError};
use crate::options::DestinationOptions;
use crate::report::Outcome;
use crate::set::{Recorder, SetEvent};
use crate::wire::control::ControlLink;
use crate::wire::frames::WireError;
use crate::wire::inbound::Arrival;
use airlift_core::commit::{
    CommitMessage, DestinationAction, DestinationDeadlines, DestinationInput, DestinationMachine, Journal,
    Outcome as ProtocolOutcome, Record, RecordKind, SessionId,
};
use airlift_core::{Failure, Phase, Side, Timestamp};
use airlift_stream::Message;
use crossbeam_channel::{Receiver, Sender, never, unbounded};
use std::time::Duration;

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
    /// From the control connection of this number; an error is its end.
    Control(u32, Result<Message, WireError>),
    /// From a data connection.
    Data { lane: usize, arrival: Arrival },
    /// A cancel was accepted.
    Cancelled,
}

/// Why [`Session::wait`] has returned.
#[derive(Debug)]
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
    inbox: Receiver<Input>,
    pub(super) link: Option<ControlLink>,
    link_number: u32,
    pinged: (u64, Timestamp),
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
        let mut session = Self {
            protocol: DestinationMachine::new(id, deadlines, now),
            machine,
            acceptor,
            journal,
            recorder,
            control,
            options,
            mail,
            inbox,
            link: None,
            link_number: 0,
            pinged: (0, now),
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
        let now = self.now();
        if let Err(error) = self.protocol.handle(DestinationInput::Advanced(phase), now) {
            self.fail(Failure::new(Side::Destination, phase, error.to_string()));
        }
        self.act();
    }

    pub(super) fn announce(&mut self, phase: Phase) {
        self.control.gauges.set_phase(phase);
        let at_ms = self.recorder.at_ms(self.now());
        tracing::info!(name: "vfio_migration_state_notifier", state = %phase);
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
        self.figures.error.get_or_insert(failure.clone());
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

    fn append(&mut self, record: &Record) {
        let kind = record.kind();
        if kind == RecordKind::Committed {
            // From here on the user's cancel is the source's to answer.
            let _ = self.control.gate.close();
            self.figures.committed_at = Some(self.now());
        }
        let begun = self.now();
        let result = self.journal.append(record);
        let now = self.now();
        self.figures.journal_took(kind, now.since(begun));
        let input = match result {
            Ok(()) => DestinationInput::Appended(kind),
            Err(error) => {
                tracing::error!(error = %error, "the journal did not take a record");
                self.figures.error.get_or_insert(
                    Failure::new(Side::Destination, self.phase(), error.to_string())
                        .with_errno(error.errno)
                        .advise("look at the file system of the journal"),
                );
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
        self.send(&message);
    }

    /// Sends a message; a connection that does not take it is lost, which its reader reports.
    pub(super) fn send(&mut self, message: &Message) {
        if let Some(Err(error)) = self.link.as_ref().map(|link| link.send(message)) {
            tracing::warn!(error = %error, message = %message.kind(), "a message could not be sent");
            if let Some(link) = &self.link {
                link.shutdown();
            }
        }
    }

    fn finished(&mut self, outcome: &ProtocolOutcome) {
        self.figures.outcome = Some(match outcome {
            ProtocolOutcome::Completed => Outcome::Completed,
            ProtocolOutcome::Cancelled => Outcome::Cancelled,
            ProtocolOutcome::Aborted { cause } => {
                self.figures.error.get_or_insert((**cause).clone());
                if self.figures.incompatible { Outcome::Incompatible } else { Outcome::Aborted }
            }
            ProtocolOutcome::InDoubt { doubt } => {
                let phase = self.phase();
                let failure = Failure::new(Side::Destination, phase, doubt.to_string())
                    .advise("ask the source whether the guest runs there; do not start it here before");
                self.figures.error.get_or_insert(failure);
                Outcome::InDoubt
            }
        });
    }

    /// Uses this control connection from now on, and reads it.
    pub(super) fn adopt(&mut self, link: ControlLink) -> Result<(), Failure> {
        self.link_number += 1;
        let number = self.link_number;
        let mail = self.mail.clone();
        link.read_on(
            &*self.recorder.environment.spawner,
            airlift_stream::Limits::default(),
            Box::new(move |message| {
                // The session can be over already.
                let _ = mail.send(Input::Control(number, message));
            }),
        )
        .map_err(|e| Failure::new(Side::Destination, self.phase(), e.to_string()))?;
        self.link = Some(link);
        Ok(())
    }

    /// Takes an input; gives what is not the protocol's own.
    fn take(&mut self, input: Input) -> Option<Wake> {
        let phase = self.phase();
        let message = match input {
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
            Input::Data { arrival, .. } => return Some(Wake::Data(arrival)),
            Input::Control(number, _) if number != self.link_number => return None,
            Input::Control(_, Err(error)) => {
                tracing::warn!(error = %error, phase = %phase, "the control connection is lost");
                self.figures.link_error = Some(error);
                if let Some(link) = self.link.take() {
                    link.shutdown();
                }
                self.feed(DestinationInput::LinkLost);
                return None;
            }
            Input::Control(_, Ok(message)) => message,
        };
        let (session, said) = match message {
            Message::Commit { session } => (session, CommitMessage::Commit),
            Message::Abort { session, failure } => (session, CommitMessage::Abort(failure)),
            Message::Cancel { session } => (session, CommitMessage::Cancel),
            other => return Some(Wake::Message(other)),
        };
        self.feed(DestinationInput::Received(session, said));
        None
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
                Ok(input) => drop(self.take(input)),
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
            self.ping(now);
            if self.ordered() {
                return Wake::Ordered;
            }
            let timeout = self.next_timer(now).min(until.since(now));
            crossbeam_channel::select_biased! {
                recv(set) -> event => {
                    if let Ok(event) = event {
                        return Wake::Set(event);
                    }
                }
                recv(self.inbox) -> input => {
                    if let Ok(input) = input && let Some(wake) = self.take(input) {
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
        let ping = self.options.deadlines.silence / 3;
        self.protocol.poll_timeout().map_or(ping, |at| at.since(now).min(ping))
    }

    /// Says something when nothing was said for a while, so that silence means a loss.
    fn ping(&mut self, now: Timestamp) {
        let Some(sent) = self.link.as_ref().map(ControlLink::sent) else { return };
        let (last, at) = self.pinged;
        if sent != last {
            self.pinged = (sent, now);
        } else if now.since(at) >= self.options.deadlines.silence / 3 {
            self.send(&Message::Ping(sent));
            self.pinged = (sent + 1, now);
        }
    }

    /// Waits until the other side has closed the control connection. `false`: it was cut, or the time
    /// is over.
    pub(super) fn hear_the_end(&mut self, patience: Duration) -> bool {
        let until = self.now().after(patience);
        loop {
            match self.inbox.recv_timeout(until.since(self.now())) {
                Ok(Input::Control(number, Err(error))) if number == self.link_number => {
                    return error == WireError::Closed;
                }
                // A source that has not heard asks again, and is told again.
                Ok(input) => drop(self.take(input)),
                Err(_) => return false,
            }
        }
    }
}
