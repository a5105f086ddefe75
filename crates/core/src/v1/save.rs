//! The save loop: what of the region is to be read next, given what was read.
//!
//! Each iteration reads `pending_bytes`, `data_offset` and `data_size`, copies the chunk, and reads
//! `pending_bytes` again, which tells the device that the chunk was taken. What comes next is never
//! computed (V1-PENDING).
//!
//! The loop does no access itself. It does not know in which state the device is: an empty iteration
//! is the end in stop-and-copy and a pause in pre-copy, and its user says which.

use super::INFO_SIZE;
use crate::{DeviceError, DeviceErrorKind};

/// How often in a row a device may say that bytes are pending and give none, in stop-and-copy.
const MAX_HOLLOW: u32 = 16;

/// What a device answered that the interface does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum V1Fault {
    /// `data_offset` lies in the fields, or behind the region (V1-BOUNDS).
    #[error("data_offset is {offset:#x}: not in the data section of a region of {region} bytes")]
    DataOffset {
        /// What was read.
        offset: u64,
        /// Bytes of the region.
        region: u64,
    },
    /// The chunk reaches beyond the region, or wraps around (V1-BOUNDS).
    #[error("data_size is {size:#x} at data_offset {offset:#x}: beyond a region of {region} bytes")]
    DataSize {
        /// What was read.
        size: u64,
        /// Where it would begin.
        offset: u64,
        /// Bytes of the region.
        region: u64,
    },
    /// Bytes are pending, and the device gives none, again and again (V1-HOLLOW).
    #[error("pending_bytes is {pending} and data_size 0, {times} times in a row")]
    Hollow {
        /// What was read last.
        pending: u64,
        /// How often.
        times: u32,
    },
    /// A whole transaction is larger than the data section (V1-WHOLE).
    #[error(
        "a transaction of {total} bytes, which the device takes only as a whole, and {room} bytes of data section"
    )]
    Whole {
        /// Bytes of the transaction.
        total: u64,
        /// Bytes of the section.
        room: u64,
    },
    /// An answer to something that was not asked.
    #[error("an answer that the loop did not ask for")]
    OutOfTurn,
}

impl V1Fault {
    /// The same as an error of `operation`.
    #[must_use]
    pub fn of(self, operation: &str) -> DeviceError {
        let kind = match self {
            Self::OutOfTurn => DeviceErrorKind::Misuse,
            Self::Whole { .. } => DeviceErrorKind::Unsupported,
            _ => DeviceErrorKind::Protocol,
        };
        DeviceError::new(kind, operation, self.to_string())
    }
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveStep {
    /// Read `pending_bytes` and say it with [`SaveLoop::pending`].
    ReadPending,
    /// Read `data_offset` and say it with [`SaveLoop::data_offset`].
    ReadDataOffset,
    /// Read `data_size` and say it with [`SaveLoop::data_size`].
    ReadDataSize,
    /// Copy bytes out of the region, and say how many with [`SaveLoop::copied`].
    Copy {
        /// Where the next of them is in the region.
        offset: u64,
        /// How many of the chunk are left, above 0.
        length: u64,
        /// Offset of the next one in the chunk.
        at: u64,
        /// Bytes of the whole chunk.
        of: u64,
    },
    /// The device has nothing: the end, or a pause. [`SaveLoop::again`] begins the next iteration.
    Empty {
        /// What it says is pending: above 0 when it gave a chunk of 0 bytes (V1-HOLLOW).
        pending: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Begin,
    Offset,
    Size { offset: u64 },
    Data { offset: u64, size: u64, done: u64 },
    Empty,
}

/// The save loop of one session.
#[derive(Clone, Debug)]
pub struct SaveLoop {
    region: u64,
    place: Place,
    pending: u64,
    hollow: u32,
}

impl SaveLoop {
    /// A loop at its beginning, over a region of `region` bytes.
    #[must_use]
    pub const fn new(region: u64) -> Self {
        Self { region, place: Place::Begin, pending: 0, hollow: 0 }
    }

    /// What is to be done next. Asking changes nothing.
    #[must_use]
    pub const fn next(&self) -> SaveStep {
        match self.place {
            Place::Begin => SaveStep::ReadPending,
            Place::Offset => SaveStep::ReadDataOffset,
            Place::Size { .. } => SaveStep::ReadDataSize,
            Place::Data { offset, size, done } => {
                // In the region, as `data_size` has checked.
                SaveStep::Copy { offset: offset + done, length: size - done, at: done, of: size }
            }
            Place::Empty => SaveStep::Empty { pending: self.pending },
        }
    }

    /// What `pending_bytes` was when it was read last, less what was copied since: an estimate.
    #[must_use]
    pub const fn estimate(&self) -> u64 {
        match self.place {
            Place::Data { done, .. } => self.pending.saturating_sub(done),
            _ => self.pending,
        }
    }

    /// Whether `pending_bytes` may be read now without telling the device that a chunk was taken:
    /// `data_offset` was not read since (V1-PENDING).
    #[must_use]
    pub const fn may_look(&self) -> bool {
        matches!(self.place, Place::Begin | Place::Offset | Place::Empty)
    }

    /// Whether a chunk was begun and not copied to its end: the state must not be written then, unless
    /// the session is given up (V1-OUTSTANDING).
    #[must_use]
    pub const fn is_outstanding(&self) -> bool {
        matches!(self.place, Place::Size { .. } | Place::Data { .. })
    }

    /// `pending_bytes` was read. May be said again until `data_offset` was read.
    ///
    /// # Errors
    /// [`V1Fault::OutOfTurn`] when a chunk is being read.
    pub const fn pending(&mut self, bytes: u64) -> Result<(), V1Fault> {
        if !self.may_look() {
            return Err(V1Fault::OutOfTurn);
        }
        self.pending = bytes;
        self.place = if bytes == 0 { Place::Empty } else { Place::Offset };
        Ok(())
    }

    /// `data_offset` was read.
    ///
    /// # Errors
    /// [`V1Fault::DataOffset`] when it is not in the data section.
    pub const fn data_offset(&mut self, offset: u64) -> Result<(), V1Fault> {
        if !matches!(self.place, Place::Offset) {
            return Err(V1Fault::OutOfTurn);
        }
        if offset < INFO_SIZE || offset >= self.region {
            return Err(V1Fault::DataOffset { offset, region: self.region });
        }
        self.place = Place::Size { offset };
        Ok(())
    }

    /// `data_size` was read. 0 ends the iteration.
    ///
    /// # Errors
    /// [`V1Fault::DataSize`] when the chunk is not in the region.
    pub const fn data_size(&mut self, size: u64) -> Result<(), V1Fault> {
        let Place::Size { offset } = self.place else { return Err(V1Fault::OutOfTurn) };
        match offset.checked_add(size) {
            Some(end) if end <= self.region => {}
            _ => return Err(V1Fault::DataSize { size, offset, region: self.region }),
        }
        if size == 0 {
            self.hollow += 1;
            self.place = Place::Empty;
        } else {
            self.hollow = 0;
            self.place = Place::Data { offset, size, done: 0 };
        }
        Ok(())
    }

    /// `bytes` of the chunk were copied.
    ///
    /// # Errors
    /// [`V1Fault::OutOfTurn`] when that is more than is left of it.
    pub const fn copied(&mut self, bytes: u64) -> Result<(), V1Fault> {
        let Place::Data { offset, size, done } = self.place else { return Err(V1Fault::OutOfTurn) };
        if bytes > size - done {
            return Err(V1Fault::OutOfTurn);
        }
        let done = done + bytes;
        self.place = if done == size {
            // The next read of pending_bytes tells the device that it was taken.
            self.pending = self.pending.saturating_sub(size);
            Place::Begin
        } else {
            Place::Data { offset, size, done }
        };
        Ok(())
    }

    /// Begins the next iteration with `pending_bytes`: behind an empty one in pre-copy, when the device
    /// was left alone for a while, and when the state was changed. What was pending before says nothing
    /// then: 0 in pre-copy is not the end in stop-and-copy. A chunk that is being read goes on.
    pub const fn again(&mut self) {
        if self.may_look() {
            self.hollow = 0;
            self.place = Place::Begin;
        }
    }

    /// Begins the next iteration behind one in which bytes were pending and none came, in
    /// stop-and-copy, where nothing may be left behind.
    ///
    /// # Errors
    /// [`V1Fault::Hollow`] when that has happened 16 times in a row (V1-HOLLOW).
    pub const fn insist(&mut self) -> Result<(), V1Fault> {
        if self.hollow >= MAX_HOLLOW {
            return Err(V1Fault::Hollow { pending: self.pending, times: self.hollow });
        }
        if matches!(self.place, Place::Empty) {
            self.place = Place::Begin;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_data(region: u64, offset: u64, size: u64) -> Result<SaveLoop, V1Fault> {
        let mut save = SaveLoop::new(region);
        save.pending(1)?;
        save.data_offset(offset)?;
        save.data_size(size)?;
        Ok(save)
    }

    // V1-PENDING
    #[test]
    fn an_iteration_asks_for_each_field_once_and_copies_the_chunk_whole() {
        let mut save = SaveLoop::new(0x1000);
        assert_eq!(save.next(), SaveStep::ReadPending);
        save.pending(5).unwrap();
        save.pending(100).unwrap();
        assert_eq!(save.next(), SaveStep::ReadDataOffset);
        assert!(!save.is_outstanding());
        save.data_offset(0x20).unwrap();
        assert_eq!(save.pending(3), Err(V1Fault::OutOfTurn), "it would say that the chunk was taken");
        assert_eq!(save.next(), SaveStep::ReadDataSize);
        save.data_size(10).unwrap();
        assert_eq!(save.next(), SaveStep::Copy { offset: 0x20, length: 10, at: 0, of: 10 });
        save.copied(4).unwrap();
        assert!(save.is_outstanding());
        assert_eq!(save.next(), SaveStep::Copy { offset: 0x24, length: 6, at: 4, of: 10 });
        assert_eq!(save.estimate(), 96);
        save.copied(6).unwrap();
        assert_eq!(save.next(), SaveStep::ReadPending, "also when nothing seems to be left");
        save.pending(0).unwrap();
        assert_eq!(save.next(), SaveStep::Empty { pending: 0 });
    }

    // V1-BOUNDS
    #[test]
    fn a_chunk_outside_of_the_data_section_is_refused_also_by_wrap_around() {
        for offset in [0, 31, 0x1000, u64::MAX] {
            let refused = at_data(0x1000, offset, 1).unwrap_err();
            assert_eq!(refused, V1Fault::DataOffset { offset, region: 0x1000 });
        }
        for size in [0xfe1, u64::MAX, u64::MAX - 0x1f] {
            assert!(matches!(at_data(0x1000, 0x20, size), Err(V1Fault::DataSize { .. })), "{size:#x}");
        }
        assert!(at_data(0x1000, 0x20, 0xfe0).is_ok());
        let mut save = at_data(0x1000, 0x20, 4).unwrap();
        assert_eq!(save.copied(5), Err(V1Fault::OutOfTurn));
    }

    // V1-PENDING, V1-OUTSTANDING
    #[test]
    fn what_was_pending_before_a_change_of_the_state_is_read_anew() {
        for pending in [0, 9] {
            let mut save = SaveLoop::new(0x1000);
            save.pending(pending).unwrap();
            assert_ne!(save.next(), SaveStep::ReadPending);
            save.again();
            assert_eq!(save.next(), SaveStep::ReadPending, "{pending}");
        }
        let mut save = at_data(0x1000, 0x20, 4).unwrap();
        save.again();
        assert_eq!(save.next(), SaveStep::Copy { offset: 0x20, length: 4, at: 0, of: 4 });
    }

    // V1-HOLLOW
    #[test]
    fn bytes_that_are_pending_and_never_come_end_the_loop() {
        let mut save = SaveLoop::new(0x1000);
        for turn in 1..=MAX_HOLLOW {
            save.pending(7).unwrap();
            save.data_offset(0x20).unwrap();
            save.data_size(0).unwrap();
            assert_eq!(save.next(), SaveStep::Empty { pending: 7 });
            assert_eq!(save.insist().is_err(), turn == MAX_HOLLOW, "{turn}");
        }
        assert_eq!(save.insist(), Err(V1Fault::Hollow { pending: 7, times: MAX_HOLLOW }));
        // A pause, or a chunk, forgets them.
        save.again();
        assert_eq!(save.next(), SaveStep::ReadPending);
        assert_eq!(save.insist(), Ok(()));
    }
}
