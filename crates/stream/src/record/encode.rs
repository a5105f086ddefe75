//! Writes a device's stream, one frame at a time, into a [`FrameBuf`] whose body the device has been
//! read into.

use super::{Place, RecordError, StreamTotals, Tag};
use crate::FrameBuf;
use crate::frame::{FrameFlags, FrameHeader, FrameType};
use airlift_core::Chunk;

/// Writes the stream of one device. Each method makes one frame in `buf`, complete with header and
/// checksum ([`FrameBuf::sealed`]). It takes the next sequence number, so frames may go to any
/// connection but must all be sent. After an error nothing was counted and the frame is not to be sent.
#[derive(Clone, Debug)]
pub struct RecordEncoder {
    device: u32,
    round: u32,
    place: Place,
    // Of the transaction that is open: its size and how much of it was written.
    size: u64,
    written: u64,
    totals: StreamTotals,
}

impl RecordEncoder {
    /// A stream that has not begun, of the device at this position in HELLO.
    #[must_use]
    pub fn new(device: u32) -> Self {
        Self { device, round: 0, place: Place::Start, size: 0, written: 0, totals: StreamTotals::default() }
    }

    /// Index of the device.
    #[must_use]
    pub const fn device(&self) -> u32 {
        self.device
    }

    /// The pre-copy round that the next frames are marked with. It means nothing to the order.
    pub const fn set_round(&mut self, round: u32) {
        self.round = round;
    }

    /// Begins the stream: SETUP.
    ///
    /// # Errors
    /// When it has begun before.
    pub fn setup(&mut self, buf: &mut FrameBuf) -> Result<(), RecordError> {
        self.tag(buf, Tag::Setup)
    }

    /// Makes a frame of the first `len` bytes of `buf`'s body ([`FrameBuf::payload_mut`]), which the
    /// device gave as `chunk`: a DATA record, or the next part of one (V1-CHUNK). Nothing is copied.
    ///
    /// # Errors
    /// When `len` is 0 or beyond the body, when parts of a transaction do not follow each other, or
    /// DATA may not come now.
    pub fn data(&mut self, buf: &mut FrameBuf, len: usize, chunk: Chunk) -> Result<(), RecordError> {
        let count = len as u64;
        if count == 0 {
            return Err(RecordError::EmptyFrame);
        }
        let (of, offset) = match chunk {
            Chunk::Stream => (count, 0),
            Chunk::Part { of, offset } => (of, offset),
        };
        let (size, written) = if self.place == Place::Data { (self.size, self.written) } else { (of, 0) };
        if of != size || offset != written || count > size - written {
            return Err(RecordError::Piece { offset, of, expected: written });
        }
        buf.clear();
        buf.set_len(len)?;
        let first = written == 0;
        if first {
            self.place.after(Tag::Data)?;
            let mut prefix = [0; 16];
            prefix[..8].copy_from_slice(&Tag::Data.bytes());
            prefix[8..].copy_from_slice(&size.to_be_bytes());
            buf.set_prefix(prefix);
        }
        self.seal(buf, FrameFlags::empty())?;
        self.size = size;
        self.written = written + count;
        self.place = if self.written == size { Place::Records } else { Place::Data };
        Ok(())
    }

    /// Closes a generation of initial data: INIT_DATA_SENT (W-INIT). Returns its number, from 1.
    ///
    /// # Errors
    /// When it may not come now.
    pub fn init_data_sent(&mut self, buf: &mut FrameBuf) -> Result<u32, RecordError> {
        let mut totals = self.totals;
        let generation = totals.next_generation()?;
        self.tag(buf, Tag::InitDataSent)?;
        self.totals.generation = generation;
        Ok(generation)
    }

    /// Says that everything that the device's configuration needs was sent: CONFIG_LOAD_READY.
    ///
    /// # Errors
    /// When it may not come now.
    pub fn config_load_ready(&mut self, buf: &mut FrameBuf) -> Result<(), RecordError> {
        self.tag(buf, Tag::ConfigLoadReady)
    }

    /// Ends the stream with the device's configuration (W-CONFIG-FRAME), which is copied into the buffer.
    ///
    /// # Errors
    /// When `config` does not fit into the buffer, or it may not come now.
    pub fn config(&mut self, buf: &mut FrameBuf, config: &[u8]) -> Result<(), RecordError> {
        let place = self.place.after(Tag::Config)?;
        buf.clear();
        buf.append(config)?;
        buf.append_tail(Tag::End.bytes());
        buf.set_prefix(Tag::Config.bytes());
        self.seal(buf, FrameFlags::CONFIG)?;
        self.place = place;
        Ok(())
    }

    /// Ends the stream of a device without configuration: END.
    ///
    /// # Errors
    /// When it may not come now.
    pub fn end(&mut self, buf: &mut FrameBuf) -> Result<(), RecordError> {
        self.tag(buf, Tag::End)
    }

    /// What was written so far; after the end this is what TRAILER says.
    #[must_use]
    pub const fn totals(&self) -> &StreamTotals {
        &self.totals
    }

    /// Where the stream is.
    #[must_use]
    pub const fn place(&self) -> Place {
        self.place
    }

    fn tag(&mut self, buf: &mut FrameBuf, tag: Tag) -> Result<(), RecordError> {
        let place = self.place.after(tag)?;
        buf.clear();
        buf.set_prefix(tag.bytes());
        self.seal(buf, FrameFlags::empty())?;
        self.place = place;
        Ok(())
    }

    fn seal(&mut self, buf: &mut FrameBuf, flags: FrameFlags) -> Result<(), RecordError> {
        let mut totals = self.totals;
        totals.count(buf.payload())?;
        let mut header = FrameHeader::new(FrameType::Device);
        header.flags |= flags;
        header.index = self.device;
        header.round = self.round;
        header.sequence = self.totals.frames;
        buf.finish(header)?;
        self.totals = totals;
        Ok(())
    }
}
