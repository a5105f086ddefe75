//! The traits of a migratable device: what the engine drives and what the crates for the kernel's
//! VFIO, for vfio-user and for interface v1 implement.
//!
//! An implementation speaks its interface and checks what its device answers. It does not order
//! devices among each other, retry, or decide what a failure means: that is the engine's.

use crate::{Capabilities, DeviceError, DeviceId, DeviceIdentity, DeviceState, TransitionError};
use std::fmt;
use std::sync::Arc;

/// One VFIO device that can be migrated, whichever interface it speaks. Owned by one worker thread.
pub trait MigrationDevice: Send + 'static {
    /// Its name in this migration.
    fn id(&self) -> &DeviceId;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// What the other side must match.
    fn identity(&self) -> &DeviceIdentity;

    /// Reads the state from the device (V2-STALE: a cached one can be wrong after a reset).
    ///
    /// # Errors
    /// When the device does not answer or the answer breaks its interface.
    fn state(&mut self) -> Result<DeviceState, DeviceError>;

    /// Walks to `target`. `Some` when an arc opened a data session; entering STOP_COPY from a
    /// PRE_COPY state keeps the session there is (V2-SESSION). Blocks for as long as the device
    /// takes, or until the implementation's own deadline.
    ///
    /// # Errors
    /// When an arc failed; the error holds the state read back (V2-READBACK).
    fn set_state(&mut self, target: DeviceState) -> Result<Option<Session>, TransitionError>;

    /// Estimate of the bytes that STOP_COPY will give, from now; `None` when the device cannot say.
    ///
    /// # Errors
    /// When the device fails to answer.
    fn stop_copy_size(&mut self) -> Result<Option<u64>, DeviceError>;

    /// Resets the device, to RUNNING. Destroys state that the guest sees: by policy only.
    ///
    /// # Errors
    /// When the reset fails; the device is then of no more use.
    fn reset(&mut self) -> Result<(), DeviceError>;

    /// A handle that wakes a call of this device that blocks, from another thread.
    fn interrupter(&self) -> Interrupter;
}

/// A data session that an arc has opened.
pub enum Session {
    /// The device's state is to be read.
    Save(Box<dyn SaveSession>),
    /// The device's state is to be written.
    Load(Box<dyn LoadSession>),
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Save(_) => "Session::Save",
            Self::Load(_) => "Session::Load",
        })
    }
}

/// What a device says of the data that PRE_COPY still has. Estimates (V2-ESTIMATE).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrecopyInfo {
    /// Bytes of initial data left. Leaving PRE_COPY before it is 0 can make the switchover slower.
    pub initial_bytes: u64,
    /// Bytes of data that has changed since it was read.
    pub dirty_bytes: u64,
    /// New initial data is on the stream: a new generation begins (V2-REINIT).
    pub reinit: bool,
}

/// How a piece of data belongs to the device's transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Part of a stream that may be cut anywhere (v2).
    Stream,
    /// Part of one indivisible transaction (V1-CHUNK).
    Part {
        /// Bytes of the whole transaction.
        of: u64,
        /// Offset of this piece in it.
        offset: u64,
    },
}

/// What a read of a save session gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// `len` bytes, above 0, stand in the buffer.
    Data {
        /// Bytes at the buffer's start.
        len: usize,
        /// Their transaction.
        chunk: Chunk,
    },
    /// Pre-copy has nothing now and may have more later. Not the end (V2-ENOMSG).
    Drained,
    /// STOP_COPY has given everything. Stays so (V2-END).
    End,
}

/// Reads a device's state, from PRE_COPY through STOP_COPY: one stream of opaque bytes (V2-OPAQUE).
pub trait SaveSession: Send {
    /// What pre-copy still has; `None` when this peer cannot say. Only in PRE_COPY states
    /// (V2-PRECOPY-INFO).
    ///
    /// # Errors
    /// When the device refuses or is gone.
    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError>;

    /// Reads the next bytes into `buf`, which is not empty. Never returns `Data` of length 0.
    ///
    /// # Errors
    /// When the device fails, is gone, or was reset under the session. The session is then over.
    fn read(&mut self, buf: &mut [u8]) -> Result<Piece, DeviceError>;
}

/// Writes a device's state while it is RESUMING.
pub trait LoadSession: Send {
    /// Opens a transaction of `total` bytes: v1 writes it whole (V1-CHUNK); v2 has nothing to do.
    ///
    /// # Errors
    /// When the device cannot take a transaction of that size.
    fn begin_chunk(&mut self, total: u64) -> Result<(), DeviceError>;

    /// Writes all of `data`.
    ///
    /// # Errors
    /// Any error is final: the device must be reset (V2-WRITE-FINAL).
    fn write(&mut self, data: &[u8]) -> Result<(), DeviceError>;

    /// Closes the transaction.
    ///
    /// # Errors
    /// As [`LoadSession::write`].
    fn end_chunk(&mut self) -> Result<(), DeviceError>;
}

/// Wakes a blocked call of a device, from any thread; the call then fails as interrupted.
#[derive(Clone)]
pub struct Interrupter(Option<Arc<dyn Fn() + Send + Sync>>);

impl Interrupter {
    /// Wakes by calling `wake`, which must not block and may be called more than once.
    #[must_use]
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(wake)))
    }

    /// For a device whose calls cannot be woken.
    #[must_use]
    pub const fn unable() -> Self {
        Self(None)
    }

    /// Wakes the blocked call. `false`: this device has no way to do so.
    #[must_use]
    pub fn interrupt(&self) -> bool {
        if let Some(wake) = &self.0 {
            wake();
        }
        self.0.is_some()
    }
}

impl fmt::Debug for Interrupter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Interrupter").field(&self.0.is_some()).finish()
    }
}
