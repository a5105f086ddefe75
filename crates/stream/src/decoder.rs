//! Frames out of chunks of bytes of any size, without I/O: for the inspector, for files and for tests.
//!
//! The engine's own readers do the same in two steps, to read a payload straight into a buffer of
//! their pool: [`FrameHeader::decode`] on the first [`HEADER_LEN`] bytes, then
//! [`FrameHeader::verify`] on the payload.

use crate::frame::{FrameError, FrameHeader, HEADER_LEN, Limits};

/// A frame that is complete and whose checksum is right. Its type may be unknown and is then to be skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The header.
    pub header: FrameHeader,
    /// The payload.
    pub payload: &'a [u8],
}

/// Takes bytes as they come and gives frames. Holds one frame at most, and of it only the bytes that
/// have arrived: a length is never allocated in advance (W-LENGTH).
///
/// ```
/// use airlift_stream::{FrameBuf, FrameDecoder, FrameHeader, FrameType, Limits};
/// let mut buf = FrameBuf::new(64);
/// buf.append(b"eight by")?;
/// let bytes = buf.finish(FrameHeader::new(FrameType::Ping))?;
///
/// let mut decoder = FrameDecoder::new(Limits::default());
/// for mut chunk in bytes.chunks(7) {
///     while !chunk.is_empty() {
///         let taken = decoder.push(chunk)?;
///         chunk = &chunk[taken..];
///         if let Some(frame) = decoder.next_frame()? {
///             assert_eq!(frame.payload, b"eight by");
///         }
///     }
/// }
/// decoder.finish()?;
/// # Ok::<(), airlift_stream::FrameError>(())
/// ```
#[derive(Debug)]
pub struct FrameDecoder {
    limits: Limits,
    buffer: Vec<u8>,
    header: Option<FrameHeader>,
    given: bool,
    failed: Option<FrameError>,
}

impl FrameDecoder {
    /// A decoder at the start of a stream.
    #[must_use]
    pub const fn new(limits: Limits) -> Self {
        Self { limits, buffer: Vec::new(), header: None, given: false, failed: None }
    }

    /// Takes bytes from the front of `bytes`, never beyond the end of the frame that they belong
    /// to, and returns how many. It is 0 only if `bytes` is empty or a complete frame waits for
    /// [`next_frame`](Self::next_frame).
    ///
    /// # Errors
    /// When the header is refused; then for ever, as the place in the stream is lost.
    pub fn push(&mut self, bytes: &[u8]) -> Result<usize, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.given {
            self.buffer.clear();
            self.header = None;
            self.given = false;
        }
        let mut taken = 0;
        if self.header.is_none() {
            taken += self.take(bytes, HEADER_LEN);
            if let Some(bytes) = self.buffer.first_chunk::<HEADER_LEN>() {
                match FrameHeader::decode(bytes, self.limits) {
                    Ok(header) => self.header = Some(header),
                    Err(error) => {
                        self.failed = Some(error.clone());
                        return Err(error);
                    }
                }
            }
        }
        if let Some(header) = self.header {
            taken += self.take(&bytes[taken..], HEADER_LEN + header.payload_len());
        }
        Ok(taken)
    }

    fn take(&mut self, bytes: &[u8], up_to: usize) -> usize {
        let count = bytes.len().min(up_to.saturating_sub(self.buffer.len()));
        // Growth by doubling may overshoot the bound; reserve_exact keeps within it.
        let bound = HEADER_LEN + self.limits.max_payload() as usize;
        let need = self.buffer.len() + count;
        if need > self.buffer.capacity() {
            let wanted = need.max(self.buffer.capacity().saturating_mul(2)).min(bound.max(need));
            self.buffer.reserve_exact(wanted - self.buffer.len());
        }
        self.buffer.extend_from_slice(&bytes[..count]);
        count
    }

    /// The frame, when it is complete; it is given once and holds until the next call of
    /// [`push`](Self::push).
    ///
    /// # Errors
    /// When the checksum is wrong or the header was refused; then for ever.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let Some(header) = self.header else { return Ok(None) };
        if self.given || self.buffer.len() < HEADER_LEN + header.payload_len() {
            return Ok(None);
        }
        let payload = &self.buffer[HEADER_LEN..];
        if let Err(error) = header.verify(payload) {
            self.failed = Some(error.clone());
            return Err(error);
        }
        self.given = true;
        Ok(Some(Frame { header, payload }))
    }

    /// To be called at the end of the stream.
    ///
    /// # Errors
    /// When it ends within a frame, or a frame was refused before.
    pub fn finish(&self) -> Result<(), FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.given || self.buffer.is_empty() {
            return Ok(());
        }
        let need = HEADER_LEN + self.header.map_or(0, |header| header.payload_len());
        Err(FrameError::Truncated { have: self.buffer.len(), need })
    }

    /// Bytes of memory that the decoder holds: at most [`HEADER_LEN`] and the limit's payload.
    #[must_use]
    pub const fn allocated(&self) -> usize {
        self.buffer.capacity()
    }
}
