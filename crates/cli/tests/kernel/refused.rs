//! What is refused with every reason before a device is touched, and who is not let in.

use crate::common::Process;
use crate::support::{
    Ended, Mdev, NIC, Pair, RUNNING, STOP, command, let_go, listening, receive, send, set_uart, take_uart,
};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;

fn refusals(ended: &Ended) -> Vec<&Value> {
    let findings = ended.result["compatibility"]["findings"].as_array().unwrap();
    findings.iter().filter(|f| f["severity"] == "refusal").collect()
}

fn fields(ended: &Ended) -> Vec<&str> {
    refusals(ended).into_iter().map(|f| f["field"].as_str().unwrap()).collect()
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_uart_with_one_port_is_not_loaded_into_one_with_two() {
    let (from, to) = (Mdev::mtty(1), Mdev::mtty(2));
    set_uart(&from.open(), 0, 0x11, "source");
    set_uart(&to.open(), 0, 0x22, "destination");
    let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
    let sent = send(&["--device", &from.named(NIC)], &uri);
    let result = sent.must("incompatible", 4);
    assert_eq!((&result["source_running"], &result["destination_running"]), (&true.into(), &false.into()));
    // Every difference, not the first: the type, and the second port's registers.
    let fields = fields(&sent);
    assert!(fields.len() >= 2, "{fields:?}");
    for wanted in ["mdev-type", "region1-size"] {
        assert!(fields.iter().any(|field| field.contains(wanted)), "{wanted}: {fields:?}");
    }
    let received = Ended::of(receive);
    received.must("incompatible", 4);
    assert_eq!(self::fields(&received), fields, "both sides know the same");
    assert_eq!(take_uart(&from.open(), 0), (0x11, "source".into()));
    assert_eq!(take_uart(&to.open(), 0), (0x22, "destination".into()));
}

// I11
#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn devices_that_do_not_match_are_not_touched() {
    let (from, to) = (Mdev::lasting("v2", 4096), Mdev::lasting("v2-plain", 8192));
    from.fill(1);
    to.fill(2);
    let before = (from.touched(), to.touched(), from.get("digest"), to.get("digest"));
    let (receive, uri) = receive(&["--device", &to.named(NIC), "--hold"]);
    let sent = send(&["--device", &from.named(NIC)], &uri);
    sent.must("incompatible", 4);
    let found = fields(&sent);
    for wanted in ["region0-size", "mdev-type"] {
        assert!(found.iter().any(|field| field.contains(wanted)), "{wanted}: {found:?}");
    }
    Ended::of(receive).must("incompatible", 4);
    assert_eq!((from.touched(), to.touched(), from.get("digest"), to.get("digest")), before);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn devices_of_other_names_are_all_named() {
    let (from, to) = (Mdev::ours("v2", 4096), Mdev::ours("v2", 4096));
    let before = (from.touched(), to.touched());
    let (receive, uri) = receive(&["--device", &to.named("gpu0"), "--hold"]);
    let sent = send(&["--device", &from.named(NIC)], &uri);
    sent.must("incompatible", 4);
    let devices: Vec<_> = refusals(&sent).into_iter().map(|f| f["device"].as_str().unwrap()).collect();
    assert_eq!(devices, ["gpu0", NIC]);
    Ended::of(receive).must("incompatible", 4);
    assert_eq!((from.touched(), to.touched()), before);
}

/// Says something else than a HELLO at the door, and hears how it ends.
fn knock(port: &str, what: &[u8]) {
    let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    // It may be shown out before it has said everything.
    let _ = stream.write_all(what);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.is_empty(), "a stranger is told nothing: {answer:?}");
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_stranger_at_the_listener_is_shown_out_and_the_source_is_served() {
    let pair = Pair::new(64 << 10);
    pair.from.fill(5);
    let before = pair.to.touched();
    let named = pair.to.named(NIC);
    let mut command = command(&["receive", "--no-guest", "--device", &named, "--hold", "tcp:127.0.0.1:0"]);
    command.env("AIRLIFT_LOG", "warn").stderr(Stdio::piped());
    let mut child = Process::spawn(command);
    let mut said = child.stderr();
    let (receive, uri) = listening(child);
    let port = uri.rsplit(':').next().unwrap();
    knock(port, b"GET / HTTP/1.1\r\nHost: airlift\r\nAccept: */*\r\n\r\n");
    let noise: Vec<u8> = (0..4096_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    knock(port, &noise);
    knock(port, b"AI");
    assert_eq!(pair.to.touched(), before, "nothing of it has reached the device");

    send(&["--device", &pair.from.named(NIC)], &uri).must("completed", 0);
    receive.wait_for("holding");
    assert_eq!(pair.to.get("digest"), pair.from.get("digest"));
    assert_eq!((pair.from.number("state"), pair.to.number("state")), (STOP, RUNNING));
    let_go(receive).must("completed", 0);
    let mut log = String::new();
    said.read_to_string(&mut log).unwrap();
    assert_eq!(log.matches("something else than a message").count(), 3, "{log}");
    assert!(log.contains("47, 45, 54, 20"), "the bytes that came, here GET: {log}");
}
