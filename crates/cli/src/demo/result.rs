//! The result of a demo: one object, the last line with `--json`.
//!
//! What the engine counts comes from the reports of `send` and `receive`; what is called verified
//! comes from the device servers and the guest driver; where the guest runs comes from the
//! simulated machines.

use crate::json::{ErrorView, ReportView};
use airlift::{DeviceReport, DowntimeTerms, Outcome, Running};
use airlift_core::{CompatReport, DeviceState, Interface, Side};
use serde::Serialize;

/// One arc of one device, on either side.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct TransitionView {
    /// The device's side.
    pub(crate) side: Side,
    /// State before.
    pub(crate) from: DeviceState,
    /// State reached.
    pub(crate) to: DeviceState,
    /// Milliseconds since the session's start on that side.
    pub(crate) at_ms: f64,
    /// Milliseconds that it took.
    pub(crate) took_ms: f64,
}

/// What a device cost, and whether it arrived whole.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct DeviceView {
    /// Its name.
    pub(crate) id: String,
    /// The interface that it speaks.
    pub(crate) interface: Interface,
    /// How it is reached.
    pub(crate) transport: &'static str,
    /// Bytes of the first generation of initial data.
    pub(crate) initial_bytes: u64,
    /// Bytes sent while it ran.
    pub(crate) precopy_bytes: u64,
    /// Bytes sent after it stopped.
    pub(crate) stop_copy_bytes: u64,
    /// The destination's device server and the guest driver found every byte right.
    pub(crate) verified: bool,
    /// Every arc of both sides, by side and time.
    pub(crate) transitions: Vec<TransitionView>,
    /// Why the guest has lost it; null when it has not.
    pub(crate) quarantined: Option<String>,
}

/// What memory cost, and whether it arrived whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct MemoryView {
    /// Bytes of guest memory.
    pub(crate) bytes_total: u64,
    /// Bytes of pages sent.
    pub(crate) bytes_sent: u64,
    /// Pages that were zero.
    pub(crate) pages_zero: u64,
    /// Pages sent again.
    pub(crate) pages_resent: u64,
    /// The guest driver found every page right.
    pub(crate) verified: bool,
}

/// What the guest driver counted where the guest runs now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct GuestView {
    /// Sequence numbers missing.
    pub(crate) sequence_gaps: u64,
    /// Sequence numbers doubled or out of order.
    pub(crate) sequence_duplicates: u64,
    /// Interrupts raised and never seen.
    pub(crate) interrupts_lost: u64,
    /// Interrupts seen more often than raised.
    pub(crate) interrupts_extra: u64,
}

/// Highest anonymous memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct PeakView {
    /// Of `send`.
    pub(crate) source: u64,
    /// Of `receive`.
    pub(crate) destination: u64,
}

/// The result object.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct DemoResult {
    /// The end.
    pub(crate) outcome: Outcome,
    /// Whether the guest runs on the source: true, false or "unknown".
    pub(crate) source_running: Running,
    /// Whether the guest runs on the destination: true, false or "unknown".
    pub(crate) destination_running: Running,
    /// Milliseconds of the whole migration.
    pub(crate) total_ms: f64,
    /// Milliseconds from the call to pause until RUNNING arrived; null unless completed.
    pub(crate) downtime_ms: Option<f64>,
    /// Milliseconds without vCPUs on the way back; null when they were never paused.
    pub(crate) blackout_ms: Option<f64>,
    /// The longest time between two guest writes over both sides, in milliseconds.
    pub(crate) guest_gap_ms: Option<f64>,
    /// The downtime's terms.
    pub(crate) downtime_terms_ms: Option<DowntimeTerms>,
    /// Rounds of memory before the stop.
    pub(crate) rounds: u32,
    /// By device.
    pub(crate) devices: Vec<DeviceView>,
    /// Memory.
    pub(crate) memory: MemoryView,
    /// What the guest driver counted; null when the guest could not be asked.
    pub(crate) guest: Option<GuestView>,
    /// Highest anonymous memory of the two migration processes.
    pub(crate) peak_anon_bytes: PeakView,
    /// The seed with which the same run can be made again.
    pub(crate) seed: u64,
    /// Declarations and fallbacks that it rests on.
    pub(crate) notes: Vec<String>,
    /// Every finding when the sides do not match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) compatibility: Option<CompatReport>,
    /// What failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<ErrorView>,
    /// The second migration, with `--retry` after one that did not complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) retry: Option<Box<Self>>,
}

impl DemoResult {
    /// The result of a demo that did not get as far as a migration.
    pub(crate) fn failed(seed: u64, error: ErrorView) -> Self {
        Self {
            outcome: Outcome::Aborted,
            source_running: Running::Unknown,
            destination_running: Running::Unknown,
            total_ms: 0.0,
            downtime_ms: None,
            blackout_ms: None,
            guest_gap_ms: None,
            downtime_terms_ms: None,
            rounds: 0,
            devices: Vec::new(),
            memory: MemoryView::default(),
            guest: None,
            peak_anon_bytes: PeakView::default(),
            seed,
            notes: Vec::new(),
            compatibility: None,
            error: Some(error),
            retry: None,
        }
    }

    /// Whether everything that arrived was found right.
    pub(crate) fn is_verified(&self) -> bool {
        let guest = self.guest.is_some_and(|g| g == GuestView::default());
        guest && self.memory.verified && self.devices.iter().all(|d| d.verified)
    }

    /// Takes over what both sides' reports count. Verification is not in there.
    pub(crate) fn take_reports(&mut self, source: Option<&ReportView>, destination: Option<&ReportView>) {
        if let Some(report) = source {
            self.total_ms = report.total_ms;
            self.downtime_ms = report.downtime_ms;
            self.blackout_ms = report.blackout_ms;
            self.downtime_terms_ms = report.downtime_terms_ms;
            self.rounds = report.rounds;
            self.memory = MemoryView {
                bytes_total: report.memory.bytes_total,
                bytes_sent: report.memory.bytes_sent,
                pages_zero: report.memory.pages_zero,
                pages_resent: report.memory.pages_resent,
                verified: false,
            };
        }
        for report in [source, destination].into_iter().flatten() {
            for note in &report.notes {
                if !self.notes.contains(note) {
                    self.notes.push(note.clone());
                }
            }
            if self.compatibility.is_none() && report.outcome == Outcome::Incompatible {
                self.compatibility.clone_from(&report.compatibility);
            }
            let sent = source.is_some_and(|s| std::ptr::eq(s, report));
            let own = if sent { Side::Source } else { Side::Destination };
            // Each side tells its own arcs; the source also those that it was told of, for want of
            // the destination's own report.
            let alone = source.is_none() || destination.is_none();
            for device in &report.devices {
                self.take_device(device, sent, |side| alone || side == own);
            }
        }
    }

    fn take_device(&mut self, report: &DeviceReport, sent: bool, take: impl Fn(Side) -> bool) {
        let id = report.id.to_string();
        let at = self.devices.iter().position(|d| d.id == id).unwrap_or_else(|| {
            self.devices.push(DeviceView {
                id,
                interface: report.interface,
                transport: "vfio-user",
                initial_bytes: 0,
                precopy_bytes: 0,
                stop_copy_bytes: 0,
                verified: false,
                transitions: Vec::new(),
                quarantined: None,
            });
            self.devices.len() - 1
        });
        let device = &mut self.devices[at];
        if sent {
            device.initial_bytes = report.initial_bytes;
            device.precopy_bytes = report.precopy_bytes;
            device.stop_copy_bytes = report.stop_copy_bytes;
            // A destination's device that was given up is the error's cause, and nothing of the guest.
            device.quarantined.clone_from(&report.quarantined);
        }
        let taken = report.transitions.iter().filter(|t| take(t.side));
        device.transitions.extend(taken.map(|t| TransitionView {
            side: t.side,
            from: t.from,
            to: t.to,
            at_ms: t.at_ms,
            took_ms: t.took_ms,
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use airlift::{MemoryReport, Transition};
    use airlift_core::DeviceId;
    use serde_json::{Value, json};

    fn report(side: Side) -> ReportView {
        let device = DeviceReport {
            id: DeviceId::new("dev0").unwrap(),
            interface: Interface::V2,
            initial_bytes: 10,
            precopy_bytes: 20,
            stop_copy_bytes: 30,
            transitions: vec![Transition {
                side,
                from: DeviceState::Running,
                to: DeviceState::PreCopyP2p,
                at_ms: 1.0,
                took_ms: 0.5,
            }],
            quarantined: None,
            was_reset: false,
        };
        ReportView {
            side: side.to_string(),
            session: "00".into(),
            outcome: Outcome::Completed,
            source_running: Running::No,
            destination_running: Running::Yes,
            total_ms: 100.0,
            downtime_ms: Some(10.0),
            blackout_ms: None,
            downtime_terms_ms: Some(DowntimeTerms { pause: 4.0, other: 6.0, ..DowntimeTerms::default() }),
            rounds: 3,
            devices: vec![device],
            memory: MemoryReport { bytes_total: 4096, bytes_sent: 4096, pages_zero: 0, pages_resent: 1 },
            compatibility: None,
            notes: vec!["devices do no peer DMA, as declared".into()],
            error: None,
            exit_code: 0,
        }
    }

    fn keys(value: &Value) -> Vec<&str> {
        let mut keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        keys
    }

    #[test]
    fn the_result_has_every_field_that_scripts_rely_on() {
        let mut result = DemoResult::failed(7, ErrorView::new("cut").on("source").phase("load"));
        result.take_reports(Some(&report(Side::Source)), Some(&report(Side::Destination)));
        result.outcome = Outcome::InDoubt;
        result.guest = Some(GuestView::default());
        let value = serde_json::to_value(&result).unwrap();
        for key in [
            "outcome",
            "source_running",
            "destination_running",
            "total_ms",
            "downtime_ms",
            "guest_gap_ms",
            "downtime_terms_ms",
            "rounds",
            "devices",
            "memory",
            "guest",
            "peak_anon_bytes",
            "error",
        ] {
            assert!(value.get(key).is_some(), "{key} is missing: {value}");
        }
        assert_eq!(value["outcome"], json!("in_doubt"));
        assert_eq!(value["source_running"], json!("unknown"));
        assert_eq!(
            keys(&value["downtime_terms_ms"]),
            [
                "commit",
                "config",
                "device_data",
                "final_dirty_sync",
                "load",
                "memory",
                "other",
                "pause",
                "quiesce",
                "records",
                "run"
            ]
        );
        let device = &value["devices"][0];
        for key in [
            "id",
            "interface",
            "transport",
            "initial_bytes",
            "precopy_bytes",
            "stop_copy_bytes",
            "verified",
            "transitions",
        ] {
            assert!(device.get(key).is_some(), "{key} is missing: {device}");
        }
        assert_eq!(keys(&device["transitions"][0]), ["at_ms", "from", "side", "to", "took_ms"]);
        assert_eq!(device["transitions"][0]["to"], json!("PRE_COPY_P2P"));
        assert_eq!(
            keys(&value["memory"]),
            ["bytes_sent", "bytes_total", "pages_resent", "pages_zero", "verified"]
        );
        assert_eq!(keys(&value["peak_anon_bytes"]), ["destination", "source"]);
        assert_eq!(
            keys(&value["error"]),
            ["advice", "cause", "device", "errno", "message", "phase", "side", "state"]
        );
    }

    #[test]
    fn both_sides_make_one_device_and_one_note() {
        let mut result = DemoResult::failed(7, ErrorView::new("x"));
        result.take_reports(Some(&report(Side::Source)), Some(&report(Side::Destination)));
        assert_eq!(result.devices.len(), 1);
        assert_eq!(result.devices[0].transitions.len(), 2);
        assert_eq!(result.devices[0].stop_copy_bytes, 30);
        assert_eq!(result.notes.len(), 1);
    }

    #[test]
    fn nothing_is_verified_by_the_engines_word() {
        let mut result = DemoResult::failed(7, ErrorView::new("x"));
        result.take_reports(Some(&report(Side::Source)), Some(&report(Side::Destination)));
        assert!(!result.is_verified());
        result.devices[0].verified = true;
        result.memory.verified = true;
        assert!(!result.is_verified(), "without the guest driver's word");
        result.guest = Some(GuestView::default());
        assert!(result.is_verified());
        result.guest = Some(GuestView { interrupts_lost: 1, ..GuestView::default() });
        assert!(!result.is_verified());
    }
}
