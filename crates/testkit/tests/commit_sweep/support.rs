//! The machines in each of their states, and what they order in words.

use airlift_core::commit::{
    BootId, CommitMessage, DestinationAction, DestinationDeadlines, DestinationInput, DestinationMachine,
    Durability, Opened, Outcome, RecordKind, SessionId, SourceAction, SourceDeadlines, SourceInput,
    SourceMachine,
};
use airlift_core::{Failure, Phase, Side, Timestamp};
use std::time::Duration;

pub(crate) const SESSION: SessionId = SessionId(7);
pub(crate) const START: Timestamp = Timestamp(Duration::from_secs(1000));

pub(crate) fn opened(side: Side) -> Box<Opened> {
    Box::new(Opened {
        session: SESSION,
        side,
        boot: BootId(1),
        durability: Durability::Process,
        peer: "tcp:other".into(),
        devices: Vec::new(),
    })
}

pub(crate) fn failure(side: Side) -> Box<Failure> {
    Box::new(Failure::new(side, Phase::Precopy, "a device was lost"))
}

/// What an action is, without what it carries.
pub(crate) fn source_actions(machine: &mut SourceMachine) -> Vec<String> {
    std::iter::from_fn(|| machine.poll_action())
        .map(|action| match action {
            SourceAction::Append(record) => format!("append {}", record.kind()),
            SourceAction::Send(message) => format!("send {}", name(&message)),
            SourceAction::RollBack { .. } => "roll back".into(),
            SourceAction::FinishSource => "finish".into(),
            SourceAction::Reconnect => "reconnect".into(),
            SourceAction::Finished(outcome) => format!("finished {}", outcome_name(&outcome)),
        })
        .collect()
}

pub(crate) fn destination_actions(machine: &mut DestinationMachine) -> Vec<String> {
    std::iter::from_fn(|| machine.poll_action())
        .map(|action| match action {
            DestinationAction::Append(record) => format!("append {}", record.kind()),
            DestinationAction::Send(message) => format!("send {}", name(&message)),
            DestinationAction::ResetDevices { .. } => "reset".into(),
            DestinationAction::StartDevices => "start devices".into(),
            DestinationAction::StartVcpus => "start vcpus".into(),
            DestinationAction::AwaitReconnection => "await reconnection".into(),
            DestinationAction::Finished(outcome) => format!("finished {}", outcome_name(&outcome)),
        })
        .collect()
}

pub(crate) fn name(message: &CommitMessage) -> &'static str {
    match message {
        CommitMessage::Loaded => "LOADED",
        CommitMessage::Commit => "COMMIT",
        CommitMessage::Running => "RUNNING",
        CommitMessage::Abort(_) => "ABORT",
        CommitMessage::Abandoned { .. } => "ABANDONED",
        CommitMessage::Cancel => "CANCEL",
    }
}

pub(crate) fn outcome_name(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Completed => "completed".into(),
        Outcome::Aborted { .. } => "aborted".into(),
        Outcome::Cancelled => "cancelled".into(),
        Outcome::InDoubt { doubt } => format!("in doubt: {doubt:?}"),
    }
}

pub(crate) fn tell(machine: &mut SourceMachine, input: SourceInput) -> Vec<String> {
    machine.handle(input, START).unwrap();
    source_actions(machine)
}

pub(crate) fn tell_destination(machine: &mut DestinationMachine, input: DestinationInput) -> Vec<String> {
    machine.handle(input, START).unwrap();
    destination_actions(machine)
}

pub(crate) fn received(message: CommitMessage) -> SourceInput {
    SourceInput::Received(SESSION, message)
}

pub(crate) fn arrived(message: CommitMessage) -> DestinationInput {
    DestinationInput::Received(SESSION, message)
}

pub(crate) fn abandoned() -> CommitMessage {
    CommitMessage::Abandoned { cause: failure(Side::Destination) }
}

pub(crate) const SOURCE_PHASES: [Phase; 7] = [
    Phase::Connect,
    Phase::Negotiate,
    Phase::Setup,
    Phase::Precopy,
    Phase::Quiesce,
    Phase::StopCopy,
    Phase::AwaitLoaded,
];

pub(crate) fn source_in(phase: Phase) -> SourceMachine {
    let mut machine = SourceMachine::new(SESSION, SourceDeadlines::default(), START);
    for next in SOURCE_PHASES.into_iter().skip(1).take_while(|next| *next <= phase) {
        if next == Phase::Setup {
            machine.handle(SourceInput::Open(opened(Side::Source)), START).unwrap();
            assert_eq!(source_actions(&mut machine), ["append OPENED"]);
            machine.handle(SourceInput::Appended(RecordKind::Opened), START).unwrap();
        }
        machine.handle(SourceInput::Advanced(next), START).unwrap();
    }
    assert_eq!(machine.phase(), phase);
    assert!(source_actions(&mut machine).is_empty());
    machine
}

/// COMMIT is durable and sent.
pub(crate) fn committed_source() -> SourceMachine {
    let mut machine = source_in(Phase::AwaitLoaded);
    assert_eq!(tell(&mut machine, received(CommitMessage::Loaded)), ["append COMMIT"]);
    assert_eq!(tell(&mut machine, SourceInput::Appended(RecordKind::Commit)), ["send COMMIT"]);
    machine
}

pub(crate) const DESTINATION_PHASES: [Phase; 4] =
    [Phase::Listen, Phase::Negotiate, Phase::Resuming, Phase::Load];

pub(crate) fn destination_in(phase: Phase) -> DestinationMachine {
    let mut machine = DestinationMachine::new(SESSION, DestinationDeadlines::default(), START);
    for next in DESTINATION_PHASES.into_iter().skip(1).take_while(|next| *next <= phase) {
        if next == Phase::Resuming {
            machine.handle(DestinationInput::Open(opened(Side::Destination)), START).unwrap();
            assert_eq!(destination_actions(&mut machine), ["append OPENED"]);
            machine.handle(DestinationInput::Appended(RecordKind::Opened), START).unwrap();
        }
        machine.handle(DestinationInput::Advanced(next), START).unwrap();
    }
    assert_eq!(machine.phase(), phase);
    assert!(destination_actions(&mut machine).is_empty());
    machine
}

pub(crate) fn holding_destination() -> DestinationMachine {
    let mut machine = destination_in(Phase::Load);
    let loaded = DestinationInput::Advanced(Phase::Loaded);
    assert_eq!(tell_destination(&mut machine, loaded), ["append LOADED"]);
    let appended = DestinationInput::Appended(RecordKind::Loaded);
    assert_eq!(tell_destination(&mut machine, appended), ["send LOADED"]);
    machine
}

/// The devices are being started.
pub(crate) fn starting_destination() -> DestinationMachine {
    let mut machine = holding_destination();
    assert_eq!(tell_destination(&mut machine, arrived(CommitMessage::Commit)), ["append COMMITTED"]);
    let appended = DestinationInput::Appended(RecordKind::Committed);
    assert_eq!(tell_destination(&mut machine, appended), ["append RUN_STARTED"]);
    let appended = DestinationInput::Appended(RecordKind::RunStarted);
    assert_eq!(tell_destination(&mut machine, appended), ["start devices"]);
    machine
}
