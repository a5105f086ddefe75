//! A device that somebody else has opened and keeps: `fd:N`.

use crate::common::Process;
use crate::support::{Ended, Mdev, NIC, RUNNING, STOP, assert_runs, command, fill, let_go, receive};
use airlift_core::{DeviceState, MigrationDevice};
use airlift_vfio::VfioDevice;
use std::os::fd::AsRawFd;

/// Starts `send` with the device as a descriptor that it inherits.
fn send(device: &VfioDevice, uri: &str) -> Process {
    // Not closed on exec. Tests run one by one, so no other process gets it.
    let inherited = rustix::io::dup(device.fd()).unwrap();
    let named = format!("{NIC}=fd:{}", inherited.as_raw_fd());
    Process::spawn(command(&["send", "--no-guest", "--device", &named, uri]))
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_that_was_handed_in_is_sent_and_stays_open() {
    // It would be reset if it were closed.
    let (from, to) = (Mdev::ours("v2", 1 << 20), Mdev::ours("v2", 1 << 20));
    let device = from.open();
    fill(&device, 6);
    let digest = from.get("digest");
    let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
    let sent = Ended::of(send(&device, &uri));
    sent.must("completed", 0);
    assert!(!sent.notes().contains("closed now"), "{}", sent.notes());
    receive.wait_for("holding");
    assert_eq!((to.get("digest"), to.number("state")), (digest.clone(), RUNNING));
    assert_eq!((from.get("digest"), from.number("state"), from.number("resets")), (digest, STOP, 0));
    let_go(receive).must("completed", 0);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_that_was_handed_in_stopped_is_refused_and_left_as_it_is() {
    let from = Mdev::ours("v2", 4096);
    let mut device = from.open();
    device.set_state(DeviceState::Stop).unwrap();
    let before = from.touched();
    let sent = Ended::of(send(&device, "tcp:127.0.0.1:1"));
    assert_eq!(sent.code, 1, "{:#}", sent.result);
    let error = &sent.result["error"];
    assert_eq!((&error["device"], &error["state"]), (&NIC.into(), &"STOP".into()), "{error:#}");
    assert!(error["advice"].as_str().unwrap().contains("airlift resolve"), "{error:#}");
    assert_eq!(from.touched(), before);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_that_was_found_stopped_after_its_owner_died_is_reset_and_that_is_said() {
    let (from, to) = (Mdev::lasting("v2", 4096), Mdev::ours("v2", 4096));
    from.open().set_state(DeviceState::Stop).unwrap();
    assert_eq!(from.number("state"), STOP);
    let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
    let sent = crate::support::send(&["--device", &from.named(NIC)], &uri);
    sent.must("completed", 0);
    assert!(
        sent.notes().contains("found in STOP") && sent.notes().contains("reset first"),
        "{}",
        sent.notes()
    );
    assert_eq!(from.number("resets"), 1);
    receive.wait_for("holding");
    let_go(receive).must("completed", 0);
    assert_runs(&to.open());
}
