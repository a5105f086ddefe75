//! The data thread's part of the migration region: chunks that a saver gives, and rounds that a loader
//! takes.
//!
//! A chunk is what one call of [`Saver::read`] gave (V1-CHUNK). It is fetched from the saver by the read
//! of `pending_bytes` that finds none, published in the data section by the read of `data_offset`, and
//! forgotten by the read of `pending_bytes` after that (V1-PENDING).
//!
//! In STOP_COPY `pending_bytes` is 0 when the saver has nothing, and never because of an estimate. In
//! PRE_COPY it also tells what only comes after the stop, which a user could not know of otherwise: a
//! saver that has that alone gives a chunk of 0 bytes for now (V1-HOLLOW).
//!
//! Which task may come in which state was checked on the device thread.

use super::V1Region;
use crate::Saver;
use crate::server::data::{self, Session};
use airlift_core::Errno;

/// What is to be done with the region.
#[derive(Clone, Copy, Debug)]
pub(in crate::server) enum Task {
    /// `pending_bytes` is read; `stopped`: in STOP_COPY.
    Pending { stopped: bool },
    /// `data_offset` is read while the device saves.
    Offset,
    /// `data_size` is read while the device saves.
    Size,
    /// Bytes of the chunk are read, from this one on.
    Read { at: u64, count: usize },
    /// Bytes of a round are written, from this one on: those behind the head of the request.
    Write { at: u64 },
    /// `data_size` is written: the loader takes so many bytes.
    Take { size: usize },
}

/// The chunk of a session, and room for the data of a round.
#[derive(Debug, Default)]
pub(in crate::server) struct Chunk {
    buffer: Vec<u8>,
    /// Bytes of the buffer that the saver gave; 0: there is no chunk.
    staged: usize,
    /// They are in the data section, and the client was told where.
    published: bool,
}

impl Chunk {
    /// Does a task; what the client is answered. A saver or loader that fails ends the session
    /// (V1-LOOP-ERROR).
    pub(in crate::server) fn run(
        &mut self,
        session: &mut Session,
        region: &V1Region,
        task: Task,
        written: &[u8],
    ) -> Result<Vec<u8>, Errno> {
        // After a failure everything gets the same answer.
        if let Session::Failed(errno) = session {
            return Err(*errno);
        }
        let number = |value: u64| Ok(value.to_ne_bytes().to_vec());
        match task {
            Task::Pending { stopped } => {
                let Session::Save(saver) = session else { return Err(Errno::EINVAL) };
                let pending = self.pending(saver.as_mut(), region, stopped);
                if let Err(errno) = pending {
                    *session = Session::Failed(errno);
                }
                number(pending?)
            }
            Task::Offset => {
                self.publish(region)?;
                number(region.start)
            }
            Task::Size => number(if self.published { self.staged as u64 } else { 0 }),
            Task::Read { at, count } => {
                let end = at.checked_add(count as u64).ok_or(Errno::EINVAL)?;
                if !self.published || end > self.staged as u64 {
                    return Err(Errno::EINVAL);
                }
                let mut data = vec![0; count];
                region.get(at, &mut data)?;
                Ok(data)
            }
            Task::Write { at } => region.put(at, written).map(|()| Vec::new()),
            Task::Take { size } => {
                let buffer = room(&mut self.buffer, size)?;
                region.get(0, buffer)?;
                data::write(session, buffer).map(|()| Vec::new())
            }
        }
    }

    fn pending(&mut self, saver: &mut dyn Saver, region: &V1Region, stopped: bool) -> Result<u64, Errno> {
        if self.published {
            self.published = false;
            self.staged = 0;
        }
        if self.staged == 0 {
            let size = usize::try_from(region.section.size).map_err(|_| Errno::ENOMEM)?;
            let buffer = room(&mut self.buffer, size)?;
            self.staged = saver.read(buffer)?.min(size);
        }
        let left = if !stopped {
            let info = saver.precopy_info();
            // Some count in what they have for after the stop what is still to come before it.
            info.initial_bytes.saturating_add(info.dirty_bytes).max(saver.stop_copy_size())
        } else if self.staged == 0 {
            0
        } else {
            saver.stop_copy_size()
        };
        Ok(left.saturating_add(self.staged as u64))
    }

    /// Puts the chunk into the data section, once: reading `data_offset` again gives the same
    /// (V1-STABLE).
    fn publish(&mut self, region: &V1Region) -> Result<(), Errno> {
        if !self.published && self.staged > 0 {
            region.put(0, self.buffer.get(..self.staged).unwrap_or_default())?;
            self.published = true;
        }
        Ok(())
    }
}

/// The first `size` bytes of the buffer, which grows where it must.
fn room(buffer: &mut Vec<u8>, size: usize) -> Result<&mut [u8], Errno> {
    if buffer.len() < size {
        // Not as a growth of what is there: nothing in it is to be kept, and new memory is zero already.
        *buffer = vec![0; size];
    }
    buffer.get_mut(..size).ok_or(Errno::ENOMEM)
}
