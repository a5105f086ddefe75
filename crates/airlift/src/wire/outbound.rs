//! Data frames out: one sending thread for each data connection, fed by a short queue.
//!
//! Buffers are used again: whoever fills one waits until a sender has let go of one, which is what
//! bounds memory on this side. A frame that is queued is complete with header and checksum.

use super::frames::{WireError, write_all};
use crate::link::Stream;
use crate::set::SinkClosed;
use crate::spawn::{Role, SpawnError, Spawner};
use airlift_core::Gpa;
use airlift_stream::message::DataCount;
use airlift_stream::pages::lane;
use airlift_stream::{FrameBuf, HEADER_LEN, Message};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Frames that wait for one connection at most.
const QUEUE: usize = 2;

/// Buffers for each connection: those that wait, one being sent, one being filled.
const BUFFERS: usize = QUEUE + 2;

/// Says that a data connection has failed.
pub(crate) type OnLoss = Arc<dyn Fn(usize, WireError) + Send + Sync>;

enum Item {
    Frame(FrameBuf),
    Final,
}

#[derive(Debug)]
struct Lane {
    queue: Sender<Item>,
    stream: Arc<Stream>,
}

/// The data connections of a source.
#[derive(Clone)]
pub(crate) struct Outbound {
    lanes: Arc<Vec<Lane>>,
    free: Receiver<FrameBuf>,
    back: Sender<FrameBuf>,
    next: Arc<AtomicUsize>,
    sent: Arc<AtomicU64>,
    finished: Arc<AtomicUsize>,
    aborted: Arc<AtomicBool>,
}

impl std::fmt::Debug for Outbound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbound").field("lanes", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl Outbound {
    /// Starts a thread for each connection. Buffers are allocated now, `fillers` more than the
    /// connections need: one for each thread that fills some.
    pub(crate) fn new(
        streams: Vec<Stream>,
        body: usize,
        fillers: usize,
        spawner: &dyn Spawner,
        on_loss: &OnLoss,
    ) -> Result<Self, SpawnError> {
        let count = streams.len() * BUFFERS + fillers;
        let (back, free) = bounded(count);
        for _ in 0..count {
            // The channel has room for all of them.
            let _ = back.send(FrameBuf::new(body));
        }
        let sent = Arc::new(AtomicU64::new(0));
        let finished = Arc::new(AtomicUsize::new(0));
        let aborted = Arc::new(AtomicBool::new(false));
        let mut lanes = Vec::with_capacity(streams.len());
        for (index, stream) in streams.into_iter().enumerate() {
            let (queue, items) = bounded(QUEUE);
            let stream = Arc::new(stream);
            let sender = LaneSender {
                index,
                stream: Arc::clone(&stream),
                items,
                back: back.clone(),
                sent: Arc::clone(&sent),
                finished: Arc::clone(&finished),
                on_loss: Arc::clone(on_loss),
            };
            spawner.spawn(Role::Sender, &format!("send-{index}"), Box::new(move || sender.run()))?;
            lanes.push(Lane { queue, stream });
        }
        let lanes = Arc::new(lanes);
        Ok(Self { lanes, free, back, next: Arc::default(), sent, finished, aborted })
    }

    /// A buffer that nobody uses, or `None` within `wait`.
    pub(crate) fn buffer(&self, wait: Duration) -> Result<Option<FrameBuf>, SinkClosed> {
        if self.aborted.load(Ordering::Acquire) {
            return Err(SinkClosed);
        }
        Ok(self.free.recv_timeout(wait).ok())
    }

    /// Gives an unused buffer back.
    pub(crate) fn give_back(&self, mut buffer: FrameBuf) {
        buffer.clear();
        // The channel has room for every buffer there is.
        let _ = self.back.try_send(buffer);
    }

    /// Sends over the connection that its block of memory belongs to (W-MEMORY-LANE).
    pub(crate) fn send_memory(&self, at: Gpa, frame: FrameBuf) -> Result<(), SinkClosed> {
        let index = self.lane_of(at);
        self.put(index, Item::Frame(frame))
    }

    /// The connection of the block around `at`.
    pub(crate) fn lane_of(&self, at: Gpa) -> usize {
        let lanes = u32::try_from(self.lanes.len()).ok().and_then(NonZeroU32::new);
        let index = lanes.map_or(0, |lanes| lane(at, lanes));
        usize::try_from(index).unwrap_or(0)
    }

    pub(crate) fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// Sends over the connection with the shortest queue.
    pub(crate) fn send_anywhere(&self, frame: FrameBuf) -> Result<(), SinkClosed> {
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let count = self.lanes.len().max(1);
        let best = (0..count)
            .map(|i| (start + i) % count)
            .min_by_key(|i| self.lanes.get(*i).map_or(usize::MAX, |l| l.queue.len()));
        self.put(best.unwrap_or(0), Item::Frame(frame))
    }

    fn put(&self, index: usize, item: Item) -> Result<(), SinkClosed> {
        if self.aborted.load(Ordering::Acquire) {
            return Err(SinkClosed);
        }
        let lane = self.lanes.get(index).ok_or(SinkClosed)?;
        lane.queue.send(item).map_err(|_| SinkClosed)
    }

    /// Bytes given to the connections so far.
    pub(crate) fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Closes every connection with its FINAL, behind what is queued. All data must have been given.
    pub(crate) fn finish(&self) -> Result<(), SinkClosed> {
        (0..self.lanes.len()).try_for_each(|index| self.put(index, Item::Final))
    }

    /// Every FINAL has been given to its connection.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire) == self.lanes.len()
    }

    /// Ends all connections at once; what is queued is lost.
    pub(crate) fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        for lane in self.lanes.iter() {
            lane.stream.shutdown();
        }
    }
}

struct LaneSender {
    index: usize,
    stream: Arc<Stream>,
    items: Receiver<Item>,
    back: Sender<FrameBuf>,
    sent: Arc<AtomicU64>,
    finished: Arc<AtomicUsize>,
    on_loss: OnLoss,
}

impl LaneSender {
    fn run(self) {
        let mut frames = 0;
        let mut bytes = 0;
        while let Ok(item) = self.items.recv() {
            let result = match item {
                Item::Frame(mut frame) => {
                    let result = match frame.sealed() {
                        Some(whole) => {
                            frames += 1;
                            bytes += (whole.len() - HEADER_LEN) as u64;
                            self.sent.fetch_add(whole.len() as u64, Ordering::Relaxed);
                            write_all(&self.stream, whole)
                        }
                        None => Err(WireError::Protocol("a frame was queued without its header".into())),
                    };
                    frame.clear();
                    let _ = self.back.try_send(frame);
                    result
                }
                Item::Final => self.finish(frames, bytes),
            };
            if let Err(error) = result {
                (self.on_loss)(self.index, error);
                return;
            }
        }
    }

    fn finish(&self, frames: u64, bytes: u64) -> Result<(), WireError> {
        let message = Message::Final(DataCount { frames, bytes }).encode(frames)?;
        write_all(&self.stream, &message)?;
        self.finished.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}
