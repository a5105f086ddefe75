//! The report of the destination, made of what its phases have noted.

use super::session::Session;
use crate::machine::MachineError;
use crate::report::{MemoryReport, MigrationReport, Outcome, Running};
use crate::set::{DeviceSet, ms};
use std::sync::atomic::Ordering;

impl Session {
    pub(super) fn report(
        &self,
        running: Result<bool, MachineError>,
        set: Option<&DeviceSet>,
    ) -> MigrationReport {
        let figures = &self.figures;
        let outcome = figures.outcome.unwrap_or(Outcome::Aborted);
        let destination_running = match running {
            Ok(true) => Running::Yes,
            Ok(false) => Running::No,
            Err(_) => Running::Unknown,
        };
        let gauges = &self.control.gauges;
        MigrationReport {
            session: self.protocol.session().to_string(),
            outcome,
            source_running: match outcome {
                // It said COMMIT, and does not run after that.
                Outcome::Completed => Running::No,
                _ => Running::Unknown,
            },
            destination_running,
            total_ms: ms(self.now().since(figures.begun)),
            downtime_ms: None,
            blackout_ms: None,
            downtime_terms_ms: None,
            rounds: gauges.round.load(Ordering::Relaxed),
            devices: set.map(DeviceSet::reports).unwrap_or_default(),
            memory: MemoryReport {
                bytes_sent: gauges.memory_sent.load(Ordering::Relaxed),
                ..MemoryReport::default()
            },
            compatibility: figures.compatibility.clone(),
            notes: figures.notes.clone(),
            error: if outcome == Outcome::Completed { None } else { figures.error.clone() },
        }
    }
}
