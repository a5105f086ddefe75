//! A connection that is cut, and bits that change on the way: the source runs on, no damaged byte reaches
//! the destination's device or memory, and both devices can be used again.

use crate::relay::{Damage, Fault, Relay};
use crate::support::{Ended, NIC, Pair, RUNNING, receive, send, side_by_side};
use airlift_stream::FrameType;
use std::path::Path;

const STATE: u64 = 512 << 10;
const MEMORY: usize = 256 << 10;
const PAGE: usize = 4096;

struct Case {
    pair: Pair,
    dir: tempfile::TempDir,
    digest: String,
    memory: Vec<u8>,
}

impl Case {
    fn new() -> Self {
        let pair = Pair::new(STATE);
        pair.from.fill(7);
        let dir = tempfile::tempdir().unwrap();
        let memory: Vec<u8> = (0..MEMORY).map(|at| (at / PAGE).to_le_bytes()[0] | 1).collect();
        std::fs::write(dir.path().join("source"), &memory).unwrap();
        let digest = pair.from.get("digest");
        Self { pair, dir, digest, memory }
    }

    /// One migration with this fault: everything that must hold whatever the fault is.
    fn fails(&self, fault: Fault) -> (Ended, Ended) {
        let destination = self.dir.path().join("destination");
        // An earlier case has left it.
        let _ = std::fs::remove_file(&destination);
        let named = |path: &Path, more: &str| format!("ram=file:{}{more}", path.display());
        let before = self.pair.to.number("bytes_written");
        let to = named(&destination, &format!(",size={MEMORY}"));
        let (receive, uri) = receive(&["--device", &self.pair.to.named(NIC), "--memory", &to, "--hold"]);
        let relay = Relay::start(&uri, fault);
        let from = named(&self.dir.path().join("source"), "");
        let sent = send(&["--device", &self.pair.from.named(NIC), "--memory", &from], &relay.uri());
        let received = Ended::of(receive);
        let story = format!("{fault:?}\nsource {:#}\ndestination {:#}", sent.result, received.result);
        assert!(relay.was_placed(), "{story}");

        assert_eq!((sent.result["outcome"].as_str(), sent.code), (Some("aborted"), 1), "{story}");
        assert_eq!(
            (&sent.result["source_running"], &sent.result["destination_running"]),
            (&true.into(), &false.into()),
            "{story}"
        );
        assert_eq!(received.result["outcome"], "aborted", "{story}");
        assert_eq!(received.result["destination_running"], false, "{story}");
        // The source runs on with all that it had.
        assert_eq!(
            (self.pair.from.number("state"), self.pair.from.number("resets")),
            (RUNNING, 0),
            "{story}"
        );
        assert_eq!(self.pair.from.get("digest"), self.digest, "{story}");
        assert_eq!(self.pair.to.number("state"), RUNNING, "{story}");
        if fault.kind == FrameType::Device {
            // Frames before it may have been written; it was not.
            let written = self.pair.to.number("bytes_written") - before;
            assert!(written <= relay.bytes_before(), "{written} bytes were written: {story}");
        }
        self.no_damaged_page(&destination, &story);
        (sent, received)
    }

    /// A page of memory is what was sent, or nothing at all.
    fn no_damaged_page(&self, destination: &Path, story: &str) {
        let got = std::fs::read(destination).unwrap();
        for (at, page) in got.chunks(PAGE).enumerate() {
            let right = page == &self.memory[at * PAGE..][..PAGE] || page.iter().all(|byte| *byte == 0);
            assert!(right, "page {at}: {story}");
        }
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_cut_connection_leaves_the_source_running_and_the_destination_usable() {
    let faults = [
        (FrameType::Accept, 0, 10),
        (FrameType::Device, 0, 0),
        (FrameType::Device, 1, 500),
        (FrameType::Pages, 0, 4000),
        (FrameType::Final, 0, 40),
        (FrameType::Trailer, 0, 39),
    ];
    side_by_side(&faults, |faults| {
        let case = Case::new();
        for (kind, number, bytes) in faults {
            case.fails(Fault { kind: *kind, number: *number, damage: Damage::CutAfter(*bytes) });
        }
        case.pair.migrate();
    });
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_bit_that_changed_on_the_way_is_found_before_anything_of_its_frame_is_used() {
    let faults = [
        (FrameType::Accept, 0, 41),
        // The first frame of a device says that its data begins. A bit of its number, of the payload of
        // the first with data, of its flags, of the checksum itself.
        (FrameType::Device, 0, 16),
        (FrameType::Device, 1, 40 + 2000),
        (FrameType::Device, 1, 8),
        (FrameType::Device, 2, 33),
        (FrameType::Pages, 0, 40 + 5000),
        (FrameType::Trailer, 0, 41),
    ];
    side_by_side(&faults, |faults| {
        let case = Case::new();
        for (kind, number, at) in faults {
            let (_, received) = case.fails(Fault { kind: *kind, number: *number, damage: Damage::Flip(*at) });
            let said = received.error();
            assert!(said.contains("was damaged") && said.contains(&kind.to_string()), "{kind}: {said}");
        }
        case.pair.migrate();
    });
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_byte_that_changed_behind_the_checksum_is_found_by_the_driver_before_the_source_gives_up() {
    let case = Case::new();
    let sabotage = ["--hold", "--sabotage", "corrupt-device-byte"];
    let (receive, uri) = receive(&[&["--device", &case.pair.to.named(NIC)], &sabotage[..]].concat());
    let sent = send(&["--device", &case.pair.from.named(NIC)], &uri);
    let result = sent.must("aborted", 1);
    assert_eq!(result["source_running"], true, "{result:#}");
    assert_eq!(
        (case.pair.from.number("state"), case.pair.from.get("digest")),
        (RUNNING, case.digest.clone())
    );
    let received = Ended::of(receive);
    // Its device took data, and was reset: what it held before is gone.
    let error = &received.must("aborted", 6)["error"];
    assert_eq!((&error["device"], &error["errno"]["name"]), (&NIC.into(), &"EINVAL".into()), "{error:#}");
    assert!(sent.error().contains("EINVAL"), "the source knows why: {}", sent.error());
    assert_eq!((case.pair.to.number("state"), case.pair.to.number("resets")), (RUNNING, 1));
    case.pair.migrate();
}
