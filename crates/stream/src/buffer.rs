//! A reusable buffer for one frame, laid out so that a device or guest memory is read straight to
//! where it is sent from.
//!
//! ```text
//!  0        40            56
//!  +---------+------------+------------------------------+
//!  | header  |  prefix    |  body: capacity bytes        |
//!  +---------+------------+------------------------------+
//!            ^ up to 16 bytes: a record's tag and size, the address of a run of pages
//! ```
//! The prefix ends where the body starts and the header ends where the prefix starts, so that the
//! frame is one contiguous piece for one `write(2)`.

use crate::frame::{FrameError, FrameHeader, HEADER_LEN, MAX_PAYLOAD};

/// The longest prefix in bytes: tag and size of a DATA record.
pub const PREFIX_LEN: usize = 16;

/// The longest body in bytes: with the longest prefix and a tag behind it, it is still a legal payload.
pub const MAX_BODY: usize = MAX_PAYLOAD as usize - PREFIX_LEN - TAIL_LEN;

/// Bytes behind the body's capacity that are kept for a closing tag.
pub(crate) const TAIL_LEN: usize = 8;

const BODY_AT: usize = HEADER_LEN + PREFIX_LEN;

/// A buffer for one frame. Allocated once; never grows.
#[derive(Clone)]
pub struct FrameBuf {
    // Header, prefix, body and tail; all of it initialised once.
    bytes: Vec<u8>,
    prefix: usize,
    len: usize,
    sealed: bool,
}

impl FrameBuf {
    /// A buffer whose body takes `capacity` bytes, and at most [`MAX_BODY`].
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.min(MAX_BODY);
        // Not zero: zeroed memory would be mapped page by page while the guest is stopped.
        Self { bytes: vec![0xff; BODY_AT + capacity + TAIL_LEN], prefix: 0, len: 0, sealed: false }
    }

    /// Bytes that the body takes.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.bytes.len() - BODY_AT - TAIL_LEN
    }

    /// Makes it empty. Its memory stays.
    pub const fn clear(&mut self) {
        self.prefix = 0;
        self.len = 0;
        self.sealed = false;
    }

    /// The whole body, to be read into. What was there before is still there; say with
    /// [`set_len`](Self::set_len) or to the encoder how much of it counts.
    #[must_use]
    pub fn payload_mut(&mut self) -> &mut [u8] {
        self.sealed = false;
        let end = self.bytes.len() - TAIL_LEN;
        &mut self.bytes[BODY_AT..end]
    }

    /// The first `len` bytes of the body count.
    ///
    /// # Errors
    /// When that is more than its capacity.
    pub const fn set_len(&mut self, len: usize) -> Result<(), FrameError> {
        if len > self.capacity() {
            return Err(FrameError::Overflow { length: len, capacity: self.capacity() });
        }
        self.sealed = false;
        self.len = len;
        Ok(())
    }

    /// Adds bytes behind those that count.
    ///
    /// # Errors
    /// When they do not fit; nothing is added then.
    pub fn append(&mut self, more: &[u8]) -> Result<(), FrameError> {
        let len = self.len.saturating_add(more.len());
        if len > self.capacity() {
            return Err(FrameError::Overflow { length: len, capacity: self.capacity() });
        }
        self.put(more);
        Ok(())
    }

    /// Adds a closing tag; there is always room for one.
    pub(crate) fn append_tail(&mut self, tag: [u8; TAIL_LEN]) {
        self.put(&tag);
    }

    fn put(&mut self, more: &[u8]) {
        let at = BODY_AT + self.len;
        self.bytes[at..at + more.len()].copy_from_slice(more);
        self.len += more.len();
        self.sealed = false;
    }

    /// Puts `N` bytes, at most [`PREFIX_LEN`], before the body.
    pub(crate) fn set_prefix<const N: usize>(&mut self, prefix: [u8; N]) {
        const { assert!(N <= PREFIX_LEN) }
        self.bytes[BODY_AT - N..BODY_AT].copy_from_slice(&prefix);
        self.prefix = N;
        self.sealed = false;
    }

    /// The payload as it is now: the prefix, then the bytes of the body that count.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.bytes[BODY_AT - self.prefix..BODY_AT + self.len]
    }

    /// Writes the header before the payload, with length and checksum, and gives the whole frame.
    ///
    /// # Errors
    /// Does not happen with a buffer of this type, whose capacity is bounded.
    pub fn finish(&mut self, mut header: FrameHeader) -> Result<&[u8], FrameError> {
        header.seal(self.payload())?;
        let start = BODY_AT - self.prefix - HEADER_LEN;
        self.bytes[start..start + HEADER_LEN].copy_from_slice(&header.encode());
        self.sealed = true;
        Ok(&self.bytes[start..BODY_AT + self.len])
    }

    /// The whole frame, once [`finish`](Self::finish) was called and nothing was changed since.
    #[must_use]
    pub fn sealed(&self) -> Option<&[u8]> {
        let start = BODY_AT - self.prefix - HEADER_LEN;
        self.sealed.then(|| &self.bytes[start..BODY_AT + self.len])
    }
}

impl std::fmt::Debug for FrameBuf {
    // Device state is never printed.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameBuf")
            .field("capacity", &self.capacity())
            .field("prefix", &self.prefix)
            .field("len", &self.len)
            .field("sealed", &self.sealed)
            .finish()
    }
}
