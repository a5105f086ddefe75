//! The stream that a SoftDevice saves and loads. Integers are little-endian.
//!
//! ```text
//!  header   0  u64 magic "ALSOFTST"      8  u32 version (1)        12 u32 page size (4096)
//!          16  u64 bytes of internal memory                        24 u64 bytes of BAR2
//!  then records, each of a head of 16 bytes and its payload:
//!           0  u32 kind                  4  u32 count               8 u64 first
//!  kind 1  PAGES      pages first .. first + count of internal memory: count * 4096 bytes; count 1 to 64
//!  kind 2  BAR2       count bytes, first 0: all of BAR2 as it was when the device stopped
//!  kind 3  REGISTERS  count bytes, first 0: seed, tick, registers (see `Registers::save`)
//!  kind 4  TRAILER    count 32, first 0: u64 pages in all records, u64 bytes before this record,
//!                     u64 digest of the device's state, u64 CRC-64/NVME of all bytes before it
//! ```
//!
//! PAGES come first, every page at least once, later ones replace earlier ones; then BAR2, REGISTERS
//! and TRAILER, once each and in this order, and nothing after them. In PRE_COPY there are PAGES
//! alone: first all of memory (initial data), then what was dirtied since it was read.

use airlift_core::Errno;

/// Bytes of the header.
pub(crate) const HEADER: usize = 32;
/// Bytes of a record's head.
pub(crate) const HEAD: usize = 16;
/// Bytes of a trailer's payload.
pub(crate) const TRAILER: usize = 32;
/// The most pages of a record.
pub(crate) const RUN: usize = 64;

const MAGIC: u64 = u64::from_le_bytes(*b"ALSOFTST");
/// The version that is written, and the only one that is read.
pub(crate) const VERSION: u32 = 1;

/// The kind of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Pages = 1,
    Bar2 = 2,
    Registers = 3,
    Trailer = 4,
}

/// The head of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) kind: Kind,
    pub(crate) count: u32,
    pub(crate) first: u64,
}

/// The payload of the trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub(crate) pages: u64,
    pub(crate) bytes: u64,
    pub(crate) digest: u64,
    pub(crate) crc: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Appends the header.
pub(crate) fn put_header(out: &mut Vec<u8>, state_size: u64, bar2_size: u64) {
    out.extend(MAGIC.to_le_bytes());
    out.extend(VERSION.to_le_bytes());
    out.extend(4096_u32.to_le_bytes());
    out.extend(state_size.to_le_bytes());
    out.extend(bar2_size.to_le_bytes());
}

/// Checks a header against the device that is to load what follows.
pub(crate) fn check_header(bytes: &[u8; HEADER], state_size: u64, bar2_size: u64) -> Result<(), Errno> {
    let good = u64_at(bytes, 0) == MAGIC
        && u32_at(bytes, 8) == VERSION
        && u32_at(bytes, 12) == 4096
        && u64_at(bytes, 16) == state_size
        && u64_at(bytes, 24) == bar2_size;
    if good { Ok(()) } else { Err(Errno::EINVAL) }
}

impl Head {
    /// Bytes behind the head.
    pub(crate) fn payload(self) -> u64 {
        let count = u64::from(self.count);
        match self.kind {
            Kind::Pages => count * 4096,
            Kind::Bar2 | Kind::Registers | Kind::Trailer => count,
        }
    }

    pub(crate) fn put(self, out: &mut Vec<u8>) {
        out.extend((self.kind as u32).to_le_bytes());
        out.extend(self.count.to_le_bytes());
        out.extend(self.first.to_le_bytes());
    }

    pub(crate) fn get(bytes: &[u8; HEAD]) -> Result<Self, Errno> {
        let kind = match u32_at(bytes, 0) {
            1 => Kind::Pages,
            2 => Kind::Bar2,
            3 => Kind::Registers,
            4 => Kind::Trailer,
            _ => return Err(Errno::EINVAL),
        };
        Ok(Self { kind, count: u32_at(bytes, 4), first: u64_at(bytes, 8) })
    }
}

impl Trailer {
    /// Appends all but the checksum, which is over all bytes before it.
    pub(crate) fn put_open(&self, out: &mut Vec<u8>) {
        out.extend(self.pages.to_le_bytes());
        out.extend(self.bytes.to_le_bytes());
        out.extend(self.digest.to_le_bytes());
    }

    pub(crate) fn get(bytes: &[u8; TRAILER]) -> Self {
        Self {
            pages: u64_at(bytes, 0),
            bytes: u64_at(bytes, 8),
            digest: u64_at(bytes, 16),
            crc: u64_at(bytes, 24),
        }
    }
}
