//! The report of the source, made of what its phases have noted.

use super::session::Session;
use crate::event::Transition;
use crate::machine::MachineError;
use crate::report::{DeviceReport, MigrationReport, Outcome, Running};
use crate::set::{DeviceSet, ms};
use airlift_core::Side;
use airlift_stream::message::DeviceTransition;
use std::time::Duration;

/// An arc of the destination, as it told it.
fn told(transition: &DeviceTransition) -> Transition {
    let ms = |us: u64| ms(Duration::from_micros(us));
    Transition {
        side: Side::Destination,
        from: transition.from,
        to: transition.to,
        at_ms: ms(transition.at_us),
        took_ms: ms(transition.took_us),
    }
}

/// Data after the stop beyond what a device has said before it: what is less is not what a downtime is too
/// long by.
const UNANNOUNCED: u64 = 1 << 20;

/// What the downtime limit could not cover. A device of interface v1 need not say before the stop what it
/// gives only after it.
fn unannounced(devices: &[DeviceReport], announced: &[u64]) -> Vec<String> {
    let late = |(device, said): (&DeviceReport, &u64)| {
        let (id, came) = (&device.id, device.stop_copy_bytes);
        (came > said.saturating_add(UNANNOUNCED)).then(|| {
            format!("{id}: gave {came} bytes after the stop and had said {said} before it; the downtime limit did not cover the rest")
        })
    };
    devices.iter().zip(announced).filter_map(late).collect()
}

impl Session {
    pub(super) fn report(
        &self,
        running: Result<bool, MachineError>,
        set: Option<&DeviceSet>,
    ) -> MigrationReport {
        let figures = &self.figures;
        let outcome = figures.outcome.unwrap_or(Outcome::Aborted);
        let source_running = match running {
            Ok(true) => Running::Yes,
            Ok(false) => Running::No,
            Err(_) => Running::Unknown,
        };
        let destination_running = match outcome {
            Outcome::Completed => Running::Yes,
            Outcome::InDoubt => Running::Unknown,
            Outcome::Aborted | Outcome::Cancelled | Outcome::Incompatible => Running::No,
        };
        let mut devices = set.map(DeviceSet::reports).unwrap_or_default();
        let loaded = figures.loaded.iter().flat_map(|(terms, _)| &terms.transitions);
        let run = figures.running.iter().flat_map(|(terms, _)| &terms.transitions);
        for transition in loaded.chain(run) {
            let index = usize::try_from(transition.device).unwrap_or(usize::MAX);
            if let Some(device) = devices.get_mut(index) {
                device.transitions.push(told(transition));
            }
        }
        let downtime = (outcome == Outcome::Completed).then(|| figures.downtime()).flatten();
        let mut notes = figures.notes.clone();
        if downtime.as_ref().is_some_and(|(total, _)| *total > self.options.downtime_limit) {
            notes.extend(unannounced(&devices, &figures.announced));
        }
        MigrationReport {
            session: self.protocol.session().to_string(),
            outcome,
            source_running,
            destination_running,
            total_ms: ms(self.now().since(figures.begun)),
            downtime_ms: downtime.as_ref().map(|(total, _)| ms(*total)),
            blackout_ms: figures.blackout.map(ms),
            downtime_terms_ms: downtime.map(|(_, terms)| terms),
            rounds: figures.rounds,
            devices,
            memory: figures.memory,
            compatibility: figures.compatibility.clone(),
            notes,
            error: if outcome == Outcome::Completed { None } else { figures.error.clone() },
        }
    }
}
