//! The bytes between two hosts. No I/O: everything here turns values into bytes and bytes into
//! values, and refuses what is not well formed.
//!
//! From the outside in:
//!
//! | module | what it holds |
//! |---|---|
//! | [`frame`] | the header that stands before everything, its limits and its checksum |
//! | [`buffer`] | [`FrameBuf`]: a reusable buffer that is read into and sent from without a copy |
//! | [`decoder`] | [`FrameDecoder`]: frames out of chunks of bytes of any size |
//! | [`message`] | [`Message`]: what the two sides say to each other on the control connection |
//! | [`record`] | a device's stream as VFIO records: [`RecordEncoder`] and [`RecordDecoder`] |
//! | [`pages`] | guest memory: runs of pages, runs of zeroes, and which connection takes them |
//! | [`machine_record`] | the machine's own records |
//!
//! What this crate does not check: whether a message is legal in the phase of the session, whether
//! an address is backed by memory, whether a device index is one of the session. That is the
//! engine's. What it guarantees on any input: no panic, and never more memory than
//! [`frame::HEADER_LEN`] + [`frame::MAX_PAYLOAD`] bytes of buffer for each decoder, whatever a length
//! field says (W-LENGTH).
#![forbid(unsafe_code)]

pub mod buffer;
pub mod decoder;
pub mod digest;
mod fault;
pub mod frame;
#[doc(hidden)]
pub mod harness;
pub mod machine_record;
pub mod message;
pub mod pages;
pub mod record;

pub use buffer::FrameBuf;
pub use decoder::{Frame, FrameDecoder};
pub use fault::Fault;
pub use frame::{FrameError, FrameFlags, FrameHeader, FrameType, HEADER_LEN, Limits, MAX_PAYLOAD};
pub use message::{Message, MessageError};
pub use record::{RecordDecoder, RecordEncoder, RecordError, RecordEvent, RecordLimits, StreamTotals};
