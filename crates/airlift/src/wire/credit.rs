//! Room: how many frames of each device the destination can take now (W-CREDIT).
//!
//! Room is taken in sequence, before a device is read, and the receiver has reserved the buffers: a
//! reader of a data connection therefore never waits for one device while frames of another stand
//! behind it.

use super::outbound::{Cargo, Outbound};
use crate::meter::Meter;
use crate::set::{ChunkSink, SinkClosed};
use airlift_stream::FrameBuf;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So many bytes are not on a connection, but in front of the destination's device.
const BEHIND: u64 = 1 << 20;

/// The engine's sink: takes room, gives buffers, and puts frames on the data connections.
#[derive(Debug)]
pub(crate) struct CreditedSink {
    outbound: Outbound,
    room: Mutex<Room>,
    more: Condvar,
}

#[derive(Debug)]
struct Room {
    devices: Vec<DeviceRoom>,
    closed: bool,
}

impl Room {
    fn device(&mut self, device: u32) -> Option<&mut DeviceRoom> {
        self.devices.get_mut(usize::try_from(device).ok()?)
    }
}

#[derive(Debug, Default)]
struct DeviceRoom {
    /// Frames that may still be sent.
    frames: u64,
    /// Lengths of the frames that were sent and for which no credit has come back: credit comes back in
    /// the order of the frames. As many as the destination gave room for at most.
    sent: VecDeque<u64>,
    in_flight: u64,
    /// What the destination writes while it alone is waited for.
    writes: Meter,
    /// When credit came last.
    credited: Option<Instant>,
}

impl DeviceRoom {
    /// The destination has more to write than can be under way: it has no room left, or so much of the
    /// device is with it.
    const fn is_behind(&self) -> bool {
        self.frames == 0 || self.in_flight >= BEHIND
    }
}

impl CreditedSink {
    pub(crate) fn new(outbound: Outbound, room: &[u32]) -> Self {
        Self {
            outbound,
            room: Mutex::new(Room {
                devices: room
                    .iter()
                    .map(|frames| DeviceRoom { frames: u64::from(*frames), ..DeviceRoom::default() })
                    .collect(),
                closed: false,
            }),
            more: Condvar::new(),
        }
    }

    fn room(&self) -> MutexGuard<'_, Room> {
        // Counters; a panic of another holder cannot leave them half-written.
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The destination has room for `frames` more. `false`: there is no such device.
    pub(crate) fn credit(&self, device: u32, frames: u32) -> bool {
        let mut room = self.room();
        let Some(own) = room.device(device) else { return false };
        let waited_for = own.is_behind() && !self.outbound.is_busy();
        own.frames = own.frames.saturating_add(u64::from(frames));
        let mut written = 0_u64;
        for _ in 0..frames {
            let Some(length) = own.sent.pop_front() else { break };
            written = written.saturating_add(length);
        }
        own.in_flight = own.in_flight.saturating_sub(written);
        let now = Instant::now();
        match own.credited.replace(now) {
            Some(last) if waited_for => own.writes.add(written, now.saturating_duration_since(last)),
            _ => own.writes.restart(),
        }
        self.more.notify_all();
        true
    }

    /// Room that was taken and not used.
    fn return_room(&self, device: u32) {
        if let Some(own) = self.room().device(device) {
            own.frames = own.frames.saturating_add(1);
        }
        self.more.notify_all();
    }

    /// Bytes of `device` that were sent and that the destination has not said to have written.
    pub(crate) fn in_flight(&self, device: u32) -> u64 {
        self.room().device(device).map_or(0, |own| own.in_flight)
    }

    /// The source's device waits for the destination, or for the connections.
    pub(crate) fn is_full(&self, device: u32) -> bool {
        self.outbound.is_busy() || self.room().device(device).is_none_or(|own| own.frames == 0)
    }

    /// Bytes of `device` that the destination writes a second; `None` while it was not what is waited for.
    pub(crate) fn write_rate(&self, device: u32) -> Option<u64> {
        self.room().device(device).and_then(|own| own.writes.rate())
    }

    /// The destination has more to write than it has written, and how fast it is is not known yet.
    pub(crate) fn is_unmeasured(&self, device: u32) -> bool {
        self.room().device(device).is_some_and(|own| own.is_behind() && own.writes.rate().is_none())
    }

    pub(crate) fn outbound(&self) -> &Outbound {
        &self.outbound
    }

    fn take_room(&self, device: u32, until: Instant) -> Result<bool, SinkClosed> {
        let mut room = self.room();
        loop {
            if room.closed {
                return Err(SinkClosed);
            }
            let own = room.device(device).ok_or(SinkClosed)?;
            if own.frames > 0 {
                own.frames -= 1;
                return Ok(true);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            room = self.more.wait_timeout(room, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl ChunkSink for CreditedSink {
    fn buffer(&self, device: u32, wait: Duration) -> Result<Option<FrameBuf>, SinkClosed> {
        let until = Instant::now() + wait;
        if !self.take_room(device, until)? {
            return Ok(None);
        }
        match self.outbound.buffer(Cargo::Device, until.saturating_duration_since(Instant::now())) {
            Ok(Some(buffer)) => Ok(Some(buffer)),
            refused => {
                self.return_room(device);
                refused
            }
        }
    }

    fn send(&self, device: u32, frame: FrameBuf) -> Result<(), SinkClosed> {
        let length = frame.sealed().map_or(0, |whole| whole.len() as u64);
        if let Some(own) = self.room().device(device) {
            own.sent.push_back(length);
            own.in_flight = own.in_flight.saturating_add(length);
        }
        self.outbound.send_device(frame)
    }

    /// Wakes everyone who waits for room or for a connection; nothing is sent any more.
    fn close(&self) {
        self.room().closed = true;
        self.more.notify_all();
        self.outbound.abort();
    }
}
