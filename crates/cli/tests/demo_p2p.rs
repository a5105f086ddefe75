//! P2P earns its place: devices that write into each other lose writes when one is stopped while
//! another still writes.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod common;

use common::{Demo, demo};

/// Runs of each kind; more with AIRLIFT_RUNS, as in 100 for a release.
fn runs() -> u32 {
    std::env::var("AIRLIFT_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(4)
}

fn gaps(demo: &Demo) -> u64 {
    demo.result["guest"]["sequence_gaps"].as_u64().unwrap()
}

// I14, V2-P2P-BARRIER
#[test]
fn without_the_p2p_step_every_run_loses_writes() {
    for _ in 0..runs() {
        let demo = demo(&["--sabotage", "skip-p2p", "--device-dma-rate", "10000/s"]);
        assert!(gaps(&demo) > 0, "{}", demo.story());
        assert_eq!(demo.code, 1, "what was lost is a failure: {}", demo.story());
    }
}

#[test]
fn with_it_no_run_does() {
    for _ in 0..runs() {
        let demo = demo(&["--sabotage", "stop-delay", "--device-dma-rate", "10000/s"]);
        demo.assert_completed();
        let arcs: Vec<_> = ["dev0", "dev1"].iter().flat_map(|d| demo.arcs("source", d)).collect();
        let quiet = arcs.iter().filter(|(_, to, ..)| to == "PRE_COPY_P2P").map(|(.., end)| end).max();
        let stopped = arcs.iter().filter(|(_, to, ..)| to == "STOP_COPY").map(|(_, _, start, _)| start).min();
        assert!(quiet.is_some() && stopped.is_some(), "{arcs:?}");
        assert!(quiet <= stopped, "the last device was quiet at {quiet:?}, the first stopped at {stopped:?}");
    }
}

#[test]
fn devices_without_p2p_are_refused_together_and_the_reason_is_named() {
    let demo = demo(&["--device-no-p2p"]);
    assert_eq!(demo.code, 4, "{}", demo.story());
    assert_eq!(demo.result["outcome"], "incompatible");
    assert_eq!(demo.result["source_running"], true);
    assert!(demo.result["error"]["message"].as_str().unwrap().contains("P2P"), "{}", demo.story());
    common::assert_all_right(&demo.result, &demo.story());
    for device in ["dev0", "dev1"] {
        assert_eq!(demo.arcs("source", device), [], "no device was touched");
    }
}

#[test]
fn a_declaration_lets_them_through_and_is_on_record() {
    let demo = demo(&["--device-no-p2p", "--assume-no-peer-dma"]);
    demo.assert_completed();
    assert!(demo.result["notes"].to_string().contains("--assume-no-peer-dma"), "{}", demo.story());
}

#[test]
fn one_device_alone_needs_no_p2p() {
    demo(&["--devices", "1", "--device-no-p2p"]).assert_completed();
}
