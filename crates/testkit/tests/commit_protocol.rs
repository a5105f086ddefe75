//! The commit protocol, explored: never two live sides, never a guest that goes on twice, in doubt
//! only where the destination may have run and died, and every rule missed when it is left out.
//!
//! The bound is three faults at any moments, beside any loss, repetition, deadline and cancel. It takes
//! some ten seconds a core and 600 MB for each kind of journal. `AIRLIFT_SIMULATOR_FAULTS` sets another
//! bound; with fewer than three the floors are not asserted.

use airlift_core::commit::Durability;
use airlift_testkit::simulator::{Breakage, Message, Options, Report, Step, Violation, explore};
use std::collections::BTreeSet;

const FAULTS: u8 = 3;

/// What an exploration may not fall below: states, steps, boundaries. A change of the protocol that
/// makes the space smaller lowers these on purpose, with the reason in the change.
const FLOOR_PROCESS: [usize; 3] = [1_135_000, 10_300_000, 3_250];
const FLOOR_POWER: [usize; 3] = [1_681_000, 14_780_000, 3_000];

fn faults() -> u8 {
    std::env::var("AIRLIFT_SIMULATOR_FAULTS")
        .map_or(FAULTS, |faults| faults.parse().expect("AIRLIFT_SIMULATOR_FAULTS is a small number"))
}

/// The kinds of states that need an operator, without the details: what the source is, and whether
/// the destination says so or is just finding out.
fn kinds(report: &Report) -> BTreeSet<(&'static str, &'static str)> {
    report
        .in_doubt
        .iter()
        .map(|kind| {
            let source = match kind.source {
                "journal-commit" | "committed" => "committed",
                "finishing" | "closing" | "done" => "done",
                other => other,
            };
            let destination = match (kind.destination, kind.destination_devices) {
                ("doubt" | "ran", _) => "may have run and died",
                ("starting-vcpus", false) => "dies while it starts",
                (other, _) => other,
            };
            (source, destination)
        })
        .collect()
}

fn explored(durability: Durability, floor: [usize; 3]) -> Report {
    let report = explore(&Options { durability, faults: faults(), breakage: Breakage::None });
    println!("{durability:?}: {report}");
    assert!(report.violation.is_none(), "{report}");
    let found = [report.states, report.steps, report.boundaries];
    assert!(
        faults() < FAULTS || found.iter().zip(floor).all(|(found, floor)| *found >= floor),
        "explored {found:?}, less than {floor:?}"
    );
    report
}

/// The states that need an operator, all of them. They have one thing in common: as far as anybody can
/// prove, the destination may have run, and it has died.
fn expected_kinds() -> BTreeSet<(&'static str, &'static str)> {
    BTreeSet::from([
        ("committed", "may have run and died"),
        ("committed", "dies while it starts"),
        ("done", "may have run and died"),
        ("doubt", "may have run and died"),
        ("doubt", "dies while it starts"),
    ])
}

// I1, I3, I4
#[test]
fn never_two_sides_with_a_journal_that_survives_the_process() {
    let report = explored(Durability::Process, FLOOR_PROCESS);
    assert_eq!(kinds(&report), expected_kinds());
}

#[test]
fn never_two_sides_with_a_journal_that_survives_power_loss() {
    let report = explored(Durability::Power, FLOOR_POWER);
    assert_eq!(kinds(&report), expected_kinds());
}

/// Without faults no state needs anybody: every loss, delay, repetition and cancel is healed by
/// reconnection alone.
#[test]
fn without_faults_nothing_is_in_doubt() {
    for durability in [Durability::Process, Durability::Power] {
        let report = explore(&Options { durability, faults: 0, breakage: Breakage::None });
        assert!(report.violation.is_none(), "{report}");
        assert_eq!(report.states_in_doubt, 0, "{report}");
    }
}

/// Explores with a rule left out and hands back what went wrong and how.
fn broken(breakage: Breakage, durability: Durability, faults: u8) -> (Violation, Vec<Step>) {
    let report = explore(&Options { durability, faults, breakage });
    println!("{breakage:?}: {report}");
    report.violation.expect("the exploration misses the rule")
}

/// C-ABANDONED.
#[test]
fn an_abandon_without_a_record_is_caught() {
    let (violation, way) = broken(Breakage::AbandonUnrecorded, Durability::Process, 0);
    assert_eq!(violation, Violation::BothLive);
    assert!(way.contains(&Step::SayAbandoned));
}

/// C-COMMIT-HOLD.
#[test]
fn a_source_that_resumes_by_itself_is_caught() {
    let (violation, _) = broken(Breakage::ResumeOnTimeout, Durability::Power, 0);
    assert_eq!(violation, Violation::BothLive);
}

/// C-BOOT.
#[test]
fn a_journal_of_another_boot_taken_at_its_word_is_caught() {
    let (violation, way) = broken(Breakage::IgnoreBootId, Durability::Process, 1);
    assert_eq!(violation, Violation::BothLive);
    assert!(way.iter().any(|step| matches!(step, Step::PowerLoss { .. })));
}

/// C-COMMIT-DURABLE.
#[test]
fn a_commit_sent_ahead_of_its_record_is_caught() {
    let (violation, way) = broken(Breakage::SendBeforeJournal, Durability::Power, 1);
    assert_eq!(violation, Violation::BothLive);
    assert!(way.contains(&Step::Deliver(Message::Commit)));
}

/// C-RUN-STARTED.
#[test]
fn a_destination_that_runs_ahead_of_its_records_is_caught() {
    let (violation, _) = broken(Breakage::RunBeforeCommitted, Durability::Power, 1);
    assert_eq!(violation, Violation::Forked);
}

/// C-ABANDONED.
#[test]
fn an_abandon_without_a_reset_is_caught() {
    let (violation, _) = broken(Breakage::AbandonWithoutReset, Durability::Process, 1);
    assert_eq!(violation, Violation::BothLive);
}

/// C-REAPPEND.
#[test]
fn a_restart_that_trusts_what_it_reads_back_is_caught() {
    let (violation, _) = broken(Breakage::NoReappend, Durability::Power, 2);
    assert_eq!(violation, Violation::BothLive);
}

/// C-JOURNAL-SYNC.
#[test]
fn an_aborted_that_a_power_loss_takes_is_caught() {
    let (violation, _) = broken(Breakage::AbortedUnsynced, Durability::Process, 2);
    assert_eq!(violation, Violation::Forked);
}

/// C-INTACT.
#[test]
fn a_restart_that_takes_reset_devices_for_loaded_ones_is_caught() {
    let (violation, _) = broken(Breakage::AssumeIntact, Durability::Process, 2);
    assert_eq!(violation, Violation::StartedEmpty);
}
