//! The region in use: its fields, and the data sessions that walk the two loops over it.
//!
//! Data is copied once: out of the mapping, or out of what the transport received, into the caller's
//! buffer; and the other way. What the bytes mean is the device's to say.

use super::{
    DATA_OFFSET, DATA_SIZE, DEVICE_STATE, LoadLoop, LoadStep, PENDING_BYTES, SaveLoop, SaveStep, bits,
};
use crate::region::{read_data, read_u32, read_u64, write_data, write_u32, write_u64};
use crate::{
    Chunk, DeviceError, DeviceErrorKind, DeviceId, DeviceState, LoadSession, Piece, PrecopyInfo,
    RegionAccess, SaveSession,
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The region, and what a device and its sessions share of it.
#[derive(Debug)]
pub(super) struct Port<R> {
    id: DeviceId,
    pub(super) region: R,
    whole: bool,
    /// The state as it was read last.
    pub(super) state: DeviceState,
    /// Counts sessions: one that is over finds another number.
    epoch: u64,
    pub(super) save: SaveLoop,
    load: LoadLoop,
    /// Where the round that is being written begins.
    round: u64,
    ended: bool,
    /// Why the session cannot go on.
    pub(super) failed: Option<DeviceError>,
}

/// A port in several hands: those of the device and of its session.
#[derive(Debug)]
pub(super) struct SharedPort<R>(Arc<Mutex<Port<R>>>);

impl<R> Clone for SharedPort<R> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<R: RegionAccess> SharedPort<R> {
    pub(super) fn new(id: DeviceId, region: R, whole: bool) -> Self {
        let size = region.size();
        Self(Arc::new(Mutex::new(Port {
            id,
            region,
            whole,
            state: DeviceState::Running,
            epoch: 0,
            save: SaveLoop::new(size),
            load: LoadLoop::new(size, whole),
            round: 0,
            ended: false,
            failed: None,
        })))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Port<R>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same error, of what was done to a field.
fn about(operation: &'static str) -> impl Fn(DeviceError) -> DeviceError {
    move |error| DeviceError { operation: operation.into(), ..error }
}

impl<R: RegionAccess> Port<R> {
    /// Reads `device_state`, with its reserved bits. A session that the device has left by itself is
    /// over (V1-RESET).
    pub(super) fn read_state(&mut self) -> Result<u32, DeviceError> {
        let raw = read_u32(&mut self.region, DEVICE_STATE).map_err(about("read of device_state"))?;
        let state = bits::state_of(raw);
        let had_session = self.state.is_saving() || self.state == DeviceState::Resuming;
        if state != self.state && had_session {
            let message = format!(
                "the device went from {} to {state} by itself: it was reset, or has failed, under its session",
                self.state
            );
            tracing::warn!(device = %self.id, from = %self.state, state = %state, "a device has left its state by itself");
            self.moved(state, false);
            self.failed =
                Some(DeviceError::new(DeviceErrorKind::Lost, "use of the migration region", message));
        }
        self.state = state;
        Ok(raw)
    }

    /// Writes the three bits of `device_state`; the reserved ones stay as `raw` has them (V1-RESERVED).
    pub(super) fn write_state(&mut self, raw: u32, to: u32) -> Result<(), DeviceError> {
        let value = bits::merged(raw, to);
        write_u32(&mut self.region, DEVICE_STATE, value).map_err(about("write of device_state"))
    }

    /// The device is in `state` now; `opened`: with a session that has just begun.
    pub(super) fn moved(&mut self, state: DeviceState, opened: bool) -> u64 {
        let over = !state.is_saving() && state != DeviceState::Resuming;
        if opened || over {
            self.epoch += 1;
            self.save = SaveLoop::new(self.region.size());
            self.load = LoadLoop::new(self.region.size(), self.whole);
            self.ended = false;
            self.failed = None;
        } else {
            // What was pending in the state before is neither the end nor the amount in this one.
            self.save.again();
        }
        self.state = state;
        self.epoch
    }

    /// Whether a transaction was begun and the device has not taken all of it.
    pub(super) fn is_loading(&self) -> bool {
        self.load.next() != LoadStep::Done
    }

    /// The session of `epoch` goes on.
    fn check(&self, epoch: u64, operation: &str) -> Result<(), DeviceError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.epoch != epoch {
            let message = "the session is over: the device has left its state";
            return Err(DeviceError::new(DeviceErrorKind::Misuse, operation, message));
        }
        Ok(())
    }

    /// Any error ends a session: what was read or written has a hole (V1-LOOP-ERROR). A device that was
    /// reset meanwhile refuses because of that, and then that is the error.
    fn keep<T>(&mut self, result: Result<T, DeviceError>) -> Result<T, DeviceError> {
        let Err(mut error) = result else { return result };
        let answered = matches!(error.kind, DeviceErrorKind::Refused | DeviceErrorKind::Protocol);
        if answered && self.failed.is_none() && self.read_state().is_ok() {
            match &self.failed {
                Some(_) if self.state == DeviceState::Error => error.message.push_str("; it is in ERROR now"),
                Some(lost) => {
                    error = DeviceError { message: format!("{}; {error}", lost.message), ..lost.clone() }
                }
                None => {}
            }
        }
        self.failed = Some(error.clone());
        Err(error)
    }

    fn read_pending(&mut self) -> Result<u64, DeviceError> {
        let operation = "read of pending_bytes";
        let pending = read_u64(&mut self.region, PENDING_BYTES).map_err(about(operation))?;
        tracing::trace!(name: "vfio_update_pending", device = %self.id, pending);
        self.save.pending(pending).map_err(|fault| fault.of(operation))?;
        Ok(pending)
    }

    fn read_offset(&mut self) -> Result<u64, DeviceError> {
        read_u64(&mut self.region, DATA_OFFSET).map_err(about("read of data_offset"))
    }

    /// One step of the save loop; `Some` when it gave something.
    fn save_step(&mut self, buf: &mut [u8]) -> Result<Option<Piece>, DeviceError> {
        match self.save.next() {
            SaveStep::ReadPending => {
                self.read_pending()?;
            }
            SaveStep::ReadDataOffset => {
                let offset = self.read_offset()?;
                self.save.data_offset(offset).map_err(|fault| fault.of("read of data_offset"))?;
            }
            SaveStep::ReadDataSize => {
                let operation = "read of data_size";
                let size = read_u64(&mut self.region, DATA_SIZE).map_err(about(operation))?;
                self.save.data_size(size).map_err(|fault| fault.of(operation))?;
                if let SaveStep::Copy { offset, of, .. } = self.save.next() {
                    let pending = self.save.estimate();
                    tracing::trace!(name: "vfio_save_buffer", device = %self.id, data_offset = offset, data_size = of, pending);
                }
            }
            SaveStep::Copy { offset, length, at, of } => {
                let len = usize::try_from(length).map_or(buf.len(), |length| length.min(buf.len()));
                let operation = "read of the data section";
                read_data(&mut self.region, offset, &mut buf[..len]).map_err(about(operation))?;
                self.save.copied(len as u64).map_err(|fault| fault.of(operation))?;
                return Ok(Some(Piece::Data { len, chunk: Chunk::Part { of, offset: at } }));
            }
            SaveStep::Empty { pending } => return self.empty(pending),
        }
        Ok(None)
    }

    /// The device gave nothing: the end, a pause, or a device that has left its state (V1-RESET).
    fn empty(&mut self, pending: u64) -> Result<Option<Piece>, DeviceError> {
        self.read_state()?;
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.state != DeviceState::StopCopy {
            self.save.again();
            return Ok(Some(Piece::Drained));
        }
        if pending == 0 {
            self.ended = true;
            return Ok(Some(Piece::End));
        }
        self.save.insist().map_err(|fault| fault.of("read of data_size"))?;
        Ok(None)
    }

    /// Goes on with the resume loop for as long as it needs no more data.
    fn load_on(&mut self, mut data: &[u8]) -> Result<(), DeviceError> {
        loop {
            match self.load.next() {
                LoadStep::ReadDataOffset => {
                    // Between rounds, the next one begins with its first byte.
                    if data.is_empty() {
                        return Ok(());
                    }
                    let offset = self.read_offset()?;
                    self.load.data_offset(offset).map_err(|fault| fault.of("read of data_offset"))?;
                    self.round = offset;
                }
                LoadStep::Write { offset, length } => {
                    if data.is_empty() {
                        return Ok(());
                    }
                    let len = usize::try_from(length).map_or(data.len(), |length| length.min(data.len()));
                    let operation = "write of the data section";
                    let (now, later) = data.split_at(len);
                    write_data(&mut self.region, offset, now).map_err(about(operation))?;
                    self.load.written(len as u64).map_err(|fault| fault.of(operation))?;
                    data = later;
                }
                LoadStep::WriteDataSize { size } => {
                    let operation = "write of data_size";
                    tracing::trace!(name: "vfio_load_state_device_data", device = %self.id, data_offset = self.round, data_size = size);
                    write_u64(&mut self.region, DATA_SIZE, size).map_err(about(operation))?;
                    self.load.taken().map_err(|fault| fault.of(operation))?;
                }
                LoadStep::Done if data.is_empty() => return Ok(()),
                LoadStep::Done => {
                    let message = "more data than the transaction was said to have";
                    return Err(DeviceError::new(
                        DeviceErrorKind::Misuse,
                        "write of the data section",
                        message,
                    ));
                }
            }
        }
    }
}

/// Reads a device's state through its region.
#[derive(Debug)]
pub(super) struct Save<R> {
    pub(super) port: SharedPort<R>,
    pub(super) epoch: u64,
}

impl<R: RegionAccess> SaveSession for Save<R> {
    /// `pending_bytes`, read from the device unless that would tell it that a chunk was taken
    /// (V1-PENDING).
    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        let mut port = self.port.lock();
        port.check(self.epoch, "read of pending_bytes")?;
        if port.save.may_look() {
            let read = port.read_pending();
            port.keep(read)?;
        }
        let pending = port.save.estimate();
        tracing::trace!(name: "vfio_save_pending", device = %port.id, precopy = pending, postcopy = 0_u64, compatible = 0_u64);
        // The interface knows no initial data.
        Ok(Some(PrecopyInfo { initial_bytes: 0, dirty_bytes: pending, reinit: false }))
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Piece, DeviceError> {
        let mut port = self.port.lock();
        let operation = "read of the data section";
        port.check(self.epoch, operation)?;
        if buf.is_empty() {
            let message = "a read into an empty buffer";
            return Err(DeviceError::new(DeviceErrorKind::Misuse, operation, message));
        }
        if port.ended {
            return Ok(Piece::End);
        }
        // Each turn of the loop goes forward; an empty turn in stop-and-copy is counted (V1-HOLLOW).
        loop {
            let step = port.save_step(buf);
            if let Some(piece) = port.keep(step)? {
                return Ok(piece);
            }
        }
    }
}

/// Writes a device's state through its region.
#[derive(Debug)]
pub(super) struct Load<R> {
    pub(super) port: SharedPort<R>,
    pub(super) epoch: u64,
}

impl<R: RegionAccess> LoadSession for Load<R> {
    fn begin_chunk(&mut self, total: u64) -> Result<(), DeviceError> {
        let mut port = self.port.lock();
        let operation = "begin of a transaction";
        port.check(self.epoch, operation)?;
        let begun = port.load.begin(total).map_err(|fault| fault.of(operation));
        port.keep(begun)
    }

    fn write(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let mut port = self.port.lock();
        port.check(self.epoch, "write of the data section")?;
        let written = port.load_on(data);
        port.keep(written)
    }

    fn end_chunk(&mut self) -> Result<(), DeviceError> {
        let mut port = self.port.lock();
        let operation = "end of a transaction";
        port.check(self.epoch, operation)?;
        if port.is_loading() {
            let message = format!("only {} bytes of it are with the device", port.load.taken_bytes());
            let error = DeviceError::new(DeviceErrorKind::Misuse, operation, message);
            return port.keep(Err(error));
        }
        Ok(())
    }
}
