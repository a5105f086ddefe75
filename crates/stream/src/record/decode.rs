//! Reads a device's stream, frame by frame, without copying or holding more than one tag and size.

use super::{Place, RecordError, StreamTotals, Tag};
use crate::frame::{FrameFlags, FrameHeader, FrameType};

/// What a decoder accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLimits {
    /// The largest DATA record in bytes. Nothing is allocated from a size; this refuses nonsense early.
    pub max_data: u64,
}

impl Default for RecordLimits {
    /// 1 TiB.
    fn default() -> Self {
        Self { max_data: 1 << 40 }
    }
}

/// What comes out of a device's stream, in order. Bytes are those of the frame, not a copy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum RecordEvent<'a> {
    /// The stream begins.
    Setup,
    /// A DATA record begins: for a v1 device, a transaction of this size.
    Data {
        /// Bytes of the whole record; above 0.
        total: u64,
    },
    /// The next bytes of the DATA record; never empty.
    Bytes(&'a [u8]),
    /// The DATA record is complete.
    DataEnd,
    /// A generation of initial data is complete (W-INIT).
    InitDataSent {
        /// Its number, from 1.
        generation: u32,
    },
    /// Everything that the configuration needs has been sent.
    ConfigLoadReady,
    /// The device's configuration. [`End`](Self::End) follows.
    Config(&'a [u8]),
    /// The stream is complete.
    End,
}

impl std::fmt::Debug for RecordEvent<'_> {
    // Device state is never printed.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Setup => f.write_str("Setup"),
            Self::Data { total } => write!(f, "Data({total} bytes)"),
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
            Self::DataEnd => f.write_str("DataEnd"),
            Self::InitDataSent { generation } => write!(f, "InitDataSent({generation})"),
            Self::ConfigLoadReady => f.write_str("ConfigLoadReady"),
            Self::Config(bytes) => write!(f, "Config({} bytes)", bytes.len()),
            Self::End => f.write_str("End"),
        }
    }
}

/// Reads the stream of one device: frames in sequence order go in, events come out. Its memory is
/// fixed. After an error every call gives that error again.
#[derive(Clone, Debug)]
pub struct RecordDecoder {
    device: u32,
    limits: RecordLimits,
    place: Place,
    // Bytes of the DATA record that are still to come. 0 in Place::Data: DataEnd is due.
    left: u64,
    // A tag, and the size behind it, that may be cut by the end of a frame.
    head: [u8; 16],
    head_len: usize,
    unread: bool,
    failed: Option<RecordError>,
    totals: StreamTotals,
}

impl RecordDecoder {
    /// A decoder at the start of the stream of the device at this position in HELLO.
    #[must_use]
    pub fn new(device: u32, limits: RecordLimits) -> Self {
        Self {
            device,
            limits,
            place: Place::Start,
            left: 0,
            head: [0; 16],
            head_len: 0,
            unread: false,
            failed: None,
            totals: StreamTotals::default(),
        }
    }

    /// Takes the device's next frame, whose checksum has been verified. All its events must be read
    /// before the next frame is given.
    ///
    /// # Errors
    /// When the frame is not this device's next (W-SEQUENCE), is empty, or comes after the end.
    pub fn frame<'d, 'p>(
        &'d mut self,
        header: &FrameHeader,
        payload: &'p [u8],
    ) -> Result<FrameRecords<'d, 'p>, RecordError> {
        let checked = self.check(header, payload);
        self.keep(checked)?;
        self.unread = true;
        let config = header.flags.contains(FrameFlags::CONFIG);
        Ok(FrameRecords { decoder: self, rest: payload, config, end: false })
    }

    fn check(&mut self, header: &FrameHeader, payload: &[u8]) -> Result<(), RecordError> {
        if self.unread {
            return Err(RecordError::Unread);
        }
        if header.kind != FrameType::Device || header.index != self.device {
            return Err(RecordError::WrongFrame { device: self.device });
        }
        if header.sequence != self.totals.frames {
            return Err(RecordError::Sequence { expected: self.totals.frames, found: header.sequence });
        }
        if self.place == Place::Ended {
            return Err(RecordError::AfterEnd);
        }
        if payload.is_empty() {
            return Err(RecordError::EmptyFrame);
        }
        self.totals.count(payload)
    }

    /// To be called when the device's TRAILER or the end of the file has come.
    ///
    /// # Errors
    /// When the stream is not complete, or was refused before.
    pub fn finish(&self) -> Result<&StreamTotals, RecordError> {
        match &self.failed {
            Some(error) => Err(error.clone()),
            None if self.unread => Err(RecordError::Unread),
            None if self.place == Place::Ended => Ok(&self.totals),
            None => Err(RecordError::Truncated { place: self.place }),
        }
    }

    /// What has been read so far, the frame at hand included.
    #[must_use]
    pub const fn totals(&self) -> &StreamTotals {
        &self.totals
    }

    /// Where the stream is.
    #[must_use]
    pub const fn place(&self) -> Place {
        self.place
    }

    fn keep<T>(&mut self, result: Result<T, RecordError>) -> Result<T, RecordError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if let Err(error) = &result {
            self.failed = Some(error.clone());
        }
        result
    }

    /// Moves bytes from `rest` to the head until that holds `len`; `false` if they do not suffice.
    fn fill(&mut self, rest: &mut &[u8], len: usize) -> bool {
        let count = rest.len().min(len.saturating_sub(self.head_len));
        let (now, later) = rest.split_at(count);
        self.head[self.head_len..self.head_len + count].copy_from_slice(now);
        self.head_len += count;
        *rest = later;
        self.head_len >= len
    }

    fn head_word(&self, at: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.head[at..at + 8]);
        u64::from_be_bytes(word)
    }

    fn next_event<'p>(&mut self, rest: &mut &'p [u8]) -> Result<Option<RecordEvent<'p>>, RecordError> {
        if self.place == Place::Data {
            if self.left == 0 {
                self.place = Place::Records;
                return Ok(Some(RecordEvent::DataEnd));
            }
            let count = usize::try_from(self.left).map_or(rest.len(), |left| left.min(rest.len()));
            if count == 0 {
                return Ok(None);
            }
            let (now, later) = rest.split_at(count);
            *rest = later;
            self.left -= count as u64;
            return Ok(Some(RecordEvent::Bytes(now)));
        }
        if !self.fill(rest, 8) {
            return Ok(None);
        }
        let raw = self.head_word(0);
        let tag = Tag::from_raw(raw).ok_or(RecordError::UnknownTag { raw })?;
        let place = self.place.after(tag)?;
        let event = match tag {
            Tag::Setup => RecordEvent::Setup,
            Tag::InitDataSent => RecordEvent::InitDataSent { generation: self.totals.next_generation()? },
            Tag::ConfigLoadReady => RecordEvent::ConfigLoadReady,
            Tag::End => RecordEvent::End,
            Tag::Config => return Err(RecordError::ConfigFrame),
            Tag::Data => {
                if !self.fill(rest, 16) {
                    return Ok(None);
                }
                let size = self.head_word(8);
                if size == 0 || size > self.limits.max_data {
                    return Err(RecordError::DataSize { size, limit: self.limits.max_data });
                }
                self.left = size;
                RecordEvent::Data { total: size }
            }
        };
        self.head_len = 0;
        self.place = place;
        if place == Place::Ended && !rest.is_empty() {
            return Err(RecordError::AfterEnd);
        }
        Ok(Some(event))
    }

    /// The content of a frame that is one CONFIG record (W-CONFIG-FRAME).
    fn config<'p>(&mut self, payload: &'p [u8]) -> Result<&'p [u8], RecordError> {
        self.place.after(Tag::Config)?;
        if self.head_len != 0 {
            return Err(RecordError::ConfigFrame);
        }
        let config = payload
            .strip_prefix(&Tag::Config.bytes())
            .and_then(|rest| rest.strip_suffix(&Tag::End.bytes()))
            .ok_or(RecordError::ConfigFrame)?;
        self.place = Place::Ended;
        Ok(config)
    }
}

/// The events of one frame.
#[derive(Debug)]
pub struct FrameRecords<'d, 'p> {
    decoder: &'d mut RecordDecoder,
    rest: &'p [u8],
    config: bool,
    // A CONFIG record was given, and the END behind it is due.
    end: bool,
}

impl<'p> FrameRecords<'_, 'p> {
    /// The next event, or `None` when the frame is read to its end.
    ///
    /// # Errors
    /// When the stream breaks a rule. The decoder keeps the error.
    pub fn next_event(&mut self) -> Result<Option<RecordEvent<'p>>, RecordError> {
        let event = self.step();
        let event = self.decoder.keep(event)?;
        if event.is_none() {
            self.decoder.unread = false;
        }
        Ok(event)
    }

    fn step(&mut self) -> Result<Option<RecordEvent<'p>>, RecordError> {
        if self.config {
            self.config = false;
            self.end = true;
            return self.decoder.config(std::mem::take(&mut self.rest)).map(RecordEvent::Config).map(Some);
        }
        if self.end {
            self.end = false;
            return Ok(Some(RecordEvent::End));
        }
        if self.rest.is_empty() && !self.decoder.event_due() {
            return Ok(None);
        }
        self.decoder.next_event(&mut self.rest)
    }
}

impl RecordDecoder {
    const fn event_due(&self) -> bool {
        matches!(self.place, Place::Data) && self.left == 0
    }
}
