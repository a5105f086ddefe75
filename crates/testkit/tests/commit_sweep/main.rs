//! The session machines step by step: what ends each phase, with which action, message and outcome.
//!
//! The faults that `commit_protocol` explores are not repeated here, except where the exact order of
//! actions is the point.

// Helpers of tests fail by panicking too.
#![allow(clippy::unwrap_used)]

mod support;

use crate::support::*;
use airlift_core::commit::{
    CancelAnswer, CommitMessage, DestinationDeadlines, DestinationInput, DestinationMachine,
    DestinationVerdict, Doubt, Record, RecordKind, SessionId, SourceAction, SourceDeadlines, SourceInput,
    SourceMachine, SourceVerdict,
};
use airlift_core::{Failure, Phase, Side, Timestamp};
use std::time::Duration;

/// What can end a phase, with the message that the other side gets and the outcome.
#[derive(Clone, Copy, Debug)]
enum End {
    LinkLost,
    Timeout,
    Cancel,
    Failed,
    PeerAborts,
    PeerCancels,
}

const ENDS: [End; 6] =
    [End::LinkLost, End::Timeout, End::Cancel, End::Failed, End::PeerAborts, End::PeerCancels];

/// Before COMMIT whatever happens ends with the source running, and says so only when it does
/// (C-TRUTH, I2, I18, F1, F5-F10, F36).
#[test]
fn every_phase_of_the_source_before_commit_ends_with_the_source_running() {
    for phase in SOURCE_PHASES {
        for end in ENDS {
            let mut machine = source_in(phase);
            match end {
                End::LinkLost => machine.handle(SourceInput::LinkLost, START).unwrap(),
                End::Timeout => machine.handle_timeout(machine.poll_timeout().unwrap()),
                End::Cancel => assert_eq!(machine.cancel(START), CancelAnswer::Accepted),
                End::Failed => machine.handle(SourceInput::Failed(failure(Side::Source)), START).unwrap(),
                End::PeerAborts => {
                    machine.handle(received(CommitMessage::Abort(failure(Side::Destination))), START).unwrap()
                }
                End::PeerCancels => machine.handle(received(CommitMessage::Cancel), START).unwrap(),
            }
            let cancelled = matches!(end, End::Cancel | End::PeerCancels);
            let message = if cancelled { "send CANCEL" } else { "send ABORT" };
            let finished = if cancelled { "finished cancelled" } else { "finished aborted" };
            let case = format!("{phase} {end:?}");
            if phase < Phase::Setup {
                // No device was touched: there is nothing to walk back.
                assert_eq!(source_actions(&mut machine), [message, finished], "{case}");
            } else {
                assert_eq!(source_actions(&mut machine), [message, "roll back"], "{case}");
                assert_eq!(machine.outcome(), None, "{case}: nothing runs yet");
                assert_eq!(machine.phase(), phase, "{case}");
                assert_eq!(tell(&mut machine, SourceInput::RolledBack), ["append ABORTED"], "{case}");
                let closed = SourceInput::AppendFailed(RecordKind::Aborted);
                assert_eq!(tell(&mut machine, closed), [finished], "{case}");
            }
            // The end is final, and a destination that has missed it is told again.
            assert_eq!(machine.poll_timeout(), None, "{case}");
            assert_eq!(machine.cancel(START), CancelAnswer::Accepted, "{case}");
            assert_eq!(tell(&mut machine, received(CommitMessage::Loaded)), [message], "{case}");
            assert!(tell(&mut machine, received(CommitMessage::Running)).is_empty(), "{case}");
        }
    }
}

/// Before LOADED every failure ends in a reset, and ABANDONED is said after it (F5-F9, F27, F36).
#[test]
fn every_phase_of_the_destination_before_loaded_ends_reset() {
    for phase in DESTINATION_PHASES {
        for end in ENDS {
            let mut machine = destination_in(phase);
            match end {
                End::LinkLost => machine.handle(DestinationInput::LinkLost, START).unwrap(),
                End::Timeout => machine.handle_timeout(machine.poll_timeout().unwrap()),
                End::Cancel => assert_eq!(machine.cancel(START), CancelAnswer::Accepted),
                End::Failed => {
                    machine.handle(DestinationInput::Failed(failure(Side::Destination)), START).unwrap();
                }
                End::PeerAborts => {
                    machine.handle(arrived(CommitMessage::Abort(failure(Side::Source))), START).unwrap();
                }
                End::PeerCancels => machine.handle(arrived(CommitMessage::Cancel), START).unwrap(),
            }
            let case = format!("{phase} {end:?}");
            // Who gives up by itself tells the source at once; who was told does not answer yet.
            let mut expected: Vec<&str> = match end {
                End::Cancel => vec!["send CANCEL"],
                End::PeerAborts | End::PeerCancels => vec![],
                End::LinkLost | End::Timeout | End::Failed => vec!["send ABORT"],
            };
            let finished = match end {
                End::Cancel | End::PeerCancels => "finished cancelled",
                _ => "finished aborted",
            };
            if phase < Phase::Resuming {
                expected.push(finished);
                assert_eq!(destination_actions(&mut machine), expected, "{case}");
            } else {
                expected.push("reset");
                assert_eq!(destination_actions(&mut machine), expected, "{case}");
                let reset = tell_destination(&mut machine, DestinationInput::DevicesReset);
                assert_eq!(reset, ["append ABANDONED"], "{case}");
                // LOADED was never journalled: nothing can be made of a record that is missing.
                let closed = DestinationInput::AppendFailed(RecordKind::Abandoned);
                assert_eq!(tell_destination(&mut machine, closed), ["send ABANDONED", finished], "{case}");
            }
            assert_eq!(machine.poll_timeout(), None, "{case}");
            assert!(
                !tell_destination(&mut machine, arrived(CommitMessage::Commit))
                    .iter()
                    .any(|action| action.starts_with("append") || action.starts_with("start")),
                "{case}: COMMIT starts nothing"
            );
        }
    }
}

/// I16
#[test]
fn each_phase_of_the_source_has_the_deadline_that_was_given_for_it() {
    let deadlines = SourceDeadlines::default();
    let expected = [
        deadlines.connect,
        deadlines.negotiate,
        deadlines.setup,
        deadlines.precopy,
        deadlines.quiesce,
        deadlines.stop_copy,
        deadlines.await_loaded,
    ];
    for (phase, patience) in SOURCE_PHASES.into_iter().zip(expected) {
        let mut machine = source_in(phase);
        let deadline = START.after(patience);
        assert_eq!(machine.poll_timeout(), Some(deadline), "{phase}");
        machine.handle_timeout(Timestamp(deadline.0 - Duration::from_nanos(1)));
        assert!(source_actions(&mut machine).is_empty(), "{phase}: not yet");
    }
}

/// C-COMMIT-DURABLE, C-RUN-STARTED: each step waits for its record.
#[test]
fn a_migration_that_nothing_disturbs() {
    let mut source = committed_source();
    let mut destination = starting_destination();
    assert_eq!(tell_destination(&mut destination, DestinationInput::DevicesStarted), ["start vcpus"]);
    assert_eq!(
        tell_destination(&mut destination, DestinationInput::VcpusStarted),
        ["send RUNNING", "append RUNNING"]
    );
    assert_eq!(
        tell_destination(&mut destination, DestinationInput::Appended(RecordKind::Running)),
        ["finished completed"]
    );
    assert_eq!(tell(&mut source, received(CommitMessage::Running)), ["finish"]);
    assert_eq!(tell(&mut source, SourceInput::SourceStopped), ["append DONE"]);
    assert_eq!(tell(&mut source, SourceInput::Appended(RecordKind::Done)), ["finished completed"]);
    assert_eq!(source.phase(), Phase::Done);
    assert_eq!(destination.phase(), Phase::Running);
    // Repeated questions get the same answer and change nothing.
    let again = tell_destination(&mut destination, arrived(CommitMessage::Commit));
    assert_eq!(again, ["send RUNNING"]);
    assert_eq!(tell_destination(&mut destination, DestinationInput::Reconnected), ["send RUNNING"]);
    assert!(tell(&mut source, received(CommitMessage::Running)).is_empty());
    assert!(tell(&mut source, received(abandoned())).is_empty());
}

/// C-CANCEL, I17: accepted until COMMIT is asked for, too late from then on, on either side (F36, F37).
#[test]
fn cancel_is_too_late_from_commit_on() {
    let mut source = source_in(Phase::AwaitLoaded);
    tell(&mut source, received(CommitMessage::Loaded));
    assert_eq!(source.cancel(START), CancelAnswer::TooLate { phase: Phase::Commit });
    assert_eq!(tell(&mut source, SourceInput::Appended(RecordKind::Commit)), ["send COMMIT"]);
    assert_eq!(source.cancel(START), CancelAnswer::TooLate { phase: Phase::Commit });
    // The destination's cancel has crossed COMMIT: it binds nobody (C-ABORT).
    assert!(tell(&mut source, received(CommitMessage::Cancel)).is_empty());
    assert!(tell(&mut source, received(CommitMessage::Abort(failure(Side::Destination)))).is_empty());

    let mut destination = starting_destination();
    assert_eq!(destination.cancel(START), CancelAnswer::TooLate { phase: Phase::Running });
    assert!(destination_actions(&mut destination).is_empty());
}

/// C-HOLD, C-ABANDONED.
#[test]
fn a_destination_that_holds_gives_up_only_with_a_durable_record() {
    for end in ENDS {
        let mut machine = holding_destination();
        match end {
            End::LinkLost => {
                // A lost link alone does not end the hold: the source may have committed.
                let actions = tell_destination(&mut machine, DestinationInput::LinkLost);
                assert_eq!(actions, ["await reconnection"]);
                assert_eq!(tell_destination(&mut machine, DestinationInput::Reconnected), ["send LOADED"]);
                continue;
            }
            End::Timeout => machine.handle_timeout(machine.poll_timeout().unwrap()),
            End::Cancel => assert_eq!(machine.cancel(START), CancelAnswer::Accepted),
            End::Failed => {
                machine.handle(DestinationInput::Failed(failure(Side::Destination)), START).unwrap();
            }
            End::PeerAborts => {
                machine.handle(arrived(CommitMessage::Abort(failure(Side::Source))), START).unwrap();
            }
            End::PeerCancels => machine.handle(arrived(CommitMessage::Cancel), START).unwrap(),
        }
        assert_eq!(destination_actions(&mut machine).last().unwrap(), "reset", "{end:?}");
        // COMMIT that comes now is answered when the answer is durable, not before.
        assert!(tell_destination(&mut machine, arrived(CommitMessage::Commit)).is_empty(), "{end:?}");
        let reset = tell_destination(&mut machine, DestinationInput::DevicesReset);
        assert_eq!(reset, ["append ABANDONED"], "{end:?}");
        let said = tell_destination(&mut machine, DestinationInput::Appended(RecordKind::Abandoned));
        assert_eq!(said[0], "send ABANDONED", "{end:?}");
        let again = tell_destination(&mut machine, arrived(CommitMessage::Commit));
        assert_eq!(again, ["send ABANDONED"], "{end:?}");
    }
}

/// Without a durable ABANDONED nothing is said, and the next question is a reason to try again.
#[test]
fn an_abandoned_that_cannot_be_journalled_is_in_doubt_until_it_can() {
    let mut machine = holding_destination();
    machine.handle_timeout(machine.poll_timeout().unwrap());
    destination_actions(&mut machine);
    tell_destination(&mut machine, DestinationInput::DevicesReset);
    let failed = tell_destination(&mut machine, DestinationInput::AppendFailed(RecordKind::Abandoned));
    assert_eq!(failed, ["finished in doubt: Journal(Abandoned)"]);
    let retried = tell_destination(&mut machine, arrived(CommitMessage::Commit));
    assert_eq!(retried, ["append ABANDONED"]);
    let said = tell_destination(&mut machine, DestinationInput::Appended(RecordKind::Abandoned));
    assert_eq!(said, ["send ABANDONED", "finished aborted"]);
}

#[test]
fn devices_that_cannot_be_reset_keep_a_held_session_in_doubt() {
    let mut machine = holding_destination();
    machine.handle_timeout(machine.poll_timeout().unwrap());
    destination_actions(&mut machine);
    let failed = tell_destination(&mut machine, DestinationInput::ResetFailed);
    assert_eq!(failed, ["finished in doubt: NotReset"]);
    assert_eq!(tell_destination(&mut machine, DestinationInput::Reconnected), ["reset"]);

    // Before LOADED the source cannot have committed: the migration has failed, and that is all.
    let mut machine = destination_in(Phase::Load);
    tell_destination(&mut machine, DestinationInput::LinkLost);
    assert_eq!(tell_destination(&mut machine, DestinationInput::ResetFailed), ["finished aborted"]);
}

/// C-MAY-HAVE-RUN: devices that started are reset again; vCPUs that were asked for are not taken back.
#[test]
fn a_failed_start_is_abandoned_until_the_vcpus_are_asked_for() {
    let mut machine = starting_destination();
    let failed = DestinationInput::Failed(failure(Side::Destination));
    assert_eq!(tell_destination(&mut machine, failed.clone()), ["reset"]);
    // The start that was under way ends late: it starts nothing more.
    assert!(tell_destination(&mut machine, DestinationInput::DevicesStarted).is_empty());
    assert_eq!(tell_destination(&mut machine, DestinationInput::DevicesReset), ["append ABANDONED"]);

    let mut machine = starting_destination();
    tell_destination(&mut machine, DestinationInput::DevicesStarted);
    assert_eq!(tell_destination(&mut machine, failed), ["finished in doubt: MayHaveRun"]);
    assert!(tell_destination(&mut machine, arrived(CommitMessage::Commit)).is_empty());
    assert!(tell_destination(&mut machine, DestinationInput::Reconnected).is_empty());
}

/// C-COMMIT-HOLD: after COMMIT the source holds; only ABANDONED lets it go on, one durable record later (F11, F18).
#[test]
fn a_committed_source_goes_on_only_when_the_destination_has_abandoned() {
    let mut machine = committed_source();
    assert_eq!(tell(&mut machine, SourceInput::LinkLost), ["reconnect"]);
    machine.handle_timeout(machine.poll_timeout().unwrap());
    assert_eq!(source_actions(&mut machine), ["finished in doubt: PeerSilent"]);
    assert_eq!(machine.poll_timeout(), None);
    assert_eq!(tell(&mut machine, SourceInput::Reconnected), ["send COMMIT"]);
    assert_eq!(tell(&mut machine, received(CommitMessage::Loaded)), ["send COMMIT"]);
    assert_eq!(tell(&mut machine, received(abandoned())), ["append ROLLED_BACK"]);
    assert_eq!(tell(&mut machine, SourceInput::Appended(RecordKind::RolledBack)), ["roll back"]);
    assert_eq!(tell(&mut machine, SourceInput::RolledBack), ["finished aborted"]);
    assert_eq!(machine.cancel(START), CancelAnswer::Accepted);
}

/// The first deadline after COMMIT asks for another connection, the second ends in doubt (F12).
#[test]
fn a_silent_destination_is_asked_again_before_the_source_is_in_doubt() {
    let mut machine = committed_source();
    let first = machine.poll_timeout().unwrap();
    assert_eq!(first, START.after(SourceDeadlines::default().commit));
    machine.handle_timeout(first);
    assert_eq!(source_actions(&mut machine), ["reconnect"]);
    let second = machine.poll_timeout().unwrap();
    assert_eq!(second, first.after(SourceDeadlines::default().reconnect));
    machine.handle_timeout(second);
    assert_eq!(source_actions(&mut machine), ["finished in doubt: PeerSilent"]);
    assert_eq!(tell(&mut machine, received(CommitMessage::Running)), ["finish"]);
}

/// C-COMMIT-FAILED, F21: a COMMIT that may be durable or not was at least not sent: a durable ABORTED decides, and
/// without it nothing does.
#[test]
fn a_commit_that_cannot_be_journalled() {
    let mut machine = source_in(Phase::AwaitLoaded);
    tell(&mut machine, received(CommitMessage::Loaded));
    assert_eq!(tell(&mut machine, SourceInput::AppendFailed(RecordKind::Commit)), ["append ABORTED"]);
    let mut doubtful = machine.clone();
    assert_eq!(tell(&mut machine, SourceInput::Appended(RecordKind::Aborted)), ["send ABORT", "roll back"]);
    assert_eq!(tell(&mut machine, SourceInput::RolledBack), ["finished aborted"]);

    assert_eq!(
        tell(&mut doubtful, SourceInput::AppendFailed(RecordKind::Aborted)),
        ["finished in doubt: Journal(Aborted)"]
    );
    assert!(tell(&mut doubtful, SourceInput::Reconnected).is_empty(), "COMMIT is not sent either");
    assert_eq!(tell(&mut doubtful, received(abandoned())), ["append ROLLED_BACK"]);
}

/// ABANDONED that comes while COMMIT is being written is not lost.
#[test]
fn an_abandoned_that_crosses_the_commit_is_kept() {
    let mut machine = source_in(Phase::AwaitLoaded);
    tell(&mut machine, received(CommitMessage::Loaded));
    assert!(tell(&mut machine, received(abandoned())).is_empty());
    assert_eq!(
        tell(&mut machine, SourceInput::Appended(RecordKind::Commit)),
        ["send COMMIT", "append ROLLED_BACK"]
    );
}

/// C-SESSION: what was said in another session is nothing here.
#[test]
fn messages_of_another_session_are_not_heard() {
    let other = SessionId(8);
    let mut source = committed_source();
    for message in [CommitMessage::Running, abandoned(), CommitMessage::Loaded] {
        assert!(tell(&mut source, SourceInput::Received(other, message)).is_empty());
    }
    let mut destination = holding_destination();
    for message in [CommitMessage::Commit, CommitMessage::Abort(failure(Side::Source))] {
        let input = DestinationInput::Received(other, message);
        assert!(tell_destination(&mut destination, input).is_empty());
    }
}

/// C-OPENED: no device is touched before OPENED is durable, and phases are not skipped.
#[test]
fn the_engine_cannot_skip_a_step() {
    let mut source = source_in(Phase::Negotiate);
    assert!(source.handle(SourceInput::Advanced(Phase::Setup), START).is_err());
    source.handle(SourceInput::Open(opened(Side::Source)), START).unwrap();
    assert!(source.handle(SourceInput::Advanced(Phase::Setup), START).is_err());
    assert!(source.handle(SourceInput::Advanced(Phase::Done), START).is_err());
    let mut source = source_in(Phase::Setup);
    assert!(source.handle(SourceInput::Advanced(Phase::AwaitLoaded), START).is_err());
    assert!(source.handle(SourceInput::Open(opened(Side::Source)), START).is_err());
    source.handle(SourceInput::Advanced(Phase::Quiesce), START).unwrap();

    let mut destination = destination_in(Phase::Negotiate);
    assert!(destination.handle(DestinationInput::Advanced(Phase::Resuming), START).is_err());
    let mut destination = destination_in(Phase::Resuming);
    assert!(destination.handle(DestinationInput::Advanced(Phase::Loaded), START).is_err());
}

/// F20: a journal that cannot be opened ends the migration before a device is touched.
#[test]
fn a_journal_that_does_not_open_ends_the_session() {
    let mut source = source_in(Phase::Negotiate);
    tell(&mut source, SourceInput::Open(opened(Side::Source)));
    assert_eq!(
        tell(&mut source, SourceInput::AppendFailed(RecordKind::Opened)),
        ["send ABORT", "finished aborted"]
    );
    let mut destination = destination_in(Phase::Load);
    tell_destination(&mut destination, DestinationInput::Advanced(Phase::Loaded));
    assert_eq!(
        tell_destination(&mut destination, DestinationInput::AppendFailed(RecordKind::Loaded)),
        ["send ABORT", "reset"]
    );
}

/// A destination that speaks out of turn ends the migration, with the source running.
#[test]
fn messages_that_break_the_protocol_end_the_session_before_commit() {
    for message in [CommitMessage::Running, CommitMessage::Commit, CommitMessage::Loaded] {
        let mut machine = source_in(Phase::Precopy);
        assert_eq!(tell(&mut machine, received(message)), ["send ABORT", "roll back"]);
    }
    for message in [CommitMessage::Commit, CommitMessage::Loaded, CommitMessage::Running] {
        let mut machine = destination_in(Phase::Resuming);
        assert_eq!(tell_destination(&mut machine, arrived(message)), ["send ABORT", "reset"]);
    }
    // The destination may know before the source's engine that the last byte is out.
    let mut machine = source_in(Phase::StopCopy);
    assert!(tell(&mut machine, received(CommitMessage::Loaded)).is_empty());
    assert_eq!(tell(&mut machine, SourceInput::Advanced(Phase::AwaitLoaded)), ["append COMMIT"]);
}

/// What is stuck is reported, and still counts when it ends late.
#[test]
fn a_rollback_that_takes_too_long_is_in_doubt_until_it_ends() {
    let mut machine = source_in(Phase::Precopy);
    assert_eq!(machine.cancel(START), CancelAnswer::Accepted);
    source_actions(&mut machine);
    machine.handle_timeout(machine.poll_timeout().unwrap());
    assert_eq!(source_actions(&mut machine), ["finished in doubt: RollBackStuck"]);
    assert_eq!(tell(&mut machine, SourceInput::RolledBack), ["append ABORTED"]);
    assert_eq!(tell(&mut machine, SourceInput::Appended(RecordKind::Aborted)), ["finished cancelled"]);
}

/// F13-F15, F17-F19: what a restarted side does first, by what its journal says (C-REAPPEND).
#[test]
fn what_a_restart_does_first() {
    let source = |verdict| {
        source_actions(&mut SourceMachine::restarted(SESSION, verdict, SourceDeadlines::default(), START))
    };
    assert_eq!(source(SourceVerdict::RunHere { aborted: false }), ["send ABORT", "roll back"]);
    assert_eq!(source(SourceVerdict::RunHere { aborted: true }), ["append ABORTED"]);
    assert_eq!(source(SourceVerdict::Committed), ["append COMMIT"]);
    assert_eq!(source(SourceVerdict::RolledBack), ["append ROLLED_BACK"]);
    assert_eq!(source(SourceVerdict::Done), ["finished completed"]);
    let doubt = SourceVerdict::InDoubt(Doubt::OtherBoot);
    assert_eq!(source(doubt), ["finished in doubt: OtherBoot"]);

    let destination = |verdict, intact| {
        let deadlines = DestinationDeadlines::default();
        destination_actions(&mut DestinationMachine::restarted(SESSION, verdict, intact, deadlines, START))
    };
    assert_eq!(destination(DestinationVerdict::NeverRan, true), ["reset"]);
    assert_eq!(destination(DestinationVerdict::Hold, true), ["append LOADED"]);
    assert_eq!(destination(DestinationVerdict::Hold, false), ["reset"]);
    assert_eq!(destination(DestinationVerdict::Committed, true), ["append COMMITTED"]);
    assert_eq!(destination(DestinationVerdict::Committed, false), ["reset"]);
    assert_eq!(destination(DestinationVerdict::Abandoned, false), ["append ABANDONED"]);
    for ran in [true, false] {
        let verdict = DestinationVerdict::MayHaveRun { ran };
        assert_eq!(destination(verdict, true), ["finished in doubt: MayHaveRun"]);
    }
}

/// A restarted source whose journal fails again sends neither COMMIT nor ABORT: it may have sent
/// COMMIT in its earlier life. A new connection is a reason to try again.
#[test]
fn a_restarted_source_takes_no_commit_back() {
    let deadlines = SourceDeadlines::default();
    let mut machine = SourceMachine::restarted(SESSION, SourceVerdict::Committed, deadlines, START);
    source_actions(&mut machine);
    assert_eq!(
        tell(&mut machine, SourceInput::AppendFailed(RecordKind::Commit)),
        ["finished in doubt: Journal(Commit)"]
    );
    assert_eq!(tell(&mut machine, SourceInput::Reconnected), ["append COMMIT"]);
    assert_eq!(tell(&mut machine, SourceInput::Appended(RecordKind::Commit)), ["send COMMIT"]);
}

/// The other side's failure is the cause of this side's, word for word.
#[test]
fn the_other_sides_failure_is_kept_as_the_cause() {
    let mut machine = source_in(Phase::AwaitLoaded);
    let refused = Failure::new(Side::Destination, Phase::Load, "the device refused its state");
    machine.handle(received(CommitMessage::Abort(Box::new(refused.clone()))), START).unwrap();
    let cause = std::iter::from_fn(|| machine.poll_action()).find_map(|action| match action {
        SourceAction::RollBack { cause } => Some(cause),
        _ => None,
    });
    let cause = cause.unwrap();
    assert_eq!(cause.side, Side::Source);
    assert_eq!(cause.cause.as_deref(), Some(&refused));
    machine.handle(SourceInput::RolledBack, START).unwrap();
    let record = machine.poll_action();
    assert_eq!(record, Some(SourceAction::Append(Record::Aborted { cause })));
}
