//! Guest memory without a VMM: files that the devices write by DMA while they are moved.

use crate::support::{Ended, Mdev, NIC, command, let_go, receive, send, start};
use std::path::Path;

const SIZE: usize = 4 << 20;
const GPA: u64 = 0x10_0000;
const PAGE: usize = 4096;

fn content() -> Vec<u8> {
    // Every fourth page is zero: those go another way.
    let page = |n: usize| if n.is_multiple_of(4) { [0; PAGE] } else { [n.to_le_bytes()[0] | 1; PAGE] };
    (0..SIZE / PAGE).flat_map(page).collect()
}

fn named(path: &Path, size: bool) -> String {
    let size = if size { format!(",size={SIZE}") } else { String::new() };
    format!("ram=file:{},gpa={GPA:#x}{size}", path.display())
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn what_a_device_writes_by_dma_until_the_stop_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = (dir.path().join("source"), dir.path().join("destination"));
    std::fs::write(&source, content()).unwrap();
    let (from, to) = (Mdev::lasting("v2", 64 << 10), Mdev::ours("v2", 64 << 10));
    from.fill(4);
    // The destination's file is made by it.
    let (receive, uri) =
        receive(&["--device", &to.named(NIC), "--memory", &named(&destination, true), "--hold"]);
    let mut send = start(&[
        "send",
        "--no-guest",
        "--device",
        &from.named(NIC),
        "--memory",
        &named(&source, false),
        "--supervised",
        "--hold-at",
        "quiesce",
        &uri,
    ]);
    send.wait_for("held");
    // All of the memory has been sent. Two pages are written now, from the middle of one to the middle of
    // the third, and one at the end.
    let at = |page: usize, offset: usize| GPA + (page * PAGE + offset) as u64;
    from.set("dma", &format!("{:#x} {} 0xaa", at(16, 100), 2 * PAGE));
    from.set("dma", &format!("{:#x} 1 0xbb", at(SIZE / PAGE - 1, PAGE - 1)));
    send.tell("go");
    let sent = Ended::of(send);
    let result = sent.must("completed", 0);
    receive.wait_for("holding");
    let (had, got) = (std::fs::read(&source).unwrap(), std::fs::read(&destination).unwrap());
    assert_eq!((had[16 * PAGE + 100], had[SIZE - 1]), (0xaa, 0xbb), "the device has written there");
    assert_eq!(got.len(), had.len());
    let wrong: Vec<_> =
        (0..SIZE / PAGE).filter(|n| got[n * PAGE..][..PAGE] != had[n * PAGE..][..PAGE]).collect();
    assert!(wrong.is_empty(), "pages {wrong:?}");
    let memory = &result["memory"];
    assert_eq!(memory["bytes_total"], SIZE);
    assert_eq!(memory["pages_resent"], 4, "the pages that were written, and no others: {memory:#}");
    let_go(receive).must("completed", 0);
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn regions_are_paired_by_name_and_one_of_another_size_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = (dir.path().join("source"), dir.path().join("destination"));
    std::fs::write(&source, vec![1; SIZE / 2]).unwrap();
    let (from, to) = (Mdev::ours("v2", 4096), Mdev::ours("v2", 4096));
    let before = (from.touched(), to.touched());
    let (receive, uri) =
        receive(&["--device", &to.named(NIC), "--memory", &named(&destination, true), "--hold"]);
    let sent = send(&["--device", &from.named(NIC), "--memory", &named(&source, false)], &uri);
    let findings = sent.must("incompatible", 4)["compatibility"]["findings"].to_string();
    assert!(findings.contains("memory.region[ram]"), "{findings}");
    Ended::of(receive).must("incompatible", 4);
    assert_eq!((from.touched(), to.touched()), before, "no device was touched");
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn memory_that_cannot_be_used_is_refused_before_a_device_is_opened() {
    let from = Mdev::ours("v2", 4096);
    let missing = named(Path::new("/tmp/is-not-there"), false);
    let output = command(&["send", "--no-guest", "--device", &from.named(NIC), "--memory", &missing])
        .args(["tcp:127.0.0.1:1", "--json"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("ENOENT") && said.contains("is-not-there"), "{said}");
    assert_eq!(from.number("opens"), 0);
}
