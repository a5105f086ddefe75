//! All dirty reports, ORed into one map at 4 KiB: the machine's own writes and each DMA domain
//! ([`domains`](super::domains)).
//!
//! Order: logging starts before the first copy; fetch and clear, then read the page; an error of a
//! report makes its whole range dirty (V2-DIRTY). A domain without a source is dirty as a whole at
//! every sync (V2-DIRTY-NONE), and that is said.

use super::domains::{Domains, Reporter};
use crate::machine::{Machine, MachineError};
use airlift_core::{DirtyMap, InvalidLayout, MemoryLayout};

/// The map of dirty pages and everyone who reports into it.
pub(crate) struct DirtyTracking {
    dirty: DirtyMap,
    /// An empty map, given back by a sweep.
    spare: Option<DirtyMap>,
    domains: Domains,
    machine_failed: bool,
}

impl std::fmt::Debug for DirtyTracking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyTracking").field("domains", &self.domains).finish_non_exhaustive()
    }
}

impl DirtyTracking {
    /// Starts all logging and takes every page as dirty: the first round sends everything. What has
    /// no source, and why, goes into `notes`.
    ///
    /// # Errors
    /// When the machine cannot track its own writes.
    pub(crate) fn start(
        layout: &MemoryLayout,
        sources: Vec<Reporter>,
        machine: &mut dyn Machine,
        notes: &mut Vec<String>,
    ) -> Result<Self, TrackingError> {
        let mut dirty = DirtyMap::new(layout)?;
        machine.start_dirty()?;
        let domains = Domains::start(sources, notes);
        dirty.mark_all();
        Ok(Self { spare: None, dirty, domains, machine_failed: false })
    }

    /// Fetches and clears every report.
    ///
    /// # Errors
    /// When the machine's own report fails for the second time; the first time all memory is taken
    /// as dirty instead.
    pub(crate) fn sync(&mut self, machine: &mut dyn Machine) -> Result<(), MachineError> {
        let dirty = &mut self.dirty;
        if let Err(error) = machine.sync_dirty(&mut |range| dirty.mark(range)) {
            if self.machine_failed {
                return Err(error);
            }
            self.machine_failed = true;
            tracing::warn!(error = %error, "the machine's dirty report failed; all memory is taken as dirty");
            dirty.mark_all();
        }
        self.domains.sync(dirty);
        Ok(())
    }

    /// Ends all logging. Errors are logged: there is nothing else to be done about them.
    pub(crate) fn stop(&mut self, machine: &mut dyn Machine) {
        self.domains.stop();
        if let Err(error) = machine.stop_dirty() {
            tracing::warn!(error = %error, "the machine's dirty tracking could not be ended");
        }
    }

    /// Bytes that are dirty as of the last sync and have not been taken.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.dirty.dirty_bytes()
    }

    /// Lends the map to a sweep. Only the first sweep makes a second map: it is not allocated in the
    /// downtime.
    pub(crate) fn map(&mut self) -> DirtyMap {
        let empty = self.spare.take().unwrap_or_else(|| {
            let mut empty = self.dirty.clone();
            empty.clear();
            empty
        });
        std::mem::replace(&mut self.dirty, empty)
    }

    /// Takes the map of a finished sweep back, which has taken everything out of it.
    pub(crate) fn recycle(&mut self, map: DirtyMap) {
        debug_assert_eq!(map.dirty_bytes(), 0, "a sweep empties its map");
        self.spare = Some(map);
    }
}

/// Dirty tracking cannot begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TrackingError {
    #[error(transparent)]
    Layout(#[from] InvalidLayout),
    #[error(transparent)]
    Machine(#[from] MachineError),
}
