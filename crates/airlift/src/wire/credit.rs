//! Room: how many frames of each device the destination can take now (W-CREDIT).
//!
//! Room is taken in sequence, before a device is read, and the receiver has reserved the buffers: a
//! reader of a data connection therefore never waits for one device while frames of another stand
//! behind it.

use super::outbound::Outbound;
use crate::set::{ChunkSink, SinkClosed};
use airlift_stream::FrameBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The engine's sink: takes room, gives buffers, and puts frames on the data connections.
#[derive(Debug)]
pub(crate) struct CreditedSink {
    outbound: Outbound,
    room: Mutex<Room>,
    more: Condvar,
}

#[derive(Debug)]
struct Room {
    frames: Vec<u64>,
    closed: bool,
}

impl CreditedSink {
    pub(crate) fn new(outbound: Outbound, room: &[u32]) -> Self {
        Self {
            outbound,
            room: Mutex::new(Room { frames: room.iter().map(|f| u64::from(*f)).collect(), closed: false }),
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
        let Some(count) = usize::try_from(device).ok().and_then(|i| room.frames.get_mut(i)) else {
            return false;
        };
        *count = count.saturating_add(u64::from(frames));
        self.more.notify_all();
        true
    }

    /// Wakes everyone who waits for room; nothing is sent any more.
    pub(crate) fn close(&self) {
        self.room().closed = true;
        self.more.notify_all();
        self.outbound.abort();
    }

    pub(crate) fn outbound(&self) -> &Outbound {
        &self.outbound
    }

    fn take_room(&self, device: u32, until: Instant) -> Result<bool, SinkClosed> {
        let index = usize::try_from(device).map_err(|_| SinkClosed)?;
        let mut room = self.room();
        loop {
            if room.closed {
                return Err(SinkClosed);
            }
            let count = room.frames.get_mut(index).ok_or(SinkClosed)?;
            if *count > 0 {
                *count -= 1;
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
        match self.outbound.buffer(until.saturating_duration_since(Instant::now())) {
            Ok(Some(buffer)) => Ok(Some(buffer)),
            refused => {
                self.credit(device, 1);
                refused
            }
        }
    }

    fn send(&self, _device: u32, frame: FrameBuf) -> Result<(), SinkClosed> {
        self.outbound.send_anywhere(frame)
    }
}
