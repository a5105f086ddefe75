//! The guest's driver: consumes the rings of all devices and counts what is missing, doubled or out
//! of order.
//!
//! It reads slots and writes nothing but the consumer index: the pages of a ring's slots are dirtied by
//! the device alone, so that a write of a device that a migration loses is not mended by the guest's
//! own. A device that says that it has produced an entry whose slot stays as it was has lost it; one
//! whose counter goes back is to write entries twice.

use super::content::PAGE_BYTES;
use super::memory::VmMemory;
use crate::registers::RING_HEADER;
use airlift_memory::{Mapping, MemoryError};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How long an entry that a device counts may be missing from its ring.
const GRACE: Duration = Duration::from_millis(30);
/// How long a device may not yet count what stands in its ring: it counts when its batch is done.
const GRACE_BEHIND: Duration = Duration::from_secs(1);

/// What a ring's consumer knows, as the guest's own state: it travels in a record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RingCounters {
    pub(super) consumed: u64,
    pub(super) gaps: u64,
    pub(super) duplicates: u64,
    pub(super) out_of_order: u64,
}

/// One ring, seen by the guest.
#[derive(Debug)]
pub(super) struct GuestRing {
    /// Number of the ring in its device.
    pub(super) index: usize,
    pub(super) entries: u64,
    /// Where the device finds it.
    pub(super) iova: u64,
    pub(super) counters: RingCounters,
    mapping: Mapping,
    offset: u64,
    /// First page of it in guest memory; `None`: it is in a BAR, whose pages nobody tracks.
    page: Option<u64>,
    suspicion: Option<Suspicion>,
}

/// A device's counter that does not fit the ring.
#[derive(Clone, Copy, Debug)]
struct Suspicion {
    since: Instant,
    consumed: u64,
    produced: u64,
}

impl GuestRing {
    /// A ring in guest memory, from page `page`.
    pub(super) fn in_memory(memory: &VmMemory, index: usize, page: u64, entries: u64) -> Self {
        let (mapping, offset) = memory.place(page);
        let iova = memory.pages.gpa(page);
        Self {
            index,
            entries,
            iova,
            counters: RingCounters::default(),
            mapping: mapping.clone(),
            offset,
            page: Some(page),
            suspicion: None,
        }
    }

    /// A ring at the start of a BAR that the guest has mapped at `address`.
    pub(super) fn in_bar(bar: &Mapping, index: usize, address: u64, entries: u64) -> Self {
        Self {
            index,
            entries,
            iova: address,
            counters: RingCounters::default(),
            mapping: bar.clone(),
            offset: 0,
            page: None,
            suspicion: None,
        }
    }

    /// Makes the ring's memory as a device must find it: all 0.
    pub(super) fn clear(&mut self, memory: &VmMemory) -> Result<(), MemoryError> {
        self.counters.consumed = 0;
        self.suspicion = None;
        self.mapping.fill(self.offset, RING_HEADER + self.entries * 8, 0)?;
        if let Some(first) = self.page {
            for page in 0..(RING_HEADER + self.entries * 8).div_ceil(PAGE_BYTES) {
                memory.mark(first + page);
            }
        }
        Ok(())
    }

    /// Whether a value may stand where `expected` is to stand: empty, or a lap or more from it.
    const fn is_of_slot(&self, value: u64, expected: u64) -> bool {
        value == 0 || value.abs_diff(expected).is_multiple_of(self.entries)
    }

    /// What stands where the next entry is to stand.
    fn next_slot(&self) -> Result<u64, MemoryError> {
        self.mapping.load_u64(self.offset + self.slot_at(self.counters.consumed))
    }

    fn slot_at(&self, entry: u64) -> u64 {
        RING_HEADER + entry % self.entries * 8
    }

    fn store(&self, memory: &VmMemory, at: u64, value: u64) -> Result<(), MemoryError> {
        self.mapping.store_u64(self.offset + at, value)?;
        if let Some(first) = self.page {
            memory.mark(first + at / PAGE_BYTES);
        }
        Ok(())
    }

    /// Consumes what is there; `true` when there was something.
    pub(super) fn consume(&mut self, memory: &VmMemory) -> Result<bool, MemoryError> {
        let before = self.counters.consumed;
        for _ in 0..self.entries {
            let value = self.next_slot()?;
            let expected = self.counters.consumed + 1;
            if value < expected || !self.is_of_slot(value, expected) {
                break;
            }
            if value > expected {
                // The device is a lap ahead, over an entry that was never seen.
                self.counters.gaps += 1;
                self.counters.out_of_order += 1;
            }
            self.counters.consumed += 1;
        }
        if self.counters.consumed == before {
            return Ok(false);
        }
        self.store(memory, 0, self.counters.consumed)?;
        Ok(true)
    }

    /// Compares with what the device says that it has produced. `true`: something stays odd and is
    /// worth asking again soon.
    pub(super) fn compare(&mut self, memory: &VmMemory, produced: u64) -> Result<bool, MemoryError> {
        // The counter was read before this: all that it counts has been written.
        self.consume(memory)?;
        let consumed = self.counters.consumed;
        if produced == consumed || (produced > consumed && self.is_next_there()?) {
            self.suspicion = None;
            return Ok(false);
        }
        if produced < consumed && self.suspicion.is_none_or(|s| s.produced >= s.consumed) {
            // Usual: it has produced more since it was asked.
            self.suspicion = Some(Suspicion { since: Instant::now(), consumed, produced });
            return Ok(true);
        }
        match self.suspicion {
            Some(s) if s.consumed == consumed || produced < s.consumed => {
                let grace = if produced < consumed { GRACE_BEHIND } else { GRACE };
                if s.since.elapsed() >= grace {
                    self.suspicion = None;
                    self.convict(memory, consumed, produced)?;
                }
            }
            _ => self.suspicion = Some(Suspicion { since: Instant::now(), consumed, produced }),
        }
        Ok(true)
    }

    fn is_next_there(&self) -> Result<bool, MemoryError> {
        Ok(self.next_slot()? == self.counters.consumed + 1)
    }

    /// Device and ring have disagreed for long enough.
    fn convict(&mut self, memory: &VmMemory, consumed: u64, produced: u64) -> Result<(), MemoryError> {
        if produced < consumed {
            // The device has gone back: all these entries come once more.
            self.counters.duplicates += consumed - produced;
            self.counters.consumed = produced;
        }
        // More than a ring holds cannot be there.
        let beyond = (produced - self.counters.consumed).saturating_sub(self.entries);
        self.counters.gaps += beyond;
        self.counters.consumed += beyond;
        while self.counters.consumed < produced {
            if !self.consume(memory)? && self.counters.consumed < produced {
                let strange = !self.is_of_slot(self.next_slot()?, self.counters.consumed + 1);
                self.counters.out_of_order += u64::from(strange);
                self.counters.gaps += 1;
                self.counters.consumed += 1;
            }
        }
        self.store(memory, 0, self.counters.consumed)
    }
}

impl GuestRing {
    /// Drops what was suspected: the counters were replaced.
    pub(super) fn forget(&mut self) {
        self.suspicion = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simvm::{SimDevice, SimVmConfig};

    /// A ring, and what a device does to it.
    struct Bench {
        memory: VmMemory,
        ring: GuestRing,
    }

    impl Bench {
        fn new() -> Self {
            let id = airlift_core::DeviceId::new("d").unwrap();
            let devices = vec![SimDevice { id, socket: "none".into() }];
            let config = SimVmConfig { memory: 2 << 20, ring_entries: 16, devices, ..SimVmConfig::default() };
            let memory = VmMemory::new(&config).unwrap();
            let ring = GuestRing::in_memory(&memory, 0, 1, 16);
            Self { memory, ring }
        }

        fn put(&self, entry: u64) {
            self.ring.mapping.store_u64(self.ring.offset + self.ring.slot_at(entry), entry + 1).unwrap();
        }

        /// Compares until the guest has made up its mind.
        fn settle(&mut self, produced: u64) -> RingCounters {
            let until = Instant::now() + Duration::from_secs(20);
            while self.ring.compare(&self.memory, produced).unwrap()
                && self.ring.counters.consumed != produced
            {
                assert!(Instant::now() < until, "{:?}", self.ring);
                std::thread::sleep(Duration::from_millis(1));
            }
            self.ring.counters.clone()
        }
    }

    #[test]
    fn entries_in_order_are_consumed_over_many_laps_and_the_index_is_told() {
        let mut bench = Bench::new();
        for entry in 0..100 {
            bench.put(entry);
            assert!(bench.ring.consume(&bench.memory).unwrap());
        }
        let clean = RingCounters { consumed: 100, ..RingCounters::default() };
        assert_eq!(bench.settle(100), clean);
        assert_eq!(bench.ring.mapping.load_u64(bench.ring.offset).unwrap(), 100);
        // The index was marked as written by the guest, and no slot.
        let mut dirty = Vec::new();
        bench.memory.take_dirty(|_| false, &mut |r| dirty.push((r.start.0 / 4096, r.length / 4096)));
        assert_eq!(dirty, [(1, 1)]);
    }

    #[test]
    fn an_entry_that_was_dropped_is_a_gap() {
        let mut bench = Bench::new();
        for entry in [0, 1, 3, 4] {
            bench.put(entry);
        }
        let counters = bench.settle(5);
        assert_eq!(counters, RingCounters { consumed: 5, gaps: 1, ..RingCounters::default() });
        bench.put(5);
        assert_eq!(bench.settle(6), RingCounters { consumed: 6, gaps: 1, ..RingCounters::default() });
    }

    #[test]
    fn an_entry_whose_slot_still_holds_the_lap_before_is_a_gap() {
        let mut bench = Bench::new();
        (0..16).for_each(|entry| bench.put(entry));
        assert_eq!(bench.settle(16).gaps, 0);
        bench.put(17);
        assert_eq!(bench.settle(18), RingCounters { consumed: 18, gaps: 1, ..RingCounters::default() });
    }

    #[test]
    fn an_entry_in_the_place_of_another_is_out_of_order() {
        let mut bench = Bench::new();
        bench.ring.mapping.store_u64(bench.ring.offset + bench.ring.slot_at(0), 2).unwrap();
        bench.put(1);
        let counters = bench.settle(2);
        assert_eq!((counters.consumed, counters.gaps, counters.out_of_order), (2, 1, 1));
    }

    #[test]
    fn a_device_that_went_back_gives_duplicates_and_is_followed() {
        let mut bench = Bench::new();
        (0..10).for_each(|entry| bench.put(entry));
        assert_eq!(bench.settle(10).consumed, 10);
        let counters = bench.settle(7);
        assert_eq!((counters.consumed, counters.duplicates, counters.gaps), (7, 3, 0));
        (7..12).for_each(|entry| bench.put(entry));
        assert_eq!(bench.settle(12), RingCounters { consumed: 12, duplicates: 3, ..RingCounters::default() });
    }

    #[test]
    fn an_entry_a_lap_ahead_is_out_of_order() {
        let mut bench = Bench::new();
        bench.put(16);
        bench.ring.consume(&bench.memory).unwrap();
        let counters = bench.ring.counters.clone();
        assert_eq!((counters.consumed, counters.gaps, counters.out_of_order), (1, 1, 1));
    }

    #[test]
    fn a_counter_that_cannot_be_true_ends() {
        let mut bench = Bench::new();
        assert_eq!(bench.settle(u64::MAX).gaps, u64::MAX);
    }
}
