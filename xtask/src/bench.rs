//! Benchmarks: the release build's demo, run several times a row, in turns, with medians.
//!
//! Machines drift, so that rows are never run one after the other: each pass runs every row once. A
//! figure that is a promise is a ratio of two rows of the same run.

use crate::{Checked, Findings};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// One way to run the demo.
struct Row {
    name: &'static str,
    args: &'static [&'static str],
}

const ROWS: &[Row] = &[
    Row { name: "the README's demo", args: &[] },
    Row { name: "256 MiB state, 1 MiB/s, PRE_COPY", args: &["--devices", "1", "--state-size", "256MiB"] },
    Row {
        name: "256 MiB state, 1 MiB/s, no PRE_COPY",
        args: &["--devices", "1", "--state-size", "256MiB", "--device-no-precopy"],
    },
    Row {
        name: "1 device, load 300 ms",
        args: &["--devices", "1", "--state-size", "16MiB", "--device-load-time", "300ms"],
    },
    Row {
        name: "4 devices, load 300 ms",
        args: &["--devices", "4", "--state-size", "16MiB", "--device-load-time", "300ms"],
    },
    Row { name: "1 device of 64 MiB", args: &["--devices", "1", "--state-size", "64MiB"] },
    Row { name: "1 device of 1 GiB", args: &["--devices", "1", "--state-size", "1GiB"] },
    Row { name: "1 device of 4 GiB", args: &["--devices", "1", "--state-size", "4GiB"] },
];

const TERMS: [&str; 11] = [
    "pause",
    "quiesce",
    "records",
    "final_dirty_sync",
    "device_data",
    "memory",
    "load",
    "config",
    "commit",
    "run",
    "other",
];

/// Runs every row `passes` times and prints the table.
pub(crate) fn run(root: &Path, passes: usize) -> Checked {
    let binary = root.join("target/release/airlift");
    if !binary.is_file() {
        return Err("target/release/airlift is not there: cargo build --release".into());
    }
    let mut results: Vec<Vec<Value>> = ROWS.iter().map(|_| Vec::new()).collect();
    for pass in 0..passes {
        for (row, results) in ROWS.iter().zip(&mut results) {
            eprintln!("pass {} of {passes}: {}", pass + 1, row.name);
            results.push(demo(&binary, row)?);
        }
    }
    Ok(table(&results))
}

fn demo(binary: &Path, row: &Row) -> Result<Value, String> {
    let output = Command::new(binary)
        .args(["demo", "--json"])
        .args(row.args)
        .output()
        .map_err(|e| format!("{}: {e}", binary.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().ok_or("the demo has said nothing")?;
    let result: Value = serde_json::from_str(last).map_err(|e| format!("{}: {e}", row.name))?;
    match (&result["outcome"], output.status.success()) {
        (Value::String(outcome), true) if outcome == "completed" => Ok(result),
        (outcome, _) => Err(format!("{}: {outcome}, {}", row.name, output.status)),
    }
}

fn figures(results: &[Value], pointer: &str) -> Vec<f64> {
    let mut all: Vec<f64> = results.iter().filter_map(|r| r.pointer(pointer)?.as_f64()).collect();
    all.sort_by(f64::total_cmp);
    all
}

fn median(sorted: &[f64]) -> f64 {
    match sorted.len() {
        0 => 0.0,
        n if n.is_multiple_of(2) => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
        n => sorted[n / 2],
    }
}

fn cell(sorted: &[f64]) -> String {
    let (low, high) = (sorted.first().unwrap_or(&0.0), sorted.last().unwrap_or(&0.0));
    format!("{:.0} ({low:.0}-{high:.0})", median(sorted))
}

fn table(results: &[Vec<Value>]) -> Findings {
    let mut findings = Findings::default();
    findings.say("| | total ms | downtime ms | guest gap ms | stop-copy KiB | peak KiB source | destination | largest terms, ms |");
    findings.say("|---|---|---|---|---|---|---|---|");
    for (row, results) in ROWS.iter().zip(results) {
        let of = |pointer: &str| figures(results, pointer);
        let kib = |pointer: &str| format!("{:.0}", median(&of(pointer)) / 1024.0);
        let mut terms: Vec<_> =
            TERMS.iter().map(|t| (median(&of(&format!("/downtime_terms_ms/{t}"))), *t)).collect();
        terms.sort_by(|a, b| b.0.total_cmp(&a.0));
        let largest: Vec<_> = terms.iter().take(3).map(|(ms, term)| format!("{term} {ms:.1}")).collect();
        findings.say(format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            row.name,
            cell(&of("/total_ms")),
            cell(&of("/downtime_ms")),
            cell(&of("/guest_gap_ms")),
            kib("/devices/0/stop_copy_bytes"),
            kib("/peak_anon_bytes/source"),
            kib("/peak_anon_bytes/destination"),
            largest.join(", "),
        ));
    }
    let downtime = |row: usize| median(&figures(&results[row], "/downtime_ms"));
    let peak = |row: usize| median(&figures(&results[row], "/peak_anon_bytes/destination")) / 1048576.0;
    findings.say("");
    findings.say("| promise | figure |");
    findings.say("|---|---|");
    findings.say(format!(
        "| switchover of 4 devices to 1, load 300 ms: under 1.3 | {:.2} |",
        downtime(4) / downtime(3)
    ));
    findings.say(format!("| downtime with PRE_COPY to without | {:.2} |", downtime(1) / downtime(2)));
    let share = median(&figures(&results[1], "/devices/0/stop_copy_bytes")) / (256.0 * 1048576.0) * 100.0;
    findings.say(format!("| stop-copy bytes with PRE_COPY, of 256 MiB: under 5 % | {share:.2} % |"));
    let peaks = [peak(5), peak(6), peak(7)];
    let spread =
        peaks.iter().copied().fold(f64::MIN, f64::max) - peaks.iter().copied().fold(f64::MAX, f64::min);
    findings.say(format!(
        "| spread of the destination's peak over 64 MiB, 1 GiB, 4 GiB: within 8 MiB | {spread:.2} MiB |"
    ));
    findings
}
