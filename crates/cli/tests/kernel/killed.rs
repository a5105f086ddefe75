//! A process that is killed in each phase: nothing that it leaves keeps the next one from the devices.

use crate::common::Process;
use crate::support::{Ended, NIC, Pair, RUNNING, let_go, receive, side_by_side, start};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::os::fd::AsRawFd;

/// What a dead process has left of either device is left: real devices would be reset.
fn lasting_pair() -> Pair {
    let pair = Pair::new(64 << 10);
    pair.to.set("reset_on_close", "0");
    pair
}

/// Both sides, one of them held at the beginning of a phase.
fn held(pair: &Pair, side: &str, phase: &str) -> (Process, Process) {
    held_with(pair, side, phase, &[])
}

fn held_with(pair: &Pair, side: &str, phase: &str, sender: &[&str]) -> (Process, Process) {
    let (from, to) = (pair.from.named(NIC), pair.to.named(NIC));
    let hold = ["--supervised", "--hold-at", phase];
    let at = |wanted: &str| if side == wanted { &hold[..] } else { &[] };
    let receive =
        ["receive", "--no-guest", "--device", &to, "--hold", "--deadline", "commit=500ms", "tcp:127.0.0.1:0"];
    let receive = start(&[&receive, at("receive")].concat());
    let uri = receive.wait_for("listening")["uri"].as_str().unwrap().to_owned();
    let send = ["send", "--no-guest", "--device", &from, "--deadline", "commit=500ms"];
    let send = start(&[&send, sender, at("send"), &[uri.as_str()]].concat());
    let held = if side == "send" { &send } else { &receive };
    held.wait_for("held");
    (send, receive)
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn after_a_killed_sender_both_devices_are_usable() {
    let phases = ["setup", "precopy", "quiesce", "stop-copy", "load", "commit"];
    side_by_side(&phases, |phases| {
        let pair = &lasting_pair();
        for phase in phases {
            pair.from.fill(8);
            let (send, receive) = held(pair, "send", phase);
            send.kill();
            let received = Ended::of(receive);
            assert_eq!(received.result["outcome"], "aborted", "{phase}: {:#}", received.result);
            assert_eq!(received.result["destination_running"], false, "{phase}: {:#}", received.result);
            let left = pair.from.number("state");
            let (sent, _) = pair.migrate();
            // A device that was left stopped has lost what it held, and that is said.
            assert_eq!(sent.notes().contains("was reset first"), left != RUNNING, "{phase}: {left}");
        }
    });
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn after_a_sender_that_was_killed_before_it_said_anything_the_receiver_takes_the_next_one() {
    let pair = Pair::new(64 << 10);
    pair.from.fill(8);
    let before = (pair.from.touched(), pair.to.touched());
    let (receive, uri) = receive(&["--device", &pair.to.named(NIC), "--hold"]);
    let from = pair.from.named(NIC);
    let hold = ["send", "--no-guest", "--device", &from, "--supervised", "--hold-at", "negotiate", &uri];
    let send = start(&hold);
    send.wait_for("held");
    send.kill();
    assert_eq!((pair.from.touched(), pair.to.touched()), before);
    crate::support::send(&["--device", &from], &uri).must("completed", 0);
    receive.wait_for("holding");
    assert_eq!(pair.to.get("digest"), pair.from.get("digest"));
    let_go(receive).must("completed", 0);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn after_a_killed_receiver_the_source_runs_and_both_devices_are_usable() {
    // The side that is held there, so that the receiver is killed at that point.
    let points = [
        ("receive", "negotiate"),
        ("send", "setup"),
        ("send", "precopy"),
        ("send", "quiesce"),
        ("send", "stop-copy"),
        ("receive", "load"),
    ];
    side_by_side(&points, |points| {
        let pair = &lasting_pair();
        for (side, phase) in points {
            pair.from.fill(8);
            let digest = pair.from.get("digest");
            let (mut send, receive) = held(pair, side, phase);
            receive.kill();
            if *side == "send" {
                send.tell("go");
            }
            let sent = Ended::of(send);
            let result = sent.must("aborted", 1);
            assert_eq!(result["source_running"], true, "{phase}: {result:#}");
            assert_eq!((pair.from.number("state"), pair.from.get("digest")), (RUNNING, digest), "{phase}");
            let left = pair.to.number("state");
            let (_, received) = pair.migrate();
            assert_eq!(received.notes().contains("was reset first"), left != RUNNING, "{phase}: {left}");
        }
    });
}

// K-LAST-CLOSE
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn in_doubt_after_a_killed_receiver_the_only_copy_is_held_and_can_be_brought_back() {
    let dir = tempfile::tempdir().unwrap();
    let journal = dir.path().to_str().unwrap();
    let pair = Pair::new(64 << 10);
    pair.from.fill(8);
    let digest = pair.from.get("digest");
    // As real devices do it: what it holds is gone when it is closed.
    pair.from.set("reset_on_close", "1");
    let (send, receive) = held_with(&pair, "receive", "run", &["--journal", journal]);
    receive.kill();
    let holding = send.wait_for("holding");
    assert!(holding["reason"].as_str().unwrap().contains("only copy"), "{holding:#}");
    assert_ne!(pair.from.number("state"), RUNNING);
    assert_eq!(pair.from.get("digest"), digest);

    // As its advice says.
    let number = i32::try_from(holding["descriptors"][0].as_i64().unwrap()).unwrap();
    let process = pidfd_open(send.pid(), PidfdFlags::empty()).unwrap();
    let fd = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap();
    let result = let_go(send).must("in_doubt", 3).clone();
    assert_eq!(
        (&result["source_running"], &result["destination_running"]),
        (&false.into(), &"unknown".into())
    );
    assert!(result["notes"].to_string().contains("pidfd_getfd"), "{result:#}");
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
    let device = format!("{NIC}=fd:{}", fd.as_raw_fd());
    let resolved = Ended::of(start(&["resolve", "--journal", journal, "--run-here", "--device", &device]));
    let resolved = resolved.must("completed", 0);
    assert_eq!(resolved["source_running"], true, "{resolved:#}");
    assert_eq!((pair.from.number("state"), pair.from.get("digest")), (RUNNING, digest));
    drop(fd);
    pair.from.set("reset_on_close", "0");
    pair.migrate();
}
