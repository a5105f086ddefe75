//! The figures that the phases note, and the report that is made of them.

use super::session::Session;
use crate::event::Transition;
use crate::machine::MachineError;
use crate::memory::SweepStats;
use crate::report::{DowntimeTerms, MemoryReport, MigrationReport, Outcome, Running};
use crate::set::{DeviceSet, ms};
use airlift_core::{CompatReport, Failure, Side, Timestamp};
use airlift_stream::message::{DeviceTransition, LoadedTerms, RunningTerms};
use std::time::Duration;

/// What the phases note.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub(super) begun: Timestamp,
    pub(super) outcome: Option<Outcome>,
    pub(super) incompatible: bool,
    pub(super) error: Option<Failure>,
    pub(super) link_error: Option<Failure>,
    pub(super) compatibility: Option<CompatReport>,
    pub(super) notes: Vec<String>,
    pub(super) rounds: u32,
    pub(super) memory: MemoryReport,
    /// The call to pause.
    pub(super) paused: Option<Timestamp>,
    pub(super) pause: Duration,
    pub(super) quiesce: Duration,
    pub(super) records: Duration,
    pub(super) final_dirty_sync: Duration,
    pub(super) memory_tail: Duration,
    pub(super) device_data: Duration,
    /// Every byte has been given to the connections.
    pub(super) sent: Option<Timestamp>,
    pub(super) all_sent: bool,
    pub(super) loaded: Option<(LoadedTerms, Timestamp)>,
    pub(super) commit_journal: Duration,
    pub(super) running: Option<(RunningTerms, Timestamp)>,
    pub(super) blackout: Option<Duration>,
}

impl Figures {
    /// Adds what a sweep has moved; gives it back.
    pub(super) fn swept(&mut self, round: u32, stats: SweepStats) -> SweepStats {
        self.memory.bytes_sent += stats.bytes_sent;
        self.memory.pages_zero += stats.pages_zero;
        if round > 0 {
            self.memory.pages_resent += stats.pages;
        }
        stats
    }

    /// The downtime and its terms: disjoint on the critical path.
    fn downtime(&self) -> Option<(Duration, DowntimeTerms)> {
        let us = Duration::from_micros;
        let paused = self.paused?;
        let (running, ended) = self.running.as_ref()?;
        let (loaded, loaded_at) = self.loaded.as_ref()?;
        let total = ended.since(paused);
        let told = us(loaded.load_us + loaded.config_us + loaded.memory_us + loaded.journal_us);
        // Between the last byte given to a socket and the destination's load, data was under way.
        let under_way = loaded_at.since(self.sent?).saturating_sub(told);
        let mut terms = DowntimeTerms {
            pause: ms(self.pause),
            quiesce: ms(self.quiesce),
            records: ms(self.records),
            final_dirty_sync: ms(self.final_dirty_sync),
            device_data: ms(self.device_data + under_way),
            memory: ms(self.memory_tail + us(loaded.memory_us)),
            load: ms(us(loaded.load_us)),
            config: ms(us(loaded.config_us)),
            commit: ms(self.commit_journal + us(loaded.journal_us + running.commit_us)),
            run: ms(us(running.run_us)),
            other: 0.0,
        };
        terms.other = (ms(total) - terms.named()).max(0.0);
        Some((total, terms))
    }
}

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
            notes: figures.notes.clone(),
            error: if outcome == Outcome::Completed { None } else { figures.error.clone() },
        }
    }
}
