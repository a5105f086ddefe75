//! Buffers that are used again: allocated once, before the guest stops, and bounded in number.

use crossbeam_channel::{Receiver, Sender, bounded};
use std::fmt;
use std::ops::Deref;
use std::time::Duration;

/// A fixed number of receive buffers. What it has handed out comes back when it is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    free: Receiver<Vec<u8>>,
    back: Sender<Vec<u8>>,
}

impl Pool {
    /// `count` buffers of `size` bytes. All are allocated and touched now: a page fault or a failed
    /// allocation belongs here and not into the downtime.
    pub(crate) fn new(count: usize, size: usize) -> Self {
        let (back, free) = bounded(count);
        for _ in 0..count {
            let mut buffer = vec![0xff; size];
            buffer.clear();
            // The channel has room for all of them.
            let _ = back.send(buffer);
        }
        Self { free, back }
    }

    /// A free buffer, or `None` when there is none within `wait`.
    pub(crate) fn take(&self, wait: Duration) -> Option<PooledBuf> {
        let bytes = self.free.recv_timeout(wait).ok()?;
        Some(PooledBuf { bytes, back: Some(self.back.clone()) })
    }
}

/// A payload that was received. Goes back to where it came from when it is dropped.
pub struct PooledBuf {
    bytes: Vec<u8>,
    back: Option<Sender<Vec<u8>>>,
}

impl PooledBuf {
    /// Makes it `len` bytes long, to be read into. Within the pool's size nothing is allocated.
    pub(crate) fn space(&mut self, len: usize) -> &mut [u8] {
        self.bytes.resize(len, 0);
        &mut self.bytes
    }
}

impl From<Vec<u8>> for PooledBuf {
    /// A payload of the embedder's own, which belongs to no pool.
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, back: None }
    }
}

impl Deref for PooledBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for PooledBuf {
    fn drop(&mut self) {
        if let Some(back) = self.back.take() {
            // When the pool is gone, so is the session.
            let _ = back.try_send(std::mem::take(&mut self.bytes));
        }
    }
}

impl fmt::Debug for PooledBuf {
    // Device state is never printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PooledBuf({} bytes)", self.bytes.len())
    }
}
