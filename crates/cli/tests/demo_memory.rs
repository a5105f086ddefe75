//! The migration's own memory does not grow with the devices' state.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

mod common;

use common::{Demo, demo};

const MIB: u64 = 1 << 20;

fn peaks(demo: &Demo) -> [u64; 2] {
    let peak = |side: &str| demo.result["peak_anon_bytes"][side].as_u64().unwrap();
    [peak("source"), peak("destination")]
}

#[track_caller]
fn assert_alike(demos: &[Demo]) {
    for demo in demos {
        demo.assert_completed();
        assert!(peaks(demo).iter().all(|p| *p > 0 && *p < 96 * MIB), "{:?}: {}", peaks(demo), demo.story());
    }
    for side in [0, 1] {
        let of: Vec<u64> = demos.iter().map(|d| peaks(d)[side]).collect();
        let spread = of.iter().max().unwrap() - of.iter().min().unwrap();
        assert!(spread < 8 * MIB, "peaks {of:?} differ by {spread}");
    }
}

// I15, W-CREDIT
#[test]
fn a_slow_device_holds_the_sender_back() {
    // At a rate that makes everything that was sent wait: without back-pressure it would pile up.
    let slow = demo(&[
        "--devices",
        "1",
        "--state-size",
        "128MiB",
        "--device-no-precopy",
        "--device-load-rate",
        "24MiB/s",
        "--downtime-limit",
        "60s",
    ]);
    slow.assert_completed();
    assert!(peaks(&slow).iter().all(|p| *p < 96 * MIB), "{:?}: {}", peaks(&slow), slow.story());
}

#[test]
#[ignore = "needs 10 GiB of memory and some minutes: cargo test --release -- --ignored"]
fn one_gigabyte_and_four_take_no_more_than_64_megabytes() {
    let sizes = ["64MiB", "1GiB", "4GiB"];
    let of = |size: &&str| demo(&["--devices", "1", "--state-size", size, "--timeout", "10m"]);
    assert_alike(&sizes.iter().map(of).collect::<Vec<_>>());
}
