//! What the two sides say to each other: the control messages, each one frame.
//!
//! They travel on the control connection, which carries no bulk data. Each data connection begins with
//! JOIN and ends with FINAL, and has the source's ROUND_END behind the memory of each round; no other
//! message is there.
//!
//! | message | from | header | payload, little-endian |
//! |---|---|---|---|
//! | HELLO | source | | JSON [`Hello`] |
//! | REPORT | destination | | JSON [`Report`] |
//! | ACCEPT | source | | JSON [`Accept`] |
//! | JOIN | source | | session: 16, token: 16 |
//! | RESUME | source | | session: 16 |
//! | CREDIT | destination | index: device | frames: u32, above 0 (W-CREDIT) |
//! | INIT_ACK | destination | index: device | generation: u32, above 0 (W-INIT) |
//! | ROUND_END | source, on data connections; destination | round | none (W-ROUND) |
//! | FINAL | source | | frames: u64, bytes: u64 (W-FINAL) |
//! | TRAILER | source | index: device | frames: u64, bytes: u64, digest: u64, generation: u32 (W-TRAILER) |
//! | LOADED | destination | | session: 16, JSON [`LoadedTerms`] |
//! | COMMIT | source | | session: 16 |
//! | RUNNING | destination | | session: 16, JSON [`RunningTerms`] |
//! | ABORT | both | | session: 16, JSON `airlift_core::Failure` |
//! | ABANDONED | destination | | session: 16, JSON `airlift_core::Failure` |
//! | CANCEL | both | | session: 16 |
//! | PING, PONG | both | | number: u64 |
//! | DONE | source | | session: 16 (W-DONE) |
//!
//! Session and token are 16 bytes in the order in which their 32 hexadecimal digits are written.
//! A payload of fixed length has exactly that length. JSON is UTF-8, at most 1 MiB, with unknown
//! members ignored; lists in it are bounded (W-COUNTS). Whether a message may come now is the
//! engine's to check.

mod terms;
mod types;

pub use terms::{DeviceTransition, LoadedTerms, RunningTerms};
pub use types::{Accept, DataCount, Hello, InvalidToken, Report, Token, Trailer};

use crate::Fault;
use crate::frame::{FrameError, FrameHeader, FrameType, HEADER_LEN, MAX_PAYLOAD};
use airlift_core::Failure;
use airlift_core::commit::{CommitMessage, SessionId};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The most devices of a session.
pub const MAX_DEVICES: usize = 1024;

/// The most memory regions of a session.
pub const MAX_REGIONS: usize = 4096;

/// The most data connections of a session.
pub const MAX_CHANNELS: usize = 64;

/// The most facts of one device's identity.
pub const MAX_FACTS: usize = 256;

/// The most entries of any other list, and the most bytes of a feature's name.
pub const MAX_LIST: usize = 64;

/// A control message is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// The frame is bulk data, or of a type that is to be skipped.
    #[error("{kind} is not a control message")]
    NotAMessage {
        /// The frame's type.
        kind: FrameType,
    },
    /// The payload does not have the length of its type.
    #[error("{kind} has a payload of {length} bytes")]
    Length {
        /// The frame's type.
        kind: FrameType,
        /// Length of the payload.
        length: usize,
    },
    /// The payload is not the JSON that it should be.
    #[error("{kind} cannot be read: {message}")]
    Json {
        /// The frame's type.
        kind: FrameType,
        /// What the JSON reader says.
        message: String,
    },
    /// A list has more entries than a session may have (W-COUNTS).
    #[error("{kind} has {count} {what}; at most {limit} are accepted")]
    TooMany {
        /// The frame's type.
        kind: FrameType,
        /// What there is too much of.
        what: &'static str,
        /// How many.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// A number that must be above 0 is 0.
    #[error("{kind} with 0 where a number above 0 must be")]
    Zero {
        /// The frame's type.
        kind: FrameType,
    },
    /// The message does not fit into a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl MessageError {
    /// Whose fault it is, if it comes from decoding; an encoder's errors are all this side's.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        match self {
            Self::Frame(error) => error.fault(),
            _ => Fault::PeerMisbehaved,
        }
    }
}

/// A control message. Device indexes are positions in HELLO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// What the source has and wants to send.
    Hello(Box<Hello>),
    /// What the destination says to it.
    Report(Box<Report>),
    /// The source goes on.
    Accept(Accept),
    /// This data connection belongs to a session.
    Join {
        /// The session.
        session: SessionId,
        /// One of the tokens of [`Report`], each good for one connection.
        token: Token,
    },
    /// This control connection takes the place of the session's lost one.
    Resume {
        /// The session.
        session: SessionId,
    },
    /// Room for more frames of a device, on top of what was given before (W-CREDIT).
    Credit {
        /// The device.
        device: u32,
        /// How many frames more.
        frames: u32,
    },
    /// A generation of initial data, and all before it, is loaded (W-INIT).
    InitAck {
        /// The device.
        device: u32,
        /// Its generation.
        generation: u32,
    },
    /// From the source, on each data connection: all memory of a round has been sent over it. From the
    /// destination: all of the round is written (W-ROUND).
    RoundEnd {
        /// The round.
        round: u32,
    },
    /// Nothing follows on this data connection (W-FINAL).
    Final(DataCount),
    /// What a device's stream held (W-TRAILER).
    Trailer(Trailer),
    /// The destination holds everything, and every device accepted it.
    Loaded {
        /// The session.
        session: SessionId,
        /// How long it took.
        terms: LoadedTerms,
    },
    /// The source will not run any more.
    Commit {
        /// The session.
        session: SessionId,
    },
    /// The destination runs.
    Running {
        /// The session.
        session: SessionId,
        /// How long it took.
        terms: RunningTerms,
    },
    /// The sender gives up, and the source runs on.
    Abort {
        /// The session.
        session: SessionId,
        /// Why.
        failure: Box<Failure>,
    },
    /// The destination will never run this session.
    Abandoned {
        /// The session.
        session: SessionId,
        /// Why.
        failure: Box<Failure>,
    },
    /// A user of the sender's side wants the session to end.
    Cancel {
        /// The session.
        session: SessionId,
    },
    /// Asks for PONG.
    Ping(u64),
    /// Answers PING with its number.
    Pong(u64),
    /// The source has heard RUNNING, or ABANDONED after COMMIT. A receiver that does not know it waits a little longer (W-DONE).
    Done {
        /// The session.
        session: SessionId,
    },
}

impl Message {
    /// Its type on the wire.
    #[must_use]
    pub const fn kind(&self) -> FrameType {
        match self {
            Self::Hello(_) => FrameType::Hello,
            Self::Report(_) => FrameType::Report,
            Self::Accept(_) => FrameType::Accept,
            Self::Join { .. } => FrameType::Join,
            Self::Resume { .. } => FrameType::Resume,
            Self::Credit { .. } => FrameType::Credit,
            Self::InitAck { .. } => FrameType::InitAck,
            Self::RoundEnd { .. } => FrameType::RoundEnd,
            Self::Final(_) => FrameType::Final,
            Self::Trailer(_) => FrameType::Trailer,
            Self::Loaded { .. } => FrameType::Loaded,
            Self::Commit { .. } => FrameType::Commit,
            Self::Running { .. } => FrameType::Running,
            Self::Abort { .. } => FrameType::Abort,
            Self::Abandoned { .. } => FrameType::Abandoned,
            Self::Cancel { .. } => FrameType::Cancel,
            Self::Ping(_) => FrameType::Ping,
            Self::Pong(_) => FrameType::Pong,
            Self::Done { .. } => FrameType::Done,
        }
    }

    /// A message of the commit protocol. LOADED and RUNNING get terms of zero, which the engine
    /// replaces by its own.
    #[must_use]
    pub fn of_commit(session: SessionId, message: CommitMessage) -> Self {
        match message {
            CommitMessage::Loaded => Self::Loaded { session, terms: LoadedTerms::default() },
            CommitMessage::Commit => Self::Commit { session },
            CommitMessage::Running => Self::Running { session, terms: RunningTerms::default() },
            CommitMessage::Abort(failure) => Self::Abort { session, failure },
            CommitMessage::Abandoned { cause: failure } => Self::Abandoned { session, failure },
            CommitMessage::Cancel => Self::Cancel { session },
        }
    }

    /// The message as the machines of the commit protocol take it, with its session; `None` for a
    /// message that is not theirs.
    #[must_use]
    pub fn to_commit(&self) -> Option<(SessionId, CommitMessage)> {
        Some(match self {
            Self::Loaded { session, .. } => (*session, CommitMessage::Loaded),
            Self::Commit { session } => (*session, CommitMessage::Commit),
            Self::Running { session, .. } => (*session, CommitMessage::Running),
            Self::Abort { session, failure } => (*session, CommitMessage::Abort(failure.clone())),
            Self::Abandoned { session, failure } => {
                (*session, CommitMessage::Abandoned { cause: failure.clone() })
            }
            Self::Cancel { session } => (*session, CommitMessage::Cancel),
            _ => return None,
        })
    }

    /// The whole frame. `sequence` is the sender's counter.
    ///
    /// A failure is cut to 16 causes and 4 KiB for each text, so that it can always be sent.
    ///
    /// # Errors
    /// When the message breaks a bound that the receiver would refuse.
    pub fn encode(&self, sequence: u64) -> Result<Vec<u8>, MessageError> {
        self.check()?;
        let kind = self.kind();
        let mut header = FrameHeader::new(kind);
        header.sequence = sequence;
        let mut frame = vec![0; HEADER_LEN];
        match self {
            Self::Hello(hello) => json(kind, &mut frame, hello)?,
            Self::Report(report) => json(kind, &mut frame, report)?,
            Self::Accept(accept) => json(kind, &mut frame, accept)?,
            Self::Join { session, token } => {
                frame.extend_from_slice(&session.0.to_be_bytes());
                frame.extend_from_slice(&token.0.to_be_bytes());
            }
            Self::Resume { session }
            | Self::Commit { session }
            | Self::Cancel { session }
            | Self::Done { session } => {
                frame.extend_from_slice(&session.0.to_be_bytes());
            }
            Self::Credit { device, frames } => {
                header.index = *device;
                frame.extend_from_slice(&frames.to_le_bytes());
            }
            Self::InitAck { device, generation } => {
                header.index = *device;
                frame.extend_from_slice(&generation.to_le_bytes());
            }
            Self::RoundEnd { round } => header.round = *round,
            Self::Final(count) => {
                frame.extend_from_slice(&count.frames.to_le_bytes());
                frame.extend_from_slice(&count.bytes.to_le_bytes());
            }
            Self::Trailer(trailer) => {
                header.index = trailer.device;
                frame.extend_from_slice(&trailer.frames.to_le_bytes());
                frame.extend_from_slice(&trailer.bytes.to_le_bytes());
                frame.extend_from_slice(&trailer.digest.to_le_bytes());
                frame.extend_from_slice(&trailer.generation.to_le_bytes());
            }
            Self::Loaded { session, terms } => session_json(kind, &mut frame, *session, terms)?,
            Self::Running { session, terms } => session_json(kind, &mut frame, *session, terms)?,
            Self::Abort { session, failure } | Self::Abandoned { session, failure } => {
                session_json(kind, &mut frame, *session, &terms::cut(failure))?;
            }
            Self::Ping(number) | Self::Pong(number) => frame.extend_from_slice(&number.to_le_bytes()),
        }
        header.seal(&frame[HEADER_LEN..])?;
        frame[..HEADER_LEN].copy_from_slice(&header.encode());
        Ok(frame)
    }

    /// Reads the message of a frame whose checksum was verified.
    ///
    /// # Errors
    /// When the payload is not what the type says or breaks a bound.
    pub fn decode(header: &FrameHeader, payload: &[u8]) -> Result<Self, MessageError> {
        let kind = header.kind;
        let mut fields = Fields { kind, length: payload.len(), rest: payload };
        let device = header.index;
        let message = match kind {
            FrameType::Hello => Self::Hello(fields.json()?),
            FrameType::Report => Self::Report(fields.json()?),
            FrameType::Accept => Self::Accept(fields.json()?),
            FrameType::Join => Self::Join { session: fields.session()?, token: Token(fields.u128()?) },
            FrameType::Resume => Self::Resume { session: fields.session()? },
            FrameType::Credit => Self::Credit { device, frames: fields.u32()? },
            FrameType::InitAck => Self::InitAck { device, generation: fields.u32()? },
            FrameType::RoundEnd => Self::RoundEnd { round: header.round },
            FrameType::Final => Self::Final(DataCount { frames: fields.u64()?, bytes: fields.u64()? }),
            FrameType::Trailer => Self::Trailer(Trailer {
                device,
                frames: fields.u64()?,
                bytes: fields.u64()?,
                digest: fields.u64()?,
                generation: fields.u32()?,
            }),
            FrameType::Loaded => Self::Loaded { session: fields.session()?, terms: fields.json()? },
            FrameType::Commit => Self::Commit { session: fields.session()? },
            FrameType::Running => Self::Running { session: fields.session()?, terms: fields.json()? },
            FrameType::Abort => {
                Self::Abort { session: fields.session()?, failure: Box::new(terms::cut(&fields.json()?)) }
            }
            FrameType::Abandoned => {
                Self::Abandoned { session: fields.session()?, failure: Box::new(terms::cut(&fields.json()?)) }
            }
            FrameType::Cancel => Self::Cancel { session: fields.session()? },
            FrameType::Ping => Self::Ping(fields.u64()?),
            FrameType::Pong => Self::Pong(fields.u64()?),
            FrameType::Done => Self::Done { session: fields.session()? },
            FrameType::Device
            | FrameType::Pages
            | FrameType::Zero
            | FrameType::Record
            | FrameType::Unknown(_) => return Err(MessageError::NotAMessage { kind }),
        };
        if !fields.rest.is_empty() {
            return Err(MessageError::Length { kind, length: payload.len() });
        }
        message.check()?;
        Ok(message)
    }

    /// The bounds that hold for both directions (W-COUNTS).
    fn check(&self) -> Result<(), MessageError> {
        let kind = self.kind();
        match self {
            Self::Hello(hello) => hello.check(kind),
            Self::Report(report) => report.check(kind),
            Self::Accept(accept) => accept.check(kind),
            Self::Loaded { terms, .. } => terms.check(kind),
            Self::Running { terms, .. } => terms.check(kind),
            Self::Credit { frames: 0, .. } | Self::InitAck { generation: 0, .. } => {
                Err(MessageError::Zero { kind })
            }
            _ => Ok(()),
        }
    }
}

/// Refuses a list with more than `limit` entries (W-COUNTS).
const fn at_most(
    kind: FrameType,
    what: &'static str,
    count: usize,
    limit: usize,
) -> Result<(), MessageError> {
    if count > limit {
        return Err(MessageError::TooMany { kind, what, count, limit });
    }
    Ok(())
}

fn json(kind: FrameType, frame: &mut Vec<u8>, value: &impl Serialize) -> Result<(), MessageError> {
    serde_json::to_writer(&mut *frame, value)
        .map_err(|error| MessageError::Json { kind, message: error.to_string() })?;
    let length = frame.len() - HEADER_LEN;
    if length > MAX_PAYLOAD as usize {
        return Err(FrameError::Overflow { length, capacity: MAX_PAYLOAD as usize }.into());
    }
    Ok(())
}

fn session_json(
    kind: FrameType,
    frame: &mut Vec<u8>,
    session: SessionId,
    value: &impl Serialize,
) -> Result<(), MessageError> {
    frame.extend_from_slice(&session.0.to_be_bytes());
    json(kind, frame, value)
}

/// Takes the fields of a payload from its front.
struct Fields<'a> {
    kind: FrameType,
    length: usize,
    rest: &'a [u8],
}

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let (field, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(MessageError::Length { kind: self.kind, length: self.length })?;
        self.rest = rest;
        Ok(*field)
    }

    fn u128(&mut self) -> Result<u128, MessageError> {
        self.array().map(u128::from_be_bytes)
    }

    fn session(&mut self) -> Result<SessionId, MessageError> {
        self.u128().map(SessionId)
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        self.array().map(u64::from_le_bytes)
    }

    fn json<T: DeserializeOwned>(&mut self) -> Result<T, MessageError> {
        let bytes = std::mem::take(&mut self.rest);
        // The reader's text may quote the payload, which is the other side's and can be long.
        serde_json::from_slice(bytes).map_err(|error| MessageError::Json {
            kind: self.kind,
            message: terms::cut_text(&error.to_string(), 256),
        })
    }
}
