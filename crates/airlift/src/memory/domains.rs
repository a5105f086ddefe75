//! Who reports the DMA of which devices: one source for each DMA domain (K-DOMAIN).
//!
//! A report is fetched and cleared. Two devices of one domain (a container, a page table) have sources
//! that clear the same log, so only one of them is used, over all that the domain's devices can reach.
//! A source may name another domain once it has started, when it had to fall back.
//!
//! Not checked here: that sources of one domain report alike.

use airlift_core::{DeviceId, DirtyError, DirtyMap, DirtySource, DomainId, GpaRange, IovaMap, IovaRange};

/// A device, what it can reach, and who reports its DMA.
pub(crate) type Reporter = (DeviceId, IovaMap, Option<Box<dyn DirtySource>>);

/// Devices whose DMA one source reports; without a source all that they can reach counts as dirty at
/// every sync (V2-DIRTY-NONE).
struct Domain {
    devices: Vec<DeviceId>,
    /// Different ones alone. The same device address may be different memory to two devices; then a
    /// report is about both.
    maps: Vec<IovaMap>,
    ranges: Vec<IovaRange>,
    source: Option<Box<dyn DirtySource>>,
    /// The source reports.
    started: bool,
}

/// Every device's DMA.
#[derive(Default)]
pub(super) struct Domains(Vec<Domain>);

impl std::fmt::Debug for Domains {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|d| &d.devices)).finish()
    }
}

impl Domains {
    /// Starts a source for each domain. What has none, and why, goes into `notes`. Whatever was written
    /// before this returns may not be reported: all memory is dirty then anyway.
    pub(super) fn start(reporters: Vec<Reporter>, notes: &mut Vec<String>) -> Self {
        let mut domains = Self::default();
        let mut groups: Vec<(DomainId, Vec<Reporter>)> = Vec::new();
        for (device, map, source) in reporters {
            // Nothing to log, and a log over nothing means different things to different devices.
            let source = source.filter(|_| !map.mappings().is_empty());
            let Some(id) = source.as_ref().map(|s| s.domain().clone()) else {
                if !map.mappings().is_empty() {
                    notes.push(all_dirty(&device, "its DMA is not logged"));
                }
                domains.0.push(Domain::new(device, map, None));
                continue;
            };
            let reporter = (device, map, source);
            match groups.iter_mut().find(|(known, _)| *known == id) {
                Some((_, members)) => members.push(reporter),
                None => groups.push((id, vec![reporter])),
            }
        }
        for (id, members) in groups {
            domains.start_group(&id, members, notes);
        }
        domains
    }

    /// Starts the source of the first member for all of them. Where it comes to report for another
    /// domain, or for none, that is for its own device alone, and the next member's source is tried.
    fn start_group(&mut self, id: &DomainId, members: Vec<Reporter>, notes: &mut Vec<String>) {
        let mut rest = members.into_iter();
        while let Some((device, map, source)) = rest.next() {
            let mut domain = Domain::new(device, map, source);
            let others = rest.as_slice().iter().flat_map(|(_, map, _)| ranges_of(map));
            let all = union(domain.ranges.iter().copied().chain(others).collect());
            match domain.restart(&all) {
                Ok(()) if domain.id() == Some(id) => {
                    for (device, map, _) in rest.by_ref() {
                        domain.join(vec![device], vec![map]);
                    }
                    self.add(domain, notes);
                }
                Ok(()) => self.add(domain, notes),
                Err(error) => {
                    domain.unlogged(&error, notes);
                    self.0.push(domain);
                }
            }
        }
    }

    /// Adds a domain whose source has started. Where its log is one that another source clears already,
    /// that one is started again for the devices of both.
    fn add(&mut self, added: Domain, notes: &mut Vec<String>) {
        let id = added.id().cloned();
        let Some(known) = self.0.iter_mut().find(|d| d.id().is_some() && d.id() == id.as_ref()) else {
            self.0.push(added);
            return;
        };
        // The added one's source is not stopped: that would end the log for both.
        known.join(added.devices, added.maps);
        let ranges = known.ranges.clone();
        match known.restart(&ranges) {
            Ok(()) if known.id() == id.as_ref() => {}
            // It reports for one of the devices only.
            Ok(()) => known.unlogged(&moved_on(), notes),
            Err(error) => known.unlogged(&error, notes),
        }
    }

    /// Fetches and clears every report into `dirty`.
    pub(super) fn sync(&mut self, dirty: &mut DirtyMap) {
        for domain in &mut self.0 {
            let maps = &domain.maps;
            let mut mark = |range: IovaRange| {
                for map in maps {
                    map.translate(range, |gpa: GpaRange| dirty.mark(gpa));
                }
            };
            for range in &domain.ranges {
                let Some(source) = &mut domain.source else {
                    mark(*range);
                    continue;
                };
                if let Err(error) = source.report(*range, &mut mark) {
                    let devices = &domain.devices;
                    tracing::warn!(?devices, error = %error, "a dirty report failed; its range is taken as dirty");
                    mark(*range);
                }
            }
        }
    }

    /// Ends all logging. Errors are logged: there is nothing else to be done about them.
    pub(super) fn stop(&mut self) {
        for domain in &mut self.0 {
            if let Some(Err(error)) = domain.source.as_mut().map(|source| source.stop()) {
                let devices = &domain.devices;
                tracing::warn!(?devices, error = %error, "dirty logging could not be ended");
            }
        }
    }
}

impl Domain {
    fn new(device: DeviceId, map: IovaMap, source: Option<Box<dyn DirtySource>>) -> Self {
        let ranges = union(ranges_of(&map).collect());
        Self { devices: vec![device], ranges, maps: vec![map], source, started: false }
    }

    fn id(&self) -> Option<&DomainId> {
        self.source.as_ref().map(|source| source.domain())
    }

    fn join(&mut self, devices: Vec<DeviceId>, maps: Vec<IovaMap>) {
        self.devices.extend(devices);
        for map in maps.into_iter().filter(|map| !map.mappings().is_empty()) {
            if !self.maps.contains(&map) {
                self.maps.push(map);
            }
        }
        self.ranges = union(self.maps.iter().flat_map(ranges_of).collect());
    }

    /// Starts the source, over `ranges`; one that reports already is stopped before.
    fn restart(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        let Some(source) = &mut self.source else { return Ok(()) };
        if self.started {
            source.stop()?;
            self.started = false;
        }
        source.start(ranges)?;
        self.started = true;
        Ok(())
    }

    /// There is no log, for this reason.
    fn unlogged(&mut self, error: &DirtyError, notes: &mut Vec<String>) {
        let source = self.source.take().filter(|_| self.started);
        if let Some(Err(error)) = source.map(|mut source| source.stop()) {
            tracing::warn!(devices = ?self.devices, error = %error, "dirty logging could not be ended");
        }
        let why = format!("its DMA cannot be logged ({error})");
        notes.extend(self.devices.iter().map(|device| all_dirty(device, &why)));
    }
}

/// A log that two domains came to share could not be started for both.
fn moved_on() -> DirtyError {
    DirtyError {
        operation: "start of a shared log".into(),
        errno: None,
        message: "it could not be started for all of its devices".into(),
    }
}

fn all_dirty(device: &DeviceId, why: &str) -> String {
    format!("{device}: {why}; all memory that the device can reach is taken as dirty at every sync")
}

fn ranges_of(map: &IovaMap) -> impl Iterator<Item = IovaRange> + '_ {
    map.mappings().iter().map(|m| IovaRange { start: m.iova, length: m.length })
}

/// The same addresses by address, each once. Ranges that only touch stay apart: sources report ranges
/// as they were mapped.
fn union(mut ranges: Vec<IovaRange>) -> Vec<IovaRange> {
    ranges.sort_by_key(|r| (r.start, r.length));
    let mut joined: Vec<IovaRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start.0 - last.start.0 < last.length => {
                last.length = last.length.max((range.start.0 - last.start.0).saturating_add(range.length));
            }
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use airlift_core::{Gpa, Iova, IovaMapping, MemoryLayout, MemoryRegion};
    use std::collections::BTreeSet;
    use std::sync::{Arc, Mutex};

    const PAGE: u64 = 4096;
    const MIB: u64 = 1 << 20;

    /// A log as a kernel keeps it: one, whoever asks. A report clears it.
    #[derive(Debug, Default)]
    struct Log {
        ranges: Vec<IovaRange>,
        dirty: BTreeSet<u64>,
        calls: Vec<&'static str>,
        broken: bool,
    }

    type Shared = Arc<Mutex<Log>>;

    fn write(log: &Shared, iova: u64) {
        let mut log = log.lock().unwrap();
        if log.ranges.iter().any(|r| (r.start.0..r.end().unwrap()).contains(&iova)) {
            log.dirty.insert(iova & !(PAGE - 1));
        }
    }

    /// A source over a log; it can begin with one that does not start.
    struct Source {
        now: (DomainId, Shared),
        next: Option<(DomainId, Shared)>,
        ranges: Vec<IovaRange>,
    }

    fn source(domain: &str, log: &Shared) -> Option<Box<dyn DirtySource>> {
        let now = (DomainId(domain.into()), Arc::clone(log));
        Some(Box::new(Source { now, next: None, ranges: Vec::new() }))
    }

    fn falling_back(from: (&str, &Shared), to: (&str, &Shared)) -> Option<Box<dyn DirtySource>> {
        let end = |(name, log): (&str, &Shared)| (DomainId(name.into()), Arc::clone(log));
        Some(Box::new(Source { now: end(from), next: Some(end(to)), ranges: Vec::new() }))
    }

    fn error() -> DirtyError {
        DirtyError { operation: "START".into(), errno: None, message: "broken".into() }
    }

    impl DirtySource for Source {
        fn domain(&self) -> &DomainId {
            &self.now.0
        }
        fn page_size(&self) -> u64 {
            PAGE
        }
        fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
            loop {
                let mut log = self.now.1.lock().unwrap();
                log.calls.push("start");
                if !log.broken {
                    log.ranges = ranges.to_vec();
                    self.ranges = ranges.to_vec();
                    return Ok(());
                }
                drop(log);
                self.now = self.next.take().ok_or_else(error)?;
            }
        }
        fn report(&mut self, range: IovaRange, dirty: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
            let mut log = self.now.1.lock().unwrap();
            log.calls.push("report");
            if log.broken {
                return Err(error());
            }
            let inside = |r: &IovaRange, at: &u64| (r.start.0..r.end().unwrap()).contains(at);
            let mine = |at: &u64| inside(&range, at) && self.ranges.iter().any(|r| inside(r, at));
            let taken: Vec<u64> = log.dirty.iter().copied().filter(mine).collect();
            for at in taken {
                log.dirty.remove(&at);
                dirty(IovaRange::new(at, PAGE));
            }
            Ok(())
        }
        fn stop(&mut self) -> Result<(), DirtyError> {
            let mut log = self.now.1.lock().unwrap();
            log.calls.push("stop");
            log.ranges.clear();
            Ok(())
        }
    }

    fn id(name: &str) -> DeviceId {
        DeviceId::new(name).unwrap()
    }

    fn map(list: &[(u64, u64, u64)]) -> IovaMap {
        let mappings = list.iter().map(|(iova, gpa, length)| IovaMapping {
            iova: Iova(*iova),
            gpa: Gpa(*gpa),
            length: *length,
        });
        IovaMap::new(mappings.collect())
    }

    /// What a sync reports as dirty, of 4 MiB of memory.
    fn synced(domains: &mut Domains) -> Vec<(u64, u64)> {
        let region = MemoryRegion { id: 0, gpa: Gpa(0), size: 4 * MIB, page_size: PAGE };
        let mut dirty = DirtyMap::new(&MemoryLayout { generation: 0, regions: vec![region] }).unwrap();
        domains.sync(&mut dirty);
        dirty.ranges().map(|r| (r.start.0, r.length)).collect()
    }

    fn calls(log: &Shared) -> Vec<&'static str> {
        std::mem::take(&mut log.lock().unwrap().calls)
    }

    // K-DOMAIN
    #[test]
    fn one_source_of_a_domain_reports_for_all_of_its_devices() {
        let log = Shared::default();
        let mut notes = Vec::new();
        let reporters = vec![
            (id("a"), map(&[(0, 0, MIB)]), source("container", &log)),
            (id("b"), map(&[(0, 0, MIB), (2 * MIB, MIB, MIB)]), source("container", &log)),
            (id("c"), map(&[(2 * MIB, MIB, MIB)]), source("container", &log)),
        ];
        let mut domains = Domains::start(reporters, &mut notes);
        assert_eq!(calls(&log), ["start"]);
        write(&log, 0x1000);
        write(&log, 2 * MIB + 0x5000);
        assert_eq!(synced(&mut domains), [(0x1000, PAGE), (MIB + 0x5000, PAGE)]);
        assert_eq!(calls(&log), ["report", "report"], "each range is fetched once");
        assert_eq!(synced(&mut domains), []);
        domains.stop();
        assert_eq!(calls(&log), ["report", "report", "stop"]);
        assert_eq!(notes, [""; 0]);
    }

    #[test]
    fn one_address_that_is_different_memory_to_two_devices_is_both() {
        let log = Shared::default();
        let reporters = vec![
            (id("a"), map(&[(0, 0, MIB)]), source("container", &log)),
            (id("b"), map(&[(0, MIB, MIB)]), source("container", &log)),
        ];
        let mut domains = Domains::start(reporters, &mut Vec::new());
        write(&log, 0x3000);
        assert_eq!(synced(&mut domains), [(0x3000, PAGE), (MIB + 0x3000, PAGE)]);
    }

    #[test]
    fn devices_without_a_log_are_dirty_as_a_whole_and_others_are_not() {
        let (broken, works) = (Shared::default(), Shared::default());
        broken.lock().unwrap().broken = true;
        let mut notes = Vec::new();
        let reporters = vec![
            (id("none"), map(&[(0, 0, MIB)]), None),
            (id("broken"), map(&[(0, MIB, MIB)]), source("device:broken", &broken)),
            (id("works"), map(&[(0, 2 * MIB, 2 * MIB)]), source("device:works", &works)),
            (id("idle"), map(&[]), source("device:idle", &broken)),
        ];
        let mut domains = Domains::start(reporters, &mut notes);
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert!(notes[0].starts_with("none: ") && notes[1].starts_with("broken: "), "{notes:?}");
        assert_eq!(calls(&broken), ["start"]);
        write(&works, 0);
        assert_eq!(synced(&mut domains), [(0, 2 * MIB + PAGE)]);
        works.lock().unwrap().broken = true;
        assert_eq!(synced(&mut domains), [(0, 4 * MIB)], "a report that fails makes its range dirty");
        domains.stop();
        assert_eq!(calls(&broken), [""; 0], "what was not started is not stopped");
    }

    #[test]
    fn devices_that_fall_back_to_one_log_share_it() {
        let (own, shared) = (Shared::default(), Shared::default());
        own.lock().unwrap().broken = true;
        let to = || ("container", &shared);
        let reporters = vec![
            (id("a"), map(&[(0, 0, MIB)]), falling_back(("device:a", &own), to())),
            (id("b"), map(&[(MIB, MIB, MIB)]), falling_back(("device:b", &own), to())),
            (id("c"), map(&[(2 * MIB, 2 * MIB, MIB)]), source("container", &shared)),
        ];
        let mut notes = Vec::new();
        let mut domains = Domains::start(reporters, &mut notes);
        assert_eq!(notes, [""; 0]);
        for at in [0x1000, MIB + 0x1000, 2 * MIB + 0x1000] {
            write(&shared, at);
        }
        let pages = [(0x1000, PAGE), (MIB + 0x1000, PAGE), (2 * MIB + 0x1000, PAGE)];
        assert_eq!(synced(&mut domains), pages);
        calls(&shared);
        domains.stop();
        assert_eq!(calls(&shared), ["stop"]);
    }

    #[test]
    fn when_a_shared_log_does_not_start_each_device_uses_its_own() {
        let (table, a, b) = (Shared::default(), Shared::default(), Shared::default());
        table.lock().unwrap().broken = true;
        let reporters = vec![
            (id("a"), map(&[(0, 0, MIB)]), falling_back(("table", &table), ("device:a", &a))),
            (id("b"), map(&[(0, 0, MIB)]), falling_back(("table", &table), ("device:b", &b))),
        ];
        let mut notes = Vec::new();
        let mut domains = Domains::start(reporters, &mut notes);
        assert_eq!(notes, [""; 0]);
        write(&a, 0x1000);
        write(&b, 0x4000);
        assert_eq!(synced(&mut domains), [(0x1000, PAGE), (0x4000, PAGE)]);
    }
}
