//! The source's half of a device's data: device -> records -> frames -> sink.
//!
//! In pre-copy the worker goes on by itself, one step at a time between the calls it gets; after the
//! stop one call drains the device to its end. No data is copied between the device's read and the
//! sink: the device reads into the frame.
//!
//! A transaction of a v1 device is one DATA record over as many frames as it needs (V1-CHUNK). In the
//! middle of one no other record is written, and the device's state is not changed (V1-OUTSTANDING).

use super::held::{Idle, Saving};
use super::recorder::Recorder;
use super::sink::{ChunkSink, SinkClosed, StreamFault};
use super::trace;
use crate::control::DeviceGauges;
use crate::meter::Meter;
use airlift_core::{
    Chunk, DeviceError, DeviceErrorKind, DeviceId, DeviceState, Interface, MigrationDevice, Piece,
    PrecopyInfo, Timestamp,
};
use airlift_stream::record::Place;
use airlift_stream::{FrameBuf, RecordEncoder, StreamTotals};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Read at once while the guest runs: its own accesses to the device wait behind a read.
const PRECOPY_READ: usize = 256 << 10;

/// How long a device that had nothing is left alone. A poll of the data fd cannot replace it: most
/// drivers do not implement one (V2-ENOMSG, V2-POLL).
const DRAINED_WAIT: Duration = Duration::from_millis(10);

/// How often a device that always has data is asked what it has left.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How long a worker waits for room before it looks for calls.
const ROOM_WAIT: Duration = Duration::from_millis(2);

/// How long the last data waits for room at a time; between waits the way's end is noticed.
const DRAIN_WAIT: Duration = Duration::from_millis(100);

/// What is known of a device that is being saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SaveStatus {
    /// Initial bytes left; `None` when the device cannot say.
    pub initial_left: Option<u64>,
    /// Dirty bytes left; `None` when the device cannot say.
    pub dirty_left: Option<u64>,
    /// What STOP_COPY would give, as the device estimates it.
    pub stop_copy_size: Option<u64>,
    /// Initial bytes as announced when saving began.
    pub initial_bytes: u64,
    /// Bytes of device data sent in PRE_COPY.
    pub precopy_bytes: u64,
    /// Bytes of device data sent in STOP_COPY.
    pub stop_copy_bytes: u64,
    /// Generations of initial data that the device has announced.
    pub generation: u32,
    /// The newest generation whose end was sent; the other side acknowledges it.
    pub sent_generation: u32,
    /// The device had nothing at the last look.
    pub drained: bool,
    /// A transaction was begun in PRE_COPY and not sent to its end.
    pub mid_transaction: bool,
    /// Bytes a second that the device gives in PRE_COPY, by the time that its reads take; `None` before
    /// they have taken 50 ms.
    pub read_rate: Option<u64>,
}

impl SaveStatus {
    /// Bytes that a stop now would leave to move, by what the device says (V2-ESTIMATE).
    #[must_use]
    pub fn bytes_left(&self) -> u64 {
        let precopy = self.initial_left.unwrap_or(0).saturating_add(self.dirty_left.unwrap_or(0));
        // A stop-copy estimate of some drivers counts what pre-copy has given; what is left in
        // pre-copy is the better one where the device says it and gives initial data at all.
        match (self.stop_copy_size, self.initial_left) {
            (Some(size), None) => size,
            (Some(size), Some(_)) => size.max(precopy),
            (None, _) => precopy,
        }
    }
}

/// A device's data in STOP_COPY.
#[derive(Default)]
enum Stopped {
    /// The device is not there yet.
    #[default]
    No,
    /// It is being read.
    Reading,
    /// All of it was read.
    Ended,
    /// It cannot be read to its end; whoever asks for the end is told.
    Failed(StreamFault),
}

/// One device's stream on its way out.
pub(super) struct SaveStream {
    index: u32,
    device: DeviceId,
    /// The device gives transactions, not a stream that may be cut anywhere.
    transactions: bool,
    sink: Arc<dyn ChunkSink>,
    encoder: RecordEncoder,
    // Taken from the sink and not used yet: its room stays taken.
    spare: Option<FrameBuf>,
    streaming: bool,
    /// No further transaction is begun in PRE_COPY.
    settling: bool,
    /// How far STOP_COPY is.
    stopped: Stopped,
    reinit_pending: bool,
    looked: Timestamp,
    /// The device's reads in PRE_COPY.
    reads: Meter,
    status: Arc<Mutex<SaveStatus>>,
    gauges: Arc<crate::control::Gauges>,
}

/// What a worker does next when nobody asks anything.
pub(super) enum Step {
    /// There is more to do at once.
    Again,
    /// Nothing for so long.
    Wait(Duration),
    /// Nothing until a call.
    Parked,
}

/// A device with the stream it is saved into.
pub(super) struct Outgoing {
    pub(super) saving: Saving,
    pub(super) stream: SaveStream,
}

impl SaveStream {
    pub(super) fn new(
        index: u32,
        device: &dyn MigrationDevice,
        sink: Arc<dyn ChunkSink>,
        status: Arc<Mutex<SaveStatus>>,
        gauges: Arc<crate::control::Gauges>,
    ) -> Self {
        Self {
            index,
            device: device.id().clone(),
            transactions: device.capabilities().interface == Interface::V1,
            sink,
            encoder: RecordEncoder::new(index),
            spare: None,
            streaming: false,
            settling: false,
            stopped: Stopped::No,
            reinit_pending: false,
            looked: Timestamp::default(),
            reads: Meter::default(),
            status,
            gauges,
        }
    }

    fn update(&self, change: impl FnOnce(&mut SaveStatus)) {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut status);
        if let Some(gauge) = self.gauge() {
            gauge.bytes.store(status.precopy_bytes + status.stop_copy_bytes, Ordering::Relaxed);
            gauge.initial.store(status.initial_left.unwrap_or(0), Ordering::Relaxed);
            gauge.dirty.store(status.dirty_left.unwrap_or(0), Ordering::Relaxed);
        }
    }

    fn gauge(&self) -> Option<&DeviceGauges> {
        self.gauges.devices.get(usize::try_from(self.index).ok()?)
    }

    fn buffer(&mut self, wait: Duration) -> Result<Option<FrameBuf>, SinkClosed> {
        match self.spare.take() {
            Some(buffer) => Ok(Some(buffer)),
            None => self.sink.buffer(self.index, wait),
        }
    }

    /// A buffer, however long it takes: the way's closing ends the wait.
    fn buffer_surely(&mut self) -> Result<FrameBuf, SinkClosed> {
        loop {
            if let Some(mut buffer) = self.buffer(DRAIN_WAIT)? {
                buffer.clear();
                return Ok(buffer);
            }
        }
    }

    pub(super) fn setup(&mut self) -> Result<(), StreamFault> {
        let mut buffer = self.buffer_surely()?;
        self.encoder.setup(&mut buffer)?;
        Ok(self.sink.send(self.index, buffer)?)
    }

    /// Sends what the device has given into `buffer`.
    fn send(&mut self, mut buffer: FrameBuf, len: usize, chunk: Chunk) -> Result<(), StreamFault> {
        self.encoder.data(&mut buffer, len, chunk)?;
        self.sink.send(self.index, buffer)?;
        if chunk == Chunk::Stream {
            trace::save_buffer(&self.device, len);
        }
        Ok(())
    }

    /// A transaction was begun and not sent to its end.
    fn is_mid_transaction(&self) -> bool {
        self.encoder.place() == Place::Data
    }

    /// The device has nothing more, which it may not say in the middle of a transaction (V1-CHUNK).
    fn check_whole(&self) -> Result<(), StreamFault> {
        if !self.is_mid_transaction() {
            return Ok(());
        }
        let message = "the device has nothing more in the middle of a transaction (V1-CHUNK)";
        Err(StreamFault::Device(DeviceError::new(
            DeviceErrorKind::Protocol,
            "read of a transaction",
            message,
        )))
    }

    /// A piece of `len` bytes was sent in PRE_COPY. Between two looks at the device the counts are
    /// carried on.
    fn count_precopy(&self, len: u64) {
        let (mid_transaction, read_rate) = (self.is_mid_transaction(), self.reads.rate());
        let mut left = [0; 2];
        self.update(|status| {
            status.precopy_bytes += len;
            status.drained = false;
            status.mid_transaction = mid_transaction;
            status.read_rate = read_rate;
            let initial = status.initial_left.unwrap_or(0);
            status.initial_left = status.initial_left.map(|left| left.saturating_sub(len));
            let rest = len.saturating_sub(initial);
            status.dirty_left = status.dirty_left.map(|left| left.saturating_sub(rest));
            left = [status.initial_left, status.dirty_left].map(Option::unwrap_or_default);
        });
        trace::save_iterate(&self.device, len, left[0], left[1]);
    }
}

impl Drop for SaveStream {
    fn drop(&mut self) {
        trace::save_cleanup(&self.device);
    }
}

impl Outgoing {
    /// Opens the session of a device that enters PRE_COPY; it streams by itself from now on.
    pub(super) fn begin(
        idle: Idle,
        stream: SaveStream,
        recorder: &Recorder,
    ) -> Result<Self, Box<(Idle, StreamFault)>> {
        let saving = idle
            .save(DeviceState::PreCopy, recorder)
            .map_err(|refused| Box::new((refused.0, StreamFault::Transition(Box::new(refused.1)))))?;
        let mut outgoing = Self { saving, stream };
        outgoing.stream.update(|status| status.generation = 1);
        // A device without initial data has given all of it, whatever it gives next.
        match outgoing.stream.setup().and_then(|()| outgoing.look(recorder.now(), false)) {
            Ok(info) => {
                let initial = info.map_or(0, |i| i.initial_bytes);
                outgoing.stream.update(|status| status.initial_bytes = initial);
                outgoing.stream.streaming = true;
                Ok(outgoing)
            }
            Err(fault) => Err(Box::new((outgoing.saving.close(), fault))),
        }
    }

    /// Opens the session of a device that has no PRE_COPY, at the stop.
    pub(super) fn begin_stopped(
        idle: Idle,
        mut stream: SaveStream,
        recorder: &Recorder,
    ) -> Result<Self, Box<(Idle, StreamFault)>> {
        // Room is taken before the arc: what can wait for the other side does not wait in between.
        if let Err(fault) = stream.setup() {
            return Err(Box::new((idle, fault)));
        }
        match idle.save(DeviceState::StopCopy, recorder) {
            Ok(saving) => {
                stream.stopped = Stopped::Reading;
                Ok(Self { saving, stream })
            }
            Err(refused) => Err(Box::new((refused.0, StreamFault::Transition(Box::new(refused.1))))),
        }
    }

    /// One step of what is done between calls: pre-copy, and STOP_COPY as soon as the device is there,
    /// while others save the machine's records.
    pub(super) fn step(&mut self, now: Timestamp) -> Result<Step, StreamFault> {
        if matches!(self.stream.stopped, Stopped::Reading) {
            return match self.read_stopped(ROOM_WAIT) {
                Ok(()) => Ok(Step::Again),
                // Told at once, and again to whoever asks for the end.
                Err(fault) => {
                    self.stream.stopped = Stopped::Failed(fault.clone());
                    Err(fault)
                }
            };
        }
        let settled = self.stream.settling && self.stream.transactions && !self.stream.is_mid_transaction();
        if !self.stream.streaming || settled {
            return Ok(Step::Parked);
        }
        let Some(buffer) = self.stream.buffer(ROOM_WAIT)? else {
            return Ok(Step::Again);
        };
        if self.read_running(buffer)? {
            // A device that always has something is looked at too: its initial data may be complete.
            let due = now.since(self.stream.looked) >= LOOK_EVERY;
            if due && !self.stream.is_mid_transaction() {
                self.look(now, false)?;
            }
            return Ok(Step::Again);
        }
        let info = self.look(now, true)?;
        // What v1 says is pending may come to nothing (V1-HOLLOW): it is not asked again at once.
        let more = info.is_some_and(|i| i.initial_bytes > 0 || i.dirty_bytes > 0);
        Ok(if more && !self.stream.transactions { Step::Again } else { Step::Wait(DRAINED_WAIT) })
    }

    /// Reads the next piece in PRE_COPY and sends it. `false`: the device has nothing now.
    fn read_running(&mut self, mut buffer: FrameBuf) -> Result<bool, StreamFault> {
        buffer.clear();
        let limit = PRECOPY_READ.min(buffer.capacity());
        let begun = Instant::now();
        match self.saving.session.read(&mut buffer.payload_mut()[..limit])? {
            Piece::Data { len, chunk } => {
                self.stream.reads.add(len as u64, begun.elapsed());
                self.stream.send(buffer, len, chunk)?;
                self.stream.count_precopy(len as u64);
                Ok(true)
            }
            // A server that ends pre-copy early has nothing now; the end belongs to STOP_COPY.
            Piece::Drained | Piece::End => {
                self.stream.spare = Some(buffer);
                self.stream.check_whole()?;
                Ok(false)
            }
        }
    }

    /// Begins no further transaction; the one that is under way goes on to its end.
    pub(super) const fn settle(&mut self) {
        self.stream.settling = true;
    }

    /// Reads and sends what is left of the transaction that is under way, within `patience`: the state
    /// must not be changed before (V1-OUTSTANDING).
    fn finish_transaction(&mut self, patience: Duration) -> Result<(), StreamFault> {
        let until = Instant::now() + patience;
        let mut room = true;
        while self.stream.is_mid_transaction() {
            if Instant::now() >= until {
                let who = if room { "the device gave" } else { "the other side took" };
                let message = format!("{who} no more of a transaction within {patience:?} (V1-OUTSTANDING)");
                let kind = DeviceErrorKind::TimedOut;
                return Err(StreamFault::Device(DeviceError::new(kind, "end of a transaction", message)));
            }
            let buffer = self.stream.buffer(DRAIN_WAIT)?;
            room = buffer.is_some();
            if let Some(buffer) = buffer {
                self.read_running(buffer)?;
            }
        }
        Ok(())
    }

    /// Asks the device what it has left, and closes a generation of initial data that is complete. Never
    /// in the middle of a transaction, where no record may be written.
    fn look(&mut self, now: Timestamp, drained: bool) -> Result<Option<PrecopyInfo>, StreamFault> {
        self.stream.looked = now;
        let info = self.saving.session.precopy_info()?;
        let size = self.saving.device.stop_copy_size()?;
        if info.is_some_and(|i| i.reinit) && !self.stream.reinit_pending {
            self.stream.reinit_pending = true;
            self.stream.update(|status| status.generation += 1);
        }
        self.stream.update(|status| {
            status.initial_left = info.map(|i| i.initial_bytes);
            status.dirty_left = info.map(|i| i.dirty_bytes);
            status.stop_copy_size = size;
            status.drained = drained;
        });
        trace::pending_exact(&self.stream.device, info, size);
        let status = *self.stream.status.lock().unwrap_or_else(PoisonError::into_inner);
        // A device that cannot say has given its initial data when it has nothing for the first time.
        let complete = info.map_or(drained, |i| i.initial_bytes == 0);
        if complete && status.sent_generation < status.generation {
            let mut buffer = self.stream.buffer_surely()?;
            let generation = self.stream.encoder.init_data_sent(&mut buffer)?;
            self.stream.sink.send(self.stream.index, buffer)?;
            self.stream.reinit_pending = false;
            self.stream.update(|status| status.sent_generation = generation);
        }
        Ok(info)
    }

    /// To the P2P state of PRE_COPY; streaming ends, with the transaction that is under way. That may take
    /// `patience`.
    pub(super) fn quiesce_p2p(&mut self, recorder: &Recorder, patience: Duration) -> Result<(), StreamFault> {
        self.finish_transaction(patience)?;
        self.stream.streaming = false;
        self.walk(DeviceState::PreCopyP2p, recorder)
    }

    fn walk(&mut self, to: DeviceState, recorder: &Recorder) -> Result<(), StreamFault> {
        self.saving.walk(to, recorder).map_err(|error| StreamFault::Transition(Box::new(error)))
    }

    /// What pre-copy has, now that nothing streams; `true` when new initial data was announced.
    pub(super) fn late_reinit(&mut self) -> Result<bool, StreamFault> {
        let info = self.saving.session.precopy_info()?;
        Ok(info.is_some_and(|i| i.reinit) && !self.stream.reinit_pending)
    }

    /// To STOP_COPY, from where the worker reads on by itself. `true` when new initial data was announced, and
    /// no step through P2P has said so. `patience` as for [`quiesce_p2p`](Self::quiesce_p2p).
    pub(super) fn stop(&mut self, recorder: &Recorder, patience: Duration) -> Result<bool, StreamFault> {
        self.finish_transaction(patience)?;
        let asked = !std::mem::take(&mut self.stream.streaming);
        let late = !asked && self.late_reinit()?;
        self.walk(DeviceState::StopCopy, recorder)?;
        self.stream.stopped = Stopped::Reading;
        Ok(late)
    }

    /// Reads the next piece in STOP_COPY, if there is room for it within `wait`.
    fn read_stopped(&mut self, wait: Duration) -> Result<(), StreamFault> {
        let Some(mut buffer) = self.stream.buffer(wait)? else { return Ok(()) };
        buffer.clear();
        match self.saving.session.read(buffer.payload_mut())? {
            Piece::Data { len, chunk } => {
                self.stream.send(buffer, len, chunk)?;
                self.stream.update(|status| status.stop_copy_bytes += len as u64);
                Ok(())
            }
            Piece::End => {
                self.stream.spare = Some(buffer);
                self.stream.check_whole()?;
                self.stream.stopped = Stopped::Ended;
                Ok(())
            }
            Piece::Drained => Err(StreamFault::Device(DeviceError::new(
                DeviceErrorKind::Protocol,
                "read in STOP_COPY",
                "the device says that it has nothing now, which STOP_COPY does not know (V2-ENOMSG)",
            ))),
        }
    }

    /// Reads the device to its end and closes the stream, with the device's configuration if it has one.
    pub(super) fn drain(&mut self, config: Option<&[u8]>) -> Result<StreamTotals, StreamFault> {
        while matches!(self.stream.stopped, Stopped::Reading) {
            self.read_stopped(DRAIN_WAIT)?;
        }
        match std::mem::replace(&mut self.stream.stopped, Stopped::Ended) {
            Stopped::Failed(fault) => return Err(fault),
            Stopped::No => {
                let error =
                    DeviceError::new(DeviceErrorKind::Misuse, "read in STOP_COPY", "the device is not there");
                return Err(StreamFault::Device(error));
            }
            Stopped::Reading | Stopped::Ended => {}
        }
        let mut buffer = self.stream.buffer_surely()?;
        match config {
            Some(config) => {
                self.stream.encoder.config(&mut buffer, config)?;
                trace::save_config(&self.stream.device, config.len());
            }
            None => self.stream.encoder.end(&mut buffer)?,
        }
        self.stream.sink.send(self.stream.index, buffer)?;
        let status = *self.stream.status.lock().unwrap_or_else(PoisonError::into_inner);
        trace::save_complete(&self.stream.device, (status.precopy_bytes, status.stop_copy_bytes));
        Ok(*self.stream.encoder.totals())
    }

    /// Ends the session.
    pub(super) fn close(self) -> Idle {
        self.saving.close()
    }
}
