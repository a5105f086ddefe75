//! The demo as a user runs it: it completes, verified, and says everything that it promises to say.

mod common;

use common::{AIRLIFT, Process, demo};
use serde_json::Value;
use std::process::Command;

#[test]
fn both_under_load_it_completes_and_every_byte_is_right() {
    let demo = demo(&[]);
    demo.assert_completed();
    let result = &demo.result;
    assert_eq!(result["devices"].as_array().unwrap().len(), 2);
    assert_eq!(result["memory"]["bytes_total"], 16 << 20);
    // Under load the guest wrote pages again that were sent before.
    assert!(result["memory"]["pages_resent"].as_u64().unwrap() > 0, "{}", demo.story());
    assert!(result["memory"]["pages_zero"].as_u64().unwrap() > 0, "{}", demo.story());
    for device in result["devices"].as_array().unwrap() {
        assert!(device["initial_bytes"].as_u64().unwrap() >= 4 << 20, "{}", demo.story());
        assert!(device["precopy_bytes"].as_u64() >= device["initial_bytes"].as_u64(), "{}", demo.story());
        let sides: Vec<&Value> =
            device["transitions"].as_array().unwrap().iter().map(|t| &t["side"]).collect();
        assert!(sides.contains(&&Value::from("source")) && sides.contains(&&Value::from("destination")));
    }
}

#[test]
fn the_terms_of_the_downtime_add_up_to_it() {
    let demo = demo(&[]);
    let terms = demo.result["downtime_terms_ms"].as_object().unwrap();
    let sum: f64 = terms.values().map(|ms| ms.as_f64().unwrap()).sum();
    let downtime = demo.result["downtime_ms"].as_f64().unwrap();
    assert!((sum - downtime).abs() < 0.01, "terms {sum} ms, downtime {downtime} ms: {}", demo.story());
    assert!(terms.values().all(|ms| ms.as_f64().unwrap() >= 0.0), "{}", demo.story());
    // The guest did not write while it was stopped, and it saw nothing longer than that by much more
    // than a scheduler's hiccup: the gap is measured, not derived.
    assert!(demo.result["guest_gap_ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn every_line_is_json_with_schema_and_event_and_comes_from_real_processes() {
    let demo = demo(&[]);
    for line in &demo.lines {
        assert_eq!(line["schema"], "airlift.1", "{line}");
        assert!(line["event"].is_string(), "{line}");
    }
    assert_eq!(demo.lines.iter().filter(|l| l["event"] == "result").count(), 1);
    for (host, process) in [("source", "send"), ("destination", "receive")] {
        let results = demo.events("side-result", host, process);
        assert_eq!(results.len(), 1, "{process}");
        assert_eq!(results[0]["outcome"], "completed", "{process}");
    }
    for device in ["dev0", "dev1"] {
        let loaded = demo.events("loaded", "destination", device);
        assert_eq!(loaded.len(), 1, "{device} says what it found in what it was given");
        assert_eq!(loaded[0]["verified"], true);
    }
    // The VMMs were told how it ended.
    for host in ["source", "destination"] {
        let ended = demo.events("session-ended", host, "sim-vm");
        assert!(ended.iter().all(|e| e["outcome"] == "completed"), "{host}: {ended:?}");
    }
}

#[test]
fn it_runs_over_unix_sockets_and_with_several_channels() {
    demo(&["--transport", "unix"]).assert_completed();
    demo(&["--channels", "4", "--devices", "3"]).assert_completed();
}

// V2-DIRTY-NONE
#[test]
fn it_runs_with_one_device_and_without_logging() {
    demo(&["--devices", "1"]).assert_completed();
    let demo = demo(&["--device-no-dirty-log"]);
    demo.assert_completed();
    assert!(demo.result["notes"].to_string().contains("not logged"), "{}", demo.story());
}

#[test]
fn the_same_seed_gives_the_same_state() {
    let digest = |demo: &common::Demo| demo.events("loaded", "destination", "dev0")[0]["tick"].clone();
    let run = || demo(&["--seed", "7", "--device-dirty-rate", "0", "--device-dma-rate", "0"]);
    let (one, two) = (run(), run());
    assert_eq!(one.result["seed"], 7);
    assert_eq!(digest(&one), digest(&two));
}

#[test]
fn a_person_reads_what_happened_and_where_the_time_went() {
    let output = Command::new(AIRLIFT)
        .args(["demo", "--state-size", "4MiB", "--memory", "16MiB", "--seed", "3"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    for words in [
        "2 devices of 4 MiB",
        "the guest is paused; devices stop together",
        "Completed and verified in",
        "the guest runs on the destination",
        "Downtime",
        "other",
        "every byte right",
        "0 sequence numbers missing, 0 doubled; 0 interrupts lost, 0 too many",
        "Seed 3.",
    ] {
        assert!(text.contains(words), "{words:?} is missing:\n{text}");
    }
}

#[test]
fn an_interrupt_from_the_terminal_goes_back_in_order() {
    // Slow enough that the signal comes long before the end.
    let demo = Process::start(&[
        "demo",
        "--state-size",
        "4MiB",
        "--memory",
        "16MiB",
        "--device-load-rate",
        "256KiB/s",
    ]);
    loop {
        let phase = demo.wait_for("phase");
        if phase["phase"] == "precopy" {
            break;
        }
    }
    rustix::process::kill_process(demo.pid(), rustix::process::Signal::INT).unwrap();
    let (result, code) = demo.finish();
    assert_eq!(result["outcome"], "cancelled", "{result:#}");
    assert_eq!(code, 5);
    assert_eq!(result["source_running"], true, "{result:#}");
    common::assert_all_right(&result, &result.to_string());
}
