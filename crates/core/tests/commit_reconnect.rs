//! A source that has committed and cannot keep a connection (I16, C-COMMIT-HOLD).
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

use airlift_core::commit::{
    BootId, CommitMessage, Doubt, Durability, Opened, Outcome, SessionId, SourceAction, SourceDeadlines,
    SourceInput, SourceMachine,
};
use airlift_core::{Phase, Side, Timestamp};
use std::time::Duration;

const SESSION: SessionId = SessionId(7);
const PATIENCE: Duration = Duration::from_secs(10);

fn at(seconds: u64) -> Timestamp {
    Timestamp(Duration::from_secs(seconds))
}

/// Answers every append and gives what else was ordered.
fn act(machine: &mut SourceMachine, now: Timestamp) -> Vec<SourceAction> {
    let mut others = Vec::new();
    while let Some(action) = machine.poll_action() {
        match action {
            SourceAction::Append(record) => {
                machine.handle(SourceInput::Appended(record.kind()), now).unwrap()
            }
            other => others.push(other),
        }
    }
    others
}

fn committed() -> SourceMachine {
    let now = at(0);
    let mut machine = SourceMachine::new(SESSION, SourceDeadlines::all(PATIENCE), now);
    let opened = Opened {
        session: SESSION,
        side: Side::Source,
        boot: BootId(1),
        durability: Durability::Process,
        peer: String::new(),
        devices: Vec::new(),
    };
    machine.handle(SourceInput::Advanced(Phase::Negotiate), now).unwrap();
    machine.handle(SourceInput::Open(Box::new(opened)), now).unwrap();
    act(&mut machine, now);
    for phase in [Phase::Setup, Phase::Precopy, Phase::Quiesce, Phase::StopCopy, Phase::AwaitLoaded] {
        machine.handle(SourceInput::Advanced(phase), now).unwrap();
    }
    machine.handle(SourceInput::Received(SESSION, CommitMessage::Loaded), now).unwrap();
    assert!(act(&mut machine, now).contains(&SourceAction::Send(CommitMessage::Commit)));
    machine
}

#[test]
fn a_peer_that_takes_connections_and_drops_them_does_not_keep_it_from_being_in_doubt() {
    let mut machine = committed();
    machine.handle(SourceInput::LinkLost, at(1)).unwrap();
    // Every second a connection that is lost at once: more of them than the deadline has seconds.
    for second in 2..40 {
        let now = at(second);
        machine.handle_timeout(now);
        if machine.outcome().is_some() {
            assert!(second <= 1 + PATIENCE.as_secs(), "only after {second} s");
            assert_eq!(machine.outcome(), Some(&Outcome::InDoubt { doubt: Doubt::PeerSilent }));
            return;
        }
        machine.handle(SourceInput::Reconnected, now).unwrap();
        act(&mut machine, now);
        machine.handle(SourceInput::LinkLost, now).unwrap();
        assert!(act(&mut machine, now).contains(&SourceAction::Reconnect));
    }
    panic!("it is still waiting");
}

#[test]
fn an_answer_over_any_of_the_connections_ends_it() {
    let mut machine = committed();
    machine.handle(SourceInput::LinkLost, at(1)).unwrap();
    machine.handle(SourceInput::Reconnected, at(2)).unwrap();
    act(&mut machine, at(2));
    machine.handle(SourceInput::Received(SESSION, CommitMessage::Running), at(3)).unwrap();
    assert!(act(&mut machine, at(3)).contains(&SourceAction::FinishSource));
    machine.handle(SourceInput::SourceStopped, at(3)).unwrap();
    assert_eq!(act(&mut machine, at(3)), [SourceAction::Finished(Outcome::Completed)]);
}
