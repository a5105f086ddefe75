//! Where device data goes, and what a set of devices says by itself.

use airlift_core::{DeviceError, TransitionError};
use airlift_stream::{FrameBuf, RecordError, StreamTotals};
use std::time::Duration;

/// The way to the other side was closed: by a rollback, or because the connection is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the way to the other side is closed")]
pub struct SinkClosed;

/// Takes the data of a set of devices that is being saved. Called from the devices' workers, from
/// each in sequence.
pub trait ChunkSink: Send + Sync {
    /// An empty buffer for `device`, once the other side has room for one more frame; `None` when it
    /// has none within `wait`. Room is taken here, before the data is read, so that it is taken in
    /// sequence (W-CREDIT).
    ///
    /// # Errors
    /// When the way is closed.
    fn buffer(&self, device: u32, wait: Duration) -> Result<Option<FrameBuf>, SinkClosed>;

    /// Takes a finished DEVICE frame ([`FrameBuf::sealed`] holds its bytes). Frames of a device come
    /// in sequence; they may travel over any connection.
    ///
    /// # Errors
    /// When the way is closed.
    fn send(&self, device: u32, frame: FrameBuf) -> Result<(), SinkClosed>;

    /// Ends the way for all devices: whoever waits in one of the other calls comes back with
    /// [`SinkClosed`], and so does every later call. Must not wait; may be called more than once.
    ///
    /// It is called when a device's worker did not answer in time: what it waits for can be the other
    /// side. A sink whose calls can wait for longer than a step's deadline must implement it, or the device
    /// is given up although nothing is wrong with it.
    fn close(&self) {}
}

/// Something that a device's worker found by itself.
#[derive(Clone, Debug)]
pub enum SetEvent {
    /// Loading: a frame was written to the device; its buffer is free again.
    Written {
        /// Position of the device in its set.
        device: u32,
    },
    /// Loading: a generation of initial data was written.
    InitialData {
        /// Position of the device in its set.
        device: u32,
        /// The generation, from 1.
        generation: u32,
    },
    /// Loading: the configuration record of the device.
    Config {
        /// Position of the device in its set.
        device: u32,
        /// Its bytes, at most 1 MiB.
        data: Vec<u8>,
    },
    /// Loading: the stream ended; everything is written.
    Ended {
        /// Position of the device in its set.
        device: u32,
        /// What arrived.
        totals: Box<StreamTotals>,
    },
    /// The device failed outside of any call.
    Failed {
        /// Position of the device in its set.
        device: u32,
        /// How.
        error: StreamFault,
    },
}

/// Why a device's stream cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamFault {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An arc failed.
    #[error(transparent)]
    Transition(#[from] Box<TransitionError>),
    /// The way to the other side is closed.
    #[error(transparent)]
    Closed(#[from] SinkClosed),
    /// What arrived breaks the rules of the wire or of the records.
    #[error(transparent)]
    Stream(#[from] RecordError),
}
