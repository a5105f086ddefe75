//! A device's data from one device to another, without an engine: what a test needs when it is about the
//! devices.

use airlift_core::{
    Chunk, DeviceError, DeviceErrorKind, DeviceState, LoadSession, MigrationDevice, Piece, SaveSession,
    Session, TransitionError,
};
use airlift_stream::{
    FrameBuf, FrameError, FrameHeader, HEADER_LEN, Limits, RecordDecoder, RecordEncoder, RecordError,
    RecordEvent, RecordLimits,
};

/// What a device, or the stream between two, did not do.
#[derive(Debug)]
pub enum Failed {
    /// A change of the state.
    Transition(TransitionError),
    /// A read, a write, or anything else.
    Device(DeviceError),
    /// A record could not be written or read.
    Record(RecordError),
    /// A frame could not be made or read.
    Frame(FrameError),
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Transition(error) => error.fmt(f),
            Self::Device(error) => error.fmt(f),
            Self::Record(error) => error.fmt(f),
            Self::Frame(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Failed {}

macro_rules! from {
    ($($error:ty => $name:ident),*) => {
        $(impl From<$error> for Failed {
            fn from(error: $error) -> Self {
                Self::$name(error)
            }
        })*
    };
}
from!(TransitionError => Transition, DeviceError => Device, RecordError => Record, FrameError => Frame);

fn misuse(message: &str) -> Failed {
    Failed::Device(DeviceError::new(DeviceErrorKind::Misuse, "move a device's data", message))
}

fn opened_save(session: Option<Session>) -> Result<Box<dyn SaveSession>, Failed> {
    match session {
        Some(Session::Save(session)) => Ok(session),
        _ => Err(misuse("no save session was opened")),
    }
}

fn opened_load(session: Option<Session>) -> Result<Box<dyn LoadSession>, Failed> {
    match session {
        Some(Session::Load(session)) => Ok(session),
        _ => Err(misuse("no load session was opened")),
    }
}

/// Reads all that a running device has, in pieces of at most `buffer` bytes, and leaves it in STOP: with
/// `precopy` as long as it has something in PRE_COPY, then in STOP_COPY. `piece` is called for each.
fn read_all(
    device: &mut dyn MigrationDevice,
    precopy: bool,
    buffer: &mut [u8],
    mut piece: impl FnMut(&[u8], Chunk) -> Result<(), Failed>,
) -> Result<(), Failed> {
    let first = if precopy { DeviceState::PreCopy } else { DeviceState::StopCopy };
    let mut session = opened_save(device.set_state(first)?)?;
    let mut stopped = !precopy;
    loop {
        match session.read(buffer)? {
            Piece::Data { len, chunk } => piece(buffer.get(..len).unwrap_or_default(), chunk)?,
            Piece::End => break,
            Piece::Drained if stopped => return Err(misuse("a pause after the stop")),
            Piece::Drained => {
                device.set_state(DeviceState::StopCopy)?;
                stopped = true;
            }
        }
    }
    device.set_state(DeviceState::Stop)?;
    Ok(())
}

/// All transactions of a running device; it is in STOP afterwards. `buffer`: bytes that are read at a
/// time, above 0.
///
/// # Errors
/// When the device fails, or says something of a transaction that does not follow what it said before.
pub fn save(device: &mut dyn MigrationDevice, precopy: bool, buffer: usize) -> Result<Vec<Vec<u8>>, Failed> {
    let mut chunks: Vec<Vec<u8>> = Vec::new();
    let mut left = 0;
    let mut room = vec![0; buffer];
    read_all(device, precopy, &mut room, |bytes, chunk| {
        let Chunk::Part { of, offset } = chunk else { return Err(misuse("data of a stream")) };
        if offset == 0 && left == 0 {
            left = of;
            chunks.push(Vec::new());
        }
        let open = chunks
            .last_mut()
            .filter(|open| open.len() as u64 == offset && offset + left == of && bytes.len() as u64 <= left);
        open.ok_or_else(|| misuse("parts of a transaction do not follow each other"))?.extend(bytes);
        left -= bytes.len() as u64;
        Ok(())
    })?;
    if left > 0 {
        return Err(misuse("the end came in the middle of a transaction"));
    }
    Ok(chunks)
}

/// Loads transactions into a running device, `piece` bytes at a time (above 0), and runs it.
///
/// # Errors
/// When the device fails, or does not take what was loaded.
pub fn load(device: &mut dyn MigrationDevice, chunks: &[Vec<u8>], piece: usize) -> Result<(), Failed> {
    let mut session = opened_load(device.set_state(DeviceState::Resuming)?)?;
    for chunk in chunks {
        session.begin_chunk(chunk.len() as u64)?;
        for part in chunk.chunks(piece) {
            session.write(part)?;
        }
        session.end_chunk()?;
    }
    drop(session);
    device.set_state(DeviceState::Running)?;
    Ok(())
}

/// From one running device to another as the wire has it: DATA records in frames with a body of `body`
/// bytes, above 0. The source is in STOP afterwards, the destination runs. Gives the digests of the stream
/// on both sides.
///
/// # Errors
/// When a device fails, or the stream is not what it should be.
pub fn through_records(
    source: &mut dyn MigrationDevice,
    destination: &mut dyn MigrationDevice,
    precopy: bool,
    body: usize,
) -> Result<(u64, u64), Failed> {
    let mut encoder = RecordEncoder::new(0);
    let mut incoming = Incoming {
        decoder: RecordDecoder::new(0, RecordLimits::default()),
        session: opened_load(destination.set_state(DeviceState::Resuming)?)?,
    };
    let mut frame = FrameBuf::new(body);
    encoder.setup(&mut frame)?;
    incoming.take(&frame)?;
    let mut room = vec![0; body];
    read_all(source, precopy, &mut room, |bytes, chunk| {
        let payload = frame.payload_mut().get_mut(..bytes.len());
        payload.ok_or_else(|| misuse("a piece is larger than a frame"))?.copy_from_slice(bytes);
        encoder.data(&mut frame, bytes.len(), chunk)?;
        incoming.take(&frame)
    })?;
    encoder.end(&mut frame)?;
    incoming.take(&frame)?;
    let there = incoming.decoder.finish()?.digest();
    drop(incoming);
    destination.set_state(DeviceState::Running)?;
    Ok((encoder.totals().digest(), there))
}

/// The receiving end of the wire.
struct Incoming {
    decoder: RecordDecoder,
    session: Box<dyn LoadSession>,
}

impl Incoming {
    fn take(&mut self, frame: &FrameBuf) -> Result<(), Failed> {
        let bytes = frame.sealed().ok_or_else(|| misuse("a frame that was not finished"))?;
        let head = bytes.first_chunk::<HEADER_LEN>().ok_or_else(|| misuse("a frame without a header"))?;
        let header = FrameHeader::decode(head, Limits::default())?;
        let mut records = self.decoder.frame(&header, bytes.get(HEADER_LEN..).unwrap_or_default())?;
        while let Some(event) = records.next_event()? {
            match event {
                RecordEvent::Data { total } => self.session.begin_chunk(total)?,
                RecordEvent::Bytes(bytes) => self.session.write(bytes)?,
                RecordEvent::DataEnd => self.session.end_chunk()?,
                _ => {}
            }
        }
        Ok(())
    }
}
