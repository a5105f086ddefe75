//! Whole frames from and to a stream.

use crate::link::Stream;
use airlift_core::Errno;
use airlift_stream::{FrameError, FrameHeader, HEADER_LEN, Limits, MessageError};
use std::io::{self, ErrorKind, Read, Write};

/// A connection cannot be used any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    /// The other side has closed it between two frames.
    #[error("the other side closed the connection")]
    Closed,
    /// Nothing has moved for as long as the deadline for silence allows.
    #[error("the other side has been silent for too long")]
    Silent,
    /// The connection failed.
    #[error("the connection failed: {message}")]
    Io { message: String, errno: Option<Errno> },
    /// What arrived is not a frame that may arrive.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// What arrived is not a message that may arrive.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A rule of the session was broken.
    #[error("the other side broke the protocol: {0}")]
    Protocol(String),
}

impl WireError {
    pub(crate) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Io { errno, .. } => *errno,
            Self::Silent => Some(Errno::ETIMEDOUT),
            _ => None,
        }
    }

    fn io(error: &io::Error) -> Self {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Self::Silent,
            _ => Self::Io { message: error.to_string(), errno: error.raw_os_error().map(Errno) },
        }
    }
}

/// Fills `buf`; `Ok(false)` when the stream ended before its first byte.
fn fill(stream: &Stream, buf: &mut [u8]) -> Result<bool, WireError> {
    let mut stream = stream;
    let mut have = 0;
    while have < buf.len() {
        match stream.read(&mut buf[have..]) {
            Ok(0) if have == 0 => return Ok(false),
            Ok(0) => return Err(FrameError::Truncated { have, need: buf.len() }.into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(WireError::io(&e)),
        }
    }
    Ok(true)
}

/// Reads the next header, checked except for the checksum.
pub(crate) fn read_header(stream: &Stream, limits: Limits) -> Result<FrameHeader, WireError> {
    let mut bytes = [0; HEADER_LEN];
    if !fill(stream, &mut bytes)? {
        return Err(WireError::Closed);
    }
    Ok(FrameHeader::decode(&bytes, limits)?)
}

/// Reads the payload of `header` into `space`, which has its length, and verifies the checksum.
pub(crate) fn read_payload(stream: &Stream, header: &FrameHeader, space: &mut [u8]) -> Result<(), WireError> {
    if !space.is_empty() && !fill(stream, space)? {
        return Err(FrameError::Truncated { have: 0, need: space.len() }.into());
    }
    Ok(header.verify(space)?)
}

/// Writes all of `bytes`.
pub(crate) fn write_all(stream: &Stream, bytes: &[u8]) -> Result<(), WireError> {
    let mut stream = stream;
    stream.write_all(bytes).map_err(|e| WireError::io(&e))
}
