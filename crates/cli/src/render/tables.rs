//! The downtime, term by term.

use crate::units::millis;
use airlift::DowntimeTerms;

/// A line for each term of the downtime that is not zero when printed, the largest first, with what
/// it stands for; `other` always, last.
pub(crate) fn downtime_lines(terms: &DowntimeTerms) -> Vec<String> {
    let mut named = [
        (terms.pause, "pause", "vCPUs paused, access to devices closed"),
        (terms.quiesce, "quiesce", "devices to P2P, then stopped"),
        (terms.records, "records", "interrupts drained, the machine's records saved"),
        (terms.final_dirty_sync, "final dirty sync", "the last reports of written memory"),
        (terms.device_data, "device data", "what devices had left"),
        (terms.memory, "memory", "the memory that was left, with device data beside it"),
        (terms.load, "load", "devices validated what they got"),
        (terms.config, "config", "records restored on the destination"),
        (terms.commit, "commit", "both journals and the way of COMMIT"),
        (terms.run, "run", "devices and vCPUs started"),
    ];
    named.sort_by(|a, b| b.0.total_cmp(&a.0));
    let line = |(ms, name, what): (f64, &str, &str)| format!("{:>10}  {name:<17} {what}", millis(ms));
    let shown = named.into_iter().filter(|(ms, ..)| *ms >= 0.005).map(line);
    shown.chain([line((terms.other, "other", "the wire's latency and hand-overs between threads"))]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_term_stands_first_and_other_last() {
        let terms = DowntimeTerms { pause: 1.0, memory: 20.0, other: 30.0, ..DowntimeTerms::default() };
        let lines = downtime_lines(&terms);
        assert_eq!(lines.len(), 3);
        assert!(lines[0].contains("20.0 ms  memory"), "{lines:?}");
        assert!(lines[1].contains("1.00 ms  pause"), "{lines:?}");
        assert!(lines[2].contains("30.0 ms  other"), "{lines:?}");
    }
}
