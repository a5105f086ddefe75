//! A device whose descriptor a VMM passes over its socket, and keeps.

use crate::machine::{BY_DMA, BY_GUEST, MEMORY, PAGE, Role, Vmm};
use crate::support::{Ended, Mdev, RUNNING, STOP, fill, listening, start};
use airlift::vmm::ServeEnd;
use airlift_core::DeviceState;
use std::sync::Arc;

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_vmm_passes_its_device_keeps_it_and_the_machine_moves_whole() {
    let dir = tempfile::tempdir().unwrap();
    let socket = |name: &str| dir.path().join(name);
    let address = |name: &str| format!("unix:{}", socket(name).display());
    // Both would be reset by a last close: that they are not shows that the VMMs kept them.
    let [from, to] = [(); 2].map(|()| Arc::new(Mdev::ours("v2", 1 << 20)));
    let (source, destination) = (Vmm::new(Role::Source, &from), Vmm::new(Role::Destination, &to));
    fill(&source.device, 0x33);
    let digest = from.get("digest");
    let source = source.serve(&socket("source"));
    let destination = destination.serve(&socket("destination"));

    let (receive, uri) = listening(start(&["receive", "--vmm", &address("destination"), "tcp:127.0.0.1:0"]));
    let sent = Ended::of(start(&["send", "--vmm", &address("source"), &uri]));
    let result = sent.must("completed", 0);
    assert_eq!((&result["source_running"], &result["destination_running"]), (&false.into(), &true.into()));
    assert!(result["memory"]["pages_resent"].as_u64().unwrap() >= 2, "{result:#}");
    Ended::of(receive).must("completed", 0);

    let ((source, ended), (destination, also)) = (source.join().unwrap(), destination.join().unwrap());
    for end in [ended, also] {
        let ServeEnd::Closed { outcome } = end else { panic!("{end:?}") };
        assert_eq!(outcome.as_deref(), Some("completed"));
    }
    assert_eq!((source.running, destination.running), (false, true));
    assert_eq!(source.ended.as_deref(), Some("completed"));

    // The processes have ended and both devices are open and as they must be.
    assert_eq!(
        (source.look().found_state(), destination.look().found_state()),
        (DeviceState::Stop, DeviceState::Running)
    );
    assert_eq!((from.number("state"), to.number("state")), (STOP, RUNNING));
    assert_eq!((from.get("digest"), to.get("digest")), (digest.clone(), digest));
    assert_eq!((from.number("resets"), to.number("resets")), (0, 0));
    let (had, got) = (source.content(), destination.content());
    assert_eq!(got.len() as u64, MEMORY);
    let byte = |page: u64| had[usize::try_from(page * PAGE).unwrap()];
    assert_eq!((byte(BY_GUEST), byte(BY_DMA)), (0xcc, 0xdd), "both have written");
    assert!(got == had, "memory differs");
    // The VMM's own records, and none of the command's.
    assert_eq!(destination.loaded.len(), 2, "{:?}", destination.loaded);
    for record in Vmm::records() {
        assert!(destination.loaded.contains(&record), "{record:?}");
    }
}

#[test]
#[ignore = "needs the test VM: cargo xtask vm-test"]
fn a_migration_that_fails_leaves_the_vmm_its_running_device_and_the_next_one_completes() {
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = [(); 2].map(|()| Arc::new(Mdev::ours("v2", 64 << 10)));
    let (mut source, mut destination) = (Vmm::new(Role::Source, &from), Vmm::new(Role::Destination, &to));
    fill(&source.device, 0x44);
    let digest = from.get("digest");
    // The step in which it stops fails, the first time.
    from.set("fail_arc", "7 3 5");
    for (attempt, outcome, code) in [(0, "aborted", 1), (1, "completed", 0)] {
        let socket = |name: &str| dir.path().join(format!("{name}-{attempt}"));
        let address = |name: &str| format!("unix:{}", socket(name).display());
        let here = source.serve(&socket("source"));
        let there = destination.serve(&socket("destination"));
        let (receive, uri) =
            listening(start(&["receive", "--vmm", &address("destination"), "tcp:127.0.0.1:0"]));
        let sent = Ended::of(start(&["send", "--vmm", &address("source"), &uri]));
        let result = sent.must(outcome, code);
        let back = code != 0;
        assert_eq!(
            (&result["source_running"], &result["destination_running"]),
            (&back.into(), &(!back).into())
        );
        let received = Ended::of(receive);
        assert_eq!(received.result["outcome"], outcome, "{:#}", received.result);
        (source, _) = here.join().unwrap();
        (destination, _) = there.join().unwrap();
        assert_eq!((source.running, destination.running), (back, !back));
        assert_eq!(from.number("state"), if back { RUNNING } else { STOP });
        assert_eq!((from.get("digest"), from.number("resets")), (digest.clone(), 0));
        from.set("fail_arc", "");
    }
    assert_eq!(to.get("digest"), digest);
    assert!(source.content() == destination.content(), "memory differs");
}
