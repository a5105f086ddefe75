//! Whole migrations between two processes: over TCP and over a UNIX socket, of both drivers, with each of
//! the three ways in which a device outlives the process that received it.

use crate::support::{
    Ended, Mdev, NIC, Pair, RUNNING, STOP, assert_runs, command, let_go, listening, receive, send, set_uart,
    start, take_uart, used,
};
use airlift::vmm::LineChannel;
use airlift_vfio::{DeviceAddress, OpenDevice, OpenOptions, Recover, Roots};
use serde_json::Value;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// What is written into the UART of the source.
const UARTS: [(u8, &str); 2] = [(0x5a, "HELLO"), (0xa5, "bye")];
const TAKEN: i32 = 7;
const SOON: Duration = Duration::from_secs(30);

fn filled_mtty(uarts: [(u8, &str); 2]) -> Mdev {
    let mdev = Mdev::mtty(2);
    let device = mdev.open();
    for (port, (scratch, text)) in (0..).zip(uarts) {
        set_uart(&device, port, scratch, text);
    }
    mdev
}

/// In the process that `--then` starts: the device that it has inherited holds what was sent.
fn read_what_was_inherited(fds: &str) -> ! {
    let fds: Vec<(&str, i32)> = fds
        .split(' ')
        .map(|word| word.split_once('=').map(|(name, fd)| (name, fd.parse().unwrap())).unwrap())
        .collect();
    let names: Vec<_> = fds.iter().map(|(name, _)| *name).collect();
    assert_eq!(names[0], NIC);
    assert!(
        names[1..] == ["nic0.iommufd"] || names[1..] == ["nic0.container", "nic0.group"],
        "what its DMA goes through is there too: {names:?}"
    );
    let opened = airlift_vfio::open(&DeviceAddress::Fd(fds[0].1), &OpenOptions::default()).unwrap();
    let device = used(opened, Recover::Leave);
    assert_runs(&device);
    for (port, (scratch, text)) in (0..).zip(UARTS) {
        assert_eq!(take_uart(&device, port), (scratch, text.to_owned()));
    }
    std::process::exit(TAKEN);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_uart_moves_over_tcp_and_a_command_inherits_it() {
    // This test is also the command.
    if let Ok(fds) = std::env::var("AIRLIFT_FDS") {
        read_what_was_inherited(&fds);
    }
    let (from, to) = (filled_mtty(UARTS), filled_mtty([(1, "x"), (2, "")]));
    let program = std::env::current_exe().unwrap();
    // Its output is not among the lines of `receive`.
    let then = format!(
        "exec {} --ignored --exact moves::a_uart_moves_over_tcp_and_a_command_inherits_it >/dev/null",
        program.display()
    );
    let (receive, uri) = receive(&["--device", &to.named(NIC), "--then", &then]);
    let sent = send(&["--device", &from.named(NIC)], &uri);
    let result = sent.must("completed", 0);
    assert_eq!((&result["source_running"], &result["destination_running"]), (&false.into(), &true.into()));
    assert!(sent.notes().contains("closed now, which resets it"), "{}", sent.notes());
    let started = receive.wait_for("then");
    assert_eq!(started["command"], then.as_str());
    let received = Ended::of(receive);
    assert_eq!(received.must("completed", TAKEN)["exit_code"], TAKEN);
}

/// Takes one connection of `--give` and its line.
fn offered(listener: &UnixListener) -> (LineChannel, UnixStream, Value, OpenDevice) {
    let (stream, _) = listener.accept().unwrap();
    let answer = stream.try_clone().unwrap();
    let mut channel = LineChannel::new(stream);
    let line = channel.receive(Instant::now() + SOON).unwrap();
    let offer: Value = serde_json::from_slice(&line.text).unwrap();
    let mut fds: Vec<_> = line.fds.into_iter().map(Some).collect();
    let index = usize::try_from(offer["devices"][0]["fd"].as_u64().unwrap()).unwrap();
    let fd = fds[index].take().unwrap();
    let opened = OpenDevice::from_fd(fd, &Roots::default()).unwrap();
    // What is left of them closes here: the device stays open by its own descriptor.
    (channel, answer, offer, opened)
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_uart_moves_over_a_unix_socket_and_is_given_away() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (filled_mtty(UARTS), filled_mtty([(1, "x"), (2, "")]));
    let give = dir.path().join("give.sock");
    let listener = UnixListener::bind(&give).unwrap();
    let uri = format!("unix:{}", dir.path().join("migration.sock").display());
    let give = format!("unix:{}", give.display());
    let named = to.named(NIC);
    let (receive, uri) =
        listening(start(&["receive", "--no-guest", "--device", &named, "--give", &give, &uri]));
    send(&["--device", &from.named(NIC)], &uri).must("completed", 0);

    let (_channel, mut answer, offer, opened) = offered(&listener);
    assert_eq!(offer["event"], "give");
    assert_eq!(
        (&offer["devices"][0]["id"], &offer["devices"][0]["address"]),
        (&NIC.into(), &to.address().into())
    );
    let role = |name: &str| offer["devices"][0][name].is_u64();
    assert!(role("iommufd") && role("devid") || role("container") && role("group"), "{offer:#}");
    let device = used(opened, Recover::Leave);
    assert_runs(&device);
    answer.write_all(b"{\"taken\":true}\n").unwrap();
    receive.wait_for("given");
    Ended::of(receive).must("completed", 0);
    // The process that received it has ended; here it is still open.
    for (port, (scratch, text)) in (0..).zip(UARTS) {
        assert_eq!(take_uart(&device, port), (scratch, text.to_owned()));
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_that_nobody_takes_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Pair::new(64 << 10);
    pair.from.fill(3);
    let give = dir.path().join("give.sock");
    let listener = UnixListener::bind(&give).unwrap();
    let give = format!("unix:{}", give.display());
    let (receive, uri) = receive(&["--device", &pair.to.named(NIC), "--give", &give]);
    send(&["--device", &pair.from.named(NIC)], &uri).must("completed", 0);
    let (_channel, mut answer, _, opened) = offered(&listener);
    drop(opened);
    answer.write_all(b"{\"taken\":false,\"error\":\"no room\"}\n").unwrap();
    let said = receive.wait_for("not-taken").to_string();
    assert!(said.contains("no room") && said.contains("still holds them"), "{said}");
    receive.wait_for("holding");
    assert_eq!(pair.to.get("digest"), pair.from.get("digest"), "the last close would have reset it");
    let ended = let_go(receive);
    // The migration is complete; what was received is lost with the process.
    assert!(ended.must("completed", 6)["error"].to_string().contains("no room"));
    assert_eq!(pair.to.number("state"), RUNNING);
    assert_ne!(pair.to.get("digest"), pair.from.get("digest"));
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_large_state_that_changes_all_the_time_arrives_as_it_was_at_the_stop() {
    let pair = Pair::new(64 << 20);
    pair.from.fill(1);
    let before = pair.from.get("digest");
    pair.from.set("dirty_rate", &(4 << 20).to_string());
    let (receive, uri) = receive(&["--device", &pair.to.named(NIC), "--hold"]);
    let sent =
        send(&["--device", &pair.from.named(NIC), "--downtime-limit", "3s", "--on-stall", "force"], &uri);
    let result = sent.must("completed", 0);
    receive.wait_for("holding");
    let after = pair.from.get("digest");
    assert_ne!(after, before, "it has changed on the way");
    assert_eq!(pair.to.get("digest"), after);
    let device = &result["devices"][0];
    let bytes = |key: &str| device[key].as_u64().unwrap();
    assert!(bytes("precopy_bytes") > 64 << 20, "all of it and changes went while it ran: {device:#}");
    assert!(bytes("stop_copy_bytes") < 64 << 20, "and not all again: {device:#}");
    let_go(receive).must("completed", 0);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_device_without_precopy_and_p2p_moves_alone() {
    let (from, to) = (Mdev::lasting("v2-plain", 1 << 20), Mdev::ours("v2-plain", 1 << 20));
    from.fill(9);
    let pair = Pair { from, to };
    let (sent, _) = pair.migrate();
    assert_eq!(sent.result["devices"][0]["precopy_bytes"], 0, "{:#}", sent.result);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn the_life_of_a_device_after_the_migration_must_be_said_before_it() {
    let to = Mdev::ours("v2", 4096);
    let before = to.number("opens");
    let output = command(&["receive", "--no-guest", "--device", &to.named(NIC), "tcp:127.0.0.1:0"])
        .stderr(std::process::Stdio::piped())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    for way in ["--then", "--give", "--hold"] {
        assert!(said.contains(way), "{said}");
    }
    assert_eq!(to.number("opens"), before, "nothing was opened for it");
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_supervisor_lets_held_devices_go() {
    let pair = Pair::new(4096);
    pair.from.fill(2);
    let (mut receive, uri) = receive(&["--device", &pair.to.named(NIC), "--hold", "--supervised"]);
    send(&["--device", &pair.from.named(NIC)], &uri).must("completed", 0);
    receive.wait_for("holding");
    assert_eq!((pair.from.number("state"), pair.to.number("state")), (STOP, RUNNING));
    receive.tell("cancel");
    Ended::of(receive).must("completed", 0);
}
