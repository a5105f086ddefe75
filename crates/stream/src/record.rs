//! A device's stream: the VFIO records that QEMU's field protocol uses, in DEVICE frames.
//!
//! All numbers of a record are **big-endian**, as QEMU writes them.
//!
//! ```text
//! SETUP              ff ff ff ff ef 10 00 03
//! DATA               ff ff ff ff ef 10 00 04 | size: u64 | size bytes of the device
//! INIT_DATA_SENT     ff ff ff ff ef 10 00 05
//! CONFIG_LOAD_READY  ff ff ff ff ef 10 00 06
//! CONFIG             ff ff ff ff ef 10 00 02 | bytes | END
//! END                ff ff ff ff ef 10 00 01
//! ```
//!
//! A stream is, in this order (W-RECORD-ORDER):
//!
//! ```text
//! SETUP  ( DATA | INIT_DATA_SENT )*  CONFIG_LOAD_READY?  ( CONFIG | END )
//! ```
//!
//! - Frames of a device are numbered from 0 without a gap, over all connections; their payloads, put
//!   together in that order, are the stream (W-SEQUENCE). A record may begin and end anywhere in
//!   them. The airlift encoder gives each piece of a v2 device a DATA record of its own. It gives a
//!   v1 device's transaction one DATA record over several frames.
//! - The *n*-th INIT_DATA_SENT of a device, from 1, closes generation *n* of its initial data (W-INIT).
//! - CONFIG has no length in QEMU's stream, where only the loader of the device's configuration knows
//!   where it ends. So here a frame with the flag CONFIG holds exactly one CONFIG record: the tag,
//!   the bytes, and END, which ends the stream too. Without the flag the tag CONFIG is refused
//!   (W-CONFIG-FRAME).
//! - A DATA record is not empty. Its size is bounded, but nothing is ever allocated from it (W-DATA-SIZE).
//!
//! TRAILER holds frames, bytes, generation and CRC-64/NVME of the stream (W-TRAILER): both sides
//! count in the same way, in [`StreamTotals`].

mod decode;
mod encode;

pub use decode::{FrameRecords, RecordDecoder, RecordEvent, RecordLimits};
pub use encode::RecordEncoder;

use crate::digest::StreamDigest;
use crate::{Fault, FrameError};

/// A record's tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tag {
    /// The end of the stream.
    End,
    /// The device's configuration.
    Config,
    /// The start of the stream.
    Setup,
    /// Bytes of the device.
    Data,
    /// A generation of initial data is complete.
    InitDataSent,
    /// Everything that must be loaded before the configuration has been sent.
    ConfigLoadReady,
}

impl Tag {
    /// The number on the wire.
    #[must_use]
    pub const fn to_raw(self) -> u64 {
        0xffff_ffff_ef10_0000
            | match self {
                Self::End => 1,
                Self::Config => 2,
                Self::Setup => 3,
                Self::Data => 4,
                Self::InitDataSent => 5,
                Self::ConfigLoadReady => 6,
            }
    }

    /// The tag of a number, if it is one.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Option<Self> {
        Some(match raw {
            0xffff_ffff_ef10_0001 => Self::End,
            0xffff_ffff_ef10_0002 => Self::Config,
            0xffff_ffff_ef10_0003 => Self::Setup,
            0xffff_ffff_ef10_0004 => Self::Data,
            0xffff_ffff_ef10_0005 => Self::InitDataSent,
            0xffff_ffff_ef10_0006 => Self::ConfigLoadReady,
            _ => return None,
        })
    }

    /// The bytes on the wire.
    #[must_use]
    pub const fn bytes(self) -> [u8; 8] {
        self.to_raw().to_be_bytes()
    }
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::End => "END",
            Self::Config => "CONFIG",
            Self::Setup => "SETUP",
            Self::Data => "DATA",
            Self::InitDataSent => "INIT_DATA_SENT",
            Self::ConfigLoadReady => "CONFIG_LOAD_READY",
        })
    }
}

/// A device's stream is refused, or was about to be written wrongly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A number where a tag should be.
    #[error("{raw:#018x} is not a record's tag")]
    UnknownTag {
        /// The number.
        raw: u64,
    },
    /// A record where it may not be (W-RECORD-ORDER).
    #[error("{tag} is not allowed {place}")]
    Order {
        /// The record.
        tag: Tag,
        /// Where the stream is.
        place: Place,
    },
    /// The frame is not the next of its device (W-SEQUENCE).
    #[error("frame {found} of the device, expected frame {expected}")]
    Sequence {
        /// The number expected.
        expected: u64,
        /// The number found.
        found: u64,
    },
    /// The frame belongs to another device, or is no DEVICE frame.
    #[error("a frame that does not belong to device {device}")]
    WrongFrame {
        /// Index of this stream's device.
        device: u32,
    },
    /// A DEVICE frame without payload.
    #[error("an empty DEVICE frame")]
    EmptyFrame,
    /// A DATA record of size 0 or above the limit (W-DATA-SIZE).
    #[error("a DATA record of {size} bytes; 1 to {limit} are accepted")]
    DataSize {
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A frame with the flag CONFIG is not one CONFIG record with its END, or CONFIG stands in
    /// a frame without the flag (W-CONFIG-FRAME).
    #[error("a CONFIG record is not alone in a frame of its own")]
    ConfigFrame,
    /// Bytes behind the end of the stream (W-RECORD-ORDER).
    #[error("bytes after the end of the stream")]
    AfterEnd,
    /// More generations, frames or bytes than can be counted.
    #[error("the stream is longer than can be counted")]
    TooMuch,
    /// The stream ended early.
    #[error("the stream ends {place}")]
    Truncated {
        /// Where the stream is.
        place: Place,
    },
    /// A frame was given before all events of the one before were taken.
    #[error("the frame before was not read to its end")]
    Unread,
    /// A piece of a transaction does not follow the one before.
    #[error("a piece at offset {offset} of {of}, expected offset {expected}")]
    Piece {
        /// Its offset.
        offset: u64,
        /// Size of its transaction.
        of: u64,
        /// The offset expected.
        expected: u64,
    },
    /// The frame cannot be made.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl RecordError {
    /// Whose fault it is, if it comes from decoding; an encoder's errors are all this side's.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        match self {
            Self::Unread | Self::Piece { .. } => Fault::Misuse,
            Self::Frame(error) => error.fault(),
            Self::Truncated { .. } => Fault::Damaged,
            _ => Fault::PeerMisbehaved,
        }
    }
}

/// Where a stream of records is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Nothing has come: SETUP is next.
    Start,
    /// Between records.
    Records,
    /// Within a DATA record.
    Data,
    /// Behind CONFIG_LOAD_READY: CONFIG or END is next.
    Ready,
    /// Behind the end.
    Ended,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Start => "before SETUP",
            Self::Records => "between records",
            Self::Data => "within a DATA record",
            Self::Ready => "after CONFIG_LOAD_READY",
            Self::Ended => "after the end",
        })
    }
}

impl Place {
    /// Where the stream is behind `tag` (W-RECORD-ORDER).
    const fn after(self, tag: Tag) -> Result<Self, RecordError> {
        match (self, tag) {
            (Self::Start, Tag::Setup) | (Self::Records, Tag::InitDataSent) => Ok(Self::Records),
            (Self::Records, Tag::Data) => Ok(Self::Data),
            (Self::Records, Tag::ConfigLoadReady) => Ok(Self::Ready),
            (Self::Records | Self::Ready, Tag::Config | Tag::End) => Ok(Self::Ended),
            (place, tag) => Err(RecordError::Order { tag, place }),
        }
    }
}

/// What a device's stream held so far. The same on both sides for the same stream (W-TRAILER).
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamTotals {
    frames: u64,
    bytes: u64,
    generation: u32,
    digest: StreamDigest,
}

impl StreamTotals {
    /// Frames.
    #[must_use]
    pub const fn frames(&self) -> u64 {
        self.frames
    }

    /// Bytes of the frames' payloads.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Generations of initial data that are complete (W-INIT).
    #[must_use]
    pub const fn generation(&self) -> u32 {
        self.generation
    }

    /// CRC-64/NVME of the frames' payloads in order.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.digest.value()
    }

    fn count(&mut self, payload: &[u8]) -> Result<(), RecordError> {
        self.frames = self.frames.checked_add(1).ok_or(RecordError::TooMuch)?;
        self.bytes = self.bytes.checked_add(payload.len() as u64).ok_or(RecordError::TooMuch)?;
        self.digest.update(payload);
        Ok(())
    }

    fn next_generation(&mut self) -> Result<u32, RecordError> {
        self.generation = self.generation.checked_add(1).ok_or(RecordError::TooMuch)?;
        Ok(self.generation)
    }
}
