//! The report of `send` or `receive`.

use super::{downtime_lines, error_text};
use crate::json::ReportView;
use crate::units::{Size, counted, millis};
use airlift::{Outcome, Running};

/// The report as text, without a last newline.
pub(crate) fn report_text(report: &ReportView) -> String {
    let mut lines = Vec::new();
    if let Some(error) = &report.error {
        lines.push(error_text(error));
    }
    lines.push(match report.outcome {
        Outcome::Completed => {
            format!("Completed in {}: the guest runs on the destination.", millis(report.total_ms))
        }
        Outcome::Aborted => format!("Aborted: {}.", whereabouts(report)),
        Outcome::Cancelled => format!("Cancelled: {}.", whereabouts(report)),
        Outcome::Incompatible => "The two sides do not match. No device was touched.".to_owned(),
        Outcome::InDoubt => "In doubt: this side cannot tell where the guest runs, and does not start it. \
                             Look at the other side, then use airlift resolve."
            .to_owned(),
    });
    if report.outcome == Outcome::Incompatible
        && let Some(compatibility) = &report.compatibility
    {
        lines.extend(compatibility.findings.iter().map(|finding| format!("  {finding}")));
    }
    if let (Some(downtime), Some(terms)) = (report.downtime_ms, &report.downtime_terms_ms) {
        lines.push(format!("Downtime: {}", millis(downtime)));
        lines.extend(downtime_lines(terms));
    }
    if let Some(blackout) = report.blackout_ms {
        lines.push(format!("The guest was paused for {} on the way.", millis(blackout)));
    }
    if report.memory.bytes_total > 0 {
        lines.push(format!(
            "Memory: {} of guest memory, {} sent in {} and the stop, {} zero pages, {} pages sent again",
            Size(report.memory.bytes_total),
            Size(report.memory.bytes_sent),
            counted(report.rounds, "round"),
            report.memory.pages_zero,
            report.memory.pages_resent
        ));
    }
    for device in &report.devices {
        let mut line = format!(
            "Device {}: {} while it ran, {} after the stop",
            device.id,
            Size(device.precopy_bytes),
            Size(device.stop_copy_bytes)
        );
        if let Some(reason) = &device.quarantined {
            line += &format!("; given up: {reason}");
        }
        if device.was_reset {
            line += "; reset: what the guest had in it is lost";
        }
        lines.push(line);
    }
    lines.extend(report.notes.iter().map(|note| format!("Note: {note}")));
    lines.join("\n")
}

/// Where the guest runs, as far as this side knows.
fn whereabouts(report: &ReportView) -> &'static str {
    match (report.source_running, report.destination_running) {
        (Running::Yes, _) => "the guest runs on the source",
        (_, Running::Yes) => "the guest runs on the destination",
        (Running::No, Running::No) => "the guest runs on neither side",
        (Running::No, Running::Unknown) => {
            "the guest does not run on the source; of the destination nothing is known"
        }
        (Running::Unknown, Running::No) => "the guest does not run here",
        (Running::Unknown, Running::Unknown) => "where the guest runs is not known",
    }
}
