//! Data frames out: one sending thread for each data connection, fed by a short queue.
//!
//! A worker may wait for a place in a queue for as long as the other side takes; only the end of the way
//! ends that. The session's thread must not: what it says to every connection needs no place, and its
//! own frames wait for a bounded time.
//!
//! Buffers are used again: whoever fills one waits until a sender has let go of one, which is what
//! bounds memory on this side. Device data and memory have buffers of their own: the destination's
//! receive budget bounds the size of device frames alone. A frame that is queued is complete with
//! header and checksum.

use super::frames::{WireError, write_all};
use crate::link::Stream;
use crate::set::SinkClosed;
use crate::spawn::{Role, SpawnError, Spawner};
use airlift_core::Gpa;
use airlift_stream::message::DataCount;
use airlift_stream::pages::lane;
use airlift_stream::{FrameBuf, HEADER_LEN, Message};
use crossbeam_channel::{Receiver, SendTimeoutError, Sender, bounded, unbounded};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Frames that wait for one connection at most. What a session says beside them, one ROUND_END that is not
/// answered and one FINAL, is not among them.
const QUEUE: usize = 2;

/// Bytes of all buffers for device data together, and of all buffers for memory: half of what this
/// side spends on sending, however many connections and devices there are.
const HALF_BUDGET: usize = 16 << 20;

/// The largest body of a memory frame: what one run of the sweep takes.
const MEMORY_BODY: usize = 256 << 10;

/// The smallest body of a device frame, unless the destination asks for less.
const LEAST_BODY: usize = 64 << 10;

/// What a buffer is filled with, and so where it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cargo {
    /// A frame of a device: no larger than the destination's receive budget allows.
    Device,
    /// A frame of guest memory.
    Memory,
    /// A frame of its own size, made for one use. It is dropped after that.
    Once,
}

/// Says that a data connection has failed.
pub(crate) type OnLoss = Arc<dyn Fn(usize, WireError) + Send + Sync>;

enum Item {
    Frame(FrameBuf, Cargo),
    RoundEnd(u32),
    Final,
}

/// Buffers that nobody uses, of one size.
#[derive(Clone)]
struct Shelf {
    free: Receiver<FrameBuf>,
    back: Sender<FrameBuf>,
}

impl Shelf {
    fn new(count: usize, body: usize) -> Self {
        let (back, free) = bounded(count);
        for _ in 0..count {
            // The channel has room for all of them.
            let _ = back.send(FrameBuf::new(body));
        }
        Self { free, back }
    }
}

#[derive(Clone)]
struct Shelves {
    device: Shelf,
    memory: Shelf,
}

impl Shelves {
    fn give_back(&self, mut buffer: FrameBuf, cargo: Cargo) {
        buffer.clear();
        let shelf = match cargo {
            Cargo::Device => &self.device,
            Cargo::Memory => &self.memory,
            Cargo::Once => return,
        };
        // The channel has room for every buffer there is.
        let _ = shelf.back.try_send(buffer);
    }
}

/// How many buffers there are, and how large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stock {
    device_count: usize,
    device_body: usize,
    memory_count: usize,
}

impl Stock {
    /// For so many connections and devices, with device frames of at most `largest` bytes. Each device
    /// can hold one buffer that it fills and the sweep two, so that there is always one more than can
    /// be held: nobody waits for ever.
    fn of(lanes: usize, devices: usize, largest: usize) -> Self {
        let device_body = (HALF_BUDGET / (lanes + devices).max(1)).max(LEAST_BODY).min(largest).max(1);
        let wanted = lanes * (QUEUE + 1) + devices;
        let device_count = wanted.min(HALF_BUDGET / device_body).max(devices + 1);
        let memory_count = (lanes * (QUEUE + 2) + 2).clamp(3, HALF_BUDGET / MEMORY_BODY);
        Self { device_count, device_body, memory_count }
    }
}

#[derive(Debug)]
struct Lane {
    queue: Sender<Item>,
    /// Holds a value for each frame in the queue, and has no room for more.
    places: Sender<()>,
    stream: Arc<Stream>,
}

impl Lane {
    /// Takes a place in the queue. `false`: none became free within `wait`; without one, it waits until the
    /// connection has ended.
    fn take_place(&self, wait: Option<Duration>) -> Result<bool, SinkClosed> {
        match wait {
            None => self.places.send(()).map(|()| true).map_err(|_| SinkClosed),
            Some(wait) => match self.places.send_timeout((), wait) {
                Ok(()) => Ok(true),
                Err(SendTimeoutError::Timeout(())) => Ok(false),
                Err(SendTimeoutError::Disconnected(())) => Err(SinkClosed),
            },
        }
    }
}

/// The data connections of a source.
#[derive(Clone)]
pub(crate) struct Outbound {
    lanes: Arc<Vec<Lane>>,
    shelves: Shelves,
    next: Arc<AtomicUsize>,
    sent: Arc<AtomicU64>,
    unsent: Arc<AtomicUsize>,
    finished: Receiver<()>,
    aborted: Arc<AtomicBool>,
}

impl std::fmt::Debug for Outbound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbound").field("lanes", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl Outbound {
    /// Starts a thread for each connection. All buffers are allocated now; a device frame's body has
    /// at most `largest` bytes.
    pub(crate) fn new(
        streams: Vec<Stream>,
        largest: usize,
        devices: usize,
        spawner: &dyn Spawner,
        on_loss: &OnLoss,
    ) -> Result<Self, SpawnError> {
        let stock = Stock::of(streams.len(), devices, largest);
        let shelves = Shelves {
            device: Shelf::new(stock.device_count, stock.device_body),
            memory: Shelf::new(stock.memory_count, MEMORY_BODY),
        };
        let sent = Arc::new(AtomicU64::new(0));
        let unsent = Arc::new(AtomicUsize::new(0));
        let open = Arc::new(AtomicUsize::new(streams.len()));
        let (all_done, finished) = bounded(1);
        let aborted = Arc::new(AtomicBool::new(false));
        let mut lanes = Vec::with_capacity(streams.len());
        for (index, stream) in streams.into_iter().enumerate() {
            let (queue, items) = unbounded();
            let (places, taken) = bounded(QUEUE);
            let stream = Arc::new(stream);
            let sender = LaneSender {
                index,
                stream: Arc::clone(&stream),
                items,
                taken,
                shelves: shelves.clone(),
                sent: Arc::clone(&sent),
                unsent: Arc::clone(&unsent),
                open: Arc::clone(&open),
                all_done: all_done.clone(),
                on_loss: Arc::clone(on_loss),
            };
            spawner.spawn(Role::Sender, &format!("send-{index}"), Box::new(move || sender.run()))?;
            lanes.push(Lane { queue, places, stream });
        }
        let lanes = Arc::new(lanes);
        Ok(Self { lanes, shelves, next: Arc::default(), sent, unsent, finished, aborted })
    }

    /// A buffer that nobody uses, or `None` within `wait`. [`Cargo::Once`] has none.
    pub(crate) fn buffer(&self, cargo: Cargo, wait: Duration) -> Result<Option<FrameBuf>, SinkClosed> {
        if self.aborted.load(Ordering::Acquire) {
            return Err(SinkClosed);
        }
        let shelf = match cargo {
            Cargo::Device => &self.shelves.device,
            Cargo::Memory => &self.shelves.memory,
            Cargo::Once => return Ok(None),
        };
        Ok(shelf.free.recv_timeout(wait).ok())
    }

    /// Gives an unused buffer back.
    pub(crate) fn give_back(&self, buffer: FrameBuf, cargo: Cargo) {
        self.shelves.give_back(buffer, cargo);
    }

    /// Sends over the connection that its block of memory belongs to (W-MEMORY-LANE).
    pub(crate) fn send_memory(&self, at: Gpa, frame: FrameBuf) -> Result<(), SinkClosed> {
        let lane = self.lanes.get(self.lane_of(at)).ok_or(SinkClosed)?;
        self.check_open()?;
        lane.take_place(None)?;
        self.put(lane, Item::Frame(frame, Cargo::Memory))
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

    /// Sends a frame of a device over the connection with the shortest queue, however long that takes.
    pub(crate) fn send_device(&self, frame: FrameBuf) -> Result<(), SinkClosed> {
        let lane = self.shortest()?;
        lane.take_place(None)?;
        self.put(lane, Item::Frame(frame, Cargo::Device))
    }

    /// Sends a frame of its own size over the connection with the shortest queue; gives it back when
    /// there is no place for it within `wait`.
    pub(crate) fn offer_once(&self, frame: FrameBuf, wait: Duration) -> Result<Option<FrameBuf>, SinkClosed> {
        let lane = self.shortest()?;
        if !lane.take_place(Some(wait))? {
            return Ok(Some(frame));
        }
        self.put(lane, Item::Frame(frame, Cargo::Once)).map(|()| None)
    }

    fn check_open(&self) -> Result<(), SinkClosed> {
        if self.aborted.load(Ordering::Acquire) { Err(SinkClosed) } else { Ok(()) }
    }

    fn shortest(&self) -> Result<&Lane, SinkClosed> {
        self.check_open()?;
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let count = self.lanes.len().max(1);
        let lanes = (0..count).filter_map(|i| self.lanes.get((start + i) % count));
        lanes.min_by_key(|lane| lane.queue.len()).ok_or(SinkClosed)
    }

    /// Puts an item into a queue, at once: a frame has its place already.
    fn put(&self, lane: &Lane, item: Item) -> Result<(), SinkClosed> {
        self.check_open()?;
        self.unsent.fetch_add(1, Ordering::Relaxed);
        lane.queue.send(item).map_err(|_| {
            self.unsent.fetch_sub(1, Ordering::Relaxed);
            SinkClosed
        })
    }

    /// Frames wait for a connection, or for a connection to take all of them.
    pub(crate) fn is_busy(&self) -> bool {
        self.unsent.load(Ordering::Relaxed) > 0
    }

    /// Bytes that the connections have taken so far.
    pub(crate) fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Says on every connection, behind what is queued, that all memory of `round` has been sent (W-ROUND).
    /// Does not wait; no other round may begin before this one is answered, which bounds what is queued.
    pub(crate) fn end_round(&self, round: u32) -> Result<(), SinkClosed> {
        self.lanes.iter().try_for_each(|lane| self.put(lane, Item::RoundEnd(round)))
    }

    /// Closes every connection with its FINAL, behind what is queued. All data must have been given. Does
    /// not wait: [`finished`](Self::finished) says when it is done.
    pub(crate) fn finish(&self) -> Result<(), SinkClosed> {
        self.lanes.iter().try_for_each(|lane| self.put(lane, Item::Final))
    }

    /// Gives a value, once, when every FINAL has been given to its connection.
    pub(crate) fn finished(&self) -> &Receiver<()> {
        &self.finished
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
    /// Places in the queue that are taken.
    taken: Receiver<()>,
    shelves: Shelves,
    sent: Arc<AtomicU64>,
    unsent: Arc<AtomicUsize>,
    /// Connections without their FINAL.
    open: Arc<AtomicUsize>,
    all_done: Sender<()>,
    on_loss: OnLoss,
}

impl LaneSender {
    fn run(self) {
        let mut frames = 0;
        let mut bytes = 0;
        while let Ok(item) = self.items.recv() {
            let result = match item {
                Item::Frame(frame, cargo) => {
                    // Its place was taken before it was queued.
                    let _ = self.taken.try_recv();
                    let result = match frame.sealed() {
                        Some(whole) => {
                            frames += 1;
                            bytes += (whole.len() - HEADER_LEN) as u64;
                            let result = write_all(&self.stream, whole);
                            self.sent.fetch_add(whole.len() as u64, Ordering::Relaxed);
                            result
                        }
                        None => Err(WireError::Protocol("a frame was queued without its header".into())),
                    };
                    self.shelves.give_back(frame, cargo);
                    result
                }
                // No bulk data: FINAL does not count it.
                Item::RoundEnd(round) => Message::RoundEnd { round }
                    .encode(frames)
                    .map_err(WireError::from)
                    .and_then(|message| write_all(&self.stream, &message)),
                Item::Final => self.finish(frames, bytes),
            };
            self.unsent.fetch_sub(1, Ordering::Relaxed);
            if let Err(error) = result {
                (self.on_loss)(self.index, error);
                return;
            }
        }
    }

    fn finish(&self, frames: u64, bytes: u64) -> Result<(), WireError> {
        let message = Message::Final(DataCount { frames, bytes }).encode(frames)?;
        write_all(&self.stream, &message)?;
        if self.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            // The channel has room for the one value that ever comes.
            let _ = self.all_done.try_send(());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails where it must")]

    use super::*;
    use crate::spawn::StdSpawner;
    use airlift_stream::machine_record::{RecordRef, seal_record};
    use std::os::unix::net::UnixStream;

    #[test]
    fn buffers_stay_within_a_budget_and_are_always_one_more_than_can_be_held() {
        for lanes in 1..=64 {
            for devices in 0..=128 {
                let stock = Stock::of(lanes, devices, 1 << 20);
                let bytes = stock.device_count * stock.device_body + stock.memory_count * MEMORY_BODY;
                assert!(bytes <= 2 * HALF_BUDGET + LEAST_BODY, "{lanes} lanes, {devices} devices: {stock:?}");
                assert!(stock.device_count > devices && stock.memory_count > 2);
            }
        }
    }

    #[test]
    fn a_small_receive_budget_makes_device_frames_small_and_nothing_else() {
        let stock = Stock::of(1, 1, 100_000);
        assert_eq!(stock.device_body, 100_000);
        assert!(stock.memory_count >= 6);
    }

    /// A frame that no socket takes as a whole.
    fn large() -> FrameBuf {
        let mut frame = FrameBuf::new(1 << 20);
        seal_record(&mut frame, RecordRef { name: "r", data: &vec![0; 900_000] }, 0).unwrap();
        frame
    }

    // I16, W-ROUND
    #[test]
    fn what_a_session_says_does_not_wait_for_a_side_that_takes_nothing() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let on_loss: OnLoss = Arc::new(|_, _| ());
        let outbound = Outbound::new(vec![ours.into()], 1 << 20, 1, &StdSpawner, &on_loss).unwrap();
        let brief = Duration::from_millis(20);
        let mut sent = 0;
        // One is under way and the queue is full: the next is given back, and no more are kept.
        while outbound.offer_once(large(), brief).unwrap().is_none() {
            sent += 1;
            assert!(sent <= QUEUE + 1, "the queue has no bound");
        }
        let (done, told) = bounded(1);
        let clone = outbound.clone();
        std::thread::spawn(move || done.send((clone.end_round(7), clone.finish())));
        assert_eq!(told.recv_timeout(Duration::from_secs(20)), Ok((Ok(()), Ok(()))));
        outbound.abort();
        assert_eq!(outbound.finish(), Err(SinkClosed));
    }
}
