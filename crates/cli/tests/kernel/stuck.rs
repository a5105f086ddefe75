//! A driver that does not come back from a step: the migration ends all the same, and the device is named.

use crate::support::{Ended, NIC, Pair, RUNNING, receive, start, wait_for};

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn an_arc_that_does_not_return_ends_the_migration_and_the_device_is_named() {
    let pair = Pair::new(64 << 10);
    pair.from.fill(1);
    pair.from.set("block", "arc 6 7 uninterruptible");
    let (receive, uri) = receive(&["--device", &pair.to.named(NIC), "--hold"]);
    let send = start(&[
        "send",
        "--no-guest",
        "--device",
        &pair.from.named(NIC),
        "--deadline",
        "quiesce=500ms",
        "--deadline",
        "rollback=500ms",
        &uri,
    ]);
    wait_for("the thread in the driver", || pair.from.number("blocked") == 1);
    let sent = Ended::of(send);
    let result = sent.must("aborted", 6);
    let device = &result["devices"][0];
    assert_eq!(device["id"], NIC);
    assert!(device["quarantined"].is_string(), "{device:#}");
    assert!(sent.error().contains(NIC), "{}", sent.error());
    let received = Ended::of(receive);
    assert_eq!(received.result["outcome"], "aborted", "{:#}", received.result);
    assert_eq!(pair.to.number("state"), RUNNING);
    // The thread ends with its process.
    wait_for("nobody in the driver", || pair.from.number("blocked") == 0);
    pair.from.set("block", "");
    pair.migrate();
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn an_arc_that_a_signal_ends_is_given_up_at_the_deadline_and_the_device_runs_on() {
    let pair = Pair::new(64 << 10);
    pair.from.fill(1);
    let digest = pair.from.get("digest");
    pair.from.set("block", "arc 6 7");
    let (receive, uri) = receive(&["--device", &pair.to.named(NIC), "--hold"]);
    let send = start(&[
        "send",
        "--no-guest",
        "--device",
        &pair.from.named(NIC),
        "--deadline",
        "quiesce=500ms",
        &uri,
    ]);
    let sent = Ended::of(send);
    let result = sent.must("aborted", 1);
    assert_eq!(result["source_running"], true, "{result:#}");
    assert_eq!(result["devices"][0]["quarantined"], serde_json::Value::Null, "{result:#}");
    drop(receive);
    pair.from.set("block", "");
    assert_eq!((pair.from.number("state"), pair.from.get("digest")), (RUNNING, digest));
    pair.migrate();
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_that_breaks_on_the_way_is_named_and_its_loss_is_the_exit_code() {
    let pair = Pair::new(64 << 10);
    pair.from.fill(1);
    pair.from.set("fail_arc", "6 7 5 error");
    let (receive, uri) = receive(&["--device", &pair.to.named(NIC), "--hold"]);
    let sent = Ended::of(start(&["send", "--no-guest", "--device", &pair.from.named(NIC), &uri]));
    let result = sent.must("aborted", 6);
    let error = &result["error"];
    assert_eq!((&error["device"], &error["state"]), (&NIC.into(), &"ERROR".into()), "{error:#}");
    assert_eq!(error["errno"]["name"], "EIO", "{error:#}");
    // The policy of the source is never to reset: what is left of the state is the operator's to judge.
    assert_eq!(pair.from.number("resets"), 0);
    drop(receive);
    pair.from.set("fail_arc", "");
    let (sent, _) = pair.migrate();
    assert!(sent.notes().contains("found in ERROR"), "{}", sent.notes());
}
