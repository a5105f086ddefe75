//! The destination's half of a device's data: frames -> records -> device, in sequence.
//!
//! Frames of one device may arrive over several connections. Those that are ahead wait here; how many
//! can is bounded by the room that the source was given (W-CREDIT).

use super::held::{Idle, Loading};
use super::recorder::Recorder;
use super::sink::{SetEvent, StreamFault};
use super::trace;
use crate::control::Gauges;
use crate::wire::PooledBuf;
use airlift_core::{DeviceError, DeviceErrorKind, Interface, TransitionError};
use airlift_stream::record::Tag;
use airlift_stream::{FrameHeader, RecordDecoder, RecordError, RecordEvent, RecordLimits};
use crossbeam_channel::Sender;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A DEVICE frame whose checksum was verified.
#[derive(Debug)]
pub struct InFrame {
    /// Its header.
    pub header: FrameHeader,
    /// Its payload.
    pub payload: PooledBuf,
}

/// A device with the stream it is loaded from.
pub(super) struct Incoming {
    loading: Loading,
    index: u32,
    decoder: RecordDecoder,
    next: u64,
    ahead: BTreeMap<u64, InFrame>,
    room: usize,
    ended: bool,
    events: Sender<SetEvent>,
    gauges: Arc<Gauges>,
}

impl Incoming {
    /// Opens the session. `room` frames may be on their way at a time.
    pub(super) fn begin(
        idle: Idle,
        index: u32,
        room: usize,
        events: Sender<SetEvent>,
        gauges: Arc<Gauges>,
        recorder: &Recorder,
    ) -> Result<Self, Box<(Idle, TransitionError)>> {
        let loading = idle.load(recorder)?;
        Ok(Self {
            loading,
            index,
            decoder: RecordDecoder::new(index, RecordLimits::default()),
            next: 0,
            ahead: BTreeMap::new(),
            room,
            ended: false,
            events,
            gauges,
        })
    }

    /// Takes a frame and writes it, and those that waited for it, to the device.
    pub(super) fn take(&mut self, frame: InFrame) -> Result<(), StreamFault> {
        let sequence = frame.header.sequence;
        let twice = sequence < self.next || self.ahead.contains_key(&sequence);
        if twice || self.ahead.len() >= self.room {
            return Err(StreamFault::Stream(RecordError::Sequence { expected: self.next, found: sequence }));
        }
        self.ahead.insert(sequence, frame);
        while let Some(frame) = self.ahead.remove(&self.next) {
            self.next += 1;
            self.write(&frame)?;
            drop(frame);
            // The receiver can be gone only together with the session.
            let _ = self.events.send(SetEvent::Written { device: self.index });
        }
        Ok(())
    }

    fn write(&mut self, frame: &InFrame) -> Result<(), StreamFault> {
        let device = self.index;
        let v1 = self.loading.device.capabilities().interface == Interface::V1;
        let mut written = 0;
        let mut generation = None;
        let mut records = self.decoder.frame(&frame.header, &frame.payload)?;
        while let Some(event) = records.next_event()? {
            if let Some(tag) = tag(&event) {
                trace::load_state(self.loading.device.id(), tag);
            }
            match event {
                RecordEvent::Setup | RecordEvent::ConfigLoadReady => {}
                RecordEvent::Data { total } => self.loading.session.begin_chunk(total)?,
                RecordEvent::Bytes(bytes) => {
                    self.loading.session.write(bytes)?;
                    written += bytes.len() as u64;
                }
                RecordEvent::DataEnd => self.loading.session.end_chunk()?,
                // Said once for a frame: what a peer can put into one is no measure for messages.
                RecordEvent::InitDataSent { generation: newest } => generation = Some(newest),
                RecordEvent::Config(data) => {
                    let _ = self.events.send(SetEvent::Config { device, data: data.to_vec() });
                }
                RecordEvent::End => self.ended = true,
            }
        }
        if !v1 && written > 0 {
            trace::load_data(self.loading.device.id(), written);
        }
        if let Some(gauge) = self.gauges.devices.get(usize::try_from(device).unwrap_or(usize::MAX)) {
            gauge.bytes.fetch_add(written, Ordering::Relaxed);
        }
        if let Some(generation) = generation {
            let _ = self.events.send(SetEvent::InitialData { device, generation });
        }
        if self.ended {
            let totals = *self.decoder.finish()?;
            let _ = self.events.send(SetEvent::Ended { device, totals: Box::new(totals) });
        }
        Ok(())
    }

    /// RESUMING -> STOP. Refused before the stream's end: too little data must not become a device.
    pub(super) fn finish(self, recorder: &Recorder) -> (Idle, Result<(), StreamFault>) {
        if !self.ended {
            let error = DeviceError::new(
                DeviceErrorKind::Misuse,
                "end of loading",
                "the device's stream has not ended",
            );
            return (self.abandon(), Err(StreamFault::Device(error)));
        }
        let (idle, result) = self.loading.finish(recorder);
        trace::load_cleanup(idle.device.id());
        (idle, result.map_err(|error| StreamFault::Transition(Box::new(error))))
    }

    /// Ends the session; the device must be reset.
    pub(super) fn abandon(self) -> Idle {
        let idle = self.loading.abandon();
        trace::load_cleanup(idle.device.id());
        idle
    }
}

/// The tag with which a record begins, at its beginning.
const fn tag(event: &RecordEvent<'_>) -> Option<Tag> {
    match event {
        RecordEvent::Setup => Some(Tag::Setup),
        RecordEvent::Data { .. } => Some(Tag::Data),
        RecordEvent::InitDataSent { .. } => Some(Tag::InitDataSent),
        RecordEvent::ConfigLoadReady => Some(Tag::ConfigLoadReady),
        RecordEvent::Config(_) => Some(Tag::Config),
        RecordEvent::End => Some(Tag::End),
        RecordEvent::Bytes(_) | RecordEvent::DataEnd => None,
    }
}
