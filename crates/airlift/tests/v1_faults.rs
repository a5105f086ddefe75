//! A device of interface v1 that fails at any access, on either side, and connections that are cut at any
//! of them: the guest never runs twice, and either it runs on or the report says why not.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod fakes;

use airlift::core::{DeviceState, Errno, MigrationDevice, ResetPolicy};
use airlift::{MigrationReport, Outcome, Running};
use fakes::sides::{Sides, words};
use fakes::v1::{Region, Wrong, bytes};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const ALL: [Wrong; 4] = [Wrong::Refused, Wrong::Error, Wrong::Reset, Wrong::Gone];

fn regions() -> (Region, Region, Vec<u8>) {
    let (precopy, stopped) = (vec![bytes(1, 300), bytes(2, 700)], vec![bytes(3, 900), bytes(4, 5)]);
    let all = [precopy.concat(), stopped.concat()].concat();
    (Region::new(1000).with(precopy, stopped), Region::new(512), all)
}

fn boxed(region: &Region) -> Vec<Box<dyn MigrationDevice>> {
    vec![Box::new(region.device("nic0", false))]
}

/// What must hold whatever has failed.
fn check(
    what: &str,
    (sent, received): &(MigrationReport, MigrationReport),
    (here, there): (&Region, &Region),
    all: &[u8],
) {
    let story = format!("{what}\n{}\n{}", words(sent), words(received));
    let runs = |report: &MigrationReport, side: fn(&MigrationReport) -> Running| side(report) == Running::Yes;
    let (source, destination) = (runs(sent, |r| r.source_running), runs(received, |r| r.destination_running));
    assert!(!(source && destination), "both run: {story}");
    match sent.outcome {
        Outcome::Completed => {
            assert!(destination && !source, "nobody runs: {story}");
            assert_eq!(there.state_now(), DeviceState::Running, "{story}");
            let ran = there.started_with();
            assert!(ran == all, "it runs with {} bytes: {story}", ran.len());
        }
        Outcome::Aborted => {
            assert!(source, "the guest does not run on: {story}");
            let error = sent.error.as_ref().unwrap();
            assert!(!error.message.is_empty(), "{story}");
            assert_ne!(received.outcome, Outcome::Completed, "{story}");
            if here.state_now() != DeviceState::Running {
                // One that fails before anything was done with it is named by the error, and left as it is.
                let touched = !sent.devices[0].transitions.is_empty();
                if !touched {
                    assert!(error.device.is_some(), "{story}");
                    return;
                }
                let given_up = sent.notes.iter().any(|n| n.starts_with("nic0: given up: "));
                assert!(given_up, "its device is in {} without a word: {story}", here.state_now());
                let said = sent.devices[0].quarantined.as_ref();
                assert!(said.is_some_and(|why| !why.is_empty()), "{story}");
            }
        }
        other => panic!("{other:?}: {story}"),
    }
}

/// Runs `one` for every access from 0 until it says that there was no such access, on two threads.
fn for_every_access(one: impl Fn(u64) -> bool + Sync) -> u64 {
    let next = AtomicU64::new(0);
    let end = Mutex::new(u64::MAX);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let access = next.fetch_add(1, Ordering::SeqCst);
                    if access >= *end.lock().unwrap() {
                        return;
                    }
                    assert!(access < 1000, "there is no end");
                    if !one(access) {
                        let mut end = end.lock().unwrap();
                        *end = access.min(*end);
                    }
                }
            });
        }
    });
    end.into_inner().unwrap()
}

fn sides() -> Sides {
    let mut sides = Sides::new();
    // A destination that has said LOADED holds for this long when its source is not heard any more.
    sides.destination.deadlines.commit = Duration::from_secs(5);
    sides
}

/// Lets each access of one side go wrong in each way. How many accesses went wrong.
fn every_fault(at_source: bool) -> u64 {
    let mut count = 0;
    for wrong in ALL {
        count += for_every_access(|access| {
            let (here, there, all) = regions();
            let devices = (boxed(&here), boxed(&there));
            let region = if at_source { &here } else { &there };
            let first = region.accesses();
            region.wrong(first + access, wrong);
            let reports = sides().migrate(devices.0, devices.1);
            check(&format!("{wrong:?} at access {access}"), &reports, (&here, &there), &all);
            region.accesses() > first + access
        });
    }
    count
}

// V1-LOOP-ERROR, V1-READBACK, V1-RESET
#[test]
fn whatever_access_of_the_sources_device_fails_the_guest_runs_once_or_the_report_says_why() {
    let count = every_fault(true);
    assert!(count > 100, "{count} accesses");
}

// V1-LOOP-ERROR, V1-READBACK, V1-RESET
#[test]
fn whatever_access_of_the_destinations_device_fails_the_guest_runs_once_or_the_report_says_why() {
    let count = every_fault(false);
    assert!(count > 80, "{count} accesses");
}

#[test]
fn connections_that_are_cut_at_any_access_leave_one_guest() {
    for at_source in [true, false] {
        let count = for_every_access(|access| {
            let (here, there, all) = regions();
            let devices = (boxed(&here), boxed(&there));
            let region = if at_source { &here } else { &there };
            let first = region.accesses();
            let sides = sides();
            let wires = sides.wires.clone();
            region.at_access(first + access, move || wires.cut());
            let reports = sides.migrate(devices.0, devices.1);
            check(&format!("cut at access {access}"), &reports, (&here, &there), &all);
            region.accesses() > first + access
        });
        assert!(count > 10, "{count} accesses");
    }
}

/// A device that fails in the stop.
fn stuck_in_error(policy: ResetPolicy) -> (MigrationReport, Region) {
    let (here, there, _) = regions();
    let devices = (boxed(&here), boxed(&there));
    here.fail_entry(DeviceState::StopCopy);
    let mut sides = sides();
    sides.source.reset_policy = policy;
    let (sent, received) = sides.migrate(devices.0, devices.1);
    assert_eq!((sent.outcome, sent.source_running), (Outcome::Aborted, Running::Yes), "{}", words(&sent));
    assert_ne!(received.destination_running, Running::Yes);
    (sent, here)
}

// V1-READBACK
#[test]
fn a_device_that_is_in_error_after_a_failed_stop_is_named_with_what_a_reset_would_cost() {
    let (sent, here) = stuck_in_error(ResetPolicy::Never);
    assert_eq!(here.state_now(), DeviceState::Error);
    let error = sent.error.as_ref().unwrap();
    assert_eq!(error.device.as_ref().map(|id| id.as_str()), Some("nic0"));
    assert_eq!((error.state, error.errno), (Some(DeviceState::Error), Some(Errno::EIO)), "{error}");
    let advice = error.advice.as_ref().unwrap();
    assert!(advice.contains("only a reset") && advice.contains("destroys what the guest has"), "{advice}");
    let why = sent.devices[0].quarantined.as_ref().unwrap();
    assert!(why.contains("ERROR") && why.contains("a reset destroys what the guest has in it"), "{why}");
    assert!(why.contains("restart the guest"), "{why}");
    assert!(!sent.devices[0].was_reset);
}

// V1-READBACK
#[test]
fn a_device_that_is_in_error_after_a_failed_stop_is_reset_where_that_is_allowed() {
    let (sent, here) = stuck_in_error(ResetPolicy::Allowed);
    assert_eq!(here.state_now(), DeviceState::Running);
    assert!(sent.devices[0].was_reset);
    let lost = sent.notes.iter().any(|n| n.contains("nic0: was reset; what the guest had in it is lost"));
    assert!(lost, "{}", words(&sent));
}

// V1-READBACK
#[test]
fn a_destinations_device_that_refuses_what_was_loaded_costs_nothing() {
    let (here, there, _) = regions();
    let devices = (boxed(&here), boxed(&there));
    there.make_picky();
    let (sent, received) = sides().migrate(devices.0, devices.1);
    assert_eq!((sent.outcome, sent.source_running), (Outcome::Aborted, Running::Yes), "{}", words(&sent));
    assert_eq!((here.state_now(), there.state_now()), (DeviceState::Running, DeviceState::Running));
    assert!(there.loaded().is_empty(), "it was not reset");
    let story = words(&sent);
    assert!(story.contains("refused the state") && story.contains("EINVAL"), "{story}");
    assert_ne!(received.destination_running, Running::Yes);
}

// V1-RESET
#[test]
fn the_report_says_that_a_device_was_reset_and_not_that_it_is_done() {
    for at_source in [true, false] {
        let (here, there, _) = regions();
        let devices = (boxed(&here), boxed(&there));
        let region = if at_source { &here } else { &there };
        region.reset_after(600);
        let (sent, _) = sides().migrate(devices.0, devices.1);
        assert_eq!((sent.outcome, sent.source_running), (Outcome::Aborted, Running::Yes), "{}", words(&sent));
        let story = words(&sent);
        assert!(story.contains("was reset"), "{story}");
        assert!(story.contains("log"), "it says where to look: {story}");
    }
}
