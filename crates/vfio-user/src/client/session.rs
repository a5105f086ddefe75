//! The data sessions of a device over a socket: reads and writes under way.
//!
//! A session and its device share what is under way, so that a transition finds every request
//! answered. Whether the data makes sense is the device's to say.

use super::Client;
use super::channel::{Ticket, protocol};
use crate::codec::{FeatureFlags, MigData, PrecopyInfoReply, command, feature, take};
use airlift_core::{
    Chunk, DeviceError, DeviceErrorKind, DeviceState, LoadSession, Piece, PrecopyInfo, SaveSession,
};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use zerocopy::IntoBytes;

/// What a device and its sessions share.
#[derive(Debug)]
pub(super) struct Flow {
    /// Counts sessions: one that is over finds another number.
    epoch: u64,
    /// The state, as far as sessions are concerned.
    state: DeviceState,
    reads: VecDeque<(Ticket, u32)>,
    rest: Vec<u8>,
    ended: bool,
    drained: bool,
    writes: VecDeque<Ticket>,
    failed: Option<DeviceError>,
}

/// How a device's peer is spoken to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner {
    /// It has Airlift's PRECOPY_INFO.
    pub(super) precopy_info: bool,
    /// It was told to announce new initial data.
    pub(super) reinit: bool,
    /// Most bytes of one write.
    pub(super) write_chunk: u32,
    /// Writes that may be under way.
    pub(super) writes: usize,
}

#[derive(Clone, Debug)]
pub(super) struct SharedFlow(Arc<Mutex<Flow>>);

impl SharedFlow {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Flow {
            epoch: 0,
            state: DeviceState::Running,
            reads: VecDeque::new(),
            rest: Vec::new(),
            ended: false,
            drained: false,
            writes: VecDeque::new(),
            failed: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Flow> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before a transition: nothing stays under way. An error of a write that nobody has seen yet.
    pub(super) fn settle(&self, client: &Client) -> Result<(), DeviceError> {
        let mut flow = self.lock();
        let reads = std::mem::take(&mut flow.reads);
        if !reads.is_empty() {
            let mut call = client.channel().call();
            for (ticket, _) in &reads {
                // Reads ahead of an end that nobody wanted to see: their data is not missed.
                let _ = call.wait(ticket, client.options().data_timeout);
            }
        }
        flow.flush(client)
    }

    /// After a transition: the state, and whether a new session began.
    pub(super) fn moved(&self, state: DeviceState, opened: bool) -> u64 {
        let mut flow = self.lock();
        let over = !state.is_saving() && state != DeviceState::Resuming;
        if opened || over {
            flow.epoch += 1;
            flow.rest = Vec::new();
            flow.ended = false;
            flow.failed = None;
        }
        flow.drained = false;
        flow.state = state;
        flow.epoch
    }
}

impl Flow {
    /// Waits for all writes under way. The first error is kept: the session is then over
    /// (V2-WRITE-FINAL).
    fn flush(&mut self, client: &Client) -> Result<(), DeviceError> {
        while !self.writes.is_empty() {
            self.wait_write(client);
        }
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn wait_write(&mut self, client: &Client) {
        let Some(ticket) = self.writes.pop_front() else { return };
        let result = client.channel().call().wait(&ticket, client.options().data_timeout);
        if let Err(error) = result {
            self.failed.get_or_insert(error);
        }
    }

    /// A session that is over gives nothing more (V2-AFTER-END).
    fn check(&self, epoch: u64, number: u16) -> Result<(), DeviceError> {
        if self.epoch != epoch {
            return Err(DeviceError::new(
                DeviceErrorKind::Misuse,
                command::name(number),
                "the session is over: the device has left its state",
            ));
        }
        self.failed.clone().map_or(Ok(()), Err)
    }
}

/// Reads a device's state over a socket.
#[derive(Debug)]
pub(super) struct Save {
    pub(super) client: Client,
    pub(super) flow: SharedFlow,
    pub(super) epoch: u64,
    pub(super) manner: Manner,
}

impl Save {
    fn request(&self, flow: &mut Flow, size: u32) -> Result<(), DeviceError> {
        let asked = MigData { argsz: size + 8, size };
        let sent = self.client.channel().call().send(
            command::MIG_DATA_READ,
            &[asked.as_bytes()],
            &[],
            size.saturating_add(8),
        );
        match sent {
            Ok(ticket) => flow.reads.push_back((ticket, size)),
            Err(error) => {
                flow.failed = Some(error.clone());
                return Err(error);
            }
        }
        Ok(())
    }

    /// The answer to the oldest read: bytes in `buf`.
    fn answer(&self, flow: &mut Flow, buf: &mut [u8]) -> Result<(usize, bool), DeviceError> {
        let Some((ticket, requested)) = flow.reads.pop_front() else { return Ok((0, true)) };
        let timeout = self.client.options().data_timeout;
        let result = self.client.channel().call().wait_data(&ticket, requested, buf, timeout);
        match result {
            Ok((now, later)) => {
                let short = u32::try_from(now + later.len()).is_ok_and(|n| n < requested);
                flow.rest = later;
                Ok((now, short))
            }
            Err(error) => {
                // What was read is lost: the stream has a hole.
                flow.failed = Some(error.clone());
                Err(error)
            }
        }
    }
}

const fn data(len: usize) -> Piece {
    Piece::Data { len, chunk: Chunk::Stream }
}

impl SaveSession for Save {
    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        let number = command::DEVICE_FEATURE;
        self.flow.lock().check(self.epoch, number)?;
        if !self.manner.precopy_info {
            return Ok(None);
        }
        // The saver answers behind what it is reading.
        let timeout = self.client.options().data_timeout;
        let (reply, _) = self.client.feature(feature::PRECOPY_INFO, FeatureFlags::GET, &[], 24, timeout)?;
        let (info, _) = take::<PrecopyInfoReply>(&reply)
            .ok_or_else(|| protocol(number, "the reply of PRECOPY_INFO is too short"))?;
        Ok(Some(PrecopyInfo {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
            // Without the opt-in the flag means nothing (V2-REINIT).
            reinit: self.manner.reinit && info.flags & 1 != 0,
        }))
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Piece, DeviceError> {
        let mut flow = self.flow.lock();
        flow.check(self.epoch, command::MIG_DATA_READ)?;
        if buf.is_empty() {
            return Err(DeviceError::new(
                DeviceErrorKind::Misuse,
                command::name(command::MIG_DATA_READ),
                "a read into an empty buffer",
            ));
        }
        if !flow.rest.is_empty() {
            let len = flow.rest.len().min(buf.len());
            buf[..len].copy_from_slice(&flow.rest[..len]);
            flow.rest.drain(..len);
            return Ok(data(len));
        }
        if flow.ended {
            return Ok(Piece::End);
        }
        let size = u32::try_from(buf.len()).unwrap_or(u32::MAX).min(self.client.max_xfer());
        if flow.state == DeviceState::StopCopy {
            while flow.reads.len() < self.client.options().read_pipeline.max(1) {
                self.request(&mut flow, size)?;
            }
            let (len, _) = self.answer(&mut flow, buf)?;
            if len > 0 {
                return Ok(data(len));
            }
            // Size 0, and nothing else, is the end (VU-END). What was asked ahead must be 0 too.
            while !flow.reads.is_empty() {
                let (len, _) = self.answer(&mut flow, buf)?;
                if len > 0 {
                    let error = protocol(command::MIG_DATA_READ, "data came after the end");
                    flow.failed = Some(error.clone());
                    return Err(error);
                }
            }
            flow.ended = true;
            return Ok(Piece::End);
        }
        // One read at a time: what is asked ahead here would be counted as given and not be there.
        if std::mem::take(&mut flow.drained) {
            return Ok(Piece::Drained);
        }
        self.request(&mut flow, size)?;
        let (len, short) = self.answer(&mut flow, buf)?;
        if len == 0 {
            return Ok(Piece::Drained);
        }
        // A short read says that there is no more now (VU-SHORT-READ).
        flow.drained = short;
        Ok(data(len))
    }
}

/// Writes a device's state over a socket.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) client: Client,
    pub(super) flow: SharedFlow,
    pub(super) epoch: u64,
    pub(super) manner: Manner,
}

impl LoadSession for Load {
    fn begin_chunk(&mut self, _total: u64) -> Result<(), DeviceError> {
        self.flow.lock().check(self.epoch, command::MIG_DATA_WRITE)
    }

    fn write(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let mut flow = self.flow.lock();
        let piece = usize::try_from(self.manner.write_chunk.max(1)).unwrap_or(4096);
        for part in data.chunks(piece) {
            flow.check(self.epoch, command::MIG_DATA_WRITE)?;
            while flow.writes.len() >= self.manner.writes.max(1) {
                flow.wait_write(&self.client);
                flow.check(self.epoch, command::MIG_DATA_WRITE)?;
            }
            // Some servers compare argsz with the size (VU-WRITE-ARGSZ).
            let size = u32::try_from(part.len()).unwrap_or(0);
            let head = MigData { argsz: size + 8, size };
            let sent = self.client.channel().call().send(
                command::MIG_DATA_WRITE,
                &[head.as_bytes(), part],
                &[],
                4096,
            );
            match sent {
                Ok(ticket) => flow.writes.push_back(ticket),
                Err(error) => {
                    flow.failed = Some(error.clone());
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn end_chunk(&mut self) -> Result<(), DeviceError> {
        let mut flow = self.flow.lock();
        flow.check(self.epoch, command::MIG_DATA_WRITE)?;
        flow.flush(&self.client)
    }
}
