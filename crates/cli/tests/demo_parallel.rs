//! Devices load in parallel: seen in the logs of their servers, not in the engine's word.

mod common;

use common::demo;

// V2-BLOCKING
#[test]
fn four_slow_loads_overlap() {
    let demo = demo(&["--devices", "4", "--device-load-time", "300ms"]);
    demo.assert_completed();
    let loads: Vec<(u64, u64)> = (0..4)
        .map(|n| {
            let arcs = demo.arcs("destination", &format!("dev{n}"));
            let load = arcs.iter().find(|(from, to, ..)| from == "RESUMING" && to == "STOP");
            load.map(|(_, _, start, end)| (*start, *end)).unwrap()
        })
        .collect();
    let last_start = loads.iter().map(|(start, _)| start).max().unwrap();
    let first_end = loads.iter().map(|(_, end)| end).min().unwrap();
    assert!(last_start < first_end, "one load ended before another began: {loads:?}");
}
