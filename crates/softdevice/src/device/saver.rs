//! Gives a device's state: pre-copy as all of memory and then what was dirtied, STOP_COPY the rest.

use super::bitmap::PageSet;
use super::format::{HEAD, HEADER, Head, Kind, TRAILER, Trailer, put_header};
use super::registers::SAVED_BYTES;
use super::shared::{Core, Shared};
use airlift_core::{DeviceState, Errno, PrecopyInfo};
use airlift_vfio_user::Saver;
use crc_fast::{CrcAlgorithm, Digest};
use std::sync::Arc;

/// What a saving session still has to give; lives with the device, because the dirtier adds to it.
pub(crate) struct SaveSession {
    id: u64,
    header: bool,
    /// Never given.
    initial: PageSet,
    /// Given, and rewritten since.
    dirty: PageSet,
    last: Last,
}

/// Which of the records after the pages comes next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    Bar2,
    Registers,
    Trailer,
    End,
}

impl SaveSession {
    pub(crate) fn new(id: u64, pages: usize) -> Self {
        let (initial, dirty) = (PageSet::full(pages), PageSet::empty(pages));
        Self { id, header: true, initial, dirty, last: Last::Bar2 }
    }

    /// A page was rewritten.
    pub(crate) fn rewritten(&mut self, page: usize) {
        if !self.initial.contains(page) {
            self.dirty.insert(page);
        }
    }

    fn initial_bytes(&self) -> u64 {
        self.initial.stream_bytes() + if self.header { HEADER as u64 } else { 0 }
    }

    fn last_bytes(&self, bar2_size: u64) -> u64 {
        let registers = (HEAD + SAVED_BYTES) as u64;
        let trailer = (HEAD + TRAILER) as u64;
        match self.last {
            Last::Bar2 => HEAD as u64 + bar2_size + registers + trailer,
            Last::Registers => registers + trailer,
            Last::Trailer => trailer,
            Last::End => 0,
        }
    }
}

/// What the bytes that were taken from the device, and not read yet, are part of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Initial,
    Dirty,
    Last,
}

/// Reads one saving session. Holds at most one record of 64 pages.
pub(crate) struct SoftSaver {
    shared: Arc<Shared>,
    session: u64,
    out: Vec<u8>,
    at: usize,
    part: Part,
    crc: Digest,
    bytes: u64,
    pages: u64,
}

impl SoftSaver {
    /// For the session that is open.
    pub(crate) fn new(shared: &Arc<Shared>) -> Result<Self, Errno> {
        let session = shared.core().save.as_ref().ok_or(Errno::ENODEV)?.id;
        Ok(Self {
            shared: Arc::clone(shared),
            session,
            out: Vec::new(),
            at: 0,
            part: Part::Initial,
            crc: Digest::new(CrcAlgorithm::Crc64Nvme),
            bytes: 0,
            pages: 0,
        })
    }

    const fn left(&self) -> u64 {
        (self.out.len() - self.at) as u64
    }

    /// Takes the next record from the device into `out`; `false` when there is nothing now.
    fn refill(&mut self) -> Result<bool, Errno> {
        self.out.clear();
        self.at = 0;
        let shared = Arc::clone(&self.shared);
        let mut guard = shared.core();
        let core: &mut Core = &mut guard;
        let save = core.save.as_mut().filter(|save| save.id == self.session).ok_or(Errno::ENODEV)?;
        if save.header {
            save.header = false;
            self.part = Part::Initial;
            put_header(&mut self.out, shared.options.state_size, shared.options.bar2_size);
        } else if let Some((part, (first, length))) = save
            .initial
            .take_run()
            .map(|run| (Part::Initial, run))
            .or_else(|| save.dirty.take_run().map(|run| (Part::Dirty, run)))
        {
            self.part = part;
            self.pages += length as u64;
            self.put_head(Kind::Pages, length, first as u64);
            self.out.extend_from_slice(core.memory.run(first, length));
        } else if core.state == DeviceState::StopCopy {
            self.part = Part::Last;
            match save.last {
                Last::Bar2 => {
                    save.last = Last::Registers;
                    let bar2 = core.bar2_at_stop.as_deref().ok_or(Errno::EIO)?;
                    self.put_head(Kind::Bar2, bar2.len(), 0);
                    self.out.extend_from_slice(bar2);
                }
                Last::Registers => {
                    save.last = Last::Trailer;
                    let saved = core.registers.save(core.memory.seed(), core.memory.tick());
                    self.put_head(Kind::Registers, saved.len(), 0);
                    self.out.extend_from_slice(&saved);
                }
                Last::Trailer => {
                    save.last = Last::End;
                    let digest = shared.digest(core);
                    drop(guard);
                    self.put_trailer(digest);
                    return Ok(true);
                }
                Last::End => return Ok(false),
            }
        } else {
            return Ok(false);
        }
        drop(guard);
        self.crc.update(&self.out);
        self.bytes += self.out.len() as u64;
        Ok(true)
    }

    fn put_head(&mut self, kind: Kind, count: usize, first: u64) {
        // A run has at most 64 pages, BAR2 at most 16 MiB.
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        Head { kind, count, first }.put(&mut self.out);
    }

    fn put_trailer(&mut self, digest: u64) {
        let trailer = Trailer { pages: self.pages, bytes: self.bytes, digest, crc: 0 };
        self.put_head(Kind::Trailer, TRAILER, 0);
        trailer.put_open(&mut self.out);
        self.crc.update(&self.out);
        self.out.extend(self.crc.finalize().to_le_bytes());
    }
}

impl Saver for SoftSaver {
    fn precopy_info(&mut self) -> PrecopyInfo {
        let core = self.shared.core();
        let Some(save) = core.save.as_ref().filter(|save| save.id == self.session) else {
            return PrecopyInfo::default();
        };
        let left = |part| if self.part == part { self.left() } else { 0 };
        PrecopyInfo {
            initial_bytes: save.initial_bytes() + left(Part::Initial),
            dirty_bytes: save.dirty.stream_bytes() + left(Part::Dirty),
            reinit: false,
        }
    }

    fn stop_copy_size(&mut self) -> u64 {
        let core = self.shared.core();
        let Some(save) = core.save.as_ref().filter(|save| save.id == self.session) else {
            return 0;
        };
        let pages = save.initial_bytes() + save.dirty.stream_bytes();
        pages + save.last_bytes(self.shared.options.bar2_size) + self.left()
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<usize, Errno> {
        if self.at == self.out.len() && !self.refill()? {
            return Ok(0);
        }
        let length = buf.len().min(self.out.len() - self.at);
        buf[..length].copy_from_slice(&self.out[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}
