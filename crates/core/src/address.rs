//! Addresses and ranges: what a device calls memory ([`Iova`]), what the guest calls it ([`Gpa`]),
//! and the embedder's map between the two.
//!
//! Both are newtypes so that a dirty report of a device cannot be taken for guest memory without
//! the map. Nothing here checks that an address is backed by memory.

use serde::{Deserialize, Serialize};
use std::fmt;

/// An address as a device uses it for DMA, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Iova(pub u64);

/// An address in the guest's physical memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gpa(pub u64);

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "iova {:#x}", self.0)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gpa {:#x}", self.0)
    }
}

/// A range of device addresses: `length` bytes from `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IovaRange {
    /// First address.
    pub start: Iova,
    /// Length in bytes.
    pub length: u64,
}

/// A range of guest-physical addresses: `length` bytes from `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GpaRange {
    /// First address.
    pub start: Gpa,
    /// Length in bytes.
    pub length: u64,
}

impl IovaRange {
    /// The range of `length` bytes from `start`.
    #[must_use]
    pub const fn new(start: u64, length: u64) -> Self {
        Self { start: Iova(start), length }
    }

    /// The first address behind the range, or `None` when that is beyond 2^64.
    #[must_use]
    pub const fn end(&self) -> Option<u64> {
        self.start.0.checked_add(self.length)
    }
}

impl GpaRange {
    /// The range of `length` bytes from `start`.
    #[must_use]
    pub const fn new(start: u64, length: u64) -> Self {
        Self { start: Gpa(start), length }
    }

    /// The first address behind the range, or `None` when that is beyond 2^64.
    #[must_use]
    pub const fn end(&self) -> Option<u64> {
        self.start.0.checked_add(self.length)
    }
}

/// One stretch of device addresses and the guest memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IovaMapping {
    /// First device address.
    pub iova: Iova,
    /// Guest-physical address of the same byte.
    pub gpa: Gpa,
    /// Length in bytes.
    pub length: u64,
}

/// How a device's addresses map to guest memory. Ranges of peer BARs are not in it: they are mapped
/// for DMA but are never logged or copied as memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IovaMap {
    mappings: Vec<IovaMapping>,
}

impl IovaMap {
    /// A map of these stretches. Stretches of length 0 are dropped.
    #[must_use]
    pub fn new(mut mappings: Vec<IovaMapping>) -> Self {
        mappings.retain(|m| m.length > 0);
        mappings.sort_by_key(|m| m.iova);
        Self { mappings }
    }

    /// The stretches, by device address.
    #[must_use]
    pub fn mappings(&self) -> &[IovaMapping] {
        &self.mappings
    }

    /// Calls `each` with every piece of guest memory behind `range`; parts without a mapping are
    /// passed over.
    pub fn translate(&self, range: IovaRange, mut each: impl FnMut(GpaRange)) {
        let start = range.start.0;
        let end = range.end().unwrap_or(u64::MAX);
        for m in &self.mappings {
            let m_end = m.iova.0.saturating_add(m.length);
            let from = start.max(m.iova.0);
            let to = end.min(m_end);
            if from < to {
                each(GpaRange::new(m.gpa.0.saturating_add(from - m.iova.0), to - from));
            }
        }
    }
}

/// One region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// Number of the region, the same on both sides.
    pub id: u32,
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Size in bytes, a multiple of `page_size`.
    pub size: u64,
    /// Size of its backing pages in bytes: a power of two, at least 4096.
    pub page_size: u64,
}

/// Guest memory as the embedder lays it out. It is frozen from Setup to Done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLayout {
    /// Counts changes of the layout on this side; another number means another layout.
    pub generation: u64,
    /// The regions, which do not overlap.
    pub regions: Vec<MemoryRegion>,
}

impl MemoryLayout {
    /// Bytes of all regions.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.regions.iter().map(|r| r.size).sum()
    }
}
