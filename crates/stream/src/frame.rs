//! The frame: a header of 40 bytes, then its payload.
//!
//! All numbers are little-endian. (VFIO records *inside* a payload are big-endian, as QEMU writes them.)
//!
//! ```text
//!       0       1       2       3       4       5       6       7
//!   +-------+-------+-------+-------+-------+-------+-------+-------+
//!  0|  'A'     'I'     'R'     'L'  |    version    |     type      |
//!   +-------+-------+-------+-------+-------+-------+-------+-------+
//!  8|             flags             |             index             |
//!   +-------+-------+-------+-------+-------+-------+-------+-------+
//! 16|                           sequence                            |
//!   +-------+-------+-------+-------+-------+-------+-------+-------+
//! 24|             round             |        payload length         |
//!   +-------+-------+-------+-------+-------+-------+-------+-------+
//! 32|            CRC-32C            |        reserved: zero         |
//!   +-------+-------+-------+-------+-------+-------+-------+-------+
//! 40|  payload: `payload length` bytes, at most 1 MiB ...
//! ```
//!
//! | offset | size | field | meaning |
//! |---|---|---|---|
//! | 0 | 4 | magic | the bytes `AIRL` |
//! | 4 | 2 | version | [`VERSION`]; another number is refused, also in HELLO |
//! | 6 | 2 | type | [`FrameType`] |
//! | 8 | 4 | flags | [`FrameFlags`]; an unknown bit of the lower half is refused, of the upper half ignored (W-FLAGS) |
//! | 12 | 4 | index | DEVICE, and control messages about one device: the device's position in HELLO. PAGES and ZERO: the id of the memory region. Else 0 |
//! | 16 | 8 | sequence | DEVICE: number of the frame in the device's stream, from 0 (W-SEQUENCE). RECORD: the place in the order of loading, from 0. Else a counter of the sender that nobody checks |
//! | 24 | 4 | round | PAGES, ZERO and DEVICE: the pre-copy round, from 0. Else 0 |
//! | 28 | 4 | payload length | in bytes, at most [`MAX_PAYLOAD`] and the limit of the receiver (W-LENGTH) |
//! | 32 | 4 | CRC-32C | over the 40 bytes of the header with this field as zero, then the payload (W-CRC) |
//! | 36 | 4 | reserved | zero, and refused otherwise |
//!
//! A type that the receiver does not know aborts the session if [`FrameFlags::MUST_UNDERSTAND`] is
//! set and is skipped otherwise (W-MUST-UNDERSTAND); its checksum is verified all the same.

use crate::{Fault, digest::crc32c};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 40;

/// The longest payload in bytes: 1 MiB.
pub const MAX_PAYLOAD: u32 = 1 << 20;

/// The version of the wire that this crate speaks.
pub const VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"AIRL";

/// The header as it lies on the wire.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U16,
    kind: U16,
    flags: U32,
    index: U32,
    sequence: U64,
    round: U32,
    length: U32,
    crc: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

bitflags::bitflags! {
    /// Flags of a frame. The lower 16 bits change the meaning of a frame: an unknown one is refused.
    /// The upper 16 are hints: an unknown one is ignored (W-FLAGS).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct FrameFlags: u32 {
        /// A receiver that does not know the type must end the session (W-MUST-UNDERSTAND).
        const MUST_UNDERSTAND = 1;
        /// On DEVICE: the payload is exactly one CONFIG record with its END (W-CONFIG-FRAME).
        const CONFIG = 2;
    }
}

macro_rules! frame_types {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        /// What a frame is. Below 0x100 the control messages, from 0x100 on bulk data.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum FrameType {
            $($(#[$doc])* $name,)*
            /// A type that this version does not know.
            Unknown(u16),
        }

        impl FrameType {
            /// Every type that this version knows.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The number on the wire.
            #[must_use]
            pub const fn to_raw(self) -> u16 {
                match self {
                    $(Self::$name => $value,)*
                    Self::Unknown(raw) => raw,
                }
            }

            /// The type of a number; every number has one.
            #[must_use]
            pub const fn from_raw(raw: u16) -> Self {
                match raw {
                    $($value => Self::$name,)*
                    other => Self::Unknown(other),
                }
            }
        }

        impl std::fmt::Display for FrameType {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self {
                    $(Self::$name => f.write_str($text),)*
                    Self::Unknown(raw) => write!(f, "unknown type {raw:#x}"),
                }
            }
        }
    };
}

frame_types! {
    /// First on the control connection, from the source: versions, devices, memory, limits.
    Hello = 0x01, "HELLO";
    /// The answer: every finding, and what the source needs to go on.
    Report = 0x02, "REPORT";
    /// The source goes on.
    Accept = 0x03, "ACCEPT";
    /// First on a data connection: session and token.
    Join = 0x04, "JOIN";
    /// First on a control connection that replaces a lost one.
    Resume = 0x05, "RESUME";
    /// The destination has room for more frames of a device.
    Credit = 0x06, "CREDIT";
    /// A generation of a device's initial data is loaded.
    InitAck = 0x07, "INIT_ACK";
    /// A round of memory has been sent.
    RoundEnd = 0x08, "ROUND_END";
    /// Last on a data connection: what was sent on it.
    Final = 0x09, "FINAL";
    /// What a device's stream held, all in all.
    Trailer = 0x0a, "TRAILER";
    /// The destination holds everything and every device accepted it.
    Loaded = 0x0b, "LOADED";
    /// The source will not run any more.
    Commit = 0x0c, "COMMIT";
    /// The destination runs.
    Running = 0x0d, "RUNNING";
    /// The sender gives up; the source runs on.
    Abort = 0x0e, "ABORT";
    /// The destination will never run this session.
    Abandoned = 0x0f, "ABANDONED";
    /// A user of the sender's side wants the session to end.
    Cancel = 0x10, "CANCEL";
    /// Asks for a PONG with the same number.
    Ping = 0x11, "PING";
    /// Answers a PING.
    Pong = 0x12, "PONG";
    /// The source has heard RUNNING, or ABANDONED after COMMIT: it need not be said again.
    Done = 0x13, "DONE";
    /// Bytes of a device's stream of records.
    Device = 0x100, "DEVICE";
    /// A run of guest pages.
    Pages = 0x101, "PAGES";
    /// Runs of guest memory that are all zero.
    Zero = 0x102, "ZERO";
    /// A record of the machine.
    Record = 0x103, "RECORD";
}

impl FrameType {
    /// Bulk data, which FINAL counts.
    #[must_use]
    pub const fn is_data(self) -> bool {
        matches!(self, Self::Device | Self::Pages | Self::Zero | Self::Record)
    }

    /// The flags that a frame of this type is sent with: all but PING, PONG and DONE, which only spare
    /// the other side a wait, must be understood.
    #[must_use]
    pub const fn default_flags(self) -> FrameFlags {
        match self {
            Self::Ping | Self::Pong | Self::Done => FrameFlags::empty(),
            _ => FrameFlags::MUST_UNDERSTAND,
        }
    }
}

/// What a receiver accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    max_payload: u32,
}

impl Limits {
    /// Payloads of at most `max_payload` bytes, and never more than [`MAX_PAYLOAD`].
    #[must_use]
    pub const fn new(max_payload: u32) -> Self {
        Self { max_payload: if max_payload < MAX_PAYLOAD { max_payload } else { MAX_PAYLOAD } }
    }

    /// The longest payload in bytes that is accepted.
    #[must_use]
    pub const fn max_payload(&self) -> u32 {
        self.max_payload
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::new(MAX_PAYLOAD)
    }
}

/// A frame is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// What arrives is not a frame: the other side is something else, or the place in the stream was lost.
    #[error("not an Airlift frame: it starts with {found:02x?}")]
    NotAFrame {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// The other side speaks another version of the wire.
    #[error("the frame has version {found}; this side speaks {VERSION}")]
    Version {
        /// Its version.
        found: u16,
    },
    /// The payload would be longer than this side accepts. Nothing was allocated for it (W-LENGTH).
    #[error("{kind} announces {length} bytes; at most {limit} are accepted")]
    TooLong {
        /// The frame's type.
        kind: FrameType,
        /// The length announced.
        length: u32,
        /// The limit.
        limit: u32,
    },
    /// A type that must be understood and is not (W-MUST-UNDERSTAND).
    #[error("a frame of unknown type {raw:#x} must be understood")]
    UnknownType {
        /// The type's number.
        raw: u16,
    },
    /// A flag that changes the frame's meaning and is not known (W-FLAGS).
    #[error("{kind} has unknown flags {flags:#x}")]
    UnknownFlags {
        /// The frame's type.
        kind: FrameType,
        /// All its flags.
        flags: u32,
    },
    /// The reserved field is not zero.
    #[error("{kind} has {found:#x} in its reserved field")]
    Reserved {
        /// The frame's type.
        kind: FrameType,
        /// What stands there.
        found: u32,
    },
    /// The checksum does not match header and payload (W-CRC).
    #[error("{kind} was damaged: CRC-32C {found:#010x}, announced {announced:#010x}")]
    Checksum {
        /// The frame's type, if that is not what was damaged.
        kind: FrameType,
        /// The checksum in the header.
        announced: u32,
        /// The checksum of what arrived.
        found: u32,
    },
    /// The stream ended within a frame.
    #[error("the stream ends within a frame: {have} bytes of {need}")]
    Truncated {
        /// Bytes that arrived.
        have: usize,
        /// Bytes that the frame, or its header where that is not complete, has.
        need: usize,
    },
    /// This side gave a payload of another length than its header says.
    #[error("the header says {header} bytes of payload, {given} were given")]
    WrongPayload {
        /// The header's length.
        header: u32,
        /// The length given.
        given: usize,
    },
    /// This side wants to put more into a frame than fits.
    #[error("{length} bytes do not fit into a frame buffer of {capacity}")]
    Overflow {
        /// The length wanted.
        length: usize,
        /// What fits.
        capacity: usize,
    },
}

impl FrameError {
    /// Whose fault it is.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        match self {
            Self::Version { .. } | Self::UnknownType { .. } => Fault::Incompatible,
            Self::TooLong { .. } | Self::UnknownFlags { .. } | Self::Reserved { .. } => Fault::PeerMisbehaved,
            Self::NotAFrame { .. } | Self::Checksum { .. } | Self::Truncated { .. } => Fault::Damaged,
            Self::WrongPayload { .. } | Self::Overflow { .. } => Fault::Misuse,
        }
    }
}

/// A frame's header, as values. [`decode`](Self::decode) gives one whose fields are checked except
/// for the checksum, which needs the payload: [`verify`](Self::verify).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the frame is.
    pub kind: FrameType,
    /// Its flags, with unknown hints kept.
    pub flags: FrameFlags,
    /// Device index or memory region; see the module's table.
    pub index: u32,
    /// Number of the frame; see the module's table.
    pub sequence: u64,
    /// Pre-copy round.
    pub round: u32,
    /// Length of the payload in bytes.
    pub length: u32,
    /// The checksum. Zero until [`seal`](Self::seal).
    pub crc: u32,
}

impl FrameHeader {
    /// A header of this type with its default flags and everything else zero.
    #[must_use]
    pub const fn new(kind: FrameType) -> Self {
        Self { kind, flags: kind.default_flags(), index: 0, sequence: 0, round: 0, length: 0, crc: 0 }
    }

    /// Reads a header and checks everything that can be checked before the payload is there: magic,
    /// version, type, flags, and the length against `limits`, so that the caller may allocate
    /// [`payload_len`](Self::payload_len) bytes (W-LENGTH).
    ///
    /// # Errors
    /// When the header is refused. The stream cannot be read further.
    pub fn decode(bytes: &[u8; HEADER_LEN], limits: Limits) -> Result<Self, FrameError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(FrameError::NotAFrame { found: raw.magic });
        }
        if raw.version.get() != VERSION {
            return Err(FrameError::Version { found: raw.version.get() });
        }
        let kind = FrameType::from_raw(raw.kind.get());
        let length = raw.length.get();
        if length > limits.max_payload {
            return Err(FrameError::TooLong { kind, length, limit: limits.max_payload });
        }
        let flags = FrameFlags::from_bits_retain(raw.flags.get());
        if let FrameType::Unknown(raw) = kind
            && flags.contains(FrameFlags::MUST_UNDERSTAND)
        {
            return Err(FrameError::UnknownType { raw });
        }
        // Flags of a type that is skipped mean nothing to us.
        let unknown = flags.bits() & !FrameFlags::all().bits() & 0xffff;
        if unknown != 0 && !matches!(kind, FrameType::Unknown(_)) {
            return Err(FrameError::UnknownFlags { kind, flags: flags.bits() });
        }
        if raw.reserved.get() != 0 {
            return Err(FrameError::Reserved { kind, found: raw.reserved.get() });
        }
        Ok(Self {
            kind,
            flags,
            index: raw.index.get(),
            sequence: raw.sequence.get(),
            round: raw.round.get(),
            length,
            crc: raw.crc.get(),
        })
    }

    /// The header's bytes, with the checksum that [`seal`](Self::seal) left in it.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let raw = RawHeader {
            magic: MAGIC,
            version: U16::new(VERSION),
            kind: U16::new(self.kind.to_raw()),
            flags: U32::new(self.flags.bits()),
            index: U32::new(self.index),
            sequence: U64::new(self.sequence),
            round: U32::new(self.round),
            length: U32::new(self.length),
            crc: U32::new(self.crc),
            reserved: U32::new(0),
        };
        zerocopy::transmute!(raw)
    }

    /// Sets length and checksum for this payload.
    ///
    /// # Errors
    /// When the payload is longer than [`MAX_PAYLOAD`].
    pub fn seal(&mut self, payload: &[u8]) -> Result<(), FrameError> {
        self.length = u32::try_from(payload.len())
            .ok()
            .filter(|length| *length <= MAX_PAYLOAD)
            .ok_or(FrameError::Overflow { length: payload.len(), capacity: MAX_PAYLOAD as usize })?;
        self.crc = self.checksum(payload);
        Ok(())
    }

    /// Checks the payload that arrived against the checksum (W-CRC).
    ///
    /// # Errors
    /// When header or payload were damaged, or `payload` is not `length` bytes long.
    pub fn verify(&self, payload: &[u8]) -> Result<(), FrameError> {
        if payload.len() != self.payload_len() {
            return Err(FrameError::WrongPayload { header: self.length, given: payload.len() });
        }
        let found = self.checksum(payload);
        if found != self.crc {
            return Err(FrameError::Checksum { kind: self.kind, announced: self.crc, found });
        }
        Ok(())
    }

    fn checksum(&self, payload: &[u8]) -> u32 {
        crc32c(&[&Self { crc: 0, ..*self }.encode(), payload])
    }

    /// Length of the payload in bytes, as a count.
    #[must_use]
    pub const fn payload_len(&self) -> usize {
        self.length as usize
    }

    /// Not known to this version, and may be skipped after its checksum was verified.
    #[must_use]
    pub const fn is_skippable(&self) -> bool {
        matches!(self.kind, FrameType::Unknown(_))
    }
}
