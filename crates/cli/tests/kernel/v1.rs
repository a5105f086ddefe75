//! Migrations of the kernel's devices of interface v1 by the command: alone, beside one of v2, refused, and
//! failing on the way.

use crate::support::{Ended, Mdev, NIC, let_go, receive, send, start};
use airlift_vfio::Recover;
use serde_json::Value;

const SIZE: u64 = 2_000_003;
/// The three bits of `device_state`, as the driver shows them.
const STOPPED: u64 = 0;
const RUNS: u64 = 1;

/// A source, whose state outlives its last close, or a destination.
fn device(source: bool, (map, section): (&str, u64)) -> Mdev {
    let mdev = if source { Mdev::lasting("v1", SIZE) } else { Mdev::ours("v1", SIZE) };
    mdev.set("v1_section", &section.to_string());
    mdev.set("v1_map", map);
    mdev
}

fn pair(from: (&str, u64), to: (&str, u64)) -> (Mdev, Mdev) {
    let (from, to) = (device(true, from), device(false, to));
    from.fill(1);
    (from, to)
}

// V1-CHUNK, V1-ROUNDS
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_of_interface_v1_moves_between_sections_of_each_kind() {
    for (source, destination) in [
        (("trapped", 65521), ("mapped", 0x10000)),
        (("mapped", 0x80000), ("sparse", 0x4000)),
        (("sparse", 0x10000), ("trapped", 4099)),
    ] {
        let (from, to) = pair(source, destination);
        let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
        let sent = send(&["--device", &from.named(NIC)], &uri);
        let result = sent.must("completed", 0);
        let device = &result["devices"][0];
        assert!(device["precopy_bytes"].as_u64().unwrap() > 0, "it has given some while it ran: {device:#}");
        receive.wait_for("holding");
        assert_eq!(to.get("digest"), from.get("digest"), "{source:?} to {destination:?}");
        assert_eq!((from.number("state"), to.number("state")), (STOPPED, RUNS));
        assert_eq!(to.number("bytes_written"), from.number("bytes_read"), "every byte once");
        let_go(receive).must("completed", 0);
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn what_changes_until_the_stop_arrives() {
    let (from, to) = pair(("mapped", 0x40000), ("mapped", 0x40000));
    let before = from.get("digest");
    from.set("dirty_rate", &(1 << 20).to_string());
    let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
    send(&["--device", &from.named(NIC), "--downtime-limit", "3s", "--on-stall", "force"], &uri)
        .must("completed", 0);
    receive.wait_for("holding");
    assert_ne!(from.get("digest"), before, "it has changed on the way");
    assert_eq!(to.get("digest"), from.get("digest"));
    let_go(receive).must("completed", 0);
}

/// One of each interface. v1 has no P2P, so that somebody must say that there is no DMA between them.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn devices_of_both_interfaces_move_together_where_they_do_no_dma_to_each_other() {
    let (old, old_to) = pair(("sparse", 0x10000), ("mapped", 0x10000));
    let (new, new_to) = (Mdev::lasting("v2", SIZE), Mdev::ours("v2", SIZE));
    new.fill(2);
    let named = |a: &Mdev, b: &Mdev| [a.named("old"), b.named("new")];
    let before = (old.touched(), new.touched());
    for more in [&[][..], &["--assume-no-peer-dma"]] {
        let [a, b] = named(&old_to, &new_to);
        let (receive, uri) = receive(&["--device", &a, "--device", &b, "--hold"]);
        let [a, b] = named(&old, &new);
        let sent = send(&[&["--device", &a, "--device", &b], more].concat(), &uri);
        if more.is_empty() {
            sent.must("incompatible", 4);
            assert!(sent.error().contains("--assume-no-peer-dma"), "{}", sent.error());
            Ended::of(receive).must("incompatible", 4);
            assert_eq!((old.touched(), new.touched()), before);
            continue;
        }
        sent.must("completed", 0);
        receive.wait_for("holding");
        assert_eq!(old_to.get("digest"), old.get("digest"));
        assert_eq!(new_to.get("digest"), new.get("digest"));
        let_go(receive).must("completed", 0);
    }
}

// V1-MIX
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn data_of_one_interface_is_not_loaded_over_the_other() {
    for (source, destination) in [("v1", "v2"), ("v2", "v1")] {
        let (from, to) = (Mdev::lasting(source, 4096), Mdev::ours(destination, 4096));
        let before = (from.touched(), to.touched());
        let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
        let sent = send(&["--device", &from.named(NIC)], &uri);
        let result = sent.must("incompatible", 4);
        let findings = result["compatibility"]["findings"].as_array().unwrap();
        let refused = |f: &&Value| f["severity"] == "refusal" && f["field"] == "interface";
        let finding = findings.iter().find(refused).unwrap_or_else(|| panic!("{result:#}"));
        assert!(finding["message"].to_string().contains("v1"), "{finding:#}");
        Ended::of(receive).must("incompatible", 4);
        assert_eq!((from.touched(), to.touched()), before);
    }
}

/// Whatever fails on the source, in pre-copy, in an arc, and after the stop: it runs on, with its state.
// V1-LOOP-ERROR, V1-READBACK
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_source_that_fails_on_the_way_runs_on() {
    let (from, to) = pair(("sparse", 0x10000), ("trapped", 0x10000));
    let digest = from.get("digest");
    for (knob, fault) in
        [("fail_read", "100000 5"), ("fail_arc", "1 3 5"), ("fail_arc", "3 2 5"), ("block", "arc 3 2")]
    {
        from.set(knob, fault);
        let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
        let sent = send(&["--device", &from.named(NIC), "--deadline", "quiesce=500ms"], &uri);
        let result = sent.must("aborted", 1);
        assert_eq!(result["source_running"], true, "{knob} = {fault}: {result:#}");
        assert_eq!(result["devices"][0]["quarantined"], Value::Null, "{knob} = {fault}: {result:#}");
        drop(receive);
        from.set(knob, "");
        assert_eq!((from.number("state"), from.get("digest")), (RUNS, digest.clone()), "{knob} = {fault}");
        assert_eq!(from.number("resets"), 0, "{knob} = {fault}");
    }
    let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
    send(&["--device", &from.named(NIC)], &uri).must("completed", 0);
    receive.wait_for("holding");
    assert_eq!(to.get("digest"), digest);
    let_go(receive).must("completed", 0);
}

/// The source runs on, and the destination's device is of use to the next one.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_destination_that_fails_leaves_the_source_running() {
    let (from, to) = pair(("mapped", 0x10000), ("sparse", 0x8000));
    let digest = from.get("digest");
    for (knob, fault) in [("fail_write", "65536 28"), ("fail_arc", "4 0 5"), ("fail_arc", "4 0 5 error")] {
        to.set(knob, fault);
        let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
        let sent = start(&["send", "--no-guest", "--device", &from.named(NIC), &uri]);
        let sent = Ended::of(sent);
        let result = sent.must("aborted", 1);
        assert_eq!(result["source_running"], true, "{knob} = {fault}: {result:#}");
        Ended::of(receive);
        to.set(knob, "");
        assert_eq!((from.number("state"), from.get("digest")), (RUNS, digest.clone()), "{knob} = {fault}");
    }
    let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
    send(&["--device", &from.named(NIC)], &uri).must("completed", 0);
    receive.wait_for("holding");
    assert_eq!(to.get("digest"), digest);
    let_go(receive).must("completed", 0);
}

/// A device that breaks is named, and is left to the operator.
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_source_in_error_is_named_and_not_reset() {
    let (from, to) = pair(("mapped", 0x10000), ("mapped", 0x10000));
    from.set("fail_arc", "3 2 5 error");
    let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
    let sent = send(&["--device", &from.named(NIC)], &uri);
    let error = &sent.must("aborted", 6)["error"];
    assert_eq!((&error["device"], &error["state"]), (&NIC.into(), &"ERROR".into()), "{error:#}");
    assert_eq!(error["errno"]["name"], "EIO", "{error:#}");
    assert_eq!(from.number("resets"), 0);
    drop(receive);
    from.set("fail_arc", "");
    from.open_with(Recover::Reset);
    assert_eq!((from.number("state"), from.number("resets")), (RUNS, 1));
}
