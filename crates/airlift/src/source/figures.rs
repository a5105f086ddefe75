//! The figures that the phases note, and the downtime that is made of them.

use crate::memory::SweepStats;
use crate::report::{DowntimeTerms, MemoryReport, Outcome};
use crate::set::ms;
use airlift_core::{CompatReport, Failure, Timestamp};
use airlift_stream::message::{LoadedTerms, RunningTerms};
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
    /// By device: the bytes that it said to have left when the guest was to be stopped.
    pub(super) announced: Vec<u64>,
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
    pub(super) fn downtime(&self) -> Option<(Duration, DowntimeTerms)> {
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
