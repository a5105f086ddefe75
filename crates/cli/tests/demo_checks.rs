//! Each check of the demo can fail: one fault each, and the one thing that must notice it.

mod common;

use common::demo;

#[test]
fn a_byte_changed_behind_the_checksum_is_found_by_the_device() {
    let demo = demo(&["--sabotage", "corrupt-device-byte", "--device-dirty-rate", "0"]);
    assert_eq!(demo.result["outcome"], "completed", "{}", demo.story());
    assert_eq!(demo.result["devices"][0]["verified"], false, "{}", demo.story());
    assert_eq!(demo.result["devices"][1]["verified"], true, "{}", demo.story());
    assert_eq!(demo.code, 1, "{}", demo.story());
}

// V2-VALIDATE
#[test]
fn a_device_that_validates_refuses_it_and_the_source_runs_on() {
    let demo = demo(&["--sabotage", "corrupt-device-byte-checked", "--device-dirty-rate", "0"]);
    assert_eq!(demo.result["outcome"], "aborted", "{}", demo.story());
    assert_eq!(demo.result["source_running"], true);
    assert_eq!(demo.code, 1);
    let cause = &demo.result["error"]["cause"];
    assert_eq!(cause["side"], "destination", "{}", demo.story());
    assert_eq!(cause["device"], "dev0");
    assert_eq!(cause["errno"]["name"], "EINVAL");
    assert_eq!(cause["errno"]["number"], 22);
    common::assert_all_right(&demo.result, &demo.story());
}

#[test]
fn a_byte_of_memory_that_changed_is_found_by_the_guest() {
    let demo = demo(&["--sabotage", "corrupt-memory-byte"]);
    assert_eq!(demo.result["memory"]["verified"], false, "{}", demo.story());
    assert_eq!(demo.code, 1);
}

// I12, V2-DIRTY
#[test]
fn a_dropped_bit_of_a_dirty_report_is_found_by_the_guest() {
    let demo = demo(&["--sabotage", "drop-dirty-bit"]);
    assert_eq!(demo.result["memory"]["verified"], false, "{}", demo.story());
    assert_eq!(demo.code, 1);
}

// I13, V2-DIRTY-FINAL
#[test]
fn a_record_that_writes_memory_needs_the_final_sync_behind_it() {
    let demo = demo(&["--sabotage", "sync-before-records"]);
    assert!(demo.result["guest"]["sequence_gaps"].as_u64().unwrap() > 0, "{}", demo.story());
    assert_eq!(demo.code, 1);
}

#[test]
fn an_interrupt_raised_inside_the_last_arc_arrives_exactly_once() {
    // Without DMA there is no other interrupt: the one that was raised is that one.
    let demo = demo(&["--sabotage", "last-arc-interrupt", "--device-dma-rate", "0"]);
    demo.assert_completed();
    for device in ["dev0", "dev1"] {
        let stopped = demo.events("stopped", "source", device);
        let raised: u64 =
            stopped.last().unwrap()["raised"].as_array().unwrap().iter().filter_map(|n| n.as_u64()).sum();
        assert_eq!(raised, 1, "{device}: {stopped:?}");
    }
    let check = demo.events("check", "destination", "sim-vm");
    assert_eq!(check.last().unwrap()["interrupts"]["received"], 2, "{check:?}");
}
