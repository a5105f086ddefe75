//! The machine's own records on the wire: RECORD.
//!
//! ```text
//! +---------------------+------------------+---------------------------+
//! | name length: u16 LE | name: UTF-8      | bytes: to the frame's end |
//! +---------------------+------------------+---------------------------+
//! ```
//!
//! A record is one frame. The header's sequence is its place in the order of loading, from 0 without
//! a gap. The configuration of a VFIO device does not travel here but as the CONFIG record of that
//! device's stream.

use crate::frame::{FrameError, FrameHeader, FrameType};
use crate::{Fault, FrameBuf};

/// Names that begin with this are the engine's own (interrupts that were drained, say), and no
/// machine's. The codec carries them like any other.
pub const ENGINE_PREFIX: &str = "airlift/";

/// The longest content of a record in bytes.
pub const MAX_RECORD: usize = 1_000_000;

/// The longest name in bytes; the shortest is 1.
pub const MAX_NAME: usize = 255;

/// A RECORD is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MachineRecordError {
    /// The name is empty, too long, not UTF-8, or cut.
    #[error("the name of a machine record is not 1 to {MAX_NAME} bytes of UTF-8")]
    Name,
    /// The content is longer than [`MAX_RECORD`].
    #[error("a machine record of {length} bytes; at most {MAX_RECORD} are accepted")]
    TooLong {
        /// Its length.
        length: usize,
    },
    /// It does not fit into the buffer.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl MachineRecordError {
    /// Whose fault it is, if it comes from decoding; an encoder's errors are all this side's.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        match self {
            Self::Frame(error) => error.fault(),
            Self::Name | Self::TooLong { .. } => Fault::PeerMisbehaved,
        }
    }
}

/// A record of the machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RecordRef<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its content.
    pub data: &'a [u8],
}

impl std::fmt::Debug for RecordRef<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecordRef").field("name", &self.name).field("length", &self.data.len()).finish()
    }
}

fn check(record: RecordRef<'_>) -> Result<RecordRef<'_>, MachineRecordError> {
    if record.name.is_empty() || record.name.len() > MAX_NAME {
        return Err(MachineRecordError::Name);
    }
    if record.data.len() > MAX_RECORD {
        return Err(MachineRecordError::TooLong { length: record.data.len() });
    }
    Ok(record)
}

/// Makes a RECORD frame, the `position`-th to be loaded. The frame is in `buf` then.
///
/// # Errors
/// When name or content are too long, also for this buffer.
pub fn seal_record(
    buf: &mut FrameBuf,
    record: RecordRef<'_>,
    position: u64,
) -> Result<(), MachineRecordError> {
    check(record)?;
    let name_len = u16::try_from(record.name.len()).map_err(|_| MachineRecordError::Name)?;
    buf.clear();
    buf.append(&name_len.to_le_bytes())?;
    buf.append(record.name.as_bytes())?;
    buf.append(record.data)?;
    let mut header = FrameHeader::new(FrameType::Record);
    header.sequence = position;
    buf.finish(header)?;
    Ok(())
}

/// Reads a payload of RECORD.
///
/// # Errors
/// When the name is not one or a bound is broken.
pub fn decode_record(payload: &[u8]) -> Result<RecordRef<'_>, MachineRecordError> {
    let (name_len, rest) = payload.split_first_chunk::<2>().ok_or(MachineRecordError::Name)?;
    let (name, data) =
        rest.split_at_checked(u16::from_le_bytes(*name_len).into()).ok_or(MachineRecordError::Name)?;
    let name = std::str::from_utf8(name).map_err(|_| MachineRecordError::Name)?;
    check(RecordRef { name, data })
}
