//! Both hosts, the network between them, and how each step changes them.

use super::host::{Devices, Host, Operation};
use super::journal::{FIRST_BOOT, LATER_BOOT, Landing, SESSION, fixed_failure};
use super::step::{Breakage, Message, Step, Violation};
use airlift_core::commit::{
    CommitMessage, DestinationAction, DestinationDeadlines, DestinationInput, DestinationMachine,
    DestinationVerdict, Doubt, Durability, Opened, Outcome, RecordKind, SourceAction, SourceDeadlines,
    SourceInput, SourceMachine, destination_verdict, source_verdict,
};
use airlift_core::{Phase, Side, Timestamp};
use std::time::Duration;

/// The clock stands still and every deadline is now, so that any of them may pass at any time.
const NOW: Timestamp = Timestamp(Duration::ZERO);

/// The joint state.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) source: Host,
    pub(super) destination: Host,
    pub(super) source_machine: SourceMachine,
    pub(super) destination_machine: DestinationMachine,
    /// Every message ever sent, by its place in [`Message::ALL`]. It stays: it may arrive again.
    sent: u8,
    faults: u8,
}

impl World {
    /// All is sent: the source is about to await LOADED, the destination loads.
    pub(super) fn new(durability: Durability, faults: u8) -> Self {
        let mut source = SourceMachine::new(SESSION, SourceDeadlines::all(Duration::ZERO), NOW);
        let mut destination =
            DestinationMachine::new(SESSION, DestinationDeadlines::all(Duration::ZERO), NOW);
        let opened = |side| {
            Box::new(Opened {
                session: SESSION,
                side,
                boot: FIRST_BOOT,
                durability,
                peer: String::new(),
                devices: Vec::new(),
            })
        };
        let inputs = [
            SourceInput::Advanced(Phase::Negotiate),
            SourceInput::Open(opened(Side::Source)),
            SourceInput::Appended(RecordKind::Opened),
            SourceInput::Advanced(Phase::Setup),
            SourceInput::Advanced(Phase::Precopy),
            SourceInput::Advanced(Phase::Quiesce),
            SourceInput::Advanced(Phase::StopCopy),
        ];
        for input in inputs {
            source.handle(input, NOW).expect("the phases are in order");
            while source.poll_action().is_some() {}
        }
        let inputs = [
            DestinationInput::Advanced(Phase::Negotiate),
            DestinationInput::Open(opened(Side::Destination)),
            DestinationInput::Appended(RecordKind::Opened),
            DestinationInput::Advanced(Phase::Resuming),
            DestinationInput::Advanced(Phase::Load),
        ];
        for input in inputs {
            destination.handle(input, NOW).expect("the phases are in order");
            while destination.poll_action().is_some() {}
        }
        Self {
            source: Host::new(durability),
            destination: Host::new(durability),
            source_machine: source,
            destination_machine: destination,
            sent: 0,
            faults,
        }
    }

    /// Every step that is possible now.
    pub(super) fn steps(&self, breakage: Breakage, into: &mut Vec<Step>) {
        into.clear();
        // A side whose engine has actions left goes first: what the other side does meanwhile commutes
        // with them, and only a death can come in between.
        for side in [Side::Source, Side::Destination] {
            if !self.host(side).is_idle() {
                into.push(Step::Act(side));
                if self.faults > 0 {
                    self.faults_of(side, into);
                }
                return;
            }
        }
        self.steps_of(Side::Source, into);
        self.steps_of(Side::Destination, into);
        let hold = self.destination_machine.state_name() == "hold";
        if breakage == Breakage::AbandonUnrecorded && hold {
            into.push(Step::SayAbandoned);
        }
    }

    fn host(&self, side: Side) -> &Host {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }

    fn steps_of(&self, side: Side, into: &mut Vec<Step>) {
        let host = self.host(side);
        if self.faults > 0 {
            self.faults_of(side, into);
        }
        if host.appending.is_some() {
            into.push(Step::Appended(side));
        }
        let (working, phase, timeout) = match side {
            Side::Source => {
                let machine = &self.source_machine;
                (machine.state_name() == "working", machine.phase(), machine.poll_timeout())
            }
            Side::Destination => {
                let machine = &self.destination_machine;
                (machine.state_name() == "working", machine.phase(), machine.poll_timeout())
            }
        };
        if working && matches!(phase, Phase::StopCopy | Phase::Load) {
            let ready = side == Side::Source || host.devices == Devices::Stopped;
            if ready {
                into.push(Step::Advance(side));
            }
        }
        if working {
            into.push(Step::Fails(side));
        }
        if let Some(operation) = host.operation {
            let starts = matches!(operation, Operation::StartDevices | Operation::StartVcpus);
            let lost = starts && host.devices == Devices::Gone;
            if !lost {
                into.push(Step::Succeeds(side));
            }
            let may_fail = starts || operation == Operation::Reset;
            if lost || (may_fail && self.faults > 0) {
                into.push(Step::OperationFails(side));
            }
        }
        if timeout.is_some() {
            into.push(Step::Timeout(side));
        }
        into.extend([Step::LinkLost(side), Step::Reconnected(side), Step::Cancel(side)]);
        for (bit, message) in Message::ALL.into_iter().enumerate() {
            if message.to() == side && self.sent & 1 << bit != 0 {
                into.push(Step::Deliver(message));
            }
        }
    }

    fn faults_of(&self, side: Side, into: &mut Vec<Step>) {
        let host = self.host(side);
        let landings: &[Option<Landing>] = match host.appending {
            None => &[None],
            Some(kind) => match kind.durability(host.journal.durability()) {
                // Durable to the death of the process is what is read back until a power loss.
                Durability::Process => &[Some(Landing::Absent), Some(Landing::Volatile)],
                Durability::Power => {
                    &[Some(Landing::Absent), Some(Landing::Volatile), Some(Landing::Durable)]
                }
            },
        };
        for landing in landings {
            into.push(Step::Crash(side, *landing));
            let added = usize::from(landing.is_some_and(|landing| landing != Landing::Absent));
            for kept in 0..=host.journal.unsynced() + added {
                into.push(Step::PowerLoss { side, landing: *landing, kept });
            }
            if let Some(landing) = landing
                && host.is_idle()
            {
                into.push(Step::AppendFails(side, *landing));
            }
        }
        if side == Side::Destination && host.devices != Devices::Gone && !host.vcpus {
            into.push(Step::DeviceLost { noticed: false });
            if host.is_idle() {
                into.push(Step::DeviceLost { noticed: true });
            }
        }
    }

    /// The state after `step`, or what went wrong in it.
    pub(super) fn after(&self, step: Step, breakage: Breakage) -> Result<Self, Violation> {
        let mut world = self.clone();
        if step.is_fault() {
            world.faults -= 1;
        }
        match step {
            Step::Act(Side::Source) => world.act_source(breakage)?,
            Step::Act(Side::Destination) => world.act_destination(breakage)?,
            Step::Advance(Side::Source) => world.tell_source(SourceInput::Advanced(Phase::AwaitLoaded)),
            Step::Advance(Side::Destination) => {
                world.tell_destination(DestinationInput::Advanced(Phase::Loaded));
            }
            Step::Deliver(message) => world.deliver(message),
            Step::Appended(side) => {
                if let Some(kind) = world.land(side, Landing::Durable, breakage) {
                    world.tell_append(side, kind, true);
                }
            }
            Step::AppendFails(side, landing) => {
                if let Some(kind) = world.land(side, landing, breakage) {
                    world.tell_append(side, kind, false);
                }
            }
            Step::Succeeds(side) => world.succeed(side, breakage),
            Step::OperationFails(side) => world.fail_operation(side),
            Step::Timeout(Side::Source) => world.source_machine.handle_timeout(NOW),
            Step::Timeout(Side::Destination) => world.destination_machine.handle_timeout(NOW),
            Step::LinkLost(Side::Source) => world.tell_source(SourceInput::LinkLost),
            Step::LinkLost(Side::Destination) => world.tell_destination(DestinationInput::LinkLost),
            Step::Reconnected(Side::Source) => world.tell_source(SourceInput::Reconnected),
            Step::Reconnected(Side::Destination) => world.tell_destination(DestinationInput::Reconnected),
            Step::Cancel(Side::Source) => {
                world.source_machine.cancel(NOW);
            }
            Step::Cancel(Side::Destination) => {
                world.destination_machine.cancel(NOW);
            }
            Step::Fails(Side::Source) => {
                world.tell_source(SourceInput::Failed(Box::new(fixed_failure(Side::Source))));
            }
            Step::Fails(Side::Destination) => world.fail_destination(),
            Step::Crash(side, landing) => {
                world.land(side, landing.unwrap_or(Landing::Absent), breakage);
                world.restart(side, breakage);
            }
            Step::PowerLoss { side, landing, kept } => {
                world.land(side, landing.unwrap_or(Landing::Absent), breakage);
                let host = world.host_mut(side);
                host.journal.lose_power(kept);
                host.devices = Devices::Gone;
                host.rebooted = true;
                world.restart(side, breakage);
            }
            Step::DeviceLost { noticed } => {
                world.destination.devices = Devices::Gone;
                if noticed {
                    world.fail_destination();
                }
            }
            Step::SayAbandoned => world.send(Message::Abandoned),
        }
        world.fetch_actions(breakage)?;
        world.check()?;
        Ok(world)
    }

    /// Exactly one side has the guest, and knows it.
    pub(super) fn is_settled(&self) -> bool {
        let source = self.source.vcpus
            && matches!(self.source_machine.outcome(), Some(Outcome::Aborted { .. } | Outcome::Cancelled));
        let destination =
            self.destination.vcpus && matches!(self.destination_machine.outcome(), Some(Outcome::Completed));
        source != destination
    }

    fn host_mut(&mut self, side: Side) -> &mut Host {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }

    fn check(&self) -> Result<(), Violation> {
        if self.source.is_live() && self.destination.is_live() {
            return Err(Violation::BothLive);
        }
        if self.source.ran && self.destination.ran {
            return Err(Violation::Forked);
        }
        Ok(())
    }

    /// Takes each side's next action. One that a death before it cannot tell from a death after it (an
    /// append that lands nowhere, a reset that has not begun, a report) is carried out at once.
    fn fetch_actions(&mut self, breakage: Breakage) -> Result<(), Violation> {
        while self.source.source_action.is_none() {
            self.source.source_action = self.source_machine.poll_action();
            match self.source.source_action {
                None | Some(SourceAction::Send(_) | SourceAction::RollBack { .. }) => break,
                Some(_) => self.act_source(breakage)?,
            }
        }
        while self.destination.destination_action.is_none() {
            self.destination.destination_action = self.destination_machine.poll_action();
            match self.destination.destination_action {
                None
                | Some(
                    DestinationAction::Send(_)
                    | DestinationAction::StartDevices
                    | DestinationAction::StartVcpus,
                ) => break,
                Some(_) => self.act_destination(breakage)?,
            }
        }
        Ok(())
    }

    fn tell_source(&mut self, input: SourceInput) {
        self.source_machine.handle(input, NOW).expect("the engine keeps the order");
    }

    fn tell_destination(&mut self, input: DestinationInput) {
        self.destination_machine.handle(input, NOW).expect("the engine keeps the order");
    }

    fn fail_destination(&mut self) {
        self.tell_destination(DestinationInput::Failed(Box::new(fixed_failure(Side::Destination))));
    }

    fn send(&mut self, message: Message) {
        for (bit, one) in Message::ALL.into_iter().enumerate() {
            if one == message {
                self.sent |= 1 << bit;
            }
        }
    }

    fn deliver(&mut self, message: Message) {
        let cause = |side| Box::new(fixed_failure(side));
        let content = match message {
            Message::Loaded => CommitMessage::Loaded,
            Message::Commit => CommitMessage::Commit,
            Message::Running => CommitMessage::Running,
            Message::Abandoned => CommitMessage::Abandoned { cause: cause(Side::Destination) },
            Message::Abort(side) => CommitMessage::Abort(cause(side)),
            Message::Cancel(_) => CommitMessage::Cancel,
        };
        match message.to() {
            Side::Source => self.tell_source(SourceInput::Received(SESSION, content)),
            Side::Destination => self.tell_destination(DestinationInput::Received(SESSION, content)),
        }
    }

    fn land(&mut self, side: Side, landing: Landing, breakage: Breakage) -> Option<RecordKind> {
        let host = self.host_mut(side);
        let kind = host.appending.take()?;
        let mut degree = kind.durability(host.journal.durability());
        if breakage == Breakage::AbortedUnsynced && kind == RecordKind::Aborted {
            degree = host.journal.durability();
        }
        host.journal.land(kind, landing, degree);
        Some(kind)
    }

    fn tell_append(&mut self, side: Side, kind: RecordKind, durable: bool) {
        match (side, durable) {
            (Side::Source, true) => self.tell_source(SourceInput::Appended(kind)),
            (Side::Source, false) => self.tell_source(SourceInput::AppendFailed(kind)),
            (Side::Destination, true) => self.tell_destination(DestinationInput::Appended(kind)),
            (Side::Destination, false) => self.tell_destination(DestinationInput::AppendFailed(kind)),
        }
    }

    fn act_source(&mut self, breakage: Breakage) -> Result<(), Violation> {
        let journal = &self.source.journal;
        let Some(action) = self.source.source_action.take() else { return Ok(()) };
        match action {
            SourceAction::Append(record) => {
                let kind = record.kind();
                if breakage == Breakage::SendBeforeJournal && kind == RecordKind::Commit {
                    self.send(Message::Commit);
                }
                self.append(Side::Source, kind, breakage);
            }
            SourceAction::Send(CommitMessage::Commit) => {
                if !journal.is_durable(RecordKind::Commit) && breakage == Breakage::None {
                    return Err(Violation::SaidTooEarly(Message::Commit));
                }
                self.send(Message::Commit);
            }
            SourceAction::Send(CommitMessage::Abort(_)) => self.send(Message::Abort(Side::Source)),
            SourceAction::Send(CommitMessage::Cancel) => self.send(Message::Cancel(Side::Source)),
            SourceAction::Send(_) => return Err(Violation::SaidTooEarly(Message::Loaded)),
            SourceAction::RollBack { .. } => {
                let undone =
                    journal.is_durable(RecordKind::RolledBack) || journal.is_durable(RecordKind::Aborted);
                if journal.has(RecordKind::Commit) && !undone && breakage == Breakage::None {
                    return Err(Violation::CommittedSourceRuns);
                }
                self.run_source();
                self.source.operation = Some(Operation::RollBack);
            }
            SourceAction::FinishSource => self.source.operation = Some(Operation::FinishSource),
            SourceAction::Reconnect => {}
            SourceAction::Finished(Outcome::Completed) => {
                if !self.destination.ran && breakage == Breakage::None {
                    return Err(Violation::FalseOutcome(Side::Source));
                }
            }
            SourceAction::Finished(Outcome::Aborted { .. } | Outcome::Cancelled) => {
                let runs = self.source.vcpus && self.source.operation.is_none();
                if !runs && breakage == Breakage::None {
                    return Err(Violation::FalseOutcome(Side::Source));
                }
            }
            SourceAction::Finished(Outcome::InDoubt { doubt }) => {
                if breakage == Breakage::ResumeOnTimeout && doubt == Doubt::PeerSilent {
                    self.run_source();
                }
            }
        }
        Ok(())
    }

    /// The source goes on, at the earliest moment at which it could. A host without its devices would
    /// boot the guest anew: that counts too.
    fn run_source(&mut self) {
        if self.source.devices != Devices::Gone {
            self.source.devices = Devices::Running;
        }
        self.source.vcpus = true;
        self.source.ran = true;
    }

    fn act_destination(&mut self, breakage: Breakage) -> Result<(), Violation> {
        let Some(action) = self.destination.destination_action.take() else { return Ok(()) };
        let host = &mut self.destination;
        match action {
            DestinationAction::Append(record) => {
                let kind = record.kind();
                let early = matches!(kind, RecordKind::Committed | RecordKind::RunStarted);
                if breakage == Breakage::RunBeforeCommitted && early {
                    self.tell_append(Side::Destination, kind, true);
                } else {
                    self.append(Side::Destination, kind, breakage);
                }
            }
            DestinationAction::Send(message) => {
                let (message, permitted) = match message {
                    CommitMessage::Loaded => (Message::Loaded, host.journal.is_durable(RecordKind::Loaded)),
                    CommitMessage::Running => {
                        (Message::Running, host.ran && host.journal.is_durable(RecordKind::RunStarted))
                    }
                    CommitMessage::Abandoned { .. } => {
                        let recorded = host.journal.is_durable(RecordKind::Abandoned)
                            || !host.journal.has(RecordKind::Loaded);
                        (Message::Abandoned, recorded && !host.is_live() && host.devices != Devices::Stopped)
                    }
                    CommitMessage::Abort(_) => (Message::Abort(Side::Destination), true),
                    CommitMessage::Cancel => (Message::Cancel(Side::Destination), true),
                    CommitMessage::Commit => (Message::Commit, false),
                };
                if !permitted && breakage == Breakage::None {
                    return Err(Violation::SaidTooEarly(message));
                }
                self.send(message);
            }
            DestinationAction::ResetDevices { .. } => host.operation = Some(Operation::Reset),
            DestinationAction::StartDevices => {
                host.operation = Some(Operation::StartDevices);
                match host.devices {
                    Devices::Stopped | Devices::Running => host.devices = Devices::Running,
                    Devices::Blank => return Err(Violation::StartedEmpty),
                    Devices::Gone => {}
                }
            }
            DestinationAction::StartVcpus => {
                host.operation = Some(Operation::StartVcpus);
                if host.devices != Devices::Gone {
                    host.vcpus = true;
                    host.ran = true;
                }
            }
            DestinationAction::AwaitReconnection => {}
            DestinationAction::Finished(Outcome::Completed) => {
                if !host.vcpus && breakage == Breakage::None {
                    return Err(Violation::FalseOutcome(Side::Destination));
                }
            }
            DestinationAction::Finished(Outcome::Aborted { .. } | Outcome::Cancelled) => {
                if (host.ran || host.vcpus) && breakage == Breakage::None {
                    return Err(Violation::FalseOutcome(Side::Destination));
                }
            }
            DestinationAction::Finished(Outcome::InDoubt { .. }) => {}
        }
        Ok(())
    }

    fn append(&mut self, side: Side, kind: RecordKind, breakage: Breakage) {
        let host = self.host_mut(side);
        if breakage == Breakage::NoReappend && host.journal.has(kind) {
            self.tell_append(side, kind, true);
        } else {
            host.appending = Some(kind);
        }
    }

    fn succeed(&mut self, side: Side, breakage: Breakage) {
        let host = self.host_mut(side);
        match host.operation.take() {
            Some(Operation::RollBack) => self.tell_source(SourceInput::RolledBack),
            Some(Operation::FinishSource) => self.tell_source(SourceInput::SourceStopped),
            Some(Operation::StartDevices) => self.tell_destination(DestinationInput::DevicesStarted),
            Some(Operation::StartVcpus) => self.tell_destination(DestinationInput::VcpusStarted),
            Some(Operation::Reset) => {
                if breakage != Breakage::AbandonWithoutReset && host.devices != Devices::Gone {
                    host.devices = Devices::Blank;
                }
                self.tell_destination(DestinationInput::DevicesReset);
            }
            None => {}
        }
    }

    fn fail_operation(&mut self, side: Side) {
        let host = self.host_mut(side);
        // A device that is gone has already been counted.
        if host.devices != Devices::Gone {
            self.faults -= 1;
        }
        match self.host_mut(side).operation.take() {
            Some(Operation::Reset) => self.tell_destination(DestinationInput::ResetFailed),
            Some(_) => self.fail_destination(),
            None => {}
        }
    }

    fn restart(&mut self, side: Side, breakage: Breakage) {
        let host = self.host_mut(side);
        host.die();
        let records = host.journal.read(side);
        let boot = if host.rebooted && breakage != Breakage::IgnoreBootId { LATER_BOOT } else { FIRST_BOOT };
        match side {
            Side::Source => {
                let verdict = source_verdict(&records, &boot);
                self.source_machine =
                    SourceMachine::restarted(SESSION, verdict, SourceDeadlines::all(Duration::ZERO), NOW);
            }
            Side::Destination => {
                let verdict = destination_verdict(&records, &boot);
                let intact = breakage == Breakage::AssumeIntact
                    && matches!(verdict, DestinationVerdict::Hold | DestinationVerdict::Committed)
                    || self.destination.devices == Devices::Stopped;
                self.destination_machine = DestinationMachine::restarted(
                    SESSION,
                    verdict,
                    intact,
                    DestinationDeadlines::all(Duration::ZERO),
                    NOW,
                );
            }
        }
    }
}
