//! The figures that the phases note, and what LOADED and RUNNING tell of them.

use crate::report::Outcome;
use crate::set::Recorder;
use airlift_core::commit::RecordKind;
use airlift_core::{CompatReport, DeviceId, Failure, Timestamp};
use airlift_stream::message::{DeviceTransition, LoadedTerms, RunningTerms};
use std::time::Duration;

/// What the phases note.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub(super) begun: Timestamp,
    pub(super) outcome: Option<Outcome>,
    pub(super) incompatible: bool,
    pub(super) error: Option<Failure>,
    pub(super) compatibility: Option<CompatReport>,
    pub(super) notes: Vec<String>,
    /// Devices by their number.
    pub(super) ids: Vec<DeviceId>,
    pub(super) memory: Duration,
    pub(super) config: Duration,
    pub(super) load: Duration,
    journal_loaded: Duration,
    journal_commit: Duration,
    pub(super) committed_at: Option<Timestamp>,
    pub(super) start_begun: Option<Timestamp>,
    pub(super) started: Option<Timestamp>,
    pub(super) loaded_said: bool,
    loaded: LoadedTerms,
    /// Transitions that LOADED has told, by device.
    told: Vec<usize>,
}

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Figures {
    pub(super) fn journal_took(&mut self, kind: RecordKind, took: Duration) {
        match kind {
            RecordKind::Loaded => self.journal_loaded += took,
            RecordKind::Committed | RecordKind::RunStarted => self.journal_commit += took,
            _ => {}
        }
    }

    /// The terms that LOADED tells, once.
    pub(super) fn finish_loaded(&mut self, recorder: &Recorder) -> LoadedTerms {
        let transitions = self.new_transitions(recorder);
        self.loaded = LoadedTerms {
            load_us: us(self.load),
            config_us: us(self.config),
            // What the engine moves is written as it arrives: the source counts it as data under way.
            memory_us: us(self.memory),
            journal_us: us(self.journal_loaded),
            transitions,
        };
        self.loaded.clone()
    }

    /// What LOADED has told, for saying it again.
    pub(super) fn loaded_terms(&self) -> LoadedTerms {
        self.loaded.clone()
    }

    /// The terms that RUNNING tells.
    pub(super) fn running_terms(&mut self, recorder: &Recorder) -> RunningTerms {
        let run = match (self.start_begun, self.started) {
            (Some(begun), Some(started)) => started.since(begun),
            _ => Duration::ZERO,
        };
        RunningTerms {
            commit_us: us(self.journal_commit),
            run_us: us(run),
            transitions: self.new_transitions(recorder),
        }
    }

    fn new_transitions(&mut self, recorder: &Recorder) -> Vec<DeviceTransition> {
        self.told.resize(self.ids.len(), 0);
        let micros = |ms: f64| us(Duration::from_secs_f64(ms.max(0.0) / 1e3));
        let mut all = Vec::new();
        for ((device, id), told) in (0..).zip(&self.ids).zip(&mut self.told) {
            let transitions = recorder.transitions(id);
            for t in transitions.iter().skip(*told) {
                all.push(DeviceTransition {
                    device,
                    from: t.from,
                    to: t.to,
                    at_us: micros(t.at_ms),
                    took_us: micros(t.took_ms),
                });
            }
            *told = transitions.len();
        }
        all
    }
}
