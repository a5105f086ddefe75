//! All dirty reports, ORed into one map at 4 KiB: the machine's own writes and each DMA domain.
//!
//! Order: logging starts before the first copy; fetch and clear, then read the page; an error of a
//! report makes its whole range dirty (V2-DIRTY). A domain without a source is dirty as a whole at
//! every sync (V2-DIRTY-NONE), and that is said.

use crate::machine::{Machine, MachineError};
use airlift_core::{
    DeviceId, DirtyMap, DirtySource, GpaRange, InvalidLayout, IovaMap, IovaRange, MemoryLayout,
};

/// A device, what it can reach, and who reports its DMA.
pub(crate) type Reporter = (DeviceId, IovaMap, Option<Box<dyn DirtySource>>);

struct Domain {
    device: DeviceId,
    map: IovaMap,
    source: Option<Box<dyn DirtySource>>,
}

/// The map of dirty pages and everyone who reports into it.
pub(crate) struct DirtyTracking {
    dirty: DirtyMap,
    /// An empty map, given back by a sweep.
    spare: Option<DirtyMap>,
    domains: Vec<Domain>,
    machine_failed: bool,
}

impl std::fmt::Debug for DirtyTracking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyTracking").field("domains", &self.domains.len()).finish_non_exhaustive()
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
        let mut domains = Vec::with_capacity(sources.len());
        for (device, map, source) in sources {
            let source = start_source(&device, &map, source, notes);
            domains.push(Domain { device, map, source });
        }
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
        for domain in &mut self.domains {
            let map = &domain.map;
            let mut mark = |range: IovaRange| map.translate(range, |gpa: GpaRange| dirty.mark(gpa));
            for mapping in map.mappings() {
                let range = IovaRange { start: mapping.iova, length: mapping.length };
                let reported = match &mut domain.source {
                    Some(source) => source.report(range, &mut mark),
                    None => {
                        mark(range);
                        Ok(())
                    }
                };
                if let Err(error) = reported {
                    tracing::warn!(device = %domain.device, error = %error, "a dirty report failed; its range is taken as dirty");
                    mark(range);
                }
            }
        }
        Ok(())
    }

    /// Ends all logging. Errors are logged: there is nothing else to be done about them.
    pub(crate) fn stop(&mut self, machine: &mut dyn Machine) {
        for domain in &mut self.domains {
            if let Some(Err(error)) = domain.source.as_mut().map(|source| source.stop()) {
                tracing::warn!(device = %domain.device, error = %error, "dirty logging could not be ended");
            }
        }
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

fn start_source(
    device: &DeviceId,
    map: &IovaMap,
    source: Option<Box<dyn DirtySource>>,
    notes: &mut Vec<String>,
) -> Option<Box<dyn DirtySource>> {
    let ranges: Vec<_> =
        map.mappings().iter().map(|m| IovaRange { start: m.iova, length: m.length }).collect();
    if ranges.is_empty() {
        return source;
    }
    let all_dirty = |why: &str| {
        format!("{device}: {why}; all memory that the device can reach is taken as dirty at every sync")
    };
    let Some(mut source) = source else {
        notes.push(all_dirty("its DMA is not logged"));
        return None;
    };
    match source.start(&ranges) {
        Ok(()) => Some(source),
        Err(error) => {
            notes.push(all_dirty(&format!("its DMA cannot be logged ({error})")));
            None
        }
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
