//! PRE_COPY earns its place: what it moves need not move in the downtime.

mod common;

use common::demo;

const STATE: u64 = 32 << 20;

#[test]
fn with_precopy_little_is_left_for_the_stop() {
    let demo = demo(&["--state-size", "32MiB", "--device-dirty-rate", "1MiB/s"]);
    demo.assert_completed();
    for device in demo.result["devices"].as_array().unwrap() {
        let left = device["stop_copy_bytes"].as_u64().unwrap();
        assert!(left * 20 < STATE, "{left} bytes of {STATE} were left: {}", demo.story());
    }
}

#[test]
fn without_precopy_all_of_it_is() {
    let demo = demo(&["--state-size", "32MiB", "--device-dirty-rate", "1MiB/s", "--device-no-precopy"]);
    demo.assert_completed();
    for device in demo.result["devices"].as_array().unwrap() {
        assert_eq!(device["precopy_bytes"], 0, "{}", demo.story());
        assert!(device["stop_copy_bytes"].as_u64().unwrap() >= STATE, "{}", demo.story());
    }
}
