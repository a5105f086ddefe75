//! Guest memory on the wire: PAGES and ZERO, and which data connection takes what.
//!
//! ```text
//! PAGES   +-----------------+----------------------------------+
//!         | gpa: u64 LE     | bytes: n x 4096, 1 <= n <= 255   |
//!         +-----------------+----------------------------------+
//! ZERO    +-----------------+-----------------+
//!         | gpa: u64 LE     | length: u64 LE  |  ... n times, 1 <= n <= 65536
//!         +-----------------+-----------------+
//! ```
//!
//! Addresses and lengths are multiples of 4096 and no run wraps around 2^64 (W-PAGE-ALIGN). The
//! header's index is the id of the memory region and its round the pre-copy round.
//!
//! **Order.** A later round must win over an earlier one. A run lies in one block of 2 MiB, and a
//! block always takes the same connection ([`lane`]), whose bytes stay in order. So rounds need no
//! barrier between connections (W-MEMORY-LANE).
//!
//! Not checked here: whether a run is in the region, and whether the region exists.

use crate::frame::{FrameError, FrameHeader, FrameType};
use crate::{Fault, FrameBuf};
use airlift_core::{Gpa, GpaRange};
use std::num::NonZeroU32;

/// The page of the wire in bytes, whatever pages the host has.
pub const PAGE: u64 = 4096;

/// Bytes of guest memory that stay on one connection.
pub const BLOCK: u64 = 2 << 20;

const ENTRY_LEN: usize = 16;

/// A payload of PAGES or ZERO is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PagesError {
    /// The payload is too short or not a whole number of its parts.
    #[error("{kind} has a payload of {length} bytes")]
    Length {
        /// PAGES or ZERO.
        kind: FrameType,
        /// Length of the payload.
        length: usize,
    },
    /// An address or a length is not a multiple of 4096, or a length is 0 (W-PAGE-ALIGN).
    #[error("{length:#x} bytes from {start} are not whole pages")]
    Unaligned {
        /// First address.
        start: Gpa,
        /// Length in bytes.
        length: u64,
    },
    /// A run that leaves its block of 2 MiB, or wraps around 2^64 (W-MEMORY-LANE).
    #[error("{length:#x} bytes from {start} are not within one block of 2 MiB")]
    Block {
        /// First address.
        start: Gpa,
        /// Length in bytes.
        length: u64,
    },
    /// This side puts more into a frame than fits.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl PagesError {
    /// Whose fault it is, if it comes from decoding; an encoder's errors are all this side's.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        match self {
            Self::Frame(error) => error.fault(),
            _ => Fault::PeerMisbehaved,
        }
    }
}

/// The connection, of `lanes`, that carries the block of 2 MiB around `gpa` (W-MEMORY-LANE).
#[must_use]
pub const fn lane(gpa: Gpa, lanes: NonZeroU32) -> u32 {
    let lane = (gpa.0 / BLOCK) % lanes.get() as u64;
    // Below a u32.
    (lane & 0xffff_ffff) as u32
}

/// Cuts a range at the borders of the blocks of 2 MiB. A range that wraps around ends at 2^64.
pub fn blocks(range: GpaRange) -> impl Iterator<Item = GpaRange> {
    let end = range.end().unwrap_or(u64::MAX);
    let mut at = range.start.0;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let start = at;
        at = (start - start % BLOCK).saturating_add(BLOCK).min(end);
        Some(GpaRange::new(start, at - start))
    })
}

fn check(start: u64, length: u64) -> Result<GpaRange, PagesError> {
    if length == 0 || !start.is_multiple_of(PAGE) || !length.is_multiple_of(PAGE) {
        return Err(PagesError::Unaligned { start: Gpa(start), length });
    }
    // The last byte decides, so that the last block below 2^64 is legal.
    match start.checked_add(length - 1) {
        Some(last) if start / BLOCK == last / BLOCK => Ok(GpaRange::new(start, length)),
        _ => Err(PagesError::Block { start: Gpa(start), length }),
    }
}

/// Where memory frames belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    /// Id of the memory region.
    pub region: u32,
    /// Pre-copy round.
    pub round: u32,
    /// Counter of the sender.
    pub sequence: u64,
}

impl MemorySlot {
    const fn header(self, kind: FrameType) -> FrameHeader {
        let mut header = FrameHeader::new(kind);
        header.index = self.region;
        header.round = self.round;
        header.sequence = self.sequence;
        header
    }
}

/// Makes a PAGES frame of the first `len` bytes of `buf`'s body, which were read from `gpa` on. The
/// frame is in `buf` then.
///
/// # Errors
/// When address or length are not those of whole pages within one block, or `len` is beyond the body.
pub fn seal_pages(buf: &mut FrameBuf, gpa: Gpa, len: usize, slot: MemorySlot) -> Result<(), PagesError> {
    check(gpa.0, len as u64)?;
    buf.clear();
    buf.set_len(len)?;
    buf.set_prefix(gpa.0.to_le_bytes());
    buf.finish(slot.header(FrameType::Pages))?;
    Ok(())
}

/// Makes a ZERO frame of these runs. The frame is in `buf` then.
///
/// # Errors
/// When there is no run, one is not whole pages within one block, or they do not fit into the body
/// (16 bytes each).
pub fn seal_zero(buf: &mut FrameBuf, runs: &[GpaRange], slot: MemorySlot) -> Result<(), PagesError> {
    if runs.is_empty() {
        return Err(PagesError::Length { kind: FrameType::Zero, length: 0 });
    }
    buf.clear();
    for run in runs {
        check(run.start.0, run.length)?;
        let mut entry = [0; ENTRY_LEN];
        entry[..8].copy_from_slice(&run.start.0.to_le_bytes());
        entry[8..].copy_from_slice(&run.length.to_le_bytes());
        buf.append(&entry)?;
    }
    buf.finish(slot.header(FrameType::Zero))?;
    Ok(())
}

/// A run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun<'a> {
    /// Where they belong.
    pub gpa: Gpa,
    /// Their bytes.
    pub data: &'a [u8],
}

/// Reads a payload of PAGES.
///
/// # Errors
/// When it is not whole pages within one block.
pub fn decode_pages(payload: &[u8]) -> Result<PageRun<'_>, PagesError> {
    let Some((gpa, data)) = payload.split_first_chunk::<8>() else {
        return Err(PagesError::Length { kind: FrameType::Pages, length: payload.len() });
    };
    let range = check(u64::from_le_bytes(*gpa), data.len() as u64)?;
    Ok(PageRun { gpa: range.start, data })
}

/// Reads a payload of ZERO. Every run is checked before the first is given.
///
/// # Errors
/// When a run is not whole pages within one block, or there is none.
pub fn decode_zero(payload: &[u8]) -> Result<impl ExactSizeIterator<Item = GpaRange> + '_, PagesError> {
    let (entries, rest) = payload.as_chunks::<ENTRY_LEN>();
    if entries.is_empty() || !rest.is_empty() {
        return Err(PagesError::Length { kind: FrameType::Zero, length: payload.len() });
    }
    for (start, length) in entries.iter().map(entry) {
        check(start, length)?;
    }
    Ok(entries.iter().map(entry).map(|(start, length)| GpaRange::new(start, length)))
}

fn entry(bytes: &[u8; ENTRY_LEN]) -> (u64, u64) {
    let half = |at: usize| {
        let mut half = [0; 8];
        half.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(half)
    };
    (half(0), half(8))
}
