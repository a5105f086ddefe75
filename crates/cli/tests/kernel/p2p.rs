//! Two devices of which one writes to the other. Nothing that was written until the stop may be lost.

use crate::common::Process;
use crate::support::{Ended, Mdev, PRE_COPY_P2P, STOP_COPY, let_go, receive, start, wait_for};

/// The reader, and the writer to it, here and on the other side.
struct Devices {
    reader: Mdev,
    writer: Mdev,
    to: [Mdev; 2],
}

impl Devices {
    /// The writer stops last: it waits in its arc to the P2P state, in which it would write no more.
    fn new() -> Self {
        let device = || Mdev::lasting("v2", 64 << 10);
        let devices = Self { reader: device(), writer: device(), to: [device(), device()] };
        devices.writer.set("peer", &devices.reader.uuid);
        devices.writer.set("peer_rate", "2000");
        devices.writer.set("block", "arc 6 7");
        devices
    }

    fn receive(&self) -> (Process, String) {
        let [reader, writer] = &self.to;
        receive(&["--device", &reader.named("reader"), "--device", &writer.named("writer"), "--hold"])
    }

    fn send(&self, more: &[&str], uri: &str) -> Process {
        let (reader, writer) = (self.reader.named("reader"), self.writer.named("writer"));
        let send = ["send", "--no-guest", "--device", &reader, "--device", &writer, uri];
        start(&[&send, more].concat())
    }

    fn writes_go_on(&self, counter: &str) {
        let before = self.reader.number(counter);
        wait_for("a write of the peer", || self.reader.number(counter) > before);
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn no_write_between_devices_is_lost_by_a_migration() {
    let devices = Devices::new();
    let (receive, uri) = devices.receive();
    let send = devices.send(&[], &uri);
    wait_for("the reader in PRE_COPY_P2P", || devices.reader.number("state") == PRE_COPY_P2P);
    wait_for("the writer in its arc", || devices.writer.number("blocked") == 1);
    // One is quiet and takes what the other still writes.
    devices.writes_go_on("peer_received");
    devices.writer.set("block", "");
    Ended::of(send).must("completed", 0);
    receive.wait_for("holding");
    let (reader, writer) = (&devices.reader, &devices.writer);
    assert_eq!(
        (reader.number("peer_lost"), writer.number("peer_lost"), reader.number("peer_gaps")),
        (0, 0, 0)
    );
    assert_eq!(reader.number("peer_received"), writer.number("peer_sent"));
    assert_eq!(devices.to[0].get("digest"), reader.get("digest"), "with the last write in it");
    let_go(receive).must("completed", 0);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn without_the_p2p_states_writes_between_devices_are_lost() {
    let devices = Devices::new();
    let (receive, uri) = devices.receive();
    let send = devices.send(&["--sabotage", "skip-p2p"], &uri);
    wait_for("the reader in STOP_COPY", || devices.reader.number("state") == STOP_COPY);
    devices.writes_go_on("peer_lost");
    devices.writer.set("block", "");
    Ended::of(send);
    drop(receive);
    assert!(devices.reader.number("peer_lost") > 0);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn devices_without_p2p_are_refused_together() {
    let device = || Mdev::ours("v2-no-p2p", 4096);
    let (from, to) = ([device(), device()], [device(), device()]);
    let before = from.each_ref().map(Mdev::touched);
    let args = |side: &[Mdev; 2]| [side[0].named("a"), side[1].named("b")];
    let [a, b] = args(&to);
    let (receive, uri) = receive(&["--device", &a, "--device", &b, "--hold"]);
    let [a, b] = args(&from);
    let sent = Ended::of(start(&["send", "--no-guest", "--device", &a, "--device", &b, &uri]));
    sent.must("incompatible", 4);
    assert!(sent.error().contains("P2P"), "{}", sent.error());
    Ended::of(receive).must("incompatible", 4);
    assert_eq!(from.each_ref().map(Mdev::touched), before);
}
