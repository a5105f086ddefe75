//! The destination against strangers, users who change their mind, devices and machines that fail to
//! start, and connections that are cut at the worst moment.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod support;

use airlift::core::commit::RecordKind;
use airlift::core::{Arc as StateArc, DeviceId, DeviceState, Errno};
use airlift::{CancelAnswer, Ended, MachineError, Outcome, PendingInterrupt, Running};
use airlift_softdevice::{FailArc, SoftDeviceOptions};
use airlift_stream::Message;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{GENEROUS, Log, Pair, place, small, wait_for};

/// Longer than any test: what waits for it hangs.
const FOR_EVER: Duration = Duration::from_secs(3600);

fn completed((sent, received): &(Ended, Ended)) {
    assert_eq!(sent.report.outcome, Outcome::Completed, "{:?}", sent.report.error);
    assert_eq!(received.report.outcome, Outcome::Completed, "{:?}", received.report.error);
    assert_eq!(received.report.destination_running, Running::Yes);
}

/// The guest is back on the source, and what both share was free before the source took it.
fn went_back((sent, received): &(Ended, Ended), log: &Log) {
    assert_eq!(received.report.outcome, Outcome::Aborted, "{:?}", received.report.error);
    assert_eq!(received.report.destination_running, Running::No);
    assert_eq!(sent.report.outcome, Outcome::Aborted, "{:?}", sent.report.error);
    assert_eq!(sent.report.source_running, Running::Yes);
    let calls = ["destination reclaim_shared", "destination release_shared", "source reclaim_shared"];
    let places = calls.map(|call| place(log, call));
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{:?}", log.lock().unwrap());
    assert_eq!(place(log, "destination resume"), None, "a vCPU was asked for");
}

/// Connects and says nothing, or a byte now and then.
fn strangers(path: &Path) -> Vec<UnixStream> {
    let strangers: Vec<_> = (0..4).map(|_| UnixStream::connect(path).unwrap()).collect();
    let mut dripping = strangers[0].try_clone().unwrap();
    std::thread::spawn(move || {
        for byte in Message::Ping(1).encode(0).unwrap().into_iter().cycle() {
            if dripping.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    strangers
}

// W-FIRST: before the source comes, and while its data connections come.
#[test]
fn who_connects_and_says_nothing_keeps_no_source_waiting() {
    let mut pair = Pair::new();
    pair.destination_options.deadlines.silence = FOR_EVER;
    let path = pair.path.clone();
    let later = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&later);
    pair.destination.hook = Box::new(move |call| {
        if call == "blockers" {
            keep.lock().unwrap().extend(strangers(&path));
        }
        Ok(())
    });
    let path = pair.path.clone();
    let listening = pair.listen();
    let earlier = strangers(&path);
    completed(&listening.migrate());
    drop((earlier, later));
}

// W-FIRST
#[test]
fn a_listening_destination_can_be_cancelled_whoever_is_connected() {
    let mut pair = Pair::new();
    pair.destination_options.deadlines.silence = FOR_EVER;
    let (path, accepts) = (pair.path.clone(), Arc::clone(&pair.accepts));
    let listening = pair.listen();
    let guests = strangers(&path);
    let before = accepts.load(Ordering::SeqCst);
    wait_for("the next look", || accepts.load(Ordering::SeqCst) > before + 1);
    assert_eq!(listening.control.cancel(), CancelAnswer::Accepted);
    let ended = listening.received.recv_timeout(GENEROUS).expect("the cancel is not heard");
    assert_eq!(ended.report.outcome, Outcome::Cancelled);
    drop(guests);
}

// C-CANCEL, C-HOLD: the connection is lost, COMMIT has not come, and the user has had enough.
#[test]
fn a_destination_that_awaits_its_source_hears_a_cancel() {
    let mut pair = Pair::new();
    pair.destination_options.deadlines.commit = FOR_EVER;
    pair.source_options.deadlines.commit = Duration::from_millis(500);
    let (wires, accepts) = (pair.wires.clone(), Arc::clone(&pair.accepts));
    let control: Arc<Mutex<Option<airlift::Control>>> = Arc::default();
    let (handle, answer) = (Arc::clone(&control), Arc::new(Mutex::new(None)));
    let given = Arc::clone(&answer);
    pair.source_journal.hook = Box::new(move |record| {
        if record.kind() == RecordKind::Commit {
            let before = accepts.load(Ordering::SeqCst);
            wires.cut_for_good();
            wait_for("the wait for the source", || accepts.load(Ordering::SeqCst) > before + 2);
            *given.lock().unwrap() = handle.lock().unwrap().as_ref().map(airlift::Control::cancel);
        }
    });
    let records = Arc::clone(&pair.destination_journal.records);
    let listening = pair.listen();
    *control.lock().unwrap() = Some(listening.control.clone());
    let (sent, received) = listening.migrate();
    assert_eq!(*answer.lock().unwrap(), Some(CancelAnswer::Accepted));
    assert_eq!(received.report.outcome, Outcome::Cancelled);
    assert_eq!(records.lock().unwrap().last().unwrap().kind(), RecordKind::Abandoned);
    // It committed and cannot ask: that is not the destination's to mend.
    assert_eq!(sent.report.outcome, Outcome::InDoubt);
}

// C-ABANDONED: ABANDONED lets the source run, so everything that it needs must be free by then.
#[test]
fn devices_that_do_not_start_leave_what_is_shared_to_the_source() {
    let mut pair = Pair::new();
    let arc = StateArc::new(DeviceState::Stop, DeviceState::RunningP2p);
    let fail_arc = Some(FailArc { arc, errno: Errno::EIO, to_error: false });
    pair.destination_device = SoftDeviceOptions { fail_arc, ..small() };
    let listening = pair.listen();
    let log = Arc::clone(&listening.log);
    went_back(&listening.migrate(), &log);
}

fn refuses_interrupts(pair: &mut Pair) -> impl FnMut(&str) -> Result<(), MachineError> + use<> {
    let device = DeviceId::new("nic0").unwrap();
    pair.source.pending = vec![PendingInterrupt { device, index: 2, vector: 0, count: 1 }];
    |call| match call {
        "inject_interrupts" => Err(MachineError::new(call, "no such vector")),
        _ => Ok(()),
    }
}

// C-MAY-HAVE-RUN: what fails before a vCPU was asked for can be taken back.
#[test]
fn interrupts_that_cannot_be_given_send_the_guest_back() {
    let mut pair = Pair::new();
    pair.destination.hook = Box::new(refuses_interrupts(&mut pair));
    let listening = pair.listen();
    let log = Arc::clone(&listening.log);
    went_back(&listening.migrate(), &log);
    assert!(place(&log, "destination close_device_access").is_some(), "access stays open");
}

// C-ABANDONED: what cannot be given up again may not be said to be free.
#[test]
fn a_machine_that_keeps_what_is_shared_leaves_both_in_doubt() {
    let mut pair = Pair::new();
    pair.source_options.deadlines.commit = Duration::from_millis(500);
    let mut refuse = refuses_interrupts(&mut pair);
    pair.destination.hook = Box::new(move |call| match call {
        "release_shared" => Err(MachineError::new(call, "the lock is stuck")),
        _ => refuse(call),
    });
    let listening = pair.listen();
    let log = Arc::clone(&listening.log);
    let (sent, received) = listening.migrate();
    assert_eq!(received.report.outcome, Outcome::InDoubt);
    assert_eq!(sent.report.outcome, Outcome::InDoubt);
    assert_eq!(place(&log, "source resume"), None);
}

// W-DONE: the connection is cut after COMMIT and before RUNNING.
#[test]
fn a_lost_running_is_said_again() {
    let mut pair = Pair::new();
    let wires = pair.wires.clone();
    pair.destination.hook = Box::new(move |call| {
        if call == "resume" {
            wires.cut();
        }
        Ok(())
    });
    completed(&pair.listen().migrate());
}

// W-DONE, C-ABANDONED: the same with ABANDONED.
#[test]
fn a_lost_abandoned_is_said_again() {
    let mut pair = Pair::new();
    let wires = pair.wires.clone();
    let mut refuse = refuses_interrupts(&mut pair);
    pair.destination.hook = Box::new(move |call| {
        if call == "release_shared" {
            wires.cut();
        }
        refuse(call)
    });
    let listening = pair.listen();
    let log = Arc::clone(&listening.log);
    went_back(&listening.migrate(), &log);
}

// W-DONE: a source that dies after RUNNING was said does not keep its destination for long.
#[test]
fn a_source_that_is_gone_is_not_awaited_for_ever() {
    let mut pair = Pair::new();
    pair.destination_options.deadlines.commit = FOR_EVER;
    pair.destination_options.deadlines.linger = Duration::from_millis(100);
    pair.source_options.deadlines.commit = Duration::from_millis(500);
    let wires = pair.wires.clone();
    pair.destination.hook = Box::new(move |call| {
        if call == "resume" {
            wires.cut_for_good();
        }
        Ok(())
    });
    let (sent, received) = pair.listen().migrate();
    assert_eq!(received.report.outcome, Outcome::Completed, "{:?}", received.report.error);
    assert_eq!(sent.report.outcome, Outcome::InDoubt);
}
