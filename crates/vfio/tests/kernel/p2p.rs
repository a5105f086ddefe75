//! Two devices that write to each other, stopped with and without their P2P states.

use crate::support::{Mdev, load, peek, save_stopped, wait_for};
use airlift_core::{DeviceState, MigrationDevice};
use airlift_vfio::{VfioDevice, Way};

const RATE: &str = "20000";

/// Two devices that write to each other, and that have done so.
fn pair(mdevs: &[Mdev; 2]) -> [VfioDevice; 2] {
    let devices = mdevs.each_ref().map(|mdev| mdev.open(Way::Group));
    for (mdev, peer) in mdevs.iter().zip(mdevs.iter().rev()) {
        mdev.set("peer", &peer.uuid);
        mdev.set("peer_rate", RATE);
    }
    wait_for("writes both ways", || mdevs.iter().all(|mdev| mdev.number("peer_received") > 1000));
    devices
}

/// What a device keeps in its state: the last write that it has received, and how many it has sent.
fn counters(device: &VfioDevice) -> (u64, u64) {
    (u64::from_le_bytes(peek(device, 0)), u64::from_le_bytes(peek(device, 8)))
}

fn lost(mdevs: &[Mdev; 2]) -> u64 {
    mdevs.iter().map(|mdev| mdev.number("peer_lost")).sum()
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn two_devices_that_are_stopped_through_their_p2p_states_lose_no_write() {
    let mdevs = [Mdev::sized("v2", 8192), Mdev::sized("v2", 8192)];
    let targets = [Mdev::sized("v2", 8192), Mdev::sized("v2", 8192)];
    let mut devices = pair(&mdevs);
    for state in [DeviceState::PreCopy, DeviceState::PreCopyP2p] {
        // Sessions are not kept: what is saved below is the state in STOP.
        devices.iter_mut().for_each(|device| drop(device.set_state(state).unwrap()));
    }
    let sent = mdevs.each_ref().map(|mdev| mdev.number("peer_sent"));
    devices.iter_mut().for_each(|device| drop(device.set_state(DeviceState::Stop).unwrap()));
    assert_eq!(mdevs.each_ref().map(|mdev| mdev.number("peer_sent")), sent, "in P2P states nothing is sent");
    assert_eq!(lost(&mdevs), 0);
    for (mdev, peer) in [(&mdevs[0], &mdevs[1]), (&mdevs[1], &mdevs[0])] {
        assert_eq!(mdev.number("peer_sent"), peer.number("peer_received"));
        assert_eq!(mdev.number("peer_gaps"), 0);
    }

    // Their states fit together on the other side too.
    let mut loaded = targets.each_ref().map(|mdev| mdev.open(Way::Cdev));
    for (from, to) in devices.iter_mut().zip(&mut loaded) {
        load(to, &save_stopped(from, 4096));
    }
    let [a, b] = loaded.each_ref().map(counters);
    assert_eq!((a.0, b.0), (b.1, a.1), "last received and sent");
    assert!(a.1 > 1000);
}

/// That the test before could fail.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn two_devices_that_are_stopped_one_after_the_other_lose_writes() {
    let mdevs = [Mdev::sized("v2", 8192), Mdev::sized("v2", 8192)];
    let mut devices = pair(&mdevs);
    devices[0].set_state(DeviceState::Stop).unwrap();
    let sent = mdevs[1].number("peer_sent");
    wait_for("writes to a device that has stopped", || mdevs[1].number("peer_sent") > sent + 100);
    devices[1].set_state(DeviceState::Stop).unwrap();
    assert!(lost(&mdevs) >= 100, "{}", lost(&mdevs));
    let [a, b] = devices.each_ref().map(counters);
    assert!(a.0 < b.1, "the first has missed writes of the second: {} of {}", a.0, b.1);
}
