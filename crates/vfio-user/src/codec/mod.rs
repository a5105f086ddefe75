//! The bytes of vfio-user: headers, the fixed parts of all messages, and the texts of VERSION.
//!
//! Nothing here does I/O. Headers are checked against a bound before anything is allocated; fixed
//! parts are taken from the front of a payload. What the fields mean, and whether a request fits the
//! state of a device, is checked by who handles the message. All values are in host byte order, as
//! the protocol says.

mod structs;
mod version;

pub use structs::{
    DeviceInfo, DeviceInfoFlags, DmaData, DmaMap, DmaMapFlags, DmaUnmap, DmaUnmapFlags, FeatureFlags,
    FeatureHeader, IrqInfo, IrqInfoFlags, IrqSet, IrqSetFlags, LoggingControl, LoggingRange, LoggingReport,
    MigData, MigState, PrecopyInfoReply, RegionAccess, RegionCap, RegionInfo, RegionInfoFlags, RegionIoFds,
    RegionTypeCap, RegionWriteMulti, SocketReply, SparseArea, StateFormatFlags, StateFormatHeader, feature,
};
pub use version::{DEFAULT_MAX_DATA_XFER_SIZE, VersionCaps, VersionError, VersionMessage};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of the header that begins every message.
pub const HEADER_SIZE: usize = 16;

/// Most file descriptors that are taken with one message.
pub const MAX_FDS: usize = 16;

/// The commands, by their numbers.
pub mod command {
    /// Negotiates the version; the first message.
    pub const VERSION: u16 = 1;
    /// Lets the server use memory.
    pub const DMA_MAP: u16 = 2;
    /// Takes memory back.
    pub const DMA_UNMAP: u16 = 3;
    /// How many regions and interrupts there are.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// What one region is.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// Descriptors for kicks of a region.
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    /// What one interrupt index is.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// Wires, masks or triggers interrupts.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// Reads from a region.
    pub const REGION_READ: u16 = 9;
    /// Writes to a region.
    pub const REGION_WRITE: u16 = 10;
    /// The server reads the client's memory.
    pub const DMA_READ: u16 = 11;
    /// The server writes the client's memory.
    pub const DMA_WRITE: u16 = 12;
    /// Resets the device.
    pub const DEVICE_RESET: u16 = 13;
    /// Several small writes at once.
    pub const REGION_WRITE_MULTI: u16 = 15;
    /// A VFIO device feature.
    pub const DEVICE_FEATURE: u16 = 16;
    /// Reads migration data.
    pub const MIG_DATA_READ: u16 = 17;
    /// Writes migration data.
    pub const MIG_DATA_WRITE: u16 = 18;

    /// The command's name, for messages to people.
    #[must_use]
    pub const fn name(number: u16) -> &'static str {
        match number {
            VERSION => "VERSION",
            DMA_MAP => "DMA_MAP",
            DMA_UNMAP => "DMA_UNMAP",
            DEVICE_GET_INFO => "DEVICE_GET_INFO",
            DEVICE_GET_REGION_INFO => "DEVICE_GET_REGION_INFO",
            DEVICE_GET_REGION_IO_FDS => "DEVICE_GET_REGION_IO_FDS",
            DEVICE_GET_IRQ_INFO => "DEVICE_GET_IRQ_INFO",
            DEVICE_SET_IRQS => "DEVICE_SET_IRQS",
            REGION_READ => "REGION_READ",
            REGION_WRITE => "REGION_WRITE",
            DMA_READ => "DMA_READ",
            DMA_WRITE => "DMA_WRITE",
            DEVICE_RESET => "DEVICE_RESET",
            REGION_WRITE_MULTI => "REGION_WRITE_MULTI",
            DEVICE_FEATURE => "DEVICE_FEATURE",
            MIG_DATA_READ => "MIG_DATA_READ",
            MIG_DATA_WRITE => "MIG_DATA_WRITE",
            _ => "an unknown command",
        }
    }
}

/// Whether a message asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageType {
    /// It asks.
    Command {
        /// No answer is wanted.
        no_reply: bool,
    },
    /// It answers.
    Reply {
        /// The command failed with this error number, which may be 0 even so.
        error: Option<u32>,
    },
}

/// The header of a message.
///
/// ```text
///  0         2         4                   8                   12                 16
///  +---------+---------+-------------------+-------------------+-------------------+
///  | msg_id  | command | size (whole)      | flags             | error             |
///  +---------+---------+-------------------+-------------------+-------------------+
///                                            0-3 type: 0 command, 1 reply; 0x10 no reply; 0x20 error
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The sender's number for the message; a reply repeats it.
    pub msg_id: u16,
    /// The command, in a reply too.
    pub command: u16,
    /// Bytes of the payload that follows the header.
    pub payload: u32,
    /// Whether it asks or answers.
    pub kind: MessageType,
}

/// A header that cannot begin a message. What follows it on the stream has no known boundary, except
/// for [`FrameError::TooLong`] and [`FrameError::Type`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The size does not even hold the header.
    #[error("a message of {0} bytes is shorter than its header")]
    TooShort(u32),
    /// The payload exceeds the bound (VU-BOUND).
    #[error("a payload of {payload} bytes exceeds the limit of {limit}")]
    TooLong {
        /// Bytes of the payload.
        payload: u32,
        /// Most bytes that are taken.
        limit: u32,
    },
    /// Neither a command nor a reply.
    #[error("flags {0:#x} are neither those of a command nor of a reply")]
    Type(u32),
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    msg_id: u16,
    command: u16,
    size: u32,
    flags: u32,
    error: u32,
}

const TYPE_MASK: u32 = 0xf;
const TYPE_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 0x10;
const FLAG_ERROR: u32 = 0x20;

impl Header {
    /// A command that wants an answer.
    #[must_use]
    pub const fn command(msg_id: u16, command: u16, payload: u32) -> Self {
        Self { msg_id, command, payload, kind: MessageType::Command { no_reply: false } }
    }

    /// The answer to this command, with `payload` bytes behind it.
    #[must_use]
    pub const fn reply(self, payload: u32) -> Self {
        Self { payload, kind: MessageType::Reply { error: None }, ..self }
    }

    /// The answer to this command that says that it failed. It has no payload (VU-ERROR-REPLY).
    #[must_use]
    pub const fn error(self, errno: u32) -> Self {
        Self { payload: 0, kind: MessageType::Reply { error: Some(errno) }, ..self }
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER_SIZE] {
        let (flags, error) = match self.kind {
            MessageType::Command { no_reply: false } => (0, 0),
            MessageType::Command { no_reply: true } => (FLAG_NO_REPLY, 0),
            MessageType::Reply { error: None } => (TYPE_REPLY, 0),
            MessageType::Reply { error: Some(errno) } => (TYPE_REPLY | FLAG_ERROR, errno),
        };
        let size = self.payload.saturating_add(16);
        let raw = RawHeader { msg_id: self.msg_id, command: self.command, size, flags, error };
        zerocopy::transmute!(raw)
    }

    /// Reads a header. `size` holds the payload's length also where the result is an error other
    /// than [`FrameError::TooShort`].
    ///
    /// # Errors
    /// When its size is impossible or its payload would exceed `limit` bytes (VU-BOUND), or its
    /// flags are neither a command's nor a reply's. With [`FrameError::TooLong`] and
    /// [`FrameError::Type`] comes what could be read, so that the payload can be skipped.
    pub fn decode(bytes: [u8; HEADER_SIZE], limit: u32) -> Result<Self, (FrameError, Option<Self>)> {
        let raw: RawHeader = zerocopy::transmute!(bytes);
        let payload = raw.size.checked_sub(16).ok_or((FrameError::TooShort(raw.size), None))?;
        let kind = match raw.flags & TYPE_MASK {
            0 => MessageType::Command { no_reply: raw.flags & FLAG_NO_REPLY != 0 },
            TYPE_REPLY => MessageType::Reply { error: (raw.flags & FLAG_ERROR != 0).then_some(raw.error) },
            _ => {
                let kind = MessageType::Command { no_reply: raw.flags & FLAG_NO_REPLY != 0 };
                let header = Self { msg_id: raw.msg_id, command: raw.command, payload, kind };
                return Err((FrameError::Type(raw.flags), Some(header)));
            }
        };
        let header = Self { msg_id: raw.msg_id, command: raw.command, payload, kind };
        if payload > limit {
            return Err((FrameError::TooLong { payload, limit }, Some(header)));
        }
        Ok(header)
    }
}

/// A whole message, as it was received.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows.
    pub payload: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<std::os::fd::OwnedFd>,
}

/// Takes a fixed part from the front of a payload; the rest follows it. `None` when it is too short.
#[must_use]
pub fn take<T: FromBytes + Immutable + KnownLayout>(payload: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(payload).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_stands_in_its_sixteen_bytes() {
        let header = Header::command(0x1234, command::DMA_MAP, 32);
        let mut expected = Vec::new();
        expected.extend(0x1234_u16.to_ne_bytes());
        expected.extend(2_u16.to_ne_bytes());
        expected.extend(48_u32.to_ne_bytes());
        expected.extend(0_u32.to_ne_bytes());
        expected.extend(0_u32.to_ne_bytes());
        assert_eq!(header.encode().as_slice(), expected);
        let error = header.error(22).encode();
        assert_eq!(error[4..8], 16_u32.to_ne_bytes());
        assert_eq!(error[8..12], 0x21_u32.to_ne_bytes());
        assert_eq!(error[12..], 22_u32.to_ne_bytes());
    }

    #[test]
    fn sizes_are_bounded_before_anything_is_allocated() {
        let long = Header::command(1, 9, 100).encode();
        let (error, header) = Header::decode(long, 99).unwrap_err();
        assert_eq!(error, FrameError::TooLong { payload: 100, limit: 99 });
        assert_eq!(header.map(|h| h.payload), Some(100));
        let mut short = long;
        short[4..8].copy_from_slice(&15_u32.to_ne_bytes());
        assert_eq!(Header::decode(short, 99), Err((FrameError::TooShort(15), None)));
    }

    proptest! {
        #[test]
        fn any_header_is_refused_or_comes_back(bytes: [u8; 16], limit: u32) {
            if let Ok(header) = Header::decode(bytes, limit) {
                prop_assert!(header.payload <= limit);
                prop_assert_eq!(Header::decode(header.encode(), limit), Ok(header));
            }
        }
    }
}
