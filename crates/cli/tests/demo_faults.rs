//! Every fault at every phase, each followed by a second migration.
//!
//! Before COMMIT: the source's devices and the guest run on, nothing is missing or doubled, and a
//! second migration succeeds. After COMMIT: completed or in doubt. Never both sides: that the demo
//! finds out by itself, from the run logs of both, and it turns into an error here.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod common;

use common::{Demo, assert_all_right, assert_arrived, demo};

const BEFORE_COMMIT: [&str; 6] = ["negotiate", "setup", "precopy", "quiesce", "stop-copy", "load"];
const FROM_COMMIT: [&str; 2] = ["commit", "run"];

/// Runs `one` for each phase; the demos of a file run two at a time.
fn each(phases: &[&str], one: impl Fn(&str) + Sync) {
    std::thread::scope(|scope| {
        for phase in phases {
            scope.spawn(|| one(phase));
        }
    });
}

/// Never both: the demo names it in these words.
#[track_caller]
fn assert_never_both(demo: &Demo) {
    let text = demo.result.to_string();
    assert!(!text.contains("both sides were live"), "{}", demo.story());
    assert!(!text.contains("defect"), "{}", demo.story());
    let both = demo.result["source_running"] == true && demo.result["destination_running"] == true;
    assert!(!both, "{}", demo.story());
}

#[track_caller]
fn assert_fault_was_placed(demo: &Demo) {
    assert!(!demo.result["notes"].to_string().contains("fault was not placed"), "{}", demo.story());
}

/// The guest and all of its devices run on the source, and the second migration succeeds.
#[track_caller]
fn assert_went_back(demo: &Demo, outcome: &str, code: i32) {
    let story = demo.story();
    assert_never_both(demo);
    assert_fault_was_placed(demo);
    assert_eq!(demo.result["outcome"], outcome, "{story}");
    assert_eq!(demo.result["source_running"], true, "{story}");
    assert_eq!(demo.result["destination_running"], false, "{story}");
    assert_eq!(demo.code, code, "{story}");
    assert!(!demo.result["error"]["message"].as_str().unwrap().is_empty(), "{story}");
    assert_all_right(&demo.result, &story);
    assert_arrived(&demo.result["retry"], &format!("the second migration: {story}"));
}

/// Completed and verified, or in doubt with the guest on neither side, or, where the destination
/// could still say that it never ran, back on the source.
#[track_caller]
fn assert_past_commit(demo: &Demo) {
    let story = demo.story();
    assert_never_both(demo);
    assert_fault_was_placed(demo);
    match demo.result["outcome"].as_str().unwrap() {
        "completed" => assert_arrived(&demo.result, &story),
        "in_doubt" => {
            assert_eq!(demo.code, 3, "{story}");
            assert_eq!(demo.result["source_running"], false, "{story}");
            assert_eq!(demo.result["destination_running"], false, "{story}");
        }
        "aborted" | "cancelled" => {
            assert_eq!(demo.result["source_running"], true, "{story}");
            assert_all_right(&demo.result, &story);
            assert_arrived(&demo.result["retry"], &story);
        }
        other => panic!("{other}: {story}"),
    }
}

fn kill(victim: &str, phase: &str) -> Demo {
    demo(&["--kill", &format!("{victim}@{phase}"), "--retry"])
}

// I1, I2, I18
#[test]
fn a_killed_receiver_leaves_the_guest_on_the_source() {
    each(&BEFORE_COMMIT, |phase| assert_went_back(&kill("receiver", phase), "aborted", 1));
}

#[test]
fn a_killed_destination_device_leaves_the_guest_on_the_source() {
    each(&BEFORE_COMMIT, |phase| {
        let demo = kill("destination-device", phase);
        assert_went_back(&demo, "aborted", 1);
        assert!(demo.result["error"].to_string().contains("dev0"), "the device is named: {}", demo.story());
    });
}

#[test]
fn a_cut_connection_leaves_the_guest_on_the_source() {
    each(&BEFORE_COMMIT, |phase| assert_went_back(&demo(&["--cut", phase, "--retry"]), "aborted", 1));
}

// I2, I17
#[test]
fn a_cancel_leaves_the_guest_on_the_source() {
    each(&BEFORE_COMMIT, |phase| assert_went_back(&demo(&["--cancel", phase, "--retry"]), "cancelled", 5));
}

#[test]
fn after_a_killed_sender_the_journal_lets_the_guest_run_on_the_source() {
    each(&BEFORE_COMMIT, |phase| {
        let demo = kill("sender", phase);
        assert_went_back(&demo, "aborted", 1);
        assert!(demo.result["notes"].to_string().contains("run here again"), "{}", demo.story());
    });
}

/// The device had given all that it has before it was killed: workers read it as soon as it is in
/// STOP_COPY. Then nothing is missing.
fn had_given_all(demo: &Demo, phase: &str) -> bool {
    let completed = phase == "stop-copy" && demo.result["outcome"] == "completed";
    if completed {
        assert_past_commit(demo);
    }
    completed
}

#[test]
fn a_killed_source_device_is_named_and_the_others_run_on() {
    each(&BEFORE_COMMIT[..5], |phase| {
        let demo = kill("source-device", phase);
        let story = demo.story();
        assert_never_both(&demo);
        if had_given_all(&demo, phase) {
            return;
        }
        assert_eq!(demo.result["outcome"], "aborted", "{story}");
        assert_eq!(demo.result["source_running"], true, "{story}");
        assert_eq!(demo.code, 6, "{story}");
        assert_eq!(demo.result["error"]["device"], "dev0", "{story}");
        let devices = demo.result["devices"].as_array().unwrap();
        let by = |id: &str| devices.iter().find(|d| d["id"] == id).unwrap();
        assert!(by("dev0")["quarantined"].is_string(), "{story}");
        assert_eq!(by("dev1")["verified"], true, "{story}");
        assert_eq!(by("dev1")["quarantined"], serde_json::Value::Null, "{story}");
        assert_eq!(demo.result["memory"]["verified"], true, "{story}");
    });
}

// I1, I3, I4
#[test]
fn from_commit_on_it_is_completed_or_in_doubt_and_never_both() {
    each(&FROM_COMMIT, |phase| {
        for victim in ["receiver", "destination-device", "source-device", "sender"] {
            assert_past_commit(&kill(victim, phase));
        }
        assert_past_commit(&demo(&["--cut", phase, "--retry"]));
        assert_past_commit(&demo(&["--cancel", phase, "--retry"]));
    });
}

#[test]
fn a_source_device_that_dies_when_everything_has_left_it_changes_nothing() {
    assert_past_commit(&kill("source-device", "load"));
}

/// A fault at `phase`, with devices of interface v1 among the others.
fn mixed(fault: &str, at: &str) -> Demo {
    demo(&["--interface", "mixed", fault, at, "--retry"])
}

// I1, I2, I17: what happens between the two hosts does not depend on the interface.
#[test]
fn with_devices_of_interface_v1_the_guest_is_left_on_the_source_too() {
    each(&BEFORE_COMMIT, |phase| {
        assert_went_back(&mixed("--cut", phase), "aborted", 1);
        assert_went_back(&mixed("--cancel", phase), "cancelled", 5);
        // dev0 is the one with v1: it is what dies on the destination.
        let killed = mixed("--kill", &format!("destination-device@{phase}"));
        assert_went_back(&killed, "aborted", 1);
        assert!(killed.result["error"].to_string().contains("dev0"), "{}", killed.story());
        let notes = killed.result["retry"]["notes"].to_string();
        assert!(notes.contains("interface v1"), "of the second migration too: {}", killed.story());
    });
    each(&FROM_COMMIT, |phase| {
        assert_past_commit(&mixed("--kill", &format!("receiver@{phase}")));
        assert_past_commit(&mixed("--cut", phase));
    });
}

#[test]
fn a_killed_source_device_of_interface_v1_is_named_and_the_others_run_on() {
    each(&["precopy", "stop-copy"], |phase| {
        let demo = mixed("--kill", &format!("source-device@{phase}"));
        let story = demo.story();
        assert_never_both(&demo);
        if had_given_all(&demo, phase) {
            return;
        }
        assert_eq!((demo.code, &demo.result["error"]["device"]), (6, &"dev0".into()), "{story}");
        assert_eq!(demo.result["source_running"], true, "{story}");
        assert_eq!(demo.result["devices"][1]["verified"], true, "{story}");
    });
}

// I17
#[test]
fn a_cancel_after_commit_is_refused_and_the_migration_completes() {
    let demo = demo(&["--cancel", "run"]);
    demo.assert_completed();
    let answers = demo.events("cancel", "source", "send");
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert_eq!(answers[0]["answer"], "too-late");
}

#[test]
fn a_person_is_told_where_the_guest_runs() {
    let output = std::process::Command::new(common::AIRLIFT)
        .args(["demo", "--state-size", "4MiB", "--memory", "16MiB", "--kill", "receiver@load"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("Failed: "), "{text}");
    assert!(text.contains("where:   source"), "{text}");
    let last = "The guest runs on the source, with nothing missing, doubled or changed.";
    assert!(text.trim_end().ends_with(last), "{text}");
}
